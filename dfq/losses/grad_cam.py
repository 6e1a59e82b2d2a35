"""Alignment of class activation maps: the student looks at the same places as the teacher.

SynQ (Kim et al., ICLR 2025), second step, with Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391, eq. 1 and 2).
For the score y_c of class c and a feature map A [C, H, W]::

    alpha_k = mean over positions of d y_c / d A_k
    CAM     = ReLU(sum_k alpha_k A_k)                                      [H, W]
    L       = |CAM_T - CAM_S|^2

c is the class that the teacher names.

Differences from the papers: the student's alpha is a constant for its gradient (a fake-quantized head has no second
derivative); the error is relative to the size of the teacher's maps, so that one weight serves every network (the
paper's weight runs from 20 to 2,000).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def class_scores(logits: Tensor, classes: Tensor) -> Tensor:
    """Sum over samples of the logits [N, num_classes] of ``classes`` [N]: what is derived by the feature map."""
    return logits.gather(1, classes[:, None]).sum()


def class_activation_map(features: Tensor, gradient: Tensor) -> Tensor:
    """CAM [N, H, W] of ``features`` [N, C, H, W] and the gradient of the class scores with respect to them."""
    alpha = gradient.detach().mean((2, 3), keepdim=True)
    return torch.relu((alpha * features).sum(1))


def grad_cam_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Squared error of maps [N, H, W] over the squared size of the teacher's; scalar."""
    size = torch.linalg.vector_norm(teacher_map.detach()).square().clamp(min=1e-12)
    return F.mse_loss(student_map, teacher_map.detach(), reduction="sum") / size
