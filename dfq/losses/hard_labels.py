"""Hard labels where they can be trusted: cross-entropy only for samples that the teacher finds easy.

SynQ (Kim et al., ICLR 2025), third step: with p_y the teacher's probability of the label y, a sample's difficulty is
1 - p_y, and::

    L = mean over samples of [1 - p_y <= tau] * (-log q_y)

Wrong labels of ambiguous synthetic images are left to the soft outputs.

Differences from the paper: the label is the class that the teacher names (a store of synthetic images need not say
what they were made for), so the difficulty is that of its first guess.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gated_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, difficulty: float) -> Tensor:
    """Cross-entropy to the teacher's first class, of samples whose difficulty is at most ``difficulty`` (tau).

    Shapes: both [N, ..., num_classes]; scalar, in nats; the others count as zero.
    """
    student, teacher = student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    probability, labels = F.softmax(teacher, dim=-1).max(-1)
    loss = F.cross_entropy(student, labels, reduction="none")
    return (loss * (1 - probability <= difficulty)).mean()
