"""What torchvision's detectors have in common: features, anchors, coded boxes.

Resizing and normalization, which torchvision does inside, are done before: a detector is handed what its backbone sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from dfq.detectors._base import Boxes, Detector


def features_of(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    features = network.backbone(images)
    return {"0": features} if isinstance(features, Tensor) else dict(features)


def image_list(images: Tensor) -> ImageList:
    size = (images.shape[-2], images.shape[-1])
    return ImageList(images, [size] * len(images))


def anchors_of(generator: nn.Module, images: Tensor, features: list[Tensor]) -> Tensor:
    """Anchors [N, A, 4] xyxy in fractions of the image: the same in every image, whatever N (exported, it varies)."""
    (anchors,) = generator(image_list(images[:1]), features)
    return (anchors / unit(images)).expand(images.shape[0], *anchors.shape)


def unit(images: Tensor) -> Tensor:
    """Pixels of width, height, width, height."""
    height, width = images.shape[-2:]
    return torch.tensor([width, height, width, height], dtype=images.dtype, device=images.device)


def decoded(coder: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes [N, A, 4] from what the network says relative to anchors of the same shape; any unit will do."""
    return coder.decode_single(deltas.flatten(0, -2), anchors.flatten(0, -2)).view(deltas.shape)


def as_torchvision(targets: Sequence[Boxes]) -> list[dict[str, Tensor]]:
    return [{"boxes": wanted.boxes, "labels": wanted.labels} for wanted in targets]


class Suppressing(Detector):
    """Suppresses doubles as its network does, unless a derived class says otherwise."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        settings: Any = getattr(network, "roi_heads", network)  # of two stages the second one's
        for name, value in (("overlap", settings.nms_thresh), ("most", settings.detections_per_img)):
            if getattr(type(self), name) == getattr(Detector, name):
                setattr(self, name, value)


class OneStage(Suppressing):
    """One head for all anchors. Raw: what it gives, and ``anchors`` [N, A, 4] in fractions of the image."""

    def raw(self, images: Tensor) -> dict[str, Tensor]:
        features = list(features_of(self.network, images).values())
        return {**self.network.head(features), "anchors": anchors_of(self.network.anchor_generator, images, features)}

    def own_loss(self, raw: Any, targets: Sequence[Boxes], *more: Any) -> Tensor:
        """The sum of torchvision's losses; ``more``: what a family's ``compute_loss`` takes behind the anchors."""
        found = self.network.compute_loss(as_torchvision(targets), raw, list(raw["anchors"]), *more)
        return sum(found.values(), start=raw["anchors"].new_zeros(()))
