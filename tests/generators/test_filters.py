"""Filters against NumPy: other formulas, other libraries."""

import numpy as np
import pytest
import torch

from dfq.generators._filters import (
    augment,
    blur_matrix,
    color_jitter,
    crop_resized,
    diverse_noise,
    gaussian_blur,
    low_pass,
    pink_noise,
    shift_reflecting,
)

CPU = torch.device("cpu")
SIZES = [(8, 8), (7, 10), (1, 5), (6, 1), (33, 32)]


def images(size, num_samples=2, channels=3, seed=0):
    return torch.randn(num_samples, channels, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_low_pass_is_that_of_numpy(size):
    """SynQ's filter: distance from the center of the shifted spectrum, the cutoff in periods an image."""
    x = images(size)
    down, right = (np.fft.fftshift(np.fft.fftfreq(n)) for n in size)
    gain = np.exp(-(down[:, None] ** 2 + right[None] ** 2) / (2 * 0.2**2))
    spectrum = np.fft.fftshift(np.fft.fft2(x.numpy().astype(np.float64)), axes=(-2, -1))
    wanted = np.fft.ifft2(np.fft.ifftshift(spectrum * gain, axes=(-2, -1)))
    assert np.abs(wanted.imag).max() < 1e-12
    np.testing.assert_allclose(low_pass(x, 0.2).numpy(), wanted.real, atol=2e-6)


@pytest.mark.parametrize("size, cutoff", [(32, 8), (224, 40)])
def test_low_pass_has_the_papers_cutoff(size, cutoff):
    """exp(-D^2 / (2 D_0^2)) with D and D_0 in periods an image, for a wave of D periods."""
    periods = size // 8
    wave = torch.cos(2 * torch.pi * periods * torch.arange(size) / size).expand(1, 1, size, size)
    passed = low_pass(wave, cutoff / size)
    torch.testing.assert_close(passed, wave * np.exp(-(periods**2) / (2 * cutoff**2)), atol=1e-5, rtol=0)


def test_low_pass_keeps_the_mean_and_takes_the_checkerboard():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    passed = low_pass((board + 3).expand(1, 1, 8, 8), 0.1)
    torch.testing.assert_close(passed, torch.full((1, 1, 8, 8), 3.0))


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.25])
@pytest.mark.parametrize("size", SIZES)
def test_blur_is_a_convolution_with_reflection(size, sigma):
    x = images(size)
    wanted = x.numpy().astype(np.float64)
    for axis in (-2, -1):
        radius = min(int(np.ceil(2 * sigma)), wanted.shape[axis] - 1)
        taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
        taps /= taps.sum()

        def along(row, taps=taps, radius=radius):
            return np.convolve(np.pad(row, radius, mode="reflect"), taps, mode="valid")

        wanted = np.apply_along_axis(along, axis, wanted)
    np.testing.assert_allclose(gaussian_blur(size, sigma, CPU)(x).numpy(), wanted, atol=1e-6)


def test_blur_leaves_constants_and_limits():
    matrix = blur_matrix(9, 0.8)
    torch.testing.assert_close(matrix.sum(1), torch.ones(9))
    assert float(matrix.min()) >= 0  # so no pixel comes to lie outside of its neighbors


def test_no_blur_is_nothing_at_all():
    x = images((4, 4))
    assert gaussian_blur((4, 4), 0.0, CPU)(x) is x


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("offset", [-3, -1, 0, 1, 3])
def test_shift_is_padding_by_reflection_and_cropping(offset, dim):
    x = images((5, 7))
    padding = [(0, 0)] * 4
    padding[dim] = (3, 3)
    padded = np.pad(x.numpy(), padding, mode="reflect")
    wanted = np.take(padded, np.arange(x.shape[dim]) + 3 - offset, axis=dim)
    assert np.array_equal(shift_reflecting(x, offset, dim).numpy(), wanted)


@pytest.mark.parametrize("offset", [-2, 0, 1])
def test_shift_passes_gradients(offset):
    x = images((3, 4), 1, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: shift_reflecting(x, offset, -1), x)


@pytest.mark.parametrize("size", [(32, 32), (32, 20), (8, 8)])
def test_pink_noise_has_the_variance_of_white(size):
    noise = pink_noise((600, 2, *size), torch.Generator().manual_seed(0))
    assert noise.shape == (600, 2, *size) and noise.dtype == torch.float32
    assert float(noise.square().mean()) == pytest.approx(1, abs=0.07) and abs(float(noise.mean())) < 0.05


def test_pink_noise_falls_as_one_over_frequency():
    power = np.abs(np.fft.fft2(pink_noise((400, 1, 32, 32), torch.Generator().manual_seed(0)).numpy())) ** 2
    power = power.mean(axis=(0, 1))
    for periods in (1, 2, 4, 8):
        assert power[periods, 0] / power[2 * periods, 0] == pytest.approx(4, rel=0.35)
        assert power[0, periods] / power[periods, periods] == pytest.approx(2, rel=0.35)


def test_pink_noise_comes_from_the_given_numbers():
    made = [pink_noise((2, 1, 6, 6), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_diverse_noise_varies_between_images_as_photographs_do():
    noise = diverse_noise((2000, 3, 16, 16), torch.Generator().manual_seed(0))
    means = noise.mean((2, 3))
    between, within = float(means.var(0).mean()), float(noise.var((2, 3)).mean())
    assert 0.2 < between / (between + within) < 0.45 and 0.8 < between + within < 1.2
    gray = means.mean(1)  # images differ in brightness more than in tint
    assert float(gray.var()) > 2 * float((means - gray[:, None]).var())
    assert float(noise.std((1, 2, 3)).std()) > 0.15  # and in contrast


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5)])
def test_a_crop_is_the_grid_sample_of_torch(size):
    x, corners = images(size, 3), torch.tensor([[0.0, 0.2, 0.5], [0.4, 0.0, 0.5]])
    sides = torch.tensor([0.6, 0.35, 0.5])
    grids = []
    for corner, side in zip(corners.T, sides, strict=True):
        axes = [2 * (start + side * (torch.arange(n) + 0.5) / n) - 1 for start, n in zip(corner, size, strict=True)]
        grids.append(torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1))
    wanted = torch.nn.functional.grid_sample(x, torch.stack(grids), padding_mode="border", align_corners=False)
    torch.testing.assert_close(crop_resized(x, corners, sides), wanted, atol=2e-5, rtol=0)
    whole = crop_resized(x, torch.zeros(2, 3), torch.ones(3))
    torch.testing.assert_close(whole, x, atol=1e-5, rtol=0)


def test_light_is_changed_as_kornia_does():
    from kornia.enhance import adjust_contrast_with_mean_subtraction

    x = (0.1 * images((6, 5), 3) + 0.5).clamp(0.3, 0.7)  # where kornia does not clip
    ones, factors = torch.ones(3), torch.tensor([0.5, 1.2, 0.9])
    contrast = color_jitter(x[:, :1], ones, factors, torch.zeros(3))
    wanted = [adjust_contrast_with_mean_subtraction(one, float(f)) for one, f in zip(x[:, :1], factors, strict=True)]
    torch.testing.assert_close(contrast, torch.stack(wanted))
    gray = x.mean(1, keepdim=True)
    saturated = color_jitter(x, factors, ones, torch.zeros(3))
    torch.testing.assert_close(saturated, gray + factors.view(3, 1, 1, 1) * (x - gray))
    unit = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    lit = color_jitter(x, ones, ones, torch.tensor([0.0, 1.0, -2.0]), unit)
    torch.testing.assert_close((lit - x).mean((2, 3)), torch.tensor([[0.0] * 3, [1, 2, 4], [-2, -4, -8]]))


def test_images_are_cropped_and_lit_each_in_its_own_way():
    x = images((12, 12), 1).expand(400, -1, -1, -1)
    rng = torch.Generator().manual_seed(0)
    ramp = torch.arange(12.0).expand(400, 1, 12, 12)  # its slope tells how large the part is, its values which one
    shown = augment(ramp, False, 0, rng, crop=0.5)
    slopes = (shown[:, 0, 0, 8] - shown[:, 0, 0, 3]) / 5
    assert 0.5 <= float(slopes.min()) < 0.52 and 0.98 < float(slopes.max()) <= 1.0001
    assert float(shown.min()) >= 0 and float(shown.max()) <= 11 and len(shown[:, 0, 0, 6].unique()) == 400
    lit = augment(x, False, 0, rng, jitter=0.2, unit=3.0)
    assert float((lit.mean((1, 2, 3)) - x.mean((1, 2, 3))).std()) == pytest.approx(0.6, rel=0.15)
    contrast = (lit[:, 0].std((1, 2)) / x[:, 0].std((1, 2))).log()
    assert 0.15 < float(contrast.std()) < 0.4 and abs(float(contrast.mean())) < 0.05
    before = rng.get_state()
    assert augment(x, False, 0, rng) is x and torch.equal(rng.get_state(), before)


def test_crops_pass_gradients():
    x = images((4, 5), 2, 1).double().requires_grad_()
    corners, sides = torch.tensor([[0.1, 0.3], [0.0, 0.25]]).double(), torch.tensor([0.7, 0.5]).double()
    assert torch.autograd.gradcheck(lambda x: crop_resized(x, corners, sides), x)
