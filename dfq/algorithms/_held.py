"""What a training end to end is not to see: weights, where grids or roundings are trained in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from dfq.modules import Quantizer
from dfq.quantizers._soft import SoftQuantizer
from dfq.student import Student


@contextmanager
def held(student: Student, all_but_grids: bool) -> Iterator[None]:
    """Weights, or all that no quantizer owns, are buffers inside: whoever trains parameters does not see them."""
    weights = {id(layer.weight) for layer in student.layers.values()}
    kept: list[tuple[nn.Module, dict[str, Any]]] = []
    for part in list(student.module.modules()):
        own = {name: p for name, p in part._parameters.items() if p is not None and (all_but_grids or id(p) in weights)}
        if own and not isinstance(part, (Quantizer, SoftQuantizer)):
            kept.append((part, dict(part._parameters)))
            for name, parameter in own.items():
                del part._parameters[name]
                part.register_buffer(name, parameter.detach())
    try:
        yield
    finally:
        for part, parameters in kept:
            for name in parameters:
                part._buffers.pop(name, None)
            part._parameters.clear()
            part._parameters.update(parameters)
