"""Round to nearest: calibrated ranges, nothing trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dfq.algorithms._calibration import calibrate, calibration_images
from dfq.dataset import SyntheticDataset
from dfq.settings import PositiveInt
from dfq.student import Student
from dfq.teacher import Teacher


@dataclass(frozen=True)
class RoundToNearest:
    """Seconds; enough at 8 bits on most networks."""

    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at
    weights_stay_float: ClassVar[bool] = True  # until the student is frozen: another algorithm may round them better

    def quantize(
        self,
        student: Student,
        teacher: Teacher,
        dataset: SyntheticDataset,
        weight_quantizer: Any,
        activation_quantizer: Any,
        seed: int,
        work_dir: Path,
    ) -> None:
        """Give ``student`` its grids, in place."""
        images = calibration_images(dataset, self.num_calibration_samples)
        calibrate(student, images, weight_quantizer, activation_quantizer)
