"""A sequence of algorithms on one student, each going on from what the one before left.

``algorithm=sequence algorithm.steps=[equalization,gptq]``: an algorithm that needs grids keeps those it
finds, and calibrates a student that has none. gptq, quantease, comq and yaqa have nothing to round behind an algorithm
that has rounded already, and are refused there.

With ``algorithm.views=4 algorithm.shift=16`` every step sees each image four times: as it is, and three times mirrored
by chance and moved by up to 16 pixels (what moves in from outside is a reflection). What that is worth:
docs/generation.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dfq.algorithms._base import Algorithm, Clock, Work, is_timed, resolved, within
from dfq.algorithms._hessian import LayerwiseRounding
from dfq.errors import UserError
from dfq.lightning.augmentation import Views
from dfq.settings import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Sequence(Algorithm):
    """Several algorithms, one after the other."""

    steps: tuple[Any, ...] = ("equalization", "bias_correction")  # names, or mappings with _target_ and settings
    time_limit_s: PositiveFloat | None = None  # seconds, shared by the steps that stop by the clock; null: no limit
    views: PositiveInt = 1  # of each image in all steps: itself, and copies mirrored and moved
    flip: bool = True  # half of the copies mirrored; they are not where left and right mean something
    shift: NonNegativeInt = 0  # pixels in each direction, at most, that copies are moved by

    def __post_init__(self) -> None:
        if self.shift and self.views == 1:  # nothing would be moved
            raise UserError(
                f"got algorithm.shift={self.shift} and algorithm.views=1",
                "a shift of the copies that algorithm.views=2 or more makes",
                "algorithm.views=4, or algorithm.shift=0",
            )
        rounded_by = None
        for algorithm in self._flat():
            name = type(algorithm).__name__
            if rounded_by is not None and isinstance(algorithm, LayerwiseRounding):
                raise UserError(
                    f"got {name} behind {rounded_by} in algorithm.steps, and no weight left to round",
                    "one algorithm that rounds, behind those that prepare (equalization, awq, neuqi)",
                    f"leave out one of the two; distillation, e2e_rounding and e2e_qp go on from {rounded_by}",
                )
            if getattr(algorithm, "rounds_weights", False):
                rounded_by = name

    def run(self, work: Work) -> None:
        """Run the steps on the student."""
        if self.views > 1:
            work = replace(work, views=Views(self.views, self.flip, self.shift))
        clock, steps = Clock(self.time_limit_s), self.parts()
        for index, algorithm in enumerate(steps):
            if self.time_limit_s is not None:
                algorithm = within(algorithm, clock.left_s / max(1, sum(map(is_timed, steps[index:]))))
            work.hand_to(algorithm, work.student, f"step_{index}")

    def parts(self) -> list[Any]:
        """The steps."""
        return resolved(self.steps, "steps")

    def _flat(self) -> Iterator[Any]:
        """The steps, those of sequences among them in their place."""
        for algorithm in self.parts():
            yield from algorithm._flat() if isinstance(algorithm, Sequence) else [algorithm]
