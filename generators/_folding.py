"""Batch norms computed by the layers in front of them while images are made.

A frozen batch norm is one multiplication and one addition a channel, which a convolution does as well: what is left of
it are the statistics of its input, which follow from those of its output. A map less is read and written in each
direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfq.modules import find_foldable, fold, what_follows
from dfq.teacher import Teacher

# Of a channel's offset to its deviation behind the norm: float32 knows the mean to a 1e-5'th of the deviation then.
LARGEST_OFFSET = 100.0


@dataclass
class Affine:
    """What a folded norm is given is ``gain`` [C] times what it was given before plus ``shift`` [C]."""

    gain: Tensor
    shift: Tensor

    def undone(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Statistics [.., C] of what it was given before."""
        return (mean - self.shift) / self.gain, variance / self.gain.square()


@contextmanager
def folded_batch_norms(teacher: Teacher) -> Iterator[dict[nn.Module, Affine]]:
    """While the context is open, norms that can be folded are; each of these → how its input has changed.

    Norms with a channel that is all but switched off, whose statistics could not be told any more, stay as they are.
    """
    found: dict[nn.Module, Affine] = {}
    with ExitStack() as stack:
        for layer_name, norm_name in find_foldable(teacher.module, teacher.dataflow):
            layer, norm = teacher.module.get_submodule(layer_name), teacher.module.get_submodule(norm_name)
            if "weight" not in layer._parameters or "forward" in vars(norm):
                continue
            together = fold(layer, norm)
            deviation = together.gain.abs() * (norm.running_var.cpu().double() + norm.eps).sqrt()
            if not bool((together.bias.abs() <= LARGEST_OFFSET * deviation).all()) or not bool((deviation > 0).all()):
                continue
            weight = together.weight.to(layer.weight)
            if weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            stack.enter_context(_as_one(layer, norm, weight, together.bias.to(weight)))
            found[norm] = Affine(together.gain.to(weight), together.shift.to(weight))
        yield found


@contextmanager
def _as_one(layer: nn.Module, norm: nn.Module, weight: Tensor, bias: Tensor) -> Iterator[None]:
    own, rest = dict(layer._parameters), what_follows(norm)
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    layer._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    # A copy: what follows may write into it, and the gradient of the statistics needs it as it was.
    norm.forward = lambda x: rest(x.clone())  # type: ignore[method-assign]
    try:
        yield
    finally:
        del norm.forward
        layer._parameters.update(own)
