"""Spectrum: the prior against NumPy, stretching, and networks without any normalization."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SPEC
from torch import nn

from dfq.errors import UserError
from dfq.generators._base import batch_rng
from dfq.generators._filters import pink_noise, total_variation
from dfq.generators._optimization import mean_log_range
from dfq.generators.spectrum import Spectrum
from dfq.losses.output_stretching import log_output_range
from dfq.losses.power_spectrum import SpectrumDistance
from dfq.teacher import InputSpec, Teacher

CPU = torch.device("cpu")
QUICK = Spectrum(iterations=20, flip=False)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(generator, teacher, seed=0, index=0, num_samples=8):
    return generator.sample(teacher, num_samples, batch_rng(seed, index), lambda amount: None)


# ------------------------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize("size", [(16, 16), (12, 20), (7, 5), (1, 9)])
def test_distance_is_that_of_numpy(size):
    """Ring by ring, with NumPy's transform."""
    images = noise(2, 3, *size)
    down, right = (np.fft.fftfreq(n) for n in size)
    frequency = np.hypot(down[:, None], right)
    gain = 1 / np.maximum(frequency, 1 / max(size))
    gain /= np.sqrt((gain**2).mean())
    power = np.abs(np.fft.fft2(images.numpy().astype(np.float64))) ** 2 / np.prod(size)
    ring = np.where(frequency > 0, np.floor(2 * np.log2(np.maximum(frequency * max(size), 0.5)) + 1e-4), -1)
    errors = [
        0.5 * np.log(power[..., ring == k].mean(-1) / (gain[ring == k] ** 2).mean()) for k in np.unique(ring) if k >= 0
    ]
    np.testing.assert_allclose(SpectrumDistance(size, CPU)(images).numpy(), np.square(errors).mean(0), rtol=1e-3)


def test_pink_noise_is_close_and_white_noise_is_not():
    distance = SpectrumDistance((32, 32), CPU)
    pink = pink_noise((20, 3, 32, 32), torch.Generator().manual_seed(0))
    near, far, flat = (float(distance(x).mean()) for x in (pink, noise(20, 3, 32, 32), 0.1 * pink))
    assert near < 0.3 < far / 3 and flat > 4, (near, far, flat)  # without contrast it is no picture either


def test_rings_hold_every_frequency_once():
    for size in ((8, 8), (9, 6)):
        member = SpectrumDistance(size, CPU).mean_of_ring > 0
        assert member.sum(1).tolist() == [0] + [1] * (size[0] * size[1] - 1)


def test_one_pixel_and_one_color_have_no_distance():
    assert SpectrumDistance((1, 1), CPU)(noise(2, 3, 1, 1)).tolist() == [[0] * 3] * 2
    flat = torch.ones(1, 1, 8, 8, requires_grad=True)
    SpectrumDistance((8, 8), CPU)(flat).sum().backward()
    assert torch.isfinite(flat.grad).all()


def test_range_of_outputs():
    x = noise(4, 3, 2)
    wanted = np.log(np.ptp(x.numpy().reshape(4, 6), axis=1)).mean()
    assert float(log_output_range(x)) == pytest.approx(wanted, rel=1e-5)
    one_each = noise(6, 1)
    assert float(log_output_range(one_each)) == pytest.approx(np.log(np.ptp(one_each.numpy())), rel=1e-5)
    equal = torch.ones(2, 4, requires_grad=True)
    log_output_range(equal).backward()
    assert equal.grad.abs().sum() == 0
    several = [{"a": (x * 2).requires_grad_()}, (x.requires_grad_(), torch.arange(3))]
    assert float(mean_log_range(several, "").detach()) == pytest.approx(wanted + np.log(2) / 2, rel=1e-5)


def test_total_variation():
    x = noise(2, 3, 5, 4)
    wanted = np.abs(np.diff(x.numpy(), axis=2)).mean() + np.abs(np.diff(x.numpy(), axis=3)).mean()
    assert float(total_variation(x)) == pytest.approx(wanted, rel=1e-5)
    assert float(total_variation(noise(1, 1, 1, 1))) == 0


# ------------------------------------------------------------------------------------------------ what it makes


def test_stretching_widens_the_outputs_and_the_spectrum_stays(make_teacher):
    teacher, ranges, distances = make_teacher("bare"), [], []
    for weight in (0.0, 1.0):
        images = sample(replace(QUICK, stretch_weight=weight), teacher)
        with torch.no_grad():
            ranges.append(float(log_output_range(teacher(images))))
        distances.append(float(SpectrumDistance((8, 8), CPU)(images).mean()))
    white = float(SpectrumDistance((8, 8), CPU)(noise(8, 3, 8, 8)).mean())
    assert ranges[1] > ranges[0] + 0.3 and max(distances) < white, (ranges, distances, white)


def test_more_steps_come_closer_to_the_spectrum(make_teacher):
    teacher, distance = make_teacher("bare"), SpectrumDistance((8, 8), CPU)
    generator = replace(QUICK, stretch_weight=0.0, warmup=0.0, learning_rate=0.05)
    one, many = (float(distance(sample(replace(generator, iterations=n), teacher)).mean()) for n in (1, 30))
    assert many < 0.7 * one


def upscaler():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.PixelShuffle(2))


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = upscaler()

    def forward(self, x):
        return [{"boxes": self.net(x), "labels": torch.ones(3, dtype=torch.int64)}]


@pytest.mark.parametrize("make", [upscaler, Boxes])
@pytest.mark.parametrize("size", [(1, 12, 9), (1, 8, 8)])
def test_networks_without_norms_or_classes(make, size):
    """Legal pixels in [0, 1], the same from run to run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = Teacher(make(), "classification", InputSpec(size, (0.0,), (1.0,)))
    images = sample(replace(QUICK, learning_rate=3.0), teacher)
    assert images.shape == (8, *size) and 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(sample(replace(QUICK, learning_rate=3.0), teacher), images)
    assert not torch.equal(sample(replace(QUICK, learning_rate=3.0), teacher, seed=1), images)
    outside = sample(replace(QUICK, learning_rate=3.0, clip=False), teacher)
    assert float(outside.max()) > 1


def test_outputs_that_do_not_follow_the_input():
    class Codes(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    teacher = Teacher(Codes(), "classification", SPEC)
    with pytest.raises(UserError) as error:
        sample(QUICK, teacher)
    assert str(error.value) == (
        "got a Tensor from the network, without a tensor that its input has a gradient to; allowed: a network whose "
        "outputs follow its input, for generator.stretch_weight; set generator.stretch_weight=0, which leaves the "
        "spectrum alone"
    )
    assert sample(replace(QUICK, stretch_weight=0.0), teacher).isfinite().all()
