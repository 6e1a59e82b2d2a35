"""The estimate of the accuracy drop against the truth, and the constants of dfq/drop.py fitted anew.

    python benchmarks/drop.py --kit DIR --folder WORK     students of digits, ResNet-20 and FD-MobileNet; a quarter of
                                                          an hour on one core beside the generation
    python benchmarks/drop.py --folder WORK               digits alone

For every student: the estimate by the constants in dfq/drop.py, the estimate with A and B fitted to the other networks
alone (what a new network would see), and the true drop on labelled pictures, which nothing but this comparison reads.
Then rank correlation, how often the truth lies inside the interval, both ways, and the constants: A and B fitted to
all, S the smallest with which nine in ten intervals hold for networks that A and B were not fitted to. Logits are kept
in WORK, so that a second call takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import accuracy
import numpy as np
import torch
from scipy.optimize import minimize
from scipy.stats import spearmanr

import dfq
from dfq import drop
from dfq.evaluation import Arrays, Digits

IMAGENET = {"task": "classification", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ALL, BOTH = ["all"], ["all", "edges_8bit"]


@dataclass(frozen=True)
class Network:
    num_samples: int
    teacher: dict
    judge: str = ""
    students: list[tuple[str, str, list[str]]] = field(default_factory=list)  # algorithm, schemes, policies


NETWORKS = {
    "digits": Network(
        1024,
        {"model": "digits"},
        "",
        [("round_to_nearest", "w8a8 w4a8 w4a4 w3a3 w2a4", ALL), ("gptq", "w8a8 w4a8 w4a4 w3a3 w2a4", ALL)],
    ),
    "resnet20": Network(
        2048,
        {"model": "factory", "factory": "resnet20:load", "input_size": [3, 32, 32], **IMAGENET},
        "cifar10_test.npz",
        [("round_to_nearest", "w8a8 w6a6 w5a5 w4a8 w4a4 w3a3", ALL), ("gptq", "w4a4 w3a3 w2a4", BOTH)],
    ),
    "fdmobilenet": Network(
        512,
        {"model": "factory", "factory": "fdmobilenet:load", "input_size": [3, 224, 224], **IMAGENET},
        "imagenet_all.npz",
        [
            ("round_to_nearest", "w8a8 w6a6 w5a5 w4a8", ALL),
            ("equalization", "w8a8 w6a6 w5a5 w4a8", ALL),
            ("gptq", "w6a6 w5a5 w4a8 w4a4", BOTH),
        ],
    ),
}


def collect(name: str, folder: Path, data: Path) -> list[dict]:
    """d_1, d_2 and the true drop of each student of a network."""
    network = NETWORKS[name]
    teacher = dfq.load_teacher(**network.teacher)
    dataset = dfq.generate(teacher, "zeroq", network.num_samples)
    synthetic = dataset.tensors()["images"][dataset.split()[1]]
    evaluation = Arrays(str(data / network.judge), batch_size=100) if network.judge else Digits()

    @torch.no_grad()
    def answer(model: Callable, what: str) -> tuple[torch.Tensor, float]:
        """Logits for held-out synthetic samples, and accuracy on the labelled pictures; kept on disk."""
        path = folder / "logits" / f"{name}_{what}.pt"
        if not path.exists():
            logits = torch.cat([model(batch) for batch in synthetic.split(64)])
            right = [
                (model(images).argmax(1) == labels).float() for images, labels in evaluation.batches(teacher.input_spec)
            ]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save((logits, float(torch.cat(right).mean())), path)
        return torch.load(path, weights_only=True)

    wanted, before = answer(teacher, "teacher")
    rows = []
    for algorithm, schemes, policies in network.students:
        for scheme in schemes.split():
            for policy in policies:
                what = f"{scheme}_{policy}_{algorithm}"
                student = (
                    None
                    if (folder / "logits" / f"{name}_{what}.pt").exists()
                    else dfq.quantize(teacher, dataset, scheme, policy, algorithm)
                )
                got, after = answer(student, what)
                found = drop.estimate_drop(got, wanted)
                rows.append({"network": name, "student": what, "found": found, "truth": 1 - after / before})
    return rows


def feature(rows: list[dict]) -> np.ndarray:
    """(logit d_1 + logit d_2) / 2 of each row."""
    shares = np.array([(row["found"].disagreement, row["found"].doubled_disagreement) for row in rows])
    return np.log(shares / (1 - shares)).mean(1)


def fit(x: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A and B: largest likelihood, errors normal, as wide as one deviation on the logit's scale is, and FLOOR more."""

    def loss(p: np.ndarray) -> float:
        expected = sigmoid(p[0] + p[1] * x)
        variance = drop.FLOOR**2 + (np.exp(p[2]) * expected * (1 - expected)) ** 2
        return float(((truth - expected) ** 2 / variance + np.log(variance)).sum())

    options = {"maxiter": 40000, "maxfev": 40000, "xatol": 1e-7, "fatol": 1e-9}
    runs = [minimize(loss, [0.0, 1.0, s], method="Nelder-Mead", options=options) for s in (-1.0, 0.0)]
    return min(runs, key=lambda run: run.fun).x[:2]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def interval(middle: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected drop and the ends of its interval, as dfq/drop.py has them; ``middle`` = A + B x."""
    high = np.minimum(sigmoid(middle + drop.Z * s) + drop.FLOOR, 1.0)
    return sigmoid(middle), sigmoid(middle - drop.Z * s) - drop.FLOOR, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, help="folder with resnet20.py, fdmobilenet.py and prepare.py")
    parser.add_argument("--folder", type=Path, required=True, help="where datasets and logits are kept")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    names, data = ["digits"], folder
    if options.kit is not None:
        if not (options.kit / "prepare.py").exists():
            sys.exit(f"got --kit {options.kit} without prepare.py")
        sys.path.insert(0, str(options.kit.resolve()))
        names, data = list(NETWORKS), accuracy.prepare(options.kit.resolve(), folder, dict(os.environ))
    else:
        print("digits alone: give --kit DIR for ResNet-20 and FD-MobileNet")
    with contextlib.chdir(folder):  # datasets go under it
        rows = [row for name in names for row in collect(name, folder, data)]
    x, truth = feature(rows), np.array([row["truth"] for row in rows])
    network = np.array([row["network"] for row in rows])
    shipped = [np.array([getattr(row["found"], key) for row in rows]) for key in ("drop", "low", "high")]
    middle = np.zeros(len(rows))
    for name in names if len(names) > 1 else []:
        mine = network == name
        a, b = fit(x[~mine], truth[~mine])
        middle[mine] = a + b * x[mine]
    others = interval(middle, drop.S)

    def held(s: float) -> int:
        _, low, high = interval(middle, s)
        return int(((truth >= low) & (truth <= high)).sum())

    print("shares of the teacher's accuracy          d_1   d_2   true   estimate (interval)        from the others")
    for i, row in enumerate(rows):
        columns = [f"{column[0][i]:6.3f} ({column[1][i]:6.3f} to {column[2][i]:5.3f})" for column in (shipped, others)]
        shares = f"{row['found'].disagreement:5.3f} {row['found'].doubled_disagreement:5.3f}"
        print(f"{row['network']:12}{row['student']:27} {shares} {truth[i]:6.3f}", *columns)
    for what, (expected, low, high) in (("shipped constants", shipped), ("fitted to the other networks", others)):
        inside = ((truth >= low) & (truth <= high)).sum()
        rank = spearmanr(expected, truth).statistic
        print(f"{what}: rank correlation {rank:.3f}, inside the interval {inside} of {len(rows)}")
    s = next((s for s in np.arange(0.05, 3, 0.05) if held(s) >= 0.9 * len(rows) - 0.5), float("nan"))
    print("fitted: A = {:.2f}, B = {:.2f}, S = {:.2f}".format(*fit(x, truth), s))


if __name__ == "__main__":
    main()
