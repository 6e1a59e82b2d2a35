"""Where a network's outputs keep the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dfq.errors import UserError


def logits_in(outputs: Any, dim: int, allowed: str) -> Tensor:
    """The logits, a tensor of ``dim`` dimensions; ``allowed`` says in words what was expected.

    Understood besides a plain tensor: an object or a mapping with ``logits`` (transformers), a tuple or list whose
    first entry is the logits (auxiliary heads follow).
    """
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits", outputs)
    elif hasattr(outputs, "logits"):
        logits = outputs.logits
    elif isinstance(outputs, tuple | list) and outputs:
        logits = outputs[0]
    if not isinstance(logits, Tensor) or logits.dim() != dim:
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise UserError(f"got a {type(logits).__name__}{shape} from the network", allowed)
    return logits
