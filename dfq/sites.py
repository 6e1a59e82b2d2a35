"""Quantizers between layers: where tensors that no weight layer reads are rounded as well.

A *site* is a torch function that one sub-module calls: the second ``add`` of ``layer1.0``. Its quantizers are named
after it, ``layer1.0.add_1_output`` and ``layer1.0.matmul_0_input_1``. They are found by running the network once
(:func:`dfq.hooks.record_dataflow`) and called by a torch function mode that is on during the network's forward. Nothing
is traced or rewritten: control flow, functional calls and user code stay what they are, as long as each forward calls
the same operations. The quantizers lie in the first quantized layer, whose children nobody looks at: a container or
user code that goes through its own children would come upon them.

Two kinds of places ask for sites: attention's products (``scheme.attention``, ``scheme.softmax``), and with
``policy=hardware`` every tensor that an integer runtime holds as an integer. There a tensor is rounded where it is made
and has one grid, however many layers read it: a layer's ``input_quantizer`` is then the very quantizer of the site, and
its bias a multiple of that grid's step times the weight's.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dfq.errors import UserError
from dfq.hooks import Dataflow, Op, each_once, op_name, tensors_in
from dfq.modules import LOOKUPS, PRODUCTS, BiasQuantizer, QuantizedLayer, Quantizer, Swap, input_values, product_of
from dfq.scheme import OPERANDS, Scheme, TensorScheme

HOLDER = "sites"
SITE = re.compile(
    r"(?P<module>(.*/)?)(?P<operation>\w+)_(?P<index>\d+)_(?P<place>output|softmax|input_\d+)"
)  # of a key
INPUT = "input_0"  # of the network: a quantizer of the root module
SOFTMAX = "softmax"
WEIGHT, BIAS = ".weight_quantizer", ".bias_quantizer"  # of a layer
FUSED_ATTENTION = "scaled_dot_product_attention"
WITH_KEYS = (FUSED_ATTENTION, "matmul", "bmm")  # products in which keys can be rounded channel by channel
# What an integer runtime folds into the operation before it: the clamp of its codes.
CLIPPING = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "clip", "threshold"}
# These hand on the values they get, or zeros beside them: no new grid.
MOVING = {
    *("reshape", "view", "view_as", "reshape_as", "flatten", "unflatten", "permute", "transpose", "swapaxes", "t"),
    *("swapdims", "movedim", "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "tile", "contiguous"),
    *("chunk", "split", "tensor_split", "split_with_sizes", "unbind", "getitem", "select", "narrow", "index_select"),
    *("clone", "detach", "alias", "to", "float", "type_as", "get", "dropout", "dropout2d", "alpha_dropout", "identity"),
    *("feature_dropout", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "roll", "flip", "rot90", "gather"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("amax", "pad", "repeat_interleave", "as_strided", "unfold", "requires_grad"),
}
ELEMENTWISE = {"add", "iadd", "radd", "sub", "isub", "rsub", "mul", "imul", "rmul", "cat", "concat", "stack"}
# Of these, ONNX Runtime runs on integers only what has the grid on both sides.
SPLITTING = {"chunk", "split", "tensor_split", "split_with_sizes", "roll", "repeat", "tile", "flip", "gather"} | {
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
}
PADDING = {"pad"}  # before a convolution it becomes the convolution's own
NOT_ARITHMETIC = {
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "setitem",
}


@dataclass(frozen=True)
class Sites:
    """Quantizers that were added: path → scheme; sites that use the quantizer of another, which rounds nothing more but
    says what grid a moved tensor is on; and the layers whose input comes from a site's quantizer."""

    quantizers: dict[str, TensorScheme] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # path → path of the quantizer
    layer_inputs: dict[str, str] = field(default_factory=dict)  # layer → path
    has_integer_bias: bool = False
    feature_axes: dict[str, int] = field(
        default_factory=dict
    )  # path → where a token's values lie, unless along the last


def find_sites(
    scheme: Scheme, swap: Swap, flow: Dataflow, functional: Mapping[str, Sequence[Op]] | None = None
) -> Sites:
    """The sites that ``scheme`` asks for.

    Args:
        swap: the layers that will be quantized.
        flow: of the float network after batch norms are folded, before layers are swapped.
        functional: layers whose owner multiplies with their weight itself → its operations: input and weight are
            rounded there, by the layer's own quantizers.
    """
    found: dict[str, TensorScheme] = {}
    uses = {name: ops for name, ops in (functional or {}).items() if name in swap.layers}
    aliases = {_path(op, "input_1"): f"{name}.weight_quantizer" for name, ops in uses.items() for op in ops}
    axes: dict[str, int] = {}
    if not all(getattr(scheme, part).is_float for part in OPERANDS):
        operands, axes = _operands_of_attention(scheme, flow)
        found |= operands
    layer_inputs: dict[str, str] = {}
    if scheme.policy == "hardware":
        outputs, moved, layer_inputs = _held_by_hardware(scheme, swap, flow, uses)
        found, aliases = outputs | found, aliases | moved
    for name, ops in uses.items():
        if name not in layer_inputs:
            aliases |= {_path(op, "input_0"): f"{name}.input_quantizer" for op in ops}
        if scheme.policy == "hardware" and all(_adds_bias_of(name, op, flow) for op in ops):
            aliases |= {_path(op, "input_2"): f"{name}.bias_quantizer" for op in ops}
    return Sites(found, aliases, layer_inputs, scheme.policy == "hardware", axes)


def place_sites(module: nn.Module, sites: Sites) -> nn.Module:
    """Add the quantizers of ``sites`` to a network whose layers are swapped, in place; they have no grid yet."""
    if not (sites.quantizers or sites.aliases):
        return module
    host_name, host = next((name, m) for name, m in module.named_modules() if isinstance(m, QuantizedLayer))
    holder = nn.Module()
    host.add_module(HOLDER, holder)
    for path, scheme in sites.quantizers.items():
        axis = sites.feature_axes.get(path, -1)
        holder.add_module(_key(path), Quantizer(scheme, feature_axis=axis).to(host.weight.device))
    own = {path: other for path, other in sites.aliases.items() if not other.endswith(BIAS)}
    for path, other in own.items():
        holder.add_module(_key(path), _quantizer(module, holder, other))
    for layer_name, path in sites.layer_inputs.items():
        layer = module.get_submodule(layer_name)
        assert isinstance(layer, QuantizedLayer)
        layer.input_quantizer, layer.input_is_on_grid = _quantizer(module, holder, path), True
    if sites.has_integer_bias:
        # Of layers that are never called: those whose bias is read as it is. What else is made of it stays float.
        uncalled = {other.removesuffix(WEIGHT) for other in own.values() if other.endswith(WEIGHT)}
        uncalled -= {other.removesuffix(BIAS) for other in sites.aliases.values()}
        for name, layer in module.named_modules():
            if isinstance(layer, QuantizedLayer) and name not in uncalled:
                floats = layer.input_quantizer.scheme.is_float or layer.weight_quantizer.scheme.is_float
                if getattr(layer, "bias", None) is not None and not floats:
                    layer.bias_quantizer = BiasQuantizer()
    for path in sites.aliases.keys() - own.keys():
        holder.add_module(_key(path), _BiasOf(module.get_submodule(sites.aliases[path].removesuffix(BIAS))))
    vars(module)["sites_path"] = f"{host_name}.{HOLDER}".lstrip(".")
    running = vars(module)["running"] = _Running()
    for name, part in each_once(module).items():
        if name and part is not holder:
            part.register_forward_pre_hook(_Enter(running, name))
            part.register_forward_hook(_Leave(running))
    module.__class__ = _with_sites(type(module))  # type: ignore[arg-type]  # mypy: a type is no Hashable
    return module


def site_quantizer(module: nn.Module, path: str) -> Quantizer:
    """The quantizer of a site of a network that :func:`place_sites` went over."""
    found = module.get_submodule(module.sites_path)._modules[_key(path)]  # type: ignore[arg-type]
    assert isinstance(found, Quantizer)
    return found


class _BiasOf(nn.Module):
    """Calls the bias quantizer of a layer whose owner adds its bias."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = (layer,)  # no child: the module tree would have a ring

    def forward(self, bias: Tensor) -> Tensor:
        (layer,) = self.layer
        return bias if layer.bias_quantizer is None else layer.bias_quantizer(bias, layer)  # type: ignore[operator]


def _key(path: str) -> str:
    """A child's name has no dots."""
    return path.replace(".", "/")


def _quantizer(module: nn.Module, holder: nn.Module, path: str) -> Quantizer:
    """The quantizer of a site, or one of a layer: ``layer.weight_quantizer``."""
    found = holder._modules.get(_key(path)) or module.get_submodule(path)
    assert isinstance(found, Quantizer)
    return found


# ------------------------------------------------------------------------------------------------ finding


def _activations(flow: Dataflow) -> set[int]:
    """Numbers of the values that depend on the network's input."""
    found = set(flow.inputs)
    for op in flow.ops:
        if found & set(op.inputs):
            found |= set(op.outputs)
    return found


def _constants(flow: Dataflow) -> set[int]:
    """Numbers of parameters and of what is computed from them or from nothing, if a grid can cover it: no masks."""
    found, without_grid = set(flow.parameters), set()
    for op in flow.ops:
        if set(op.inputs) <= found:
            found |= set(op.outputs)
            if not op.is_ordinary:
                without_grid |= set(op.outputs)
    return found - without_grid


def _path(op: Op, place: str) -> str:
    return f"{op.module}.{op.key}_{place}".lstrip(".")


def _adds_bias_of(name: str, op: Op, flow: Dataflow) -> bool:
    """Whether a product with the layer's weight adds its very bias."""
    return len(op.inputs) > 2 and f"{name}.bias".lstrip(".") in flow.parameters.get(op.inputs[2], ())


def _operands_of_attention(scheme: Scheme, flow: Dataflow) -> tuple[dict[str, TensorScheme], dict[str, int]]:
    """Inputs of every product of two activations; probabilities, and keys and values, with grids of their own.

    Returns also where a token's values lie in keys that come transposed. Values come after the probabilities, keys in
    the product that is none of those.
    """
    active = _activations(flow)
    probabilities: set[int] = set()
    found: dict[str, TensorScheme] = {}
    axes: dict[str, int] = {}
    for op in flow.ops:
        if op.name == "softmax" or (op.name in MOVING and set(op.inputs[:1]) & probabilities):
            probabilities |= set(op.outputs)
        if op.name not in PRODUCTS or not op.is_floating:
            continue
        operands = op.inputs[:3] if op.name == FUSED_ATTENTION else op.inputs[:2]
        if op.name in ("baddbmm", "addmm"):
            operands = op.inputs[1:3]
        if not set(operands) <= active or len(operands) < 2:
            continue
        first = op.inputs.index(operands[0])
        for position, number in enumerate(operands, start=first):
            part = scheme.softmax if number in probabilities else scheme.attention
            is_key = position == first + 1 and operands[0] not in probabilities
            if position > first and not scheme.key_value.is_float:
                part = scheme.key_value
            if is_key and not scheme.key.is_float:
                if op.name not in WITH_KEYS:
                    raise UserError(
                        f"got scheme.key and attention in {op.module or 'the network'} that multiplies by {op.name}",
                        " | ".join(WITH_KEYS),
                        "use scheme.key_value for such a network",
                    )
                part = scheme.key
            if not part.is_float:
                path = _path(op, f"input_{position}")
                found[path] = part
                if position > first and op.name != FUSED_ATTENTION and operands[0] not in probabilities:
                    axes[path] = -2
        if op.name == FUSED_ATTENTION and not scheme.softmax.is_float:
            found[_path(op, SOFTMAX)] = scheme.softmax
    if not scheme.key.is_float and scheme.key not in found.values():
        raise UserError("got scheme.key and a network in which no attention was seen", "a network with attention")
    return found, axes


def _held_by_hardware(
    scheme: Scheme, swap: Swap, flow: Dataflow, uses: Mapping[str, Sequence[Op]]
) -> tuple[dict[str, TensorScheme], dict[str, str], dict[str, str]]:
    """Every tensor between operations gets a grid where it is made; operations that only move values hand it on."""
    active, constants, images = _activations(flow), _constants(flow), input_values(flow)
    readers: dict[int, list[Op | None]] = {}
    for op in flow.ops:
        for number in set(op.inputs):
            readers.setdefault(number, []).append(op)
    for number in flow.outputs:
        readers.setdefault(number, []).append(None)
    layers = {name: product_of(name, flow) for name in swap.layers}
    found: dict[str, TensorScheme] = {}
    aliases: dict[str, str] = {}
    grids: dict[int, str] = {}  # number of a value → path of the quantizer it comes from
    if any(op.is_floating and set(flow.inputs) & set(op.inputs) and op.name not in LOOKUPS for op in flow.ops):
        found[INPUT] = scheme.network_input
        grids.update(dict.fromkeys(flow.inputs, INPUT))
    for op in flow.ops:
        sources = [number for number in op.inputs if number in active]
        if not sources or not op.outputs or not op.is_floating or op.name in NOT_ARITHMETIC:
            continue
        if op.module in flow.unrounded:
            continue
        on_grid = grids.get(sources[0])
        if op.name in MOVING or (op.name == "relu" and on_grid):
            if on_grid:
                grids.update(dict.fromkeys(op.outputs, on_grid))
                into = {reader.name if reader else "" for number in op.outputs for reader in readers.get(number, [])}
                # A ReLU is folded into the operation before it, unless that one's result is read elsewhere as well.
                if op.name in SPLITTING | {"relu"} or (op.name in PADDING and not into <= PRODUCTS):
                    aliases[_path(op, "output")] = on_grid
            continue
        if not op.is_ordinary:
            continue  # a mask: minus infinity has no code
        if op.name in ELEMENTWISE:  # a constant that is added or multiplied is held as an integer too
            for position, number in enumerate(op.inputs):
                if number in constants:
                    found[_path(op, f"input_{position}")] = scheme.activation
        next_op = readers.get(op.outputs[0], [None])
        if len(next_op) == 1 and next_op[0] is not None and next_op[0].name in CLIPPING:
            continue
        if len(op.outputs) == 1:
            path = _path(op, "output")
            found[path] = scheme.network_input if op.outputs[0] in images else scheme.activation
            grids[op.outputs[0]] = path
    layer_inputs = {}
    for name, product in layers.items():
        calls = [op for op in flow.ops if product and op.module == name and op.name == product.name]
        calls += uses.get(name, [])
        paths = list(dict.fromkeys(grids.get(next((n for n in op.inputs if n in active), -1), "") for op in calls))
        if not paths or any(found.get(path) != swap.layers[name][1] for path in paths):
            continue
        grid = layer_inputs[name] = paths[0]
        for other in paths[1:]:  # called several times: one bias, so one grid
            del found[other]
            aliases = {path: grid if of == other else of for path, of in aliases.items()} | {other: grid}
            layer_inputs = {layer: grid if of == other else of for layer, of in layer_inputs.items()}
            grids = {number: grid if of == other else of for number, of in grids.items()}
    return found, aliases, layer_inputs


# ------------------------------------------------------------------------------------------------ running


class _WithSites(nn.Module):
    """Mixed into the class of a network: its forward runs with its sites' quantizers called."""

    sites_path: str
    running: _Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quantizers = self.get_submodule(self.sites_path)._modules
        if (first := quantizers.get(INPUT)) is not None:
            args, kwargs = _first_tensor_through(first, args, kwargs)
        self.running.names[:] = [""]  # whatever a forward that failed has left there
        mode = _CallSites(self.running, quantizers)
        with mode:
            outputs = super().forward(*args, **kwargs)  # type: ignore[misc]  # of the class this is mixed into
        mode.check()
        return outputs


class _Running:
    """Names of the sub-modules that run now, the innermost last, and how often each operation with a site has run.

    Hooks that stay on the modules keep it: to add and to remove them takes longer than a small network's forward. They
    are objects, not functions, so that a copy of the network has hooks of its own.
    """

    def __init__(self) -> None:
        self.names = [""]
        self.counts: dict[tuple[str, str], int] = {}


class _Enter:
    def __init__(self, running: _Running, name: str):
        self.running, self.name = running, name

    def __call__(self, *_: Any) -> None:
        self.running.names.append(self.name)


class _Leave:
    def __init__(self, running: _Running):
        self.running = running

    def __call__(self, *_: Any) -> None:
        self.running.names.pop()


Counts = Mapping[tuple[str, str], int]


@contextmanager
def sites_of(network: nn.Module, counts: Counts | None = None) -> Iterator[None]:
    """For a forward of a part of ``network``: the quantizers between that part's operations are called in it.

    ``counts``: what :func:`counted_sites` was when the part was called; a part that runs again has other sites then.
    """
    if not isinstance(network, _WithSites):
        yield
        return
    network.running.names[:] = [""]
    with _CallSites(network.running, network.get_submodule(network.sites_path)._modules, counts):
        yield


def counted_sites(network: nn.Module) -> Counts:
    """How often each operation with a site has run in the forward that ``network`` is in."""
    return dict(network.running.counts) if isinstance(network, _WithSites) else {}


def _first_tensor_through(quantizer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:position], quantizer(value), *args[position + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: quantizer(value)}
    return args, kwargs


@functools.cache
def _with_sites(kind: Any) -> Any:
    def forward(self: _WithSites, *args: Any, **kwargs: Any) -> Any:
        return _WithSites.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]  # generate() looks at it
    return type(kind.__name__, (_WithSites, kind), {"__module__": kind.__module__, "forward": forward})


class _CallSites(TorchFunctionMode):
    """Calls the quantizers of an operation's inputs and output. Counts operations as the recording did."""

    def __init__(self, running: _Running, quantizers: Mapping[str, nn.Module | None], counts: Counts | None = None):
        super().__init__()
        self.running, self.quantizers = running, quantizers
        self.called: set[str] = set()
        self.counts = running.counts = dict(counts or {})
        # What an operation wrote into, of which its caller may hold on to the object and throw away what came back.
        self.rounded: Any = WeakTensorKeyDictionary()
        # (module, operation) → the how many'th → place → key
        self.sites: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
        for key in quantizers:
            if found := SITE.fullmatch(key):
                pair = (found["module"].rstrip("/").replace("/", "."), found["operation"])
                self.sites.setdefault(pair, {}).setdefault(int(found["index"]), {})[found["place"]] = key

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.rounded:
            args, kwargs = map_tensors(self.last, args), map_tensors(self.last, kwargs)
        pair = (self.running.names[-1], op_name(func))
        if pair not in self.sites:
            return func(*args, **kwargs)
        index = self.counts.get(pair, 0)
        keys = self.sites[pair].get(index, {})
        self.called |= set(keys.values())
        mine: dict[str, Any] = {place: self.quantizers[key] for place, key in keys.items()}
        of_keys = next((place for place, part in mine.items() if rounds_keys(part)), "")
        if mine:
            args, kwargs = _quantized_inputs({p: q for p, q in mine.items() if p != of_keys}, args, kwargs)
        if SOFTMAX in mine or (of_keys and pair[1] == FUSED_ATTENTION):
            options = {**kwargs, "key_quantizer": mine.get(of_keys)}
            result = attention(mine.get(SOFTMAX), *args, **options)
        elif of_keys:
            result = _with_rounded_keys(func(*args, **kwargs), lambda key: func(args[0], key), args[1], mine[of_keys])
        else:
            result = func(*args, **kwargs)
        if next(tensors_in(result), None) is not None or func is Tensor.__setitem__:
            self.counts[pair] = index + 1
            if "output" in mine:
                quantizer = mine["output"]
                several = isinstance(result, tuple | list)
                rounded = type(result)(map(quantizer, result)) if several else quantizer(result)
                if rounded is not result and any(result is value for value in tensors_in([args, kwargs])):
                    self.rounded[result] = rounded
                result = rounded
        return result

    def check(self) -> None:
        """A UserError if the forward did not come by every site."""
        for key in self.quantizers:
            found = SITE.fullmatch(key)
            if found and key not in self.called:
                where = found["module"].rstrip("/").replace("/", ".") or "its own forward"
                raise UserError(
                    f"got a network that did not call {found['operation']} in {where} again, as it did in the forward "
                    "by which quantizers were placed",
                    "for scheme.policy=hardware and quantized attention: the same operations in every forward",
                    "use scheme.policy=all, which quantizes weight layers alone",
                )

    def last(self, tensor: Tensor) -> Tensor:
        while tensor in self.rounded:
            tensor = self.rounded[tensor]
        return tensor


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Each tensor in nested lists, tuples and dicts through ``function``."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, item) for item in value)
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def _quantized_inputs(quantizers: dict[str, nn.Module], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Each tensor among the arguments through the quantizer of its position, in nested lists too."""
    position = -1

    def through(value: Tensor) -> Tensor:
        nonlocal position
        position += 1
        quantizer = quantizers.get(f"input_{position}")
        return value if quantizer is None else quantizer(value)

    return map_tensors(through, args), map_tensors(through, kwargs)


def rounds_keys(quantizer: nn.Module | None) -> bool:
    """Whether it is one of keys, channel by channel over groups of tokens."""
    return isinstance(quantizer, Quantizer) and quantizer.scheme.granularity == "per_channel" and quantizer.axis is None


def _with_rounded_keys(
    scores: Tensor, product: Callable[[Tensor], Tensor], key: Tensor, quantizer: nn.Module, one_token: bool = False
) -> Tensor:
    """``scores`` [..., L, S] of float keys, those with keys of full groups before the query's own from rounded ones.

    The queries are the last L tokens: with a cache there are more keys than queries. ``one_token``: they are all of the
    last one, heads that share keys side by side.
    """
    assert isinstance(quantizer, Quantizer)
    size, (queries, keys) = quantizer.scheme.group_size, scores.shape[-2:]
    assert size is not None
    positions = torch.arange(keys, device=scores.device)
    own = positions[-1:] if one_token else positions[keys - queries :]
    older = positions // size < (own // size)[:, None]
    return torch.where(older, product(quantizer(key)), scores)


def attention(
    quantizer: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_quantizer: nn.Module | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` in two products, ``quantizer`` on the probabilities.

    Shapes: ``query`` [..., L, E], ``key`` [..., S, E], ``value`` [..., S, E_v].
    """
    probabilities = attention_probabilities(query, key, attn_mask, is_causal, scale, enable_gqa, key_quantizer)
    if enable_gqa:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return F.dropout(probabilities if quantizer is None else quantizer(probabilities), dropout_p) @ value


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_quantizer: nn.Module | None = None,
) -> Tensor:
    """What :func:`torch.nn.functional.scaled_dot_product_attention` weighs values with, [..., L, S]."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale

    def product(key: Tensor) -> Tensor:
        return query @ key.transpose(-2, -1) * factor

    scores = product(key)
    if key_quantizer is not None:
        one_token = not is_causal and (attn_mask is None or attn_mask.shape[-2] == 1)
        scores = _with_rounded_keys(scores, product, key, key_quantizer, one_token)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
    return scores.softmax(-1)
