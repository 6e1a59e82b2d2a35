"""Feature targets of every kind of normalization: running statistics where there are any, else weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dfq.generators._precision import as_float, full_precision
from dfq.generators._statistics import batch_norm_distances
from dfq.hooks import evaluation_mode, op_name
from dfq.losses.affine_statistics import affine_distance
from dfq.teacher import Teacher

NORMS = {"layer_norm", "group_norm"}


class AffineNorms(TorchFunctionMode):
    """Calls ``found`` with the outputs [M, C], weight and bias of every layer norm and group norm that has a weight.

    Operations, not modules, are looked at: what a module gives may be behind an activation already.
    """

    def __init__(self, found: Callable[[Tensor, Tensor, Tensor | None], object]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = op_name(func)
        if name in NORMS:
            weight, bias = (
                kwargs.get(key, args[place] if len(args) > place else None)
                for place, key in ((2, "weight"), (3, "bias"))
            )
            if weight is not None and not weight.requires_grad:  # else it is computed from the image
                rows = result.clone()  # an activation may write into it
                rows = rows.movedim(1, -1) if name == "group_norm" else rows
                self.found(rows.reshape(-1, weight.numel()), weight.flatten(), None if bias is None else bias.flatten())
        return result


@contextmanager
def norm_distances(teacher: Teacher, affine_weight: float) -> Iterator[list[Tensor]]:
    """A list to which every forward in the context adds one scalar a norm; those without statistics are weighted."""

    def measure(outputs: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        with full_precision(outputs.device):
            distances.append(affine_weight * affine_distance(as_float(outputs), weight, bias).mean())

    with batch_norm_distances(teacher) as distances, AffineNorms(measure):
        yield distances


def has_norm(teacher: Teacher) -> bool:
    """Whether a forward of the network runs a norm that has statistics, or a weight."""
    found: list[Any] = []
    with torch.no_grad(), evaluation_mode(teacher.module), AffineNorms(lambda *_: found.append(True)):
        teacher.module(teacher.example(1))
    return bool(found or teacher.batch_norms)
