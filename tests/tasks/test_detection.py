"""The task of detectors: what raw outputs mean, the teacher's boxes beside the student's, COCO's measure."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import CLASSES, SPEC, Cells, DecodeOnly, cell_teacher, cells, two_stages
from torch import nn

import dfq
from dfq.detectors._base import Boxes, Candidates, Detector, _say_once, adapter_record
from dfq.errors import UserError
from dfq.evaluation import Coco, measure
from dfq.hooks import tensors_in
from dfq.losses._box_overlap import iou
from dfq.settings import resolve
from dfq.tasks._outputs import changed
from dfq.tasks._task import task_of
from dfq.tasks.detection import shared_score
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._detector import as_detector, thaw_norms

ROOT = Path(__file__).parents[2]


def boxes(*rows):
    """Rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].long())


@pytest.mark.parametrize("adapter", [Cells, DecodeOnly])
def test_a_detector_is_read_by_its_adapter(adapter):
    teacher = cell_teacher(adapter)
    task, images = task_of(teacher), teacher.example(3).requires_grad_()
    outputs = task.raw_outputs(teacher, images)
    assert task.num_outputs(outputs) == CLASSES and task.labels(outputs) == list(range(CLASSES))
    found = task.detections(outputs, [(32, 32), (64, 64), (32, 64)])
    for row in found:
        assert row.boxes.shape == (len(row.scores), 4) and not row.boxes.requires_grad
        assert (row.scores[:-1] >= row.scores[1:]).all() and 0 <= int(row.labels.min()) <= int(
            row.labels.max()
        ) < CLASSES
    assert float(found[1].boxes.max()) > 32, "boxes are in pixels of the image they are asked for"
    targets = [boxes([0.1, 0.1, 0.6, 0.5, 1, 2]), boxes([0.5, 0.4, 0.9, 0.9, 1, 0]), boxes()]
    task.synthesis_loss(outputs, targets).backward()
    assert torch.isfinite(images.grad).all() and float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize("adapter", [Cells, DecodeOnly])
def test_distillation_falls_to_zero_where_both_say_the_same(adapter):
    teacher = cell_teacher(adapter)
    task, images = task_of(teacher), teacher.example(4)
    with torch.no_grad():
        outputs, other = task.raw_outputs(teacher, images), task.raw_outputs(teacher, images + 0.5)
    assert float(task.distillation_loss(outputs, outputs)) == pytest.approx(0, abs=1e-5)
    assert float(task.distillation_loss(other, outputs)) > 1e-3
    assert float(task.agreement(outputs, outputs)) == pytest.approx(1) and float(task.agreement(other, outputs)) < 1


def test_descent_on_the_loss_puts_boxes_where_they_are_wanted():
    teacher = cell_teacher()
    task, targets = task_of(teacher), [boxes([0.1, 0.2, 0.5, 0.7, 1, 3])]
    raw = teacher(teacher.example(1)).clone().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        task.synthesis_loss(raw, targets).backward()
        optimizer.step()
    found = task.detections(raw, [(1.0, 1.0)])[0]
    assert int(found.labels[0]) == 3 and float(found.scores[0]) > 0.8
    assert float(iou(found.boxes[0], targets[0].boxes[0])) > 0.7  # a cell reaches so far and no farther
    assert not len(found.scores) > 1 or float(found.scores[1]) < 0.4


def test_decode_suppresses_doubles_and_scales():
    logits = torch.tensor([[[3.0, -9.0], [2.0, -9.0], [-9.0, 1.0], [-20.0, -20.0]]])
    places = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [0.1, 0.12, 0.5, 0.5], [0.1, 0.1, 0.5, 0.5], [0, 0, 1, 1]]])

    class Fixed(Detector):
        def candidates(self, raw):
            return Candidates(places, logits)

    (found,) = Fixed(nn.Identity()).decode(None, [(10, 20)])
    assert found.labels.tolist() == [0, 1], "the same place as another class stays, the double and the faint go"
    torch.testing.assert_close(found.boxes[0], torch.tensor([2.0, 1.0, 10.0, 5.0]))
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 1.0]).sigmoid())


def test_scores_leave_out_the_class_of_nothing():
    logits = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    for background in (0, -1, 3):
        found = Candidates(torch.zeros(1, 5, 4), logits, None, True, background).scores
        wanted = logits.softmax(-1)
        wanted[..., background] = 0
        torch.testing.assert_close(found, wanted)


def test_places_that_are_not_fixed_are_paired_by_their_boxes():
    corners = torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([corners[..., :2] * 0.5, 0.5 + corners[..., 2:] * 0.5], -1)
    logits, order = torch.arange(14.0).view(2, 7, 1), torch.tensor([3, 1, 0, 6, 5, 2, 4])
    theirs = Candidates(rows, logits, are_fixed=False)
    mine = Candidates(rows[:, order], logits[:, order], logits[:, order, 0], are_fixed=False).beside(theirs)
    assert torch.equal(mine.class_logits, logits) and torch.equal(mine.boxes, rows)
    assert torch.equal(mine.objectness, logits[..., 0])


def test_agreement_counts_scores_of_what_both_find():
    theirs = boxes([0, 0, 1, 1, 0.8, 1], [2, 2, 3, 3, 0.5, 0])
    mine = boxes([0, 0, 1, 1, 0.6, 1], [2, 2, 3, 3, 0.9, 2], [0, 0, 1, 0.9, 0.4, 1])
    assert float(shared_score(mine, theirs)) == pytest.approx(0.6)
    assert float(shared_score(boxes(), theirs)) == 0 and float(shared_score(mine, boxes())) == 0


# ------------------------------------------------------------------------------------------------ adapters


class Neither(Detector):
    pass


@pytest.mark.parametrize(
    "adapter, message",
    [
        (None, "got a Sequential for task=detection, a network of none of the families detr, fcos, rcnn, retinanet, "
         "ssd, ultralytics; allowed: teacher.adapter=package.module:Adapter; derive a class from dfq.Detector; "
         "examples/fastestdet.py is one"),
        ("conftest:residual", "got teacher.adapter=conftest:residual, which is no adapter; "
         "allowed: a class derived from dfq.Detector"),
        ("tiny_detectors:Cell", "got teacher.adapter=tiny_detectors:Cell, and tiny_detectors has no Cell; "
         "did you mean 'Cells'?"),
        ("no_such_module:Cell", "got teacher.adapter=no_such_module:Cell, whose module can't be imported "
         "(No module named 'no_such_module'); put its folder on PYTHONPATH or install its package"),
        ("os:system", "got teacher.adapter=os:system; allowed: package.module:Adapter of your own"),
        (Neither, "got teacher.adapter=Neither without candidates and without decode; "
         "allowed: one of the two, or both"),
    ],
)  # fmt: skip
def test_wrong_adapters_are_told(adapter, message):
    with pytest.raises(UserError) as error:
        as_detector(cells(), adapter)
    assert str(error.value) == message


def test_a_network_without_adapter_and_strange_outputs_are_told():
    with pytest.raises(UserError, match=r"got a Sequential for task=detection; allowed: a network behind an adapter"):
        task_of(Teacher(cells(), "detection", SPEC))
    teacher = cell_teacher()
    with pytest.raises(UserError, match=r"got \[1, 9\] from the raw\(\) of Cells for 2 images; allowed: a tensor"):
        task_of(teacher).raw_outputs(lambda images: torch.zeros(1, 9), teacher.example(2))
    with pytest.raises(UserError, match=r"got a generator that pulls each image to one class, and a detector"):
        task_of(teacher).synthesis_targets(4, 4, torch.Generator(), 0.0)


@pytest.mark.parametrize("known", [None, 0, "four"])
def test_an_adapter_that_only_decodes_says_how_many_classes_there_are(known):
    Unsaid = type("Unsaid", (DecodeOnly,), {"num_classes": known})
    with pytest.raises(UserError) as error:
        task_of(cell_teacher(Unsaid))
    assert str(error.value) == (
        f"got num_classes={known} of the adapter Unsaid, which has no candidates; allowed: num_classes = the number of "
        "labels that decode gives, a whole number >= 1; write it in the class, or candidates(raw), which says it"
    )
    assert Detector.num_classes is None and Cells.num_classes is None
    teacher = cell_teacher()  # whose candidates say it
    assert task_of(teacher).num_outputs(teacher(teacher.example(1))) == CLASSES


def decoding(change):
    """An adapter whose decode gives what ``change`` makes of boxes, scores and labels."""

    class Changed(DecodeOnly):
        def decode(self, raw, image_sizes):
            return [change(*row) for row in super().decode(raw, image_sizes)]

    return cell_teacher(Changed)


FORMS = {
    "tuples": lambda boxes, scores, labels: (boxes, scores, labels),
    "torchvision's": lambda boxes, scores, labels: {"labels": labels, "boxes": boxes, "scores": scores},
    "worst first": lambda boxes, scores, labels: Boxes(boxes.flip(0), scores.flip(0), labels.flip(0).int()),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_decode_gives_is_taken_in_other_forms(form):
    teacher, changed = cell_teacher(DecodeOnly), decoding(FORMS[form])
    images = teacher.example(2)
    targets = [Boxes(torch.tensor([[0.1, 0.1, 0.5, 0.6]]), torch.ones(1), torch.tensor([1]))] * 2
    found = [task_of(t).detections(t(images), [(32, 32)] * 2) for t in (teacher, changed)]
    for mine, theirs in zip(*found, strict=True):
        assert isinstance(theirs, Boxes) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    losses = [task_of(t).synthesis_loss(t(images), targets) for t in (teacher, changed)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("adapter", [Cells, DecodeOnly])
def test_raw_outputs_in_half_precision_are_read_in_full(adapter):
    """Of 2,000 pixels bfloat16 knows every eighth."""
    teacher = cell_teacher(adapter)
    task, images = task_of(teacher), teacher.example(2)
    half = changed(teacher(images), torch.Tensor.bfloat16)
    found = task.raw_outputs(lambda _: half, images)
    assert {values.dtype for values in tensors_in(found)} == {torch.float32}
    rows = task.detections(found, [(2000, 1000)] * 2)
    for mine, exact in zip(rows, task.detections(changed(half, torch.Tensor.float), [(2000, 1000)] * 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, exact, strict=True))
    whole = teacher(images)
    assert task.raw_outputs(lambda _: whole, images) is whole


WRONG = {
    "another order": (lambda b, s, k: Boxes(b, k, s), r"scores of torch\.int64, labels of torch\.float32"),
    "lengths": (lambda b, s, k: Boxes(b, s[:3], k), r"boxes \[20, 4\], scores \[3\], labels \[20\]"),
    "two of three": (lambda b, s, k: {"boxes": b, "labels": k}, "a list that is not boxes, scores and labels"),
    "one tensor": (lambda b, s, k: b, "a Tensor that is not boxes, scores and labels"),
    "no class": (lambda b, s, k: Boxes(b, s, k - 9), "a label of -"),
    "labels from 1": (lambda b, s, k: Boxes(b, s, k + 1), "a label of 4 with num_classes=4"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_decode_should_not_give_is_told(mistake):
    change, message = WRONG[mistake]
    teacher = decoding(change)
    with pytest.raises(UserError, match=rf"got .*{message}.* from the decode\(\) of Changed; allowed: for each image"):
        task_of(teacher).detections(teacher(teacher.example(2)), [(32, 32)] * 2)


def test_a_decode_for_another_number_of_images_is_told():
    teacher = cell_teacher(DecodeOnly)
    with pytest.raises(UserError, match=r"got 2 entries for 3 images from the decode\(\) of Few"):
        Few = type("Few", (DecodeOnly,), {"decode": lambda self, raw, sizes: [Boxes(*torch.zeros(3, 0))] * 2})
        task_of(cell_teacher(Few)).detections(teacher(teacher.example(3)), [(32, 32)] * 3)


def test_a_loss_of_boxes_without_a_gradient_is_told():
    teacher = decoding(lambda boxes, scores, labels: Boxes(boxes.detach(), scores.detach(), labels))
    targets = [Boxes(torch.tensor([[0.1, 0.1, 0.5, 0.6]]), torch.ones(1), torch.tensor([1]))] * 2
    images = teacher.example(2)
    assert torch.isfinite(task_of(teacher).synthesis_loss(teacher(images), targets)), "where none is wanted"
    with pytest.raises(UserError, match=r"got boxes without a gradient from the decode\(\) of Changed; allowed"):
        task_of(teacher).synthesis_loss(teacher(images.requires_grad_()), targets)


class Pixels(DecodeOnly):
    """Leaves out boxes of less than a pixel, and clamps to the last one, as decodes of one's own do."""

    def decode(self, raw, image_sizes):
        rows = []
        for (boxes, scores, labels), (height, width) in zip(super().decode(raw, image_sizes), image_sizes, strict=True):
            last = boxes.new_tensor([width - 1, height - 1] * 2)
            boxes = torch.minimum(boxes.clamp(min=0), last)
            kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(-1)
            rows.append(Boxes(boxes[kept], scores[kept], labels[kept]))
        return rows


def test_a_decode_is_asked_for_pixels_of_the_networks_input():
    asked = []

    class Watched(Pixels):
        def decode(self, raw, image_sizes):
            asked.extend(image_sizes)
            return super().decode(raw, image_sizes)

    teacher = cell_teacher(Watched)
    task, images = task_of(teacher), teacher.example(2)
    outputs = teacher(images)
    pixels, fractions = task.detections(outputs, [SPEC.size[1:]] * 2), task.normalized_detections(outputs)
    for mine, theirs in zip(pixels, fractions, strict=True):
        assert len(mine.boxes) and 0 <= float(theirs.boxes.min()) < float(theirs.boxes.max()) <= 31 / 32
        torch.testing.assert_close(theirs.boxes * 32, mine.boxes)
        assert torch.equal(mine.scores, theirs.scores)
    assert float(task.agreement(outputs, outputs)) == pytest.approx(1)
    assert torch.isfinite(task.synthesis_loss(outputs, fractions))
    assert set(asked) == {SPEC.size[1:]}


def thresholded(least):
    def sure(boxes, scores, labels):
        kept = scores >= least
        return Boxes(boxes[kept], scores[kept], labels[kept])

    return decoding(sure)


def test_a_loss_of_a_decode_that_finds_nothing_is_told(capsys):
    wanted = Boxes(torch.tensor([[0.1, 0.1, 0.5, 0.6]]), torch.ones(1), torch.tensor([1]))
    images = cell_teacher().example(4).requires_grad_()
    teacher = thresholded(1.1)
    task = task_of(teacher)
    with pytest.raises(UserError) as error:
        task.synthesis_loss(teacher(images), [wanted] * 4)
    assert str(error.value) == (
        "got no box at all from the decode() of Changed, so that nothing can be pulled to the wanted ones; "
        "allowed: faint boxes too, down to a score of 0.001; "
        "lower the threshold in decode, or write loss(raw, targets) or candidates(raw)"
    )
    assert torch.isfinite(task.synthesis_loss(teacher(images), [boxes()] * 4)), "none is wanted"
    assert torch.isfinite(task.synthesis_loss(teacher(images.detach()), [wanted] * 4)), "nothing is pulled"
    plain = cell_teacher(DecodeOnly)
    best = [float(row.scores[0]) for row in task_of(plain).normalized_detections(plain(images))]
    teacher = thresholded(sum(sorted(best)[1:3]) / 2)  # two images have a box
    _say_once.cache_clear()
    capsys.readouterr()
    for _ in range(2):
        task_of(teacher).synthesis_loss(teacher(images), [wanted] * 4).backward()
    assert capsys.readouterr().err.count("Changed: decode() finds nothing in some images") == 1
    assert (images.grad.flatten(1).abs().sum(1) > 0).sum() == 2


def test_annotations_lie_inside_their_image():
    far = torch.tensor([[-8.0, 4.0, 6.0, 40.0], [33.0, 2.0, 40.0, 9.0]])
    teacher = decoding(lambda b, s, k: Boxes(far, torch.tensor([0.9, 0.8]), torch.tensor([2, 3])))
    rows = task_of(teacher).annotate(teacher(teacher.example(2)), (32, 32))
    assert [row.tolist() for row in rows["boxes"]] == [[[0, 4, 6, 32]]] * 2, "the one outside is left out"
    assert [row.tolist() for row in rows["labels"]] == [[2]] * 2 and len(rows["scores"]) == 2


def test_what_nothing_was_trained_on_is_no_label_of_an_image_though_it_is_seen():
    found = Boxes(torch.tensor([[1.0, 4, 6, 9], [3, 2, 9, 9]]), torch.tensor([0.9, 0.8]), torch.tensor([2, 3]))
    teacher = decoding(lambda b, s, k: found)
    teacher.module.unused_labels = (0, 2)
    rows = task_of(teacher).annotate(teacher(teacher.example(1)), (32, 32))
    assert rows["labels"][0].tolist() == [3] and rows["boxes"][0].tolist() == [[3, 2, 9, 9]]


def test_raw_outputs_of_integers_alone_are_told():
    Integers = type("Integers", (DecodeOnly,), {"raw": lambda self, images: {"labels": images[:, 0].long()}})
    teacher = cell_teacher(Integers)
    outputs = teacher(teacher.example(2))
    with pytest.raises(UserError, match=r"got integers alone from the raw\(\) of Integers, which has no cand"):
        task_of(teacher).distillation_loss(outputs, outputs)


def test_load_teacher_takes_an_adapter(tmp_path, monkeypatch):
    (tmp_path / "my_detector.py").write_text("from tiny_detectors import Cells as Adapter, cells as build\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [1, 1, 1]}
    teacher = dfq.load_teacher(
        "factory", factory="my_detector:build", task="detection", adapter="my_detector:Adapter", **settings
    )
    assert isinstance(teacher.module, Cells) and teacher.task == "detection" and teacher.config["adapter"]
    again = dfq.load_teacher(
        cells(), task="detection", adapter=Cells, input_size=(3, 32, 32), mean=[0] * 3, std=[1] * 3
    )
    assert isinstance(again.module, Cells)
    with pytest.raises(UserError, match=r"got teacher.adapter=my_detector:Adapter and teacher.task=classification"):
        dfq.load_teacher(
            "factory", factory="my_detector:build", task="classification", adapter="my_detector:Adapter", **settings
        )


TASK_SETTINGS = {"least_score": 0.6, "box_weight": 2}
IMAGES = {"input_size": [3, 32, 32], "mean": [0, 0, 0], "std": [1, 1, 1]}


def test_settings_of_the_task_are_those_of_its_teacher(monkeypatch, tmp_path):
    (tmp_path / "my_cells.py").write_text("from tiny_detectors import Cells as Adapter, cells as build\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"factory": "my_cells:build", "task": "detection", "adapter": "my_cells:Adapter", **IMAGES}
    usual = dfq.load_teacher("factory", **named)
    teacher = dfq.load_teacher("factory", task_settings=TASK_SETTINGS, **named)
    in_memory = {"task": "detection", "adapter": Cells, **IMAGES}
    for found in (teacher, dfq.load_teacher(cells(), task_settings=TASK_SETTINGS, **in_memory)):
        assert (task_of(found).least_score, task_of(found).box_weight) == (0.6, 2.0)
    assert (task_of(usual).least_score, task_of(usual).box_weight) == (0.25, 1.0)
    assert teacher.config["task_settings"] == TASK_SETTINGS, "a student's folder rebuilds it with them"
    record, known = adapter_record(teacher.module)["adapter"], adapter_record(usual.module)["adapter"]
    assert record == known | {"task": {"least_score": 0.6, "box_weight": 2.0}}
    same = dfq.load_teacher("factory", task_settings={"least_score": 0.25}, **named)
    assert adapter_record(same.module)["adapter"] == known, "what was made before is found again"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"most": 3}, "got teacher.task_settings.most; allowed: teacher.task_settings.box_weight, "
         "teacher.task_settings.least_score"),
        ({"detector": None}, "got teacher.task_settings.detector; allowed: teacher.task_settings.box_weight, "),
        ({"least_score": 2}, "got teacher.task_settings.least_score=2; allowed: a number from 0 to 1"),
        (0.5, "got teacher.task_settings=0.5; allowed: a mapping of box_weight, least_score"),
    ],
)  # fmt: skip
def test_settings_that_the_task_does_not_have(given, message):
    with pytest.raises(UserError) as caught:
        dfq.load_teacher(cells(), "detection", adapter=Cells, task_settings=given, **IMAGES)
    assert str(caught.value).startswith(message)


def test_settings_of_a_detector_for_another_network():
    with pytest.raises(UserError, match=r"got task_settings=\{'least_score': 0.6, .* and task=classification"):
        dfq.load_teacher(cells(), "classification", task_settings=TASK_SETTINGS, **IMAGES)
    with pytest.raises(UserError, match=r"got teacher.task_settings=\{.* and teacher.name=resnet18, a classifier"):
        dfq.load_teacher("torchvision", name="resnet18", task_settings=TASK_SETTINGS)


def test_the_example_is_short_and_reads_its_network(monkeypatch):
    source = (ROOT / "examples" / "fastestdet.py").read_text()
    assert len(source.splitlines()) <= 40
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delitem(sys.modules, "examples.fastestdet", raising=False)
    from examples.fastestdet import Adapter

    detector = as_detector(nn.Conv2d(3, 5 + 80, 16, stride=16), Adapter)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    raw = detector(images)
    torch.testing.assert_close(raw, detector.network(images[:, [2, 1, 0]]))
    for row, everything in zip(detector.decode(raw, [(64, 96)] * 2), detector.candidates(raw).boxes, strict=True):
        assert 0 < len(row.boxes) <= len(everything) == 4 * 6
    np_raw = raw.detach().numpy()[0, :, 2, 3]  # one cell, by hand
    box = detector.candidates(raw).boxes[0, 2 * 6 + 3].detach().numpy()
    cx, cy = (np.tanh(np_raw[1]) + 3) / 6, (np.tanh(np_raw[2]) + 2) / 4
    w, h = 1 / (1 + np.exp(-np_raw[3:5]))
    np.testing.assert_allclose(box, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1e-5)


def test_frozen_batch_norms_become_ordinary_ones():
    from torchvision.ops import FrozenBatchNorm2d

    frozen = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4, eps=1e-3))
    rng = torch.Generator().manual_seed(0)
    for name, values in frozen[1].named_buffers():
        values.copy_(torch.rand(values.shape, generator=rng) + 0.1 * (name != "bias"))
    x = torch.randn(2, 3, 5, 5, generator=rng)
    wanted = frozen.eval()(x)
    thaw_norms(frozen)
    assert isinstance(frozen[1], nn.BatchNorm2d)
    torch.testing.assert_close(frozen.eval()(x), wanted)


# ------------------------------------------------------------------------------------------------ evaluation


def write_coco(folder, rows, size=(40, 60), ids=(7, 3)):
    """Images of noise, and boxes xywh: rows of (image, category id, box)."""
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": size[1], "height": size[0]} for i in range(3)],
        "categories": [{"id": i, "name": str(i)} for i in ids],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, (i, c, box) in enumerate(rows)
        ],
    }
    (folder / "boxes.json").write_text(json.dumps(content))
    return pixels


ROWS = [(0, 7, [6, 4, 24, 16]), (0, 3, [30, 20, 12, 12]), (2, 3, [0, 0, 60, 40])]


def test_coco_reads_boxes_labels_and_images(tmp_path):
    pixels = write_coco(tmp_path, ROWS)
    evaluation = Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json"), batch_size=2)
    (first, rows), (second, others) = evaluation.batches(SPEC)
    assert evaluation.num_samples == 3 and first.shape == (2, *SPEC.size) and second.shape == (1, *SPEC.size)
    assert rows[0]["labels"].tolist() == [1, 0] and others[0]["labels"].tolist() == [0]
    assert rows[0]["boxes"].tolist() == [[6, 4, 30, 20], [30, 20, 42, 32]] and rows[1]["boxes"].shape == (0, 4)
    assert rows[0]["size"] == (40.0, 60.0)
    by_id = Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json"), labels="id")
    assert next(iter(by_id.batches(SPEC)))[1][0]["labels"].tolist() == [7, 3]
    whole = next(iter(Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json"), fit="pad").batches(SPEC)))
    height, width = whole[1][0]["size"]
    assert (height, width) == pytest.approx((60, 60))  # the input is square, the image is not
    shown = SPEC.to_pixels(whole[0][0])
    assert torch.equal(shown[:, 21:], torch.tensor([128, 102, 76]).view(3, 1, 1).expand(3, 11, 32).to(torch.uint8))
    assert abs(float(shown[:, :21].float().mean()) - pixels[0].mean()) < 10
    reference = Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json"), str(tmp_path / "images"))
    assert reference.reference_images(SPEC, 2).shape == (2, *SPEC.size)


def test_a_detector_that_finds_everything_has_map_one(tmp_path):
    write_coco(tmp_path, ROWS)
    truth = {(0, 1): [6, 4, 30, 20], (0, 0): [30, 20, 42, 32], (2, 0): [0, 0, 60, 40]}

    class Oracle(Detector):
        num_classes = 2

        def decode(self, raw, image_sizes):
            found = []
            for number in raw[:, 0].long().tolist():
                rows = [(box, label) for (image, label), box in truth.items() if image == number]
                table = torch.tensor([box for box, _ in rows], dtype=torch.float32).view(-1, 4)
                found.append(Boxes(table, torch.ones(len(rows)), torch.tensor([k for _, k in rows], dtype=torch.int64)))
            return found

    network = Oracle(nn.Linear(1, 1))
    task = resolve("task", "detection").of(network)
    numbers = iter([torch.arange(2.0)[:, None], torch.tensor([[2.0]])] * 2)
    evaluation = Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json"), batch_size=2)
    batches = list(evaluation.batches(SPEC))
    assert measure(lambda images: next(numbers), task, batches, 3, "oracle") == pytest.approx({"map": 1, "map_50": 1})
    truth[(2, 0)] = [0, 0, 36, 40]  # overlap 0.6: right at 0.5, 0.55 and 0.6 only
    found = measure(lambda images: next(numbers), task, batches, 3, "oracle")
    assert found["map_50"] == pytest.approx(1) and found["map"] < 0.9


def test_outputs_are_decoded_where_the_adapter_is(tmp_path, monkeypatch):
    """Its anchors may be buffers, which lie on the network's device."""
    write_coco(tmp_path, ROWS)
    batches = list(Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json")).batches(SPEC))
    teacher, places = cell_teacher(), []
    task, outputs = task_of(teacher), teacher(batches[0][0])
    teacher.module.to("meta")
    monkeypatch.setattr("dfq.evaluation.moved", lambda found, device: places.append(str(device)) or found)
    assert set(measure(lambda images: outputs, task, batches, 3, "tiny")) == {"map", "map_50"}
    assert places == ["meta"]


MISTAKES = {
    "no file": (lambda f: f.unlink(), "which does not exist"),
    "no json": (lambda f: f.write_text("{"), "which is not as COCO's (JSONDecodeError"),
    "no categories": (lambda f: f.write_text('{"images": [], "annotations": []}'), "(KeyError: 'categories')"),
    "unknown category": (
        lambda f: f.write_text(f.read_text().replace('"category_id": 3', '"category_id": 9')), "(KeyError: 9)"),
    "a list": (lambda f: f.write_text("[]"), "(TypeError"),
    "no name of an image": (lambda f: f.write_text(f.read_text().replace('"0.png"', "null")), "(TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_broken_annotations_are_told(mistake, tmp_path):
    write_coco(tmp_path, ROWS)
    damage, message = MISTAKES[mistake]
    damage(tmp_path / "boxes.json")
    with pytest.raises(UserError) as error:
        list(Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json")).batches(SPEC))
    assert message in str(error.value) and "allowed: COCO's json" in str(error.value)


def test_labels_that_no_object_has_are_told(tmp_path):
    """Categories in the order of their ids, for a network whose class 0 is nothing."""
    write_coco(tmp_path, ROWS, ids=(3, 1))
    rows = json.loads((tmp_path / "boxes.json").read_text())
    for entry in rows["annotations"]:
        entry["category_id"] = 1 if entry["category_id"] == 7 else 3
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    teacher = two_stages()
    paths = str(tmp_path / "images"), str(tmp_path / "boxes.json")
    with pytest.raises(
        UserError, match=r"got boxes with label 0 and a network of labels from 1 to 3; allowed: .*evaluation\.labels="
    ):
        measure(teacher, task_of(teacher), Coco(*paths).batches(SPEC), 3, "two stages")
    found = measure(teacher, task_of(teacher), Coco(*paths, labels="id").batches(SPEC), 3, "two stages")
    assert set(found) == {"map", "map_50"}


def test_folders_that_are_not_there_are_told(tmp_path):
    write_coco(tmp_path, ROWS)
    paths = str(tmp_path / "images"), str(tmp_path / "boxes.json")
    for evaluation, what in (
        (Coco(str(tmp_path / "none"), paths[1]), "images=.*none, which can't be read"),
        (Coco(paths[0], str(tmp_path / "none.json")), "annotations=.*none.json, which does not exist"),
    ):
        with pytest.raises(UserError, match=f"got evaluation.{what}"):
            evaluation.fingerprint()
    with pytest.raises(UserError, match=r"got evaluation.reference_path=.*none, which can't be read"):
        Coco(*paths, reference_path=str(tmp_path / "none")).reference_images(SPEC, 2)


def test_padding_of_images_as_long_as_a_line_and_of_networks_without_a_mean(tmp_path):
    write_coco(tmp_path, ROWS, size=(3, 600))
    spec = InputSpec((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    images, rows = next(iter(Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json"), fit="pad").batches(spec)))
    assert rows[0]["size"] == pytest.approx((600, 600))
    assert (spec.to_pixels(images[0])[:, 1:] == 114).all() and not (spec.to_pixels(images[0])[:, :1] == 114).all()


def test_boxes_of_a_class_are_compared_for_the_teachers_class():
    """Each network is sure of another class; where the one that the teacher means is, both say alike."""
    boxes = torch.tensor([[[[0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.6, 0.6], [0.1, 0.1, 0.5, 0.5]]]])  # [1, 1, 3, 4]
    logits = torch.tensor([[[0.0, 5.0, 1.0]]]), torch.tensor([[[0.0, 1.0, 5.0]]])
    mine, theirs = (
        Candidates(boxes[:, :, best], logit, None, True, 0, False, boxes)
        for logit, best in zip(logits, (1, 2), strict=True)
    )
    assert torch.equal(mine.beside(theirs).boxes, theirs.boxes)


def test_labels_beyond_the_network_and_broken_images_are_told(tmp_path):
    write_coco(tmp_path, ROWS)
    teacher = cell_teacher()
    evaluation = Coco(str(tmp_path / "images"), str(tmp_path / "boxes.json"), labels="id")
    with pytest.raises(
        UserError,
        match=r"got boxes with label 7 and a network of labels from 0 to 3; allowed: .*evaluation\.labels=order",
    ):
        measure(teacher, task_of(teacher), evaluation.batches(SPEC), 3, "tiny")
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1\.png, which can't be read .* allowed: an image in evaluation.images"):
        list(evaluation.batches(SPEC))


def test_without_a_backend_coco_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError) as error:
        Coco(os.devnull, os.devnull)
    assert str(error.value) == (
        "got boxes to evaluate, which needs faster_coco_eval or pycocotools, not installed here; "
        "pip install 'dfq[detection]'"
    )
