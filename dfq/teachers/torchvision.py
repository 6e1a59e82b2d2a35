"""Networks of torchvision, by name; normalization comes from the weights' own transforms, or ImageNet's.

Classifiers and detectors (RetinaNet, FCOS, SSD, Faster and Mask R-CNN). A detector is handed images of one size, which
it does not resize or normalize again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torch import nn

from dfq.errors import UserError, did_you_mean
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._checkpoint import load_checkpoint
from dfq.teachers._task_settings import no_detector

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load(
    name: str,  # e.g. resnet18 or retinanet_resnet50_fpn
    weights: str | bool | None = None,  # DEFAULT or the name of an entry: downloaded; null: random, or the checkpoint
    checkpoint: str | None = None,  # your own weights: .safetensors, .pt or .pth
    input_size: Sequence[int] | None = None,  # [channels, height, width]; null: the weights' own crop, or [3,224,224]
    mean: Sequence[float] | None = None,  # of the normalization; null: the weights' own, or ImageNet's
    std: Sequence[float] | None = None,  # of the normalization; null: the weights' own, or ImageNet's
    num_classes: int | None = None,  # null: the model's own
    adapter: str | None = None,  # of a detector: package.module:Adapter; null: that of its family
    task_settings: Mapping[str, Any] | None = None,  # of a detector: {least_score: 0.25, box_weight: 1.0}
) -> Teacher:
    """Teacher from ``torchvision.models.get_model``; ``weights=False`` builds the structure alone."""
    from torchvision import models

    finds_boxes = name in models.list_models(module=models.detection)
    known = models.list_models(module=models)
    if name not in known and not finds_boxes:
        known = [*known, *models.list_models(module=models.detection)]
        raise UserError(
            f"got teacher.name={name}", "a classifier or detector of torchvision.models", did_you_mean(name, known)
        )
    if checkpoint is not None and isinstance(weights, str):
        raise UserError("got teacher.checkpoint and teacher.weights", "one of the two", "leave one away")
    entry = None
    if isinstance(weights, str):
        entries = models.get_model_weights(name)
        if weights not in entries.__members__:
            raise UserError(
                f"got teacher.weights={weights}",
                " | ".join(entries.__members__),
                did_you_mean(weights, entries.__members__),
            )
        entry = entries[weights]
    if entry is not None and num_classes not in (None, len(entry.meta["categories"])):
        raise UserError(
            f"got teacher.num_classes={num_classes} and teacher.weights={weights}",
            f"{len(entry.meta['categories'])} classes, as those weights have",
            "leave one away",
        )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if finds_boxes:
        options |= {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False}
    try:
        module = models.get_model(name, weights=entry, **options)
    except (URLError, OSError) as error:
        raise UserError(
            f"got teacher.weights={weights}, which can't be downloaded ({error})",
            do="give teacher.checkpoint=FILE instead",
        ) from None
    if checkpoint is not None and weights is not False:
        load_checkpoint(module, Path(checkpoint))
    if finds_boxes:
        names = [] if entry is None else entry.meta["categories"]
        return _detector(module, name, adapter, task_settings, input_size, mean, std, names)
    no_detector(f"teacher.name={name}, a classifier", adapter, task_settings)
    own = entry.transforms() if entry is not None else None
    size = tuple(input_size or (3, *([own.crop_size[0]] * 2 if own else (224, 224))))
    spec = InputSpec(
        size, tuple(mean or (own.mean if own else IMAGENET_MEAN)), tuple(std or (own.std if own else IMAGENET_STD))
    )
    return Teacher(module, "classification", spec, name=name)


def _detector(
    module: nn.Module,
    name: str,
    adapter: str | None,
    task_settings: Mapping[str, Any] | None,
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    names: Sequence[str],
) -> Teacher:
    from dfq.detectors._base import named_unused
    from dfq.teachers._detector import as_detector

    inside = module.transform  # what torchvision would do to images
    size = tuple(input_size or (3, *(inside.fixed_size or (640, 640))[::-1]))
    spec = InputSpec(size, tuple(mean or inside.image_mean), tuple(std or inside.image_std))
    detector = as_detector(module, adapter, task_settings)
    detector.unused_labels = detector.unused_labels or named_unused(names)
    return Teacher(detector, "detection", spec, name=name)
