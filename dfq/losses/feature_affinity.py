"""Feature affinity: which positions of a feature map resemble which, in the student as in the teacher.

FAQD (Li et al., IEEE Access 2023, arXiv 2302.10899). With F [P, C] the feature vectors of a sample's P positions, each
scaled to length one, and A = F F^T their affinities (cosines)::

    FA    = |A_S - A_T|_F^2 / P^2
    FFA_k = |(A_S - A_T) Z|_F^2 / (k P^2),   Z [P, k] standard normal,   A Z = F (F^T Z)

E[FFA_k] = FA, since E[Z Z^T] = k I. FA costs P^2 C, FFA_k costs P C k. Student and teacher may have different widths.

Differences from the paper: mean over samples; one Z for all samples of a batch; where P is not larger than k the exact
loss is cheaper and is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def feature_affinity(student: Tensor, teacher: Tensor, projection: Tensor | None = None) -> Tensor:
    """FA, or with a ``projection`` FFA, mean over samples; scalar.

    Args:
        student, teacher: [N, C, ...] feature maps with as many positions, or [N, T, C] tokens; C may differ.
        projection: [P, k] standard normal; None: exact.
    """
    ours, theirs = positions(student), positions(teacher)
    num_positions = ours.shape[1]
    if projection is None or num_positions <= projection.shape[1]:
        difference = ours @ ours.mT - theirs @ theirs.mT
        return difference.square().sum((1, 2)).mean() / num_positions**2
    difference = ours @ (ours.mT @ projection) - theirs @ (theirs.mT @ projection)
    return difference.square().sum((1, 2)).mean() / (projection.shape[1] * num_positions**2)


def positions(features: Tensor) -> Tensor:
    """[N, P, C]: the feature vector of each position, of length one; zero where all features are zero."""
    rows = features if features.dim() == 3 else features.flatten(2).mT
    return F.normalize(rows, dim=-1, eps=1e-6)


def num_positions(features: Tensor) -> int:
    """P of ``features``, as :func:`feature_affinity` counts."""
    return features.shape[1] if features.dim() == 3 else features[0, 0].numel()


def random_projection(num_positions: int, size: int, rng: torch.Generator, like: Tensor) -> Tensor:
    """Z [P, k] for :func:`feature_affinity`, the same numbers on every device."""
    return torch.randn(num_positions, size, generator=rng).to(like)
