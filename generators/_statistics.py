"""Batch-norm statistics: how far the inputs of the teacher's batch norms are from what these remember."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from dfq.hooks import forward_hooks
from dfq.losses.batch_norm_statistics import batch_norm_distance, channel_statistics, moments
from dfq.teacher import Teacher

Statistics = Literal["batch", "image"]


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
        return moments(x, tuple(range(2, x.dim())))
    return channel_statistics(x)
