"""Ternary weight networks: the scale of -s, 0, s with the least squared error (Li et al., 2016, arXiv 1605.04711).

For a threshold t the best scale is the mean of the magnitudes above it (eq. 4), and the best threshold maximizes
(sum of magnitudes above t)^2 / (number above t) (eq. 5). TernaryLLM (Chen et al., 2024, arXiv 2406.07177) shifts each
row or group by its mean first: ``symmetric=false``.

Differences from the paper: the paper takes t = 0.7 mean |w|, an approximation for Gaussian weights; here the maximum is
found exactly, by sorting. At the maximum t = s / 2, so rounding to the nearest level is thresholding. Other grids than
``ternary`` get the range of their extremes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.precision import exact
from dfq.quantization import choose_qparams, round_scale, shifted_scale
from dfq.quantizers._observation import Observation
from dfq.scheme import TensorScheme
from dfq.settings import PositiveFloat


@dataclass(frozen=True)
class TWN:
    """For weights on a ternary grid."""

    threshold: PositiveFloat | None = None  # of the magnitude, times its mean; null: the best one; the paper: 0.7

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel or group."""
        widest, zero_point = choose_qparams(observation.minimum, observation.maximum, scheme)
        if scheme.grid != "ternary" or observation.counts is not None:
            return widest, zero_point
        values = observation.values.float()
        shift = torch.zeros_like(values[:, :1]) if scheme.symmetric else values.mean(1, keepdim=True)
        magnitude = (values - shift).abs()
        if self.threshold is None:
            ordered = exact(magnitude.sort(dim=1, descending=True).values)
            total, count = ordered.cumsum(1), torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
            best = (total.square() / count).argmax(1, keepdim=True)
            scale = (total / count).gather(1, best)[:, 0].float().to(values.device)
        else:
            above = magnitude > self.threshold * magnitude.mean(1, keepdim=True)
            scale = (magnitude * above).sum(1) / above.sum(1).clamp(min=1)
        scale = torch.where(scale > 0, scale, widest)
        if scheme.symmetric:
            return round_scale(scale.clamp(min=torch.finfo(torch.float32).tiny), scheme), zero_point
        scale = shifted_scale(scale, shift[:, 0], scheme)
        return scale, -shift[:, 0] / scale
