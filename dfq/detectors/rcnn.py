"""Faster R-CNN and Mask R-CNN of torchvision (Ren et al., 2015, arXiv 1506.01497; He et al., 2017, arXiv 1703.06870).

Two stages: proposals (is there anything, and where), and what the heads say of the best :data:`NUM_PROPOSALS` of them.
Proposals differ from network to network, so a student's are compared with those of its teacher that they overlap most.
Boxes alone are compared and given: the mask branch of Mask R-CNN is not run, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers

from dfq.detectors._base import Boxes, Candidates
from dfq.detectors._proposals import filtered, pooled
from dfq.detectors._torchvision import Suppressing, anchors_of, decoded, features_of, unit
from dfq.hooks import Choice, Unrounded
from dfq.losses.set_prediction import set_prediction_loss

NUM_PROPOSALS = 100  # an image, where torchvision takes 1,000; fewer are filled up with the whole image


class Adapter(Suppressing):
    """Raw: ``objectness`` [N, A], ``deltas`` and ``anchors`` [N, A, 4], ``proposals`` [N, P, 4], ``class_logits``
    [N, P, K] with class 0 for nothing, ``box_deltas`` [N, P, 4 K].
    """

    fits: ClassVar[tuple[str, ...]] = (
        "torchvision.models.detection.faster_rcnn.FasterRCNN",
        "torchvision.models.detection.mask_rcnn.MaskRCNN",
    )

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.chosen, self.places = Choice(), Unrounded()

    def raw(self, images: Tensor) -> dict[str, Tensor]:
        features = features_of(self.network, images)
        maps, rpn, roi = list(features.values()), self.network.rpn, self.network.roi_heads
        objectness, deltas = rpn.head(maps)
        levels = [values.shape[1] * values.shape[2] * values.shape[3] for values in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        objectness, deltas = objectness.view(images.shape[0], -1), deltas.view(images.shape[0], -1, 4)
        anchors = anchors_of(rpn.anchor_generator, images, maps)
        with torch.no_grad():
            proposals = self.chosen(self.places(self._proposals, objectness, deltas, anchors, levels, unit(images)))
        inside = self.places(pooled, roi.box_roi_pool, features, proposals, images.shape[-2])
        class_logits, box_deltas = roi.box_predictor(roi.box_head(inside))
        return {
            "objectness": objectness,
            "deltas": deltas,
            "anchors": anchors,
            "proposals": self.places(torch.div, proposals, unit(images)),
            "class_logits": class_logits.unflatten(0, (-1, NUM_PROPOSALS)),
            "box_deltas": box_deltas.unflatten(0, (-1, NUM_PROPOSALS)),
        }

    def candidates(self, raw: Any) -> Candidates:
        """Of the second stage, each with the box of its best class."""
        best = raw["class_logits"][..., 1:].argmax(-1) + 1
        deltas = raw["box_deltas"].unflatten(-1, (-1, 4))
        own = decoded(self.network.roi_heads.box_coder, deltas, raw["proposals"][:, :, None].expand_as(deltas))
        boxes = own.gather(2, best[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        return Candidates(boxes, raw["class_logits"], exclusive=True, background=0, are_fixed=False, class_boxes=own)

    def stages(self, raw: Any) -> tuple[Candidates, ...]:
        boxes = decoded(self.network.rpn.box_coder, raw["deltas"], raw["anchors"])
        return Candidates(boxes, raw["objectness"][..., None]), self.candidates(raw)

    def loss(self, raw: Any, targets: Sequence[Boxes]) -> Tensor:
        """:func:`set_prediction_loss` of both stages: torchvision's own draws random numbers of no seed of ours."""
        proposals, found = self.stages(raw)
        boxes, labels = [wanted.boxes for wanted in targets], [wanted.labels for wanted in targets]
        objects = [torch.zeros_like(row) for row in labels]  # the first stage knows no other class
        first = set_prediction_loss(proposals.boxes, proposals.scores, boxes, objects)
        return (first + set_prediction_loss(found.boxes, found.scores, boxes, labels)).mean()

    def _proposals(
        self, objectness: Tensor, deltas: Tensor, anchors: Tensor, levels: Sequence[int], unit: Tensor
    ) -> Tensor:
        """[N, NUM_PROPOSALS, 4] in pixels."""
        boxes = decoded(self.network.rpn.box_coder, deltas, anchors) * unit
        return filtered(self.network.rpn, boxes, objectness, levels, unit, NUM_PROPOSALS)
