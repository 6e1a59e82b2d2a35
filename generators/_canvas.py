"""Images as sums of waves, in gray and in opponent colors: what is moved in place of the pixels.

Mordvintsev, Pezzotti, Schubert & Olah, "Differentiable Image Parameterizations", Distill 2018
(https://distill.pub/2018/differentiable-parameterizations, "aligned neuron interpolation", preconditioning)::

    images = low + (high - low) * squash(mean + std * mix(inverse_fourier(gain(f) * coefficients)))

with gain(f) ~ 1 / f, the amplitudes of photographs, and ``mix`` from gray and opponent colors to the channels. The same
images can be reached as with pixels (:class:`Pixels`, the same images moved pixel by pixel). What differs is where a
descent goes first: a step of Adam is as long in every coefficient, so that it changes images the way photographs differ
from each other, in large shapes before grain and in brightness before color. A descent on pixels makes colored noise
instead.

Differences from the article: opponent colors are orthonormal and stand for any number of channels, their share of the
variance is one constant, so that no statistics of a data set are in it; the squash has slope 1 in the middle of the
range, so that the start is what it was drawn as.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dfq.generators._filters import TINT, diverse_noise
from dfq.generators._optimization import picture_statistics
from dfq.losses.power_spectrum import pink_gain, radial_frequency
from dfq.teacher import InputSpec

NEAREST = 0.98  # of the way from the middle of the range to its ends, for pixels to start from


class Canvas:
    """Images [N, C, H, W] of any size, as ``spec``'s network takes them, and the coefficients that they are made from.

    Args:
        start: [N, C, H, W] with mean 0 and deviation 1, as noise is drawn.
        clip: keep pixels between black and white.
    """

    def __init__(self, start: Tensor, spec: InputSpec, clip: bool):
        device = start.device
        mean, std = (values.view(-1, 1, 1).to(device) for values in picture_statistics(spec))
        low, high = spec.limits(device)
        self.mean, self.std, self.clip = mean, std, clip
        self.middle, self.reach = (low + high) / 2, (high - low) / 2
        self.size = (start.shape[-2], start.shape[-1])
        gain = pink_gain(radial_frequency(self.size))[:, : self.size[1] // 2 + 1]
        self.gain = gain.to(device)[..., None]
        self.mix = opponent_colors(start.shape[1]).to(device)
        with torch.no_grad():
            self.coefficients = self._coefficients(self._raw(start * std + mean))
        self.coefficients.requires_grad_()

    def __call__(self) -> Tensor:
        waves = torch.view_as_complex(self.coefficients * self.gain)
        colors = torch.fft.irfft2(waves, s=self.size, norm="ortho")
        pixels = torch.einsum("ck,nkhw->nchw", self.mix, colors) * self.std + self.mean
        if self.clip:
            pixels = self.middle + self.reach * torch.tanh((pixels - self.middle) / self.reach)
        return pixels.contiguous(memory_format=torch.channels_last)

    def start(self) -> Tensor:
        """The images as a start [N, C, H, W] of another canvas, of another size perhaps."""
        return (self().detach() - self.mean) / self.std

    def settle(self) -> None:
        """After a step: nothing, images are legal whatever the coefficients."""

    def _raw(self, images: Tensor) -> Tensor:
        """What becomes ``images`` by the squash, in units of deviations."""
        if self.clip:
            way = ((images - self.middle) / self.reach).clamp(-NEAREST, NEAREST)
            images = self.middle + self.reach * torch.atanh(way)
        return (images - self.mean) / self.std

    def _coefficients(self, raw: Tensor) -> Tensor:
        colors = torch.einsum("kc,nchw->nkhw", torch.linalg.inv(self.mix.cpu()).to(raw.device), raw)
        return torch.view_as_real(torch.fft.rfft2(colors, norm="ortho")) / self.gain


class Pixels:
    """The same images with pixels for coefficients, which leave the large shapes that are there.

    Args: those of :class:`Canvas`.
    """

    def __init__(self, start: Tensor, spec: InputSpec, clip: bool):
        self.mean, self.std = (values.view(-1, 1, 1).to(start.device) for values in picture_statistics(spec))
        self.limits = [(limit - self.mean) / self.std for limit in spec.limits(start.device)] if clip else None
        self.size = (start.shape[-2], start.shape[-1])
        self.coefficients = start.detach().clone(memory_format=torch.channels_last)
        self.settle()
        self.coefficients.requires_grad_()

    def __call__(self) -> Tensor:
        return self.coefficients * self.std + self.mean

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: back between black and white, if asked."""
        if self.limits is not None:
            self.coefficients.clamp_(*self.limits)


def photograph_noise(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """:func:`diverse_noise` [N, C, H, W] whose channels go together as those of photographs do."""
    return torch.einsum("ck,nkhw->nchw", opponent_colors(shape[1]), diverse_noise(shape, rng))


def opponent_colors(channels: int) -> Tensor:
    """[C, C] from gray (the first column) and C - 1 opponent colors, each of variance 1, to channels of variance 1.

    Opponent colors have :data:`TINT` times the deviation of gray (Helmert's orthonormal rows).
    """
    rows = torch.zeros(channels, channels)
    rows[0] = 1 / math.sqrt(channels)
    for k in range(1, channels):
        rows[k, :k], rows[k, k] = 1.0, -float(k)
        rows[k] /= math.sqrt(k * (k + 1))
    sizes = torch.ones(channels)
    sizes[1:] = TINT
    return rows.T * sizes * math.sqrt(channels / float(sizes.square().sum()))
