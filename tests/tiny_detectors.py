"""Tiny detectors with fixed weights: one with all its places known, one that only decodes, and the families'."""

import pytest
import torch
from conftest import settle
from torch import nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from dfq.detectors._base import Boxes, Candidates, Detector
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._detector import as_detector

SPEC = InputSpec((3, 32, 32), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CLASSES = 4


def cells() -> nn.Module:
    """[N, 1 + 4 + CLASSES, 8, 8]: objectness, center and size of the box of each cell, classes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 5 + CLASSES, 1),
    )


class Cells(Detector):
    def candidates(self, raw):
        rows, columns = raw.shape[-2:]
        x = (torch.arange(columns, device=raw.device) + 0.5 + raw[:, 1].tanh()) / columns
        y = (torch.arange(rows, device=raw.device)[:, None] + 0.5 + raw[:, 2].tanh()) / rows
        w, h = raw[:, 3].sigmoid() / 2, raw[:, 4].sigmoid() / 2
        boxes = torch.stack([x - w, y - h, x + w, y + h], -1).flatten(1, 2)
        return Candidates(boxes, raw[:, 5:].flatten(2).mT, raw[:, 0].flatten(1), exclusive=True)


class DecodeOnly(Detector):
    """Raw has two names; nothing is known but what it decodes."""

    num_classes = CLASSES

    def raw(self, images):
        found = self.network(images)
        return {"places": found[:, :5], "classes": found[:, 5:]}

    def decode(self, raw, image_sizes):
        found = Cells(nn.Identity()).candidates(torch.cat([raw["places"], raw["classes"]], 1))
        rows = []
        for boxes, scores, (height, width) in zip(found.boxes, found.scores, image_sizes, strict=True):
            best, labels = scores.max(-1)
            order = best.argsort(descending=True)[:20]
            rows.append(Boxes(boxes[order] * boxes.new_tensor([width, height] * 2), best[order], labels[order]))
        return rows


def cell_teacher(adapter=Cells, seed=0) -> Teacher:
    network = cells()
    settle(network, SPEC.size, seed)
    with torch.no_grad():
        network[-1].weight.mul_(2)
    return Teacher(as_detector(network, adapter), "detection", SPEC, name="cells")


def _pyramid(levels=(2, 3, 4), extra=None):
    return _resnet_fpn_extractor(resnet18(weights=None), 5, returned_layers=list(levels), extra_blocks=extra)


FAMILIES = {
    "retinanet": lambda: detection.RetinaNet(_pyramid(extra=LastLevelP6P7(256, 256)), num_classes=CLASSES),
    "fcos": lambda: detection.FCOS(_pyramid(extra=LastLevelP6P7(256, 256)), num_classes=CLASSES),
    "ssd": lambda: detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES),
    "faster_rcnn": lambda: detection.FasterRCNN(_pyramid((1, 2, 3, 4)), num_classes=CLASSES),
    "mask_rcnn": lambda: detection.MaskRCNN(_pyramid((1, 2, 3, 4)), num_classes=CLASSES),
}


def family_teacher(name: str, size: int = 64) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FAMILIES[name]().eval()
    spec = InputSpec((3, size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Teacher(as_detector(network), "detection", spec, name=name)


class Pyramid(nn.Module):
    """Maps of strides 4 and 8."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deeper = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images):
        fine = self.stem(images)
        return {"0": fine, "1": self.deeper(fine)}


def one_stage() -> Teacher:
    """A RetinaNet of 32 px: towers of four layers and what is behind them, which run once a level."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        anchors = AnchorGenerator(((8,), (16,)), ((0.5, 1.0, 2.0),) * 2)
        network = detection.RetinaNet(Pyramid(), num_classes=CLASSES, anchor_generator=anchors)
        for layer in network.head.modules():
            if isinstance(layer, nn.Conv2d):  # torchvision's deviation of 0.01 leaves nothing of so few channels
                nn.init.kaiming_normal_(layer.weight)
    detector = as_detector(network)
    settle(detector, SPEC.size)
    return Teacher(detector, "detection", SPEC, name="one_stage")


def two_stages(kind: type = detection.FasterRCNN, **settings) -> Teacher:
    """A Faster R-CNN of 32 px: a head that runs once a level, and one that has rows of proposals.

    ``kind``: or another of two stages; ``settings``: of its constructor.
    """
    head = detection.faster_rcnn.TwoMLPHead(8 * 9, 16)
    network = kind(
        Pyramid(),
        rpn_anchor_generator=AnchorGenerator(((8,), (16,)), ((0.5, 1.0, 2.0),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        box_head=head,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, CLASSES),
        **settings,
    )
    detector = as_detector(network)
    settle(detector, SPEC.size)
    return Teacher(detector, "detection", SPEC, name="two_stages")


def with_masks() -> Teacher:
    """The same as a Mask R-CNN."""
    return two_stages(
        detection.MaskRCNN,
        mask_roi_pool=MultiScaleRoIAlign(["0", "1"], 4, 2),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(8, (8,), 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(8, 8, CLASSES),
    )


CHOOSING = {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "d_fine": "DFine"}
FIXED = {
    "detr": "Detr",
    "table_transformer": "TableTransformer",
    "conditional_detr": "ConditionalDetr",
    "deformable_detr": "DeformableDetr",
}


def transformers_teacher(name, derive=False, size=64, **settings) -> Teacher:
    """Of a random network of its family; ``derive``: of a class derived from it. ``settings``: of its configuration."""
    transformers = pytest.importorskip("transformers")
    small = {"num_labels": CLASSES} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "yolos":
            config = transformers.YolosConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                image_size=[size, size], patch_size=16, num_detection_tokens=5, **small,
            )  # fmt: skip
            network = transformers.YolosForObjectDetection(config)
        elif name in CHOOSING:
            backbone = transformers.RTDetrResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
                out_features=["stage2", "stage3", "stage4"],
            )  # fmt: skip
            config = getattr(transformers, CHOOSING[name] + "Config")(
                backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=16,
                d_model=16, encoder_attention_heads=2, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16,
                decoder_layers=2, decoder_attention_heads=2, num_queries=7, num_denoising=0, anchor_image_size=None,
                **small,
            )  # fmt: skip
            network = getattr(transformers, CHOOSING[name] + "ForObjectDetection")(config)
        else:
            backbone = transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
                out_features=["stage2", "stage3", "stage4"] if name == "deformable_detr" else ["stage4"],
            )  # fmt: skip
            config = getattr(transformers, FIXED[name] + "Config")(
                backbone_config=backbone, num_queries=5, d_model=32, encoder_layers=1, decoder_layers=2,
                encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, **small,
            )  # fmt: skip
            network = getattr(transformers, FIXED[name] + "ForObjectDetection")(config)
        if derive:
            network.__class__ = type("Mine", (type(network),), {})
    spec = InputSpec((3, size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Teacher(as_detector(network.eval()), "detection", spec, name=name)
