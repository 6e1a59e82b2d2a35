"""Gaussian noise in the network's normalized input space: the reference every generator has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.generators._base import Generator
from dfq.progress import Advance
from dfq.teacher import Teacher


@dataclass(frozen=True)
class Gaussian(Generator):
    """Independent N(0, 1) pixels, which have the mean and variance of real normalized images and nothing else."""

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        images = torch.randn(num_samples, *teacher.input_spec.size, generator=rng)
        advance(num_samples)
        return images
