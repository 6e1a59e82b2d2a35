"""Token scaling: tokens that the teacher finds hard to predict weigh more.

TSLD, token-scaled logit distillation (Kim et al., NeurIPS 2023, arXiv 2308.06744)::

    l_t = -log p_T(token t + 1),   w = softmax over the text of l / tau,   L = sum_t w_t D_t

D_t is the divergence at token t. Where the teacher is sure, its distribution says little more than the token itself.

Differences from the paper: w adds up to the number of tokens of a text, so that a learning rate means what it means
without; its cross-entropy to the text itself is ``ntp_weight``. Of a teacher's cache a token that is not among the
stored ones has the log-probability of all others together, so that its loss comes out too small.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_scales(nll: Tensor, counts: Tensor, tau: float = 10.0) -> Tensor:
    """Weights [N, T] of tokens, mean 1 over those of a text that count; the others 0.

    Args:
        nll: [N, T], the teacher's negative log-likelihood of each token's successor, in nats.
        counts: bool [N, T], tokens that have a successor.
        tau: how even the weights are; the larger, the more alike.
    """
    weights = torch.where(counts, nll / tau, -torch.inf).softmax(-1)
    return torch.where(counts, weights * counts.sum(-1, keepdim=True), 0.0)
