"""RetinaNet of torchvision (Lin et al., ICCV 2017, arXiv 1708.02002): anchors, one sigmoid a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dfq.detectors._base import Boxes, Candidates, Detector
from dfq.detectors._torchvision import anchors_of, as_torchvision, decoded, features_of


class Adapter(Detector):
    """Raw: ``cls_logits`` [N, A, K], ``bbox_regression`` and ``anchors`` [N, A, 4]."""

    fits: ClassVar[tuple[str, ...]] = ("torchvision.models.detection.retinanet.RetinaNet",)

    def raw(self, images: Tensor) -> dict[str, Tensor]:
        features = list(features_of(self.network, images).values())
        return {**self.network.head(features), "anchors": anchors_of(self.network.anchor_generator, images, features)}

    def candidates(self, raw: Any) -> Candidates:
        boxes = decoded(self.network.box_coder, raw["bbox_regression"], raw["anchors"])
        return Candidates(boxes, raw["cls_logits"])

    def loss(self, raw: Any, targets: Sequence[Boxes]) -> Tensor:
        """Focal loss and distance of coded boxes, an object; torchvision's own."""
        found = self.network.compute_loss(as_torchvision(targets), raw, list(raw["anchors"]))
        return sum(found.values(), start=raw["anchors"].new_zeros(()))
