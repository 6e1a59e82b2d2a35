"""How many samples fit into memory: what few take is counted, what more take follows.

Counted are the bytes of all tensors that are alive at once, in forward, gradient and step alike. That needs no memory
to try out and is the same from run to run, which what the system says of a process is not. What kernels take for
themselves while they run (rearranged weights and images) comes on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.errors import UserError
from dfq.generators._base import Generator, batch_rng
from dfq.hooks import tensors_in
from dfq.teacher import Teacher

LARGEST_BATCH = 256  # more at once is not faster, and more is lost when a run is killed
STEPS = 2  # of the optimization that are counted: in the second one, some of the first is still there
FEWEST = 2  # samples that are counted
# Settings of the generator that is counted.
COUNTED = {"iterations": STEPS, "final_iterations": STEPS, "coarse_share": 0.0, "compile": False}


def fitting_batch_size(generator: Generator, teacher: Teacher) -> int:
    """The largest batch of ``generator`` that takes ``memory_bytes`` at most, up to 256; a multiple of 8 from there on.

    The same for the same generator and network. Counted at 2, 4, 8, ... samples, until what is left to conclude is less
    than twice of what was counted: where a generator has a network of its own, that may take the most in small batches.
    """
    teacher.dataflow  # noqa: B018  # what is done once a network is no part of a batch
    count, few = FEWEST, batch_bytes(generator, teacher, FEWEST)
    while True:
        more = batch_bytes(generator, teacher, 2 * count)
        each = max(1.0, (more - few) / count)
        found = int(count + (generator.memory_bytes - few) // each)
        if 4 * count >= min(found, LARGEST_BATCH):
            break
        count, few = 2 * count, more
    if found < 1:
        raise UserError(
            f"got generator.memory_bytes={generator.memory_bytes} for batches of {teacher.name}",
            f"{int(few - (count - 1) * each) + 1} or more: what a batch of one takes",
        )
    return min(LARGEST_BATCH, found if found < 8 else found // 8 * 8)


def batch_bytes(generator: Generator, teacher: Teacher, num_samples: int) -> int:
    """The most bytes of tensors alive at once while ``num_samples`` are made; the network's are not counted."""
    known = {field.name for field in fields(generator)}
    counted = {key: value for key, value in COUNTED.items() if key in known}
    generator = replace(generator, **counted)  # type: ignore[arg-type]
    return peak_bytes(lambda: generator.sample(teacher, num_samples, batch_rng(0, 0), lambda amount, note="": None))


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that operations in ``work`` have made and that are alive at once."""
    with _LiveBytes() as counter:
        result = work()
    del result
    return counter.most


class _LiveBytes(TorchDispatchMode):
    """Sees every operation below autograd, those of the backward pass too; follows storages, which views share."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_in([args, kwargs or {}]):  # what was there before is not counted
            self._follow(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._follow(tensor, counts=True)
        self.most = max(self.most, self.now)
        return result

    def _follow(self, tensor: torch.Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes() if counts else 0
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
