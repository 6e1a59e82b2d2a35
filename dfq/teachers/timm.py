"""Classifiers of timm, by name; input size and normalization come from the model's own configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dfq.errors import UserError
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._checkpoint import load_checkpoint


def load(
    name: str,  # e.g. resnet18.a1_in1k
    pretrained: bool | None = None,  # download timm's weights; null: unless a checkpoint is given
    checkpoint: str | None = None,  # your own weights: .safetensors, .pt or .pth
    input_size: Sequence[int] | None = None,  # [channels, height, width]; null: the model's own
    mean: Sequence[float] | None = None,  # of the normalization; null: the model's own
    std: Sequence[float] | None = None,  # of the normalization; null: the model's own
    num_classes: int | None = None,  # null: the model's own
    weights: bool = True,  # false: the structure alone, with random weights
) -> Teacher:
    """Teacher from ``timm.create_model``; ``weights=False`` builds the structure alone."""
    import timm
    from timm.data import resolve_model_data_config

    pretrained = checkpoint is None if pretrained is None else pretrained
    if checkpoint is not None and pretrained:
        raise UserError("got teacher.checkpoint and teacher.pretrained=true", "one of the two", "leave one away")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        module = timm.create_model(name, pretrained=pretrained and weights, **options)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        raise UserError(
            f"got teacher.name={name}, which timm can't load ({_reason(error)})",
            do="check the name; without a connection give teacher.checkpoint=FILE or teacher.pretrained=false",
        ) from None
    if checkpoint is not None and weights:
        load_checkpoint(module, Path(checkpoint))
    own = resolve_model_data_config(module)
    spec = InputSpec(tuple(input_size or own["input_size"]), tuple(mean or own["mean"]), tuple(std or own["std"]))
    return Teacher(module, "classification", spec, name=name)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
