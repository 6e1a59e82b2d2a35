"""DeepInversion: which norms are found, what their targets are, and what it comes to."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import NETS, SPEC, as_teacher
from torch import nn

from dfq.generators._base import batch_rng
from dfq.generators._norms import AffineNorms, has_norm, norm_distances
from dfq.generators._statistics import batch_norm_distances
from dfq.generators.deep_inversion import DeepInversion
from dfq.losses.affine_statistics import affine_distance
from dfq.testing import TinyTransformer

QUICK = DeepInversion(iterations=4)
STILL = replace(QUICK, iterations=30, flip=False, class_weight=0.0, variation_weight=0.0)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(generator, teacher, seed=0, index=0, num_samples=8):
    return generator.sample(teacher, num_samples, batch_rng(seed, index), lambda amount: None)


class Groups(nn.Module):
    """A group norm with an activation inside it, one without weight, and a layer norm over several dimensions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2), timm.layers.GroupNormAct(8, 2)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 2), nn.GroupNorm(4, 8, affine=False)
        self.norm3, self.head = nn.LayerNorm([8, 2, 2]), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.norm3(self.norm2(self.conv2(self.norm1(self.conv1(x))))).flatten(1))


def test_distance_is_that_of_numpy():
    x, weight, bias = noise(50, 6) * 2 + 1, noise(6, seed=1), noise(6, seed=2)
    unit = (weight.numpy() ** 2).mean()
    for offset in (bias, None):
        mean = 0 if offset is None else bias.numpy()
        wanted = (x.numpy().mean(0) - mean) ** 2 + (x.numpy().std(0) - np.abs(weight.numpy())) ** 2
        np.testing.assert_allclose(affine_distance(x, weight, offset).numpy(), wanted / unit, rtol=1e-3)


def test_distance_is_zero_where_inputs_are_normalized_channel_by_channel():
    x = noise(100, 5)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0]), noise(5)
    assert float(affine_distance(x * weight + bias, weight, bias).max()) < 1e-4
    assert float(affine_distance(x * weight + bias + 1, weight, bias).min()) > 0.1


def test_constant_outputs_have_a_finite_gradient():
    x = torch.zeros(4, 3, requires_grad=True)
    affine_distance(x, torch.zeros(3)).sum().backward()
    affine_distance(x, torch.ones(3)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_outputs_are_taken_before_the_activation_and_channel_by_channel():
    net, found = as_teacher(Groups()).module, []
    x = noise(4, 3, 8, 8)
    with torch.no_grad(), AffineNorms(lambda *values: found.append(values)):
        net(x)
        first = nn.functional.group_norm(net.conv1(x), 2, net.norm1.weight, net.norm1.bias)
    assert [rows.shape for rows, _, _ in found[:2]] == [(4 * 9, 8), (4, 32)] and len(found) == 3
    torch.testing.assert_close(found[0][0], first.permute(0, 2, 3, 1).reshape(-1, 8))
    assert float(found[0][0].min()) < 0 and torch.equal(found[1][1], net.norm3.weight.flatten())


def test_batch_norms_have_their_running_statistics(make_teacher):
    teacher, x = make_teacher("residual"), noise(6, 3, 8, 8)
    with torch.no_grad(), batch_norm_distances(teacher) as wanted:
        teacher(x)
    with torch.no_grad(), norm_distances(teacher, 0.1) as found:
        teacher(x)
    assert torch.equal(torch.stack(found), torch.stack(wanted))


@pytest.mark.parametrize("make", [Groups, TinyTransformer, NETS["plain"]])
def test_it_comes_closer_than_noise(make):
    teacher, distances = as_teacher(make()), []
    for images in (noise(8, 3, 8, 8).clamp(*SPEC.limits(torch.device("cpu"))), sample(STILL, teacher)):
        with torch.no_grad(), norm_distances(teacher, 0.1) as found:
            teacher(images)
        assert len(found) == 2
        distances.append(float(torch.stack(found).mean()))
    assert distances[1] < 0.8 * distances[0], distances


def test_same_bits_and_legal_pixels():
    teacher = as_teacher(Groups())
    images = sample(replace(QUICK, learning_rate=3.0), teacher)
    assert torch.equal(sample(replace(QUICK, learning_rate=3.0), teacher), images)
    low, high = SPEC.limits(images.device)
    assert (images >= low).all() and (images <= high).all()
    images = sample(replace(QUICK, learning_rate=3.0, clip=False), teacher)
    assert ((images < low) | (images > high)).any()


def test_a_network_that_only_sets_the_range_gets_pictures():
    """Its pixels lie in [0, 1]: a start of variance 1 would be all black and white."""
    net = Groups()
    teacher = as_teacher(net, replace(SPEC, mean=(0.0,) * 3, std=(1.0,) * 3))
    images = sample(replace(QUICK, iterations=1, learning_rate=1e-9, clip=False), teacher, num_samples=64)
    assert float(images.mean()) == pytest.approx(0.45, abs=0.02) and float(images.std()) == pytest.approx(
        0.25, abs=0.02
    )


def test_which_networks_have_a_norm(make_teacher):
    assert not has_norm(make_teacher("bare")) and has_norm(as_teacher(Groups()))
