"""Detectors: the adapter of a network, the user's own or the one of its family."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dfq import detectors
from dfq.detectors._base import Detector, adapter_record
from dfq.errors import UserError
from dfq.teachers._import import import_named
from dfq.teachers._task_settings import check_task_settings

STATISTICS = {"weight", "bias", "running_mean", "running_var"}


def as_detector(
    network: nn.Module,
    adapter: str | type[Detector] | None = None,
    task_settings: Mapping[str, Any] | None = None,
) -> Detector:
    """``network`` behind an adapter: ``package.module:Adapter``, the class itself, or None for its family's own.

    Args:
        task_settings: of :class:`dfq.tasks.detection.Detection`, where they are not those of its yaml.
    """
    found = check_task_settings(task_settings or {})
    detector = network if isinstance(network, Detector) else _adapted(network, adapter)
    if task_settings:
        detector.task_settings = found
    adapter_record(detector)  # reads the adapter's file now, while it is the one that was imported
    return detector


def _adapted(network: nn.Module, adapter: str | type[Detector] | None) -> Detector:
    if isinstance(adapter, str):
        kind = import_named("teacher.adapter", adapter, "package.module:Adapter of your own")
    else:
        kind = adapter or _built_in(network)
    if not (isinstance(kind, type) and issubclass(kind, Detector)):
        name = adapter if isinstance(adapter, str) else type(kind).__name__
        raise UserError(f"got teacher.adapter={name}, which is no adapter", "a class derived from dfq.Detector")
    if kind.candidates is Detector.candidates and kind.decode is Detector.decode:
        raise UserError(
            f"got teacher.adapter={kind.__name__} without candidates and without decode", "one of the two, or both"
        )
    thaw_norms(network)
    return kind(network)


def _built_in(network: nn.Module) -> type[Detector]:
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(network).__mro__}
    families = []
    for module in pkgutil.iter_modules([str(Path(detectors.__file__).parent)]):
        if not module.name.startswith("_"):
            found = importlib.import_module(f"{detectors.__name__}.{module.name}").Adapter
            families.append(module.name)
            if names & set(found.fits):
                return found
    raise UserError(
        f"got a {type(network).__name__} for task=detection, a network of none of the families {', '.join(families)}",
        "teacher.adapter=package.module:Adapter",
        "derive a class from dfq.Detector; examples/fastestdet.py is one",
    )


def thaw_norms(network: nn.Module) -> None:
    """Frozen batch norms of detection packages, four buffers each, as torch's own, which fold and have statistics."""
    for owner in list(network.modules()):
        for name, child in owner.named_children():
            if not {key for key, _ in child.named_buffers(recurse=False)} >= STATISTICS or child._parameters:
                continue
            norm = nn.BatchNorm2d(len(child.running_mean), eps=getattr(child, "eps", 1e-5))
            with torch.no_grad():
                for key in STATISTICS:
                    getattr(norm, key).copy_(getattr(child, key))
            setattr(owner, name, norm.to(child.running_mean.device).eval())
