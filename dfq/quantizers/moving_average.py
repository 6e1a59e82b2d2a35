"""Moving averages of the extremes of each batch (Jacob et al., CVPR 2018, arXiv 1712.05877, section 3.1).

range <- momentum * range + (1 - momentum) * extremes of the batch, starting from the first batch
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfq.quantization import choose_qparams
from dfq.quantizers._observation import Observation
from dfq.scheme import TensorScheme
from dfq.settings import Fraction


@dataclass(frozen=True)
class MovingAverage:
    """One batch with an outlier moves the range a little. Weights have no batches: the same as min-max."""

    momentum: Fraction = 0.9  # share of the old range that stays with each batch

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel."""
        if observation.batches is None:
            return choose_qparams(observation.minimum, observation.maximum, scheme)
        average = observation.batches[0]
        for extremes in observation.batches[1:]:
            average = self.momentum * average + (1 - self.momentum) * extremes
        return choose_qparams(average[:1], average[1:], scheme)
