"""Patch similarity entropy: how differently the patches of an image resemble each other.

PSAQ-ViT (Li et al., ECCV 2022, arXiv 2203.02250): what self-attention makes of a picture differs from patch to patch
(foreground, background), what it makes of noise does not. With u_i the tokens that attention gives the patches of an
image and f the density of their similarities::

    Gamma_ij = u_i . u_j / (|u_i| |u_j|),     H = -integral f(x) log f(x) dx

Two estimates of H:

- ``kernel`` (the paper's): f(x) = 1 / (M h) sum_m K((x - x_m) / h) with K the standard normal density;
- ``gaussian``: f the normal density of the same variance, H = 0.5 log(2 pi e var), which is an upper bound of H.

Differences from the paper: a patch with itself (always 1) is no pair. The integral of the kernel estimate is a sum over
points one bandwidth apart from -1 - 4 h to 1 + 4 h, which is exact to four digits for any similarities. The Gaussian
estimate has no bandwidth and costs two moments, but it asks for spread alone: it is largest for similarities of -1 and
1 in equal number, where the kernel estimate is largest for similarities that are all over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SMALLEST_VARIANCE = 1e-6  # of similarities; below it rounding is what varies


def patch_similarities(tokens: Tensor) -> Tensor:
    """Cosines [R, L * (L - 1)] of all ordered pairs of the L tokens of each row; ``tokens`` [R, L, C], L at least 2."""
    tokens = F.normalize(tokens, dim=-1, eps=1e-6)
    rows, length = tokens.shape[:2]
    similarity = (tokens @ tokens.mT).flatten(1)
    # Without its first entry, every (L + 1)'th is one of the diagonal: a view, whose gradient needs no scattering.
    return similarity[:, 1:].view(rows, length - 1, length + 1)[:, :, :-1].flatten(1)


def gaussian_entropy(values: Tensor) -> Tensor:
    """Differential entropy [R], in nats, of a normal distribution with the (biased) variance of each row [R, M]."""
    return 0.5 * torch.log(2 * math.pi * math.e * (values.var(1, correction=0) + SMALLEST_VARIANCE))


def kernel_entropy(values: Tensor, bandwidth: float) -> Tensor:
    """Differential entropy [R], in nats, of each row's kernel density estimate; ``values`` [R, M] from -1 to 1."""
    # The kernels of all points would be held for the gradient, some fifty times as much as the values.
    return checkpoint(_kernel_entropy, values, bandwidth, use_reentrant=False, preserve_rng_state=False)


def _kernel_entropy(values: Tensor, bandwidth: float) -> Tensor:
    reach = math.ceil(1 / bandwidth) + 4
    density = []
    for point in range(-reach, reach + 1):
        distance = point - values / bandwidth
        density.append(torch.exp(-0.5 * distance.square()).mean(1) / (bandwidth * math.sqrt(2 * math.pi)))
    f = torch.stack(density, 1)
    return -bandwidth * torch.special.xlogy(f, f.clamp(min=torch.finfo(f.dtype).tiny)).sum(1)
