"""The network of a LightningModule (of ``lightning`` or ``pytorch_lightning``), from a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfq.errors import UserError
from dfq.lightning.quantized import KEY, find_network, is_lightning_class, load_module, network_of, read_checkpoint
from dfq.teacher import InputSpec, Teacher
from dfq.teachers._import import import_named
from dfq.teachers._task_settings import no_detector


def load(
    module: str,  # package.module:Class, the LightningModule
    checkpoint: str,  # a .ckpt file that its Trainer wrote; its hyper-parameters are arguments of the class
    task: str,  # classification | detection
    input_size: Sequence[int],  # [channels, height, width]
    mean: Sequence[float],  # of the normalization (byte / 255 - mean) / std, one a channel
    std: Sequence[float],  # of the normalization, one a channel
    attribute: str | None = None,  # the network's name in it; null: the only part with weights; ".": all of it
    kwargs: Mapping[str, Any] | None = None,  # arguments that the checkpoint has no hyper-parameters for
    adapter: str | None = None,  # of a detector: package.module:Adapter; null: that of its family
    weights: bool = True,  # false: the structure is all that is wanted
    task_settings: Mapping[str, Any] | None = None,  # of a detector: {least_score: 0.25, box_weight: 1.0}
) -> Teacher:
    """Teacher from a Lightning checkpoint; objects in it are never unpickled."""
    kind = import_named("teacher.module", module, "package.module:Class of your own, a LightningModule")
    if not is_lightning_class(kind):
        raise UserError(f"got teacher.module={module}, which is no LightningModule", "a class derived from it")
    content = read_checkpoint(checkpoint, "teacher.checkpoint")
    if KEY in content:
        raise UserError(
            f"got teacher.checkpoint={checkpoint}, of a network that is quantized",
            "a float network",
            "dfq.load(path) reads it",
        )
    owner = load_module(kind, checkpoint, "teacher.checkpoint", "teacher.kwargs", kwargs or {})
    network = network_of(owner, find_network(owner, attribute))
    name = type(network).__name__
    if task == "detection":
        from dfq.teachers._detector import as_detector

        network = as_detector(network, adapter, task_settings)
    else:
        no_detector(f"teacher.task={task}", adapter, task_settings, "teacher.task=detection")
    return Teacher(network, task, InputSpec(tuple(input_size), tuple(mean), tuple(std)), name)
