"""Looking into a network without changing it: every hook is a context manager that always leaves.

:func:`record_dataflow` runs a network once and sees which tensor goes where. It needs no tracing, so it works on any
``nn.Module`` (control flow, functional calls, detectors, user code); it sees what this one input did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples, dicts and dataclass-like outputs (those with ``values()``)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or hasattr(value, "to_tuple"):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)


@contextmanager
def forward_hooks(
    modules: Iterable[tuple[str, nn.Module]],
    before: Callable[[str, nn.Module, tuple], Any] | None = None,
    after: Callable[[str, nn.Module, tuple, Any], Any] | None = None,
) -> Iterator[None]:
    """Call ``before(name, module, inputs)`` and ``after(name, module, inputs, output)`` around every forward.

    ``inputs`` are positional and keyword arguments in the order they were given.
    """
    handles = []
    try:
        for name, module in modules:
            if before is not None:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, args, kwargs, n=name: before(n, m, (*args, *kwargs.values())), with_kwargs=True
                    )
                )
            if after is not None:
                handles.append(
                    module.register_forward_hook(
                        lambda m, args, kwargs, out, n=name: after(n, m, (*args, *kwargs.values()), out),
                        with_kwargs=True,
                    )
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_outputs(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds the last output (first tensor of it) of each named sub-module while the context is open."""
    captured: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: tuple, output: Any) -> None:
        captured[name] = next(tensors_in(output))

    with forward_hooks([(name, module.get_submodule(name)) for name in names], after=keep):
        yield captured


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every sub-module's own mode restored after."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@dataclass
class Call:
    """One forward of one sub-module: the ids of the tensors that went in and came out, and their shapes."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass
class Dataflow:
    """What one forward did: calls in order of completion, and how often each tensor was read by an operation."""

    calls: list[Call] = field(default_factory=list)
    reads: dict[int, int] = field(default_factory=dict)

    def calls_of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]


class _CountReads(TorchFunctionMode):
    """Counts for every tensor the operations that read it. Shape queries and the like give no tensor: not counted."""

    def __init__(self, flow: Dataflow, keep: list):
        super().__init__()
        self.flow, self.keep = flow, keep

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # Writing into a tensor gives nothing back, and changes it all the same.
        if next(tensors_in(result), None) is not None or func is Tensor.__setitem__:
            for tensor in tensors_in([args, kwargs or {}]):
                self.flow.reads[id(tensor)] = self.flow.reads.get(id(tensor), 0) + 1
            self.keep.append((args, kwargs, result))
        return result


@torch.no_grad()
def record_dataflow(module: nn.Module, inputs: Tensor) -> Dataflow:
    """Run ``module(inputs)`` once in evaluation mode and record which tensor went where.

    A tensor that is part of the module's own output counts as read once more.
    """
    flow = Dataflow()
    keep: list = []  # ids are only unique among living objects

    def note(name: str, _module: nn.Module, args: tuple, output: Any) -> None:
        keep.append((args, output))
        out = list(tensors_in(output))
        flow.calls.append(
            Call(name, tuple(map(id, tensors_in(args))), tuple(map(id, out)), tuple(out[0].shape) if out else ())
        )

    with evaluation_mode(module), forward_hooks(module.named_modules(), after=note), _CountReads(flow, keep):
        output = module(inputs)
    for tensor in tensors_in(output):
        flow.reads[id(tensor)] = flow.reads.get(id(tensor), 0) + 1
    return flow
