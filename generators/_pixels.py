"""Generators whose pixels are moved themselves: their settings, and one descent."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfq.generators._base import Generator
from dfq.generators._filters import augment, check_shift, total_variation
from dfq.generators._optimization import Penalty, cosine, finish, optimize, picture_statistics
from dfq.progress import Advance
from dfq.settings import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from dfq.teacher import InputSpec, Teacher


@dataclass(frozen=True)
class PixelGenerator(Generator):
    """Adam on the pixels of one batch at a time, in units of the deviation that pictures have."""

    iterations: PositiveInt = 500  # steps per batch
    learning_rate: PositiveFloat = 0.2  # largest step of Adam, in units of the deviation of pictures
    warmup: Fraction = 0.2  # share of the steps in which the learning rate rises; then it falls along a cosine
    variation_weight: NonNegativeFloat = 0.1  # weight of the total variation: mean difference of neighbors; 0: none
    flip: bool = True  # show the images mirrored left to right in half of the steps
    shift: NonNegativeInt = 0  # show the images moved by up to so many pixels in every step
    clip: bool = True  # keep pixels between black and white
    low_pass: NonNegativeFloat = 0.0  # cutoff of a filter on the finished images, in cycles per pixel; 0: none

    def descend(
        self,
        teacher: Teacher,
        rng: torch.Generator,
        advance: Advance,
        noise: Tensor,
        measured: AbstractContextManager[list[Tensor]] | None,
        *penalties: Penalty | None,
    ) -> Tensor:
        """The images [N, C, H, W] that ``noise`` of variance 1 becomes; see :func:`optimize`."""
        spec = teacher.input_spec
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        mean, std = (values.view(-1, 1, 1).to(teacher.device) for values in picture_statistics(spec))
        low, high = ((limit - mean) / std for limit in spec.limits(teacher.device))
        pixels = noise.to(teacher.device, memory_format=torch.channels_last).requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=self.learning_rate, betas=(0.5, 0.9))
        wanted = [penalty for penalty in penalties if penalty is not None]

        def penalty(images: Tensor, outputs: Any) -> Tensor:
            terms = [one(images, outputs) for one in wanted]
            return self.variation_weight * total_variation(images / std) + sum(terms)

        optimize(
            teacher,
            measured,
            lambda: augment(pixels * std + mean, self.flip, self.shift, rng),
            [cosine(optimizer, self.iterations, int(self.warmup * self.iterations))],
            self.iterations,
            advance,
            penalty=penalty,
            after_step=lambda: pixels.clamp_(low, high) if self.clip else None,
        )
        return finish(pixels.detach() * std + mean, spec, self.low_pass, self.clip)

    def image_size(self, teacher: Teacher) -> tuple[int, ...]:
        """C, H, W; a UserError where ``shift`` is too far for it."""
        check_shift(self.shift, teacher.input_spec.size)
        return teacher.input_spec.size
