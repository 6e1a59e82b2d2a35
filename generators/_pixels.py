"""Generators whose pixels are moved themselves: their settings, and one descent.

What is shown of the images in a step is :func:`dfq.generators._filters.augment`'s, which names the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from dfq.generators._base import Generator
from dfq.generators._filters import augment, check_shift, total_variation
from dfq.generators._optimization import Penalty, coarse_to_fine, cosine, finish, optimize, picture_statistics
from dfq.generators._precision import Precision
from dfq.progress import Advance
from dfq.settings import Bound, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
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
    crop: Share = 0.0  # show a part of each image at full size, whose sides lack up to this share; 0: all of it
    jitter: NonNegativeFloat = 0.0  # deviation of each image's brightness and log contrast and saturation in every step
    clip: bool = True  # keep pixels between black and white
    low_pass: NonNegativeFloat = 0.0  # cutoff of a filter on the finished images, in cycles per pixel; 0: none
    coarse_share: Fraction = 0.0  # share of the steps that are taken first, on smaller images; 0: none
    coarse_scale: Annotated[float, Bound(above=0, at_most=1)] = 0.5  # size of a side of these
    patience: NonNegativeInt = 0  # stop after so many steps that bring less than tolerance; 0: never
    tolerance: Fraction = 0.01  # share of the loss that so many steps have to bring
    compile: bool | Literal["auto"] = False  # each batch's step as one program; auto: on CUDA
    precision: Precision = "float32"  # of the network while images are made; auto: the faster one, measured, is kept

    def descend(
        self,
        teacher: Teacher,
        rng: torch.Generator,
        advance: Advance,
        noise: Tensor,
        measured: Callable[[], AbstractContextManager[list[Tensor]]] | None,
        *penalties: Penalty | None,
    ) -> Tensor:
        """The images [N, C, H, W] that ``noise`` of variance 1 becomes; see :func:`optimize`."""
        spec = teacher.input_spec
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        mean, std = (values.view(-1, 1, 1).to(teacher.device) for values in picture_statistics(spec))
        low, high = ((limit - mean) / std for limit in spec.limits(teacher.device))
        wanted = [penalty for penalty in penalties if penalty is not None]
        warmup = int(self.warmup * self.iterations)

        def penalty(images: Tensor, outputs: Any) -> Tensor:
            terms = [one(images, outputs) for one in wanted]
            return self.variation_weight * total_variation(images / std) + sum(terms)

        def move(start: Tensor, first: int, last: int) -> Tensor:
            pixels, (height, width) = start.requires_grad_(), start.shape[-2:]
            shift = min(round(self.shift * height / spec.size[1]), min(height, width) - 1)
            optimizer = torch.optim.Adam([pixels], lr=self.learning_rate, betas=(0.5, 0.9))
            optimize(
                teacher,
                None if measured is None else measured(),
                lambda: augment(pixels * std + mean, self.flip, shift, rng, self.crop, self.jitter, std),
                [cosine(optimizer, self.iterations, warmup, first)],
                last - first,
                advance,
                penalty=penalty,
                after_step=lambda: pixels.clamp_(low, high) if self.clip else None,
                of=self.iterations,
                patience=self.patience,
                tolerance=self.tolerance,
                settled=max(0, warmup - first),
                compiled=self.compile,
                precision=self.precision,
            )
            return pixels.detach()

        start = noise.to(teacher.device, memory_format=torch.channels_last)
        found = coarse_to_fine(teacher, start, self.coarse_share, self.coarse_scale, self.iterations, move)
        return finish(found * std + mean, spec, self.low_pass, self.clip)

    def image_size(self, teacher: Teacher) -> tuple[int, ...]:
        """C, H, W; a UserError where ``shift`` is too far for it."""
        check_shift(self.shift, teacher.input_spec.size)
        return teacher.input_spec.size
