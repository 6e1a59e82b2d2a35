"""Looking into a network without changing it: every hook is a context manager that always leaves.

:func:`record_dataflow` runs a network once and sees which tensor goes where. It needs no tracing, so it works on any
``nn.Module`` (control flow, functional calls, detectors, user code); it sees what this one input did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGEST_ORDINARY = 1e30


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


class _Wrapped:
    """What is called in the place of a method while something is around it."""

    def __init__(self, owner: Any, name: str):
        self.method = getattr(owner, name)
        update_wrapper(self, self.method)
        self.own = vars(owner).get(name)  # one of this object alone, such as torch.compile's
        self.around: list[Callable[..., Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.method
        for around in self.around:
            call = partial(around, call)
        return call(*args, **kwargs)


@contextmanager
def around_method(owner: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """``owner.name(...)`` gives what ``around(method, ...)`` gives, ``method`` being what it was.

    A module's ``forward`` is seen this way also where it is called by its name, which no hook of the module sees.
    Several may be around one method, the first one innermost, and leave in any order.
    """
    own = vars(owner)
    wrapped = own.get(name)
    if not isinstance(wrapped, _Wrapped):
        wrapped = own[name] = _Wrapped(owner, name)
    wrapped.around.append(around)
    try:
        yield
    finally:
        wrapped.around.remove(around)
        if not wrapped.around and own.get(name) is wrapped:
            del own[name]
            if wrapped.own is not None:
                own[name] = wrapped.own


@contextmanager
def capture_outputs(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds the last output (first tensor of it) of each named sub-module while the context is open."""
    captured: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: tuple, output: Any) -> None:
        captured[name] = next(tensors_in(output))

    with forward_hooks([(name, module.get_submodule(name)) for name in names], after=keep):
        yield captured


class Choice(nn.Identity):
    """Where a network chooses, by what it sees, what it goes on with: proposals, queries. They go through it.

    Two networks choose differently, and what lies behind is then of other things in each: not to be compared unless one
    goes on with what the other has chosen (:func:`kept_choices`, :func:`given_choices`).
    """

    def forward(self, chosen: Tensor) -> Tensor:
        return chosen.clone()  # an operation of its own, by which a dataflow shows what depends on it

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks at what is chosen, or says it; else it need not come here."""
        return bool(self._forward_hooks)


class Unrounded(nn.Module):
    """Runs a function none of whose operations gets a grid (``policy=hardware``): what it computes are coordinates."""

    def forward(self, function: Callable, *args: Any) -> Any:
        return function(*args)


@contextmanager
def kept_choices(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A dict of what the network chooses in its last forward while the context is open; empty: it chooses nothing."""
    kept: dict[str, Tensor] = {}
    with forward_hooks(choices_in(network), after=lambda name, _module, _inputs, chosen: kept.update({name: chosen})):
        yield kept


@contextmanager
def given_choices(network: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """The network goes on with what another one has chosen for the same samples."""
    with forward_hooks(choices_in(network) if kept else [], after=lambda name, _module, _inputs, _chosen: kept[name]):
        yield


def choices_in(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The places where a network chooses."""
    return [(name, part) for name, part in network.named_modules() if isinstance(part, Choice)]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every sub-module's own mode restored after."""
    modes = [(m, m.training) for m in module.modules()]
    if any(training for _, training in modes):  # setting it takes longer than a token of a small network
        module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            if m.training != training:
                m.training = training


@contextmanager
def repeatable() -> Iterator[None]:
    """The same bits from the same numbers on a GPU: cuDNN's convolutions that add up in a fixed order alone.

    It takes others where they are faster, seen on an H200 in the gradient of convolutions' weights. The choice is the
    process's own and is put back.
    """
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@dataclass
class Call:
    """One forward of one sub-module: the ids of the tensors that went in and came out, their shapes, and where in the
    dataflow the operations lie that ran in it."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    output_shape: tuple[int, ...]
    ops: range


@dataclass
class Op:
    """One torch function called in the forward of a sub-module (of the innermost one).

    Tensors are numbered: what an operation returns gets a new number even where it is the object that went in (an
    in-place operation), so that a number stands for one value. ``key`` finds the operation again in another forward.
    """

    module: str
    name: str  # "conv2d", "add"
    index: int  # the how many'th of that name in that module's forward(s)
    inputs: tuple[int, ...]  # in the order of the arguments
    outputs: tuple[int, ...]
    is_floating: bool  # the (first) output
    is_ordinary: bool  # it holds numbers that a grid can cover: no mask with minus infinity, or as good as

    @property
    def key(self) -> str:
        return f"{self.name}_{self.index}"


@dataclass
class Dataflow:
    """What one forward did: calls in order of completion, operations in order, how often each tensor was read."""

    calls: list[Call] = field(default_factory=list)
    reads: dict[int, int] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    inputs: tuple[int, ...] = ()  # numbers of the network's inputs
    outputs: tuple[int, ...] = ()  # and of its outputs
    parameters: dict[int, list[str]] = field(default_factory=dict)  # number of a parameter or buffer → its names
    unrounded: set[str] = field(default_factory=set)  # sub-modules that are :class:`Unrounded`

    def calls_of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]

    def follows_choice(self, module: nn.Module, name: str) -> bool:
        """Whether what the sub-module ``name`` of ``module`` gives depends on what the network has chosen."""
        choices = {name for name, _ in choices_in(module)}
        reached: set[int] = set()
        for op in self.ops:
            if op.module in choices or reached & set(op.inputs):
                reached |= set(op.outputs)
                if f"{op.module}.".startswith(f"{name}."):
                    return True
        return False


def op_name(func: Callable) -> str:
    """What an operation is called: ``add`` for torch.add, Tensor.add_, and the plus sign alike."""
    return getattr(func, "__name__", type(func).__name__).strip("_")


def identity(module: nn.Module) -> int:
    """Tells modules apart as ``is`` does, also while torch.export runs them behind proxies (which share ``vars``)."""
    return id(vars(module))


def each_once(module: nn.Module) -> dict[str, nn.Module]:
    """``module.named_modules()`` that sees through such proxies too."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        found.setdefault(identity(part), (name, part))
    return dict(found.values())


class ModuleStack:
    """Which sub-module is running, and how often it has run an operation of each name."""

    def __init__(self, root: nn.Module):
        self.stack: list[tuple[str, nn.Module]] = [("", root)]
        self.counts: dict[tuple[int, str], int] = {}
        self.parts = each_once(root)

    @contextmanager
    def following(self) -> Iterator[None]:
        with forward_hooks(
            ((name, part) for name, part in self.parts.items() if name),
            before=lambda name, module, _inputs: self.stack.append((name, module)),
            after=lambda _name, _module, _inputs, _output: self.stack.pop() and None,
        ):
            yield

    def count(self, name: str) -> int:
        """The index of the operation ``name`` that runs now; the next one of that name gets the next."""
        key = (identity(self.stack[-1][1]), name)
        index = self.counts.get(key, 0)
        self.counts[key] = index + 1
        return index


class _Record(TorchFunctionMode):
    """Writes down every operation. Shape queries and the like give no tensor: not counted."""

    def __init__(self, flow: Dataflow, modules: ModuleStack, keep: list):
        super().__init__()
        self.flow, self.modules, self.keep = flow, modules, keep
        self.numbers: dict[int, int] = {}  # id of a tensor → number of the value it holds now
        self.next_number = 0

    def new(self, tensor: Tensor) -> int:
        self.numbers[id(tensor)] = self.next_number
        self.next_number += 1
        return self.next_number - 1

    def number(self, tensor: Tensor) -> int:
        return self.numbers[id(tensor)] if id(tensor) in self.numbers else self.new(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = list(tensors_in([args, kwargs or {}]))
        inputs = tuple(map(self.number, given))
        result = func(*args, **(kwargs or {}))
        made = list(tensors_in(result))
        # Writing into a tensor gives nothing back, and changes it all the same.
        if made or func is Tensor.__setitem__:
            for tensor in given:
                self.flow.reads[id(tensor)] = self.flow.reads.get(id(tensor), 0) + 1
            self.keep.append((args, kwargs, result))
            name, first = op_name(func), made[0] if made else given[0]
            floating = first.is_floating_point()
            self.flow.ops.append(
                Op(
                    self.modules.stack[-1][0],
                    name,
                    self.modules.count(name),
                    inputs,
                    tuple(map(self.new, made or given[:1])),
                    floating,
                    floating and first.numel() > 0 and float(first.abs().max()) < LARGEST_ORDINARY,
                )
            )
        return result


@torch.no_grad()
def record_dataflow(module: nn.Module, inputs: Tensor) -> Dataflow:
    """Run ``module(inputs)`` once in evaluation mode and record which tensor went where.

    A tensor that is part of the module's own output counts as read once more.
    """
    flow = Dataflow()
    keep: list = []  # ids are only unique among living objects
    modules = ModuleStack(module)
    record = _Record(flow, modules, keep)
    began: list[int] = []  # of the calls that run, the innermost last

    def begin(_name: str, _module: nn.Module, _args: tuple) -> None:
        began.append(len(flow.ops))

    def note(name: str, _module: nn.Module, args: tuple, output: Any) -> None:
        keep.append((args, output))
        out = list(tensors_in(output))
        shape, ops = tuple(out[0].shape) if out else (), range(began.pop(), len(flow.ops))
        flow.calls.append(Call(name, tuple(map(id, tensors_in(args))), tuple(map(id, out)), shape, ops))

    flow.inputs = (record.new(inputs),)
    flow.unrounded = {name for name, part in modules.parts.items() if isinstance(part, Unrounded)}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        flow.parameters.setdefault(record.number(tensor), []).append(name)
    with (
        evaluation_mode(module),
        modules.following(),
        forward_hooks(module.named_modules(), before=begin, after=note),
        record,
    ):
        output = module(inputs)
    for tensor in tensors_in(output):
        flow.reads[id(tensor)] = flow.reads.get(id(tensor), 0) + 1
    flow.outputs = tuple(map(record.number, tensors_in(output)))
    return flow
