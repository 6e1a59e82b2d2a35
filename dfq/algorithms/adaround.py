"""AdaRound: rounding chosen layer by layer to keep each layer's output.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, arXiv 2004.10568 (eq. 21-25).

Differences from the paper: the error is relative, see :mod:`dfq.algorithms._reconstruction`; a layer's output is
compared before its activation function (the paper: after it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dfq.algorithms._reconstruction import BlockReconstruction


@dataclass(frozen=True)
class AdaRound(BlockReconstruction):
    """Layer by layer; steps, biases and activation ranges stay what calibration made them."""

    single_layers: ClassVar[bool] = True
