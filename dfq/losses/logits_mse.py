"""Squared error of logits (Ba & Caruana, NeurIPS 2014, arXiv 1312.6184, eq. 1: "L2 regression on logits").

The limit of Hinton's loss for high temperatures (arXiv 1503.02531, section 2.1), with a weight on every class.

Differences from the paper: each sample's logits are centered first, since a softmax does not see their mean (Hinton's
limit assumes it); mean over classes.
"""

from __future__ import annotations

from torch import Tensor


def logits_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of centered logits. Shapes: both [N, ..., num_classes]; scalar."""
    difference = student_logits - teacher_logits
    difference = difference - difference.mean(-1, keepdim=True)
    return difference.square().mean()
