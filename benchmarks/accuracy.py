"""Accuracy of students made without data, beside the three reference rows, over several seeds.

    python benchmarks/accuracy.py                                 the embedded digits, 3 seeds, w4a4, w3a3 and w8a8
    python benchmarks/accuracy.py --kit DIR                       and the CIFAR-10 ResNet-20 of DIR (resnet20.py)
    python benchmarks/accuracy.py --seeds 1 --scheme w4a4 ...     one of them

Every row of a scheme has the same weights, policy, sample count, algorithm and seed; only the images differ. Mean over
seeds and the spread (highest minus lowest). Nothing is tuned on what is printed here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESNET20 = [
    "teacher=factory",
    "teacher.factory=resnet20:load",
    "teacher.task=classification",
    "teacher.input_size=[3,32,32]",
    "teacher.mean=[0.485,0.456,0.406]",
    "teacher.std=[0.229,0.224,0.225]",
    "evaluation=arrays",
]


def run(arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[dict, list[dict]]:
    """report.json and the rows of one ``dfq run``; ``folder`` keeps what it shares with other runs."""
    output = folder / "runs" / f"{time.time_ns()}"
    command = [sys.executable, "-m", "dfq", "run", *arguments, f"hydra.run.dir={output}"]
    finished = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} ended with {finished.returncode}")
    details = json.loads((output / "details.json").read_text())
    return json.loads((output / "report.json").read_text()), details["references"]


def table(name: str, arguments: list[str], schemes: list[str], seeds: int, folder: Path, environment: dict) -> None:
    print(f"\n{name}, {seeds} seeds, {' '.join(arguments) or 'defaults'}")
    print(f"{'scheme':8} {'data':24} {'top-1':>8} {'spread':>8} {'agree':>8} {'minutes':>8}")
    for scheme in schemes:
        rows: dict[str, list[dict]] = {}
        for seed in range(seeds):
            for row in run([*arguments, f"scheme={scheme}", f"seed={seed}"], folder, environment)[1]:
                rows.setdefault(row["row"], []).append(row)
        for label, found in rows.items():
            top1 = [row["metrics"]["top1"] for row in found]
            agreement = statistics.mean(row["agreement"] for row in found)
            minutes = statistics.mean((row.get("seconds") or 0) / 60 for row in found)
            spread = max(top1) - min(top1)
            print(f"{scheme:8} {label:24} {statistics.mean(top1):8.4f} {spread:8.4f} {agreement:8.4f} {minutes:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scheme", nargs="*", default=["w4a4", "w3a3", "w8a8"])
    parser.add_argument("--kit", type=Path, help="folder with resnet20.py and prepare.py")
    parser.add_argument("--only-kit", action="store_true", help="leave the digits out")
    parser.add_argument("arguments", nargs="*", help="more for dfq run, e.g. algorithm=round_to_nearest")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, environment = Path(scratch), dict(os.environ)
        if not arguments.only_kit:
            table("digits", arguments.arguments, arguments.scheme, arguments.seeds, folder, environment)
        if arguments.kit is None or not (arguments.kit / "resnet20.py").exists():
            print("\nno ResNet-20 rows: give --kit DIR with resnet20.py and prepare.py")
            return
        kit = arguments.kit.resolve()
        environment |= {"PYTHONPATH": str(kit), "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run([sys.executable, "prepare.py", str(folder / "kit")], cwd=kit, env=environment, check=True)
        data = folder / "kit"
        images = [
            f"evaluation.path={data / 'cifar10_test.npz'}",
            f"evaluation.reference_path={data / 'cifar10_real1024.npz'}",
        ]
        table(
            "ResNet-20",
            [*RESNET20, *images, *arguments.arguments],
            arguments.scheme,
            arguments.seeds,
            folder,
            environment,
        )


if __name__ == "__main__":
    main()
