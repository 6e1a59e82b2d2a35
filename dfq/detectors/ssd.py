"""SSD and SSDLite of torchvision (Liu et al., ECCV 2016, arXiv 1512.02325): anchors, one softmax, class 0: nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dfq.detectors._base import Boxes, Candidates
from dfq.detectors._torchvision import OneStage, decoded
from dfq.losses._box_overlap import pairwise_iou


class Adapter(OneStage):
    """Raw: ``cls_logits`` [N, A, K], ``bbox_regression`` and ``anchors`` [N, A, 4]."""

    fits: ClassVar[tuple[str, ...]] = ("torchvision.models.detection.ssd.SSD",)

    def candidates(self, raw: Any) -> Candidates:
        boxes = decoded(self.network.box_coder, raw["bbox_regression"], raw["anchors"])
        return Candidates(boxes, raw["cls_logits"], exclusive=True, background=0)

    def loss(self, raw: Any, targets: Sequence[Boxes]) -> Tensor:
        """Cross-entropy with the hardest negatives and distance of coded boxes, an object; torchvision's own."""
        matched = [
            self.network.proposal_matcher(pairwise_iou(wanted.boxes, anchors))
            if len(wanted.boxes)
            else torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
            for wanted, anchors in zip(targets, raw["anchors"], strict=True)
        ]
        return self.own_loss(raw, targets, matched)
