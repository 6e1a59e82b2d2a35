"""Images with the spectrum of photographs that stretch a network's outputs: for networks without any normalization.

Nothing in such a network (super-resolution, restoration, a graph whose batch norms are folded) says what its inputs
looked like, so the images get what photographs have in general, and the outputs are driven apart::

    images = argmin  spectrum_weight * spectrum_distance(images) + picture_weight * picture_distance(images)
                     - stretch_weight * log(max - min of the teacher's outputs)

spectrum_distance is that of amplitudes to 1 / f (Field, JOSA A 1987; :mod:`dfq.losses.power_spectrum`),
picture_distance that of each image's mean and deviation a channel to those of pictures, the last term output
distribution stretching (Sony MCT, WACV 2025, arXiv 2410.22110; :mod:`dfq.losses.output_stretching`). The images start
as noise with that spectrum. Any task and any network will do; labels, classes and norms play no part.

Differences from MCT: there the stretching accompanies batch-norm statistics; here the spectrum holds the images
instead. The defaults were not tuned on a trained network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfq.generators._filters import pink_noise
from dfq.generators._optimization import mean_log_range, picture_distance, picture_statistics
from dfq.generators._pixels import PixelGenerator
from dfq.losses.power_spectrum import SpectrumDistance
from dfq.progress import Advance
from dfq.settings import NonNegativeFloat, PositiveInt
from dfq.teacher import InputSpec, Teacher


@dataclass(frozen=True)
class Spectrum(PixelGenerator):
    """Gradient descent on the pixels of one batch at a time."""

    iterations: PositiveInt = 100  # steps per batch
    variation_weight: NonNegativeFloat = 0.0  # weight of the total variation: mean difference of neighbors; 0: none
    spectrum_weight: NonNegativeFloat = 1.0  # weight of the spectrum's distance from that of photographs
    picture_weight: NonNegativeFloat = 1.0  # weight of each image's own mean and deviation
    stretch_weight: NonNegativeFloat = 0.1  # weight of the logarithm of the outputs' range

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        spec = teacher.input_spec
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        size = self.image_size(teacher)
        mean, std = (values.to(teacher.device) for values in picture_statistics(spec))
        distances: dict[tuple[int, ...], SpectrumDistance] = {}

        def penalty(images: Tensor, outputs: Any) -> Tensor:
            height, width = images.shape[-2:]
            if (height, width) not in distances:
                distances[height, width] = SpectrumDistance((height, width), teacher.device)
            spectrum = distances[height, width]((images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)).mean()
            pictures = picture_distance(images, mean, std)
            loss = self.spectrum_weight * spectrum + self.picture_weight * pictures
            if self.stretch_weight > 0:
                loss = loss - self.stretch_weight * mean_log_range(outputs, "the spectrum alone")
            return loss

        noise = pink_noise((num_samples, *size), rng)
        return self.descend(teacher, rng, advance, noise, None, penalty)
