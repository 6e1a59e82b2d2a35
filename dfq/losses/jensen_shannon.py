"""Generalized Jensen-Shannon divergence: between KL(teacher || student) and KL(student || teacher), and bounded.

GKD (Agarwal et al., ICLR 2024, arXiv 2306.13649, eq. 1), with P the teacher, Q the student, M = b P + (1 - b) Q::

    JSD_b(P || Q) = b KL(P || M) + (1 - b) KL(Q || M)

Divided by b (1 - b) it tends to KL(P || Q) for b -> 0 and to KL(Q || P) for b -> 1; at b = 1/2 it is symmetric and at
most ln 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, mix: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """JSD_mix(teacher || student) of softmax outputs, mean over samples, times temperature^2.

    Shapes: both [N, ..., num_classes]; scalar, in nats. ``mix`` (b above): strictly between 0 and 1.
    """
    student = F.log_softmax(student_logits.flatten(0, -2) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    mixture = torch.logaddexp(teacher + math.log(mix), student + math.log1p(-mix))
    from_teacher = F.kl_div(mixture, teacher, reduction="batchmean", log_target=True)
    from_student = F.kl_div(mixture, student, reduction="batchmean", log_target=True)
    return (mix * from_teacher + (1 - mix) * from_student) * temperature**2
