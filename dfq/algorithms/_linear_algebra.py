"""Second moments that are factored: damped where nothing was seen, and kept positive definite."""

from __future__ import annotations

import torch
from torch import Tensor


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag) I, positive where an input is always zero: what cannot be seen is rounded to nearest.

    Zero is also what is too small for a factor: squares of it would be.
    """
    tiny = torch.finfo(hessian.dtype).tiny
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    unit = torch.where(mean > tiny, mean, 1.0)
    extra = damping * unit + torch.where(diagonal > tiny, 0.0, unit)
    return hessian + torch.diag_embed(extra)


def cholesky(hessian: Tensor) -> Tensor:
    """The lower factor [P, I, I]; more is added to the diagonal where rounding errors have made H indefinite."""
    unit = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    for extra in (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        added = torch.diag_embed((extra * unit)[:, None].expand(hessian.shape[:2]))
        factor, failed = torch.linalg.cholesky_ex(hessian + added)
        if not failed.any():
            return factor
    raise RuntimeError("a second moment that is not finite")
