"""Scenes of scikit-learn's digits, and small detectors trained on them: one-stage, two-stage and a transformer.

    python examples/digits_scenes.py scenes --out scenes                  # scenes/val, scenes/train, *.json (COCO)
    python examples/digits_scenes.py train --network retinanet --out retinanet.safetensors

    dfq run teacher=factory teacher.factory=examples.digits_scenes:retinanet teacher.checkpoint=retinanet.safetensors \
        teacher.task=detection 'teacher.input_size=[3,64,64]' 'teacher.mean=[0.45,0.45,0.45]' \
        'teacher.std=[0.25,0.25,0.25]' generator=box_sampling num_samples=128 scheme=w4a8 \
        evaluation=coco evaluation.images=scenes/val evaluation.annotations=scenes/val.json \
        evaluation.reference_path=scenes/train

The networks are torchvision's RetinaNet and Faster R-CNN (``evaluation.labels=id``: class 0 is nothing) on a narrow
residual network with a feature pyramid, trained by the loss of their dfq adapter, and transformers' RT-DETR and YOLOS,
trained by their own (which needs scipy). Digits of training scenes do not appear in held-out ones. Needs scikit-learn,
which carries the digits.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_convert

from dfq import Boxes, Detector
from dfq.losses._box_overlap import pairwise_iou
from dfq.teachers._detector import as_detector

SIZE, MEAN, STD = 64, 0.45, 0.25
CLASSES = 10
MOST_DIGITS, SMALLEST, LARGEST = 4, 12, 28  # in a scene; pixels of a side
TRAIN_DIGITS = 1200  # of 1797; the others are those of held-out scenes
APART = 0.05  # overlap below which digits are put beside each other

# ------------------------------------------------------------------------------------------------ scenes


def load_digits() -> tuple[Tensor, Tensor]:
    """Strokes [1797, 8, 8] in 0..1 and labels [1797], in a fixed random order."""
    from sklearn.datasets import load_digits as load

    digits = load()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return torch.from_numpy(digits.images[order] / 16).float(), torch.from_numpy(digits.target[order])


def scene(strokes: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Boxes]:
    """Image uint8 [3, SIZE, SIZE] and the digits in it, boxes in pixels: tight around the strokes."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=rng)

    ground = F.interpolate(uniform(1, 3, 4, 4), (SIZE, SIZE), mode="bicubic")[0] * 0.5
    image = (ground + 0.25 * uniform(3, 1, 1) + 0.05 * torch.randn(3, SIZE, SIZE, generator=rng)).clamp(0, 1)
    boxes: list[Tensor] = []
    chosen: list[Tensor] = []
    for _ in range(int(torch.randint(1, MOST_DIGITS + 1, (), generator=rng))):
        index = int(torch.randint(len(labels), (), generator=rng))
        side = int(torch.randint(SMALLEST, LARGEST + 1, (), generator=rng))
        shape = F.interpolate(strokes[index][None, None], (side, side), mode="bilinear")[0, 0]
        top, left = (uniform(2) * (SIZE - side)).long().tolist()
        rows, columns = ((shape > 0.3).any(dim).nonzero().flatten() for dim in (1, 0))
        corners = [left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]
        box = torch.tensor([float(value) for value in corners])
        if boxes and float(pairwise_iou(box[None], torch.stack(boxes)).max()) > APART:
            continue
        color = 0.7 + 0.3 * uniform(3, 1, 1)
        place = image[:, top : top + side, left : left + side]
        place.copy_(torch.lerp(place, color, shape))
        boxes.append(box)
        chosen.append(labels[index])
    found = Boxes(torch.stack(boxes), torch.ones(len(boxes)), torch.stack(chosen))
    return (image * 255).round().to(torch.uint8), found


def scenes(held_out: bool, seed: int) -> Iterator[tuple[Tensor, Boxes]]:
    """Scenes without end, of the digits for training or of the others."""
    strokes, labels = load_digits()
    part = slice(TRAIN_DIGITS, None) if held_out else slice(TRAIN_DIGITS)
    rng = torch.Generator().manual_seed(2 * seed + held_out)
    while True:
        yield scene(strokes[part], labels[part], rng)


def write_scenes(folder: Path, name: str, count: int, held_out: bool) -> Path:
    """``folder/name/*.png`` and ``folder/name.json`` in COCO's format; category k + 1 is digit k."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index, (image, found) in zip(range(count), scenes(held_out, seed=1), strict=False):
        file_name = f"{index:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(folder / name / file_name)
        images.append({"id": index, "file_name": file_name, "height": SIZE, "width": SIZE})
        for (x1, y1, x2, y2), label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "iscrowd": 0}
            annotations.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(CLASSES)]
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


# ------------------------------------------------------------------------------------------------ networks


class Unit(nn.Module):
    """Two 3x3 convolutions with batch norm and a way around them."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.around(x))


class Backbone(nn.Module):
    """A narrow residual network with a feature pyramid of strides 4, 8 and 16."""

    def __init__(self, widths: tuple[int, int, int, int] = (16, 24, 48, 64), out_channels: int = 32):
        super().__init__()
        first, *others = widths
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        self.stages = nn.ModuleList(Unit(a, b, 2) for a, b in zip(widths, others, strict=False))
        self.pyramid = FeaturePyramidNetwork(list(others), out_channels, norm_layer=nn.BatchNorm2d)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, found = self.stem(x), {}
        for index, stage in enumerate(self.stages):
            found[str(index)] = x = stage(x)
        return dict(self.pyramid(found))


def _anchors() -> AnchorGenerator:
    return AnchorGenerator(((12,), (18,), (26,)), ((0.5, 1.0, 2.0),) * 3)


def retinanet() -> nn.Module:
    return detection.RetinaNet(Backbone(), CLASSES, anchor_generator=_anchors())


def faster_rcnn() -> nn.Module:
    pool = MultiScaleRoIAlign(["0", "1", "2"], 5, 2)
    backbone = Backbone()
    head = detection.faster_rcnn.TwoMLPHead(backbone.out_channels * 25, 128)
    predictor = detection.faster_rcnn.FastRCNNPredictor(128, CLASSES + 1)
    return detection.FasterRCNN(
        backbone, rpn_anchor_generator=_anchors(), box_roi_pool=pool, box_head=head, box_predictor=predictor
    )


def yolos() -> nn.Module:
    """A detection transformer: patches and queries through one encoder; the last class is nothing."""
    from transformers import YolosConfig, YolosForObjectDetection

    return YolosForObjectDetection(
        YolosConfig(
            hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192,
            image_size=[SIZE, SIZE], patch_size=8, num_detection_tokens=12, num_labels=CLASSES,
            use_mid_position_embeddings=False,
        )
    )  # fmt: skip


def rt_detr() -> nn.Module:
    """A detection transformer whose queries begin at places of a residual network's features."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return RTDetrForObjectDetection(
        RTDetrConfig(
            backbone_config=backbone, encoder_in_channels=[24, 48, 64], decoder_in_channels=[64, 64, 64],
            encoder_hidden_dim=64, d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=128,
            decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4, hidden_expansion=0.5,
            num_queries=20, num_denoising=20, num_labels=CLASSES, freeze_backbone_batch_norms=False,
        )
    )  # fmt: skip


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "retinanet": retinanet,
    "faster_rcnn": faster_rcnn,
    "rt_detr": rt_detr,
    "yolos": yolos,
}
TRANSFORMERS = ("rt_detr", "yolos")


# ------------------------------------------------------------------------------------------------ training


def train(name: str, steps: int, batch_size: int, learning_rate: float, seed: int = 0) -> Detector:
    """The network behind its adapter, trained for ``steps`` on scenes that never repeat."""
    torch.manual_seed(seed)
    detector = as_detector(NETWORKS[name]()).train()
    first_label = 1 if name == "faster_rcnn" else 0
    optimizer = torch.optim.AdamW(detector.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    source, start = scenes(False, seed=0), time.perf_counter()
    for step in range(steps):
        rows = [next(source) for _ in range(batch_size)]
        images = (torch.stack([image for image, _ in rows]).float() / 255 - MEAN) / STD
        targets = [Boxes(found.boxes / SIZE, found.scores, found.labels + first_label) for _, found in rows]
        loss = (_own_loss if name in TRANSFORMERS else _adapters_loss)(detector, images, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"{name} step {step + 1} loss {loss.item():.3f} {time.perf_counter() - start:.0f} s", flush=True)
    return detector.eval()


def _adapters_loss(detector: Detector, images: Tensor, targets: list[Boxes]) -> Tensor:
    return detector.loss(detector(images), targets)


def _own_loss(detector: Detector, images: Tensor, targets: list[Boxes]) -> Tensor:
    """Of a detection transformer trained from nothing: one query a box, by the Hungarian method."""
    labels = [
        {"class_labels": found.labels, "boxes": box_convert(found.boxes, "xyxy", "cxcywh").to(images)}
        for found in targets
    ]
    return detector.network(pixel_values=images, labels=labels).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scenes", "train"))
    parser.add_argument("--out", type=Path, required=True, help="folder of scenes, or file of weights (.safetensors)")
    parser.add_argument("--count", type=int, default=200, help="held-out scenes; a quarter as many training scenes")
    parser.add_argument("--network", choices=NETWORKS, default="retinanet")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    if options.what == "scenes":
        write_scenes(options.out, "val", options.count, True)
        write_scenes(options.out, "train", options.count // 4, False)
    else:
        detector = train(options.network, options.steps, options.batch, options.rate)
        state = detector.network.state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, options.out)


if __name__ == "__main__":
    main()
