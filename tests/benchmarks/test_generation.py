"""benchmarks/generation.py on the embedded digits: that it runs, and that what it counts is what there is."""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SPEC
from torch import nn

from dfq.teacher import Teacher

PATH = Path(__file__).parents[2] / "benchmarks" / "generation.py"


@pytest.fixture(scope="module")
def generation():
    spec = importlib.util.spec_from_file_location("benchmarks_generation", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    module.LARGEST_MATRIX = 64
    return module


SMALL = ["--network", "digits", "--batch", "2", "--steps", "1", "--rounds", "1", "--clock", "cpu", "--device", "cpu"]


def rows_of(text):
    """label → cells of a markdown table."""
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_the_table_has_a_row_for_every_generator_and_says_why_one_is_missing(generation, capsys):
    generation.main(
        [*SMALL, "--generators", "gaussian,gdfq,psaq,zeroq", "--iterations", "2", "--mct", "/no/such/python"]
    )
    text = capsys.readouterr().out
    rows = rows_of(text)
    assert list(rows) == ["reference loop", "gaussian", "gdfq (trained once for 1024 images)", "zeroq"]
    assert rows["reference loop"][0] == "500" and rows["zeroq"][0] == "2" and rows["gaussian"][0] == "0"
    assert float(rows["reference loop"][3]) > 0
    assert "no row of psaq: got a network without attention" in text
    assert "no row of model-compression-toolkit: /no/such/python says" in text


def test_one_step(generation, capsys):
    generation.main([*SMALL, "--mode", "step", "--precision", "float32,bfloat16"])
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["forward and gradient alone", "reference loop", "zeroq", "zeroq, bfloat16"]


def test_a_generator_takes_the_precision_that_is_asked_for(generation, make_teacher, monkeypatch):
    seen = []
    monkeypatch.setattr("dfq.generators.zeroq.ZeroQ.sample", lambda generator, *_args: seen.append(generator.precision))
    for precision in ("float32", "bfloat16"):
        generation.contender(make_teacher("plain"), "zeroq", 2, 2, 1, precision).run(1)
    assert seen == ["float32", "bfloat16"]


def test_worker(generation, capsys):
    generation.main([*SMALL, "--mode", "worker", "--generators", "gaussian", "--samples", "4"])
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0 and found["bytes"] >= 0 and found["batch"] == 2


def test_a_step_is_sorted_into_what_it_is_for(generation, capsys):
    generation.main([*SMALL, "--mode", "profile"])
    rows = rows_of(capsys.readouterr().out)
    assert {"convolution, forward", "convolution, backward", "statistics"} <= rows.keys()
    shares = [float(cells[1].removesuffix(" %")) for cells in rows.values()]
    assert abs(sum(shares) - 100) <= len(shares) and shares == sorted(shares, reverse=True)


def test_kinds_of_operations(generation):
    names = ("aten::convolution_backward", "aten::mkldnn_convolution", "aten::threshold_backward", "aten::fill_")
    kinds = ["convolution, backward", "convolution, forward", "activation", "other"]
    assert [generation.kind_of(name) for name in names] == kinds


def test_what_does_not_install_is_said(generation, capsys, monkeypatch, tmp_path):
    """The installer fails as it does without a connection; nothing is asked of the network here."""
    made = SimpleNamespace(returncode=1, stderr="some warning\nERROR: no connection\n", stdout="")
    monkeypatch.setattr(generation.venv, "create", lambda folder, with_pip: (folder / "lib").mkdir(parents=True))
    monkeypatch.setattr(generation.sysconfig, "get_path", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(generation.subprocess, "run", lambda *_, **__: made)
    teacher = generation.build("digits", None, None, "cpu")
    found = generation.mct_contender("install", teacher, 2, "cpu", tmp_path)
    assert found == "no row of model-compression-toolkit: install says: it does not install: ERROR: no connection"


def test_batch_auto_is_for_cost(generation, capsys):
    with pytest.raises(SystemExit):
        generation.main([*SMALL, "--batch", "auto"])
    assert "--batch auto is for --mode cost" in capsys.readouterr().err


def test_cost_asks_for_every_size_and_count(generation, capsys, monkeypatch):
    """Each in a process of its own; here in this one."""

    def run(words, stdout, **_):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            generation.main(words[2:])
        return SimpleNamespace(stdout=text.getvalue())

    monkeypatch.setattr(generation.subprocess, "run", run)
    generation.main([*SMALL, "--mode", "cost", "--sizes", "8", "--counts", "2,6", "--generators", "zeroq"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 |")]
    assert [line.split("|")[2].strip() for line in lines] == ["2", "6"]
    assert [line.split("|")[3].strip() for line in lines] == ["2", "2"]


def test_counted_arithmetic(generation):
    """A forward and a gradient to the input, no gradient of weights: 2 x 2 FLOPs a multiply-accumulate."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 64, 10))
    teacher = Teacher(net, "classification", SPEC)
    assert generation.count_flops(teacher, 4) == 4 * 4 * (3 * 5 * 9 * 64 + 5 * 64 * 10)


def test_the_reference_loop_descends_and_leaves_the_network_as_it_was(generation, make_teacher):
    teacher = make_teacher("plain")
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    images = generation.reference_loop(teacher, 4, 3)
    assert images.shape == (4, 3, 8, 8) and images.isfinite().all() and not images.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.module.parameters())
    assert not any(m._forward_pre_hooks for m in teacher.module.modules())
