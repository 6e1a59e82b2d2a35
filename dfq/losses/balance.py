"""Learned balance of several losses: their weights are trained with the network.

GoR ("Game of Regularizer"; Rehman et al., 2025, arXiv 2509.20854) balances the losses of quantization-aware
distillation, whose gradients differ by orders of magnitude, by trainable weights. Here in the form of Kendall et al.
(CVPR 2018, arXiv 1705.07115, section 3), one parameter s_i a term::

    L = sum_i w_i (exp(-s_i) L_i + s_i)

For a given L_i the best s_i is log L_i: each term then counts relative to its own size, and the gradient is that of
sum_i w_i log L_i. s = 0 is the fixed balance.

Differences from GoR: its own formula is not reproduced. It has two parameters, for a task's loss and a distillation
loss, and there are as many here as terms. Weights that are only normalized (a softmax) would all end on the smallest
term; the + s_i is what prevents that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balanced_sum(losses: Sequence[Tensor], weights: Sequence[float], log_scales: Tensor | None = None) -> Tensor:
    """sum_i w_i L_i, or with ``log_scales`` [num_losses] (s above) the learned balance; scalar."""
    terms = torch.stack(list(losses))
    factors = terms.new_tensor(list(weights))
    if log_scales is None:
        return (factors * terms).sum()
    return (factors * (torch.exp(-log_scales) * terms + log_scales)).sum()
