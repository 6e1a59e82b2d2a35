"""Reverse KL: the student is punished for what it holds likely and the teacher does not (mode seeking).

MiniLLM (Gu et al., ICLR 2024, arXiv 2306.08543, eq. 1): KL(student || teacher) instead of KL(teacher || student).

Differences from the paper: in closed form over the classes (there over sampled sequences, with policy gradients), and
with Hinton's temperature.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of softmax outputs, mean over samples, times temperature^2.

    Shapes: both [N, ..., num_classes]; scalar, in nats.
    """
    student = F.log_softmax(student_logits.flatten(0, -2) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(teacher, student, reduction="batchmean", log_target=True) * temperature**2
