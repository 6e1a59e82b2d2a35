"""Accuracy of students made without data, beside the three reference rows, over several seeds.

    python benchmarks/accuracy.py                        the embedded digits: w4a4, w3a3 and w8a8 by distillation
    python benchmarks/accuracy.py --kit DIR --network resnet20 fdmobilenet
                                                         networks of DIR (resnet20.py, fdmobilenet.py, prepare.py)
    python benchmarks/accuracy.py --algorithm gptq reconstruction --generator zeroq genie --scheme w4a4 w3a3 \\
                                  --policy edges_8bit --seeds 1        every one of them with every other
    python benchmarks/accuracy.py --write FILE.md        and the rows into a table, beside those that are there
    python benchmarks/accuracy.py num_samples=2048       anything else goes to `dfq run`

Every row of a (network, algorithm, scheme) has the same weights, policy, sample count, settings and seed; only the
images differ, those of each generator and of the references. Mean over seeds and the spread (highest minus lowest).
Nothing is tuned on what is printed here. Where labelled pictures are few, all of them judge the students that saw none,
and the real-data row is calibrated on every other one and judged on the rest (marked "half").
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FACTORY = ["teacher=factory", "teacher.task=classification", "evaluation=arrays"]
IMAGENET = ["teacher.mean=[0.485,0.456,0.406]", "teacher.std=[0.229,0.224,0.225]"]
COLUMNS = [
    "network",
    "algorithm",
    "settings",
    "scheme",
    "policy",
    "data",
    "samples",
    "seeds",
    "top-1",
    "spread",
    "agreement",
    "minutes",
]
NUM_KEYS = 7  # columns that say what a row is; the others are what came out


@dataclass(frozen=True)
class Network:
    """How `dfq run` is told of a network, and of its pictures: to judge all rows, and for the real-data row."""

    arguments: list[str]
    judge: str = ""
    real: str = ""
    judge_real: str = ""  # another file than ``judge`` where real pictures are few

    def runs(self, data: Path) -> list[list[str]]:
        """Arguments of each `dfq run` whose rows are wanted."""
        if not self.judge:
            return [self.arguments]
        judge = [*self.arguments, f"evaluation.path={data / self.judge}"]
        if not self.judge_real:
            return [[*judge, f"evaluation.reference_path={data / self.real}"]]
        half = [f"evaluation.path={data / self.judge_real}", f"evaluation.reference_path={data / self.real}"]
        return [[*judge, "references=[gaussian]"], [*self.arguments, *half, "references=[real]"]]


NETWORKS = {
    "digits": Network([]),
    "resnet20": Network(
        [*FACTORY, "teacher.factory=resnet20:load", "teacher.input_size=[3,32,32]", *IMAGENET],
        "cifar10_test.npz",
        "cifar10_real1024.npz",
    ),
    "fdmobilenet": Network(
        [*FACTORY, "teacher.factory=fdmobilenet:load", "teacher.input_size=[3,224,224]", *IMAGENET],
        "imagenet_all.npz",
        "imagenet_even.npz",
        "imagenet_odd.npz",
    ),
}


def rows_of(arguments: list[str], folder: Path, environment: dict[str, str]) -> list[dict]:
    """The rows of one ``dfq run``; ``folder`` keeps what it shares with other runs."""
    output = folder / "runs" / f"{time.time_ns()}"
    command = [sys.executable, "-m", "dfq", "run", *arguments, f"hydra.run.dir={output}"]
    finished = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} ended with {finished.returncode}")
    return json.loads((output / "details.json").read_text())["references"]


def measure(
    name: str,
    algorithm: str,
    generator: str,
    scheme: str,
    options: argparse.Namespace,
    folder: Path,
    data: Path,
    environment: dict,
) -> list[dict]:
    """One row for each kind of data: mean and spread over the seeds."""
    found: dict[str, list[dict]] = {}
    for seed in range(options.seeds):
        chosen = [f"algorithm={algorithm}", f"generator={generator}", f"scheme={scheme}"]
        chosen += [f"scheme.policy={options.policy}", f"seed={seed}"]
        for position, arguments in enumerate(NETWORKS[name].runs(data)):
            for row in rows_of([*arguments, *chosen, *options.arguments], folder, environment):
                label = row["row"] if position == 0 else f"{row['row']}, half"
                if position == 0 or row["role"] != "student":  # the student is the same, judged on less
                    found.setdefault(label, []).append(row)
    rows = []
    for label, seeds in found.items():
        top1 = [row["metrics"]["top1"] for row in seeds]
        rows.append(
            {
                "network": name,
                "algorithm": algorithm,
                "settings": " ".join(f"`{argument}`" for argument in options.arguments),
                "scheme": scheme,
                "policy": options.policy,
                "data": label,
                "samples": str(seeds[0].get("num_samples") or ""),
                "seeds": str(len(seeds)),
                "top-1": f"{statistics.mean(top1):.4f}",
                "spread": f"{max(top1) - min(top1):.4f}",
                "agreement": f"{statistics.mean(row['agreement'] for row in seeds):.4f}",
                "minutes": f"{statistics.mean((row.get('seconds') or 0) / 60 for row in seeds):.1f}",
            }
        )
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """Add ``rows`` to the table in ``path``, in the place of those that say the same in the first columns."""
    known: dict[tuple, dict] = {}
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.startswith("|")][2:]
        for line in lines:
            row = dict(zip(COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
            known[tuple(row[column] for column in COLUMNS[:NUM_KEYS])] = row
    for row in rows:
        known[tuple(row[column] for column in COLUMNS[:NUM_KEYS])] = row
    table = [COLUMNS, ["---"] * len(COLUMNS), *([row[column] for column in COLUMNS] for row in known.values())]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    head = path.read_text().partition("| network")[0] if path.exists() else "# Accuracy without data\n\n"
    path.write_text(f"{head}{text}\n")


def prepare(kit: Path, folder: Path, environment: dict[str, str]) -> Path:
    """The kit's pictures in the format of ``evaluation=arrays``."""
    import numpy as np

    data = folder / "kit"
    if not (data / "imagenet_all.npz").exists():
        subprocess.run([sys.executable, "prepare.py", str(data)], cwd=kit, env=environment, check=True)
        halves = [np.load(data / f"imagenet_{half}.npz") for half in ("even", "odd")]
        together = {key: np.concatenate([half[key] for half in halves]) for key in ("images", "labels")}
        np.savez(data / "imagenet_all.npz", **together)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=["digits"], choices=list(NETWORKS))
    parser.add_argument("--algorithm", nargs="+", default=["distillation"])
    parser.add_argument("--generator", nargs="+", default=["zeroq"])
    parser.add_argument("--scheme", nargs="+", default=["w4a4", "w3a3", "w8a8"])
    parser.add_argument("--policy", default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kit", type=Path, help="folder with resnet20.py, fdmobilenet.py and prepare.py")
    parser.add_argument("--folder", type=Path, help="where datasets and students are kept for the next call")
    parser.add_argument("--write", type=Path, help="markdown file to add the rows to")
    parser.add_argument("arguments", nargs="*", help="more for dfq run, e.g. num_samples=2048")
    options = parser.parse_intermixed_args()  # arguments of dfq run may stand anywhere
    needs_kit = [name for name in options.network if NETWORKS[name].judge]
    if needs_kit and (options.kit is None or not (options.kit / "prepare.py").exists()):
        sys.exit(f"no rows for {', '.join(needs_kit)}: give --kit DIR with resnet20.py, fdmobilenet.py and prepare.py")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        environment, data = dict(os.environ), folder
        if needs_kit:
            kit = options.kit.resolve()
            environment |= {"PYTHONPATH": str(kit), "PYTHONDONTWRITEBYTECODE": "1"}
            data = prepare(kit, folder, environment)
        print("  ".join(COLUMNS))
        for name in options.network:
            for chosen in itertools.product(options.algorithm, options.generator, options.scheme):
                rows = measure(name, *chosen, options, folder, data, environment)
                for row in rows:
                    print("  ".join(row[column] for column in COLUMNS), flush=True)
                if options.write is not None:
                    write(options.write, rows)


if __name__ == "__main__":
    main()
