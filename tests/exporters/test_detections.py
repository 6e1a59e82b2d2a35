"""Detectors as ONNX: raw outputs by their names, and boxes with the suppression of doubles in the graph."""

import json
from functools import partial

import pytest
import torch
from tiny_detectors import (
    Cells,
    DecodeOnly,
    cell_teacher,
    family_teacher,
    transformers_teacher,
    two_stages,
    with_masks,
)

from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.hooks import given_choices
from dfq.losses._box_overlap import pairwise_iou
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme
from dfq.student import Student
from dfq.teacher import Teacher

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from dfq.exporters import _runtime  # noqa: E402
from dfq.exporters.onnx_qdq import OnnxQDQ, session_options  # noqa: E402
from dfq.exporters.pt2 import PT2  # noqa: E402


def quantized(teacher: Teacher, count=6, **scheme):
    student = Student.from_teacher(teacher, Scheme(**scheme))
    images = teacher.example(count)
    calibrate(student, images, MinMax(), MinMax())
    return student.freeze(), images


def found_by(path, student, images):
    session = _runtime.session(path.read_bytes(), session_options(student))
    return dict(zip([output.name for output in session.get_outputs()], _runtime.run(session, images), strict=True))


FAMILIES = {
    "retinanet": ["cls_logits", "bbox_regression", "anchors"],
    "fcos": ["cls_logits", "bbox_regression", "bbox_ctrness", "anchors"],
    "ssd": ["bbox_regression", "cls_logits", "anchors"],
}


@pytest.mark.slow  # half a minute each; tests/test_detection_pipeline.py exports small ones
@pytest.mark.parametrize("name", FAMILIES)
def test_raw_outputs_of_families_keep_their_names(name, tmp_path):
    teacher = family_teacher(name)
    student, images = quantized(teacher, 3)
    made = OnnxQDQ(latency=False).export(student, tmp_path / "a.onnx", teacher, images)
    outputs = found_by(tmp_path / "a.onnx", student, images)
    assert set(outputs) == set(FAMILIES[name])
    with torch.no_grad():
        wanted = student(images)
    for key, values in wanted.items():
        assert outputs[key].shape == values.shape
        assert (outputs[key] - values).norm() < 0.02 * values.norm() + 1e-6, key
    assert made["parity"]["relative_error"] < 0.02 and made["parity"]["num_integer_initializers"] > 0


@pytest.mark.parametrize("decode", [pytest.param(False, marks=pytest.mark.slow), True])  # 20 seconds each
def test_a_transformer_that_finds_boxes_as_a_file(decode, tmp_path):
    teacher = transformers_teacher("detr", size=32)
    student, images = quantized(teacher)
    made = OnnxQDQ(latency=False, decode=decode).export(student, tmp_path / "a.onnx", None, images)
    outputs = found_by(tmp_path / "a.onnx", student, images)
    if decode:
        assert set(outputs) == {"boxes", "scores", "labels", "image"} and len(outputs["boxes"]) > 0
        assert made["parity"]["box_agreement"] > 0.95
        return
    assert set(outputs) == {"logits", "pred_boxes"} and made["parity"]["relative_error"] < 0.02
    with torch.no_grad():
        wanted = student(images)
    for key, values in wanted.items():
        assert (outputs[key] - values).norm() < 0.02 * values.norm(), key


@pytest.mark.parametrize(
    "make, overlap, policy",
    [
        (two_stages, 0.7, "all"),
        pytest.param(two_stages, 0.02, "all", marks=pytest.mark.slow),  # eight seconds each, as the first
        pytest.param(two_stages, 0.7, "hardware", marks=pytest.mark.slow),
        pytest.param(with_masks, 0.7, "all", marks=pytest.mark.slow),
    ],
    ids=["many proposals", "few proposals", "hardware", "masks"],
)
def test_two_stages_as_a_file(make, overlap, policy, tmp_path):
    """Each part on what the parts before it gave: the student's own choice may differ where two are as good."""
    teacher = make()
    teacher.module.network.rpn.nms_thresh = overlap
    student, images = quantized(teacher, policy=policy)
    made = OnnxQDQ(latency=False).export(student, tmp_path / "a.onnx", None, images)
    outputs = found_by(tmp_path / "a.onnx", student, images)
    module = student.module
    with torch.no_grad():
        wanted = student(images)
        assert list(outputs) == list(wanted)
        for key in ("objectness", "deltas", "anchors"):
            assert (outputs[key] - wanted[key]).norm() < 0.02 * wanted[key].norm() + 1e-6, key
        levels = [8 * 8 * 3, 4 * 4 * 3]
        unit = torch.full((4,), 32.0)
        chosen = module._proposals(outputs["objectness"], outputs["deltas"], outputs["anchors"], levels, unit)
        assert (outputs["proposals"] - chosen / unit).abs().max() < 1e-5
        with given_choices(module, {"chosen": outputs["proposals"] * unit}):
            again = student(images)
        for key in ("class_logits", "box_deltas"):
            assert (outputs[key] - again[key]).norm() < 0.02 * again[key].norm(), key
    filled = (outputs["proposals"] == torch.tensor([0.0, 0, 1, 1])).all(-1).sum(1)
    assert (filled > 50).all() if overlap < 0.1 else (filled < 5).all()
    assert made["parity"]["box_agreement"] > 0.95 and made["parity"]["batch_sizes"] == [1, 5]
    assert made["parity"]["openvino"] is None or "error" not in made["parity"]["openvino"]


def test_proposals_by_an_operator_of_dfq_are_no_program_for_torch_alone(tmp_path):
    student, images = quantized(two_stages(), 2)
    with pytest.raises(UserError) as error:
        PT2().export(student, tmp_path / "a.pt2", None, images)
    assert "best_apart, an operation of dfq" in str(error.value) and "exporter=onnx_qdq" in str(error.value)
    assert not list(tmp_path.iterdir())


class Weighed(Cells):
    """As examples/fastestdet.py: its decode chooses by scores of its own."""

    def scores(self, found):
        classes = found.class_logits.softmax(-1)
        best = classes.amax(-1, keepdim=True)
        return (found.objectness.sigmoid()[..., None] ** 0.6 * best**0.4) * (classes == best)

    def decode(self, raw, image_sizes):
        found = self.candidates(raw)
        return [self.suppress(*row) for row in zip(found.boxes, self.scores(found), image_sizes, strict=True)]


@pytest.mark.parametrize("make", [cell_teacher, partial(cell_teacher, Weighed), two_stages])
def test_boxes_in_the_graph_are_those_that_decode_gives(make, tmp_path):
    teacher = make()
    student, images = quantized(teacher)
    beside = teacher if make is cell_teacher else None  # exported too where it is given
    made = OnnxQDQ(latency=False, decode=True).export(student, tmp_path / "a.onnx", beside, images)
    found = found_by(tmp_path / "a.onnx", student, images)
    assert list(found) == ["boxes", "scores", "labels", "image"]
    assert found["boxes"].shape == (len(found["image"]), 4) and found["labels"].dtype == torch.int64
    assert made["parity"]["box_agreement"] > 0.95 and made["parity"]["relative_error"] < 0.02
    assert json.loads((tmp_path / "a.onnx.json").read_text())["exporter"]["decode"] is True
    module = student.module
    with torch.no_grad():
        wanted = module.decode(module(images), [(32, 32)] * len(images))
    for index, row in enumerate(wanted):
        mine = found["image"] == index
        for box, score, label in list(zip(*row, strict=True))[:3]:  # in whatever order, those of nearly equal scores
            same = mine & (found["labels"] == label)
            overlaps = pairwise_iou(box[None], found["boxes"][same])[0]
            assert float(overlaps.max()) > 0.9, (index, box)
            assert abs(float(found["scores"][same][overlaps.argmax()] - score)) < 0.03
        for label in found["labels"][mine].unique():
            boxes = found["boxes"][mine & (found["labels"] == label)]
            repeats = pairwise_iou(boxes, boxes).fill_diagonal_(0)
            assert float(repeats.max()) <= module.overlap + 1e-3, "doubles are suppressed"
    alone = found_by(tmp_path / "a.onnx", student, images[:1])
    assert set(alone["image"].tolist()) == {0}


def test_who_decodes_otherwise_is_told(tmp_path):
    student, images = quantized(cell_teacher(DecodeOnly))
    with pytest.raises(UserError) as error:
        OnnxQDQ(latency=False, decode=True).export(student, tmp_path / "a.onnx", None, images)
    assert str(error.value).startswith("got exporter.decode=true and the adapter tiny_detectors.DecodeOnly, which")
    assert "allowed: exporter.decode=false" in str(error.value) and not list(tmp_path.iterdir())
