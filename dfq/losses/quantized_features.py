"""Quantized feature distillation: the student imitates features that few bits can express.

QFD (Zhu, He & Wu, AAAI 2023, arXiv 2307.10638)::

    L = |f_S - Q_b(f_T)|^2,   Q_b: uniform quantization to b bits

A quantized student cannot reach what lies between its levels, so the teacher does not ask for it.

Differences from the paper: the paper first fine-tunes the teacher with its features quantized, on labelled data that
nobody has here; Q_b takes the range of each batch. Features at several places, not the last alone. The error is
relative to the size of the teacher's features, so that all places weigh alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.quantization import dynamic_qparams, round_to_grid
from dfq.scheme import TensorScheme


def quantized_feature_loss(student: Tensor, teacher: Tensor, num_bits: int) -> Tensor:
    """Squared error to the teacher's features on a grid of ``num_bits``, over their squared size. Shapes alike."""
    scheme = TensorScheme(num_bits)
    with torch.no_grad():
        target = round_to_grid(teacher, *dynamic_qparams(teacher, scheme, tuple(range(teacher.dim()))), scheme)
        size = torch.linalg.vector_norm(teacher).square().clamp(min=1e-12)
    return F.mse_loss(student, target, reduction="sum") / size
