"""What a second stage goes on with, against torchvision's own selection and pooling."""

import pytest
import torch
from tiny_detectors import two_stages
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from dfq.detectors._proposals import best_apart, filtered, pooled
from dfq.tasks._task import task_of

LEVELS = [192, 48, 12]
HEIGHT, WIDTH = 32, 48


def places(seed, count=3):
    """Boxes in and around the image, some of them far too small; a score each, none twice."""
    rng = torch.Generator().manual_seed(seed)
    total = sum(LEVELS)
    corner = torch.rand(count, total, 2, generator=rng) * torch.tensor([WIDTH, HEIGHT]) - 5
    size = torch.rand(count, total, 2, generator=rng) ** 2 * 20
    size[:, ::7] = 1e-4
    order = torch.stack([torch.randperm(total, generator=rng) for _ in range(count)])
    return torch.cat([corner, corner + size], -1), (order - total / 2) / 40


@pytest.mark.parametrize(
    "before, after, overlap, least", [(1000, 1000, 0.7, 0.0), (30, 40, 0.5, 0.3), (20, 7, 0.1, 0.9)]
)
@pytest.mark.parametrize("most", [25, 100, 400])
def test_the_same_boxes_as_torchvision_in_the_same_order(before, after, overlap, least, most):
    limits = [{"training": count, "testing": count} for count in (before, after)]
    rpn = RegionProposalNetwork(None, None, 0.7, 0.3, 1, 0.5, *limits, overlap, least).eval()
    boxes, objectness = places(most)
    unit = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT], dtype=torch.float32)
    found = filtered(rpn, boxes, objectness, LEVELS, unit, most)
    wanted, _ = rpn.filter_proposals(boxes, objectness, [(HEIGHT, WIDTH)] * 3, LEVELS)
    assert found.shape == (3, most, 4)
    for mine, theirs in zip(found, wanted, strict=True):
        count = min(most, len(theirs))
        assert torch.equal(mine[:count], theirs[:count])
        assert (mine[count:] == torch.tensor([0.0, 0, WIDTH, HEIGHT])).all()


def test_of_equal_boxes_the_first_go_on():
    rpn = two_stages().module.network.rpn
    boxes, objectness = places(0)
    levels = torch.cat([torch.full((size,), float(level)) for level, size in enumerate(LEVELS)])
    boxes[...] = torch.tensor([1.0, 1, 9, 9])  # apart from none of their level
    boxes[..., :2] -= torch.arange(sum(LEVELS))[:, None] / 1000
    found = filtered(rpn, boxes, objectness.round(), LEVELS, torch.tensor([WIDTH, HEIGHT] * 2).float(), 10)
    for image, row in enumerate(found):
        best = [int((objectness[image].round() - 100 * (levels != level)).argmax()) for level in range(3)]
        rows = {tuple(boxes[image, place].clamp(min=0).tolist()) for place in best}
        assert {tuple(box.tolist()) for box in row[:3]} == rows


def test_an_operation_of_its_own_is_what_torch_takes_it_for():
    boxes, scores = places(1)
    torch.library.opcheck(best_apart, (boxes, scores, LEVELS, 0.5, 20))


@pytest.mark.parametrize("names", [["0", "1", "2"], ["1"]])
def test_what_lies_in_boxes_is_what_torchvision_pools(names):
    rng = torch.Generator().manual_seed(0)
    features = {str(i): torch.randn(3, 4, HEIGHT >> i + 2, WIDTH >> i + 2, generator=rng) for i in range(3)}
    pool = MultiScaleRoIAlign(names, 3, 2, canonical_scale=20, canonical_level=3)
    boxes, _ = places(2)
    boxes = boxes.clamp(min=0)
    found = pooled(pool, features, boxes, HEIGHT)
    wanted = pool(features, list(boxes), [(HEIGHT, WIDTH)] * 3)
    assert found.shape == (3 * sum(LEVELS), 4, 3, 3) and torch.equal(found, wanted)


def test_two_stages_find_what_torchvision_finds():
    """The whole way, resizing and normalization apart: the network's own forward is given the very same pixels."""
    teacher = two_stages()
    network, images = teacher.module.network, teacher.example(3)
    network.transform.min_size, network.transform.max_size = (32,), 32
    network.transform.image_mean, network.transform.image_std = [0.0] * 3, [1.0] * 3
    network.rpn._post_nms_top_n["testing"] = 100
    network.roi_heads.score_thresh = 0.001
    with torch.no_grad():
        wanted = network(list(images))
        found = task_of(teacher).detections(teacher(images), [(32, 32)] * 3)
    for mine, theirs in zip(found, wanted, strict=True):
        large = (theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]).amin(1) > 0.01  # torchvision leaves out the smallest
        assert len(theirs["scores"]) > 20 and large.all()
        torch.testing.assert_close(mine.scores, theirs["scores"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.boxes, theirs["boxes"], atol=1e-3, rtol=1e-4)
        assert torch.equal(mine.labels, theirs["labels"])
