"""Losses of boxes and places against NumPy, written from the equations a second time."""

import numpy as np
import pytest
import torch

from dfq.losses._box_overlap import giou, iou, pairwise_iou
from dfq.losses.anchor_divergence import anchor_divergence, binary_kl
from dfq.losses.box_distance import box_distance
from dfq.losses.set_prediction import match, set_prediction_loss


def random_boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    corners = rng.random((count, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], 1)


def overlap(a, b):
    """(IoU, GIoU) of two boxes, on a fine raster rather than by the formula."""
    grid = (np.arange(2000) + 0.5) / 2000

    def inside(box):
        x = (grid >= box[0]) & (grid < box[2])
        y = (grid >= box[1]) & (grid < box[3])
        return y[:, None] & x[None]

    both, either = (inside(a) & inside(b)).mean(), (inside(a) | inside(b)).mean()
    around = inside([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])]).mean()
    return both / either, both / either - (around - either) / around


def test_overlaps_are_those_counted_on_a_raster():
    a, b = random_boxes(6, 1), random_boxes(6, 2)
    b[0], b[1, :2] = a[0], b[1, 2:] - 1e-3  # equal ones, and one of next to no area
    b[2] = [0.0, 0.0, 0.2, 0.2]
    a[2] = [0.5, 0.5, 0.9, 0.9]  # apart
    wanted = np.array([overlap(x, y) for x, y in zip(a, b, strict=True)])
    found = torch.stack([iou(torch.tensor(a), torch.tensor(b)), giou(torch.tensor(a), torch.tensor(b))], 1).numpy()
    np.testing.assert_allclose(found, wanted, atol=5e-3)
    assert found[2, 0] == 0 and found[2, 1] < 0 and found[0] == pytest.approx([1, 1])


def test_pairwise_overlap_is_each_with_each_in_batches_too():
    a, b = torch.tensor(random_boxes(6, 1)).view(2, 3, 4), torch.tensor(random_boxes(8, 2)).view(2, 4, 4)
    found = pairwise_iou(a, b)
    assert found.shape == (2, 3, 4)
    for n, i, j in np.ndindex(2, 3, 4):
        assert float(found[n, i, j]) == pytest.approx(float(iou(a[n, i], b[n, j])))


def test_boxes_of_no_area_have_a_finite_gradient():
    point = torch.tensor([[0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    giou(point, torch.tensor([[0.3, 0.3, 0.3, 0.3]])).sum().backward()
    assert torch.isfinite(point.grad).all()
    assert float(giou(torch.zeros(1, 4), torch.zeros(1, 4))) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_boxes_in_half_precision_are_those_of_the_same_numbers(dtype):
    """Of a student that is trained in mixed precision; with boxes of no area, and scores of 0 and 1."""
    boxes = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9]], dtype=dtype)
    scores = torch.tensor([[0.0, 0.2], [0.0, 0.5], [1.0, 0.0]], dtype=dtype)
    found = []
    for number in (dtype, torch.float32):
        b, s = [part.to(number, copy=True).requires_grad_() for part in (boxes, scores)]
        wanted = torch.tensor([[0.12, 0.1, 0.4, 0.42], [0.3, 0.3, 0.3, 0.3]])
        losses = loss_of(b, s, wanted, torch.tensor([0, 1])), box_distance(b[None], boxes.flip(0)[None], s[None, :, 1])
        losses[1].backward()
        assert torch.isfinite(b.grad).all() and torch.isfinite(pairwise_iou(b, b)).all()
        found.append(torch.stack([loss.float() for loss in losses]))
    assert torch.isfinite(found[1]).all()
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("objectness", [True, False])
def test_anchor_divergence_is_the_kl_of_each_place(exclusive, objectness):
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 3))
    po, qo = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    confidence = rng.random((2, 5)) * 2
    total = 0.0
    for n, a in np.ndindex(2, 5):
        if exclusive:
            mine, theirs = softmax(q[n, a]), softmax(p[n, a])
            if objectness:  # the distribution over "nothing" and every class, written out
                mine = np.append(mine * sigmoid(qo[n, a]), 1 - sigmoid(qo[n, a]))
                theirs = np.append(theirs * sigmoid(po[n, a]), 1 - sigmoid(po[n, a]))
            total += (theirs * np.log(theirs / mine)).sum()
        else:
            mine, theirs = sigmoid(q[n, a]), sigmoid(p[n, a])
            kl = (theirs * np.log(theirs / mine) + (1 - theirs) * np.log((1 - theirs) / (1 - mine))).sum()
            if objectness:
                o, r = sigmoid(po[n, a]), sigmoid(qo[n, a])
                kl = o * kl + o * np.log(o / r) + (1 - o) * np.log((1 - o) / (1 - r))
            total += kl
    tensors = [torch.tensor(x) for x in (q, p, confidence)]
    extra = [torch.tensor(qo), torch.tensor(po)] if objectness else []
    assert float(anchor_divergence(*tensors, exclusive, *extra)) == pytest.approx(total / confidence.sum())
    assert float(anchor_divergence(tensors[1], *tensors[1:], exclusive, *extra[1:], *extra[1:])) == pytest.approx(0)


def test_divergence_of_certain_places_stays_finite():
    far = torch.tensor([200.0, -200.0], requires_grad=True)
    binary_kl(far, torch.tensor([-200.0, 200.0])).sum().backward()
    assert torch.isfinite(far.grad).all()


@pytest.mark.parametrize("exclusive", [True, False])
def test_divergence_of_classes_that_are_ruled_out_is_that_of_the_others(exclusive):
    """Networks that are told their classes as a text fill up with minus infinity."""
    teacher = torch.tensor([[[1.0, 0.5, -torch.inf]]])
    student = torch.tensor([[[0.2, 0.7, -torch.inf]]], requires_grad=True)
    one = torch.ones(1, 1)
    found = anchor_divergence(student, teacher, one, exclusive)
    found.backward()
    wanted = anchor_divergence(student[..., :2], teacher[..., :2], one, exclusive)
    assert wanted.item() > 0.01 and found.item() == pytest.approx(wanted.item())
    assert student.grad.abs().min() == student.grad[0, 0, 2] == 0 and torch.isfinite(student.grad).all()
    assert torch.isfinite(binary_kl(torch.tensor([0.3, 0.3]), torch.tensor([-torch.inf, torch.inf]))).all()


def test_box_distance_counts_confident_places_only():
    student, teacher = torch.tensor(random_boxes(4, 1))[None], torch.tensor(random_boxes(4, 2))[None]
    confidence = torch.tensor([[0.9, 0.0, 0.7, 0.0]], dtype=torch.float64)
    wanted = sum(c * (1 - float(giou(s, t))) for c, s, t in zip(confidence[0], student[0], teacher[0], strict=True))
    assert float(box_distance(student, teacher, confidence)) == pytest.approx(float(wanted) / 1.6)
    moved = student.clone()
    moved[0, 1] = torch.tensor([0.0, 0.0, 0.1, 0.1], dtype=torch.float64)
    assert float(box_distance(moved, teacher, confidence)) == float(box_distance(student, teacher, confidence))


def test_matches_are_the_cheapest_first_and_none_twice():
    cost = torch.tensor([[3.0, 1.0], [2.0, 0.5], [9.0, 9.0]])
    other = torch.tensor([[torch.inf, 1.0], [torch.inf, 2.0], [torch.inf, 0.5]])  # what costs infinitely much is none
    rows, columns, is_pair = match(torch.stack([cost, other]))
    assert rows[0].tolist() == [1, 0] and columns[0].tolist() == [1, 0]
    assert is_pair.tolist() == [[True, True], [True, False]] and (rows[1, 0], columns[1, 0]) == (2, 1)
    assert [part.shape for part in match(torch.zeros(3, 1, 4))] == [(3, 1)] * 3
    assert [part.shape for part in match(torch.zeros(3, 0, 4))] == [(3, 0)] * 3


def loss_of(boxes, scores, wanted, labels):
    """Of one image."""
    return set_prediction_loss(boxes[None], scores[None], [wanted], [labels])[0]


def test_images_do_not_matter_to_each_other():
    """However many boxes the others have, and in values and gradients."""
    rng = torch.Generator().manual_seed(3)
    boxes = torch.stack([torch.tensor(random_boxes(7, seed)) for seed in range(4)])
    wanted = [torch.tensor(random_boxes(count, 10 + count)) for count in (3, 0, 1, 9)]  # more than there are places
    labels = [torch.randint(0, 5, (len(row),), generator=rng) for row in wanted]
    scores = torch.rand(4, 7, 5, generator=rng, dtype=torch.float64)
    together, alone = [part.clone().requires_grad_() for part in (boxes, scores)], []
    losses = set_prediction_loss(*together, wanted, labels)
    losses.sum().backward()
    for i in range(4):
        single = [part[i].clone().requires_grad_() for part in (boxes, scores)]
        alone.append(loss_of(*single, wanted[i], labels[i]))
        alone[-1].backward()
        for mine, theirs in zip(single, together, strict=True):
            gradient = torch.zeros_like(mine) if mine.grad is None else mine.grad
            torch.testing.assert_close(gradient, theirs.grad[i])
    torch.testing.assert_close(losses, torch.stack(alone))


def test_set_prediction_loss_by_hand():
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.12, 0.1, 0.42, 0.4], [0.6, 0.6, 0.9, 0.9]], dtype=torch.float64)
    scores = torch.tensor([[0.6, 0.1], [0.3, 0.1], [0.2, 0.1]], dtype=torch.float64)
    wanted, labels = torch.tensor([[0.1, 0.1, 0.4, 0.4]], dtype=torch.float64), torch.tensor([0])
    # The first place is the match and the second repeats it, but for the other class; the third is where nothing is.
    surplus = sum(p**2 * -np.log(1 - p) for p in (0.1, 0.1, 0.2, 0.1))
    assert float(loss_of(boxes, scores, wanted, labels)) == pytest.approx(-np.log(0.6) + surplus)
    empty = wanted[:0], labels[:0]
    everything = sum(p**2 * -np.log(1 - p) for p in scores.flatten().tolist())
    assert float(loss_of(boxes, scores, *empty)) == pytest.approx(everything)
    assert float(loss_of(boxes[:0], scores[:0], wanted, labels)) == 0


def test_the_place_decides_over_what_is_said_there():
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9]])
    scores = torch.tensor([[1e-4], [1e-2]], requires_grad=True)
    loss_of(boxes, scores, boxes[:1], torch.tensor([0])).backward()
    assert float(scores.grad[0, 0]) == pytest.approx(-1e4, rel=1e-3) and float(scores.grad[1, 0]) > 0


def test_a_place_that_says_next_to_nothing_still_learns():
    logits = torch.full((2, 3), -20.0, requires_grad=True)
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.4], [0.6, 0.6, 0.9, 0.9]])
    loss_of(boxes, logits.sigmoid(), boxes[:1], torch.tensor([2])).backward()
    assert float(logits.grad[0, 2]) < -0.5 and float(logits.grad[1].abs().sum()) < 1e-3
