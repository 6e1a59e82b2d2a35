"""How many samples fit into memory: what few take is counted, what more take follows.

Counted are the bytes of all tensors that are alive at once, in forward, gradient and step alike. That needs no memory
to try out and is the same from run to run, which what the system says of a process is not. What kernels take for
themselves while they run (rearranged weights and images) and what the allocator holds without being able to use it
again come on top: TENSORS leaves room for them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
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
TENSORS = 0.7  # share of memory_bytes that they may take; processes took 1.11 (ResNet-18) to 1.36 times as much
STEADY = 0.02  # share by which what a sample takes may still change
# Settings of the generator that is counted.
COUNTED = {"iterations": STEPS, "final_iterations": STEPS, "coarse_share": 0.0, "compile": False}


def fitting_batch_size(generator: Generator, teacher: Teacher) -> int:
    """The largest batch of ``generator`` that takes ``memory_bytes`` at most, up to 256; a multiple of 8 from there on.

    The same for the same generator and network. Counted at 2, 4, 8, ... samples, until most of it grows with their
    number, twice alike, or what is left to conclude is less than twice of what was counted: in small batches, what a
    network and its gradient take may be the most. No more than that, because memory that the counting gives back, in
    other pieces than the batches need, stays with the process.
    """
    teacher.dataflow  # noqa: B018  # what is done once a network is no part of a batch
    allowed = TENSORS * generator.memory_bytes
    count, few, before = FEWEST, batch_bytes(generator, teacher, FEWEST), 0.0
    while True:
        more = batch_bytes(generator, teacher, 2 * count)
        each = max(1.0, (more - few) / count)
        found = int(count + (allowed - few) // each)
        steady = abs(each - before) < STEADY * each and 2 * count * each > more / 2
        if steady or 4 * count >= min(found, LARGEST_BATCH):
            break
        count, few, before = 2 * count, more, each
    if found < 1:
        raise UserError(
            f"got generator.memory_bytes={generator.memory_bytes} for batches of {teacher.name}",
            f"{math.ceil((few - (count - 1) * each) / TENSORS)} or more: what a batch of one takes",
        )
    return min(LARGEST_BATCH, found if found < 8 else found // 8 * 8)


def batch_bytes(generator: Generator, teacher: Teacher, num_samples: int) -> int:
    """The most bytes of tensors alive at once while ``num_samples`` are made; the network's are not counted."""
    generator = generator.with_known(COUNTED)
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
