"""RetinaNet of torchvision (Lin et al., ICCV 2017, arXiv 1708.02002): anchors, one sigmoid a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dfq.detectors._base import Boxes, Candidates
from dfq.detectors._torchvision import OneStage, decoded


class Adapter(OneStage):
    """Raw: ``cls_logits`` [N, A, K], ``bbox_regression`` and ``anchors`` [N, A, 4]."""

    fits: ClassVar[tuple[str, ...]] = ("torchvision.models.detection.retinanet.RetinaNet",)

    def candidates(self, raw: Any) -> Candidates:
        boxes = decoded(self.network.box_coder, raw["bbox_regression"], raw["anchors"])
        return Candidates(boxes, raw["cls_logits"])

    def loss(self, raw: Any, targets: Sequence[Boxes]) -> Tensor:
        """Focal loss and distance of coded boxes, an object; torchvision's own."""
        return self.own_loss(raw, targets)
