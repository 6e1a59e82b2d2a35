"""BRECQ: rounding chosen block by block, errors weighed by the loss's sensitivity, activation steps learned.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021, arXiv 2102.05426
(eq. 10: squared gradients as the diagonal of the Fisher information).

Differences from the paper: gradients are those of the float network's log-likelihood of labels that it draws itself
(the paper takes the KL between two networks); weights and activation steps are trained together.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfq.algorithms._reconstruction import BlockReconstruction, Sensitivity
from dfq.settings import NonNegativeFloat


@dataclass(frozen=True)
class BRECQ(BlockReconstruction):
    """Blocks, and the Fisher information as weights."""

    activation_step_lr: NonNegativeFloat = 1e-3  # Adam on activation steps, relative to each; 0: they stay
    sensitivity: Sensitivity = "elements"  # what errors count by: squared gradients of the teacher's likelihood
