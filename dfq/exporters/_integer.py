"""The student as a network of integer buffers: what every exporter of graphs hands to its translator.

Weights are int8 or uint8 codes, biases int32 where the student rounds them, activations go through uint8 codes; all
with the ``quantized_decomposed`` operations, which torch.export keeps whole. What has no integer form stays float, on
its grid: weights of small floats, activations with the range of each batch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.hooks import tensors_in
from dfq.modules import BiasQuantizer, QuantizedLayer, Quantizer
from dfq.quantization import broadcast, from_groups, round_to_grid, to_groups
from dfq.scheme import TensorScheme
from dfq.student import Student


class _IntegerInput(nn.Module):
    """Takes the place of an activation's quantizer: x → codes (uint8, smallest code 0) → x_hat."""

    largest: Tensor

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        scheme = quantizer.scheme
        self.scale = float(quantizer.scale)
        self.zero_point = int(quantizer.zero_point) - scheme.quant_min
        self.saturates = scheme.num_bits == 8
        # Divided by scale it rounds back to its code, so that x is cut off exactly where the student clamps codes.
        self.register_buffer("largest", (scheme.quant_max - quantizer.zero_point) * quantizer.scale.detach())

    def forward(self, x: Tensor) -> Tensor:
        if not self.saturates:
            x = torch.minimum(x, self.largest)
        grid = (self.scale, self.zero_point, 0, 255, torch.uint8)
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, *grid)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *grid)


class _IntegerWeight(nn.Module):
    """Takes the place of a layer's weight quantizer: holds the codes and gives w_hat, whatever the float weight is.

    Codes of a per-group grid lie as [channels * groups, group size], a scale each. A float zero point is an offset,
    zero_point * scale, that is subtracted afterwards: no operation takes codes and such a zero point.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    offset: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor, quantizer: Quantizer):
        super().__init__()
        self.group_size, self.channel_axis, self.shape = quantizer.scheme.group_size, quantizer.axis, codes.shape
        self.axis = quantizer.axis
        if self.group_size is not None:
            assert quantizer.axis is not None
            codes, self.axis = to_groups(codes, quantizer.axis, self.group_size).flatten(0, 1), 0
            scale, zero_point = scale.flatten(), zero_point.flatten()
        dtype = torch.int8 if int(codes.min()) < 0 or quantizer.scheme.symmetric else torch.uint8
        limits = torch.iinfo(dtype)
        self.grid = (limits.min, limits.max, dtype)
        self.register_buffer("codes", codes.to(dtype))
        self.register_buffer("scale", scale.detach().clone())
        offset = None
        if quantizer.scheme.has_float_zero_point:
            offset = broadcast(zero_point * scale.detach(), codes, self.axis)
            zero_point = torch.zeros_like(zero_point)
        self.register_buffer("offset", offset)
        self.register_buffer("zero_point", zero_point.to(dtype))
        if self.axis is None:
            self.qparams = float(self.scale), int(self.zero_point)

    def forward(self, _weight: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        if self.axis is None:
            values = ops.dequantize_per_tensor(self.codes, *self.qparams, *self.grid)
        else:
            values = ops.dequantize_per_channel(self.codes, self.scale, self.zero_point, self.axis, *self.grid)
        if self.offset is not None:
            values = values - self.offset
        if self.group_size is None:
            return values
        assert self.channel_axis is not None
        return from_groups(values, self.channel_axis, self.shape)


class _IntegerBias(nn.Module):
    """Takes the place of a layer's bias quantizer: int32 in steps of input scale times weight scale."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        assert layer.bias is not None
        step = BiasQuantizer.step(layer).detach().expand(len(layer.bias)).clone()
        self.register_buffer("codes", torch.round(layer.bias.detach() / step).to(torch.int32))
        self.register_buffer("scale", step)
        self.register_buffer("zero_point", torch.zeros(len(step), dtype=torch.int32))

    def forward(self, _bias: Tensor, _layer: nn.Module) -> Tensor:
        limits = torch.iinfo(torch.int32)
        return torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scale, self.zero_point, 0, limits.min, limits.max, torch.int32
        )


def has_integer_form(scheme: TensorScheme) -> bool:
    return scheme.has_integer_codes or (scheme.grid == "seq" and scheme.num_bits < 8)


def integer_form(student: Student, name: str, float_zero_points: bool = False) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, scale and zero point with weight = (codes - zero point) * scale, all whole; None if there are none.

    A grid of half steps, (q + 1/2) s, has the odd numbers 2 q + 1 at half the scale.

    Args:
        float_zero_points: zero points need not be whole.
    """
    quantizer = student.layers[name].weight_quantizer
    scheme = quantizer.scheme
    if scheme.has_integer_codes or (float_zero_points and scheme.has_float_zero_point):
        return student.integer_weight(name).cpu(), quantizer.scale.cpu(), quantizer.zero_point.cpu()
    if has_integer_form(scheme):
        return 2 * student.integer_weight(name).cpu() + 1, quantizer.scale.cpu() / 2, quantizer.zero_point.cpu()
    return None


class _PlainGrid(nn.Module):
    """Takes the place of a quantizer that no QuantizeLinear does: dynamic, of more than 8 bits, or logarithmic."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        self.quantizer = quantizer
        scheme = quantizer.scheme
        quantizer._fake_quantize = lambda x, scale, zero_point, axis=None: round_to_grid(  # type: ignore[method-assign]
            x, scale, zero_point, scheme, axis
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)


class Flat(nn.Module):
    """A network whose outputs, however nested, come as a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.network(inputs)))


def integer_network(student: Student, wide_zero_points: bool = False, float_zero_points: bool = False) -> nn.Module:
    """A copy of the student on the CPU whose weight layers read integer buffers.

    Only the quantizers are replaced: a float weight that something else reads as well stays where it is.

    Args:
        wide_zero_points: int32, for torch to run: it subtracts them from the codes before it makes those float, and
            differences of unsigned bytes wrap around. Otherwise of the type of the codes, as ONNX wants them.
        float_zero_points: weights that have them are codes and an offset, not floats.
    """
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers torch.ops.quantized_decomposed)

    network = copy.deepcopy(student.module).cpu().requires_grad_(False)
    stands_in: dict[int, nn.Module] = {}  # one for each quantizer, however many layers share it
    for name in student.layers:
        layer = network.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        form = integer_form(student, name, float_zero_points)
        if form is None:
            stands_in[id(layer.weight_quantizer)] = nn.Identity()  # its values are in the float weight
        else:
            weight = _IntegerWeight(*form, layer.weight_quantizer)
            weight.zero_point = weight.zero_point.int() if wide_zero_points else weight.zero_point
            stands_in[id(layer.weight_quantizer)] = weight
        if layer.bias_quantizer is not None:
            stands_in[id(layer.bias_quantizer)] = _IntegerBias(layer)
    for owner in list(network.modules()):
        for name, child in owner._modules.items():
            if isinstance(child, Quantizer) and id(child) not in stands_in:
                stands_in[id(child)] = _activation(child)
            if id(child) in stands_in:
                owner._modules[name] = stands_in[id(child)]
    return network


def _activation(quantizer: Quantizer) -> nn.Module:
    scheme = quantizer.scheme
    if scheme.is_float:
        return nn.Identity()
    if scheme.grid not in ("uniform", "log2"):
        raise UserError(
            f"got activations on a grid of {scheme.grid}",
            "grid=uniform | log2 | float",
            "graphs of integers compute with no other; weights may have any grid",
        )
    if scheme.dynamic or scheme.num_bits > 8 or scheme.grid == "log2":
        return _PlainGrid(quantizer)
    return _IntegerInput(quantizer)
