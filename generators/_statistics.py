"""Matching of batch-norm statistics: the loop that zeroq and genie share.

Whatever makes the images (pixels themselves, a network with its latents) is moved by gradient descent so that the
inputs of the teacher's batch norms have the statistics that these remember. Nothing in the loop waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dfq.errors import UserError
from dfq.generators._filters import low_pass
from dfq.hooks import evaluation_mode, forward_hooks
from dfq.losses.batch_norm_statistics import batch_norm_distance, channel_statistics
from dfq.progress import Advance
from dfq.settings import choices, load
from dfq.teacher import InputSpec, Teacher

Statistics = Literal["batch", "image"]


def check_batch_norms(teacher: Teacher, name: str) -> None:
    """A network without batch norm has nothing to match."""
    if not teacher.batch_norms:
        raise UserError(
            f"got a network without batch norm ({teacher.name}), and {name} matches batch-norm statistics",
            " | ".join(f"generator={other}" for other in _without_batch_norm()),
        )


def _without_batch_norm() -> list[str]:
    """Names of the generators that work on any network."""
    names = []
    for name in choices("generator"):
        module, _, attribute = load("generator", name)["_target_"].rpartition(".")
        if not getattr(import_module(module), attribute).needs_batch_norm:
            names.append(name)
    return names


def match_statistics(
    teacher: Teacher,
    make: Callable[[], Tensor],
    schedules: Sequence[LRScheduler],
    iterations: int,
    advance: Advance,
    statistics: Statistics = "batch",
    penalty: Callable[[Tensor, Any], Tensor] | None = None,
    observe: Callable[[Tensor], object] = lambda loss: None,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """Take ``iterations`` steps.

    Args:
        make: the images [N, C, H, W] to show to the teacher, with the gradient of what makes them.
        schedules: of the optimizers that hold what makes the images.
        statistics: of all images of the batch together, or of each alone.
        penalty: (images, the teacher's outputs) → what is added to the loss.
        observe: called with the loss, a scalar on the device, before each step; without gradient.
        after_step: called after each step, without gradient.
    """
    with evaluation_mode(teacher.module), batch_norm_distances(teacher, statistics) as distances:
        for _ in range(iterations):
            distances.clear()
            images = make()
            outputs = teacher.module(images.clone())  # some networks write into their input
            loss = torch.stack(distances).mean()
            if penalty is not None:
                loss = loss + penalty(images, outputs)
            with torch.no_grad():
                observe(loss)
            for schedule in schedules:
                schedule.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for schedule in schedules:
                schedule.optimizer.step()
                schedule.step()
            with torch.no_grad():
                after_step()
            advance(len(images) / iterations)


@contextmanager
def batch_norm_distances(teacher: Teacher, statistics: Statistics = "batch") -> Iterator[list[Tensor]]:
    """A list to which every forward in the context adds one scalar a batch norm: how far its input is from training."""
    distances: list[Tensor] = []

    def measure(_name: str, norm: nn.Module, inputs: tuple) -> None:
        mean, variance = input_statistics(inputs[0], statistics)
        distances.append(batch_norm_distance(mean, variance, norm.running_mean, norm.running_var, norm.eps).mean())

    with forward_hooks(teacher.batch_norms.items(), before=measure):
        yield distances


def input_statistics(x: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of ``x`` [N, C, ...]: [C] of the batch, or [N, C] of each image.

    Where an image has but one value a channel (behind a pooling to one place, in a linear layer), its variance says
    nothing, and the batch's counts.
    """
    if statistics == "image" and x[0, 0].numel() > 1:
        variance, mean = torch.var_mean(x.flatten(2), dim=2, correction=0)
        return mean, variance
    return channel_statistics(x)


def cosine(optimizer: torch.optim.Optimizer, iterations: int) -> LRScheduler:
    """From the optimizer's learning rate to zero along half a cosine."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / iterations)))


@torch.no_grad()
def finish(images: Tensor, spec: InputSpec, cutoff: float, clip: bool) -> Tensor:
    """What is stored of the optimized images: filtered (``cutoff`` 0: not), then between black and white (if asked)."""
    if cutoff > 0:
        images = low_pass(images, cutoff)
    return images.clamp(*spec.limits(images.device)) if clip else images
