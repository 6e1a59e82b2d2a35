"""DFQ: cross-layer equalization, high-bias absorption and bias correction, after which ranges fit.

DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721), also of residual streams and concatenations: equations and differences
in :mod:`dfq.algorithms._equalization` and :mod:`dfq.algorithms._bias_correction`. The grids of activations are
calibrated on synthetic samples instead of taken from batch norm statistics (beta +- 6 gamma), which say little behind
an addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dfq.algorithms._base import Algorithm, Work
from dfq.algorithms._bias_correction import correct_bias, correct_bias_by_batch_norm, undo_bias_correction
from dfq.algorithms._equalization import (
    absorb_biases,
    equalize,
)
from dfq.settings import PositiveInt


@dataclass(frozen=True)
class Equalization(Algorithm):
    """Seconds; what makes one range for a whole tensor of weights bearable, and depthwise networks at 8 bits."""

    iterations: PositiveInt = 200  # steps; of the paper's rule rounds over all pairs at most
    balance_activations: bool = True  # least noise, activations' too; false: the paper's, of weights of pairs
    absorb_bias: bool = True  # let the next layer add what a ReLU almost never cuts off
    replace_relu6: bool = True  # ReLU in place of ReLU6 between layers, where it hardly changes outputs
    bias_correction: Literal["none", "samples", "batch_norm"] = "samples"  # what makes up for moved means
    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at
    weights_stay_float: ClassVar[bool] = True

    def run(self, work: Work) -> None:
        """Equalize the student and give it its grids."""
        student, teacher, images = work.student, work.teacher, work.images(self.num_calibration_samples)
        undo_bias_correction(student)
        pairs = equalize(student, teacher, self.iterations, self.replace_relu6, images, self.balance_activations)
        if self.absorb_bias:
            absorb_biases(student, teacher, pairs, images)
        work.calibrate(images)
        if self.bias_correction == "samples":
            correct_bias(student, teacher, images)
        elif self.bias_correction == "batch_norm":
            correct_bias_by_batch_norm(student, teacher)
