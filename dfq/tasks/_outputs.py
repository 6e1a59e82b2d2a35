"""Outputs of networks as one value: a tensor, or a mapping of tensors, each with the sample as its first dimension."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfq.dataset import samples_of

LOGITS, RAW = "logits", "raw."  # names of a dataset's tensors


def changed(outputs: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Each tensor through ``function``."""
    if isinstance(outputs, Mapping):
        return {name: function(value) for name, value in outputs.items()}
    return function(outputs)


def joined(parts: Sequence[Any]) -> Any:
    """Those of several batches as those of one."""
    if isinstance(parts[0], Mapping):
        return {name: joined([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else [row for part in parts for row in part]


def moved(outputs: Any, device: str | torch.device) -> Any:
    """On ``device``."""
    return changed(outputs, lambda tensor: tensor.to(device))


def to_store(outputs: Any, most_bytes: float = math.inf) -> dict[str, Tensor]:
    """The tensors of a dataset that hold ``outputs``; none if they take more than ``most_bytes`` a sample."""
    named = {RAW + name: t for name, t in outputs.items()} if isinstance(outputs, Mapping) else {LOGITS: outputs}
    return named if bytes_of_a_sample(outputs) <= most_bytes else {}


def bytes_of_a_sample(outputs: Any) -> int:
    tensors = outputs.values() if isinstance(outputs, Mapping) else [outputs]
    return sum(t[0].numel() * t.element_size() for t in tensors)


def from_store(tensors: Mapping[str, Any]) -> Any:
    """The outputs among the tensors of a dataset or a batch; None where they were not stored."""
    found = {name.removeprefix(RAW): value for name, value in tensors.items() if name.startswith(RAW)}
    return found or tensors.get(LOGITS)


def outputs_of(task: Any, teacher: Callable[[Tensor], Any], batch: Mapping[str, Any]) -> Any:
    """The teacher's outputs for the samples of a batch: those that are stored with them, or made now."""
    found = from_store(batch)
    if found is None:
        with torch.no_grad():
            found = task.raw_outputs(teacher, samples_of(batch))
    return found
