"""Pairs of layers: paths that channels go along unchanged but for their scale, and what may stand between.

They are found by following values through one forward: every operation in between is positively homogeneous, or moves
values, and of a private path nobody else reads what is in between. A depthwise layer is a pair with both of its
neighbors. Which input feature of the second layer stems from which output channel of the first is measured: the first
one's output is replaced by positive numbers, times two in the channels whose index has bit k set, for every k.
Flattened, pooled or shuffled channels need no rule of their own, and what mixes channels is no pair. All pairs are then
tried out with powers of two, which must change nothing; those that do change something (code that uses a weight in ways
of its own) are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfq.channels import (
    FloatNetwork,
    channel_dim,
    multiply,
    num_outputs,
    shaped,
)
from dfq.hooks import Dataflow, Op, evaluation_mode, forward_hooks
from dfq.modules import LOOKUPS, PRODUCTS, product_of
from dfq.sites import MOVING, Sites
from dfq.student import Student
from dfq.surgery import REWRITES

# f(s x) = s f(x) for s > 0, whatever the other arguments are.
LINEAR = {"mean", "sum", "mul", "interpolate", "upsample", "avg_pool1d", "avg_pool2d", "avg_pool3d"} | {
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
}
HOMOGENEOUS = MOVING | LINEAR | {"relu", "leaky_relu", "prelu", "abs"}
CLIPPED = "hardtanh"  # what nn.ReLU6 calls
RELU6_TOLERANCE = 0.01  # squared error of the network's outputs, relative to their square, without upper clipping


# ------------------------------------------------------------------------------------------------ paths


@dataclass(frozen=True)
class Chain:
    """How the output of one layer becomes the input of another, by way of :data:`HOMOGENEOUS` operations.

    Attributes:
        ops: in between, in order.
        is_private: nobody else reads any of the values in between.
    """

    first: str
    last: str
    ops: tuple[Op, ...]
    is_private: bool

    @property
    def activations(self) -> set[str]:
        """Names of the operations that are not linear."""
        return {op.name for op in self.ops} - MOVING - LINEAR


@dataclass(frozen=True)
class Path(Chain):
    """A chain that keeps channels apart.

    Attributes:
        channels: [I], the output channel of ``first`` that each input feature of ``last`` stems from; -1: none.
        shifts: a constant that is added to positive outputs of a channel is found in all its features.
    """

    channels: Tensor
    shifts: bool

    def at_inputs(self, values: Tensor, rest: float) -> Tensor:
        """Values of the first layer's output channels [O] at the second's input features [I]; ``rest`` for others."""
        return torch.where(self.channels < 0, rest, values[self.channels.clamp(min=0)])

    def at_outputs(self, values: Tensor, num_channels: int) -> Tensor:
        """The largest of the features' values [I], none below zero, for each of the first layer's channels [O]."""
        known = self.channels >= 0
        return values.new_zeros(num_channels).scatter_reduce_(0, self.channels[known], values[known], "amax")


def find_paths(network: FloatNetwork, layers: Iterable[str]) -> list[Path]:
    """All paths between two of ``layers``, in the order the second ones run. ReLU6 modules count as homogeneous."""
    products = layer_products(network, layers)
    flow = network.flow
    producers = {number: op for op in flow.ops for number in op.outputs}
    layer_of = {id(op): name for name, op in products.items()}
    active = set(flow.inputs)
    for op in flow.ops:
        if active & set(op.inputs):
            active |= set(op.outputs)
    chains = []
    for last, product in products.items():
        numbers = [product.inputs[0]]
        between: list[Op] = []
        before = producers.get(numbers[0])
        while before is not None and id(before) not in layer_of:
            sources = [number for number in before.inputs if number in active]
            if len(sources) != 1 or not (before.name in HOMOGENEOUS or relu6_of(network, before) is not None):
                break
            between.insert(0, before)
            numbers += sources
            before = producers.get(sources[0])
        if before is not None and id(before) in layer_of:
            is_private = all(_is_read_once(number, flow) for number in numbers)
            is_private &= not any(_is_read(n, flow) for op in between for n in op.outputs if n not in numbers)
            chains.append(Chain(layer_of[id(before)], last, tuple(between), is_private))
    return _measured(network, chains)


def relu6_of(network: FloatNetwork, op: Op) -> nn.Hardtanh | None:
    """The module that called ``op``, if that is a ReLU with an upper limit."""
    if op.name != CLIPPED:
        return None
    module = network.module.get_submodule(op.module)
    return module if isinstance(module, nn.Hardtanh) and module.min_val == 0 else None


def layer_products(network: FloatNetwork, layers: Iterable[str]) -> dict[str, Op]:
    """Layer → its product, of layers that run once and whose weight and bias nobody else has or reads."""
    flow = network.flow
    numbers = {name: number for number, names in flow.parameters.items() if len(names) == 1 for name in names}
    found = {}
    for name in layers:
        product = product_of(name, flow)
        layer = network.module.get_submodule(name)
        own = [f"{name}.{key}".lstrip(".") for key in ("weight", "bias") if getattr(layer, key, None) is not None]
        if product is None or product.name in LOOKUPS or not all(key in numbers for key in own):
            continue
        readers = [op for op in flow.ops if {numbers[key] for key in own} & set(op.inputs)]
        if len(readers) == 1 and len(flow.calls_of(name)) == 1 and product.inputs[0] not in flow.parameters:
            found[name] = product
    assert all(op.name in PRODUCTS for op in found.values())
    return found


def _is_read(number: int, flow: Dataflow) -> bool:
    return number in flow.outputs or any(number in op.inputs for op in flow.ops)


def _is_read_once(number: int, flow: Dataflow) -> bool:
    return number not in flow.outputs and sum(op.inputs.count(number) for op in flow.ops) == 1


def _measured(network: FloatNetwork, chains: list[Chain]) -> list[Path]:
    """The chains with what a few forwards show of them; those that mix channels are left out."""
    if not chains:
        return []
    firsts, lasts = {chain.first for chain in chains}, {chain.last for chain in chains}
    layers = {name: network.module.get_submodule(name) for name in firsts | lasts}
    sizes = {name: num_outputs(layers[name]) for name in firsts}

    def inputs(change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """Input [I, ...] of every last layer, where outputs of first layers are ``change(noise, channel index)``."""
        found = {}

        def keep(name: str, x: Tensor) -> None:
            found[name] = x.detach().float().cpu()

        substituted(network, {name: (layers[name], 0) for name in firsts}, {n: layers[n] for n in lasts}, change, keep)
        return found

    def with_bit(bit: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda noise, index: noise * (1 + (index >> bit & 1))

    with without_limit(relu6_between(network, chains).values()):
        base = inputs(lambda noise, index: noise)
        doubled = [inputs(with_bit(bit)) for bit in range(max(sizes.values()).bit_length())]
        shifted = inputs(lambda noise, index: noise + _shift(index))
    paths = []
    for chain in chains:
        if chain.last not in base:
            continue  # its input has no name of its own
        x = base[chain.last]
        channels = _channels(x, [given[chain.last] for given in doubled])
        if channels is not None and int(channels.max()) < sizes[chain.first]:
            expected = torch.where(channels < 0, 0.0, _shift(channels))[:, None]
            shifts = torch.allclose(shifted[chain.last] - x, expected.expand_as(x), atol=1e-3)
            paths.append(Path(chain.first, chain.last, chain.ops, chain.is_private, channels, shifts))
    return paths


def substituted(
    network: FloatNetwork,
    firsts: Mapping[str, tuple[nn.Module, int]],
    lasts: Mapping[str, nn.Module],
    change: Callable[[Tensor, Tensor], Tensor],
    look: Callable[[str, Tensor], None],
    with_grad: bool = False,
) -> Any:
    """Run the network with noise in the place of what some layers make, the same in every run; returns its outputs.

    Args:
        firsts: layer → itself, and the number of its first channel.
        change: of the noise, uniform in [1, 2), and the number of each channel, what is put in the place of outputs.
        look: is given the name of each layer in ``lasts`` and what it reads, [I, ...], before anything is put there.
    """
    rng = torch.Generator().manual_seed(0)

    def substitute(name: str, layer: nn.Module, _inputs: tuple, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        dim = channel_dim(layer, output)
        index = firsts[name][1] + torch.arange(output.shape[dim]).view(-1, *[1] * (output.dim() - 1 - dim))
        return change(1 + torch.rand(output.shape, generator=rng), index).to(output)

    def read(name: str, layer: nn.Module, given: tuple) -> None:
        look(name, given[0].movedim(channel_dim(layer, given[0]), 0).flatten(1))

    with (
        torch.set_grad_enabled(with_grad),
        evaluation_mode(network.module),
        # Looked at first: of a layer that is both, the input has not been changed by its own output.
        forward_hooks(lasts.items(), before=read),
        forward_hooks([(name, layer) for name, (layer, _) in firsts.items()], after=substitute),
    ):
        return network.module(network.example)


def _shift(index: Tensor) -> Tensor:
    """Another one for channels next to each other."""
    return 1 + index % 7 / 7


def _channels(base: Tensor, doubled: list[Tensor]) -> Tensor | None:
    """Index of the channel each feature [I] stems from, bit by bit; None if one stems from several."""
    seen = base != 0
    channels = torch.zeros(len(base), dtype=torch.int64)
    for bit, values in enumerate(doubled):
        ratio = values / base
        low = torch.where(seen, ratio, 2.0).amin(1)
        high = torch.where(seen, ratio, 1.0).amax(1)
        is_set = torch.where(seen.any(1), low, 1.0) > 1.5
        expected = 1.0 + is_set.float()
        wrong = torch.maximum((low - expected).abs(), (high - expected).abs()) > 1e-3
        if (wrong & seen.any(1)).any() or ((values != 0) & ~seen).any():
            return None
        channels += is_set.long() << bit
    return torch.where(seen.any(1), channels, -1)


# ------------------------------------------------------------------------------------------------ ReLU6


@contextmanager
def without_limit(modules: Iterable[nn.Hardtanh]) -> Iterator[None]:
    """ReLU6 modules that clip at zero alone."""
    limits = [(module, module.max_val) for module in modules]
    try:
        for module, _ in limits:
            module.max_val = math.inf
        yield
    finally:
        for module, limit in limits:
            module.max_val = limit


def limits_of(network: FloatNetwork) -> dict[str, nn.Hardtanh]:
    """Name → ReLU6 module, of all that the network runs."""
    found = {op.module: relu6_of(network, op) for op in network.flow.ops}
    return {name: module for name, module in found.items() if module is not None}


def relu6_between(network: FloatNetwork, chains: Sequence[Chain]) -> dict[str, nn.Hardtanh]:
    """Name → ReLU6 module between the layers of ``chains``."""
    found = {op.module: relu6_of(network, op) for chain in chains for op in chain.ops}
    return {name: module for name, module in found.items() if module is not None}


def replaceable(network: FloatNetwork, clipping: dict[str, nn.Hardtanh], images: Tensor) -> set[str]:
    """The ReLU6 modules that together may become ReLUs: outputs change by at most :data:`RELU6_TOLERANCE`.

    If all of them together change more, the half that clips most keeps its limit, and so on.
    """
    if not clipping:
        return set()
    lost = dict.fromkeys(clipping, 0.0)
    kept = dict.fromkeys(clipping, 0.0)

    def look(name: str, module: nn.Module, inputs: tuple) -> None:
        x = inputs[0].clamp(min=0)
        lost[name] += float((x - x.clamp(max=module.max_val)).square().sum())
        kept[name] += float(x.clamp(max=module.max_val).square().sum())

    batches = images.split(64)
    with forward_hooks(clipping.items(), before=look):
        wanted = [network.outputs(batch) for batch in batches]
    chosen = sorted(clipping, key=lambda name: lost[name] / max(kept[name], 1e-30))
    signal = sum(float(target.square().sum()) for target in wanted)
    while chosen:
        with without_limit(clipping[name] for name in chosen):
            outputs = map(network.outputs, batches)
            error = sum(float((a - b).square().sum()) for a, b in zip(outputs, wanted, strict=True))
        if error <= RELU6_TOLERANCE * signal:
            break
        chosen = chosen[: len(chosen) // 2]
    return set(chosen)


def replace_relu6_by_relu(student: Student, network: FloatNetwork, names: Iterable[str]) -> None:
    for name in names:
        if (network.before_folding[name], "relu") in student.surgery.rewrites:
            continue  # it has been one since an earlier equalization
        REWRITES["relu"](student.module.get_submodule(name))
        student.surgery.rewrites.append((network.before_folding[name], "relu"))
        _rename_sites(student, f"{name}.{CLIPPED}_", f"{name}.relu_")


def _rename_sites(student: Student, old: str, new: str) -> None:
    """A site is named after the operation it belongs to."""
    sites = student.surgery.sites

    def renamed(path: str) -> str:
        return new + path.removeprefix(old) if path.startswith(old) else path

    student.surgery.sites = Sites(
        {renamed(path): scheme for path, scheme in sites.quantizers.items()},
        {renamed(path): renamed(other) for path, other in sites.aliases.items()},
        {layer: renamed(path) for layer, path in sites.layer_inputs.items()},
        sites.has_integer_bias,
    )
    if sites.quantizers or sites.aliases:
        children = student.module.get_submodule(student.module.sites_path)._modules
        for key in list(children):  # all of them, which keeps their order
            children[renamed(key.replace("/", ".")).replace(".", "/")] = children.pop(key)


# ------------------------------------------------------------------------------------------------ scales


def without_surprises(network: FloatNetwork, paths: list[Path]) -> list[Path]:
    """The paths along which powers of two may be passed on without changing what the network computes."""
    if not paths:
        return []
    rng = torch.Generator().manual_seed(0)

    def passed_on(chosen: list[Path]) -> Tensor:
        layers = {name: network.module.get_submodule(name) for path in chosen for name in (path.first, path.last)}
        exponents = [torch.randint(-2, 3, (num_outputs(layers[path.first]),), generator=rng) for path in chosen]
        for path, exponent in zip(chosen, exponents, strict=True):
            pass_on(layers, path, torch.exp2(exponent.double()))
        outputs = network.outputs(network.example)
        for path, exponent in zip(chosen, exponents, strict=True):
            pass_on(layers, path, torch.exp2(-exponent.double()))
        return outputs

    def is_exact(chosen: list[Path]) -> bool:
        return bool((passed_on(chosen) - before).abs().max() <= 1e-4 * before.abs().max())

    with without_limit(relu6_between(network, paths).values()):
        before = network.outputs(network.example)
        return paths if is_exact(paths) else [path for path in paths if is_exact([path])]


def pass_on(layers: Mapping[str, nn.Module], path: Path, scale: Tensor) -> None:
    """Divide the first layer's outputs by ``scale`` [O], and multiply the weights that read them."""
    first, last = layers[path.first], layers[path.last]
    multiply(first.weight, shaped(first, 1 / scale, inputs=False))
    if first.bias is not None:
        multiply(first.bias, 1 / scale)
    multiply(last.weight, shaped(last, path.at_inputs(scale, 1.0), inputs=True))
