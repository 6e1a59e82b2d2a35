"""benchmarks/accuracy.py: which runs it asks for, and the table that it makes of what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.fixture
def accuracy(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_accuracy", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_every_algorithm_with_every_generator_and_every_scheme(accuracy, monkeypatch, tmp_path):
    runs = []

    def rows_of(arguments, _folder, _environment):
        runs.append(arguments)
        told = dict(argument.split("=", 1) for argument in arguments)
        figures = {"metrics": {"top1": 0.5 + len(runs) / 100}, "agreement": 0.9, "num_samples": 16}
        rows = (("float teacher", "teacher"), (f"synthetic ({told['generator']})", "student"), ("real data", "real"))
        return [{"row": row, "role": role, **figures} for row, role in rows]

    monkeypatch.setattr(accuracy, "rows_of", rows_of)
    table = tmp_path / "table.md"
    axes = ["--algorithm", "gptq", "squant", "--generator", "zeroq", "genie", "--scheme", "w4a4", "w3a3"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *axes, "--seeds", "2", "--write", str(table), "num_samples=16"])
    accuracy.main()
    asked = {tuple(argument.split("=")[1] for argument in run[:3]) for run in runs}
    assert len(runs) == 16 and {run[0] for run in runs} == {"algorithm=gptq", "algorithm=squant"}
    assert asked == {(a, g, s) for a in ("gptq", "squant") for g in ("zeroq", "genie") for s in ("w4a4", "w3a3")}
    assert {run[-2] for run in runs} == {"seed=0", "seed=1"} and {run[-1] for run in runs} == {"num_samples=16"}
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.read_text().splitlines()[4:]]
    assert len(cells) == 2 * 2 * (2 + 2)  # teacher and real once for all generators, synthetic once for each
    assert cells[1][5] == "synthetic (zeroq)" and cells[1][8:10] == ["0.5150", "0.0100"]  # the first two runs


def test_one_generator_unless_asked(accuracy, monkeypatch):
    runs = []
    monkeypatch.setattr(accuracy, "rows_of", lambda arguments, *_: runs.append(arguments) or [])
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--scheme", "w4a4", "--seeds", "1"])
    accuracy.main()
    assert [argument for run in runs for argument in run if argument.startswith("generator=")] == ["generator=zeroq"]
