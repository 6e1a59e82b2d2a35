"""Round to nearest: calibrated ranges, nothing trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dfq.algorithms._base import Algorithm, Work
from dfq.settings import PositiveInt


@dataclass(frozen=True)
class RoundToNearest(Algorithm):
    """Seconds; enough at 8 bits on most networks."""

    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at
    weights_stay_float: ClassVar[bool] = True

    def run(self, work: Work) -> None:
        """Give the student its grids."""
        work.calibrate(work.images(self.num_calibration_samples))
