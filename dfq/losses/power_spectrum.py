"""Natural-image spectrum prior: photographs have amplitudes that fall as 1 / f.

Field ("Relations between the statistics of natural images and the response properties of cortical cells", JOSA A 1987):
averaged over directions, the power of photographs falls with the square of the frequency. With P(f) an image's power in
a ring of frequencies and P*(f) that of images of the same size with amplitudes 1 / f and variance 1::

    d = mean over rings of (0.5 log(P(f) / P*(f)))^2

Own formulation: rings half an octave wide (periods of an image from 1 up), the mean of an image left out; the logarithm
of an amplitude, so that fine detail counts as much as what is a thousand times as strong.

The law holds of photographs on average: single ones, and other data (documents, medical images), depart from it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SpectrumDistance:
    """d of images [N, C, H, W] of one ``size`` (H, W), in units of their deviation; [N, C]."""

    def __init__(self, size: tuple[int, int], device: torch.device):
        self.frequency = radial_frequency(size)
        periods = (self.frequency * max(size)).flatten()
        ring = torch.floor(2 * torch.log2(periods.clamp(min=0.5)) + 1e-4).long()  # rounded edges belong to their ring
        numbers = ring[periods > 0].unique()
        member = (ring == numbers[:, None]) & (periods > 0)
        # One product with a small matrix: the gradient of a scattered sum would not be the same from run to run.
        self.mean_of_ring = (member / member.sum(1, keepdim=True)).float().T.to(device)
        gain = pink_gain(self.frequency)
        self.target = (gain.square().flatten().to(device) @ self.mean_of_ring).log()

    def __call__(self, images: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(images - images.mean((2, 3), keepdim=True), norm="ortho")
        power = (spectrum.real.square() + spectrum.imag.square()).flatten(2) @ self.mean_of_ring
        # An image of one pixel has no rings, and no distance.
        return (0.5 * (torch.log(power + 1e-8) - self.target)).square().sum(2) / max(1, len(self.target))


def radial_frequency(size: tuple[int, int]) -> Tensor:
    """[H, W] of a discrete Fourier transform, in cycles a pixel."""
    height, width = size
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width))


def pink_gain(frequency: Tensor) -> Tensor:
    """Amplitudes 1 / f with a mean square of 1; frequency 0 counts as one period an image."""
    gain = 1 / frequency.clamp(min=1 / max(frequency.shape))
    return gain / gain.square().mean().sqrt()
