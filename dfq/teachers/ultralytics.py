"""Detectors of the package ultralytics, by the name of a file of theirs.

The package is licensed under AGPL-3.0, which asks of whoever distributes a program with it, or offers it over a
network, to publish that program's source under the same licence. dfq does not contain, need or import it: it is
imported here, when this teacher is asked for, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfq.errors import UserError
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._checkpoint import load_checkpoint

LICENCE = "AGPL-3.0: what is distributed with it, or offered over a network, comes under that licence"


def load(
    name: str,  # yolo11n.pt (the package unpickles it: files you trust), or yolo11n.yaml: the structure alone
    checkpoint: str | None = None,  # your own weights: .safetensors, .pt or .pth
    input_size: Sequence[int] | None = None,  # [channels, height, width]; null: [3,640,640]
    adapter: str | None = None,  # package.module:Adapter; null: that of the family
    weights: bool = True,  # false: the checkpoint is left unread
    task_settings: Mapping[str, Any] | None = None,  # {least_score: 0.25, box_weight: 1.0}
) -> Teacher:
    """Teacher from ``ultralytics.YOLO(name)``; images are RGB in 0..1 (``evaluation.fit=pad``)."""
    try:
        from ultralytics import YOLO
    except ImportError:
        raise UserError(
            f"got teacher=ultralytics, which needs ultralytics, not installed here ({LICENCE})",
            "teacher=torchvision | teacher=factory, which need nothing of it",
            "pip install 'dfq[ultralytics]' if its licence suits you",
        ) from None
    from dfq.teachers._detector import as_detector

    try:
        network = YOLO(name).model.float()
    except Exception as error:  # whatever the package raises
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise UserError(
            f"got teacher.name={name}, which ultralytics can't load ({reason})",
            "a file of weights (yolo11n.pt), or yolo11n.yaml with teacher.checkpoint",
        ) from None
    if checkpoint is not None and weights:
        load_checkpoint(network, Path(checkpoint))
    spec = InputSpec(tuple(input_size or (3, 640, 640)), (0.0,) * 3, (1.0,) * 3)
    return Teacher(as_detector(network, adapter, task_settings), "detection", spec, name=Path(name).stem)
