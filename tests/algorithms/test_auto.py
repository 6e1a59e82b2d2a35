"""auto and sequence: which rung is kept, what the clock allows, what is printed; steps that go on from each other."""

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from dfq.algorithms.auto import Auto, _Figures, seconds_of
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


@dataclass(frozen=True)
class Training:
    """A second a step. A student agrees the better the more steps one of these took, until there were ``enough``."""

    max_steps: int = 100
    time_limit_s: float | None = None
    enough: int = 10**6
    goes_on: ClassVar[bool] = True
    now: ClassVar[float] = 0.0

    def quantize(self, student, *_):
        steps = min(self.max_steps, int(self.time_limit_s or 0))
        Rung.log.append((self.max_steps, steps))
        Training.now += steps
        student.agreement = min(getattr(student, "agreement", 0.0) + steps / self.enough, 0.9)


@dataclass(frozen=True)
class TrainingAnew(Training):
    goes_on: ClassVar[bool] = False


@dataclass(frozen=True)
class First:
    def quantize(self, *_):
        Training.now += 1


@pytest.fixture
def steps_of(parts, monkeypatch):
    """What an ``auto`` makes of them by a clock that they alone move: (steps at most, steps) of each, and seconds."""

    def judged(_, student):
        found = getattr(student, "agreement", 0.0)
        return _Figures(1 - found, found)

    monkeypatch.setattr("dfq.algorithms.auto._Judge.__call__", judged)
    monkeypatch.setattr("dfq.algorithms.auto.time", SimpleNamespace(perf_counter=lambda: Training.now))

    def steps(algorithm):
        Rung.log.clear()
        before = Training.now
        run(algorithm, parts)
        return list(Rung.log), Training.now - before

    return steps


def test_a_larger_budget_is_more_steps_on_one_schedule_and_more_attempts_where_these_pay(steps_of):
    assert steps_of(Auto(budget="1min", rungs=(First(), Training()), min_gain=0.0))[0] == [(400, 57)]
    # Half of the time to the one that begins anew: not enough for four times its steps, and none is left for more.
    assert steps_of(Auto(budget=500, rungs=(First(), TrainingAnew(), Training()), min_gain=0.0)) == (
        [(400, 242), (400, 242)],
        485,
    )
    # Through before its half is over, and again where twice as long is left of it; the last one uses what there is.
    found, took = steps_of(Auto(budget="2h", rungs=(First(), TrainingAnew(), Training()), min_gain=0.0))
    assert found == [(400, 400), (1600, 1600), (400, 400), (1600, 1600), (6400, 2983)] and 0.96 * 7200 < took < 7200


def test_more_attempts_end_where_they_do_not_pay(steps_of, capsys):
    rungs = (First(), TrainingAnew(enough=500), Training(enough=500), Training())
    found, _ = steps_of(Auto(budget="10h", rungs=rungs, min_gain=0.0005))
    assert found == [(400, 400), (1600, 1600), (6400, 6400), (400, 400)]
    assert "auto: ends, Training raised the agreement by 0.00000 a minute" in capsys.readouterr().err


def test_growth_of_one_leaves_the_steps_of_a_rung_as_they_are(steps_of):
    assert steps_of(Auto(budget="2h", rungs=(First(), Training()), growth=1))[0] == [(100, 100)]


def test_a_limit_of_the_rungs_own_stays_and_the_first_rung_is_held_to_the_clock_too(parts):
    run(Auto(budget=100, rungs=(Timed(), Timed(time_limit_s=3.0), Timed(time_limit_s=99.0)), min_gain=0.0), parts)
    first, own, last = [entry[1] for entry in Rung.log if entry[0] == "limit"]
    assert 40 < first < 49 and own == 3.0 and 80 < last < 97


def test_a_sequence_shares_its_time_among_the_steps_that_have_a_clock(parts):
    run(Auto(budget=100, rungs=(Rung(), Sequence((Rung(), Timed(), Timed(time_limit_s=2.0)))), min_gain=0.0), parts)
    first, second = [entry[1] for entry in Rung.log if entry[0] == "limit"]
    assert 40 < first < 49 and second == 2.0
    Rung.log.clear()
    run(Sequence((Rung(), Timed())), parts)
    assert [entry[1] for entry in Rung.log if entry[0] == "limit"] == [None]


def test_a_sequence_goes_on_from_the_step_before(parts):
    run(Sequence((Rung(), Rung(shift=1.0))), parts)
    assert [has_grids for _, _, has_grids in Rung.log] == [False, True]


def test_auto_through_the_pipeline_with_the_real_rungs(parts, tmp_path, capsys):
    teacher, dataset, weights, activations, seed, _ = parts
    quick = {"iterations": 20, "finish_iterations": 10}
    auto = Auto(budget="20s", rungs=("round_to_nearest", {**config_of("reconstruction"), **quick}))
    student, path = quantize(teacher, dataset, W3A4, auto, weights, activations, seed, tmp_path / "s")
    assert sorted(file.name for file in Path(path).iterdir()) == ["student.json", "student.safetensors"]
    images = dataset.tensors()["images"]
    assert torch.equal(Student.load(path, teacher)(images), student(images))
    lines = capsys.readouterr().err
    assert "auto: round_to_nearest" in lines and "auto: Reconstruction" in lines


def config_of(name):
    from dfq.settings import load

    return load("algorithm", name)


def test_no_rungs():
    with pytest.raises(UserError, match=r"got algorithm.rungs=\[\]; allowed: one or more algorithms"):
        Auto(rungs=())
