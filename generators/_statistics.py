"""Batch-norm statistics: how far the inputs of the teacher's batch norms are from what these remember."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dfq.hooks import evaluation_mode, forward_hooks
from dfq.losses.batch_norm_statistics import batch_norm_distance, channel_statistics, moments
from dfq.teacher import Teacher

Statistics = Literal["batch", "image"]
Slack = dict[nn.Module, tuple[Tensor, Tensor]]  # norm → by how much mean and deviation may be off at no cost


@contextmanager
def batch_norm_distances(
    teacher: Teacher, statistics: Statistics = "batch", slack: Slack | None = None, emphasis: float = 0.0
) -> Iterator[list[Tensor]]:
    """A list to which every forward in the context adds one scalar a batch norm: how far its input is from training.

    Args:
        slack: see :func:`noise_slack`.
        emphasis: in each image, how much more than others one norm counts: the k-th of L in images k, k + L, ... Only
            where statistics are those of images. The mean over images of all weights of a norm is 1.
    """
    distances: list[Tensor] = []

    def measure(_name: str, norm: nn.Module, inputs: tuple) -> None:
        mean, variance = input_statistics(inputs[0], statistics)
        free = None if slack is None else slack[norm]
        of_channels = batch_norm_distance(mean, variance, norm.running_mean, norm.running_var, norm.eps, free)
        if emphasis == 0 or of_channels.dim() == 1:
            distances.append(of_channels.mean())
            return
        count = len(teacher.batch_norms)
        is_own = torch.arange(len(of_channels), device=of_channels.device) % count == len(distances)
        weights = 1 + emphasis * is_own
        distances.append((of_channels.mean(1) * (weights / weights.mean())).mean())

    with forward_hooks(teacher.batch_norms.items(), before=measure):
        yield distances


@torch.no_grad()
def noise_slack(teacher: Teacher, statistics: Statistics, quantile: float, noise: Tensor) -> Slack:
    """By how much mean and deviation may be off: that ``quantile`` over channels of what they are off with ``noise``.

    DSG (Zhang et al., CVPR 2021, arXiv 2103.01049): the margin of a layer is wide where even noise comes close.
    """
    found: Slack = {}

    def note(_name: str, norm: nn.Module, inputs: tuple) -> None:
        mean, variance = input_statistics(inputs[0], statistics)
        off = (mean - norm.running_mean).abs()
        off_std = ((variance + norm.eps).sqrt() - (norm.running_var + norm.eps).sqrt()).abs()
        found[norm] = (torch.quantile(off, quantile), torch.quantile(off_std, quantile))

    with evaluation_mode(teacher.module), forward_hooks(teacher.batch_norms.items(), before=note):
        teacher.module(noise)
    return found


def input_statistics(x: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of ``x`` [N, C, ...]: [C] of the batch, or [N, C] of each image.

    Where an image has but one value a channel (behind a pooling to one place, in a linear layer), its variance says
    nothing, and the batch's counts.
    """
    if statistics == "image" and x[0, 0].numel() > 1:
        return moments(x, tuple(range(2, x.dim())))
    return channel_statistics(x)
