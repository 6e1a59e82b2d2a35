"""A sequence of algorithms on one student, each going on from what the one before left.

``algorithm=sequence algorithm.steps=[equalization,gptq]``: an algorithm that needs grids keeps those it
finds, and calibrates a student that has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfq.algorithms._base import Algorithm, Work
from dfq.settings import resolve


@dataclass(frozen=True)
class Sequence(Algorithm):
    """Several algorithms, one after the other."""

    steps: tuple[Any, ...] = ("equalization", "bias_correction")  # names, or mappings with _target_ and settings

    def run(self, work: Work) -> None:
        """Run the steps on the student."""
        for index, algorithm in enumerate([resolve("algorithm", step) for step in self.steps]):
            work.hand_to(algorithm, work.student, f"step_{index}")
