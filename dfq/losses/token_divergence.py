"""Divergences between distributions over tokens, token by token; over the whole vocabulary, or over its largest entries
and one bucket for the rest.

With P the teacher, Q the student, V the vocabulary::

    forward       KL(P || Q) = sum_V p (log p - log q)                              (Hinton et al., arXiv 1503.02531)
    reverse       KL(Q || P)                                                        (MiniLLM, arXiv 2306.08543)
    jensen_shannon  (KL(P || M) + KL(Q || M)) / 2,  M = (P + Q) / 2                 (GKD, arXiv 2306.13649)
    cakld         b KL(Q || P) + (1 - b) KL(P || Q), b the mean of max p over text  (BitDistiller, arXiv 2402.10631)
    top_k         KL(P' || Q'), P' the k largest p and the sum of all others        (TopKLD)

A cache of the teacher's k largest log-probabilities and the logarithm of the rest is P' as well: each divergence can be
computed between P' and Q'. By the log-sum inequality it is at most the one over the whole vocabulary, and forward and
reverse KL miss only what the two differ by within the rest.

Differences from the papers: mean over tokens, not over sequences, so that a learning rate means the same at any length.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "jensen_shannon", "cakld", "top_k"]
LEAST = -40.0  # logarithm of as good as nothing


def divergence(student: Tensor, teacher: Tensor, kind: Divergence = "forward", confidence: float = 0.5) -> Tensor:
    """Of each token [M], in nats, from log-probabilities [M, C] of both; ``confidence``: b of ``cakld``."""
    if kind in ("forward", "top_k"):
        return _kl(teacher, student)
    if kind == "reverse":
        return _kl(student, teacher)
    if kind == "cakld":
        return confidence * _kl(student, teacher) + (1 - confidence) * _kl(teacher, student)
    mixture = torch.logaddexp(teacher, student) - math.log(2)
    return (_kl(teacher, mixture) + _kl(student, mixture)) / 2


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [M, K + 1] of the tokens ``ids`` [M, K] and of all others together, from [M, V] of each."""
    chosen = log_probs.gather(-1, ids)
    rest = torch.log1p(-chosen.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)).clamp(min=LEAST)
    return torch.cat([chosen, rest], -1)
