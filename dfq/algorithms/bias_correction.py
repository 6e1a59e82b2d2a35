"""Bias correction on its own: for students whose ranges are fine and whose means are not.

DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721), section 4.2: equations and differences in
:mod:`dfq.algorithms._bias_correction`. Goes behind what rounds weights. Means of batch norms presume biases that are
still the float network's: behind GPTQ and its like, which correct biases themselves, take samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dfq.algorithms._bias_correction import correct_bias, correct_bias_by_batch_norm
from dfq.algorithms._calibration import calibration_images, ensure_calibrated
from dfq.dataset import SyntheticDataset
from dfq.settings import PositiveInt
from dfq.student import Student
from dfq.teacher import Teacher


@dataclass(frozen=True)
class BiasCorrection:
    """Seconds."""

    source: Literal["samples", "batch_norm"] = "samples"  # of means: synthetic samples, or batch norms alone
    add_bias: bool = True  # layers without a bias get one; some file formats of language models have no place for it
    batch_size: PositiveInt = 64  # samples a forward; the mean of all batches' corrections is taken
    num_calibration_samples: PositiveInt = 512  # samples that means, and ranges if there are none yet, are taken from
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
        """Correct the biases of ``student``, in place; one without grids gets them first."""
        images = calibration_images(dataset, self.num_calibration_samples)
        ensure_calibrated(student, images, weight_quantizer, activation_quantizer)
        if self.source == "samples":
            correct_bias(student, teacher, images, self.batch_size, self.add_bias)
        else:
            correct_bias_by_batch_norm(student, teacher, self.add_bias)
