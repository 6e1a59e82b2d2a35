"""Percentile ranges: clip the rarest values (Wu et al., 2020, arXiv 2004.09602, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.precision import exact
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
        if self.percentile == 100:
            return choose_qparams(observation.minimum, observation.maximum, scheme)
        values, order = observation.values.sort(dim=1)
        counts = torch.ones_like(values) if observation.counts is None else observation.counts.gather(1, order)
        cumulative = exact(counts).cumsum(1)
        there = cumulative.device
        total = cumulative[:, -1:]
        rest, slack = 1 - self.percentile / 100, 1e-9 * total  # 1 - 0.99 is a hair more than 1 / 100
        positive = (observation.minimum >= 0) & (not scheme.has_float_zero_point)  # with a shift zero is no end
        above = torch.full_like(total, rest / 2).masked_fill(positive[:, None].to(there), rest)
        # The smallest value with at most that share above it, and the largest with at most that share below it.
        high = torch.searchsorted(cumulative, total * (1 - above) - slack)
        low = torch.searchsorted(cumulative, total * rest / 2 + slack, right=True)
        ends = (i.clamp(max=values.shape[1] - 1).to(values.device) for i in (high, low))
        maximum, minimum = (values.gather(1, i)[:, 0] for i in ends)
        return choose_qparams(minimum.masked_fill(positive, 0.0), maximum, scheme)
