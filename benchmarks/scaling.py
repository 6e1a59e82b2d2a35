"""Generation in two processes of one thread against one process of one thread: the same dataset, how much sooner.

    python benchmarks/scaling.py [--processes 2] [--rounds 3] [generator=zeroq num_samples=512 ...]
    ... teacher=timm teacher.name=resnet18 teacher.pretrained=false teacher.input_size=[3,64,64]

Anything with an equals sign sets the teacher (digits) or the generator. Efficiency is seconds of one over processes x
seconds of several, from the first batch to the last: starting Python is the same for all. Rounds alternate, so that a
busy machine slows both; the best of each counts, and processor seconds are beside them, which depend less on who else
is at work. The datasets are compared by sha256.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ONE = """
import json, sys, time
from pathlib import Path
import dfq, torch
torch.manual_seed(0)  # of weights that are not loaded
torch.set_num_threads(1)
from dfq.pipeline import generate
from dfq.settings import build, load
words = dict(word.split("=", 1) for word in sys.argv[4:])
name, config = words.pop("teacher", "digits"), load("generator", words.pop("generator", "zeroq"))
num_samples = int(words.pop("num_samples", 512))
words = {key: value if value[:1].isalpha() and value not in ("true", "false") else json.loads(value)
         for key, value in words.items()}
config.update({key.removeprefix("generator."): value for key, value in words.items() if key.startswith("generator.")})
options = {key.removeprefix("teacher."): value for key, value in words.items() if key.startswith("teacher.")}
teacher, generator = dfq.load_teacher(name, device="cpu", **options), build(config, "generator")
folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
(folder.parent / f"ready_{rank}").touch()
while not (folder.parent / "go").exists():  # all begin together, imports behind them
    time.sleep(0.01)
wall, cpu = time.time(), time.process_time()
generate(teacher, generator, num_samples, 0, folder, rank, world_size)
print(json.dumps([wall, time.time(), time.process_time() - cpu]))
"""


def run(processes: int, words: list[str]) -> tuple[float, float, str]:
    """Seconds from the first start to the last end, processor seconds in all, and the dataset's sha256."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", ONE, str(folder), str(rank), str(processes), *words],
                env=environment, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(processes)
        ]  # fmt: skip
        while not all((Path(scratch) / f"ready_{rank}").exists() for rank in range(processes)):
            if any(process.poll() for process in started):
                for process in started:
                    process.kill()
                sys.exit("a process has failed")
            time.sleep(0.05)
        (Path(scratch) / "go").touch()
        found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
        entries = [json.loads(file.read_text()) for file in sorted((folder / "shards").glob("*.json"))]
    seconds = max(end for _, end, _ in found) - min(start for start, _, _ in found)
    return seconds, sum(cpu for _, _, cpu in found), " ".join(entry["sha256"] for entry in entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    found: dict[int, list[tuple[float, float, str]]] = {1: [], options.processes: []}
    for _ in range(options.rounds):
        for processes in found:
            found[processes].append(run(processes, options.words))
    best = {processes: min(seconds for seconds, _, _ in rounds) for processes, rounds in found.items()}
    cpu = {processes: min(cpu for _, cpu, _ in rounds) for processes, rounds in found.items()}
    same = len({bits for rounds in found.values() for _, _, bits in rounds}) == 1
    for processes in found:
        print(f"{processes} process(es) of one thread: {best[processes]:.2f} s, {cpu[processes]:.2f} processor seconds")
    count = options.processes
    print(f"efficiency {best[1] / (count * best[count]):.2f}; by processor seconds {cpu[1] / cpu[count]:.2f}")
    print(f"the same bytes: {'yes' if same else 'NO'}; processors {os.cpu_count()}, of this process {len(affinity())}")


def affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


if __name__ == "__main__":
    main()
