"""Oscillation dampening: weights are pulled to the middle of the step that they are rounded to.

Nagel et al. (ICML 2022, arXiv 2203.11086, eq. 5): with few bits a weight whose best value lies between two levels jumps
to and fro over the midpoint::

    L = |w_hat - clip(w, s n, s p)|^2,   w_hat = s clip(round(w / s), n, p), no gradient through w_hat

Clipped weights feel nothing. The weight of the loss rises from 0 along a cosine, so that weights move freely at first.

Differences from the paper: errors are counted in steps and averaged over a layer, so that layers and bit widths weigh
alike.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dampening_loss(weight: Tensor, rounded: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean squared distance of ``weight`` to where it is rounded to, in steps; scalar.

    Args:
        weight, rounded: [R, M], before and after rounding; one row for each scale.
        scale, low, high: [R, 1], the step and the ends of the grid.
    """
    inside = torch.minimum(torch.maximum(weight, low.detach()), high.detach())
    return ((inside - rounded.detach()) / scale.detach()).square().mean()
