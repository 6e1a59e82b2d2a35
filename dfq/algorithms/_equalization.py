"""Cross-layer equalization and high-bias absorption, and the paths between layers that they go along.

DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721), section 4.1. Batch norms are folded. A function f with f(s x) = s f(x)
for s > 0 lets a scale pass from one layer to the next (eq. 5-7): with r1_i the largest magnitude of the weights that
make channel i, r2_i of those that read it,

    s_i = sqrt(r1_i r2_i) / r2_i,    W1_i / s_i,    b1_i / s_i,    W2_i s_i                              (eq. 9-11)

makes both ranges sqrt(r1_i r2_i); pairs in turn until nothing changes. High biases, which this can make, are absorbed
by the next layer (eq. 12-15): through a ReLU, a value that is almost never below c_i = max(0, beta_i - 3 gamma_i) (of
the batch norm, its scale and shift equalized along) may lose c_i, b1 - c, b2 + W2 c.

**Pairs** are found by following values through one forward: every operation in between is positively homogeneous, or
moves values, and nobody else reads what is in between. A depthwise layer is a pair with both of its neighbors. Which
input feature of the second layer stems from which output channel of the first is measured: the first one's output is
replaced by positive numbers, times two in the channels whose index has bit k set, for every k. Flattened, pooled or
shuffled channels need no rule of their own, and what mixes channels is no pair. All pairs are then tried out with
powers of two, which must change nothing; those that do change something (code that uses a weight in ways of its own)
are dropped.

Weights alone are balanced at the expense of the activations between them, which then need a wider range. So by default
these count as well: with u_i the root mean square of channel i on synthetic samples,

    s_i = (r1_i u_i / r2_i)^(1/3),                       so that afterwards  r1_i u_i / r2_i = 1 in every channel

which keeps log r1, log u and log r2 of the channels as close to constants as one scale can (least squares).
``balance_activations=False`` is the paper's rule.

Differences from the paper, beside that: ranges are largest magnitudes, not widths, as weight grids here contain zero.
A ReLU6 is replaced by ReLU only between the layers of a pair, and only where that hardly changes what the network makes
of synthetic samples. Biases are absorbed only where the next layer does not pad with zeros, which would not stand for
c, and no further than samples go, since the tails of a real batch norm's input are not normal. Weights are changed
once, by the product of all scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dfq.hooks import Dataflow, Op, evaluation_mode, forward_hooks, record_dataflow, tensors_in
from dfq.modules import LOOKUPS, PRODUCTS, QUANTIZED, BiasQuantizer, fold_batch_norm, product_of
from dfq.sites import MOVING, Sites
from dfq.student import Rescaled, Student
from dfq.surgery import REWRITES, apply
from dfq.teacher import Teacher
from dfq.weights import copy_network

# f(s x) = s f(x) for s > 0, whatever the other arguments are.
LINEAR = {"mean", "sum", "mul", "interpolate", "upsample", "avg_pool1d", "avg_pool2d", "avg_pool3d"} | {
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
}
HOMOGENEOUS = MOVING | LINEAR | {"relu", "leaky_relu", "prelu", "abs"}
CLIPPED = "hardtanh"  # what nn.ReLU6 calls
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SMALLEST_SIZE = 0.1  # of a channel's activations, in units of the mean of all channels
CONVERGED = 1e-3  # largest |log s| of a round that ends the iteration
RELU6_TOLERANCE = 0.01  # squared error of the network's outputs, relative to their square, without upper clipping


# ------------------------------------------------------------------------------------------------ the float network


@dataclass(frozen=True)
class FloatNetwork:
    """The teacher's network as the student's was before its layers were swapped: rewritten, batch norms folded.

    ``before_folding``: the name that each module had then, under which a rewrite is repeated.
    """

    module: nn.Module
    flow: Dataflow
    example: Tensor
    before_folding: dict[str, str]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """All that the network returns, in a row."""
        with evaluation_mode(self.module):
            found = self.module(images.to(self.example.device, copy=True))
        return torch.cat([x.float().flatten() for x in tensors_in(found)])


def float_network(student: Student, teacher: Teacher) -> FloatNetwork:
    """A copy in the teacher's own units, whatever equalization has done to the student; a replaced ReLU6 is one."""
    module = copy_network(teacher.module)
    apply(module, [(name, kind) for name, kind in student.surgery.rewrites if kind != "relu"])
    names = {id(part): name for name, part in module.named_modules()}
    fold_batch_norm(module, student.surgery.folded)
    after = {name: names[id(part)] for name, part in module.named_modules() if id(part) in names}
    example = teacher.example()
    return FloatNetwork(module, record_dataflow(module, example), example, after)


def rescaled(student: Student, name: str) -> Rescaled:
    """Of one layer."""
    layer = student.layers[name]
    found = student.surgery.rescaled.get(name)
    if found is None:
        ones = torch.ones(num_outputs(layer), dtype=torch.float64)
        found = Rescaled(ones, torch.zeros_like(ones), torch.ones(num_inputs(layer), dtype=torch.float64))
    return found


def weight_in_float(student: Student, network: FloatNetwork, name: str) -> Tensor:
    """What a layer's weight would be had nobody rounded it; float64, on the CPU."""
    layer, record = network.module.get_submodule(name), rescaled(student, name)
    factor = shaped(layer, record.input_scale, inputs=True) / shaped(layer, record.scale, inputs=False)
    return _double(layer.weight) * factor.view(*factor.shape, *[1] * (layer.weight.dim() - 2))


def batch_norm_statistics(student: Student, teacher: Teacher) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → mean and standard deviation [O] of its output as the folded batch norm knows them, in its own units."""
    found = {}
    for name, norm_name in student.surgery.folded:
        if name not in student.layers:
            continue
        norm, record = teacher.module.get_submodule(norm_name), rescaled(student, name)
        mean = torch.zeros_like(record.scale) if norm.bias is None else _double(norm.bias)
        std = torch.ones_like(record.scale) if norm.weight is None else _double(norm.weight).abs()
        found[name] = (mean / record.scale - record.shift, std / record.scale)
    return found


# ------------------------------------------------------------------------------------------------ layers


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()  # on the CPU: MPS has no float64


def num_outputs(layer: nn.Module) -> int:
    return layer.out_channels if hasattr(layer, "out_channels") else layer.weight.shape[0]


def num_inputs(layer: nn.Module) -> int:
    return layer.in_channels if hasattr(layer, "in_channels") else layer.weight.shape[1]


def channel_dim(layer: nn.Module, x: Tensor) -> int:
    """The dimension of an input or output that its channels lie along."""
    return x.dim() - 1 - (layer.weight.dim() - 2)


def shaped(layer: nn.Module, values: Tensor, inputs: bool) -> Tensor:
    """Values of output channels [O], or of input features [I], for the kernels of the layer's weight: [.., ..]."""
    if inputs == isinstance(layer, TRANSPOSED):  # the weight's first dimension
        return values.view(-1, 1)
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    return values.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])


def _reduced(layer: nn.Module, kernels: Tensor, inputs: bool) -> Tensor:
    """The inverse: of one value a kernel [.., ..] the largest of each output channel [O], or of each input [I]."""
    if inputs == isinstance(layer, TRANSPOSED):
        return kernels.amax(1)
    return kernels.view(getattr(layer, "groups", 1), -1, kernels.shape[1]).amax(1).flatten()


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether some of the layer's outputs read zeros beside its input."""
    if isinstance(layer, TRANSPOSED):
        return True
    padding = getattr(layer, "padding", 0)
    if getattr(layer, "padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def ensure_bias(student: Student, name: str) -> bool:
    """Whether the layer has a bias now: one is added (of zeros, which a saved student has too) where that is safe."""
    layer = student.layers[name]
    if layer.bias is not None:
        return True
    if type(layer) not in QUANTIZED.values() or isinstance(layer, nn.Embedding):
        return False  # a sub-class may not read it
    REWRITES["bias"](layer)
    student.surgery.rewrites.append((name, "bias"))
    floats = layer.input_quantizer.scheme.is_float or layer.weight_quantizer.scheme.is_float
    if student.surgery.sites.has_integer_bias and not floats:
        layer.bias_quantizer = BiasQuantizer()
    return True


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
    clipping = relu6_between(network, chains).values()

    def inputs(change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """Input [I, ...] of every last layer, where outputs of first layers are ``change(noise, channel index)``."""
        rng = torch.Generator().manual_seed(0)
        found = {}

        def substitute(name: str, layer: nn.Module, _inputs: tuple, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            dim = channel_dim(layer, output)
            index = torch.arange(output.shape[dim]).view(-1, *[1] * (output.dim() - 1 - dim))
            return change(1 + torch.rand(output.shape, generator=rng), index).to(output)

        def keep(name: str, layer: nn.Module, given: tuple) -> None:
            found[name] = given[0].detach().movedim(channel_dim(layer, given[0]), 0).flatten(1).float().cpu()

        with (
            torch.no_grad(),
            evaluation_mode(network.module),
            without_limit(clipping),
            # Kept first: of a layer that is both, the input has not been changed by its own output.
            forward_hooks([(name, layers[name]) for name in lasts], before=keep),
            forward_hooks([(name, layers[name]) for name in firsts], after=substitute),
        ):
            network.module(network.example)
        return found

    def with_bit(bit: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda noise, index: noise * (1 + (index >> bit & 1))

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


def _replace_relu6(student: Student, network: FloatNetwork, names: Iterable[str]) -> None:
    for name in names:
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


# ------------------------------------------------------------------------------------------------ equalization


@torch.no_grad()
def equalize(
    student: Student,
    teacher: Teacher,
    iterations: int = 100,
    replace_relu6: bool = True,
    images: Tensor | None = None,
    balance_activations: bool = True,
) -> list[Path]:
    """Equalize all pairs of a student in place: it computes what it did, and its grids are to be made anew.

    Args:
        iterations: rounds over all pairs at most.
        replace_relu6: also pairs with a ReLU6 between them, which becomes a ReLU where that is safe.
        images: [N, C, H, W], on which that is judged and activations are looked at; noise if there are none.
        balance_activations: ranges of activations count as well; false: those of weights alone, as in the paper.

    Returns:
        The pairs, with what is between them.
    """
    network = float_network(student, teacher)
    images = network.example if images is None else images
    paths = [path for path in find_paths(network, student.layers) if path.is_private]
    paths = without_surprises(network, paths)
    clipping = relu6_between(network, paths)
    chosen = replaceable(network, clipping, images) if replace_relu6 else set()
    paths = [path for path in paths if not any(op.module in clipping.keys() - chosen for op in path.ops)]
    _replace_relu6(student, network, sorted({op.module for path in paths for op in path.ops} & chosen))
    layers = student.layers
    sizes = _activation_sizes(student, network, paths, images) if balance_activations else None
    for path, scale in zip(paths, equalizing_scales(layers, paths, iterations, sizes), strict=True):
        pass_on(layers, path, scale)
        record = rescaled(student, path.first)
        student.surgery.rescaled[path.first] = replace(record, scale=record.scale * scale, shift=record.shift / scale)
        record = rescaled(student, path.last)
        student.surgery.rescaled[path.last] = replace(
            record, input_scale=record.input_scale * path.at_inputs(scale, 1.0)
        )
    return paths


def equalizing_scales(
    layers: Mapping[str, nn.Module], paths: list[Path], iterations: int, sizes: list[Tensor] | None = None
) -> list[Tensor]:
    """For each path what the first layer's output channels are to be divided by, [O], float64 on the CPU.

    Args:
        sizes: for each path those of the activations [O], all above zero; None: they do not count.
    """
    sizes = None if sizes is None else list(sizes)
    largest = {}  # magnitude of each kernel: all that a scale has to do with
    for name in {name for path in paths for name in (path.first, path.last)}:
        weight = _double(layers[name].weight)
        largest[name] = weight.abs().view(*weight.shape[:2], -1).amax(-1)
    scales = [torch.ones(num_outputs(layers[path.first]), dtype=torch.float64) for path in paths]
    for _ in range(iterations):
        change = 0.0
        for index, (path, total) in enumerate(zip(paths, scales, strict=True)):
            first, last = layers[path.first], layers[path.last]
            made = _reduced(first, largest[path.first], inputs=False)
            read = path.at_outputs(_reduced(last, largest[path.last], inputs=True), len(made))
            ratio = made / read if sizes is None else made * sizes[index] / read
            scale = torch.where((made > 0) & (read > 0), ratio.pow(1 / 2 if sizes is None else 1 / 3), 1.0)
            if sizes is not None:
                sizes[index] = sizes[index] / scale
            largest[path.first] /= shaped(first, scale, inputs=False)
            largest[path.last] *= shaped(last, path.at_inputs(scale, 1.0), inputs=True)
            total *= scale
            change = max(change, float(scale.log().abs().max()))
        if change < CONVERGED:
            break
    return scales


def _activation_sizes(student: Student, network: FloatNetwork, paths: list[Path], images: Tensor) -> list[Tensor]:
    """For each path the root mean square of what the second layer reads, in each channel of the first: [O]."""
    squares: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, inputs: tuple) -> None:
        x = inputs[0].float().movedim(channel_dim(layer, inputs[0]), 0).flatten(1)
        squares[name] = squares.get(name, 0) + _double(x.square().mean(1)) * len(inputs[0])

    names = {path.last for path in paths}
    with (
        without_limit(relu6_between(network, paths).values()),
        forward_hooks([(name, network.module.get_submodule(name)) for name in names], before=look),
    ):
        for batch in images.split(64):
            network.outputs(batch)
    found = []
    for path in paths:
        record = rescaled(student, path.first)
        size = path.at_outputs((squares[path.last] / len(images)).sqrt(), len(record.scale)) / record.scale
        # A channel that is hardly ever there needs no finer steps than a tenth of the others'.
        found.append(size.clamp(min=SMALLEST_SIZE * float(size.mean())) if size.any() else torch.ones_like(size))
    return found


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
    _multiply(first.weight, shaped(first, 1 / scale, inputs=False))
    if first.bias is not None:
        _multiply(first.bias, 1 / scale)
    _multiply(last.weight, shaped(last, path.at_inputs(scale, 1.0), inputs=True))


def _multiply(x: Tensor, factor: Tensor) -> None:
    x.data.copy_(_double(x) * factor.view(*factor.shape, *[1] * (x.dim() - factor.dim())))


# ------------------------------------------------------------------------------------------------ absorption


@torch.no_grad()
def absorb_biases(
    student: Student, teacher: Teacher, paths: list[Path], images: Tensor | None = None, num_stds: float = 3.0
) -> list[Path]:
    """Let second layers of ``paths`` add what is always there in their inputs, in place; returns where that was done.

    c = max(0, mean - num_stds * std) of the folded batch norm, only through ReLUs; no more than the smallest value in
    ``images`` [N, C, H, W], if there are some.
    """
    statistics = batch_norm_statistics(student, teacher)
    least = {} if images is None else _smallest_outputs(student, teacher, {path.first for path in paths}, images)
    done = []
    for path in paths:
        last = student.layers[path.last]
        if path.activations != {"relu"} or not path.shifts or path.first not in statistics or pads_with_zeros(last):
            continue
        mean, std = statistics[path.first]
        constant = (mean - num_stds * std).clamp(min=0)
        if path.first in least:
            constant = torch.minimum(constant, least[path.first].clamp(min=0))
        if not constant.any() or not ensure_bias(student, path.last):
            continue
        first, record = student.layers[path.first], rescaled(student, path.first)
        _add(first.bias, -constant)
        _add(last.bias, products_with(last, _double(last.weight), path.at_inputs(constant, 0.0)))
        student.surgery.rescaled[path.first] = replace(record, shift=record.shift + constant)
        done.append(path)
    return done


def _smallest_outputs(student: Student, teacher: Teacher, names: set[str], images: Tensor) -> dict[str, Tensor]:
    """Layer → smallest value of each output channel [O], in the student's units."""
    network = float_network(student, teacher)
    found: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        least = _double(output.movedim(channel_dim(layer, output), 0).flatten(1).amin(1))
        found[name] = torch.minimum(least, found.get(name, least))

    with forward_hooks([(name, network.module.get_submodule(name)) for name in names], after=look):
        for batch in images.split(64):
            network.outputs(batch)
    records = {name: rescaled(student, name) for name in found}
    return {name: least / records[name].scale - records[name].shift for name, least in found.items()}


def _add(x: Tensor | None, change: Tensor) -> None:
    assert x is not None
    x.copy_(_double(x) + change)


def products_with(layer: nn.Module, weight: Tensor, values: Tensor) -> Tensor:
    """What ``layer`` makes of constant input features [I] with ``weight``, where it does not pad: [O]."""
    factor = shaped(layer, values, inputs=True)
    kernels = weight.view(*weight.shape[:2], -1).sum(-1) * factor
    if not isinstance(layer, TRANSPOSED):
        return kernels.sum(1)
    return kernels.view(layer.groups, -1, kernels.shape[1]).sum(1).flatten()
