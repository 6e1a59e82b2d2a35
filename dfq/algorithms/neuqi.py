"""NeUQI: the near-optimal scale and zero point of a uniform grid, weighted by what the weights are multiplied with.

NeUQI: Near-Optimal Uniform Quantization Parameter Initialization for Low-Bit LLMs (Lin et al., 2025, arXiv 2505.17595).
For a row v = w / s of weights that share a grid, with h the mean squares of their inputs (the Hessian's diagonal)::

    minimize over s, z    sum_i h_i (w_i - s (clamp(round(w_i / s + z), 0, N) - z))^2

For fixed s this is a piecewise quadratic function of a real z, whose pieces end where a weight changes its code, at
z = q + 1/2 - v_i for q = 0 .. N - 1. On a piece with codes q_i its least value is C - B^2 / A with A = sum h,
B = sum h (q - v), C = sum h (q - v)^2, at z = B / A. All pieces are walked through in order: exact for a given s.
s goes through shares of the min-max scale, coarsely first, then finely around the best one.

A whole zero point, which is all that most integer formats hold, is chosen among all codes by trying them out;
``scheme.weight.zero_point=float`` keeps the real one.

Differences from the paper: it rounds the whole range of candidates for z to a few before it sweeps, here all are walked
through; symmetric grids get the best scale; rounding and distillation behind it are other algorithms
(``algorithm=sequence algorithm.steps=[neuqi,gptq]``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.algorithms._inputs import LARGEST_ROWS, GridSearch, importance, input_squares
from dfq.modules import QuantizedLayer
from dfq.precision import exact_device
from dfq.quantization import choose_qparams, round_scale, round_to_grid, round_zero_point
from dfq.scheme import TensorScheme
from dfq.settings import Fraction, PositiveInt
from dfq.student import Student

FEW_CODES = 16  # as many zero points are all tried out


@dataclass(frozen=True)
class NeUQI(GridSearch):
    """Seconds on small networks."""

    num_scales: PositiveInt = 24  # shares of the min-max scale, then as many around the best one
    smallest_share: Fraction = 0.3  # of the min-max scale

    def look(self, student: Student, images: Tensor) -> dict[str, Tensor]:
        return input_squares(student, images)

    def search(self, layer: QuantizedLayer, known: Tensor | None) -> tuple[Tensor, Tensor]:
        there = exact_device(layer.weight.device)
        rows = layer.weight_quantizer.rows(layer.weight.detach()).to(there)
        weights = importance(layer, known).to(there)
        size = max(1, LARGEST_ROWS // rows.shape[1] // (layer.weight_quantizer.scheme.quant_max + 1))
        parts = zip(rows.split(size), weights.split(size), strict=True)
        found = [self.fit(w, h, layer.weight_quantizer.scheme) for w, h in parts]
        scale, zero_point = zip(*found, strict=True)
        return torch.cat(scale), torch.cat(zero_point)

    def fit(self, rows: Tensor, weights: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point [R] of weights [R, M] whose errors count ``weights`` [R, M] each."""
        widest, start = choose_qparams(rows.amin(1), rows.amax(1), scheme)
        w, h = rows.double(), weights.double()
        h = torch.where(h.sum(1, keepdim=True) > 0, h, 1.0)
        shares = torch.linspace(self.smallest_share, 1, self.num_scales, dtype=torch.float64, device=w.device)
        step = (1 - self.smallest_share) / max(self.num_scales - 1, 1)
        around = torch.linspace(-step, step, self.num_scales, dtype=torch.float64, device=w.device)
        best_share = torch.ones_like(widest, dtype=torch.float64)
        best_scale, best_zero = widest, start
        best = _error(w, h, widest, start, scheme)
        for stage in range(2):
            center = best_share
            for share in shares if stage == 0 else around:
                taken = share.expand_as(center) if stage == 0 else (center + share).clamp(min=1e-3)
                scale = (widest.double() * taken).float().clamp(min=torch.finfo(torch.float32).tiny)
                scale = round_scale(scale, scheme)
                zero_point = self.zero_point(w, h, scale, start, scheme)
                error = _error(w, h, scale, zero_point, scheme)
                better = error < best
                best = torch.where(better, error, best)
                best_share = torch.where(better, taken, best_share)
                best_scale = torch.where(better, scale, best_scale)
                best_zero = torch.where(better, zero_point, best_zero)
        return best_scale, best_zero

    def zero_point(self, w: Tensor, h: Tensor, scale: Tensor, start: Tensor, scheme: TensorScheme) -> Tensor:
        """The best one for ``scale`` [R]."""
        if scheme.symmetric:
            return start
        if scheme.has_float_zero_point:
            levels = scheme.quant_max - scheme.quant_min
            real = real_zero_point(w / scale[:, None].double(), h, levels) + scheme.quant_min
            return round_zero_point(real.float(), scale, scheme)
        low, high = scheme.quant_min, scheme.quant_max
        if high - low < FEW_CODES:
            candidates = [torch.full_like(start, z) for z in range(low, high + 1)]
        else:  # around the one of the middle of the range
            real = (high + low) / 2 - (w.amax(1) + w.amin(1)) / 2 / scale.double()
            nearest = torch.round(real).to(start.dtype)
            candidates = [(nearest + d).clamp(low, high) for d in range(-FEW_CODES // 2, FEW_CODES // 2)]
        candidates = [round_zero_point(candidate, scale, scheme) for candidate in candidates]
        errors = torch.stack([_error(w, h, scale, z, scheme) for z in candidates])
        return torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]


def _error(w: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme) -> Tensor:
    """sum h (w - w_hat)^2 of each row [R]."""
    rounded = round_to_grid(w, scale.double(), zero_point.double(), scheme, 0)
    return (h * (w - rounded).square()).sum(1)


def real_zero_point(v: Tensor, h: Tensor, num_steps: int) -> Tensor:
    """The real z [R] with the least sum h (v - (clamp(round(v + z), 0, num_steps) - z))^2, exactly; float64.

    Args:
        v, h: [R, M], weights in steps and what their errors count.
    """
    codes = torch.arange(num_steps, dtype=v.dtype, device=v.device)
    ends = (codes + 0.5 - v[..., None]).flatten(1)  # where a weight goes from code q to q + 1
    more_b = h[..., None].expand(*h.shape, num_steps)
    more_c = more_b * (2 * (codes - v[..., None]) + 1)
    order = ends.argsort(1)
    zero = torch.zeros_like(v[:, :1])
    b = (-h * v).sum(1, keepdim=True) + torch.cat([zero, more_b.flatten(1).gather(1, order).cumsum(1)], 1)
    c = (h * v.square()).sum(1, keepdim=True) + torch.cat([zero, more_c.flatten(1).gather(1, order).cumsum(1)], 1)
    a = h.sum(1, keepdim=True)
    best = (c - b.square() / a).argmin(1, keepdim=True)
    return (b / a).gather(1, best)[:, 0]
