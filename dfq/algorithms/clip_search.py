"""Clip search: cut off both ends of a weight's range, each by itself, where the layer's output is nearest to before.

The asymmetric clipping that BitDistiller (Du et al., ACL 2024, arXiv 2402.10631, section 3.1) begins from. For the
weights w [K] of a group that share a grid, and the inputs x [K] that they are multiplied with::

    (a, b)* = argmin over a, b  of  E (w x - w_hat x)^2 = (w - w_hat) H (w - w_hat)^T,    H = E x x^T  [K, K]

with the grid of the range a min(w) .. b max(w), a and b in {1, 1 - 1/n, ...} down to ``smallest_share``.

Differences from the paper: H of the float network instead of stored tokens, one pass for all layers; no layer is left
out (there queries and keys are); convolutions, whose rows are longer, count the diagonal of H alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from dfq.algorithms._inputs import GridSearch, group_moments, importance, input_squares
from dfq.modules import QuantizedLayer
from dfq.quantization import choose_qparams, round_to_grid
from dfq.settings import Fraction, PositiveInt
from dfq.student import Student


@dataclass(frozen=True)
class ClipSearch(GridSearch):
    """Seconds on small networks."""

    num_steps: PositiveInt = 10  # shares of each end that are tried
    smallest_share: Fraction = 0.5  # of an end

    def look(self, student: Student, images: Tensor) -> dict[str, Tensor]:
        found = group_moments(student, images)
        if found.keys() != student.layers.keys():
            found |= {name: squares for name, squares in input_squares(student, images).items() if name not in found}
        return found

    def search(self, layer: QuantizedLayer, known: Tensor | None) -> tuple[Tensor, Tensor]:
        quantizer, scheme = layer.weight_quantizer, layer.weight_quantizer.scheme
        rows = quantizer.rows(layer.weight.detach())
        linear = isinstance(layer, nn.Linear) and known is not None
        weights = torch.ones_like(rows) if linear else importance(layer, known)
        low, high = rows.amin(1), rows.amax(1)
        best_scale, best_zero = choose_qparams(low, high, scheme)
        best = torch.full_like(low, torch.inf)
        shares = torch.linspace(1, self.smallest_share, self.num_steps).tolist()
        for a, b in product(shares, shares):
            scale, zero_point = choose_qparams(low * a, high * b, scheme)
            error = rows - round_to_grid(rows, scale, zero_point, scheme, 0)
            size = self._through(layer, error, known) if linear else (weights * error.square()).sum(1)
            better = size < best
            best = torch.where(better, size, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero_point, best_zero)
        return best_scale, best_zero

    @staticmethod
    def _through(layer: QuantizedLayer, error: Tensor, moments: Tensor | None) -> Tensor:
        """E (error x)^2 of each row [R], from the error of all rows [R, M] and moments [G, K, K]."""
        assert moments is not None
        groups, size = len(moments), moments.shape[-1]
        by_group = error.reshape(-1, groups, size).transpose(0, 1)  # [G, O, K]
        found = ((by_group @ moments) * by_group).sum(-1).T  # [O, G]
        return found.reshape(len(error), -1).sum(1)
