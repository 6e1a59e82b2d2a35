"""auto: climbs the ladder of algorithms within a budget of time and keeps the student that is closest to its teacher.

Each rung is judged by KL(teacher || student) on held-out synthetic samples, which no rung is trained on. The ladder
ends where the budget ends, or where what is left to gain is not worth the time: a rung that takes m minutes can raise
the agreement with the teacher by (1 - agreement) / m a minute at most, and behind one that went on from the best
student and gained too little another will not do better. One that began anew and failed says nothing about the next.

How much a rung that trains does grows with the budget: it may take ``growth`` times the steps of its settings, on a
schedule that ends where its time does. Where it was through before that and has gained enough, what is left of its
time goes to another attempt with ``growth`` times as many.

The time counts from the start of quantization (the dataset is there already). Rungs that stop by the clock do not give
the same bits twice; a run with a budget is repeatable as far as a clock is.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dfq.algorithms._base import STEPS, Algorithm, Work, is_timed, resolved, trains, within
from dfq.dataset import SyntheticDataset, collate, samples_of
from dfq.errors import UserError
from dfq.progress import say
from dfq.settings import Fraction, NonNegativeFloat, PositiveInt
from dfq.student import Student
from dfq.tasks._outputs import from_store, joined, moved
from dfq.tasks._task import task_of
from dfq.teacher import Teacher

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
RESERVE = 0.03  # of the budget: judging and copying at the end


@dataclass(frozen=True)
class Auto(Algorithm):
    """As good as the time allows."""

    budget: str | float = "10min"  # time for all rungs: 90s, 10min, 2h, or seconds
    rungs: tuple[Any, ...] = (  # names, objects, or mappings with _target_ and settings, in the order they are tried
        "round_to_nearest",
        "equalization",
        "gptq",
        "reconstruction",
        "distillation",
    )
    min_gain: NonNegativeFloat = 0.0005  # agreement with the teacher a minute: below, the ladder ends
    share: Fraction = 0.5  # of the time left that a rung gets if another one that stops by the clock follows
    growth: PositiveInt = 4  # times as many steps as a rung's settings say, and again that if it pays; 1: as they say

    def __post_init__(self) -> None:
        self.parts()  # what is no algorithm is told before anything begins

    def run(self, work: Work) -> None:
        """Make the student the best one found."""
        if work.training.world_size > 1:
            raise UserError(
                f"got algorithm=auto and {work.training.world_size} processes, whose clocks differ",
                "trainer=single, or another algorithm",
            )
        climb = _Climb(work, seconds_of(self.budget))
        rungs = list(zip(map(_name, self.rungs), self.parts(), strict=True))
        for position, (name, rung) in enumerate(rungs):
            left_s = climb.left_s
            if is_timed(rung):
                others = any(is_timed(later) for _, later in rungs[position + 1 :])
                limit_s = min(left_s * self.share if others else left_s, self._worth_s(climb)) - climb.judge.seconds
            else:  # it might take longer than anything before it
                limit_s = left_s - 3 * climb.longest_s
            if position > 0 and limit_s <= 0:
                of = f"{max(left_s, 0):.0f} s of {climb.budget_s:.0f} s"
                say(f"auto: {name} skipped, {of} are left, agreement {climb.figures.agreement:.4f}")
                continue
            steps, tries_again = 1, True
            while tries_again:
                steps, before = steps * self.growth, climb.figures
                attempt = within(_stretched(rung, steps) if trains(rung) else rung, limit_s)
                took_s, gain = climb.attempt(name, attempt, f"{position}_{name}_{steps}")
                limit_s = min(limit_s - took_s, self._worth_s(climb))
                # One that begins anew does not get further than before in less than twice the time.
                enough = took_s / self.growth if climb.goes_on(rung) else 2 * took_s
                paid = climb.figures is not before and gain >= self.min_gain
                tries_again = trains(rung) and self.growth > 1 and paid and limit_s > enough
            if is_timed(rung) and climb.goes_on(rung) and gain < self.min_gain:
                say(f"auto: ends, {name} raised the agreement by {max(gain, 0):.5f} a minute")
                break
        work.student.become(climb.best)

    def parts(self) -> list[Any]:
        """The rungs."""
        return resolved(self.rungs, "rungs")

    def _worth_s(self, climb: _Climb) -> float:
        """Seconds after which no rung could have gained enough."""
        return (1 - climb.figures.agreement) / self.min_gain * 60 if self.min_gain > 0 else float("inf")


class _Climb:
    """The best student so far, and how long it took."""

    def __init__(self, work: Work, budget_s: float):
        self.work, self.budget_s, self.start = work, budget_s, time.perf_counter()
        self.judge = _Judge(work.teacher, work.dataset)
        self.base = self.best = work.student  # base: the best one whose weights have not been rounded yet
        self.figures, self.longest_s = _Figures(float("inf"), 0.0), 0.0

    @property
    def left_s(self) -> float:
        return self.start + self.budget_s * (1 - RESERVE) - time.perf_counter()

    @staticmethod
    def goes_on(rung: Any) -> bool:
        return getattr(rung, "goes_on", False)

    def attempt(self, name: str, rung: Any, folder: str) -> tuple[float, float]:
        """Have a rung make another student, and keep it if it is better; seconds, and agreement gained a minute."""
        before = time.perf_counter()
        candidate = copy.deepcopy(self.best if self.goes_on(rung) else self.base)
        self.work.hand_to(rung, candidate, folder)
        found = self.judge(candidate)
        took_s = time.perf_counter() - before
        self.longest_s = max(self.longest_s, took_s)
        # The first one is better than none.
        is_better = found.kl < self.figures.kl or self.best is self.work.student
        gain = (found.agreement - self.figures.agreement) / (took_s / 60)
        loss = "" if found.drop is None else f", loses about {100 * found.drop:.1f} %"
        best, since_s = " (best so far)" if is_better else "", time.perf_counter() - self.start
        say(
            f"auto: {name} {took_s:.0f} s: agreement {found.agreement:.4f}, KL {found.kl:.4f}{loss}{best}, "
            f"{since_s:.0f} s of {self.budget_s:.0f} s"
        )
        if is_better:
            self.best, self.figures = candidate, found
            self.base = candidate if getattr(rung, "weights_stay_float", False) else self.base
        return took_s, gain


@dataclass(frozen=True)
class _Figures:
    kl: float
    agreement: float
    drop: float | None = None  # estimated share of the teacher's accuracy that is lost


class _Judge:
    """KL and agreement with the teacher on the held-out synthetic samples."""

    def __init__(self, teacher: Teacher, dataset: SyntheticDataset):
        self.task = task_of(teacher)
        batch = collate([dataset[i] for i in dataset.split()[1]], dataset.lists)
        self.images, stored = samples_of(batch), from_store(batch)
        self.teacher, self.target = teacher, None
        if hasattr(self.task, "writes"):  # of text there are too many logits to keep
            self.images = dataset.without_padding(dataset.split()[1])
        else:
            self.target = self._outputs(teacher) if stored is None else moved(stored, "cpu")
        self.estimate = None if dataset.is_poor else getattr(self.task, "estimate_drop", None)
        self.seconds = 0.0

    @torch.no_grad()
    def __call__(self, student: Student, batch_size: int = 64) -> _Figures:
        start = time.perf_counter()
        frozen = copy.deepcopy(student).freeze()  # judged as it will be saved
        drop = None
        if self.target is None:
            kl, agreement = self._of_text(frozen, batch_size)
        else:
            output = self._outputs(frozen, batch_size)
            kl = float(self.task.distillation_loss(output, self.target))
            agreement = float(self.task.agreement(output, self.target))
            drop = None if self.estimate is None else self.estimate(output, self.target).drop
        self.seconds = time.perf_counter() - start
        return _Figures(kl if kl == kl else float("inf"), agreement, drop)

    def _of_text(self, student: Student, batch_size: int) -> tuple[float, float]:
        kl = agreement = 0.0
        for batch in self.teacher.input_spec.batches(self.images, batch_size):
            output, target = (self.task.raw_outputs(model, batch) for model in (student, self.teacher))
            kl += float(self.task.distillation_loss(output, target)) * len(batch) / len(self.images)
            agreement += float(self.task.agreement(output, target)) * len(batch) / len(self.images)
        return kl, agreement

    @torch.no_grad()
    def _outputs(self, model: Any, batch_size: int = 64) -> Any:
        parts = (self.task.raw_outputs(model, batch) for batch in self.images.split(batch_size))
        return joined([moved(part, "cpu") for part in parts])


def seconds_of(budget: str | float) -> float:
    """``"90s"``, ``"10min"``, ``"2h"`` or a number of seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)?\s*", str(budget))
    if found is None or float(found[1]) <= 0:
        raise UserError(f"got algorithm.budget={budget!r}", "a time above 0: 90s | 10min | 2h")
    return float(found[1]) * UNITS[found[2] or "s"]


def _name(rung: Any) -> str:
    if isinstance(rung, str):
        return rung
    return str(rung["_target_"]).rpartition(".")[2] if isinstance(rung, Mapping) else type(rung).__name__


def _stretched(rung: Any, times: int) -> Any:
    """The rung with ``times`` as many steps as its settings say."""
    return replace(rung, **{name: getattr(rung, name) * times for name in STEPS if hasattr(rung, name)})
