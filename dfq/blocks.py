"""Blocks: the units of reconstruction, found by following values through one forward, and run on their own.

A block is a sub-module (or a few in a row) with weight layers, into which one activation goes and out of which one
comes. Which sub-modules those are follows from the dataflow, never from class names:

- a sub-module whose layers lie on one path, up to four of them, is a block (a depthwise layer and the pointwise one
  behind it);
- one with a path around some of its layers (a residual block, an inverted residual, an attention block) is a block,
  unless its children with layers lie on one path themselves (a stage of residual blocks), which are looked at instead;
- what has several inputs or outputs (a decoder with skip connections) is looked into;
- a depthwise convolution that is left alone goes with the layer that reads it and nothing else does;
- layers of a mixture's experts are in no block but one around them all;
- what runs several times in a forward (the head of a detector, once a level) is a block as well if each of its calls
  has one activation in and one out, and what one call gives does not reach another one (no recurrence).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.hooks import (
    Dataflow,
    Op,
    choices_in,
    evaluation_mode,
    forward_hooks,
    given_choices,
    kept_choices,
    tensors_in,
)
from dfq.modules import product_of
from dfq.sites import Counts, counted_sites, map_tensors, sites_of
from dfq.surgery import Experts

FEW = 4  # samples that say what blocks are called with
LONGEST_CHAIN = 4  # layers of a block without branches
LARGEST_BLOCK = 32  # layers of a block with branches, experts of a mixture counting once; what has more is looked into


@dataclass(frozen=True)
class Block:
    """Sub-modules that run one after the other, each on what the one before gave, and the weight layers in them.

    ``calls``: how often they do so in a forward.
    """

    modules: tuple[str, ...]
    layers: tuple[str, ...]
    calls: int = 1

    @property
    def name(self) -> str:
        return self.modules[0] if len(self.modules) == 1 else f"{self.modules[0]}..{self.modules[-1]}"


def find_blocks(module: nn.Module, flow: Dataflow, layers: Iterable[str], single_layers: bool = False) -> list[Block]:
    """The blocks of a network in the order they run.

    One that runs several times comes behind all blocks that bring an input of one of its calls, and before those that
    get what it gives. (Two such that feed each other are in the order of their first calls.)

    Args:
        flow: one forward of ``module``.
        layers: names of the weight layers to cover. Those that run on what they gave themselves or that nobody calls
            (their owner reads their weight) are in no block unless it is one around their owner.
        single_layers: every layer a block of its own.
    """
    return _Finder(module, flow, list(layers), single_layers).blocks()


class _Finder:
    def __init__(self, module: nn.Module, flow: Dataflow, layers: list[str], single_layers: bool):
        self.module, self.flow, self.layers, self.single_layers = module, flow, layers, single_layers
        self.known: dict[str, list[tuple[int, int]] | None] = {}  # what _ends has found
        self.active = set(flow.inputs)
        for op in flow.ops:
            if self.active & set(op.inputs):
                self.active |= set(op.outputs)

    def blocks(self) -> list[Block]:
        found = sorted(self._visit("", self.module), key=self._first_op)
        once, several = ([b for b in found if (b.calls > 1) is more] for more in (False, True))
        if not self.single_layers:
            once, several = list(self._joined(once)), list(self._joined(several))
        return self._in_order(once, several) if several else once

    def _in_order(self, once: list[Block], several: list[Block]) -> list[Block]:
        left = sorted([*once, *several], key=self._first_op)
        given = {block: self._reached({end for _, end in self._ends_of(block.modules[-1])}) for block in left}
        taken = {block: {start for start, _ in self._ends_of(block.modules[0])} for block in left}

        def waits(block: Block) -> bool:
            others = left if block.calls > 1 else [other for other in left if other.calls > 1]
            return any(other != block and given[other] & taken[block] for other in others)

        found = []
        while left:
            found.append(next((block for block in left if not waits(block)), left[0]))
            left.remove(found[-1])
        return found

    def _visit(self, name: str, module: nn.Module) -> Iterator[Block]:
        inside = [layer for layer in self.layers if layer == name or layer.startswith(f"{name}.") or not name]
        if not inside or isinstance(module, Experts):  # each gets as many tokens as chose it: no row a sample
            return
        if name in self.layers:
            if (ends := self._ends(name)) and not isinstance(module, nn.Embedding):
                yield Block((name,), (name,), len(ends))
            return
        if name and not self.single_layers and self._is_block(name, module, inside):
            yield Block((name,), tuple(inside), len(self._ends_of(name)))
            return
        for child_name, child in module.named_children():
            yield from self._visit(f"{name}.{child_name}".lstrip("."), child)

    def _is_block(self, name: str, module: nn.Module, inside: list[str]) -> bool:
        if self._ends(name) is None or not self._runs_alike(name, inside):
            return False
        if not any(self._bypassed(name, layer) for layer in inside):
            return len(inside) <= LONGEST_CHAIN
        children = list(self._called_children(name, module))
        children = [child for child in children if any(f"{layer}.".startswith(f"{child}.") for layer in inside)]
        is_chain = len(children) > 1 or children == inside
        is_chain = is_chain and all(self._runs_with(c, name) and not self._bypassed(name, c) for c in children)
        # One child that has it all: the block is the child or lies in it.
        alone = len(children) == 1 and self._runs_with(children[0], name) and children[0] not in self.layers
        alone = alone and not self._bypassed(name, children[0])
        return not is_chain and not alone and len({self._mixture(layer) for layer in inside}) <= LARGEST_BLOCK

    def _mixture(self, layer: str) -> str:
        """The experts that a layer is one of, else itself."""
        owners = [layer.rsplit(".", n)[0] for n in range(1, layer.count(".") + 1)]
        return next((name for name in owners if isinstance(self.module.get_submodule(name), Experts)), layer)

    def _called_children(self, name: str, module: nn.Module) -> Iterator[str]:
        """Sub-modules that run, looked for in lists too, which do not."""
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}"
            if self.flow.calls_of(path) or not list(child.children()):
                yield path
            else:
                yield from self._called_children(path, child)

    def _ops(self, name: str) -> list[list[Op]]:
        """The operations of a sub-module, call by call."""
        spans = [call.ops for call in self.flow.calls_of(name)]
        if len(spans) == 1:  # with what is run of it beside the call
            spans = [range(len(self.flow.ops))]
        return [[op for op in self.flow.ops[span.start : span.stop] if _is_in(op, name)] for span in spans]

    def _runs_alike(self, name: str, inside: list[str]) -> bool:
        """Whether all calls of ``name`` run the same layers: others are one for each call."""
        calls = self._ops(name)
        return len(calls) == 1 or all(
            len({sum(_is_in(op, layer) for op in ops) for ops in calls}) == 1 for layer in inside
        )

    def _runs_with(self, part: str, name: str) -> bool:
        """Whether ``part`` has ends and runs as often as ``name``, which it is in."""
        ends = self._ends(part)
        return ends is not None and len(ends) == len(self._ends_of(name))

    def _reached(self, numbers: set[int]) -> set[int]:
        """The values that depend on some of ``numbers``, and these."""
        reached = set(numbers)
        for op in self.flow.ops:
            if reached & set(op.inputs):
                reached |= set(op.outputs)
        return reached

    def _ends_of(self, name: str) -> list[tuple[int, int]]:
        ends = self._ends(name)
        assert ends is not None
        return ends

    def _ends(self, name: str) -> list[tuple[int, int]] | None:
        """Of each call of a sub-module the numbers of the one activation that goes in and the one that comes out.

        None: not so, or what goes into one call depends on what came out of another.
        """
        if name not in self.known:
            self.known[name] = self._found_ends(name)
        return self.known[name]

    def _found_ends(self, name: str) -> list[tuple[int, int]] | None:
        calls = self._ops(name)
        if not calls or sum(map(len, calls)) != sum(_is_in(op, name) for op in self.flow.ops):
            return None
        found = []
        for inside in calls:
            made = {number for op in inside for number in op.outputs}
            entering = {number for op in inside for number in op.inputs if number in self.active and number not in made}
            own = {id(op) for op in inside}
            read = {number for op in self.flow.ops if id(op) not in own for number in op.inputs}
            leaving = made & (read | set(self.flow.outputs)) & self.active
            if not len(entering) == len(leaving) == 1:
                return None
            found.append((entering.pop(), leaving.pop()))
        several = len(found) > 1
        return None if several and self._reached({end for _, end in found}) & {start for start, _ in found} else found

    def _bypassed(self, name: str, part: str) -> bool:
        """Whether there is a way from the input to the output of ``name`` around ``part``, in any call."""
        for (start, end), ops in zip(self._ends_of(name), self._ops(name), strict=True):
            reached = {start}
            for op in ops:
                if not _is_in(op, part) and reached & set(op.inputs):
                    reached |= set(op.outputs)
            if end in reached:
                return True
        return False

    def _first_op(self, block: Block) -> int:
        return next(i for i, op in enumerate(self.flow.ops) if any(_is_in(op, name) for name in block.modules))

    def _joined(self, blocks: list[Block]) -> Iterator[Block]:
        """Depthwise convolutions together with the layer behind them."""
        waiting: Block | None = None
        for block in blocks:
            if waiting is not None and self._follows(waiting, block):
                block = Block(waiting.modules + block.modules, waiting.layers + block.layers, block.calls)
                waiting = None
            if waiting is not None:
                yield waiting
            waiting = block if len(block.layers) == 1 and self._is_depthwise(block.layers[0]) else None
            if waiting is None:
                yield block
        if waiting is not None:
            yield waiting

    def _is_depthwise(self, name: str) -> bool:
        layer = self.module.get_submodule(name)
        return getattr(layer, "groups", 1) == getattr(layer, "in_channels", 0) > 1

    def _follows(self, first: Block, second: Block) -> bool:
        before, after = self._ends_of(first.modules[-1]), self._ends_of(second.modules[0])
        product = product_of(second.layers[0], self.flow)
        if product is None or len(second.layers) != 1 or [end for _, end in before] != [start for start, _ in after]:
            return False
        if second.calls > 1:  # one directly behind the other: nothing of another call lies between them
            calls = [self.flow.calls_of(block.modules[0]) for block in (first, second)]
            if any(one.ops.stop != other.ops.start for one, other in zip(*calls, strict=True)):
                return False
        readers = [[op for op in self.flow.ops if end in op.inputs] for _, end in before]
        return all(len(ops) == 1 and (ops[0].module, ops[0].name) == (product.module, product.name) for ops in readers)


def _is_in(op: Op, name: str) -> bool:
    """Whether the sub-module ``name`` or one inside runs it."""
    return op.module == name or op.module.startswith(f"{name}.")


# ------------------------------------------------------------------------------------------------ running


class _Stop(Exception):
    """Ends a forward that has seen enough."""


class _NotReached(RuntimeError):
    """A block did not run as often with these samples as with those that showed how data flows."""


@dataclass
class Arguments:
    """What a block's first module was called with; its activation is replaced in every run.

    ``counts``: of the sites that the forward had come by then.
    """

    args: tuple
    kwargs: dict[str, Any]
    counts: Counts = field(default_factory=dict)

    def with_activation(self, x: Tensor) -> tuple[tuple, dict[str, Any]]:
        """With ``x`` in the place of the first tensor, and as many rows as it has of what all samples share."""
        first = self.activation

        def replaced(value: Tensor) -> Tensor:
            if value is first:
                return x
            shared = len(x) != len(first) and id(value) in self._alike
            return value[:1].expand(len(x), *value.shape[1:]) if shared else value

        args, kwargs = map_tensors(replaced, (self.args, self.kwargs))
        return args, kwargs

    @cached_property
    def _alike(self) -> set[int]:
        """Identities of tensors with a row a sample that are all alike: masks and positions of eager attention."""
        count, others = len(self.activation), tensors_in([*self.args, *self.kwargs.values()])
        return {id(t) for t in others if t.dim() > 1 and len(t) == count and bool((t == t[:1]).all())}

    @property
    def has_own_rows(self) -> bool:
        """Whether a tensor beside the activation is another one for each sample, so that no other batch can have it."""
        count, first = len(self.activation), self.activation
        others = [t for t in tensors_in([*self.args, *self.kwargs.values()]) if t is not first]
        return any(t.dim() > 0 and len(t) == count and id(t) not in self._alike for t in others)

    @property
    def activation(self) -> Tensor:
        return next(tensors_in([*self.args, *self.kwargs.values()]))

    def copied(self) -> Arguments:
        """The same, whoever writes into it."""
        copies: dict[int, Tensor] = {}
        args, kwargs = map_tensors(lambda t: copies.setdefault(id(t), t.clone()), (self.args, self.kwargs))
        return Arguments(args, kwargs, self.counts)


def call_arguments(network: nn.Module, name: str, images: Tensor, count: int = 1) -> list[Arguments]:
    """What ``name`` is called with, ``count`` times, in a forward of ``network``, which ends at the last one."""
    found: list[Arguments] = []

    def keep(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = Arguments(args, kwargs, counted_sites(network))
        if len(found) + 1 == count:
            found.append(given)
            raise _Stop
        found.append(given.copied())

    handle = network.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), evaluation_mode(network):
            network(images.clone())  # some networks write into their input
    except _Stop:
        return found
    finally:
        handle.remove()
    raise _NotReached(f"{name} was called {len(found)} times, not {count}")


def run_block(network: nn.Module, block: Block, x: Tensor, arguments: Arguments) -> Tensor:
    """The output of ``block`` for its input ``x`` [N, ...]; quantizers between its layers are called too.

    ``arguments``: those of the call that is to be run.
    """
    with evaluation_mode(network), sites_of(network, arguments.counts):
        for position, name in enumerate(block.modules):
            args, kwargs = arguments.with_activation(x) if position == 0 else ((x,), {})
            x = next(tensors_in(network.get_submodule(name)(*args, **kwargs)))
    return x


@contextmanager
def layer_inputs(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds the last input of each named layer while the context is open."""
    captured: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, inputs: tuple) -> None:
        captured[name] = inputs[0].detach()

    with forward_hooks([(name, network.get_submodule(name)) for name in names], before=keep):
        yield captured


def allocate(shape: tuple[int, ...], like: Tensor, limit_bytes: int, folder: Path, name: str) -> Tensor:
    """An uninitialized tensor on the CPU, laid out as ``like``; above ``limit_bytes`` it is in a file of ``folder``."""
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    layout = (shape[0], *shape[2:], shape[1]) if channels_last else shape
    size = torch.Size(shape).numel()
    if size * like.element_size() <= limit_bytes:
        flat = torch.empty(size, dtype=like.dtype)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        flat = torch.from_file(str(folder / f"{name}.activations"), shared=True, size=size, dtype=like.dtype)
    return flat.view(layout).movedim(-1, 1) if channels_last else flat.view(layout)


@dataclass
class Probe:
    """What a block is called with in both networks, call by call, with a few samples."""

    block: Block
    mine: list[Arguments]
    theirs: list[Arguments]


@dataclass
class Captured:
    """A block with what goes into it and what should come out of it in one of its calls, for all samples.

    A block behind proposals or windows has several rows a sample, as many of each: R = N times that number; else R = N.

    Attributes:
        arguments: of the block's first module in the student.
        inputs: [R, ...] in the student, whose earlier blocks are quantized already.
        float_inputs, float_outputs: [R, ...] in the float network.
        token_weights: [N, T], what tokens count in moments of the block's inputs; None: all the same.
    """

    block: Block
    arguments: Arguments
    inputs: Tensor
    float_inputs: Tensor
    float_outputs: Tensor
    token_weights: Tensor | None = None


class Captures:
    """Inputs and outputs of one block after the other, in bounded memory.

    A block gets what the one before it gives, where nothing lies between them. Then that one runs once more and not
    the whole network up to here, and all blocks together cost a few forwards and not half a one each. Whether it is so
    is seen on a few samples, to the bit, in both networks; these run through all blocks beside the others.

    Where the networks choose what they go on with (:class:`dfq.hooks.Choice`), the student goes on with what the
    reference has chosen: rows of both are of the same proposals.

    Args:
        student, reference: the network with quantizers, and the same module tree that computes in float.
        images: [N, ...], of which ``batch_size`` run at a time.
        folder: for what does not fit into ``limit_bytes`` a tensor, which those of a block's calls count as together;
            removed where the context ends.
    """

    def __init__(
        self,
        student: nn.Module,
        reference: nn.Module,
        images: Tensor,
        batch_size: int,
        folder: Path,
        limit_bytes: int = 2**31,
    ):
        self.student, self.reference, self.images = student, reference, images
        self.folder, self.limit_bytes = folder, limit_bytes
        self.batches = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        self.device = next(student.parameters()).device
        first = images[self.batches[0]]
        self.few = first if choices_in(reference) else first[:FEW]  # choices are those of a batch
        self.before: tuple[list[Captured], Probe] | None = None
        self.count = 0

    def __enter__(self) -> Captures:
        return self

    def __exit__(self, *_: Any) -> None:
        self.before = None
        self._remove(keep=())

    def of(self, block: Block) -> Captured | None:
        """What ``block``, which runs once, gets and should give; see :meth:`calls_of`."""
        assert block.calls == 1
        calls = self.calls_of(block)
        return None if calls is None else calls[0]

    @torch.no_grad()
    def calls_of(self, block: Block) -> list[Captured] | None:
        """What ``block`` gets and should give in each of its calls, with the student as it is now; None: rows of one
        of them are not of samples, or some samples do not reach it."""
        try:
            return self._calls_of(block)
        except _NotReached:
            return None

    def _calls_of(self, block: Block) -> list[Captured] | None:
        probe = Probe(block, *(self._arguments(network, block) for network in (self.student, self.reference)))
        if not self._has_rows_of_samples(probe):
            return None
        keep = [f"{key}_{self.count}" for key in ("inputs", "float", "outputs")]
        mine, theirs = probe.mine, probe.theirs
        follows = self.before is not None and self._follows(self.before[1], probe)
        is_of_few = len(self.few) < len(self.images[self.batches[0]])
        if is_of_few and (not follows or any(call.has_own_rows for call in (*mine, *theirs))):
            mine, theirs = (self._arguments(network, block, 0) for network in (self.student, self.reference))
        if self.before is not None and follows:
            before = self.before[0]
            values, arguments = [call.inputs for call in before], [call.arguments for call in before]
            inputs = self._store(keep[0], self._given(self.student, before[0].block, values, arguments))
            float_inputs = [call.float_outputs for call in before]
            keep.append(f"outputs_{self.count - 1}")
        else:
            inputs, float_inputs = (
                self._store(key, self._reached(network, block, first))
                for key, network, first in ((keep[0], self.student, mine), (keep[1], self.reference, theirs))
            )
        outputs = self._store(keep[2], self._given(self.reference, block, float_inputs, theirs))
        found = [Captured(block, *call) for call in zip(mine, inputs, float_inputs, outputs, strict=True)]
        self.before = found, probe
        self.count += 1
        self._remove(keep)
        return found

    def forwards(self) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
        """For each batch what runs all of the student, and all of the reference, on it."""
        for index, batch in enumerate(self.batches):

            def run(network: nn.Module, batch: slice = batch, chosen: dict[str, Tensor] = self.choices[index]) -> None:
                with torch.no_grad(), evaluation_mode(network), given_choices(network, chosen):
                    network(self.images[batch].to(self.device, copy=True))  # some networks write into their input

            yield partial(run, self.student), partial(run, self.reference)

    @cached_property
    def choices(self) -> list[dict[str, Tensor]]:
        """What the reference chooses in each batch."""
        if not choices_in(self.reference):
            return [{}] * len(self.batches)
        found = []
        for batch in self.batches:
            with torch.no_grad(), evaluation_mode(self.reference), kept_choices(self.reference) as kept:
                self.reference(self.images[batch].to(self.device, copy=True))
            found.append(kept)
        return found

    def _arguments(self, network: nn.Module, block: Block, index: int | None = None) -> list[Arguments]:
        """Those of the block's calls in one batch; None: with the few samples."""
        images = self.few if index is None else self.images[self.batches[index]]
        with given_choices(network, self.choices[index or 0]):
            return call_arguments(network, block.modules[0], images.to(self.device), block.calls)

    def _has_rows_of_samples(self, probe: Probe) -> bool:
        """Whether activations, of the few samples, have as many rows for each; other networks begin with tokens, or
        with places of the whole batch."""
        block, count = probe.block, len(self.few)
        ones = call_arguments(self.reference, block.modules[0], self.images[:1].to(self.device), block.calls)
        pairs = zip(ones, probe.theirs, strict=True)
        return all(len(one.activation) * count == len(few.activation) for one, few in pairs)

    def _follows(self, before: Probe, probe: Probe) -> bool:
        """Whether what arrives at a block is what the one before it gives, call by call, with the student as it is
        now."""
        if before.block.calls != probe.block.calls:
            return False
        for network, earlier, later in (
            (self.student, before.mine, probe.mine),
            (self.reference, before.theirs, probe.theirs),
        ):
            for arguments, wanted in zip(earlier, (call.activation for call in later), strict=True):
                given = run_block(network, before.block, arguments.activation.clone(), arguments)
                if given.dtype != wanted.dtype or not torch.equal(given, wanted):
                    return False
        return True

    def _rows(self, values: Tensor, batch: slice) -> slice:
        """Where those of a batch lie in ``values`` [R, ...]."""
        each = len(values) // len(self.images)
        return slice(each * batch.start, each * batch.stop)

    def _given(
        self, network: nn.Module, block: Block, inputs: list[Tensor], arguments: list[Arguments]
    ) -> Iterator[list[Tensor]]:
        """What the calls of ``block`` make of each batch; a copy of it, since some networks write into their input."""
        for batch in self.batches:
            yield [
                run_block(network, block, values[self._rows(values, batch)].to(self.device, copy=True), given)
                for values, given in zip(inputs, arguments, strict=True)
            ]

    def _reached(self, network: nn.Module, block: Block, first: list[Arguments]) -> Iterator[list[Tensor]]:
        """What arrives at the calls of ``block`` in each batch."""
        yield [call.activation for call in first]
        for index in range(1, len(self.batches)):
            yield [call.activation for call in self._arguments(network, block, index)]

    def _store(self, name: str, batches: Iterable[list[Tensor]]) -> list[Tensor]:
        """One tensor a call."""
        found: list[Tensor] = []
        for batch, values in zip(self.batches, batches, strict=True):
            if not found:
                count = len(self.images[batch])
                shapes = [(len(value) // count * len(self.images), *value.shape[1:]) for value in values]
                sizes = [math.prod(shape) * like.element_size() for shape, like in zip(shapes, values, strict=True)]
                limit = self.limit_bytes if sum(sizes) <= self.limit_bytes else 0
                for index, (shape, like) in enumerate(zip(shapes, values, strict=True)):
                    found.append(allocate(shape, like, limit, self.folder, f"{name}_{index}"))
            for stored, value in zip(found, values, strict=True):
                stored[self._rows(stored, batch)].copy_(value)
        return found

    def _remove(self, keep: Collection[str]) -> None:
        for file in self.folder.glob("*.activations"):
            if file.stem.rpartition("_")[0] not in keep:
                file.unlink()
