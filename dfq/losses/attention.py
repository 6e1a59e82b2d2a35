"""Attention: the student looks where the teacher looks.

With P the probabilities of attention [N, H, T, S], rows of which add up to one::

    maps      mean over rows KL(P_T || P_S)                                    (MiniLM, Wang et al., arXiv 2002.10957)
    outputs   |P_S V_S - P_T V_T|^2 / |P_T V_T|^2                              (TinyBERT-like, arXiv 1909.10351)

Differences from the papers: all layers, not the last one; errors of outputs relative to their size; no values are
compared on their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST = 1e-12


def attention_map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between rows of attention maps [..., T, S], mean over rows, in nats; what is masked in both does not count."""
    log_p, log_q = (x.clamp(min=LEAST).log() for x in (teacher, student))
    return torch.where(teacher > 0, teacher * (log_p - log_q), 0.0).sum(-1).mean()


def attention_output_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Squared error of attention's outputs over their squared size, mean over layers."""
    sizes = [torch.linalg.vector_norm(theirs).square().clamp(min=1e-12) for theirs in teacher]
    errors = [
        F.mse_loss(mine, theirs, reduction="sum") / size
        for mine, theirs, size in zip(student, teacher, sizes, strict=True)
    ]
    return torch.stack(errors).mean()
