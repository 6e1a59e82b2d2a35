"""Overlap of boxes: intersection over union, and its generalization to boxes apart.

Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, arXiv 1902.09630 (algorithm 1)::

    IoU  = |A n B| / |A u B|
    GIoU = IoU - |C \\ (A u B)| / |C|,  C the smallest box around both;  in (-1, 1], 1 for equal boxes
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-9  # area: boxes of none have no overlap, and no gradient that is not a number


def area(boxes: Tensor) -> Tensor:
    """Of boxes [..., 4] xyxy; one whose corners are the wrong way round has none."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4] that are broadcast to each other."""
    intersection, union = _overlap(in_full(a), in_full(b))
    return intersection / union.clamp(min=SMALLEST)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes [n, 4] with boxes [m, 4]: [n, m]."""
    return iou(a[..., :, None, :], b[..., None, :, :])


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized intersection over union of boxes [..., 4] that are broadcast to each other."""
    a, b = in_full(a), in_full(b)
    intersection, union = _overlap(a, b)
    found = (intersection + SMALLEST) / (union + SMALLEST)  # equal boxes of no area are equal
    around = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)
    whole = area(around)
    return found - (whole - union) / whole.clamp(min=SMALLEST)


def in_full(values: Tensor) -> Tensor:
    """float32 in place of half precision, which has no number as small as :data:`SMALLEST`, or no boxes apart."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union."""
    shared = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1)
    intersection = area(shared)
    return intersection, area(a) + area(b) - intersection
