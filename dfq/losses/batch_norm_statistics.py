"""Batch-norm statistic matching: how far a batch's activations are from those in training.

ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281, eq. 1) and DeepInversion (Yin et al., CVPR 2020, 1912.08795, eq. 4)
pull the statistics of a batch to the running statistics of every batch norm. Own formulation: the statistics are taken
at the batch norm's input and measured in units of the running standard deviation, so that one weight serves every
layer, batch size and resolution::

    d_c = ((mean_c - running_mean_c) / running_std_c)^2 + (std_c / running_std_c - 1)^2
    bn_loss = mean over layers of the mean over channels of d_c

Differences from the papers: ZeroQ takes per-image statistics at the convolution in front and sums squares over
channels, so wide layers and loud channels dominate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance [C] of ``x`` [N, C, ...] over everything but the channel."""
    return moments(x, tuple(d for d in range(x.dim()) if d != 1))


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of ``x`` over ``dims``: ``torch.var_mean`` in the other order, by plain passes.

    On a CPU that one takes two thirds of the time of a 3x3 convolution of the same maps if channels lie side by side.
    """
    return _Moments.apply(x, dims)


class _Moments(torch.autograd.Function):
    """Keeps what it was given and no map of its own; its gradient is one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        mean = x.mean(dims, keepdim=True)
        variance = (x - mean).square_().mean(dims)
        ctx.save_for_backward(x, mean)
        return mean.view_as(variance).clone(), variance

    @staticmethod
    def backward(ctx, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        count = x.numel() / mean.numel()
        slope = (2 / count) * of_variance.view_as(mean)
        return torch.addcmul(of_mean.view_as(mean) / count - mean * slope, x, slope), None


def batch_norm_distance(
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float = 1e-5,
    slack: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """d_c of one layer [C].

    Channels that were (nearly) constant in training have no scale of their own; they are measured in units of a
    hundredth of the layer's mean variance at least, so that a dead channel does not outweigh all the living ones.

    Args:
        slack: by how much mean and deviation may be off at no cost (DSG, Zhang et al., CVPR 2021, arXiv 2103.01049).
    """
    floor = eps + 1e-2 * running_var.mean()
    unit = (running_var + eps).clamp(min=floor).sqrt()
    std, running_std = (variance + eps).sqrt(), (running_var + eps).sqrt()
    if slack is None:
        return ((mean - running_mean) / unit).square() + ((std - running_std) / unit).square()
    free_mean, free_std = slack
    too_far = ((mean - running_mean).abs() - free_mean).clamp(min=0) / unit
    return too_far.square() + (((std - running_std).abs() - free_std).clamp(min=0) / unit).square()
