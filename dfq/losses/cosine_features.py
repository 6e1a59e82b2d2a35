"""Cosine features: the student's features point where the teacher's do, however long they are.

OFF, outlier-friendly feature distillation (TernaryLLM, Chen et al., 2024, arXiv 2406.07177)::

    L = sum_l 1 - cos(h_T^l, h_S^l),   h^l: features of a token behind layer l

Tokens and channels whose features are far larger than all others say no more than the rest: a length does not count.

Differences from the paper: mean over layers, so that a weight means the same at any depth.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, mean over tokens [N, T, H] (or rows [N, H]); of maps [N, C, H, W] over positions."""
    dim = 1 if student.dim() == 4 else -1
    return (1 - F.cosine_similarity(student, teacher, dim=dim, eps=1e-12)).mean()
