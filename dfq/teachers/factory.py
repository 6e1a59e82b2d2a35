"""Any nn.Module of the user's own: a function that builds it, by name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dfq.errors import UserError, did_you_mean
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._checkpoint import load_checkpoint


def load(
    factory: str,  # package.module:function, called without arguments (or with kwargs); returns the network
    task: str,  # classification
    input_size: Sequence[int],  # [channels, height, width]
    mean: Sequence[float],  # of the normalization (byte / 255 - mean) / std, one a channel
    std: Sequence[float],  # of the normalization, one a channel
    checkpoint: str | None = None,  # weights to load into it: .safetensors, .pt or .pth
    kwargs: Mapping[str, Any] | None = None,  # keyword arguments of the function
    weights: bool = True,  # false: the structure alone, with random weights
) -> Teacher:
    """Teacher from ``factory``; ``weights=False`` leaves the checkpoint unread (only the structure is wanted)."""
    function = _import_function(factory)
    try:
        inspect.signature(function).bind(**(kwargs or {}))
    except (TypeError, ValueError) as error:
        given = f" with {', '.join(kwargs)}" if kwargs else ""
        raise UserError(
            f"got teacher.factory={factory} called{given}, which it does not take ({error})",
            do="give its arguments as +teacher.kwargs.NAME=VALUE",
        ) from None
    module = function(**(kwargs or {}))
    if not isinstance(module, nn.Module):
        raise UserError(
            f"got a {type(module).__name__} from teacher.factory={factory}", "a function that returns a torch.nn.Module"
        )
    if checkpoint is not None and weights:
        load_checkpoint(module, Path(checkpoint))
    return Teacher(module, task, InputSpec(tuple(input_size), tuple(mean), tuple(std)))


def _import_function(factory: str) -> Any:
    module_name, _, attribute = factory.partition(":")
    # Student folders record their factory; nobody's folder may name a function of the system.
    parts = module_name.split(".")
    named = attribute.isidentifier() and all(part.isidentifier() for part in parts)
    if not named or parts[0] in sys.stdlib_module_names:
        raise UserError(f"got teacher.factory={factory}", "package.module:function of your own that returns a network")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"got teacher.factory={factory}, whose module can't be imported ({error})",
            do="put its folder on PYTHONPATH or install its package",
        ) from None
    if not hasattr(module, attribute):
        raise UserError(
            f"got teacher.factory={factory}, and {module_name} has no {attribute}",
            do=did_you_mean(attribute, vars(module)) or "name a function of that module",
        )
    return getattr(module, attribute)
