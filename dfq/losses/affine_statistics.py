"""Feature targets from the weight and bias of a layer norm or group norm, which remembers no statistics.

DeepInversion (Yin et al., CVPR 2020, arXiv 1912.08795) pulls the inputs of batch norms to their running statistics. A
layer norm or group norm has none: it takes mean and variance from each sample. What it does have is a weight gamma and
a bias beta a channel, trained for normalized inputs x_hat with the statistics of real data. DFQ (Nagel et al., ICCV
2019, arXiv 1906.04721) reads the statistics of a batch norm's output off them, mean beta and deviation
|gamma|. The same is done here (own formulation)::

    y_c = gamma_c x_hat_c + beta_c
    d_c = ((mean(y_c) - beta_c)^2 + (std(y_c) - |gamma_c|)^2) / mean over channels of gamma^2

What that says: every normalized channel has mean 0 and variance 1 over the images, so that none is silent and none
loud; and a channel matters as much as its weight makes it matter to the layers behind.

What it can't say: after batch norm that is a fact about the training set, here an assumption. The norm itself makes
it true only of all channels of a group together. Real networks depart from it, transformers most of all (a few channels
of a thousand may hold most of the variance), so that d = 0 is not where real images are. A group of one channel (an
instance norm) fulfils the half about the mean for any image. Use it with a small weight beside other terms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def affine_distance(outputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """d_c [C] of a norm's ``outputs`` [M, C], rows being samples and places."""
    variance, mean = torch.var_mean(outputs, dim=0, correction=0)
    target = torch.zeros_like(weight) if bias is None else bias
    eps = 1e-5 * weight.square().mean() + torch.finfo(weight.dtype).tiny
    error = (mean - target).square() + ((variance + eps).sqrt() - weight.abs()).square()
    return error / (weight.square().mean() + eps)
