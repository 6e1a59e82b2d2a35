"""Block reconstruction with everything that helped: Genie-M's joint step and soft bits, QDrop, trained biases.

Genie-M (Jeon et al., CVPR 2023, arXiv 2212.04780, section 3.2), QDrop (Wei et al., ICLR 2022, arXiv 2203.05740), BRECQ
(Li et al., ICLR 2021, arXiv 2102.05426), AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568). The equations are in
:mod:`dfq.algorithms._reconstruction`.

Differences from the papers: the error is relative (see there), learning rates are ten times Genie's for a tenth of its
iterations and relative to each step, biases are trained too (a rounded weight
shifts the mean of what it makes); steps and biases are trained once more on the teacher's outputs after the last block.
"""

from __future__ import annotations

from dataclasses import dataclass

from dfq.algorithms._reconstruction import BlockReconstruction
from dfq.settings import Fraction, NonNegativeFloat, NonNegativeInt


@dataclass(frozen=True)
class Reconstruction(BlockReconstruction):
    """Minutes on small networks."""

    weight_step_lr: NonNegativeFloat = 1e-3  # Adam on weight steps, relative to each; 0: they stay
    activation_step_lr: NonNegativeFloat = 1e-3  # Adam on activation steps, relative to each; 0: they stay
    bias_lr: NonNegativeFloat = 1e-3  # Adam on biases, in units of their mean magnitude; 0: they stay
    drop: Fraction = 0.5  # share of inputs, and of activations inside, that stay float during training (QDrop)
    finish_iterations: NonNegativeInt = 500  # steps at the end that train steps and biases on the teacher's outputs
