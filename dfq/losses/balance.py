"""Learned balance of several losses: their weights are trained with the network.

Uncertainty weighting (Kendall, Gal & Cipolla, CVPR 2018, arXiv 1705.07115, section 3): with s_i = log sigma_i^2, one
trained parameter a term, a term with a Gaussian likelihood becomes exp(-s_i) L_i / 2 + s_i / 2. Here twice that, for
every term, times the weight w_i that it was given:

    L = sum_i w_i (exp(-s_i) L_i + s_i)

For a given L_i the best s_i is log L_i: each term then counts relative to its own size, and there the gradient is that
of sum_i w_i log L_i. s = 0, where training begins, is the fixed balance. The sum may be negative, and s_i has no bound
from below where L_i goes to zero.

Differences from the paper: divergences have the same form as squared errors (the paper's term of a classification is
exp(-s_i) L_i + s_i / 2, whose best s_i is log 2 L_i); w_i; the optimizer is this distillation's (Adam, its own learning
rate, which falls along the cosine).

Not GoR ("Game of Regularizer"; Rehman et al., 2025, arXiv 2509.20854), which is for the same trouble, gradients of
different magnitude in quantization-aware distillation: it has two trainable parameters, one loss of the task (labels)
and one of distillation to balance, and a formula of its own, which is not implemented; its figures say nothing about
this balance. What the two have in common is that weights are trained.

Weights that are only normalized (a softmax) would all end on the smallest term; the + s_i is what prevents that.
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
