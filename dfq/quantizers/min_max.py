"""Min-max ranges: the grid covers everything that was seen, outliers included (Jacob et al., CVPR 2018, 1712.05877)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dfq.quantization import choose_qparams
from dfq.quantizers._observation import Observation
from dfq.scheme import TensorScheme


@dataclass(frozen=True)
class MinMax:
    """No rounding is clipped; best at 8 bits."""

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel."""
        return choose_qparams(observation.minimum, observation.maximum, scheme)
