"""Copies of networks whose weights take no memory: those that no copy changes are shared, others lie in a file.

What is mapped from a file is read where it is needed, and goes back there when the memory is wanted for something else.
So one block of a large network and its activations are all that has to fit.
"""

from __future__ import annotations

import copy
import mmap
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

LARGEST_IN_MEMORY = 2**28  # bytes of a copy's own weights; more lie in a file
ALIGNMENT = 64  # bytes, of a tensor in a file


def in_file(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies of tensors that lie in one file; each is read once, in turn, and may be made just then.

    The file is where temporary files are (``TMPDIR``). It has no name, so nothing is left of it when the process ends
    in whatever way, and it goes with the last copy. OSError where it has no room.
    """
    places: list[tuple[torch.dtype, torch.Size, int]] = []
    with tempfile.TemporaryFile(prefix="dfq_") as file:
        for tensor in tensors:
            file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
            places.append((tensor.dtype, tensor.shape, file.tell()))
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        content = mmap.mmap(file.fileno(), 0)
    return [
        torch.frombuffer(content, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
        for dtype, shape, offset in places
    ]


def copy_network(module: nn.Module, twin: nn.Module | None = None) -> nn.Module:
    """A copy of a network; large weights on the CPU lie in a file where that has room.

    Args:
        twin: the copy shares the parameters that have the same values there; neither may then be written to.
    """
    own = {name: p for name, p in module.named_parameters() if type(p) is nn.Parameter}
    theirs = {} if twin is None else dict(twin.named_parameters())
    found = {id(p): theirs[name].data for name, p in own.items() if name in theirs and _is_same(p, theirs[name])}
    rest = [
        p for p in own.values() if id(p) not in found and p.device.type == "cpu" and p.is_contiguous() and p.numel()
    ]
    if sum(p.numel() * p.element_size() for p in rest) > LARGEST_IN_MEMORY:
        with suppress(OSError):  # no room: in memory, as small ones
            found |= {id(p): values for p, values in zip(rest, in_file(rest), strict=True)}
    made = {id(p): nn.Parameter(found[id(p)], p.requires_grad) for p in own.values() if id(p) in found}
    return copy.deepcopy(module, made)


def to_file(module: nn.Module, dtype: torch.dtype) -> bool:
    """Give a network's parameters a dtype, and those a place in a file that take memory then; false where it stays as
    it is, as there is little to be had or no room."""
    own = [p for p in module.parameters() if p.device.type == "cpu" and p.is_floating_point() and p.numel()]
    own = [p for p in own if p.dtype != dtype or _takes_memory(p)]
    if sum(p.numel() * dtype.itemsize for p in own) <= LARGEST_IN_MEMORY:
        return False
    try:
        found = in_file(p.to(dtype) for p in own)
    except OSError:
        return False
    for parameter, values in zip(own, found, strict=True):
        parameter.data = values
    return True


def to_memory(module: nn.Module) -> None:
    """Weights that lie in a file come into memory: what is written to all the time would go to the file as often."""
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and not _takes_memory(parameter):
            parameter.data = parameter.data.clone()


def _takes_memory(x: Tensor) -> bool:
    # What torch has allocated can grow: not what is mapped, nor, which costs a copy too many, what numpy looked at.
    return x.untyped_storage().resizable()


def _is_same(x: Tensor, y: Tensor) -> bool:
    alike = (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)
    return alike and torch.equal(x, y)
