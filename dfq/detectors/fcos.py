"""FCOS of torchvision (Tian et al., ICCV 2019, arXiv 1904.01355): one box a cell, one sigmoid a class, centerness.

The score of a class is the product of the two probabilities, the square of torchvision's: the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from dfq.detectors._base import Boxes, Candidates
from dfq.detectors._torchvision import OneStage

LARGEST = 4096.0  # units of a side; its square is far below 1e8


class Adapter(OneStage):
    """Raw: ``cls_logits`` [N, A, K], ``bbox_ctrness`` [N, A, 1], ``bbox_regression`` and ``anchors`` [N, A, 4]."""

    fits: ClassVar[tuple[str, ...]] = ("torchvision.models.detection.fcos.FCOS",)

    def candidates(self, raw: Any) -> Candidates:
        deltas, anchors = raw["bbox_regression"], raw["anchors"]
        boxes = self.network.box_coder.decode(deltas.flatten(0, 1), anchors.flatten(0, 1)).view(deltas.shape)
        return Candidates(boxes, raw["cls_logits"], raw["bbox_ctrness"].squeeze(-1))

    def loss(self, raw: Any, targets: Sequence[Boxes]) -> Tensor:
        """Focal loss, GIoU and centerness, an object; torchvision's own.

        It matches by distances and by areas that it takes from 1e8 in single precision, so that fractions are of no
        use: boxes are given in a unit of which :data:`LARGEST` make the longer side. Anchors are square in pixels.
        """
        sides = raw["anchors"][0, :, 2:] - raw["anchors"][0, :, :2]
        unit = (LARGEST * sides[0].min() / sides[0]).repeat(2)
        raw = raw | {"anchors": raw["anchors"] * unit}
        targets = [wanted._replace(boxes=wanted.boxes * unit) for wanted in targets]
        widths = sides[:, 0]  # a level has one
        changes = ((widths[1:] / widths[:-1] - 1).abs() > 0.1).nonzero().flatten() + 1
        ends = [0, *changes.tolist(), len(widths)]
        levels = [end - start for start, end in pairwise(ends)]
        return self.own_loss(raw, targets, levels)
