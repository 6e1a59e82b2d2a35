"""Any nn.Module of the user's own: a function that builds it, by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dfq.errors import UserError
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._checkpoint import load_checkpoint
from dfq.teachers._import import import_named
from dfq.teachers._task_settings import no_detector


def load(
    factory: str,  # package.module:function, called without arguments (or with kwargs); returns the network
    task: str,  # classification | detection
    input_size: Sequence[int],  # [channels, height, width]
    mean: Sequence[float],  # of the normalization (byte / 255 - mean) / std, one a channel
    std: Sequence[float],  # of the normalization, one a channel
    checkpoint: str | None = None,  # weights to load into it: .safetensors, .pt or .pth
    kwargs: Mapping[str, Any] | None = None,  # keyword arguments of the function
    adapter: str | None = None,  # of a detector: package.module:Adapter; null: that of its family
    weights: bool = True,  # false: the structure alone, with random weights
    task_settings: Mapping[str, Any] | None = None,  # of a detector: {least_score: 0.25, box_weight: 1.0}
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
    name = type(module).__name__
    if task == "detection":
        from dfq.teachers._detector import as_detector

        module = as_detector(module, adapter, task_settings)
    else:
        no_detector(f"teacher.task={task}", adapter, task_settings, "teacher.task=detection")
    return Teacher(module, task, InputSpec(tuple(input_size), tuple(mean), tuple(std)), name)


def _import_function(factory: str) -> Any:
    return import_named("teacher.factory", factory, "package.module:function of your own that returns a network")
