"""Genie-M: block reconstruction that trains weight steps together with the rounding.

Jeon et al., "Genie: Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780 (section 3.2).

Differences from the paper: learning rates are ten times higher for a tenth of the 20,000 iterations, those of steps are
relative to each step; weight grids are the scheme's (the paper: asymmetric).
"""

from __future__ import annotations

from dataclasses import dataclass

from dfq.algorithms._reconstruction import BlockReconstruction
from dfq.settings import Fraction, NonNegativeFloat


@dataclass(frozen=True)
class GenieM(BlockReconstruction):
    """QDrop and learned weight steps."""

    weight_step_lr: NonNegativeFloat = 1e-3  # Adam on weight steps, relative to each; 0: they stay
    activation_step_lr: NonNegativeFloat = 1e-3  # Adam on activation steps, relative to each; 0: they stay
    drop: Fraction = 0.5  # share of inputs, and of activations inside, that stay float during training (QDrop)
