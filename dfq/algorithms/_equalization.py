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

Weights alone are balanced at the expense of the activations between them, which then need a wider range; and a weight
with a step of its own for each output channel, or a depthwise one, does not mind being scaled at all. So by default the
scales are those with the least noise (:func:`least_noise_scales`): of all layers l of the pairs, in relation to what
their output channels o vary by,

    sum_l sum_o ( sum_i W_oi^2 e_i(t s_i)  +  c sum_i d_oi^2 x_i^2 / s_i^2 ) / var(y_o)

with e_i(t s_i) the squared error of input channel i on synthetic samples, rounded to the bits that it gets within a
range of t s_i (t, the range of the whole tensor, is found along), x_i^2 its mean square, d_oi the error of a weight,
its step over sqrt(12), where the step follows from the largest scaled weight that shares it; c is
:data:`ROUNDING_SHARE`. A tensor that only per-channel and depthwise weights stand around is thus as good as rounded
channel by channel, and no runtime knows. ``balance_activations=False`` is the paper's rule.

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
from dfq.quantization import choose_qparams, fake_quantize, from_groups, to_groups
from dfq.scheme import TensorScheme
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
SMALLEST_RANGE = 0.1  # of a channel's activations, in units of the mean of all channels: real ones may well have more
ROUNDING_SHARE = 0.1  # of nearest rounding's squared error that is left where errors of weights make up for each other
RATIOS = (0.05, 32.0, 50)  # ranges that a channel is tried with, in units of its own: from, to, how many
NORM_ORDER = 16  # of weights that share a step, in place of the largest
LEARNING_RATE = 0.2  # of logarithms of scales and ranges
NUM_VALUES = 4096  # of a channel that are looked at, drawn at random
NUM_LARGEST = 8  # and the largest of each batch
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
    iterations: int = 200,
    replace_relu6: bool = True,
    images: Tensor | None = None,
    balance_activations: bool = True,
) -> list[Path]:
    """Equalize all pairs of a student in place: it computes what it did, and its grids are to be made anew.

    Args:
        iterations: steps, or rounds over all pairs at most.
        replace_relu6: also pairs with a ReLU6 between them, which becomes a ReLU where that is safe.
        images: [N, C, H, W], on which that is judged and activations are looked at; noise if there are none.
        balance_activations: least noise of weights and activations; false: ranges of weights, as in the paper.

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
    if balance_activations:
        scales = least_noise_scales(student, network, paths, images, iterations)
    else:
        scales = equalizing_scales(layers, paths, iterations)
    for path, scale in zip(paths, scales, strict=True):
        pass_on(layers, path, scale)
        record = rescaled(student, path.first)
        student.surgery.rescaled[path.first] = replace(record, scale=record.scale * scale, shift=record.shift / scale)
        record = rescaled(student, path.last)
        student.surgery.rescaled[path.last] = replace(
            record, input_scale=record.input_scale * path.at_inputs(scale, 1.0)
        )
    return paths


def equalizing_scales(layers: Mapping[str, nn.Module], paths: list[Path], iterations: int) -> list[Tensor]:
    """For each path what the first layer's output channels are to be divided by, by the paper's rule: [O], float64."""
    largest = {}  # magnitude of each kernel: all that a scale has to do with
    for name in {name for path in paths for name in (path.first, path.last)}:
        weight = _double(layers[name].weight)
        largest[name] = weight.abs().view(*weight.shape[:2], -1).amax(-1)
    scales = [torch.ones(num_outputs(layers[path.first]), dtype=torch.float64) for path in paths]
    for _ in range(iterations):
        change = 0.0
        for path, total in zip(paths, scales, strict=True):
            first, last = layers[path.first], layers[path.last]
            made = _reduced(first, largest[path.first], inputs=False)
            read = path.at_outputs(_reduced(last, largest[path.last], inputs=True), len(made))
            scale = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)
            largest[path.first] /= shaped(first, scale, inputs=False)
            largest[path.last] *= shaped(last, path.at_inputs(scale, 1.0), inputs=True)
            total *= scale
            change = max(change, float(scale.log().abs().max()))
        if change < CONVERGED:
            break
    return scales


# ------------------------------------------------------------------------------------------------ least noise


@dataclass(frozen=True)
class _Seen:
    """What a layer reads and makes of synthetic samples, in the student's units.

    Attributes:
        values: [I, M] of each input feature: some, and the largest ones, which 8 bits must not clip.
        shares: [M], how many of all values each of them stands for.
        power: [I], mean square.
        variance: [O] of each output channel; the smallest count as a hundredth of the mean.
    """

    values: Tensor
    shares: Tensor
    power: Tensor
    variance: Tensor


def least_noise_scales(
    student: Student, network: FloatNetwork, paths: list[Path], images: Tensor, iterations: int = 200
) -> list[Tensor]:
    """For each path what the first layer's output channels are to be divided by, [O], float64 on the CPU.

    Adam on the logarithms of all scales and ranges at once, from those that suit activations alone; what is minimized
    is in the module's docstring.

    Args:
        images: [N, C, H, W], which show what is read and made.
        iterations: steps.
    """
    if not paths:
        return []
    layers = {name: student.layers[name] for path in paths for name in (path.first, path.last)}
    seen = _looked_at(student, network, layers, paths, images)
    into = {path.last: index for index, path in enumerate(paths)}
    out_of = {path.first: index for index, path in enumerate(paths)}
    errors = {
        name: _RangeErrors(seen[name].values, seen[name].shares, layers[name].input_quantizer.scheme)
        for name in into
        if not layers[name].input_quantizer.scheme.is_float
    }
    noises = {name: _LayerNoise(layer, seen[name], errors.get(name), name in into) for name, layer in layers.items()}
    alive, logs = [], []
    for path in paths:
        size = num_outputs(layers[path.first])
        made, read = noises[path.first].largest_made, path.at_outputs(noises[path.last].largest_read, size)
        alive.append((made > 0) & (read > 0))
        start = torch.zeros(size, dtype=torch.float64)
        if path.last in errors:
            start = path.at_outputs(errors[path.last].best, size).clamp(min=1e-30).log()
        logs.append(_centered(start, alive[-1]).requires_grad_())
    ranges = {name: error.best.log().mean().requires_grad_() for name, error in errors.items()}

    def noise(name: str) -> Tensor:
        into_log = paths[into[name]].at_inputs(logs[into[name]], 0.0) if name in into else None
        return noises[name](into_log, logs[out_of[name]] if name in out_of else None, ranges.get(name))

    optimizer = torch.optim.Adam([*logs, *ranges.values()], lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    with torch.enable_grad():
        for _ in range(iterations):
            loss = torch.stack([noise(name) for name in layers]).sum()
            if not loss.requires_grad:  # nothing is rounded
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return [_centered(log.detach(), mask).exp() for log, mask in zip(logs, alive, strict=True)]


def _centered(logs: Tensor, alive: Tensor) -> Tensor:
    """Zero on average, and where a channel has no weights or nobody reads it."""
    return torch.where(alive, logs - logs[alive].mean(), 0.0) if alive.any() else torch.zeros_like(logs)


class _LayerNoise:
    """Noise of one layer's outputs, in relation to what they vary by, as a function of the scales before and behind it.

    Scales are factors of rows and columns, so that what is summed over both needs no more than a product with a vector.

    Args:
        errors: of its inputs; None: they are float.
        is_scaled: there are scales before it.

    Attributes:
        largest_made, largest_read: magnitude of the weights that make an output [O], and that read an input [I].
    """

    def __init__(self, layer: nn.Module, seen: _Seen, errors: _RangeErrors | None, is_scaled: bool):
        self.layer, self.seen, self.errors = layer, seen, errors
        self.groups = getattr(layer, "groups", 1)
        kernels = _double(layer.weight).view(*layer.weight.shape[:2], -1)
        self.kernel_size = kernels.shape[2]
        largest = self._in_groups(kernels.abs().amax(-1))  # [G, O / G, I / G]
        squares = self._in_groups(kernels.square().sum(-1))
        self.gains = (squares / seen.variance.view(self.groups, -1, 1)).sum(1).flatten()  # [I]
        self.largest_made, self.largest_read = largest.amax(2).flatten(), largest.amax(1).flatten()
        self.most = largest.amax().clamp(min=1e-30)
        self.powers = (largest / self.most) ** NORM_ORDER
        quantizer = layer.weight_quantizer
        self.steps, self.axis = quantizer.scheme, quantizer.axis
        # A step of its own goes along with its output.
        self.rounds = not quantizer.scheme.is_float and (self.axis is None or is_scaled)

    def __call__(self, into_log: Tensor | None, out_log: Tensor | None, log_range: Tensor | None) -> Tensor:
        """A scalar, the mean over outputs, of the logarithms of what inputs [I] are multiplied by and outputs [O] are
        divided by (None: nothing), and of the range of the input tensor."""
        total = torch.zeros((), dtype=torch.float64)
        into_log = torch.zeros_like(self.gains) if into_log is None else into_log
        if self.errors is not None:
            assert log_range is not None
            total = (self.gains * self.errors(log_range + into_log)).sum()
        if self.rounds:
            out_log = torch.zeros_like(self.largest_made) if out_log is None else out_log
            total = total + ROUNDING_SHARE * self._rounding(into_log, out_log)
        return total / len(self.largest_made)

    def _rounding(self, into_log: Tensor, out_log: Tensor) -> Tensor:
        """Of weights: d^2 x^2 / s^2 over the variance, summed."""
        read = (self.seen.power * (-2 * into_log).exp()).view(self.groups, 1, -1) * self.kernel_size
        made = ((2 * out_log).exp() / self.seen.variance).view(self.groups, -1, 1)
        half_step = self._shared_range(into_log, -out_log) / (self.steps.quant_max - self.steps.quant_min)
        squares = half_step.square() / 3
        if squares.shape[2] == 1:  # all that an output reads has one step
            return ((squares * made).sum((1, 2)) * read.sum((1, 2))).sum()
        return (squares * made * read).sum()

    def _shared_range(self, into_log: Tensor, made_log: Tensor) -> Tensor:
        """About the largest magnitude of the scaled weights that share a step: [G, O / G, 1 or I / G].

        A norm of high order, for the gradient: all weights that are nearly as large have to give way together.
        """
        highest = into_log.detach().amax(), made_log.detach().amax()  # keeps powers within what float64 holds
        read = (NORM_ORDER * (into_log - highest[0])).exp().view(self.groups, -1, 1)
        made = (NORM_ORDER * (made_log - highest[1])).exp().view(self.groups, -1, 1)
        size = self.steps.group_size
        if self.axis is not None and size is not None and self.powers.numel() == self.layer.weight.numel():
            scaled = self.powers * read.mT * made
            kernels = (scaled.mT if isinstance(self.layer, TRANSPOSED) else scaled).flatten(0, 1)  # as the weight lies
            groups = to_groups(kernels, self.axis, size)
            groups = groups.sum(-1, keepdim=True).expand_as(groups)
            sums = self._in_groups(from_groups(groups, self.axis, kernels.shape))
        else:
            sums = self.powers @ read * made
            if self.axis is None:
                sums = sums.sum().expand_as(sums)
        # Rows of zeros have a gradient too.
        return sums.clamp(min=1e-300).pow(1 / NORM_ORDER) * self.most * (highest[0] + highest[1]).exp()

    def _in_groups(self, kernels: Tensor) -> Tensor:
        """One value a kernel of the weight, [G, O / G, I / G]."""
        kernels = kernels.view(self.groups, -1, kernels.shape[1])
        return kernels.mT if isinstance(self.layer, TRANSPOSED) else kernels


class _RangeErrors:
    """Squared error of each input feature as a function of the range that it is rounded within.

    Args:
        values: [I, M] of each feature; of one that is hardly there they count as larger.
        shares: [M], how many values each stands for.
        scheme: bits and grid of the whole tensor.

    Attributes:
        best: [I], the range with the least error.
    """

    def __init__(self, values: Tensor, shares: Tensor, scheme: TensorScheme):
        own = values.abs().amax(1)
        least = (SMALLEST_RANGE * own.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        ramp = torch.linspace(0, 1, values.shape[1]).expand_as(values)
        values = torch.where(own[:, None] > 0, values * (least / own).clamp(min=1)[:, None], least * ramp)
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        self.own = torch.maximum(-low, high).double()
        first, last, number = RATIOS
        ratios = torch.linspace(math.log(first), math.log(last), number, dtype=torch.float64)
        found, weights = [], shares / shares.sum()
        for ratio in ratios.exp().tolist():
            scale, zero_point = choose_qparams(low * ratio, high * ratio, scheme)
            found.append((fake_quantize(values, scale, zero_point, scheme, axis=0) - values).square() @ weights)
        errors = torch.stack(found, 1).double()
        self.best = self.own * ratios[errors.argmin(1)].exp()
        self.logs = errors.clamp(min=1e-12 * float(errors.max()) + 1e-300).log()
        self.first, self.width = float(ratios[0]), float(ratios[1] - ratios[0])

    def __call__(self, log_range: Tensor) -> Tensor:
        """[I], between the points linear in logarithms; ``log_range``: [I]."""
        place = ((log_range - self.own.log() - self.first) / self.width).clamp(0, self.logs.shape[1] - 1.001)
        before = place.detach().long()[:, None]
        low, high = self.logs.gather(1, before)[:, 0], self.logs.gather(1, before + 1)[:, 0]
        return (low + (high - low) * (place - before[:, 0])).exp()


def _looked_at(
    student: Student, network: FloatNetwork, names: Iterable[str], paths: list[Path], images: Tensor
) -> dict[str, _Seen]:
    """Layer → what it reads and makes in the float network."""
    rng = torch.Generator().manual_seed(0)
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    shares: dict[str, list[Tensor]] = {name: [] for name in names}
    power: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], name: str, x: Tensor, share: float) -> None:
        sums[name] = sums.get(name, 0) + _double(x.mean(1)) * share

    def look(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        share = len(inputs[0]) / len(images)
        x = inputs[0].float().movedim(channel_dim(layer, inputs[0]), 0).flatten(1)
        y = output.float().movedim(channel_dim(layer, output), 0).flatten(1)
        some, most = math.ceil(NUM_VALUES * share), min(NUM_LARGEST, x.shape[1] - 1)
        chosen = torch.randint(x.shape[1], (some,), generator=rng)
        values[name] += [x[:, chosen.to(x.device)].cpu(), x.gather(1, x.abs().topk(most, 1).indices).cpu()]
        shares[name] += [torch.full((some,), (x.shape[1] - most) / some), torch.ones(most)]
        for sums, seen in ((power, x.square()), (first, y), (second, y.square())):
            add(sums, name, seen, share)

    modules = [(name, network.module.get_submodule(name)) for name in values]
    with without_limit(relu6_between(network, paths).values()), forward_hooks(modules, after=look):
        for batch in images.split(64):
            network.outputs(batch)
    found = {}
    for name, parts in values.items():
        record = rescaled(student, name)
        variance = (second[name] - first[name].square()) / record.scale.square()
        variance = variance.clamp(min=max(1e-2 * float(variance.mean()), 1e-30))
        read = torch.cat(parts, 1) / record.input_scale.float()[:, None]
        found[name] = _Seen(read, torch.cat(shares[name]), power[name] / record.input_scale.square(), variance)
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
