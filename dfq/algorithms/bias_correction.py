"""Bias correction on its own: for students whose ranges are fine and whose means are not.

DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721), section 4.2: equations and differences in
:mod:`dfq.algorithms._bias_correction`. Goes behind what rounds weights. Where GPTQ and its like have corrected a bias
themselves, this correction takes the place of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dfq.algorithms._base import Algorithm, Work
from dfq.algorithms._bias_correction import correct_bias, correct_bias_by_batch_norm
from dfq.settings import PositiveInt


@dataclass(frozen=True)
class BiasCorrection(Algorithm):
    """Seconds."""

    source: Literal["samples", "batch_norm"] = "samples"  # of means: synthetic samples, or batch norms alone
    add_bias: bool = True  # layers without a bias get one; some file formats of language models have no place for it
    batch_size: PositiveInt = 64  # samples a forward; the mean of all batches' corrections is taken
    num_calibration_samples: PositiveInt = 512  # samples that means, and ranges if there are none yet, are taken from
    weights_stay_float: ClassVar[bool] = True

    def run(self, work: Work) -> None:
        """Correct the student's biases; one without grids gets them first."""
        images = work.images(self.num_calibration_samples)
        work.ensure_calibrated(images)
        if self.source == "samples":
            correct_bias(work.student, work.teacher, images, self.batch_size, self.add_bias)
        else:
            correct_bias_by_batch_norm(work.student, work.teacher, self.add_bias)
