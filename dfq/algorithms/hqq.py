"""HQQ: grids of weights that outliers do not pull at, found from the weights alone in seconds.

Half-Quadratic Quantization (Badri & Shaji, Mobius Labs, 2023, "Half-Quadratic Quantization of Large Machine Learning
Models"). For a row w of weights that share a grid (a channel or a group) minimize sum |w - w_hat|_p^p, p < 1, by turns,
with an auxiliary e that takes up the large errors::

    e = s shrink((w - w_hat) / s),     shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)
    z = mean(q - (w - e) / s)                                                                     (zero point)
    q = clamp(round(w / s + z)),     w_hat = (q - z) s,     beta = growth beta

from the zero point that calibration has chosen and from several shares of its scale. What is kept of a row is its best
grid, judged by sum |w - w_hat|^norm as it will be stored; the calibrated one is among them.

Differences from the paper: there one scale is tried, the widest, and the zero point is no whole number (here with
``scheme.weight.zero_point=float``). Rounded to one, which is all that integer formats hold, it hardly ever moves, and
what comes out is the grid that went in. With a choice
of scales the paper's own norm is no judge: with p < 1 a row is best where most of its weights are met exactly and the
largest are cut off, which at 4 bits hurts a network more than nearest rounding does. So rows are judged by their
squared error. Errors are shrunk in units of the step, so that beta means the same for small weights and for large ones.
A symmetric grid has no zero point: its scale is fitted instead, s = <q, w - e> / <q, q>. Rows are judged one by one
(there: all stop together when the mean error rises); inputs' grids are calibrated as always. Only uniform grids are
fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from dfq.algorithms._base import Algorithm, Work, tell_left
from dfq.algorithms._inputs import LARGEST_ROWS
from dfq.precision import exact_device
from dfq.progress import progress_bar
from dfq.scheme import TensorScheme
from dfq.settings import Bound, PositiveFloat, PositiveInt

Power = Annotated[float, Bound(at_least=0.1, at_most=1)]
Growth = Annotated[float, Bound(at_least=1)]
Share = Annotated[float, Bound(above=0, at_most=1)]


@dataclass(frozen=True)
class HQQ(Algorithm):
    """Seconds, and no sample is needed for weights."""

    iterations: PositiveInt = 20  # turns at most
    power: Power = 0.7  # p of the norm
    beta: PositiveFloat = 10.0  # errors below beta^(1 / (p - 2)) steps count as small: 0.17 of a step
    growth: Growth = 1.01  # of beta in each turn
    norm: PositiveFloat = 2.0  # exponent of the error that a row's best grid is judged by
    shares: tuple[Share, ...] = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # of the calibrated scale, to begin
    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at
    weights_stay_float: ClassVar[bool] = True

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """Give the student its grids, those of weights fitted."""
        work.ensure_calibrated(work.images(self.num_calibration_samples))
        layers = work.student.layers
        tell_left(self, work.student, {n for n, la in layers.items() if la.weight_quantizer.scheme.grid == "uniform"})
        quantizers = {layer.weight_quantizer: layer for layer in layers.values()}
        with progress_bar("hqq", len(quantizers), "layers") as advance:
            for quantizer, layer in quantizers.items():
                if quantizer.has_qparams and quantizer.scheme.grid == "uniform":
                    rows = quantizer.rows(layer.weight)
                    count = min(len(rows), -(-rows.numel() // LARGEST_ROWS))
                    whole = (rows, quantizer.scale.flatten(), quantizer.zero_point.flatten())
                    there = exact_device(rows.device)
                    parts = zip(*(x.to(there).tensor_split(count) for x in whole), strict=True)
                    found = [self.fit(w, s, z, quantizer.scheme) for w, s, z in parts]
                    quantizer.set_qparams(*(torch.cat(values) for values in zip(*found, strict=True)))
                    if layer.bias_quantizer is not None and layer.bias is not None:
                        layer.bias_quantizer.make_room(layer)
                advance(1)

    def fit(self, rows: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point [R] of weights [R, M], from those of calibration (as many entries, in any shape)."""
        w = rows.double()
        s, z = scale.reshape(-1, 1).double(), zero_point.reshape(-1, 1).double()
        low, high = scheme.quant_min, scheme.quant_max

        def codes(s: Tensor, z: Tensor) -> Tensor:
            return (torch.round(w / s + z)).clamp(low, high)

        def error(s: Tensor, z: Tensor) -> Tensor:
            return (w - (codes(s, z) - z) * s).abs().pow(self.norm).sum(1, keepdim=True)

        best = (error(s, z), s, z)
        for share in self.shares:
            trial_s, trial_z, beta = s * share, z, self.beta
            q = codes(trial_s, trial_z)
            for _ in range(self.iterations):
                e = shrink(w / trial_s - (q - trial_z), self.power, beta) * trial_s
                if scheme.symmetric:
                    fitted = (q * (w - e)).sum(1, keepdim=True) / q.square().sum(1, keepdim=True).clamp(min=1)
                    trial_s = torch.where(fitted > 0, fitted, trial_s)
                else:
                    trial_z = (q - (w - e) / trial_s).mean(1, keepdim=True)
                q = codes(trial_s, trial_z)
                # As it will be stored: a float32 scale and, unless the scheme has float ones, a whole zero point.
                whole = trial_z if scheme.has_float_zero_point else torch.round(trial_z).clamp(low, high)
                stored = trial_s.float().double(), whole.float().double()
                found = (error(*stored), *stored)
                better = found[0] < best[0]
                best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))  # type: ignore
                beta *= self.growth
        return best[1][:, 0].float(), best[2][:, 0].to(zero_point.dtype)


def shrink(x: Tensor, power: float, beta: float) -> Tensor:
    """The proximal step of |.|^p: small entries become zero."""
    size = x.abs()
    return torch.sign(x) * (size - size.clamp(min=1e-30).pow(power - 1) / beta).clamp(min=0)
