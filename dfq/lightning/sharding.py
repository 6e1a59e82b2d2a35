"""FSDP2 of a network as it is used here: in pieces, never called as a whole.

The heads of language models run token chunk by token chunk, outside of the network's forward, which ends in front of
them. So there is no unit around the whole: each repeated block (an entry of a ``ModuleList``) is one, and so is each
layer with a large weight beside them. What is small or shared (norms, scales without dimensions, tied weights) stays
whole in every process, and its gradients are averaged by :func:`average_gradients`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 2**10  # elements of a weight that is worth sharding outside of a block


def shard(network: nn.Module, mesh: Any) -> None:
    """Shard ``network`` in place over the processes of ``mesh``."""
    from torch.distributed.fsdp import fully_shard

    owners = Counter(id(p) for m in network.modules() for p in m.parameters(recurse=False))
    whole = {p for p in network.parameters() if p.dim() == 0 or owners[id(p)] > 1}
    for unit in units(network):
        own = set(unit.parameters())
        if own - whole:
            fully_shard(unit, mesh=mesh, ignored_params=whole & own)


def units(network: nn.Module) -> list[nn.Module]:
    """Blocks and, beside them, layers with a large weight, in order; none lies in another."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList):
            found.extend(module)
            return
        own = [p for p in module.parameters(recurse=False) if p.numel() >= LARGE]
        if own:
            found.append(module)
            return
        for child in module.children():
            look(child)

    look(network)
    return found


def is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(values: Tensor, whole: Tensor, rank: int, world_size: int) -> Tensor:
    """The rows of ``values`` that belong to this process's rows of ``whole``, which ``values`` broadcasts to."""
    if values.dim() < whole.dim() or values.dim() == 0 or len(values) != len(whole):
        return values
    parts = values.chunk(world_size)
    return parts[rank] if rank < len(parts) else values[:0]


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Over all processes, of parameters that each has whole."""
    import torch.distributed as dist

    for parameter in parameters:
        if parameter.grad is None:  # not used by the samples of this process
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
