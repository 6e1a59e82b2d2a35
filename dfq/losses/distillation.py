"""Losses between a student's and a teacher's outputs that every distillation starts from. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of softmax outputs, mean over samples, times temperature^2 (Hinton et al., 1503.02531).

    Shapes: both [N, ..., num_classes]; scalar, in nats.
    """
    student = F.log_softmax(student_logits.flatten(0, -2) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.flatten(0, -2) / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def relative_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error over squared size of the teacher's tensor: scale-free, so features of all layers weigh alike."""
    # Two fused reductions: the chain of subtraction, square and sum would pass over memory six times.
    size = torch.linalg.vector_norm(teacher.detach()).square()
    return F.mse_loss(student, teacher, reduction="sum") / size.clamp(min=1e-12)
