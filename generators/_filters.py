"""Filters and shifts of images that generators share: pure functions, for any size, differentiable, deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.losses.power_spectrum import pink_gain, radial_frequency

# Of the variance of photographs about a third lies between images (in units of the input's deviation).
BRIGHTNESS, TINT, LEAST_CONTRAST, CONTRASTS = 0.45, 0.2, 0.4, 0.8
PHOTOGRAPH_BLUR = 0.8  # pixels
SMALLEST_PHOTOGRAPH = 32  # pixels of the shorter side; smaller images (digits of 8x8) have strokes of one pixel


def low_pass(images: Tensor, cutoff: float) -> Tensor:
    """Damp fine detail: the spectrum times exp(-f^2 / (2 cutoff^2)).

    SynQ (Kim et al., ICLR 2025) states the frequency D and the cutoff D_0 in periods an image; here both are in cycles
    a pixel, D / size and D_0 / size, so that one cutoff serves every size (its 8 of 32 pixels is 0.25 here).

    Args:
        images: [N, C, H, W].
        cutoff: standard deviation of the filter, in cycles a pixel (the finest that pixels can hold is 0.5).
    """
    height, width = images.shape[-2:]
    vertical = torch.fft.fftfreq(height, device=images.device)[:, None]
    horizontal = torch.fft.rfftfreq(width, device=images.device)
    gain = torch.exp(-(vertical.square() + horizontal.square()) / (2 * cutoff**2))
    return torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=(height, width))


def pink_noise(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Gaussian noise [N, C, H, W] of variance 1 with amplitudes that fall as 1 / f, as those of photographs do."""
    gain = pink_gain(radial_frequency((shape[-2], shape[-1])))
    return torch.fft.ifft2(torch.fft.fft2(torch.randn(shape, generator=rng)) * gain).real


def white_noise(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Gaussian noise [N, C, H, W] of variance 1."""
    return torch.randn(shape, generator=rng)


def diverse_noise(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Pink noise [N, C, H, W] with a brightness, a tint and a contrast of each image's own, of variance 1 or so."""
    brightness, tint, contrast = (x[..., None, None] for x in drawn_looks(shape[0], shape[1], rng))
    return contrast * pink_noise(shape, rng) + brightness + tint


def drawn_looks(num_samples: int, num_channels: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Brightness [N, 1], tint [N, C] (to be added) and contrast [N, 1], as they differ between photographs."""
    brightness = BRIGHTNESS * torch.randn(num_samples, 1, generator=rng)
    tint = TINT * torch.randn(num_samples, num_channels, generator=rng)
    return brightness, tint, LEAST_CONTRAST + CONTRASTS * torch.rand(num_samples, 1, generator=rng)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbors, down plus right, of images [N, C, H, W]; scalar."""
    return sum(
        (images.diff(dim=dim).abs().mean() for dim in (-2, -1) if images.shape[dim] > 1), start=images.new_zeros(())
    )


def gaussian_blur(size: tuple[int, int], sigma: float, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that blurs images [N, C, H, W] of ``size`` (H, W); ``sigma`` in pixels, 0: it gives them back.

    Two products with small matrices, reflection at the border folded in: the gradient of a reflecting pad would not be
    the same from run to run on a GPU.
    """
    if sigma == 0:
        return lambda images: images
    rows, columns = (blur_matrix(length, sigma).to(device) for length in size)
    return lambda images: (rows @ images @ columns.T).contiguous(memory_format=torch.channels_last)


def photograph_blur(size: tuple[int, ...]) -> float:
    """Deviation in pixels of the blur under which pixels of photographs of ``size`` (H, W) are moved; 0 for icons."""
    return PHOTOGRAPH_BLUR if min(size) >= SMALLEST_PHOTOGRAPH else 0.0


def blur_matrix(length: int, sigma: float) -> Tensor:
    """[length, length] that blurs along one axis: a Gaussian cut off at 2 sigma, its weights summing to 1."""
    radius = min(math.ceil(2 * sigma), length - 1)
    taps = torch.arange(-radius, radius + 1)
    weights = torch.exp(-taps.square() / (2 * sigma**2))
    source = (torch.arange(length)[:, None] + taps).abs()
    source = length - 1 - (length - 1 - source).abs()
    return torch.zeros(length, length).scatter_add_(1, source, (weights / weights.sum()).expand(length, -1))


def shift_reflecting(images: Tensor, offset: int, dim: int) -> Tensor:
    """Move content by ``offset`` places along ``dim`` (backwards if negative), the gap filled by reflection.

    As padding by reflection and cropping, with a gradient that is the same from run to run on a GPU.
    """
    length, distance = images.shape[dim], abs(offset)
    if distance == 0:
        return images
    if offset > 0:
        gap, rest = images.narrow(dim, 1, distance), images.narrow(dim, 0, length - distance)
    else:
        gap, rest = images.narrow(dim, length - 1 - distance, distance), images.narrow(dim, distance, length - distance)
    parts = [gap.flip(dim), rest] if offset > 0 else [rest, gap.flip(dim)]
    return torch.cat(parts, dim)


def augment(
    images: Tensor,
    flip: bool,
    shift: int,
    rng: torch.Generator,
    crop: float = 0.0,
    jitter: float = 0.0,
    unit: Tensor | float = 1.0,
) -> Tensor:
    """``images`` [N, C, H, W] as they are shown this time.

    Random numbers are drawn on the CPU, so nothing waits; kornia's augmentations would draw them from the global ones.

    Args:
        flip, shift: mirrored in half of the cases, and moved by up to so many pixels; one draw for all of them
            (DeepInversion, Yin et al., CVPR 2020, arXiv 1912.08795).
        crop: of each image a part of its own at full size, whose sides lack up to this share: what is small in an image
            is looked at closely too (IntraQ's local object reinforcement, Zhong et al., CVPR 2022, arXiv 2111.09136,
            which crops half of the images at a time).
        jitter: each image with a saturation, a contrast and a brightness of its own, see :func:`color_jitter`: the
            deviation of their logarithms, and of the brightness in the ``unit`` given, broadcast to images.
    """
    if crop:
        sides = 1 - crop * torch.rand(len(images), generator=rng)
        images = crop_resized(images, (1 - sides) * torch.rand(2, len(images), generator=rng), sides)
    if flip and torch.rand((), generator=rng) < 0.5:
        images = images.flip(-1)
    if shift:
        down, right = torch.randint(-shift, shift + 1, (2,), generator=rng).tolist()
        images = shift_reflecting(shift_reflecting(images, down, -2), right, -1)
    if jitter:
        saturation, contrast, brightness = jitter * torch.randn(3, len(images), generator=rng)
        images = color_jitter(images, saturation.exp(), contrast.exp(), brightness, unit)
    return images


def crop_resized(images: Tensor, corners: Tensor, sides: Tensor) -> Tensor:
    """A part of each of ``images`` [N, C, H, W] at full size, by bilinear interpolation.

    As products of matrices, whose gradient is the same from run to run on a GPU.

    Args:
        corners: [2, N], where it begins from above and from the left, in shares of the image.
        sides: [N], how large it is.
    """
    device, (height, width) = images.device, images.shape[-2:]
    sides, corners = sides.to(device), corners.to(device)
    rows, columns = _enlarging(height, corners[0], sides), _enlarging(width, corners[1], sides)
    return (rows @ images @ columns.mT).contiguous(memory_format=torch.channels_last)


def _enlarging(length: int, start: Tensor, side: Tensor) -> Tensor:
    """[N, 1, length, length] that makes the part of ``side`` behind ``start`` [N] of a line of pixels the whole."""
    places = torch.arange(length, device=side.device)
    source = length * start[:, None] + (places + 0.5) * side[:, None] - 0.5
    return (1 - (source.clamp(0, length - 1)[:, None, :, None] - places).abs()).clamp(min=0)


def color_jitter(
    images: Tensor, saturation: Tensor, contrast: Tensor, brightness: Tensor, unit: Tensor | float = 1.0
) -> Tensor:
    """Images [N, C, H, W] in other light, as photographs are changed for training; not cut off at black and white.

    Args:
        saturation: [N], factor on what sets a pixel's channels apart from their mean.
        contrast: [N], factor on what sets a pixel apart from its image's mean.
        brightness: [N], to be added, in units of ``unit``.
    """
    device = images.device
    saturation, contrast, brightness = (x.to(device).view(-1, 1, 1, 1) for x in (saturation, contrast, brightness))
    images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
    return torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast) + brightness * unit


def check_shift(shift: int, size: tuple[int, ...]) -> None:
    """A reflection has no more pixels than the image (C, H, W)."""
    if shift >= min(size[1:]):
        raise UserError(
            f"got generator.shift={shift} and images of {size[1]}x{size[2]} pixels",
            f"a whole number from 0 to {min(size[1:]) - 1}",
        )
