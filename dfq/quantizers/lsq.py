"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153).

The step (``scale``) is trained with the network. Equations: initial step 2 <|x|> / sqrt(Q_P) (section 2.1), gradient
of the step (eq. 3, in :func:`dfq.quantization.fake_quantize`), gradient scale g = 1 / sqrt(N * Q_P) (section 2.2) with
N the number of elements that share the step: of the tensor, of one output channel, or of one sample of an activation.

Differences from the paper: the zero point of an asymmetric activation is found by calibration and stays; weights may
have one step per output channel; steps that start from another quantizer's range keep it (:func:`learn_step`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfq.modules import Quantizer
from dfq.quantization import choose_qparams
from dfq.quantizers._observation import Observation
from dfq.scheme import TensorScheme


@dataclass(frozen=True)
class LSQ:
    """LSQ's own initial step."""

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel."""
        widest, zero_point = choose_qparams(observation.minimum, observation.maximum, scheme)
        magnitude = observation.values.abs().float()
        if observation.counts is None:
            mean = magnitude.mean(1)
        else:
            mean = (magnitude * observation.counts).sum(1) / observation.counts.sum(1)
        scale = 2 * mean / scheme.quant_max**0.5
        # A step wider than the whole range would leave codes unused, and a zero step divides by zero.
        return torch.where(scale > 0, torch.minimum(scale, widest), widest), zero_point


def learn_step(quantizer: Quantizer, num_elements: int) -> nn.Parameter:
    """Make the step of a calibrated quantizer trainable; ``num_elements`` share one step (N above)."""
    scale = nn.Parameter(quantizer.scale.detach().clone())
    del quantizer.scale
    quantizer.register_parameter("scale", scale)
    quantizer.gradient_scale = (num_elements * quantizer.scheme.quant_max) ** -0.5
    return scale
