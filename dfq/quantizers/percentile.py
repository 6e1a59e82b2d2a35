"""Percentile ranges: clip the rarest values (Wu et al., 2020, arXiv 2004.09602, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.quantization import choose_qparams
from dfq.quantizers._observation import Observation
from dfq.scheme import TensorScheme


@dataclass(frozen=True)
class Percentile:
    """The grid covers the middle ``percentile`` percent: half of the rest is clipped at each end.

    Where nothing is negative (after a ReLU) the lower end is zero and all of the rest is clipped at the top.
    """

    percentile: float = 99.99  # share of values inside the range, in percent, above 50

    def __post_init__(self):
        if not 50 < self.percentile <= 100:
            raise UserError(f"got percentile={self.percentile}", "above 50, at most 100")

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel."""
        values, order = observation.values.sort(dim=1)
        counts = torch.ones_like(values) if observation.counts is None else observation.counts.gather(1, order)
        cumulative = counts.double().cumsum(1)
        total = cumulative[:, -1:]
        rest = 1 - self.percentile / 100
        one_sided = (observation.minimum >= 0)[:, None]
        above = torch.where(one_sided, rest, rest / 2)
        # The smallest value with at most that share above it, and the largest with at most that share below it.
        high = values.gather(1, torch.searchsorted(cumulative, total * (1 - above)).clamp(max=values.shape[1] - 1))[
            :, 0
        ]
        low = values.gather(
            1, torch.searchsorted(cumulative, total * rest / 2, right=True).clamp(max=values.shape[1] - 1)
        )[:, 0]
        if self.percentile == 100:
            low, high = observation.minimum, observation.maximum
        low = torch.where(observation.minimum >= 0, torch.zeros_like(low), low)
        return choose_qparams(low, high, scheme)
