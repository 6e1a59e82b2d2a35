"""Detector: a network that finds boxes, behind three functions.

::

    raw(images)               tensors, differentiable: what is distilled, stored and exported
    decode(raw, image_sizes)  boxes in pixels, scores and labels, image by image
    loss(raw, targets)        how far from the wanted boxes, a scalar; what images are pulled by

``raw`` and ``decode`` suffice, with ``num_classes``. One more makes both and the distillation better:
``candidates(raw)``, the boxes and class logits of all places where the detector may see something, before any
threshold. With it ``num_classes``, ``decode`` and ``loss`` are there already, and students are compared place by place
instead of by their raw numbers alone.

A ``loss`` that is derived from ``decode`` alone can only pull what is decoded: let it give faint boxes too, down to
``least_score``. An image in which it finds nothing stays as it is.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from dfq.errors import UserError
from dfq.hooks import tensors_in
from dfq.losses._box_overlap import area, pairwise_iou
from dfq.losses.set_prediction import set_prediction_loss
from dfq.progress import say

MOST_BEFORE_SUPPRESSION = 1000  # best (place, class) pairs of an image
# What torchvision and transformers call the gaps between COCO's category ids, and torchvision the id before the first;
# its detectors of one sigmoid a class (RetinaNet, FCOS) have an output for that one as well, and no use for it.
NO_OBJECT = ("N/A", "__background__")


class Boxes(NamedTuple):
    """What is found, or wanted, in one image: boxes [n, 4] xyxy, scores [n], labels [n]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def with_area(self) -> Boxes:
        """Without the empty ones: what lay outside the image, or was moved out of it. Losses divide by their sides."""
        there = area(self.boxes) > 0
        return Boxes(*(part[there] for part in self))


@dataclass
class Candidates:
    """What a detector says of each of A places of N images, differentiable.

    Attributes:
        boxes: [N, A, 4] xyxy, fractions of the image's width and height.
        class_logits: [N, A, K].
        objectness: [N, A] logits, where something else than the classes says whether there is anything.
        exclusive: classes exclude each other (softmax); otherwise each has a sigmoid of its own.
        background: the class that says "nothing"; None: there is none.
        are_fixed: place a of one network is place a of another; otherwise they are found again by their boxes.
        class_boxes: [N, A, K, 4], where each class has a box of its own; ``boxes`` is then that of the best class.
    """

    boxes: Tensor
    class_logits: Tensor
    objectness: Tensor | None = None
    exclusive: bool = False
    background: int | None = None
    are_fixed: bool = True
    class_boxes: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return self.class_logits.shape[-1]

    @property
    def scores(self) -> Tensor:
        """Probabilities [N, A, K] of an object of each class; that of no object is set to zero."""
        scores = self.class_logits.softmax(-1) if self.exclusive else self.class_logits.sigmoid()
        if self.objectness is not None:
            scores = scores * self.objectness.sigmoid()[..., None]
        if self.background is not None:
            is_object = torch.ones(self.num_classes, dtype=scores.dtype, device=scores.device)
            is_object[self.background] = 0
            scores = scores * is_object
        return scores

    def beside(self, other: Candidates) -> Candidates:
        """In the places of ``other``: each box of ``other`` with the one here that overlaps it most, for its class."""
        if self.are_fixed:
            return self
        nearest = pairwise_iou(other.boxes.detach(), self.boxes.detach()).argmax(-1)  # [N, A of other]

        def take(values: Tensor) -> Tensor:
            return values.gather(
                1, nearest.view(*nearest.shape, *[1] * (values.dim() - 2)).expand(*nearest.shape, *values.shape[2:])
            )

        boxes = take(self.boxes)
        if self.class_boxes is not None:
            best = other.scores.argmax(-1)[..., None, None]
            boxes = take(self.class_boxes).gather(2, best.expand(-1, -1, 1, 4)).squeeze(2)
        objectness = None if self.objectness is None else take(self.objectness)
        return Candidates(boxes, take(self.class_logits), objectness, self.exclusive, self.background, self.are_fixed)


class Detector(nn.Module):
    """An adapter. A sub-class writes ``raw`` (unless the network gives it), and ``candidates`` or ``decode``.

    Args:
        network: the network with its weights; images [N, C, H, W] come normalized, all of one size.

    Attributes:
        num_classes: labels are from 0 to one less; an adapter without ``candidates`` says it, others need not.
        decoded_size: (height, width) in pixels that ``decode`` is asked for where fractions of the image are wanted;
            dfq sets it to the size of the network's input, so that a ``decode`` that thinks in pixels (rounds, clamps
            to the last one, leaves out the smallest boxes) gives what it always gives.
        unused_labels: labels that the network was never trained on; no object gets one. See :func:`named_unused`.
        task_settings: of :class:`dfq.tasks.detection.Detection`, as far as they are not its own; dfq sets them, as the
            teacher's loader is told (``teacher.task_settings``).
    """

    num_classes: int | None = None
    decoded_size: tuple[float, float] = (1.0, 1.0)
    unused_labels: tuple[int, ...] = ()
    task_settings: Mapping[str, Any] = {}

    least_score: ClassVar[float] = 0.001  # of what decode gives
    overlap: float = 0.5  # from which the weaker of two boxes of a class is the same object
    most: int = 100  # boxes an image

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.raw(images)

    def raw(self, images: Tensor) -> Any:
        """A tensor, or a mapping of tensors, each with the sample as its first dimension; differentiable."""
        return self.network(images)

    def candidates(self, raw: Any) -> Candidates:
        """All places; see :class:`Candidates`."""
        raise NotImplementedError

    def stages(self, raw: Any) -> tuple[Candidates, ...]:
        """What a student is compared to its teacher on, stage by stage; one for detectors of one stage."""
        return (self.candidates(raw),)

    def scores(self, found: Candidates) -> Tensor:
        """[N, A, K] by which boxes are chosen, where that is another mixture of probabilities than ``found.scores``.

        A file with boxes in it is written for adapters with a ``decode`` of their own if they say this as well.
        """
        return found.scores

    @property
    def has_candidates(self) -> bool:
        return type(self).candidates is not Detector.candidates

    def decode(self, raw: Any, image_sizes: Sequence[tuple[float, float]]) -> list[Boxes]:
        """What is found in each image, best first, doubles suppressed.

        Args:
            image_sizes: (height, width) of each image as boxes are wanted; it was stretched to the network's input.
        """
        found = self.candidates(raw)
        rows = found.boxes if found.class_boxes is None else found.class_boxes
        return [
            self.suppress(boxes, scores, size)
            for boxes, scores, size in zip(rows, self.scores(found), image_sizes, strict=True)
        ]

    def detect(self, raw: Any, image_sizes: Sequence[tuple[float, float]]) -> list[Boxes]:
        """What ``decode`` gives, as :class:`Boxes`, best first: tuples in that order and torchvision's mappings are
        taken too; a UserError for what is neither."""
        found = self.decode(raw, image_sizes)
        if not isinstance(found, Sequence) or len(found) != len(image_sizes):
            got = f"{len(found)} entries" if isinstance(found, Sequence) else f"a {type(found).__name__}"
            raise self._wrong(f"{got} for {len(image_sizes)} images")
        return [self._checked(row) for row in found]

    def detect_normalized(self, raw: Any, num_images: int) -> list[Boxes]:
        """What :meth:`detect` gives, boxes in fractions of each image's width and height."""
        found = self.detect(raw, [self.decoded_size] * num_images)
        height, width = self.decoded_size
        return [row._replace(boxes=row.boxes / row.boxes.new_tensor([width, height, width, height])) for row in found]

    def _checked(self, row: Any) -> Boxes:
        if isinstance(row, Mapping):
            row = [row.get(name) for name in Boxes._fields]
        if not (isinstance(row, Sequence) and len(row) == 3 and all(isinstance(part, Tensor) for part in row)):
            raise self._wrong(f"a {type(row).__name__} that is not boxes, scores and labels")
        boxes, scores, labels = row
        count = len(scores) if scores.dim() == 1 else -1
        if boxes.shape != (count, 4) or labels.shape != (count,):
            raise self._wrong(f"boxes {list(boxes.shape)}, scores {list(scores.shape)}, labels {list(labels.shape)}")
        integers = not (labels.is_floating_point() or labels.dtype == torch.bool)
        if not (boxes.is_floating_point() and scores.is_floating_point() and integers):
            raise self._wrong(f"boxes of {boxes.dtype}, scores of {scores.dtype}, labels of {labels.dtype}")
        if count and int(labels.min()) < 0:
            raise self._wrong(f"a label of {int(labels.min())}")
        # One that counts from 1 would have boxes drawn and compared of other classes than it means.
        if count and not self.has_candidates and self.num_classes and int(labels.max()) >= self.num_classes:
            raise self._wrong(f"a label of {int(labels.max())} with num_classes={self.num_classes}")
        if bool((scores[1:] > scores[:-1]).any()):
            order = scores.detach().argsort(descending=True, stable=True)
            boxes, scores, labels = boxes[order], scores[order], labels[order]
        return Boxes(boxes, scores, labels.long())

    def _wrong(self, got: str) -> UserError:
        return UserError(
            f"got {got} from the decode() of {type(self).__name__}",
            "for each image dfq.Boxes: boxes [n, 4], scores [n] in floating point, labels [n], integers from 0",
        )

    def loss(self, raw: Any, targets: Sequence[Boxes]) -> Tensor:
        """Mean over images of :func:`set_prediction_loss`: of the candidates, or of what ``decode`` gives.

        Args:
            targets: wanted boxes, in fractions of the image's width and height.
        """
        if self.has_candidates:
            found = self.candidates(raw)
            losses = [set_prediction_loss(found.boxes, found.scores, *_columns(targets))]
        else:
            losses, rows = [], self.detect_normalized(raw, len(targets))
            self._check_faint(raw, rows, targets)
            if _has_no_way_back(raw, rows):
                raise UserError(
                    f"got boxes without a gradient from the decode() of {type(self).__name__}",
                    "scores and boxes computed from raw by differentiable operations (suppression may choose rows)",
                    "leave .detach(), no_grad and numpy out of decode, or write loss(raw, targets)",
                )
            for row, wanted in zip(rows, targets, strict=True):
                labels = torch.cat([row.labels, wanted.labels])
                columns = int(labels.max()) + 1 if len(labels) else 1
                certain = nn.functional.one_hot(row.labels, columns).to(row.scores)
                scores = certain * row.scores[:, None]
                losses.append(set_prediction_loss(row.boxes[None], scores[None], *_columns([wanted])))
        return torch.cat(losses).mean()

    def _check_faint(self, raw: Any, rows: Sequence[Boxes], targets: Sequence[Boxes]) -> None:
        """Where nothing is decoded, no box can be pulled: said once, a UserError if it is so in all images."""
        found = [len(row.scores) > 0 for row, wanted in zip(rows, targets, strict=True) if len(wanted.labels)]
        if all(found) or not _wants_gradient(raw):
            return
        name, do = type(self).__name__, "lower the threshold in decode, or write loss(raw, targets) or candidates(raw)"
        if not any(found):
            raise UserError(
                f"got no box at all from the decode() of {name}, so that nothing can be pulled to the wanted ones",
                f"faint boxes too, down to a score of {self.least_score}",
                do,
            )
        _say_once(f"{name}: decode() finds nothing in some images, where nothing is pulled to the wanted boxes; {do}")

    def suppress(self, boxes: Tensor, scores: Tensor, image_size: tuple[float, float]) -> Boxes:
        """The best of ``boxes`` [A, 4] (or [A, K, 4], one a class) in fractions, ``scores`` [A, K], of one image."""
        best, places = scores.flatten().topk(min(MOST_BEFORE_SUPPRESSION, scores.numel()))
        kept = best > self.least_score
        best, places = best[kept], places[kept]
        row, labels = places // scores.shape[-1], places % scores.shape[-1]
        height, width = image_size
        limits = boxes.new_tensor([width, height, width, height])
        chosen = (boxes[row] if boxes.dim() == 2 else boxes[row, labels]).clamp(0, 1) * limits
        chosen, best, labels = Boxes(chosen, best, labels).with_area()
        order = batched_nms(chosen.detach().float(), best.detach().float(), labels, self.overlap)[: self.most]
        return Boxes(chosen[order], best[order], labels[order])


def named_unused(names: Sequence[str] | Mapping[int, str]) -> tuple[int, ...]:
    """The labels whose names say that no object has them; see :data:`NO_OBJECT`."""
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names)
    return tuple(label for label, name in pairs if name in NO_OBJECT)


def adapter_record(network: nn.Module, settings: Collection[str] | None = None) -> dict[str, Any]:
    """What decides a network's outputs beside its weights: of a :class:`Detector` its adapter, of others nothing.

    Args:
        settings: of its task, those that decide what is recorded; None: all.

    Returns:
        ``{"adapter": {"name": ..., "sha256": ..., "task": ...}}``: the class, a hash of the files that it and the
        classes it derives from are written in, and the settings of its task that are not the usual ones. Adapters that
        come with dfq have no hash: their version says what they are.
    """
    if not isinstance(network, Detector):
        return {}
    kind = type(network)
    record: dict[str, Any] = {"name": f"{kind.__module__}.{kind.__qualname__}"}
    brought = ("dfq", "torch", "builtins")
    written = [_source(k) for k in kind.__mro__ if k.__module__.partition(".")[0] not in brought]
    if written:
        record["sha256"] = hashlib.sha256(b"\0".join(dict.fromkeys(written))).hexdigest()
    task = {k: v for k, v in network.task_settings.items() if settings is None or k in settings}
    if task:
        record["task"] = task
    return {"adapter": record}


@cache  # as it was when the class was first seen: the file may be edited while a run goes on with the old class
def _source(kind: type) -> bytes:
    """The file that ``kind`` is written in; where there is none, as in a notebook, the class's functions alone."""
    try:
        return Path(inspect.getfile(kind)).read_bytes()
    except (TypeError, OSError):
        return b"\0".join(_text(f).encode() for f in vars(kind).values() if isinstance(f, FunctionType))


def _text(function: FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except OSError:  # typed into an interpreter
        code = function.__code__
        return repr((code.co_code, code.co_names, [value for value in code.co_consts if not inspect.iscode(value)]))


def _columns(targets: Sequence[Boxes]) -> tuple[list[Tensor], list[Tensor]]:
    return [wanted.boxes for wanted in targets], [wanted.labels for wanted in targets]


def _has_no_way_back(raw: Any, rows: Sequence[Boxes]) -> bool:
    """Whether ``raw`` wants a gradient and boxes that were decoded from it have none."""
    found = [row for row in rows if len(row.scores)]
    parts = [part for row in found for part in (row.boxes, row.scores)]
    return _wants_gradient(raw) and bool(found) and not any(part.requires_grad for part in parts)


def _wants_gradient(raw: Any) -> bool:
    return torch.is_grad_enabled() and any(values.requires_grad for values in tensors_in(raw))


@cache
def _say_once(text: str) -> None:
    """A loss is asked for in every step."""
    say(text)
