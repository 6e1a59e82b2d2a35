"""Box sampling: images that hold objects where boxes were drawn, for detectors of any kind.

After DIODE (Chawla et al., "Data-free Knowledge Distillation for Object Detection", WACV 2021) and the adaptive labels
of task-specific zero-shot quantization (ICCV 2025, arXiv 2507.16782), from their formulas alone::

    images = argmin  bn_loss(images) + task_weight * detector_loss(images, labels)
                     + variation_weight * total_variation(images)

in two stages. At low resolution labels are drawn (boxes, sizes and classes), and ``rounds`` times on the way the
teacher is asked what it sees: a label that it does not see is removed, what it sees beside the labels is added. At full
resolution, from the images so far, labels are frozen and the statistics lead (below). The loss is the detector's own,
or the one derived from what it decodes (:mod:`dfq.detectors._base`). Boxes, labels and the teacher's scores of them are
stored with the images.

Thresholds are what the teacher sees in noise, in the best score of each image of it: a label stays if the teacher sees
more in its place than in half of these images, and a detection is believed if it is surer than in nearly all of them
(``certainty``). It is added if it is as sure besides as the teacher typically is of the labels that it believes.

Where a network has no batch norm, the entropy of patch similarities takes its place (:mod:`dfq.generators.psaq`), or
nothing where there is no attention either.

Differences from the papers: several boxes from the start, of sizes whose logarithm is uniform, and none upon another;
thresholds come from the teacher's scores and are not fixed at 0.2; a class gets no more than ``balance`` times its
share of boxes; the full resolution goes on from the low one rather than from noise; deviations and not variances, and
every term is a mean over boxes, channels, layers or pixels, so that the weights serve any resolution and batch (the
papers' L_task grows with the batch, their norms with channels and pixels).

What is moved at low resolution is not the pixels, which ends in colored noise, but waves in gray and opponent colors
(:mod:`dfq.generators._canvas`); and images are shown mirrored and moved a little in every step, boxes with them, so
that what the teacher sees in a place is more than an accident of single pixels. Objects are there then. At full
resolution it is pixels under a weak blur, shown as they are, with a small weight of the task: an object that the
teacher has begun to see, it sees better still as the statistics of its layers come right, and those are what a student
is calibrated on. Images are legal in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.detectors._base import Boxes
from dfq.generators._attention import has_attention, negative_entropies
from dfq.generators._base import Generator
from dfq.generators._canvas import Canvas, Pixels, photograph_noise
from dfq.generators._filters import (
    diverse_noise,
    gaussian_blur,
    photograph_blur,
    shift_reflecting,
    total_variation,
    white_noise,
)
from dfq.generators._needs import check_needs
from dfq.generators._optimization import cosine, finish, optimize, picture_statistics
from dfq.generators._precision import Precision
from dfq.generators._statistics import batch_norm_distances
from dfq.losses._box_overlap import area, pairwise_iou
from dfq.progress import Advance
from dfq.settings import Bound, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from dfq.tasks._task import task_of
from dfq.teacher import InputSpec, Teacher

Share = Annotated[float, Bound(above=0, at_most=1)]
APART = 0.35  # overlap below which two boxes are of two objects
CROWDED = 0.2  # overlap with an earlier box above which another place is drawn
SMALLEST, LARGEST = 0.01, 0.85  # share of the image that an added box covers
STRIDE = 32  # what sides are a multiple of at low resolution
LEAST = 64  # and at least: on a grid of one or two places a detector sees objects elsewhere than at full resolution
TRIES = 10  # places drawn for a box
NOISE = 16  # images of white noise, and of noise with the spectrum of photographs, that scores are calibrated on

NO_SIDE = 1e-6  # fraction of an image: less is none in float32


@dataclass(frozen=True)
class BoxSampling(Generator):
    """Gradient descent on the pixels of one batch at a time, toward boxes of its own."""

    batch_size: PositiveInt | Literal["auto"] = 32  # samples made together; auto: as many as memory_bytes allow
    iterations: PositiveInt = 60  # steps at low resolution
    final_iterations: PositiveInt = 40  # steps at full resolution
    resolution: Share = 0.5  # sides at low resolution, of the network's input; 64 pixels at least
    learning_rate: PositiveFloat = 0.15  # first step of Adam, in units of the deviation of pictures
    task_weight: NonNegativeFloat = 0.3  # weight of the detector's own loss; the mean over batch norms has 1
    final_task_weight: NonNegativeFloat = 0.01  # the same at full resolution
    variation_weight: NonNegativeFloat = 0.05  # weight of the mean difference of neighbors, at low resolution
    contrast: PositiveFloat = 0.7  # deviation of the noise to start from, in units of that of pictures
    most_boxes: PositiveInt = 4  # in an image; how many is drawn
    smallest_box: Share = 0.15  # side of a square box of the smallest area, as a share of the image's
    largest_box: Share = 0.7  # and of the largest
    rounds: NonNegativeInt = 3  # times that labels are compared with what the teacher sees
    certainty: Fraction = 0.95  # of images of noise in which the teacher sees nothing that is believed; at least 0.5
    balance: PositiveFloat = 2.0  # boxes of a class at most, as a multiple of its share
    blur: NonNegativeFloat | None = None  # deviation in pixels of a blur in every step; null: at full resolution 0.8
    flip: bool = True  # show images and boxes mirrored left to right in half of the steps at low resolution
    shift: NonNegativeInt = 4  # show them moved by up to so many pixels in every step there
    clip: bool = True  # keep pixels between black and white
    low_pass: NonNegativeFloat = 0.0  # cutoff of a filter on the finished images, in cycles per pixel; 0: none
    precision: Precision = "float32"  # of the network while images are made; auto: the faster one, measured, is kept
    needs_boxes: ClassVar[bool] = True

    def prepare(self, teacher: Teacher, rng: torch.Generator) -> Prepared:
        check_needs(teacher, self, "box_sampling", "draws some")
        spec, task = teacher.input_spec, task_of(teacher)
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        shape = (NOISE, *spec.size)
        noise = _shown(torch.cat([white_noise(shape, rng), diverse_noise(shape, rng)]), spec)
        best = []
        with torch.no_grad():
            for images in noise.to(teacher.device).clamp(*spec.limits(teacher.device)).split(4):
                outputs = task.raw_outputs(teacher, images)
                found = task.objects(task.normalized_detections(outputs))
                best += [float(row.scores.max()) if len(row.scores) else 0.0 for row in found]
            labels = task.labels(outputs)
        plausible, believed = torch.tensor(best).quantile(torch.tensor([0.5, max(0.5, self.certainty)])).tolist()
        return Prepared(self, plausible, believed, labels)

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Any:
        """A batch with thresholds of its own, for callers that do not prepare."""
        return self.prepare(teacher, rng).sample(teacher, num_samples, rng, advance)


@dataclass(frozen=True)
class Prepared:
    """What all batches share: the score from which a detection is believed, and the labels that there are."""

    settings: BoxSampling
    plausible: float
    believed: float
    labels: list[int]

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> dict[str, Any]:
        """Images [N, C, H, W] and lists, an entry an image, of boxes in pixels, labels and the teacher's scores."""
        s, spec = self.settings, teacher.input_spec
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        wanted = draw_boxes(num_samples, self.labels, s, rng)
        wanted = placed(wanted, teacher.device)
        small, total = low_size(teacher, spec, s.resolution), s.iterations + s.final_iterations
        noise = s.contrast * photograph_noise((num_samples, spec.size[0], *small), rng).to(teacher.device)
        waves = Canvas(noise, spec, s.clip)
        descent = _Descent(s, teacher, waves, s.blur or 0.0, s.iterations, rng, advance, s.iterations / total)
        for step, end in pairwise([0, *looks(s.iterations, s.rounds), s.iterations]):
            descent.run(end - step, wanted)
            if end < s.iterations:
                limits = (self.plausible, self.believed, s.most_boxes, self._most(wanted))
                found = placed(descent.detections(), "cpu")  # boxes are looked at one after the other
                wanted = placed(relabel(placed(wanted, "cpu"), found, *limits), teacher.device)
        pixels = Pixels(F.interpolate(waves.start(), spec.size[1:], mode="bilinear"), spec, s.clip)
        blur = photograph_blur(spec.size[1:]) if s.blur is None else s.blur
        s = replace(s, task_weight=s.final_task_weight, variation_weight=0.0, flip=False, shift=0)
        descent = _Descent(s, teacher, pixels, blur, s.final_iterations, rng, advance, s.final_iterations / total)
        descent.run(s.final_iterations, wanted)
        images = finish(descent.images(), spec, s.low_pass, s.clip)
        task, (height, width) = task_of(teacher), spec.size[1:]
        with torch.no_grad():
            outputs = task.raw_outputs(teacher, images)
        found = task.normalized_detections(outputs)
        unit = torch.tensor([width, height, width, height])
        return {
            "images": images,
            "boxes": [row.boxes.cpu() * unit for row in wanted],
            "labels": [row.labels.cpu() for row in wanted],
            "scores": [seen_score(row, seen).cpu() for row, seen in zip(wanted, found, strict=True)],
        }

    def _most(self, wanted: list[Boxes]) -> int:
        """Boxes of a class in the batch."""
        share = sum(len(row.labels) for row in wanted) / len(self.labels)
        return max(1, round(self.settings.balance * share))


class _Descent:
    """Adam on what images are made of, at one resolution."""

    def __init__(
        self,
        settings: BoxSampling,
        teacher: Teacher,
        canvas: Canvas | Pixels,
        blur: float,
        iterations: int,
        rng: torch.Generator,
        advance: Advance,
        share: float,
    ):
        self.s, self.teacher, self.task, self.rng = settings, teacher, task_of(teacher), rng
        self.advance, self.iterations, self.share = advance, iterations, share
        self.canvas = canvas
        self.schedule = cosine(torch.optim.Adam([canvas.coefficients], settings.learning_rate, (0.5, 0.9)), iterations)
        self.blur = gaussian_blur(canvas.size, blur, teacher.device)
        self.shift = min(settings.shift, min(self.canvas.size) - 1)

    def images(self) -> Tensor:
        return self.blur(self.canvas())

    def run(self, steps: int, wanted: list[Boxes]) -> None:
        shown, corners = wanted, corners_of(wanted)

        def make() -> Tensor:
            nonlocal shown
            images, shown = moved(self.images(), wanted, self.s.flip, self.shift, self.rng, corners)
            return images

        def penalty(images: Tensor, outputs: Any) -> Tensor:
            outputs = self.task.raw_outputs(lambda _: outputs, images)
            own = self.task.synthesis_loss(outputs, shown) if self.s.task_weight else images.new_zeros(())
            if not self.s.variation_weight:
                return self.s.task_weight * own
            variation = total_variation(images / self.canvas.std)
            return self.s.task_weight * own + self.s.variation_weight * variation

        if steps:
            optimize(
                self.teacher,
                _measured(self.teacher, len(wanted)),
                make,
                [self.schedule],
                steps,
                lambda amount, note="": self.advance(amount * self.share * steps / self.iterations),
                penalty=penalty,
                after_step=self.canvas.settle,
                precision=self.s.precision,
            )

    @torch.no_grad()
    def detections(self) -> list[Boxes]:
        found = self.task.normalized_detections(self.task.raw_outputs(self.teacher, self.images()))
        return self.task.objects(found)


def placed(rows: list[Boxes], device: torch.device | str) -> list[Boxes]:
    """On ``device``, in one copy of each part and not in one an image."""
    together = [torch.cat(parts).to(device).split([len(part) for part in parts]) for parts in zip(*rows, strict=True)]
    return [Boxes(*parts) for parts in zip(*together, strict=True)]


Corners = list[list[list[float]]]  # x1, y1, x2, y2 in fractions, of each box of each image


def corners_of(rows: list[Boxes]) -> Corners:
    return [row.boxes.tolist() for row in rows]


def moved(
    images: Tensor, wanted: list[Boxes], flip: bool, shift: int, rng: torch.Generator, corners: Corners | None = None
) -> tuple[Tensor, list[Boxes]]:
    """Images and boxes (in fractions) mirrored in half of the cases and moved by up to ``shift`` pixels, all alike.

    Boxes are cut off at the image's edges; those that were moved out of it are left out.

    Args:
        corners: :func:`corners_of` ``wanted``, read before: what is asked of the device in each step is waited for.
    """
    mirrored = flip and bool(torch.rand((), generator=rng) < 0.5)
    down, right = torch.randint(-shift, shift + 1, (2,), generator=rng).tolist()
    height, width = images.shape[-2:]
    boxes = torch.cat([row.boxes for row in wanted])  # of all images at once
    if mirrored:
        boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], -1)
    boxes = (boxes + images.new_tensor([right / width, down / height] * 2)).clamp(0, 1)
    parts = boxes.split([len(row.boxes) for row in wanted])
    shown = [row._replace(boxes=part) for row, part in zip(wanted, parts, strict=True)]
    for i, row in enumerate(corners_of(wanted) if corners is None else corners):
        there = [k for k, box in enumerate(row) if _is_inside(box, mirrored, right / width, down / height)]
        if len(there) < len(row):
            shown[i] = Boxes(*(part[there] for part in shown[i]))
    images = images.flip(-1) if mirrored else images
    return shift_reflecting(shift_reflecting(images, down, -2), right, -1), shown


def _is_inside(box: list[float], mirrored: bool, right: float, down: float) -> bool:
    """Whether anything of ``box`` is left in the image when it is moved by fractions of it."""
    x1, y1, x2, y2 = box
    x1, x2 = (1 - x2, 1 - x1) if mirrored else (x1, x2)
    sides = ((x1 + right, x2 + right), (y1 + down, y2 + down))
    return all(min(high, 1.0) - max(low, 0.0) > NO_SIDE for low, high in sides)


@contextmanager
def _measured(teacher: Teacher, num_samples: int) -> Iterator[list[Tensor]]:
    """What images are matched to: batch norms, or patch similarities, or nothing."""
    if teacher.batch_norms:
        with batch_norm_distances(teacher) as found:
            yield found
    elif has_attention(teacher):
        with negative_entropies(num_samples) as found:
            yield found
    else:
        yield []


def _shown(pixels: Tensor, spec: InputSpec) -> Tensor:
    mean, std = (values.view(-1, 1, 1).to(pixels.device) for values in picture_statistics(spec))
    return pixels * std + mean


@torch.no_grad()
def low_size(teacher: Teacher, spec: InputSpec, resolution: float) -> tuple[int, int]:
    """Height and width at low resolution; the full ones where the network takes no other."""
    low = tuple(min(side, max(LEAST, round(side * resolution / STRIDE) * STRIDE)) for side in spec.size[1:])
    task = task_of(teacher)
    try:
        outputs = task.raw_outputs(teacher, torch.zeros(1, spec.size[0], *low, device=teacher.device))
        task.normalized_detections(outputs)
    except Exception:  # whatever a forward, or an adapter of fixed places, raises on a size that it does not take
        return spec.size[1], spec.size[2]
    return low[0], low[1]


# ------------------------------------------------------------------------------------------------ labels


def draw_boxes(num_samples: int, labels: list[int], settings: BoxSampling, rng: torch.Generator) -> list[Boxes]:
    """Boxes in fractions of each image, inside it and apart from each other; classes come equally often, but for one.

    An image is asked for 1 to ``most_boxes``; those for which no free place is drawn are left out.
    """
    s = settings
    counts = torch.randint(1, s.most_boxes + 1, (num_samples,), generator=rng)
    draws = torch.rand(num_samples, s.most_boxes, TRIES, 4, generator=rng)
    smallest, largest = min(s.smallest_box, s.largest_box), max(s.smallest_box, s.largest_box)
    side = smallest * (largest / smallest) ** draws[..., 0]
    stretch = 2 ** (draws[..., 1] - 0.5)  # the root of an aspect from 1/2 to 2
    size = torch.stack([side * stretch, side / stretch], -1).clamp(max=0.95)
    corner = draws[..., 2:] * (1 - size)
    places = torch.cat([corner, corner + size], -1)  # [N, most, TRIES, 4]
    chosen: list[Tensor] = []
    for count, tries in zip(counts.tolist(), places, strict=True):
        rows: list[Tensor] = []
        for options in tries[:count]:
            rows += [box for box in options if most_overlap(box, rows) < CROWDED][:1]
        chosen.append(torch.stack(rows))
    total = sum(map(len, chosen))
    order = [torch.randperm(len(labels), generator=rng) for _ in range(-(-total // len(labels)))]
    names = torch.tensor(labels)[torch.cat(order)[:total]]
    parts = names.split([len(rows) for rows in chosen])
    return [Boxes(boxes, torch.zeros(len(boxes)), name) for boxes, name in zip(chosen, parts, strict=True)]


def most_overlap(box: Tensor, others: list[Tensor]) -> float:
    return float(pairwise_iou(box[None], torch.stack(others)).max()) if others else 0.0


def looks(iterations: int, rounds: int) -> list[int]:
    """After how many steps labels are compared: in the second half, when objects have had time to appear."""
    return [iterations - (iterations - iterations // 2) * (rounds - i) // rounds for i in range(rounds)]


def relabel(
    wanted: list[Boxes],
    found: list[Boxes],
    plausible: float,
    believed: float,
    most_boxes: int,
    most_of_class: int,
) -> list[Boxes]:
    """Labels that the teacher sees, and what it sees beside them, cut off at the image's edges.

    Args:
        wanted, found: labels and detections of each image, boxes in fractions of it.
        plausible: the score from which a label stays.
        believed: the score from which a detection is one.
        most_boxes: of an image; more are not added.
        most_of_class: of a class in the batch; more are not added.
    """
    scores = [seen_score(row, seen) for row, seen in zip(wanted, found, strict=True)]
    sure = torch.cat(scores)
    sure = sure[(sure > 0) & (sure >= believed)]
    adding = max(believed, float(sure.median())) if len(sure) else believed
    counts: dict[int, int] = {}
    # What nobody sees goes, also where the teacher sees nothing in noise, so that any score is plausible.
    kept = [(score > 0) & (score >= plausible) for score in scores]
    for row, stays in zip(wanted, kept, strict=True):
        for label in row.labels[stays].tolist():
            counts[label] = counts.get(label, 0) + 1
    result = []
    for row, score, stays, seen in zip(wanted, scores, kept, found, strict=True):
        boxes, labels = list(row.boxes[stays]), row.labels[stays].tolist()
        least = adding if boxes else believed  # an image without any is not as choosy
        inside = seen.boxes.clamp(0, 1)
        for box, certainty, label in zip(inside, seen.scores.tolist(), seen.labels.tolist(), strict=True):
            if certainty < least or len(boxes) >= most_boxes or counts.get(label, 0) >= most_of_class:
                continue
            if SMALLEST < float(area(box)) < LARGEST and most_overlap(box, boxes) < APART:
                boxes.append(box)
                labels.append(label)
                counts[label] = counts.get(label, 0) + 1
                least = adding
        if not boxes:  # an image has an object at least
            boxes, labels = [row.boxes[score.argmax()]], [int(row.labels[score.argmax()])]
        result.append(Boxes(torch.stack(boxes), row.scores.new_zeros(len(boxes)), row.labels.new_tensor(labels)))
    return result


def seen_score(wanted: Boxes, found: Boxes) -> Tensor:
    """For each label [n] the best score of a detection of its class upon it; 0 where there is none."""
    if not len(found.boxes):
        return wanted.boxes.new_zeros(len(wanted.boxes))
    same = (wanted.labels[:, None] == found.labels) & (pairwise_iou(wanted.boxes, found.boxes) >= APART)
    return (same * found.scores).amax(1)
