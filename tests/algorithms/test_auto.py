"""auto and sequence: which rung is kept, what the clock allows, what is printed; steps that go on from each other."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from dfq.algorithms.auto import Auto, seconds_of
from dfq.algorithms.sequence import Sequence
from dfq.errors import UserError
from dfq.pipeline import quantize
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student

W3A4 = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(4))


@dataclass(frozen=True)
class Rung:
    """Calibrates, then shifts the last bias; notes what it saw."""

    shift: float = 0.0
    sleep: float = 0.0
    log: ClassVar[list] = []

    def quantize(self, student, teacher, dataset, weight_quantizer, activation_quantizer, seed, work_dir):
        Rung.log.append((type(self).__name__, self.shift, student.has_grids))
        assert work_dir.is_dir()
        time.sleep(self.sleep)
        resolve("algorithm", "round_to_nearest").quantize(
            student, teacher, dataset, weight_quantizer, activation_quantizer, seed, work_dir
        )
        with torch.no_grad():
            list(student.layers.values())[-1].bias[0] += self.shift


@dataclass(frozen=True)
class Timed(Rung):
    time_limit_s: float | None = None
    goes_on: ClassVar[bool] = True

    def quantize(self, *args):
        Rung.log.append(("limit", self.time_limit_s))
        super().quantize(*args)


@pytest.fixture(autouse=True)
def _empty_log():
    Rung.log.clear()


@pytest.fixture
def parts(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("residual")
    quantizer = resolve("quantizer", "mse", num_candidates=10)
    return teacher, make_dataset(teacher, 64), quantizer, quantizer, 0, tmp_path / "work"


def run(algorithm, parts):
    teacher, dataset, *rest = parts
    student = Student.from_teacher(teacher, W3A4)
    rest[-1].mkdir(exist_ok=True)
    algorithm.quantize(student, teacher, dataset, *rest)
    return student


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), (30, 30), ("45", 45)])
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-3min", "soon", "10 days"])
def test_wrong_budgets(text):
    with pytest.raises(UserError) as error:
        seconds_of(text)
    assert str(error.value) == f"got algorithm.budget={text!r}; allowed: a time above 0: 90s | 10min | 2h"


def test_the_student_closest_to_the_teacher_is_kept(parts, capsys):
    rungs = (Rung(shift=3.0), Rung(), Rung(shift=-5.0))
    images = parts[1].tensors()["images"]
    alone = run(Rung(), parts)
    for order in (rungs, rungs[::-1]):
        assert torch.equal(run(Auto(rungs=order), parts)(images), alone(images))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("auto:")]
    assert len(lines) == 6 and ["(best so far)" in line for line in lines] == [True, True, False, True, True, False]
    assert all("agreement" in line and "KL" in line and "of 600 s" in line for line in lines)


def test_each_rung_starts_without_what_the_others_did_unless_it_goes_on(parts):
    run(Auto(rungs=(Rung(), Rung(), Timed())), parts)
    starts = [entry for entry in Rung.log if entry[0] != "limit"]
    assert [has_grids for _, _, has_grids in starts] == [False, False, True]


def test_rungs_by_the_clock_share_what_is_left(parts):
    run(Auto(budget=100, rungs=(Rung(), Timed(), Timed()), min_gain=0.0), parts)
    first, second = [entry[1] for entry in Rung.log if entry[0] == "limit"]
    assert 35 < first < 50 and 80 < second < 98


def test_a_rung_for_which_there_is_no_time_is_skipped(parts, capsys):
    run(Auto(budget="2s", rungs=(Rung(sleep=1.0), Rung(), Timed()), min_gain=0.0), parts)
    assert [entry[0] for entry in Rung.log] == ["Rung", "limit", "Timed"]
    assert 0 < Rung.log[1][1] < 1
    assert "auto: Rung skipped, " in capsys.readouterr().err


def test_the_first_rung_always_runs_and_the_ladder_ends_where_nothing_is_gained(parts, capsys):
    run(Auto(budget="0.001s", rungs=(Rung(sleep=0.1), Timed())), parts)
    assert len(Rung.log) == 1
    Rung.log.clear()
    run(Auto(rungs=(Rung(), Timed(shift=1.0), Timed()), min_gain=0.0005), parts)
    assert [entry[0] for entry in Rung.log].count("Timed") == 1
    assert "auto: ends, Timed raised the agreement by 0.00000 a minute" in capsys.readouterr().err


@dataclass(frozen=True)
class Anew(Timed):
    goes_on: ClassVar[bool] = False


def test_a_rung_that_began_anew_and_failed_does_not_end_the_ladder(parts, capsys):
    run(Auto(rungs=(Rung(), Anew(shift=1.0), Timed(shift=1.0), Timed())), parts)
    assert [entry[0] for entry in Rung.log if entry[0] != "limit"] == ["Rung", "Anew", "Timed"]
    assert "auto: ends, Timed raised" in capsys.readouterr().err


def test_the_time_limit_is_no_longer_than_what_could_be_gained_is_worth(parts):
    run(Auto(budget="10h", rungs=(Rung(), Timed()), min_gain=0.5), parts)
    limits = [entry[1] for entry in Rung.log if entry[0] == "limit"]
    assert all(limit < 120 for limit in limits)  # agreement can rise by 1 at most: two minutes at half a point a minute


def test_a_sequence_goes_on_from_the_step_before(parts):
    run(Sequence((Rung(), Rung(shift=1.0))), parts)
    assert [has_grids for _, _, has_grids in Rung.log] == [False, True]


def test_auto_through_the_pipeline_with_the_real_rungs(parts, tmp_path, capsys):
    teacher, dataset, weights, activations, seed, _ = parts
    auto = Auto(budget="20s", rungs=("round_to_nearest", {**config_of("reconstruction"), "iterations": 20}))
    student, path = quantize(teacher, dataset, W3A4, auto, weights, activations, seed, tmp_path / "s")
    assert sorted(file.name for file in Path(path).iterdir()) == ["student.json", "student.safetensors"]
    images = dataset.tensors()["images"]
    assert torch.equal(Student.load(path, teacher)(images), student(images))
    lines = capsys.readouterr().err
    assert "auto: round_to_nearest" in lines and "auto: Reconstruction" in lines


def config_of(name):
    from dfq.settings import load

    return load("algorithm", name)
