"""QDrop: block reconstruction with half of the activations left float at random.

Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR 2022, arXiv
2203.05740 (eq. 8).

Differences from the paper: none but those of :mod:`dfq.algorithms._reconstruction`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfq.algorithms._reconstruction import BlockReconstruction
from dfq.settings import Fraction, NonNegativeFloat


@dataclass(frozen=True)
class QDrop(BlockReconstruction):
    """AdaRound's soft rounding in blocks that see float and quantized inputs mixed."""

    activation_step_lr: NonNegativeFloat = 1e-3  # Adam on activation steps, relative to each; 0: they stay
    drop: Fraction = 0.5  # share of inputs, and of activations inside, that stay float during training (QDrop)
