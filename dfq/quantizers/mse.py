"""Ranges by least error: shrink min..max until the rounding error of what was seen is smallest.

Scan of clip ratios as in BRECQ and Genie (Jeon et al., CVPR 2023, arXiv 2212.04780): a p-norm of 2.4 punishes clipped
outliers a little more than the mean-squared error does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.quantization import choose_qparams, fake_quantize
from dfq.quantizers._observation import Observation
from dfq.scheme import TensorScheme
from dfq.settings import PositiveFloat, PositiveInt


@dataclass(frozen=True)
class MSE:
    """The clip ratio out of ``num_candidates`` with the least mean of ``|x - x_hat| ** norm``."""

    norm: PositiveFloat = 2.0  # exponent of the error; 2.4 clips a little less
    num_candidates: PositiveInt = 100  # clip ratios 1, 1 - 1/n, ..., 1/n

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel."""
        values = observation.values.float()
        best_scale, best_zero_point = choose_qparams(observation.minimum, observation.maximum, scheme)
        best_error = torch.full_like(best_scale, torch.inf)
        for ratio in torch.arange(self.num_candidates, 0, -1) / self.num_candidates:
            scale, zero_point = choose_qparams(observation.minimum * ratio, observation.maximum * ratio, scheme)
            rounded = fake_quantize(values, scale, zero_point, scheme, axis=0)
            error = (rounded - values).abs().pow(self.norm)
            error = (error if observation.counts is None else error * observation.counts).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero_point = torch.where(better, zero_point, best_zero_point)
        return best_scale, best_zero_point
