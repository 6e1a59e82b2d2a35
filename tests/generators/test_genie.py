"""Genie: the network that makes images, swing convolution, and what it comes to."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NETS, SPEC, as_teacher
from torch import nn

from dfq.evaluation import batch_norm_match
from dfq.generators._base import batch_rng
from dfq.generators._filters import drawn_looks
from dfq.generators._network import GeneratorNetwork
from dfq.generators._optimization import picture_statistics
from dfq.generators.gaussian import Gaussian
from dfq.generators.genie import Genie, swing_convolutions
from dfq.teacher import InputSpec
from dfq.teachers.digits import load

SMALL = Genie(iterations=3, num_channels=8)
QUICK = Genie(iterations=40, num_channels=32)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_distance(teacher, images):
    distances = batch_norm_match(teacher, images)
    return sum(distances.values()) / len(distances)


def sample(generator, teacher, seed=0, num_samples=32):
    return generator.sample(teacher, num_samples, batch_rng(seed, 0), lambda amount: None)


@pytest.mark.parametrize("swing", ["independent", "shared", "none"])
def test_it_comes_much_closer_than_noise_on_digits(swing):
    teacher = load()
    noise = mean_distance(teacher, sample(Gaussian(), teacher))
    assert mean_distance(teacher, sample(replace(QUICK, swing=swing), teacher)) < noise / 3


def test_more_iterations_come_closer(make_teacher):
    teacher = make_teacher("plain")
    few, many = (mean_distance(teacher, sample(replace(QUICK, iterations=n), teacher)) for n in (2, 60))
    assert many < few * 0.75


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 7, 9), (4, 30, 33), (3, 70, 65), (1, 3, 4), (2, 20, 100)])
@pytest.mark.parametrize("num_samples", [1, 5])
def test_any_channels_and_any_size(size, num_samples):
    net = nn.Sequential(nn.Conv2d(size[0], 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(10))
    net(torch.zeros(2, *size))
    spec = InputSpec(size, (0.4,) * size[0], (0.2,) * size[0])
    images = sample(SMALL, as_teacher(net, spec), num_samples=num_samples)
    assert images.shape == (num_samples, *size) and torch.isfinite(images).all() and float(images.std()) > 0.1
    low, high = spec.limits(images.device)
    assert (images >= low).all() and (images <= high).all()


def test_pixels_leave_the_limits_where_they_may(make_teacher):
    teacher = make_teacher("plain")
    low, high = SPEC.limits(teacher.device)
    outside = [
        float(((images < low - 1e-5) | (images > high + 1e-5)).float().mean())
        for images in (sample(replace(SMALL, clip=clip, low_pass=0.4), teacher) for clip in (True, False))
    ]
    assert outside[0] == 0 < outside[1]


# ------------------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 32, 32), (3, 64, 64), (3, 96, 80), (3, 224, 224), (3, 640, 640)])
def test_network_has_under_ten_million_parameters(size):
    network = GeneratorNetwork(size, 256, 128, rng())
    count = sum(p.numel() for p in network.parameters())
    assert 1e5 < count < 1e7
    latents = int(np.prod(network.latent_shape))
    patches = 1 if max(size[1:]) <= 64 else size[1] * size[2] / 32**2
    assert latents == pytest.approx(256 * patches, rel=0.05)


def test_the_first_layer_is_the_one_that_was_asked_for(make_teacher):
    linear = GeneratorNetwork((3, 96, 80), 20, 8, rng(), kind="linear")  # at 224 pixels, 256 latents, 128 channels:
    assert linear.latent_shape == (20,) and linear.first[0].weight.shape == (8 * 24 * 20, 20)  # [401408, 256]
    assert [part.weight.shape[:2] for part in linear.layers if isinstance(part, nn.Conv2d)] == [(4, 8), (3, 4)]
    assert linear(torch.randn(2, 20)).shape == (2, 3, 96, 80)
    for size, places in (((3, 32, 32), (2, 2)), ((3, 64, 20), (4, 2)), ((3, 8, 8), (2, 2))):
        network = GeneratorNetwork(size, 256, 8, rng(), kind="convolutional")
        assert network.latent_shape == (64, *places)
        assert network(torch.randn(1, *network.latent_shape)).shape == (1, *size)
    for size, kind in (((3, 64, 64), "linear"), ((3, 65, 64), "convolutional")):
        auto, named = (GeneratorNetwork(size, 16, 8, rng(), kind=kind) for kind in ("auto", kind))
        assert all(map(torch.equal, auto.parameters(), named.parameters()))
    teacher = make_teacher("plain")
    images = [sample(replace(SMALL, network=kind), teacher) for kind in ("auto", "linear", "convolutional")]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_network_of_the_paper():
    """Layer by layer, computed with functions of torch."""
    network = GeneratorNetwork((3, 32, 32), 256, 128, rng())
    z = torch.randn(6, 256, generator=rng(1))
    p, f = dict(network.named_parameters()), nn.functional
    x = f.linear(z, p["first.0.weight"], p["first.0.bias"]).view(6, 128, 8, 8)
    x = f.batch_norm(x, None, None, p["layers.0.weight"], p["layers.0.bias"], training=True)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = f.conv2d(x, p["layers.2.weight"], p["layers.2.bias"], padding=1)
    x = f.batch_norm(x, None, None, p["layers.3.weight"], p["layers.3.bias"], training=True)
    x = torch.where(x > 0, x, 0.2 * x).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = f.conv2d(x, p["layers.6.weight"], p["layers.6.bias"], padding=1).tanh()
    wanted = (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), keepdim=True, correction=0).add(1e-5).sqrt()
    torch.testing.assert_close(network(z), wanted, rtol=1e-4, atol=1e-4)
    assert len(p) == 10


def test_network_is_drawn_as_torch_draws_and_from_its_own_numbers_alone():
    state = torch.get_rng_state()
    first, again, other = (GeneratorNetwork((3, 16, 16), 64, 32, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and (not torch.equal(a, c) or bool((a == a[0]).all()))  # batch norms are alike
    linear, conv = first.first[0], first.layers[2]
    for layer, fan_in in ((linear, 64), (conv, 32 * 9)):
        same_kind = nn.Linear(64, 512) if layer is linear else nn.Conv2d(32, 16, 3)
        assert layer.weight.abs().max() <= fan_in**-0.5 and layer.bias.abs().max() <= fan_in**-0.5
        assert float(layer.weight.std().detach()) == pytest.approx(float(same_kind.weight.std().detach()), rel=0.05)
    for norm in (first.layers[0], first.layers[3]):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_network_is_trained_with_the_latents(make_teacher, monkeypatch):
    """Neither alone: where one's step is next to nothing, the images differ from those of both."""
    teacher, tiny = make_teacher("plain"), 1e-12
    both = sample(SMALL, teacher)
    for still in ({"latent_learning_rate": tiny}, {"network_learning_rate": tiny}):
        assert not torch.allclose(sample(replace(SMALL, **still), teacher), both, atol=1e-3)
    start = sample(replace(SMALL, latent_learning_rate=tiny, network_learning_rate=tiny), teacher)
    numbers = batch_rng(0, 0)
    network = GeneratorNetwork(SPEC.size, 256, 8, numbers)
    with torch.no_grad():
        made = network(torch.randn(32, 256, generator=numbers))
    torch.testing.assert_close(start, made.clamp(*SPEC.limits(teacher.device)), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_of_a_network_that_normalizes_by_their_deviation():
    for std in ((0.25, 0.2, 0.3), (0.3756, 0.3, 0.3)):
        mean, deviation = picture_statistics(InputSpec((3, 8, 8), (0.5, 0.4, 0.3), std))
        assert mean.tolist() == [0, 0, 0] and deviation.tolist() == [1, 1, 1]


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.5), (0.4, 1 / 255)])
def test_pictures_of_a_network_that_only_sets_the_range(mean, std, make_teacher):
    """[0, 1], [-1, 1], bytes: gray in the mean, and few pixels black or white."""
    spec = InputSpec((3, 8, 8), (mean,) * 3, (std,) * 3)
    net = as_teacher(NETS["plain"](), spec)
    images = sample(replace(SMALL, iterations=1), net) * std + mean
    assert float(images.mean()) == pytest.approx(0.45, abs=0.05) and float(images.std()) == pytest.approx(
        0.25, abs=0.05
    )
    assert float(((images < 0.001) | (images > 0.999)).float().mean()) < 0.1


def test_image_weight_makes_images_equally_bright(make_teacher):
    teacher = make_teacher("plain")
    alike = [replace(QUICK, looks="alike", image_weight=weight) for weight in (0.0, 50.0)]
    spread = [float(sample(genie, teacher).mean((2, 3)).std(0).mean()) for genie in alike]
    assert spread[1] < spread[0] / 2


def test_images_get_the_looks_that_were_drawn_for_them(make_teacher):
    """Brightness and tint of each, and contrast; 32 images, so a tenth of a correlation is chance twice over."""
    genie, teacher = replace(SMALL, image_weight=50.0), make_teacher("plain")
    images, numbers = sample(genie, teacher), batch_rng(0, 0)
    network = GeneratorNetwork(SPEC.size, 256, 8, numbers)
    torch.randn(32, *network.latent_shape, generator=numbers)
    brightness, tint, contrast = drawn_looks(32, 3, numbers)

    def correlation(a, b):
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    assert correlation(images.mean((2, 3)), brightness + tint) > 0.8
    assert correlation(images.std((2, 3)), contrast.expand(-1, 3)) > 0.5
    alike = sample(replace(genie, looks="alike"), teacher)
    assert correlation(alike.mean((2, 3)), brightness + tint) < 0.4


# ------------------------------------------------------------------------------------------------ swing


class Strided(nn.Module):
    """A block with a shortcut, both with strides, and a stride along one axis behind it."""

    def __init__(self):
        super().__init__()
        self.branch, self.shortcut = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(2, 4, 1, 2)
        self.same, self.narrow = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, (1, 2), 1)

    def forward(self, x):
        return self.narrow(self.same(self.branch(x) + self.shortcut(x)))


def watched(net, x, swing, num_forwards, seed=0):
    """What each convolution read in each forward under swing: what its hooks before the call left."""
    seen = []
    with swing_convolutions(net, rng(seed), swing):
        handles = [
            conv.register_forward_hook(lambda conv, args, out, name=name: seen.append((name, args[0], out)))
            for name, conv in net.named_children()
        ]
        for _ in range(num_forwards):
            net(x)
        for handle in handles:
            handle.remove()
    return [{name: (x, out) for name, x, out in seen[i : i + 4]} for i in range(0, len(seen), 4)]


def crop_number(moved, x, down=(0, 1, 2)):
    """Which of the crops of the padded input it is; (1, 1): the input itself."""
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect")
    height, width = x.shape[2:]
    crops = {(i, j): padded[:, :, i : i + height, j : j + width] for i in down for j in range(3)}
    found = [number for number, crop in crops.items() if np.array_equal(moved.numpy(), crop)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 4)])
@torch.no_grad()
def test_swing_moves_what_strided_convolutions_read(size):
    net, x = Strided().eval(), torch.randn(3, 2, *size, generator=rng())
    before, state = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    forwards, drawn = watched(net, x, "independent", 60), {"branch": set(), "shortcut": set()}
    together = 0
    for calls in forwards:
        moves = {name: crop_number(calls[name][0], x) for name in drawn}
        together += moves["branch"] == moves["shortcut"]
        for name, move in moves.items():
            drawn[name].add(move)
            conv, (moved, output) = getattr(net, name), calls[name]
            wanted = nn.functional.conv2d(moved, conv.weight, conv.bias, 2, conv.padding)
            torch.testing.assert_close(output, wanted)
        assert torch.equal(calls["same"][0], calls["branch"][1] + calls["shortcut"][1])  # not moved
        assert calls["narrow"][1].shape == before.shape
    assert drawn["branch"] == drawn["shortcut"] == {(i, j) for i in range(3) for j in range(3)}
    assert together < 30
    assert torch.equal(net(x), before) and not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@torch.no_grad()
def test_shared_swing_is_one_move_for_maps_of_one_size():
    net, x = Strided().eval(), torch.randn(3, 2, 8, 8, generator=rng())
    moves = [crop_number(calls["branch"][0], x) for calls in watched(net, x, "shared", 40)]
    assert [crop_number(calls["shortcut"][0], x) for calls in watched(net, x, "shared", 40)] == moves
    assert len(set(moves)) > 5


@torch.no_grad()
def test_an_axis_without_stride_stays():
    net, x = Strided().eval(), torch.randn(3, 2, 8, 8, generator=rng())
    for calls in watched(net, x, "shared", 20):
        crop_number(calls["narrow"][0], calls["same"][1], down=(1,))


@torch.no_grad()
def test_no_swing_and_maps_that_cannot_move():
    net, x = Strided().eval(), torch.randn(3, 2, 8, 8, generator=rng())
    assert all(torch.equal(calls["branch"][0], x) for calls in watched(net, x, "none", 5))
    x = torch.randn(3, 2, 1, 1, generator=rng())
    assert all(torch.equal(calls["branch"][0], x) for calls in watched(net, x, "independent", 5))


def test_swing_gives_every_pixel_a_gradient():
    """A stride of 2 in a 1x1 convolution reads a quarter of the pixels; under swing all are read in turn."""
    conv, x = nn.Conv2d(1, 1, 1, 2), torch.ones(1, 1, 8, 8, requires_grad=True)
    conv(x).sum().backward()
    assert int((x.grad != 0).sum()) == 16
    with swing_convolutions(conv, rng()):
        for _ in range(40):
            conv(x).sum().backward()
    assert (x.grad != 0).all()


# ------------------------------------------------------------------------------------------------ mistakes
