"""YOLOv8 to YOLO12 of ultralytics (AGPL-3.0), a package that is not imported here: one box a cell, sigmoids.

In evaluation mode these networks give [N, 4 + K, A], boxes as center and size in pixels and a probability a class, and
beside it what it was computed from. Networks that suppress doubles themselves (YOLOv10, YOLO26) give something else.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision.ops import box_convert

from dfq.detectors._base import Candidates, Detector
from dfq.detectors._torchvision import unit
from dfq.errors import UserError

SMALLEST = 1e-6  # probability whose logit is told apart from smaller ones


class Adapter(Detector):
    """Raw: ``boxes`` [N, A, 4], center and size in fractions of the image, and ``class_logits`` [N, A, K]."""

    fits: ClassVar[tuple[str, ...]] = ("ultralytics.nn.tasks.DetectionModel",)
    overlap: float = 0.7  # as the package suppresses

    def raw(self, images: Tensor) -> dict[str, Tensor]:
        found = self.network(images)
        found = found[0] if isinstance(found, list | tuple) else found
        classes = getattr(self.network, "nc", None) or len(getattr(self.network, "names", ()))
        if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[1] != 4 + classes:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"got {got} from a {type(self.network).__name__} of {classes} classes",
                f"[N, {4 + classes}, A]: YOLOv8 to YOLO12, without a suppression of their own",
                "teacher.adapter=package.module:Adapter of your own",
            )
        boxes, probabilities = found[:, :4].mT / unit(images), found[:, 4:].mT
        return {"boxes": boxes, "class_logits": torch.logit(probabilities, SMALLEST)}

    def candidates(self, raw: Any) -> Candidates:
        return Candidates(box_convert(raw["boxes"], "cxcywh", "xyxy"), raw["class_logits"])
