"""A sequence of algorithms on one student, each going on from what the one before left.

``algorithm=sequence algorithm.steps=[equalization,gptq]``: an algorithm that needs grids keeps those it
finds, and calibrates a student that has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfq.algorithms._base import Algorithm, Clock, Work, is_timed, within
from dfq.settings import PositiveFloat, resolve


@dataclass(frozen=True)
class Sequence(Algorithm):
    """Several algorithms, one after the other."""

    steps: tuple[Any, ...] = ("equalization", "bias_correction")  # names, or mappings with _target_ and settings
    time_limit_s: PositiveFloat | None = None  # seconds, shared by the steps that stop by the clock; null: no limit

    def run(self, work: Work) -> None:
        """Run the steps on the student."""
        clock, steps = Clock(self.time_limit_s), [resolve("algorithm", step) for step in self.steps]
        for index, algorithm in enumerate(steps):
            if self.time_limit_s is not None:
                algorithm = within(algorithm, clock.left_s / max(1, sum(map(is_timed, steps[index:]))))
            work.hand_to(algorithm, work.student, f"step_{index}")
