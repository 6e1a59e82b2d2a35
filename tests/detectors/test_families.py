"""The adapters of torchvision's and transformers' detectors, on small ones with random weights."""

import copy

import pytest
import torch
from conftest import settle
from tiny_detectors import CLASSES, FAMILIES, family_teacher, transformers_teacher

from dfq.detectors._base import Boxes
from dfq.hooks import given_choices, kept_choices
from dfq.settings import resolve
from dfq.tasks._task import task_of
from dfq.teachers.torchvision import _detector

SIZE = 64


def check(teacher, background):
    """The contract of an adapter."""
    task = task_of(teacher)
    images = teacher.example(2).requires_grad_()
    outputs = task.raw_outputs(teacher, images)
    num_classes = task.num_outputs(outputs)
    assert task.labels(outputs) == [k for k in range(num_classes) if k != background]
    targets = [
        Boxes(torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.5, 0.9, 0.8]]), torch.ones(2), torch.tensor([1, 2])),
        Boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
    ]
    state = torch.get_rng_state()
    loss = task.synthesis_loss(outputs, targets)
    assert torch.equal(state, torch.get_rng_state()), "a loss draws no random numbers"
    loss.backward()
    assert loss.dim() == 0 and torch.isfinite(loss) and torch.isfinite(images.grad).all()
    assert float(images.grad.abs().sum()) > 0
    outputs = {name: values.detach() for name, values in outputs.items()}
    for row in task.detections(outputs, [(SIZE, SIZE), (2 * SIZE, SIZE)]):
        assert not set(row.labels.tolist()) - set(task.labels(outputs)) and (row.boxes >= 0).all()
    assert float(task.distillation_loss(outputs, outputs)) == pytest.approx(0, abs=1e-4)
    rng = torch.Generator().manual_seed(0)
    other = {
        name: values if name in ("anchors", "proposals") else values + 0.5 * torch.rand(values.shape, generator=rng)
        for name, values in outputs.items()
    }
    assert float(task.distillation_loss(other, outputs)) > 1e-3
    return outputs


@pytest.mark.parametrize("name", FAMILIES)
def test_family_of_torchvision(name):
    two_stages_or_softmax = name in ("ssd", "faster_rcnn", "mask_rcnn")
    check(family_teacher(name, SIZE), 0 if two_stages_or_softmax else None)


@pytest.mark.parametrize(
    "name, overlap, most",
    [("retinanet", 0.5, 300), ("fcos", 0.6, 100), ("ssd", 0.55, 300), ("faster_rcnn", 0.5, 100)],
)
def test_doubles_are_suppressed_as_the_network_says(name, overlap, most):
    detector = family_teacher(name, SIZE).module
    assert (detector.overlap, detector.most) == (overlap, most)
    kind = type(detector)
    assert type("Own", (kind,), {"overlap": 0.3})(detector.network).overlap == 0.3, "an adapter has the last word"
    side = torch.linspace(0.2, 0.8, most + 20)[:, None]  # a place of its own for each
    rows = torch.cat([side, side, side + 1e-3, side + 1e-3], 1)
    found = detector.suppress(rows, torch.full((len(rows), 1), 0.5), (1.0, 1.0))
    assert len(found.scores) == most
    apart = (1 - overlap) / (1 + overlap)  # by which two boxes of side 1 overlap just so much
    pair = torch.tensor([[0.0, 0, 0.5, 0.5]] * 2)
    kept = []
    for shift in (0.49 * apart, 0.51 * apart):
        pair[1, [0, 2]] = torch.tensor([shift, 0.5 + shift])
        kept.append(len(detector.suppress(pair, torch.tensor([[0.5], [0.4]]), (1.0, 1.0)).scores))
    assert kept == [1, 2]


def test_retinanet_finds_what_torchvision_finds():
    """The whole way, resizing and normalization apart: the network's own forward is given the very same pixels."""
    teacher = family_teacher("retinanet", SIZE)
    network, images = teacher.module.network, teacher.example(2)
    with torch.no_grad():
        network.head.classification_head.cls_logits.bias += 4.0  # scores that anything is found by
        network.transform.min_size, network.transform.max_size = (SIZE,), SIZE
        network.transform.image_mean, network.transform.image_std = [0.0] * 3, [1.0] * 3
        network.score_thresh, network.nms_thresh = 0.001, teacher.module.overlap
        wanted = network(list(images))
        found = task_of(teacher).detections(teacher(images), [(SIZE, SIZE)] * 2)
    for mine, theirs in zip(found, wanted, strict=True):
        best = min(len(mine.scores), len(theirs["scores"]), 10)
        torch.testing.assert_close(mine.scores[:best], theirs["scores"][:best], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(mine.boxes[:3], theirs["boxes"][:3], atol=1e-2, rtol=1e-3)


def test_fcos_matches_fractions_as_torchvision_matches_pixels():
    """On an image that is no square, with one box inside another: the smaller one wins where both are."""
    height, width = SIZE, 2 * SIZE
    detector = family_teacher("fcos", SIZE).module
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([[8.0, 4.0, 120.0, 60.0], [40.0, 16.0, 72.0, 48.0]]), torch.tensor([1, 2])
    with torch.no_grad():
        raw = detector(images)
        pixels = torch.tensor([width, height, width, height])
        levels = [len(part) for part in raw["anchors"][0].split([16 * 8, 8 * 4, 4 * 2, 2 * 1, 1])]
        theirs = detector.network.compute_loss(
            [{"boxes": wanted[0], "labels": wanted[1]}], raw, [raw["anchors"][0] * pixels], levels
        )
        mine = detector.loss(raw, [Boxes(wanted[0] / pixels, torch.ones(2), wanted[1])])
    torch.testing.assert_close(mine, sum(theirs.values()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("derive", [False, True])
@pytest.mark.parametrize("name", ["yolos", "detr", "table_transformer"])
def test_family_of_transformers(name, derive):
    """Or of a class derived from it."""
    outputs = check(transformers_teacher(name, derive), CLASSES)
    assert outputs["logits"].shape == (2, 5, CLASSES + 1) and outputs["pred_boxes"].shape == (2, 5, 4)


@pytest.mark.parametrize("name", ["conditional_detr", "deformable_detr"])
def test_families_of_sigmoids(name):
    outputs = check(teacher := transformers_teacher(name), None)
    assert outputs["logits"].shape == (2, 5, CLASSES) and outputs["pred_boxes"].shape == (2, 5, 4)
    found = teacher.module.candidates(outputs)
    assert not found.exclusive and found.are_fixed


def test_deformable_detr_of_two_stages_chooses_its_queries():
    settings = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 6}
    teacher = transformers_teacher("deformable_detr", **settings)
    check(teacher, None)
    assert_chosen(teacher, 6)


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine"])
def test_later_families_that_choose(name):
    teacher = transformers_teacher(name)
    settle(teacher.module, teacher.input_spec.size, num_samples=8)
    check(teacher, None)
    assert_chosen(teacher, 7)


def assert_chosen(teacher, count):
    """Queries are the best ``count`` places of each image, and given others they are those."""
    images = teacher.example(3)
    with torch.no_grad():
        with kept_choices(teacher.module) as chosen:
            wanted = teacher(images)
        assert [places.shape for places in chosen.values()] == [(3, count)]
        with given_choices(teacher.module, {name: places.flip(1) for name, places in chosen.items()}):
            other = teacher(images)
    assert not teacher.module.candidates(wanted).are_fixed
    torch.testing.assert_close(other["pred_boxes"], wanted["pred_boxes"].flip(1), atol=1e-4, rtol=1e-4)


def test_labels_without_a_name_are_no_objects(monkeypatch):
    """COCO's ids have gaps, for which its networks have outputs that nothing was ever trained for."""
    from torchvision import models

    get_model = models.get_model  # no test downloads weights
    monkeypatch.setattr(models, "get_model", lambda name, weights, **options: get_model(name, **options))
    teacher = resolve("teacher", "torchvision", name="ssdlite320_mobilenet_v3_large", weights="DEFAULT")
    outputs = teacher(teacher.example(1))
    labels = task_of(teacher).labels(outputs)
    assert task_of(teacher).num_outputs(outputs) == 91 and len(labels) == 80
    assert {0, 12, 26, 83}.isdisjoint(labels) and {1, 11, 13, 90} <= set(labels)

    names = {0: "N/A", 1: "person", 2: "N/A", 3: "car"}
    teacher = transformers_teacher("detr", id2label=names)
    assert task_of(teacher).labels(teacher(teacher.example(1))) == [1, 3]


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_sigmoids_have_no_object_of_the_background_either(name):
    """COCO's weights have an output for id 0, which nothing has; nothing is drawn of it, and nothing measured."""
    names = ["__background__", "person", "N/A", "car"]
    teacher = _detector(FAMILIES[name](), name, None, None, (3, SIZE, SIZE), None, None, names)
    with torch.no_grad():
        assert task_of(teacher).labels(teacher(teacher.example(1))) == [1, 3]


@pytest.mark.parametrize("derive", [False, True])
def test_queries_that_are_chosen_are_shared(derive):
    """A student that would choose others goes on with those of its teacher; and no feature of theirs is compared."""
    teacher = transformers_teacher("rt_detr", derive)
    settle(teacher.module, teacher.input_spec.size, num_samples=8)
    check(teacher, None)
    images, student = teacher.example(3), copy.deepcopy(teacher.module)
    with torch.no_grad():
        for layer in student.network.model.enc_score_head.parameters():
            layer.mul_(-1)
        with kept_choices(teacher.module) as theirs:
            wanted = teacher(images)
        with kept_choices(student) as mine:
            other = student(images)
        assert theirs["chosen"].shape == (3, 7) and not torch.equal(theirs["chosen"], mine["chosen"])
        with given_choices(student, theirs):
            shared = student(images)
    assert not torch.allclose(other["pred_boxes"], wanted["pred_boxes"], atol=1e-3)
    torch.testing.assert_close(shared, wanted)
    flow = teacher.dataflow
    behind = [name for name in ("encoder", "decoder") if flow.follows_choice(teacher.module, f"network.model.{name}")]
    assert behind == ["decoder"] and not task_of(teacher).detector.candidates(wanted).are_fixed


@pytest.mark.slow  # half a minute
def test_what_chooses_queries_can_be_traced():
    teacher = transformers_teacher("rt_detr")
    program = torch.export.export(
        teacher.module, (teacher.example(2),), dynamic_shapes=({0: torch.export.Dim("N")},), strict=True
    )
    images = teacher.example(3)
    torch.testing.assert_close(program.module()(images), teacher(images))
