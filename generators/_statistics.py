"""Batch-norm statistics: how far the inputs of the teacher's batch norms are from what these remember."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from dfq.generators._folding import folded_batch_norms
from dfq.generators._precision import as_float, full_precision
from dfq.hooks import evaluation_mode, forward_hooks
from dfq.losses.batch_norm_statistics import batch_norm_distance, channel_statistics, moments
from dfq.teacher import Teacher

Statistics = Literal["batch", "image", "dataset"]
Slack = dict[nn.Module, tuple[Tensor, Tensor]]  # norm → by how much mean and deviation may be off at no cost


class SharedMoments:
    """Mean and variance of norms' inputs over a set of images of which a forward sees one part; each renews its own.

    All-images statistics of Sony MCT ("Data Generation for Hardware-Friendly Post-Training Quantization", WACV 2025,
    arXiv 2410.22110): a part need not look like the whole, and still the whole is what is matched. With n_k images in
    part k, of n in all::

        mean = sum_k n_k / n mean_k,     variance = sum_k n_k / n (variance_k + (mean_k - mean)^2)

    Those of the part that runs carry its gradient, those of the others are what their last forward left.

    Difference from the paper: a part's moments are those of its forward before the step, where MCT runs another forward
    after it. Parts that have not run yet do not count.
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes, self.part = sizes, 0
        self.known: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # number of the norm → part → mean, variance

    def of_all(self, norm: int, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """[C] of all parts, from those of part ``self.part``."""
        parts = self.known.setdefault(norm, {})
        parts[self.part] = (mean.detach(), variance.detach())
        moments = {**parts, self.part: (mean, variance)}
        count = sum(self.sizes[part] for part in moments)
        shares = {part: self.sizes[part] / count for part in moments}
        whole = sum((shares[part] * own for part, (own, _) in moments.items()), start=torch.zeros_like(mean))
        spread = (shares[part] * (own + (middle - whole).square()) for part, (middle, own) in moments.items())
        return whole, sum(spread, start=torch.zeros_like(mean))


@contextmanager
def batch_norm_distances(
    teacher: Teacher,
    statistics: Statistics = "batch",
    slack: Slack | None = None,
    emphasis: float = 0.0,
    shared: SharedMoments | None = None,
) -> Iterator[list[Tensor]]:
    """A list to which every forward in the context adds one scalar a batch norm: how far its input is from training.

    Args:
        slack: see :func:`noise_slack`.
        emphasis: in each image, how much more than others one norm counts: the k-th of L in images k, k + L, ... Only
            where statistics are those of images. The mean over images of all weights of a norm is 1.
        shared: with statistics of a dataset, what its other parts are like.
    """
    distances: list[Tensor] = []

    def measure(_name: str, norm: nn.Module, inputs: tuple) -> None:
        with full_precision(inputs[0].device):
            distances.append(distance(norm, as_float(inputs[0])))

    def distance(norm: nn.Module, x: Tensor) -> Tensor:
        mean, variance = input_statistics(x, statistics)
        if norm in folded:
            mean, variance = folded[norm].undone(mean, variance)
        if shared is not None:
            mean, variance = shared.of_all(len(distances), mean, variance)
        free = None if slack is None else slack[norm]
        of_channels = batch_norm_distance(mean, variance, norm.running_mean, norm.running_var, norm.eps, free)
        if emphasis == 0 or of_channels.dim() == 1:
            return of_channels.mean()
        count = len(teacher.batch_norms)
        is_own = torch.arange(len(of_channels), device=of_channels.device) % count == len(distances)
        weights = 1 + emphasis * is_own
        return (of_channels.mean(1) * (weights / weights.mean())).mean()

    with folded_batch_norms(teacher) as folded, forward_hooks(teacher.batch_norms.items(), before=measure):
        yield distances


@torch.no_grad()
def noise_slack(teacher: Teacher, statistics: Statistics, quantile: float, noise: Tensor) -> Slack:
    """By how much mean and deviation may be off: that ``quantile`` over channels of what they are off with ``noise``.

    DSG's slack distribution alignment (Zhang et al., CVPR 2021, arXiv 2103.01049)::

        delta_l = the quantile over channels of |mean_l(noise) - running_mean_l|,   gamma_l alike of the deviation
        loss_l = |max(|mean_l - running_mean_l| - delta_l, 0)|^2 + |max(|std_l - running_std_l| - gamma_l, 0)|^2

    one margin for all channels of a layer; the paper takes the 0.9 quantile of 1,024 images of Gaussian noise. Here the
    squares are in units of the running deviation, as without slack.
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
    """Mean and (biased) variance of ``x`` [N, C, ...]: [C] of the batch (or a dataset's part), or [N, C] of each image.

    Where an image has but one value a channel (behind a pooling to one place, in a linear layer), its variance says
    nothing, and the batch's counts.
    """
    if statistics == "image" and x[0, 0].numel() > 1:
        return moments(x, tuple(range(2, x.dim())))
    return channel_statistics(x)
