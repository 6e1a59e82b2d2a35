"""Quantized layers, and the surgery that puts them into any module tree: find, fold, swap.

A layer is swapped in place, by giving the object a class that derives from its own: references to it (shared modules,
lists, hooks, user attributes) stay valid, and ``isinstance(layer, nn.Conv2d)`` stays true.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.hooks import Dataflow, Op, evaluation_mode
from dfq.precision import double
from dfq.quantization import (
    broadcast,
    dynamic_qparams,
    fake_quantize,
    from_groups,
    round_scale,
    round_through,
    round_zero_point,
    scale_through,
    to_groups,
    zero_point_through,
)
from dfq.scheme import FLOAT, ROLES, Scheme, TensorScheme

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
PRODUCTS = {  # operations that multiply matrices: what weight layers and attention are made of
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear"),
    *("matmul", "bmm", "baddbmm", "mm", "addmm", "einsum", "tensordot", "scaled_dot_product_attention", "grouped_mm"),
    *("multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell"),
}
LOOKUPS = {"embedding"}
LARGEST_BIAS = 2.0**30  # an int32 bias in steps of input scale times weight scale leaves room for the sum


class Quantizer(nn.Module):
    """Fake-quantizes one tensor on a grid: ``scale``, ``zero_point`` (buffers), bits from ``scheme``.

    Passes its input through until it has a grid (:meth:`set_qparams`) and while ``enabled`` is false. An algorithm may
    turn ``scale`` and ``zero_point`` into parameters and set ``gradient_scale`` and ``stable`` to train them.

    Args:
        shape: of the scale: () per tensor, [C] per channel, [C, G] per group of a weight. A dynamic grid has none.
        axis: the channel dimension of a weight.
        feature_axis: the dimension of an activation that a layer sums over: what a token's values lie along.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, scheme: TensorScheme, shape: tuple[int, ...] = (), axis: int | None = None, feature_axis: int = -1
    ):
        super().__init__()
        self.scheme, self.axis, self.feature_axis = scheme, axis, feature_axis
        self.enabled = False
        self.gradient_scale = 1.0
        self.stable = False
        dtype = torch.float32 if scheme.has_float_zero_point else torch.int32
        self.register_buffer("scale", torch.ones(shape) if self.has_qparams else None)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=dtype) if self.has_qparams else None)

    @property
    def has_qparams(self) -> bool:
        """Whether there is a grid to be found: not for float, not for what has the range of each batch."""
        return not self.scheme.is_float and not self.scheme.dynamic

    def rows(self, x: Tensor) -> Tensor:
        """A weight as [R, M], one row for each entry of ``scale``."""
        if self.axis is None:
            return x.reshape(1, -1)
        if self.scheme.group_size is not None:
            return to_groups(x, self.axis, self.scheme.group_size).flatten(0, 1)
        return x.movedim(self.axis, 0).flatten(1)

    def steps_of(self, x: Tensor) -> Tensor:
        """The step that each value of a weight is rounded with, to broadcast against ``x``; a copy."""
        scale = self.scale.detach().clone()
        if self.scheme.group_size is None:
            return broadcast(scale, x, self.axis)
        groups = to_groups(x, self.axis or 0, self.scheme.group_size)
        return from_groups(scale[..., None].expand_as(groups), self.axis or 0, x.shape)

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a grid (as many entries as ``self.scale``) and start quantizing."""
        with torch.no_grad():
            self.scale.copy_(round_scale(scale.reshape(self.scale.shape), self.scheme))
            zero_point = zero_point.reshape(self.zero_point.shape)
            if self.scheme.has_float_zero_point:
                zero_point = round_zero_point(zero_point.to(self.scale), self.scale, self.scheme)
            self.zero_point.copy_(zero_point)
        self.enabled = True

    def freeze(self) -> None:
        """Stop all training: scale and zero point become constants of the format that they are stored in."""
        if self.has_qparams:
            scale, zero_point = round_scale(self.scale.detach(), self.scheme), self.zero_point.detach()
            if zero_point.is_floating_point():
                zero_point = round_zero_point(zero_point, scale, self.scheme)
                zero_point = zero_point if self.scheme.has_float_zero_point else zero_point.to(torch.int32)
            for name, value in (("scale", scale), ("zero_point", zero_point)):
                self._parameters.pop(name, None)
                self.register_buffer(name, value.clone())
        self.gradient_scale, self.stable = 1.0, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.scheme.is_float:
            return x
        if self.scheme.dynamic:
            return self._with_the_range_of(x)
        scale = scale_through(self.scale, self.scheme)
        zero_point = zero_point_through(self.zero_point, scale, self.scheme)
        if self.scheme.group_size is None:
            return self._fake_quantize(x, scale, zero_point, self.axis)
        assert self.axis is not None
        groups = to_groups(x, self.axis, self.scheme.group_size)
        return from_groups(self._fake_quantize(groups, scale[..., None], zero_point[..., None]), self.axis, x.shape)

    def _fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
        return fake_quantize(x, scale, zero_point, self.scheme, axis, self.gradient_scale, self.stable)

    def _with_the_range_of(self, x: Tensor) -> Tensor:
        """Dynamic: one grid for the batch, for each token, or for each group of a token's values.

        The tokens of a convolution are whole samples: it sums over positions, and no kernel could undo their scales.
        """
        if not x.numel():  # an expert that no token chose
            return x
        if self.scheme.granularity == "per_channel":
            return self._over_tokens(x)
        if self.scheme.group_size is not None:
            groups = x.movedim(self.feature_axis, -1).unflatten(-1, (-1, self.scheme.group_size))
            rounded = self._fake_quantize(groups, *dynamic_qparams(groups, self.scheme, (-1,)))
            return rounded.flatten(-2).movedim(-1, self.feature_axis)
        dims = tuple(range(x.dim()))
        if self.scheme.granularity == "per_token":
            dims = (dims[self.feature_axis],) if self.feature_axis < 0 else dims[1:]
        return self._fake_quantize(x, *dynamic_qparams(x, self.scheme, dims))

    def _over_tokens(self, x: Tensor) -> Tensor:
        """Keys [..., T, E], or [..., E, T]: each channel over each full group of tokens; those of the last stay."""
        axis, size = -3 - self.feature_axis, self.scheme.group_size
        assert size is not None
        full = x.shape[axis] // size * size
        if not full:
            return x
        groups = x.narrow(axis, 0, full).unflatten(axis, (-1, size))
        rounded = self._fake_quantize(groups, *dynamic_qparams(groups, self.scheme, (axis,))).flatten(axis - 1, axis)
        return torch.cat([rounded, x.narrow(axis, full, x.shape[axis] - full)], axis)

    def extra_repr(self) -> str:
        return f"{self.scheme.label} bits, {self.scheme.granularity}, axis={self.axis}"


class QuantizedLayer(nn.Module):
    """Mixed into a weight layer's class: quantizes the layer's input and its weight, then does what the layer does.

    ``input_is_on_grid``: the input comes from ``input_quantizer`` already, which was called where it was made.
    ``bias_quantizer``: there if the bias is rounded too. ``correction``: there if a pair of thin matrices makes up for
    a part of what rounding costs.
    """

    weight: Tensor
    bias: Tensor | None
    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    channel_axis: ClassVar[int] = 0  # of the weight: the output channels
    feature_axis: ClassVar[int] = 1  # of the input: what the layer sums over
    input_is_on_grid = False
    bias_quantizer: BiasQuantizer | None
    low_rank: LowRank | None  # there while it is trained in place of the weight
    correction: LowRankCorrection | None

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input if self.input_is_on_grid else self.input_quantizer(input)
        own: Any = vars(self)  # the layer's own forward reads weight and bias from itself: here before the parameters
        weight = self.weight if self.low_rank is None else self.low_rank(self.weight)
        own["weight"], bias = self.weight_quantizer(weight), getattr(self, "bias", None)
        own["bias"] = bias if self.bias_quantizer is None else self.bias_quantizer(bias, self)
        try:
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the class this is mixed into
        finally:
            del own["weight"], own["bias"]
        return y if self.correction is None else y + self.correction(x)


class LowRankCorrection(nn.Module):
    """What is added to a linear layer's output: up (down x), two thin matrices (LQER).

    Shapes: ``down`` [K, I], ``up`` [O, K], in the format that they are stored in.
    """

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    down: Tensor
    up: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class LowRank(nn.Module):
    """A weight [O, ...] plus B A, with ``a`` [R, I] and ``b`` [O, R], I the numbers of an output channel.

    Inside the rounding: w_hat = Q(w + B A), as L4Q has it (Jeon et al., 2024, arXiv 2402.04902). B begins at zero.
    """

    def __init__(self, weight: Tensor, rank: int, rng: torch.Generator):
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        rank = min(rank, rows, columns)
        self.a = nn.Parameter((torch.randn(rank, columns, generator=rng) / rank**0.5).to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)

    def units(self, parameter: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
        """What A or B is measured in, so that B A changes by about ``steps``, those of the weight's grid."""
        if parameter is self.b:
            return steps.expand_as(weight).flatten(1).mean(1, keepdim=True)
        return torch.full_like(parameter[:1, :1], self.a.shape[0] ** -0.5)


class BiasQuantizer(nn.Module):
    """Rounds a layer's bias to whole numbers of steps of input scale times weight scale, as int32 kernels add it."""

    def forward(self, bias: Tensor, layer: QuantizedLayer) -> Tensor:
        if not (layer.input_quantizer.enabled and layer.weight_quantizer.enabled):
            return bias
        step = self.step(layer)
        return round_through(bias / step) * step

    @staticmethod
    def step(layer: QuantizedLayer) -> Tensor:
        """Scalar, or one entry per output channel."""
        scale = layer.input_quantizer.scale * layer.weight_quantizer.scale
        return scale if scale.dim() == 0 else scale.repeat(len(layer.bias) // len(scale))  # type: ignore[arg-type]

    @torch.no_grad()
    def make_room(self, layer: QuantizedLayer) -> None:
        """Widen the weight grid of channels whose bias would not fit int32: those that are (almost) zero."""
        scale = layer.weight_quantizer.scale
        assert layer.bias is not None
        least = layer.bias.abs() / LARGEST_BIAS / layer.input_quantizer.scale
        least = least.max() if scale.dim() == 0 else least.view(-1, len(scale)).amax(0)
        scale.copy_(round_scale(torch.maximum(scale, least), layer.weight_quantizer.scheme))


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    pass


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    pass


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    pass


class QuantizedConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    channel_axis = 1  # with groups: one scale for the same channel of every group


class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    channel_axis = 1


class QuantizedConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    channel_axis = 1


class QuantizedLinear(QuantizedLayer, nn.Linear):
    feature_axis = -1


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """Its input are indices: only the table is quantized, a row being a channel."""

    feature_axis = -1


QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
}


def base_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of :data:`QUANTIZED` that ``kind`` is or derives from."""
    return next((base for base in kind.__mro__ if base in QUANTIZED), None)


@functools.cache
def quantized_class(kind: Any) -> Any:
    """The quantized class of a weight layer; of a sub-class with a forward of its own, one made of it."""
    if kind in QUANTIZED:
        return QUANTIZED[kind]
    base = base_of(kind)
    assert base is not None
    axes = {"channel_axis": QUANTIZED[base].channel_axis, "feature_axis": QUANTIZED[base].feature_axis}
    return type(f"Quantized{kind.__name__}", (QuantizedLayer, kind), {**axes, "__module__": __name__})


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name → layer of every sub-module that multiplies its input with a weight of two or more dimensions of its own."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
        and layer.weight.dim() >= 2
        and isinstance(layer, tuple(QUANTIZED))
    }


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Name → layer of every quantized layer."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


@dataclass(frozen=True)
class Swap:
    """What :func:`swap_layers` did: layers in call order with their schemes, those kept float with the reason."""

    layers: dict[str, tuple[TensorScheme, TensorScheme]]
    kept_float: dict[str, str]
    read_input: frozenset[str] = field(default=frozenset(), compare=False)  # layers that multiply the network's input


def product_of(name: str, flow: Dataflow) -> Op | None:
    """The operation with which the layer ``name`` uses its weight, if it is one that reads the weight itself."""
    weight = f"{name}.weight".lstrip(".")
    numbers = {number for number, names in flow.parameters.items() if weight in names}
    readers = [op for op in flow.ops if op.module == name and numbers & set(op.inputs)]
    products = [op for op in readers if op.name in PRODUCTS | LOOKUPS]
    return products[0] if products and len(products) == len(readers) else None


def input_values(flow: Dataflow) -> set[int]:
    """Numbers of the values that are the network's input still: moved, normalized, but not multiplied by a weight."""
    found, active = set(flow.inputs), set(flow.inputs)
    for op in flow.ops:
        sources = active & set(op.inputs)
        if sources:
            active |= set(op.outputs)
            if sources <= found and op.name not in PRODUCTS | LOOKUPS:
                found |= set(op.outputs)
    return found


def functional_uses(module: nn.Module, flow: Dataflow) -> dict[str, list[Op]]:
    """Layers that are never called, because their owner multiplies with their weight itself → its operations."""
    found = {}
    called = {call.name for call in flow.calls}
    for name, layer in weight_layers(module).items():
        weight = f"{name}.weight".lstrip(".")
        numbers = {number for number, names in flow.parameters.items() if weight in names}
        readers = [op for op in flow.ops if numbers & set(op.inputs)]
        if name in called or not readers or type(layer) not in QUANTIZED:
            continue
        if all(op.name in PRODUCTS and len(op.inputs) > 1 and op.inputs[1] in numbers for op in readers):
            found[name] = readers
    return found


def can_quantize(module: nn.Module, name: str = "", flow: Dataflow | None = None) -> bool:
    """Whether there is a quantized class for this layer.

    A sub-class may compute something else, so its forward has to be known: its product has to read its very weight.
    """
    if base_of(type(module)) is None or "weight" not in module._parameters:
        return False
    return type(module) in QUANTIZED or (flow is not None and product_of(name, flow) is not None)


def swap_layers(module: nn.Module, scheme: Scheme, flow: Dataflow) -> Swap:
    """Turn every weight layer that ran into its quantized class, in place.

    Edges: the first that ran, the last, and with several heads the last of each.
    """
    layers = weight_layers(module)
    # Order of first call; a layer that is called several times keeps its first place.
    functional = functional_uses(module, flow)
    modules_of = [{op.module} | {name for name, uses in functional.items() if op in uses} for op in flow.ops]
    called = dict.fromkeys(name for names in modules_of for name in sorted(names))
    ran = [name for name in called if name in layers]
    ran += [call.name for call in flow.calls if call.name in layers and call.name not in called]
    ran = list(dict.fromkeys(ran))
    possible = [name for name in ran if name in functional or can_quantize(layers[name], name, flow)]
    kept_float = {
        name: f"no quantized {type(layers[name]).__name__} yet"
        if "weight" in layers[name]._parameters
        else "its weight is computed from other tensors"
        for name in ran
        if name not in possible
    }
    kept_float |= {name: "did not run in a forward of the network" for name in layers if name not in ran}
    kept_float |= _other_products(module, flow, {f"{name}.weight".lstrip(".") for name in layers})
    _check_patterns(scheme, possible)
    skipped = _skipped(module, scheme, possible, flow)
    kept_float |= skipped
    possible = [name for name in possible if name not in skipped]
    images, products = input_values(flow), {name: product_of(name, flow) for name in possible}
    read_input = frozenset(
        name
        for name in possible
        for op in functional.get(name, [op for op in [products[name]] if op is not None])
        if images & set(op.inputs)
    )
    edges = {*possible[:1], *possible[-1:], *_last_layers(flow, modules_of, layers)}
    chosen = {name: scheme.for_layer(name in edges, name, name in read_input) for name in possible}
    for name, (weight_scheme, _) in chosen.items():
        if isinstance(layers[name], nn.Embedding):
            chosen[name] = (weight_scheme, FLOAT)
        if weight_scheme.is_float and chosen[name][1].is_float:
            kept_float[name] = "the scheme leaves it float"
    chosen = {name: schemes for name, schemes in chosen.items() if name not in kept_float}
    if not chosen:
        raise UserError(
            f"got a network without a layer to quantize ({type(module).__name__})",
            ", ".join(kind.__name__ for kind in QUANTIZED),
        )
    for name, schemes in chosen.items():
        _check_groups(name, layers[name], *schemes)
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # its fused kernel would read the weights and pass the quantizers by
    for name, schemes in chosen.items():
        swap_layer(layers[name], *schemes)
    share_tied_grids(module)
    return Swap(
        {name: (layers[name].weight_quantizer.scheme, chosen[name][1]) for name in chosen}, kept_float, read_input
    )


def _skipped(module: nn.Module, scheme: Scheme, names: list[str], flow: Dataflow) -> dict[str, str]:
    """Layers that ``scheme.skip`` leaves float → the reason; not those that an override names in full."""
    roles = {} if scheme.policy == "hardware" and scheme.skip == ROLES else _roles(module, names, flow)
    found = {}
    for name in names:
        by = [p for p in scheme.skip if p == roles.get(name) or (p not in ROLES and fnmatchcase(name, p))]
        if by and name not in scheme.overrides:
            found[name] = f"scheme.skip leaves {by[0]} float" if by[0] in ROLES else f"scheme.skip has {by[0]}"
    for pattern in scheme.skip:
        if pattern not in ROLES and not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"got scheme.skip with {pattern!r}, which is the name of no layer", _some(names))
    return found


def _roles(module: nn.Module, names: list[str], flow: Dataflow) -> dict[str, str]:
    """What layers are in a language model, as far as one of :data:`dfq.scheme.ROLES`; empty for another network.

    Its first embedding reads token ids, and its last layer says something of each of them. A router's output is what
    the experts are chosen by.
    """
    layers = {name: module.get_submodule(name) for name in names}
    tables = [layer for layer in layers.values() if isinstance(layer, nn.Embedding)]
    given = set(flow.inputs)
    for op in flow.ops:  # reshaped, and the like
        given |= set(op.outputs) if given & set(op.inputs) and not op.is_floating else set()
    ids = {number for op in flow.ops if op.name in LOOKUPS for number in op.inputs} & given
    last = layers[names[-1]] if names else None
    if not tables or not ids or not isinstance(last, nn.Linear) or last.out_features != tables[0].num_embeddings:
        return {}
    found = {name: "embeddings" for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    found[names[-1]] = "head"
    made: dict[int, str] = {}  # number of a value → the layer whose output it is made of
    for op in flow.ops:
        of = {made[number] for number in op.inputs if number in made}
        if op.name in PRODUCTS:
            made.update(dict.fromkeys(op.outputs, op.module))
        elif len(of) == 1 and op.name in ("topk", "sort", "argmax") and of <= layers.keys():
            found[of.pop()] = "routers"
        elif len(of) == 1 and op.name in ("softmax", "sigmoid", "to", "float", "view", "reshape", "add"):
            made.update(dict.fromkeys(op.outputs, of.pop()))
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)} layers)" if len(names) > 8 else "")


def _last_layers(flow: Dataflow, modules_of: list[set[str]], layers: Mapping[str, nn.Module]) -> set[str]:
    """Layers from which the network's output is reached without another one."""
    reached, found = set(flow.outputs), set()
    for op, names in zip(reversed(flow.ops), reversed(modules_of), strict=True):
        if reached & set(op.outputs):
            found |= names & layers.keys()
            reached |= set() if names & layers.keys() else set(op.inputs)
    return found


def _other_products(module: nn.Module, flow: Dataflow, known: set[str]) -> dict[str, str]:
    """Matrices that take part in a product without being the weight of a layer, and modules that are not understood."""
    parameters = dict(module.named_parameters())
    source = {number: set(names) for number, names in flow.parameters.items()}  # number → parameters it is made of
    found: dict[str, str] = {}
    read: set[str] = set()
    for op in flow.ops:
        constants = [source[number] for number in op.inputs if number in source]
        read |= set().union(*constants)
        picked = op.name in ("getitem", "select", "index_select", "gather") and op.inputs and op.inputs[0] in source
        if len(constants) == len(op.inputs) or picked:  # from constants alone: transposed, normalized, one of several
            source.update(dict.fromkeys(op.outputs, set().union(*constants)))
        elif op.name in PRODUCTS:
            where = op.module or "the network itself"
            found |= {
                name: f"read by {op.name} in {where}"
                for name in sorted(set().union(*constants))
                if name in parameters and parameters[name].dim() >= 2 and not _is_known(name, flow, known)
            }
    for name, parameter in parameters.items():
        if parameter.dim() >= 2 and name not in read | known:
            owner = name.rpartition(".")[0]
            found[owner or name] = f"no quantized {type(module.get_submodule(owner)).__name__} yet"
    return found


def _is_known(name: str, flow: Dataflow, known: set[str]) -> bool:
    """Whether the parameter is the weight of a layer under one of its names: tied ones have several."""
    return any(name in names and known & set(names) for names in flow.parameters.values())


def _check_patterns(scheme: Scheme, names: list[str]) -> None:
    for pattern in scheme.overrides:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"got scheme.overrides[{pattern!r}], which is the name of no layer", _some(names))


def _check_groups(name: str, layer: nn.Module, weight_scheme: TensorScheme, activation_scheme: TensorScheme) -> None:
    """Groups divide what they lie along."""
    weight, axis = layer.weight, quantized_class(type(layer)).channel_axis  # type: ignore[arg-type]
    assert isinstance(weight, Tensor)
    per_channel = weight.numel() // weight.shape[axis]
    features = layer.in_channels if hasattr(layer, "in_channels") else weight.shape[1]
    for what, scheme, length in (("weight", weight_scheme, per_channel), ("activation", activation_scheme, features)):
        if scheme.group_size is not None and length % scheme.group_size:
            divisors = [str(n) for n in range(1, length + 1) if length % n == 0]
            raise UserError(
                f"got scheme.{what}.group_size={scheme.group_size} and layer {name} with {length} values to divide",
                " | ".join(divisors[-12:]),
                f"choose another size, or scheme.overrides={{{name}: {{{what}: {{granularity: "
                f"{'per_channel' if what == 'weight' else 'per_token'}}}}}}}",
            )


def swap_layer(layer: nn.Module, weight_scheme: TensorScheme, activation_scheme: TensorScheme) -> None:
    """Turn one layer into its quantized class, in place; its quantizers have no grid yet."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    kind = quantized_class(type(layer))  # type: ignore[arg-type]  # mypy: a type is no Hashable
    axis: int | None = None
    shape: tuple[int, ...] = ()
    if weight_scheme.granularity != "per_tensor" and not weight_scheme.is_float:
        axis, shape = kind.channel_axis, (weight.shape[kind.channel_axis],)
        if weight_scheme.group_size is not None:
            shape = (*shape, weight.numel() // shape[0] // weight_scheme.group_size)
    layer.__class__ = kind
    layer.input_quantizer = Quantizer(activation_scheme, feature_axis=kind.feature_axis).to(weight.device)
    layer.weight_quantizer = Quantizer(weight_scheme, shape, axis).to(weight.device)
    layer.bias_quantizer = layer.low_rank = layer.correction = None


def share_tied_grids(module: nn.Module) -> None:
    """Layers that share a weight share its grid: the one of the first."""
    first: dict[int, QuantizedLayer] = {}
    for layer in quantized_layers(module).values():
        other = first.setdefault(id(layer.weight), layer)
        if other is not layer and other.channel_axis == layer.channel_axis:
            layer.weight_quantizer = other.weight_quantizer


def find_foldable(module: nn.Module, flow: Dataflow) -> list[tuple[str, str]]:
    """Pairs (layer, batch norm) where the layer's output goes into that batch norm and nowhere else.

    Found by following the tensor itself through one forward, not by order or name: pre-activation batch norms, batch
    norms that read two layers in turn, and layers whose output is read twice are left alone.
    """
    kinds = {name: m for name, m in module.named_modules()}
    producers = {
        call.outputs[0]: call.name
        for call in flow.calls
        if can_quantize(kinds[call.name], call.name, flow) and len(flow.calls_of(call.name)) == 1
    }
    uses = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    pairs = []
    for call in flow.calls:
        if not isinstance(kinds[call.name], BATCH_NORMS) or len(flow.calls_of(call.name)) != 1:
            continue
        if kinds[call.name].running_mean is None:
            continue  # it normalizes with the batch's own statistics: nothing constant to fold
        layer = producers.get(call.inputs[0])
        if layer is None or flow.reads.get(call.inputs[0]) != 1:
            continue
        if uses[id(kinds[layer].weight)] > 1:
            continue  # tied: another layer would change with it
        plain = type(kinds[call.name]).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
        if not plain and not hasattr(kinds[call.name], "act"):
            continue  # a sub-class that does more than normalize, and not timm's, which says what
        if QUANTIZED[base_of(type(kinds[layer]))].feature_axis == -1 and len(call.output_shape) != 2:  # type: ignore[index]
            continue  # batch norm normalizes dimension 1, which is not the layer's output dimension here
        if isinstance(kinds[layer], nn.Embedding):
            continue  # its rows are samples, not channels
        pairs.append((layer, call.name))
    return pairs


@dataclass
class Fold:
    """What a layer and its batch norm are together: ``weight`` and ``bias`` of one layer, whose output [.., C, ..] is
    ``gain`` [C] times that of the layer alone plus ``shift`` [C]; in double precision, on the CPU."""

    weight: Tensor
    bias: Tensor
    gain: Tensor
    shift: Tensor


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.Module) -> Fold:
    """w' = w * gamma / sqrt(var + eps), b' = beta + (b - mean) * gamma / sqrt(var + eps)
    (Jacob et al., CVPR 2018, eq. 14)
    """
    gain = torch.rsqrt(double(norm.running_var) + norm.eps)
    if norm.weight is not None:
        gain = gain * double(norm.weight)
    shift = -double(norm.running_mean) * gain
    if norm.bias is not None:
        shift = shift + double(norm.bias)
    bias = shift if layer.bias is None else shift + double(layer.bias) * gain
    return Fold(double(layer.weight) * _per_output_channel(gain, layer), bias, gain, shift)


@torch.no_grad()
def fold_batch_norm(module: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Fold each batch norm of ``pairs`` (layer, batch norm) into its layer, in place; the function stays the same."""
    for layer_name, norm_name in pairs:
        layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
        weight, together = layer.weight, fold(layer, norm)
        weight.copy_(together.weight)
        layer.bias = nn.Parameter(together.bias.to(weight), requires_grad=weight.requires_grad)
        _become(norm, what_follows(norm))


def _per_output_channel(values: Tensor, layer: nn.Module) -> Tensor:
    """[O] shaped to multiply the weight of ``layer``; that of a transposed convolution is [I, O / groups, ...]."""
    weight = layer.weight
    if base_of(type(layer)) not in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        return broadcast(values, weight, 0)
    groups = values.view(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
    return groups.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def _become(module: nn.Module, other: nn.Module) -> None:
    """Turn the object itself into ``other``, as swapping does: whoever refers to it sees the new one."""
    training = module.training
    module.__class__ = type(other)
    module._parameters, module._buffers, module._modules = other._parameters, other._buffers, other._modules
    module.training = training


def what_follows(norm: nn.Module) -> nn.Module:
    """What remains of a batch norm once it is folded: nothing, or the activation it carries (timm's BatchNormAct2d)."""
    rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    rest = [part for part in rest if not isinstance(part, nn.Identity)]
    return nn.Sequential(*rest) if rest else nn.Identity()


def stage_ends(flow: Dataflow) -> list[str]:
    """The places where a network changes its resolution or width: for each output shape, the last sub-module with it.

    Features there are what a student is compared to the teacher on. Only sub-modules called once and with outputs of
    three or more dimensions count, in order of execution; found by shape, never by class name.
    """
    last: dict[tuple[int, ...], str] = {}
    for call in flow.calls:
        if len(call.output_shape) >= 3 and call.name and len(flow.calls_of(call.name)) == 1:
            last.pop(call.output_shape, None)
            last[call.output_shape] = call.name
    return list(last.values())


def repeated_blocks(module: nn.Module, flow: Dataflow) -> list[str]:
    """The blocks that a network has one after the other: those of its longest list of sub-modules that each ran once
    and gave outputs of one shape, in order; empty if there is no such list."""
    found: list[str] = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential):
            continue
        calls = {f"{name}.{key}".lstrip("."): flow.calls_of(f"{name}.{key}".lstrip(".")) for key in part._modules}
        ran = {child: its[0].output_shape for child, its in calls.items() if len(its) == 1}
        if len(set(ran.values())) == 1 and len(ran) == len(calls) > max(len(found), 1):
            found = list(ran)
    return found


@torch.no_grad()
def to_fast_layout(networks: Iterable[nn.Module], example: Tensor) -> torch.memory_format:
    """Lay out networks for training on the CPU; returns the memory format that their inputs should have.

    oneDNN's convolutions are up to three times as fast on channels that lie side by side. Networks without any, and
    those that can't run so, stay as they are. ``.to(memory_format=torch.contiguous_format)`` takes it back.
    """
    networks = list(networks)
    has_maps = example.dim() == 4 and any(p.dim() == 4 for network in networks for p in network.parameters())
    if not has_maps or example.device.type != "cpu":
        return torch.contiguous_format
    try:
        for network in networks:
            with evaluation_mode(network):
                network.to(memory_format=torch.channels_last)(example.clone(memory_format=torch.channels_last))
    except RuntimeError:  # a view() that insists on the other order
        for network in networks:
            network.to(memory_format=torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last
