"""Detection: outputs are raw tensors that the network's adapter (:class:`dfq.detectors._base.Detector`) reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from dfq.detectors._base import Boxes, Candidates, Detector
from dfq.errors import UserError
from dfq.losses._box_overlap import in_full, pairwise_iou
from dfq.losses.anchor_divergence import anchor_divergence
from dfq.losses.box_distance import box_distance
from dfq.losses.distillation import relative_mse
from dfq.losses.set_prediction import match
from dfq.settings import Fraction, NonNegativeFloat
from dfq.tasks._backend import coco_backend
from dfq.tasks._outputs import changed

SAME = 0.5  # overlap from which two boxes of a class are one object


@dataclass(frozen=True)
class Detection:
    """What a detector's outputs mean. The one place that knows, once it is told the network (:meth:`of`)."""

    box_weight: NonNegativeFloat = 1.0  # of the boxes beside the divergence of what is said of them
    least_score: Fraction = 0.25  # of the teacher's detections that are kept as labels of images
    most_bytes: ClassVar[int] = 2**22  # of raw outputs a sample in a dataset; larger ones are made again when needed
    detector: Any = None  # reads raw outputs; a student's are read by its teacher's

    def of(self, module: nn.Module, input_size: tuple[float, float] | None = None) -> Detection:
        """The task for the outputs of ``module``, which takes images of ``input_size`` (height, width)."""
        if not isinstance(module, Detector):
            raise UserError(
                f"got a {type(module).__name__} for task=detection",
                "a network behind an adapter, a class derived from dfq.Detector",
                "give teacher.adapter=package.module:Adapter",
            )
        known = module.num_classes
        if not module.has_candidates and not (isinstance(known, int) and known > 0):
            raise UserError(
                f"got num_classes={known} of the adapter {type(module).__name__}, which has no candidates",
                "num_classes = the number of labels that decode gives, a whole number >= 1",
                "write it in the class, or candidates(raw), which says it",
            )
        if input_size is not None:
            module.decoded_size = input_size
        return replace(self, detector=module, **module.task_settings)

    def raw_outputs(self, model: Callable[[Tensor], Any], images: Tensor) -> Any:
        """A tensor, or a mapping of tensors, as the adapter's ``raw`` gives them; differentiable.

        In float32 where it gives half precision: boxes are decoded in pixels and divergences added up over all places.
        """
        outputs = model(images)
        tensors = list(outputs.values()) if isinstance(outputs, Mapping) else [outputs]
        if not tensors or not all(isinstance(t, Tensor) and t.dim() > 1 and len(t) == len(images) for t in tensors):
            shapes = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tensors]
            raise UserError(
                f"got {', '.join(map(str, shapes)) or 'nothing'} from the raw() of {type(self.detector).__name__} for "
                f"{len(images)} images",
                "a tensor, or a mapping of tensors, each [N, ...] with N the number of images",
            )
        return changed(outputs, in_full) if any(in_full(t) is not t for t in tensors) else outputs

    @property
    def device(self) -> torch.device:
        """Where outputs are decoded: an adapter may have tensors of its own, such as its anchors."""
        return next(chain(self.detector.parameters(), self.detector.buffers()), torch.empty(0)).device

    def num_outputs(self, outputs: Any) -> int:
        """Classes, that of no object among them."""
        if self.detector.has_candidates:
            return self.detector.candidates(outputs).num_classes
        return self.detector.num_classes

    def labels(self, outputs: Any) -> list[int]:
        """The labels that objects can have."""
        background = self.detector.candidates(outputs).background if self.detector.has_candidates else None
        count = self.num_outputs(outputs)
        others = {*self.detector.unused_labels} | (set() if background is None else {background % count})
        return [label for label in range(count) if label not in others]

    # -- what images are made of -------------------------------------------------------------------------------------

    def synthesis_loss(self, outputs: Any, targets: Sequence[Boxes]) -> Tensor:
        """The detector's own loss toward boxes in fractions of the image."""
        if isinstance(targets, Tensor):
            raise _no_classes()
        return self.detector.loss(outputs, targets)

    def synthesis_targets(self, num_samples: int, num_classes: int, rng: torch.Generator, smoothing: float) -> Tensor:
        raise _no_classes()

    def detections(self, outputs: Any, image_sizes: Sequence[tuple[float, float]]) -> list[Boxes]:
        """What is found in each image, best first, without a gradient."""
        with torch.no_grad():
            return _detached(self.detector.detect(outputs, image_sizes))

    def normalized_detections(self, outputs: Any) -> list[Boxes]:
        """The same with boxes in fractions of each image's width and height."""
        with torch.no_grad():
            return _detached(self.detector.detect_normalized(outputs, _num_images(outputs)))

    def objects(self, rows: Sequence[Boxes]) -> list[Boxes]:
        """Without what has one of the adapter's ``unused_labels``, which no object gets whatever the network sees."""
        if not self.detector.unused_labels:
            return list(rows)
        kept = []
        for row in rows:
            unused = torch.isin(row.labels, row.labels.new_tensor(self.detector.unused_labels))
            kept.append(Boxes(*(part[~unused] for part in row)))
        return kept

    def annotate(self, outputs: Any, image_size: tuple[int, int]) -> dict[str, list[Tensor]]:
        """Labels of images by what was found in them: boxes in pixels, labels, scores, one of each an image.

        Boxes are cut off at the image's edges, as annotations are.
        """
        found = self.objects(self.detections(outputs, [image_size] * _num_images(outputs)))
        sure = [Boxes(*(part[row.scores >= self.least_score] for part in row)) for row in found]
        sure = [row._replace(boxes=clip_boxes_to_image(row.boxes, image_size)).with_area() for row in sure]
        return {name: [getattr(row, name).cpu() for row in sure] for name in ("boxes", "labels", "scores")}

    @property
    def compares_boxes(self) -> bool:
        """Whether boxes of student and teacher are compared place by place: only candidates tell places."""
        return self.detector.has_candidates

    # -- student beside teacher --------------------------------------------------------------------------------------

    def distillation_terms(self, student: Any, teacher: Any) -> dict[str, Tensor]:
        """``kl``: what is said of each place; ``box``: where it is said to be. Means over stages.

        An adapter without candidates has ``kl`` alone, the relative error of its raw tensors.
        """
        if not self.compares_boxes:
            pairs = [(student[name], teacher[name]) for name in teacher] if isinstance(teacher, Mapping) else None
            errors = [relative_mse(s, t) for s, t in pairs or [(student, teacher)] if t.is_floating_point()]
            if not errors:
                raise UserError(
                    f"got integers alone from the raw() of {type(self.detector).__name__}, which has no candidates",
                    "a tensor in floating point among them, by which student and teacher are compared",
                    "let raw(images) give what the network computes, and decode make integers of it",
                )
            return {"kl": torch.stack(errors).mean(), "box": torch.zeros((), device=errors[0].device)}
        terms: dict[str, list[Tensor]] = {"kl": [], "box": []}
        stages = zip(self.detector.stages(student), self.detector.stages(teacher), strict=True)
        for mine, theirs in stages:
            mine, confidence = mine.beside(theirs), theirs.scores.detach().amax(-1)
            terms["kl"].append(_divergence(mine, theirs, confidence))
            terms["box"].append(box_distance(mine.boxes, theirs.boxes, confidence))
        return {name: torch.stack(found).mean() for name, found in terms.items()}

    def distillation_loss(self, student: Any, teacher: Any) -> Tensor:
        """KL(teacher || student) an object, in nats, plus ``box_weight`` times the distance of boxes."""
        terms = self.distillation_terms(student, teacher)
        return terms["kl"] + self.box_weight * terms["box"]

    def agreement(self, student: Any, teacher: Any) -> Tensor:
        """2 sum min(s, t) / (sum s + sum t): scores of boxes that both find (the smaller one), and of all boxes.

        1 where both find the same, 0 where nothing is found by both; images in which neither finds anything agree.
        """
        found = []
        pairs = zip(self.normalized_detections(student), self.normalized_detections(teacher), strict=True)
        for mine, theirs in pairs:
            total = float(mine.scores.sum() + theirs.scores.sum())
            found.append(2 * float(shared_score(mine, theirs)) / total if total > 0 else 1.0)
        return torch.tensor(found).mean()

    def class_logits(self, outputs: Any) -> Tensor:
        """[N, A, K]: what a class can be drawn from."""
        if not self.detector.has_candidates:
            raise UserError(
                f"got an adapter {type(self.detector).__name__} without class logits, and an algorithm that "
                "draws labels from them (yaqa, algorithm.sensitivity)",
                "another algorithm, algorithm.sensitivity=false, or an adapter with candidates(raw)",
            )
        return self.detector.candidates(outputs).class_logits

    def metrics(self, num_classes: int) -> BoxMetrics:
        """map and map_50, as fractions."""
        return BoxMetrics(self)


def _num_images(outputs: Any) -> int:
    return len(next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs)


def _detached(rows: Sequence[Boxes]) -> list[Boxes]:
    return [Boxes(*(part.detach() for part in row)) for row in rows]


def _no_classes() -> UserError:
    return UserError(
        "got a generator that pulls each image to one class, and a detector, whose images hold boxes",
        "generator=box_sampling | generator.class_weight=0",
    )


def _divergence(student: Candidates, teacher: Candidates, confidence: Tensor) -> Tensor:
    return anchor_divergence(
        student.class_logits,
        teacher.class_logits,
        confidence,
        teacher.exclusive,
        student.objectness,
        teacher.objectness,
    )


def shared_score(mine: Boxes, theirs: Boxes) -> Tensor:
    """Sum over boxes that both found (same label, overlap of :data:`SAME` at least) of the smaller score."""
    same = (mine.labels[:, None] == theirs.labels) & (pairwise_iou(mine.boxes, theirs.boxes) >= SAME)
    smaller = torch.minimum(mine.scores[:, None], theirs.scores)
    if not bool(same.any()):
        return smaller.new_zeros(())
    ((rows,), (columns,), (is_pair,)) = match(torch.where(same, -smaller, torch.inf)[None])
    return (smaller[rows, columns] * is_pair).sum()


class BoxMetrics:
    """COCO's mean average precision; updated with raw outputs and wanted boxes.

    Wanted is a mapping an image: ``boxes`` [n, 4] xyxy in pixels, ``labels`` [n], ``iscrowd`` [n], ``size`` (height,
    width) of what was stretched to the network's input, in pixels.
    """

    def __init__(self, task: Detection):
        from torchmetrics.detection import MeanAveragePrecision

        self.task = task
        # Rank 0 alone evaluates.
        self.metric = MeanAveragePrecision(backend=coco_backend(), sync_on_compute=False)  # type: ignore[arg-type]
        self.metric.warn_on_many_detections = False

    def update(self, outputs: Any, targets: Sequence[Mapping[str, Any]]) -> None:
        found = [Boxes(*map(Tensor.cpu, row)) for row in self.task.detections(outputs, [t["size"] for t in targets])]
        wanted = [{name: target[name] for name in ("boxes", "labels", "iscrowd")} for target in targets]
        self.metric.update([row._asdict() for row in found], wanted)

    def compute(self) -> dict[str, Tensor]:
        with redirect_stdout(StringIO()):  # pycocotools tells what it does
            found = self.metric.compute()
        return {name: found[name].clamp(min=0) for name in ("map", "map_50")}
