"""Detectors as ONNX: raw outputs by their names, and boxes with the suppression of doubles in the graph."""

import json

import pytest
import torch
from tiny_detectors import Cells, DecodeOnly, cell_teacher, family_teacher, transformers_teacher

from dfq.calibration import calibrate
from dfq.errors import UserError
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


def quantized(teacher: Teacher, count=6):
    student = Student.from_teacher(teacher, Scheme())
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
    made = OnnxQDQ(latency=False, decode=decode).export(student, tmp_path / "a.onnx", teacher, images)
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


def test_what_chooses_proposals_as_it_runs_is_refused(tmp_path):
    student, images = quantized(family_teacher("faster_rcnn"), 2)
    with pytest.raises(UserError, match="can't translate"):
        OnnxQDQ(latency=False).export(student, tmp_path / "a.onnx", None, images)
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


@pytest.mark.parametrize("adapter", [Cells, Weighed])
def test_boxes_in_the_graph_are_those_that_decode_gives(adapter, tmp_path):
    teacher = cell_teacher(adapter)
    student, images = quantized(teacher)
    made = OnnxQDQ(latency=False, decode=True).export(student, tmp_path / "a.onnx", teacher, images)
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
