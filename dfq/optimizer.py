"""Adam whose steps have a size of their own for every element."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, on the same storage: its part of a sharded one, else all of it."""
    found: Any = tensor.detach()
    return found.to_local() if hasattr(found, "to_local") else found


class ScaledAdam(torch.optim.Adam):
    """Adam (Kingma & Ba, ICLR 2015, arXiv 1412.6980), its step times a size: theta <- theta - lr size m / sqrt(v).

    Adam's step does not depend on how large a gradient is, so it has to be told how large a parameter is. The channels
    of a layer differ by orders of magnitude where a batch norm was folded into them: with one rate for the tensor, the
    small ones would be shaken to pieces while the large ones stand still.

    Args:
        groups: as Adam takes them; ``lr`` is relative where a size is given.
        sizes: parameter → what its steps are multiplied by, broadcast to it; 1 for those that are not in it. They are
            no part of the optimizer's state. Of a parameter that is sharded over processes, those of this process.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], sizes: Mapping[Tensor, Tensor], **settings: Any):
        super().__init__(groups, **settings)
        self.sizes = dict(sizes)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        parameters, sizes = [local(parameter) for parameter in self.sizes], list(self.sizes.values())
        before = [parameter.clone() for parameter in parameters]
        loss = super().step(closure)
        if parameters:
            torch._foreach_sub_(parameters, before)
            torch._foreach_mul_(parameters, sizes)
            torch._foreach_add_(parameters, before)
        return loss
