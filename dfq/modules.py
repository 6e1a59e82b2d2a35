"""Quantized layers, and the surgery that puts them into any module tree: find, fold, swap.

A layer is swapped in place, by giving the object a class that derives from its own: references to it (shared modules,
lists, hooks, user attributes) stay valid, and ``isinstance(layer, nn.Conv2d)`` stays true.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.errors import UserError
from dfq.hooks import Dataflow
from dfq.quantization import broadcast, fake_quantize
from dfq.scheme import Scheme, TensorScheme

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Quantizer(nn.Module):
    """Fake-quantizes one tensor on a fixed grid: ``scale``, ``zero_point`` (buffers), bits from ``scheme``.

    Passes its input through until it has a grid (:meth:`set_qparams`) and while ``enabled`` is false. An algorithm may
    turn ``scale`` into a parameter and set ``gradient_scale`` to train it.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scheme: TensorScheme, num_channels: int | None = None, axis: int | None = None):
        super().__init__()
        self.scheme, self.axis = scheme, axis
        self.enabled = False
        self.gradient_scale = 1.0
        shape = () if num_channels is None else (num_channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a grid (shaped like ``self.scale``) and start quantizing."""
        with torch.no_grad():
            self.scale.copy_(scale.reshape(self.scale.shape))
            self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        return fake_quantize(
            x,
            self.scale,
            self.zero_point,
            self.scheme.quant_min,
            self.scheme.quant_max,
            self.axis,
            self.gradient_scale,
        )

    def extra_repr(self) -> str:
        return f"num_bits={self.scheme.num_bits}, symmetric={self.scheme.symmetric}, axis={self.axis}"


class QuantizedLayer(nn.Module):
    """Mixed into a weight layer's class: quantizes the layer's input and its weight, then does what the layer does."""

    weight: Tensor
    bias: Tensor | None
    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own arithmetic, with this weight and bias."""
        return self._conv_forward(x, weight, bias)  # type: ignore[operator]  # every nn.ConvNd has it


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    pass


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    pass


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    pass


class QuantizedLinear(QuantizedLayer, nn.Linear):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


# The output channel is dimension 0 of the weight in all of these.
QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.Linear: QuantizedLinear,
}


def can_quantize(module: nn.Module) -> bool:
    """Whether there is a quantized class for exactly this layer (a sub-class may compute something else)."""
    return type(module) in QUANTIZED and "weight" in module._parameters


def weight_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Name → layer of every sub-module that multiplies its input with a weight of two or more dimensions of its own."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
        and layer.weight.dim() >= 2
        and not isinstance(layer, nn.Embedding)
    }


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Name → layer of every quantized layer."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLayer)}


def _has_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values())


@dataclass(frozen=True)
class Swap:
    """What :func:`swap_layers` did: layers in call order with their schemes, those kept float with the reason."""

    layers: dict[str, tuple[TensorScheme, TensorScheme]]
    kept_float: dict[str, str]


def swap_layers(module: nn.Module, scheme: Scheme, flow: Dataflow) -> Swap:
    """Turn every weight layer that ran into its quantized class, in place. Edges: the first and the last that ran."""
    layers = weight_layers(module)
    # Order of first call; a layer that is called several times keeps its first place.
    ran = [name for name in dict.fromkeys(call.name for call in flow.calls) if name in layers]
    kept_float = {
        name: f"no quantized {type(layers[name]).__name__} yet" for name in ran if not can_quantize(layers[name])
    }
    kept_float |= {
        name: f"no quantized {type(part).__name__} yet"
        for name, part in module.named_modules()
        if name not in layers and _has_matrix(part) and not isinstance(part, nn.Embedding)
    }
    kept_float |= {name: "did not run in a forward of the network" for name in layers if name not in ran}
    order = [name for name in ran if name not in kept_float]
    if not order:
        raise UserError(
            f"got a network without a layer to quantize ({type(module).__name__})",
            ", ".join(kind.__name__ for kind in QUANTIZED),
        )
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0  # its fused kernel would read the weights and pass the quantizers by
    swapped = {}
    for name in order:
        weight_scheme, activation_scheme = scheme.for_layer(is_edge=name in (ran[0], ran[-1]))
        swap_layer(layers[name], weight_scheme, activation_scheme)
        swapped[name] = (weight_scheme, activation_scheme)
    return Swap(swapped, kept_float)


def swap_layer(layer: nn.Module, weight_scheme: TensorScheme, activation_scheme: TensorScheme) -> None:
    """Turn one layer into its quantized class, in place; its quantizers have no grid yet."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    per_channel = weight_scheme.granularity == "per_channel"
    layer.__class__ = QUANTIZED[type(layer)]
    layer.input_quantizer = Quantizer(activation_scheme).to(weight.device)
    layer.weight_quantizer = Quantizer(
        weight_scheme, num_channels=weight.shape[0] if per_channel else None, axis=0 if per_channel else None
    ).to(weight.device)


def find_foldable(module: nn.Module, flow: Dataflow) -> list[tuple[str, str]]:
    """Pairs (layer, batch norm) where the layer's output goes into that batch norm and nowhere else.

    Found by following the tensor itself through one forward, not by order or name: pre-activation batch norms, batch
    norms that read two layers in turn, and layers whose output is read twice are left alone.
    """
    kinds = {name: m for name, m in module.named_modules()}
    producers = {
        call.outputs[0]: call.name
        for call in flow.calls
        if can_quantize(kinds[call.name]) and len(flow.calls_of(call.name)) == 1
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
        if isinstance(kinds[layer], nn.Linear) and len(call.output_shape) != 2:
            continue  # batch norm normalizes dimension 1, which is not the layer's output dimension here
        pairs.append((layer, call.name))
    return pairs


@torch.no_grad()
def fold_batch_norm(module: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Fold each batch norm of ``pairs`` (layer, batch norm) into its layer, in place, leaving the function unchanged.

    w' = w * gamma / sqrt(var + eps), b' = beta + (b - mean) * gamma / sqrt(var + eps)
    (Jacob et al., CVPR 2018, eq. 14)
    """
    for layer_name, norm_name in pairs:
        layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
        weight, bias = layer.weight, layer.bias
        gain = torch.rsqrt(_double(norm.running_var) + norm.eps)
        if norm.weight is not None:
            gain = gain * _double(norm.weight)
        shift = -_double(norm.running_mean) * gain
        if norm.bias is not None:
            shift = shift + _double(norm.bias)
        if bias is not None:
            shift = shift + _double(bias) * gain
        weight.copy_(_double(weight) * broadcast(gain, weight, 0))
        layer.bias = nn.Parameter(shift.to(weight), requires_grad=weight.requires_grad)
        _become(norm, _what_follows(norm))


def _become(module: nn.Module, other: nn.Module) -> None:
    """Turn the object itself into ``other``, as swapping does: whoever refers to it sees the new one."""
    training = module.training
    module.__class__ = type(other)
    module._parameters, module._buffers, module._modules = other._parameters, other._buffers, other._modules
    module.training = training


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()  # on the CPU: MPS has no float64


def _what_follows(norm: nn.Module) -> nn.Module:
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
