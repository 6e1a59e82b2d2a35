"""DFQ: cross-layer equalization, high-bias absorption and bias correction, after which ranges fit.

DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721): equations and differences in :mod:`dfq.algorithms._equalization` and
:mod:`dfq.algorithms._bias_correction`. The grids of activations are calibrated on synthetic samples instead of taken
from batch norm statistics (beta +- 6 gamma), which say little behind an addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dfq.algorithms._bias_correction import correct_bias, correct_bias_by_batch_norm, undo_bias_correction
from dfq.algorithms._calibration import calibrate, calibration_images
from dfq.algorithms._equalization import absorb_biases, equalize
from dfq.dataset import SyntheticDataset
from dfq.settings import PositiveInt
from dfq.student import Student
from dfq.teacher import Teacher


@dataclass(frozen=True)
class Equalization:
    """Seconds; what makes one range for a whole tensor of weights bearable, and depthwise networks at 8 bits."""

    iterations: PositiveInt = 100  # rounds over all pairs of layers at most; ends when scales stay
    balance_activations: bool = True  # ranges of activations count as well; false: of weights alone, as in the paper
    absorb_bias: bool = True  # let the next layer add what a ReLU almost never cuts off
    replace_relu6: bool = True  # ReLU in place of ReLU6 between layers, where it hardly changes outputs
    bias_correction: Literal["none", "samples", "batch_norm"] = "samples"  # what makes up for moved means
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
        """Equalize ``student`` and give it its grids, in place."""
        images = calibration_images(dataset, self.num_calibration_samples)
        undo_bias_correction(student)
        pairs = equalize(student, teacher, self.iterations, self.replace_relu6, images, self.balance_activations)
        if self.absorb_bias:
            absorb_biases(student, teacher, pairs, images)
        calibrate(student, images, weight_quantizer, activation_quantizer)
        if self.bias_correction == "samples":
            correct_bias(student, teacher, images)
        elif self.bias_correction == "batch_norm":
            correct_bias_by_batch_norm(student, teacher)
