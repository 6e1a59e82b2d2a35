"""A detector's file that gives boxes: scores and boxes of all places, then the suppression of doubles as ONNX nodes.

::

    network ── candidates ── boxes [N, A, 4], scores [N, K, A] ── NonMaxSuppression ── [M, 3] ── Gather ── boxes [M, 4],
                                                                                          scores, labels, image [M]

ONNX has one NonMaxSuppression for all images and classes; each class of an image gives up to ``most`` rows, so that
there may be more of them than the detector's ``decode`` gives, which keeps as many an image. Where each class has a box
of its own, boxes are [N, K, A, 4], and each class of an image is an image to NonMaxSuppression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfq.detectors._base import Boxes, Detector
from dfq.errors import UserError
from dfq.exporters._artifact import Comparison, batches_of
from dfq.exporters._integer import Flat
from dfq.exporters._runtime import run, session
from dfq.hooks import evaluation_mode
from dfq.student import Student
from dfq.teacher import AnyInputSpec, Teacher

PLACES = ("all_boxes", "all_scores")
FOUND = ("boxes", "scores", "labels", "image")


def decodable(student: Student) -> Detector:
    """The student's adapter; a UserError unless what it finds follows from its candidates and their scores."""
    detector = student.module
    if not isinstance(detector, Detector):
        raise UserError("got exporter.decode=true and a network that is no detector", "exporter.decode=false")
    kind = type(detector)
    own_decode = kind.decode is not Detector.decode and kind.scores is Detector.scores
    if not detector.has_candidates or own_decode:
        raise UserError(
            f"got exporter.decode=true and the adapter {kind.__module__}.{kind.__name__}, which "
            "decodes in a way of its own, image by image, as no graph does",
            "exporter.decode=false, which exports raw outputs; or an adapter with candidates(raw), and with "
            "scores(candidates) where its own decode chooses by others",
        )
    return detector


class Places(Flat):
    """A detector that gives boxes in fractions of the image, [N, A, 4] or [N, K, A, 4], and scores [N, K, A] of all its
    places."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        detector: Any = self.network
        found = detector.candidates(detector(inputs))
        scores = detector.scores(found).mT
        boxes = (found.boxes if found.class_boxes is None else found.class_boxes.transpose(1, 2)).clamp(0, 1)
        there = (boxes[..., 2:] > boxes[..., :2]).all(-1)  # what lies outside has no area left
        return boxes.contiguous(), (scores * (there if boxes.dim() == 4 else there[:, None])).contiguous()


def places_of(network: Student | Teacher) -> Callable[[Tensor], Any]:
    """:class:`Places` of a network on its device, whatever device its images come on."""
    places = Places(network.module)

    def found(images: Tensor) -> Any:
        with evaluation_mode(network.module):
            return places(images.to(network.device, copy=True))

    return found


def kept(detector: Detector, places: list[Tensor]) -> list[Boxes]:
    """What is found among the outputs of :class:`Places`, in fractions of the image."""
    boxes, scores = places
    boxes = boxes.transpose(1, 2) if boxes.dim() == 4 else boxes
    return [detector.suppress(*row, (1.0, 1.0)) for row in zip(boxes, scores.mT, strict=True)]


def append_suppression(model: Any, detector: nn.Module, spec: AnyInputSpec) -> None:
    """Let an onnx.ModelProto that gives :data:`PLACES` give :data:`FOUND`."""
    from onnx import TensorProto, helper, numpy_helper

    assert isinstance(detector, Detector)
    graph, (boxes, scores) = model.graph, PLACES
    height, width = spec.size[1:]

    def constant(name: str, value: Tensor) -> str:
        graph.initializer.append(numpy_helper.from_array(value.numpy(), f"suppress_{name}"))
        return f"suppress_{name}"

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        graph.node.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    first = constant("first", torch.tensor(0))
    own = len(graph.output[0].type.tensor_type.shape.dim) == 4  # boxes of each class
    if own:
        classes, places = (dim.dim_value for dim in graph.output[1].type.tensor_type.shape.dim[1:])
        shapes = constant("of_boxes", torch.tensor([-1, places, 4])), constant("alone", torch.tensor([-1, 1, places]))
        boxes = add("Reshape", [boxes, shapes[0]], "suppress_boxes")
        scores = add("Reshape", [scores, shapes[1]], "suppress_scores")
    limits = [
        constant("most", torch.tensor([detector.most])),
        constant("overlap", torch.tensor([detector.overlap])),
        constant("least_score", torch.tensor([detector.least_score])),
    ]
    chosen = add("NonMaxSuppression", [boxes, scores, *limits], "suppress_chosen")  # [M, 3]: image, class, place
    rows = add("Gather", [chosen, constant("place", torch.tensor([0, 2]))], "suppress_rows", axis=1)
    fractions = add("GatherND", [boxes, rows], "suppress_fractions")
    unit = constant("unit", torch.tensor([width, height, width, height], dtype=torch.float32))
    add("Mul", [fractions, unit], "boxes")
    add("GatherND", [scores, chosen], "scores")
    if own:
        image = add("Gather", [chosen, first], "suppress_image", axis=1)
        count = constant("classes", torch.tensor(classes))
        add("Mod", [image, count], "labels")
        add("Div", [image, count], "image")
    else:
        add("Gather", [chosen, constant("second", torch.tensor(1))], "labels", axis=1)
        add("Gather", [chosen, first], "image", axis=1)
    del graph.output[:]
    for name in FOUND:
        kind = TensorProto.FLOAT if name in ("boxes", "scores") else TensorProto.INT64
        graph.output.append(helper.make_tensor_value_info(name, kind, ["M", 4] if name == "boxes" else ["M"]))


@torch.no_grad()
def box_agreement(student: Student, content: bytes, images: Tensor, options: Mapping[str, str]) -> float:
    """2 sum min(s, t) / (sum s + sum t) over the best boxes that the file and ``decode`` find; see Detection.agreement.

    The best ``most`` of either: a ``decode`` of an adapter's own may keep more.
    """
    detector, (height, width) = decodable(student), student.input_spec.size[1:]
    opened, compared = session(content, options), Comparison()
    for batch in batches_of(images):
        boxes, scores, labels, image = run(opened, batch)
        wanted = detector.detect(student(batch), [(height, width)] * len(batch))
        for index, theirs in enumerate(wanted):
            mine = image == index
            order = scores[mine].argsort(descending=True)[: detector.most]
            row = Boxes(boxes[mine][order], scores[mine][order], labels[mine][order])
            compared.add_boxes(row, Boxes(*(part[: detector.most].cpu() for part in theirs)))
    return compared.agreement
