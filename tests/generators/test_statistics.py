"""The loop that generators share, and batch-norm statistics."""

import numpy as np
import pytest
import torch
from torch import nn

from dfq.evaluation import batch_norm_match
from dfq.generators._filters import low_pass
from dfq.generators._optimization import cosine, finish, optimize
from dfq.generators._statistics import batch_norm_distances, input_statistics
from dfq.teacher import InputSpec, Teacher


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_statistics_of_the_batch_and_of_each_image():
    x = noise(6, 4, 5, 3) * 2 + 1
    for statistics, axes in (("batch", (0, 2, 3)), ("image", (2, 3))):
        mean, variance = input_statistics(x, statistics)
        np.testing.assert_allclose(mean.numpy(), x.numpy().mean(axes), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(variance.numpy(), x.numpy().var(axes), rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 1, 1)])
def test_one_value_a_channel_has_no_statistics_of_its_own(shape):
    x = noise(*shape)
    for found, wanted in zip(input_statistics(x, "image"), input_statistics(x, "batch"), strict=True):
        assert torch.equal(found, wanted)


def test_distances_are_those_the_report_shows(make_teacher):
    teacher, images = make_teacher("residual"), noise(16, 3, 8, 8)
    with torch.no_grad(), batch_norm_distances(teacher) as distances:
        teacher(images)
    assert distances == pytest.approx(list(batch_norm_match(teacher, images).values()), rel=1e-4)


def test_each_image_counts_where_statistics_are_those_of_images(make_teacher):
    """The mean of what each image alone, as a batch of one, would give."""
    teacher, images = make_teacher("residual"), noise(5, 3, 8, 8)
    with torch.no_grad(), batch_norm_distances(teacher, "image") as together:
        teacher(images)
    alone = []
    for image in images:
        with torch.no_grad(), batch_norm_distances(teacher) as distances:
            teacher(image[None])
        alone.append(torch.stack(distances))
    torch.testing.assert_close(torch.stack(together), torch.stack(alone).mean(0))


def test_steps_are_taken_by_every_optimizer_along_its_schedule(make_teacher):
    """Plain gradient descent: what has moved is minus the rates times the gradients, computed here without the loop."""
    teacher = make_teacher("plain")
    parts = [noise(4, 3, 8, 8).requires_grad_(), torch.zeros(3, 1, 1, requires_grad=True)]
    optimizers = [torch.optim.SGD([part], lr=lr) for part, lr in zip(parts, (0.5, 0.1), strict=True)]
    expected, wanted_losses = [part.detach().clone() for part in parts], []
    for step in range(3):
        leaves = [part.requires_grad_() for part in expected]
        with batch_norm_distances(teacher) as distances:
            loss = 2 * teacher(leaves[0] + leaves[1]).square().mean()
        loss = loss + torch.stack(distances).mean()
        gradients = torch.autograd.grad(loss, leaves)
        rate = 0.5 * (1 + np.cos(np.pi * step / 3))
        expected = [
            (part - rate * lr * gradient).detach()
            for part, lr, gradient in zip(leaves, (0.5, 0.1), gradients, strict=True)
        ]
        wanted_losses.append(float(loss.detach()))
    losses, done, steps = [], [], []
    optimize(
        teacher,
        batch_norm_distances(teacher),
        lambda: parts[0] + parts[1],
        [cosine(optimizer, 3) for optimizer in optimizers],
        3,
        done.append,
        penalty=lambda images, outputs: 2 * outputs.square().mean(),
        observe=lambda loss: losses.append(float(loss)),
        after_step=lambda: steps.append(torch.is_grad_enabled()),
    )
    for found, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(wanted_losses, rel=1e-4)
    assert sum(done) == pytest.approx(4) and steps == [False] * 3


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("cutoff", [0.0, 0.2])
def test_finished_images_are_filtered_and_then_legal(clip, cutoff):
    images = noise(4, 1, 6, 6) * 3
    found = finish(images, InputSpec((1, 6, 6), (0.5,), (0.5,)), cutoff, clip)
    wanted = low_pass(images, cutoff) if cutoff else images
    assert float(wanted.abs().max()) > 1  # black and white are -1 and 1
    torch.testing.assert_close(found, wanted.clamp(-1, 1) if clip else wanted)


class Counted(nn.Module):
    """A network that is called as often as the loop says, each time in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.seen = nn.BatchNorm2d(3), []

    def forward(self, x):
        self.seen.append(self.training)
        return self.norm(x)


def test_one_forward_a_step_in_evaluation_mode():
    net = Counted()
    teacher = Teacher(net, "classification", InputSpec((3, 4, 4), (0.5,) * 3, (0.25,) * 3))
    assert list(teacher.batch_norms) == ["norm"]
    net.train()
    net.seen.clear()
    pixels = noise(2, 3, 4, 4).requires_grad_()
    schedule = cosine(torch.optim.SGD([pixels], lr=0.1), 4)
    optimize(teacher, batch_norm_distances(teacher), lambda: pixels, [schedule], 4, lambda amount: None)
    assert net.seen == [False] * 4 and net.training and int(net.norm.num_batches_tracked) == 0
