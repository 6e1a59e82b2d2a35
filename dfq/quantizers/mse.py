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

AT_ONCE = 2**15  # values that are rounded at once, of all candidates together


@dataclass(frozen=True)
class MSE:
    """The clip ratio out of ``num_candidates`` with the least mean of ``|x - x_hat| ** norm``."""

    norm: PositiveFloat = 2.0  # exponent of the error; 2.4 clips a little less
    num_candidates: PositiveInt = 100  # clip ratios 1, 1 - 1/n, ..., 1/n

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel."""
        values, low, high = observation.values.float(), observation.minimum, observation.maximum
        ratios = torch.arange(self.num_candidates, 0, -1) / self.num_candidates
        best_scale, best_zero_point = choose_qparams(low, high, scheme)
        best_error = torch.full_like(best_scale, torch.inf)
        at_once = max(AT_ONCE // max(values.numel(), 1), 1)  # of a small tensor
        if scheme.scale_format == "e4m3" or low.dtype != torch.float32:  # scales in e4m3 share one of the whole tensor
            at_once = 1
        for some in ratios.split(at_once):
            if len(some) == 1:
                scale, zero_point = choose_qparams(low * some[0], high * some[0], scheme)
                error = self._error(values, scale, zero_point, scheme, observation.counts)
            else:
                column = some.to(low.device)[:, None]
                scales, zero_points = choose_qparams(low * column, high * column, scheme)
                columns = scales[..., None], zero_points[..., None]
                errors = self._error(values[None], *columns, scheme, observation.counts)
                errors = errors.nan_to_num(nan=torch.inf, posinf=torch.inf)  # as below: NaN is never better
                first = errors.argmin(0, keepdim=True)  # the first of equal ones
                scale, zero_point, error = (x.gather(0, first)[0] for x in (scales, zero_points, errors))
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero_point = torch.where(better, zero_point, best_zero_point)
        return best_scale, best_zero_point

    def _error(
        self, values: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme, counts: Tensor | None
    ) -> Tensor:
        """Of each channel [..., C], for ``values`` [..., C, M]."""
        rounded = fake_quantize(values, scale, zero_point, scheme, axis=0)
        error = (rounded - values).abs().pow(self.norm)
        return (error if counts is None else error * counts).sum(-1)
