"""box_sampling: what is drawn, what is relabeled, and that images come to hold what was drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NETS, as_teacher
from tiny_detectors import CLASSES, SPEC, Cells, DecodeOnly, cell_teacher, family_teacher

from dfq.detectors._base import Boxes
from dfq.errors import UserError
from dfq.generators._base import batch_rng, dataset_rng
from dfq.generators._statistics import batch_norm_distances
from dfq.generators.box_sampling import BoxSampling, draw_boxes, looks, low_size, moved, relabel, seen_score
from dfq.losses._box_overlap import area, pairwise_iou
from dfq.tasks._task import task_of

FAST = BoxSampling(batch_size=8, iterations=8, final_iterations=4, blur=0.0)


def boxes(*rows):
    """Rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].long())


def test_boxes_are_inside_apart_of_all_sizes_and_of_all_classes():
    drawn = draw_boxes(400, [1, 2, 5], BoxSampling(), batch_rng(0, 0))
    counts = torch.tensor([len(row.boxes) for row in drawn])
    assert counts.min() == 1 and counts.max() == 4 and len(counts.unique()) == 4
    every, labels = torch.cat([row.boxes for row in drawn]), torch.cat([row.labels for row in drawn])
    assert float(every.min()) >= 0 and float(every.max()) <= 1 and (every[:, 2:] > every[:, :2]).all()
    overlaps = [pairwise_iou(row.boxes, row.boxes).fill_diagonal_(0).max() for row in drawn]
    assert float(torch.stack(overlaps).max()) < 0.2
    sides = area(every).sqrt()
    assert 0.14 < float(sides.min()) < 0.17 and 0.6 < float(sides.max()) < 0.75
    # Uniform in the logarithm, but for the large ones that find no place beside others.
    below = float((sides < np.sqrt(0.15 * 0.7)).float().mean())
    assert 0.5 < below < 0.7
    found = labels.bincount()
    assert found[[0, 3, 4]].sum() == 0 and found[[1, 2, 5]].max() - found[[1, 2, 5]].min() <= 1


def test_relabeling_by_hand():
    wanted = [
        boxes([0.1, 0.1, 0.4, 0.4, 0, 1], [0.6, 0.6, 0.9, 0.9, 0, 2]),  # the first is seen, the second not
        boxes([0.1, 0.1, 0.4, 0.4, 0, 0], [0.6, 0.6, 0.9, 0.9, 0, 0]),  # neither: the better one stays
    ]
    found = [
        boxes(
            [0.1, 0.1, 0.4, 0.42, 0.6, 1],
            [0.6, 0.1, 0.9, 0.4, 0.9, 3],  # beside the labels: added
            [0.12, 0.1, 0.4, 0.4, 0.8, 0],  # upon one, of another class: not added
            [0.1, 0.6, 0.3, 0.9, 0.55, 3],  # less sure than the label that is seen
            [0.0, 0.0, 1.0, 1.0, 0.9, 0],  # too large
        ),
        boxes([0.6, 0.6, 0.9, 0.88, 0.2, 0]),
    ]
    first, second = relabel(wanted, found, 0.5, believed=0.5, most_boxes=4, most_of_class=9)
    assert first.labels.tolist() == [1, 3] and second.labels.tolist() == [0]
    torch.testing.assert_close(first.boxes, torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.6, 0.1, 0.9, 0.4]]))
    torch.testing.assert_close(second.boxes, torch.tensor([[0.6, 0.6, 0.9, 0.9]]))
    assert relabel(wanted, found, 0.5, 0.5, 4, most_of_class=0)[0].labels.tolist() == [1], "a class that is full"
    full = relabel(wanted, found, 0.5, 0.5, most_boxes=1, most_of_class=9)
    assert full[0].labels.tolist() == [1], "an image that is full"
    # Where no label is seen, what is seen at all takes its place; where nothing is, the better label stays.
    other = boxes([0.5, 0.5, 0.9, 0.9, 0.55, 3], [0.1, 0.1, 0.3, 0.3, 0.52, 2])
    replaced = relabel(wanted, [found[0], other], 0.5, 0.5, 4, 9)[1]
    assert replaced.labels.tolist() == [3], "one that is believed; a second has to be as sure as labels that are seen"
    nothing = relabel(wanted, [boxes(), boxes()], 0.5, 0.5, 4, 9)
    patient = relabel(wanted, found, 0.15, 0.5, 4, 9)[1]
    assert len(patient.labels) == 1 and float(patient.boxes[0, 0]) == pytest.approx(0.6), "seen a little: it stays"
    assert [len(row.labels) for row in nothing] == [1, 1], "an image keeps an object"
    # A teacher that sees nothing in noise: any score is plausible, but none at all is not.
    first, second = relabel(wanted, found, 0.0, believed=0.0, most_boxes=4, most_of_class=9)
    assert first.labels.tolist() == [1, 3, 3] and len(second.labels) == 1


def test_scores_of_labels_are_those_of_their_class_and_place():
    wanted = boxes([0.1, 0.1, 0.4, 0.4, 0, 1], [0.6, 0.6, 0.9, 0.9, 0, 1])
    found = boxes([0.1, 0.1, 0.4, 0.4, 0.3, 1], [0.1, 0.1, 0.4, 0.41, 0.7, 1], [0.6, 0.6, 0.9, 0.9, 0.9, 0])
    assert seen_score(wanted, found).tolist() == pytest.approx([0.7, 0])
    assert seen_score(wanted, boxes()).tolist() == [0, 0]


@pytest.mark.parametrize("adapter", [None, DecodeOnly])
def test_a_batch_repeats_and_depends_on_its_index(adapter):
    teacher = cell_teacher(*([adapter] if adapter else []))
    prepared = FAST.prepare(teacher, dataset_rng(0))
    assert 0 < prepared.plausible <= prepared.believed < 1 and prepared.labels == list(range(CLASSES))
    assert FAST.prepare(teacher, dataset_rng(0)) == prepared
    done = []
    state = torch.get_rng_state()
    made = prepared.sample(teacher, 4, batch_rng(0, 1), lambda amount, note="": done.append(amount))
    assert torch.equal(state, torch.get_rng_state()) and sum(done) == pytest.approx(4)
    again = prepared.sample(teacher, 4, batch_rng(0, 1), lambda amount, note="": None)
    other = prepared.sample(teacher, 4, batch_rng(0, 2), lambda amount, note="": None)
    assert torch.equal(made["images"], again["images"]) and not torch.equal(made["images"], other["images"])
    low, high = SPEC.limits(torch.device("cpu"))
    assert (made["images"] >= low).all() and (made["images"] <= high).all() and not made["images"].requires_grad
    for name, size in (("boxes", (4,)), ("labels", ()), ("scores", ())):
        assert [part.shape[1:] == size for part in made[name]] == [True] * 4
        assert all(torch.equal(a, b) for a, b in zip(made[name], again[name], strict=True))
    assert [len(row) for row in made["boxes"]] == [len(row) for row in made["labels"]]
    assert 1 < float(torch.cat(made["boxes"]).max()) <= 32, "in pixels"


def test_images_come_to_hold_what_was_drawn():
    teacher = cell_teacher()
    task = task_of(teacher)

    def score(settings):
        made = settings.sample(teacher, 8, batch_rng(0, 0), lambda amount, note="": None)
        unit = torch.tensor([32.0] * 4)
        targets = [Boxes(b / unit, s, k) for b, s, k in zip(made["boxes"], made["scores"], made["labels"], strict=True)]
        with torch.no_grad():
            return float(task.synthesis_loss(task.raw_outputs(teacher, made["images"]), targets))

    settings = BoxSampling(iterations=40, final_iterations=20, rounds=0)
    pulled, free = (score(replace(settings, task_weight=w, final_task_weight=w)) for w in (1.0, 0.0))
    assert pulled < 0.7 * free
    assert settings.resolution == 0.5


def test_statistics_lead_at_full_resolution():
    teacher = cell_teacher()

    def distance(**changes):
        settings = BoxSampling(iterations=20, final_iterations=20, rounds=0, **changes)
        images = settings.sample(teacher, 8, batch_rng(0, 0), lambda amount, note="": None)["images"]
        with torch.no_grad(), batch_norm_distances(teacher) as found:
            teacher(images)
        return float(torch.stack(found).mean())

    assert distance() < 0.7 * distance(final_task_weight=1.0)
    # By itself there is the blur of photographs at full resolution.
    assert distance() == distance(blur=None) != distance(blur=0.0)


def test_boxes_are_shown_where_their_objects_are():
    images = torch.zeros(1, 1, 20, 30)
    images[:, :, 6:12, 5:11] = 1
    wanted = [boxes([5 / 30, 6 / 20, 11 / 30, 12 / 20, 0, 1])]
    seen = set()
    for seed in range(12):
        shown, rows = moved(images, wanted, True, 3, batch_rng(seed, 0))
        where = shown[0, 0].nonzero()
        corners = [*where.amin(0).flip(0).tolist(), *(where.amax(0) + 1).flip(0).tolist()]
        torch.testing.assert_close(rows[0].boxes[0] * torch.tensor([30, 20, 30, 20]), torch.tensor(corners).float())
        assert rows[0].labels.tolist() == [1]
        seen.add(tuple(corners))
    assert len(seen) > 8
    same, rows = moved(images, wanted, False, 0, batch_rng(0, 0))
    assert torch.equal(same, images) and torch.equal(rows[0].boxes, wanted[0].boxes)


def test_boxes_that_are_moved_out_of_the_image_are_left_out():
    """A box of no width has an infinite loss in detectors that match the logarithm of sides."""
    images, thin = torch.rand(2, 3, 32, 32), [0.0, 0.2, 2 / 32, 0.9, 0, 1]  # two pixels wide, at the left edge
    wanted, lost = [boxes(thin, [0.2, 0.2, 0.8, 0.8, 0, 2]), boxes(thin)], 0
    teacher = family_teacher("retinanet")
    for seed in range(24):
        shown, rows = moved(images, wanted, False, 4, batch_rng(seed, 0))
        assert all((area(row.boxes) > 0).all() for row in rows) and rows[0].labels.tolist()[-1] == 2
        assert [len(part) for part in rows[1]] == [len(rows[1].boxes)] * 3
        if not len(rows[1].boxes) and not lost:
            assert torch.isfinite(task_of(teacher).synthesis_loss(teacher(shown), rows))
        lost += not len(rows[1].boxes)
    assert 0 < lost < 24


def test_what_is_added_is_cut_off_at_the_edges():
    wanted = [boxes([0.4, 0.4, 0.6, 0.6, 0, 0])]
    found = [boxes([-0.3, 0.1, 0.2, 1.2, 0.9, 1], [0.97, 0.0, 1.8, 0.1, 0.8, 2])]
    (row,) = relabel(wanted, found, 0.0, 0.5, 4, 9)
    assert row.labels.tolist() == [1], "less than a hundredth of the image is left of the other"
    torch.testing.assert_close(row.boxes, torch.tensor([[0.0, 0.1, 0.2, 1.0]]))


def test_labels_are_compared_in_the_second_half():
    assert looks(80, 3) == [40, 54, 67] and looks(60, 0) == [] and looks(3, 3) == [1, 2, 3] and looks(8, 1) == [4]


def test_low_resolution_is_a_multiple_and_falls_back():
    teacher = cell_teacher()
    small = type(SPEC)((3, 64, 128), SPEC.mean, SPEC.std)
    assert low_size(teacher, small, 0.5) == (64, 64)  # no smaller than 64, or than the network's input
    assert low_size(teacher, SPEC, 0.5) == SPEC.size[1:] and max(SPEC.size) < 64
    large = type(SPEC)((3, 352, 640), SPEC.mean, SPEC.std)
    assert low_size(teacher, large, 0.5) == (192, 320)

    def refuses(images):
        raise ValueError(images.shape)

    teacher.module.raw = refuses
    assert low_size(teacher, large, 0.5) == (352, 640)


def test_a_detector_whose_places_are_fixed_has_no_low_resolution():
    """A network that takes any size, behind an adapter that knows its cells for that of its input alone."""
    spec = type(SPEC)((3, 128, 128), SPEC.mean, SPEC.std)

    class Fixed(Cells):
        def candidates(self, raw):
            found = super().candidates(raw)
            size = (torch.arange(32 * 32) % 7 + 1) / 7  # of cells [32, 32]
            return replace(found, boxes=found.boxes * size[:, None])

    teacher = cell_teacher(Fixed)
    assert low_size(cell_teacher(), spec, 0.5) == (64, 64) and low_size(teacher, spec, 0.5) == (128, 128)


def test_what_is_seen_of_a_label_that_is_unused_is_not_added():
    def made(unused):
        teacher = cell_teacher()
        teacher.module.unused_labels = unused
        easy = replace(FAST.prepare(teacher, batch_rng(0, 0)), plausible=0.01, believed=0.01, labels=[0])
        return torch.cat(easy.sample(teacher, 4, batch_rng(0, 1), lambda _amount, _note="": None)["labels"])

    assert {0, 3} <= set(made(()).tolist()) and 3 not in made((3,))


def test_a_classifier_has_no_boxes():
    with pytest.raises(
        UserError, match=r"got a network without boxes among its outputs .*, and box_sampling draws some"
    ):
        FAST.prepare(as_teacher(NETS["plain"]()), dataset_rng(0))


def test_a_detector_runs_in_mixed_precision():
    short = replace(FAST, iterations=3, final_iterations=1)
    whole, mixed = (
        replace(short, precision=precision).sample(cell_teacher(), 2, batch_rng(0, 0), lambda amount, note="": None)
        for precision in ("float32", "bfloat16")
    )
    assert mixed["images"].dtype == torch.float32 and torch.isfinite(mixed["images"]).all()
    assert not torch.equal(mixed["images"], whole["images"])
