"""All rounding lives here: choose_qparams, quantize, dequantize, fake_quantize, and the bit packing of codes.

The affine grid, as ONNX ``QuantizeLinear``/``DequantizeLinear`` define it::

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)        round: half to even
    x_hat = (q - zero_point) * scale

``scale`` and ``zero_point`` are tensors: scalars for ``per_tensor``, one entry per channel for ``per_channel``
(then ``axis`` names the channel dimension of ``x``). Divisions are written as divisions, not as products with a
reciprocal, because runtimes divide and the two differ at ties.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfq.errors import UserError
from dfq.scheme import TensorScheme


def broadcast(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """``values`` (scalar, or one entry per channel) shaped to broadcast against ``x`` along ``axis``."""
    if values.dim() == 0 or axis is None:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.view(shape)


def check_finite(x: Tensor) -> None:
    """A UserError for NaN and infinite values: no grid holds them."""
    if not torch.isfinite(x).all():
        raise UserError(
            "got a tensor with NaN or infinite values to quantize",
            "finite values",
            "look for a network or an input that overflows",
        )


def choose_qparams(minimum: Tensor, maximum: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers minimum..maximum (and zero, which must be exact).

    Symmetric: the larger magnitude lands on quant_max. Asymmetric: the grid runs from min(minimum, 0) to
    max(maximum, 0), so a tensor without negative values gets an unsigned grid with zero_point 0.

    Args:
        minimum, maximum: scalars, or one entry per channel; finite.
        scheme: bits and grid.

    Returns:
        scale (float, > 0, never denormal) and zero_point (int32, in quant_min..quant_max), shaped like ``minimum``.
    """
    check_finite(torch.stack([minimum, maximum]))
    low, high = minimum.clamp(max=0), maximum.clamp(min=0)
    tiny = torch.finfo(torch.float32).tiny
    if scheme.symmetric:
        scale = (torch.maximum(-low, high) / scheme.quant_max).clamp(min=tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    levels = scheme.quant_max - scheme.quant_min  # divided first: high - low can overflow
    scale = (high / levels - low / levels).clamp(min=tiny)
    zero_point = (scheme.quant_min - torch.round(low / scale)).clamp(scheme.quant_min, scheme.quant_max)
    return scale, zero_point.to(torch.int32)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None = None
) -> Tensor:
    """Integer codes of ``x``, int32, same shape."""
    scale, zero_point = broadcast(scale, x, axis), broadcast(zero_point, x, axis)
    return (torch.round(x / scale) + zero_point).clamp(quant_min, quant_max).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """The float values that ``codes`` stand for, in the dtype of ``scale``."""
    scale, zero_point = broadcast(scale, codes, axis), broadcast(zero_point, codes, axis)
    return (codes - zero_point).to(scale.dtype) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize with the gradients of LSQ (Esser et al., ICLR 2020, arXiv 1902.08153, eq. 3 and 5).

    With v = x / scale and n, p the grid's ends minus zero_point:
        d x_hat / d x     = 1 inside n <= v <= p, else 0                              (straight-through)
        d x_hat / d scale = round(v) - v inside, n below, p above

    One fused function instead of a chain of elementwise ones: on a CPU the chain's traffic costs as much as the
    convolution behind it.
    """

    @staticmethod
    def forward(ctx, x, scale, low, high, axis, gradient_scale):
        shaped = broadcast(scale, x, axis)
        v = x / shaped
        low, high = broadcast(low, x, axis), broadcast(high, x, axis)
        inside = (v >= low) & (v <= high)
        q = (
            torch.round(v).clamp_(low, high)
            if low.dim() == 0
            else torch.minimum(torch.maximum(torch.round(v), low), high)
        )
        ctx.axis, ctx.gradient_scale, ctx.shape = None if axis is None else axis % x.dim(), gradient_scale, scale.shape
        ctx.save_for_backward(inside, *((q, v) if ctx.needs_input_grad[1] else ()))
        return q * shaped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inside, *rest = ctx.saved_tensors
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            q, v = rest
            slope = torch.where(inside, q - v, q).mul_(grad)
            if len(ctx.shape) == 0:
                grad_scale = slope.sum() * ctx.gradient_scale
            else:
                grad_scale = slope.sum(dim=[d for d in range(slope.dim()) if d != ctx.axis]) * ctx.gradient_scale
        return grad_x, grad_scale, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    gradient_scale: float = 1.0,
) -> Tensor:
    """``dequantize(quantize(x))`` with LSQ's gradients for ``x`` and ``scale`` (times ``gradient_scale``).

    ``zero_point`` is constant. Shapes: ``x`` any; ``scale`` and ``zero_point`` scalars or [C] along ``axis``.
    """
    low, high = (quant_min - zero_point).to(x.dtype), (quant_max - zero_point).to(x.dtype)
    return _FakeQuantize.apply(x, scale, low, high, axis, gradient_scale)


def pack(codes: Tensor, num_bits: int, quant_min: int) -> Tensor:
    """Codes as a dense bit stream: ``num_bits`` bits each, offset by ``quant_min``, first code in the lowest bits.

    Returns:
        uint8 [ceil(num_codes * num_bits / 8)]: 4-bit codes take half a byte each, 3-bit codes three eighths.
    """
    unsigned = codes.reshape(-1).to("cpu", torch.int32) - quant_min
    if unsigned.numel() and not (int(unsigned.min()) >= 0 and int(unsigned.max()) < 2**num_bits):
        raise ValueError(f"codes {int(codes.min())}..{int(codes.max())} do not fit {num_bits} bits from {quant_min}")
    rows = torch.nn.functional.pad(unsigned.to(torch.uint8), (0, -unsigned.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(rows), num_bits, dtype=torch.uint8)  # 8 codes fill exactly num_bits bytes
    for position in range(8 * num_bits):
        code, bit = divmod(position, num_bits)
        packed[:, position // 8] |= ((rows[:, code] >> bit) & 1) << (position % 8)
    return packed.reshape(-1)[: -(-unsigned.numel() * num_bits // 8)].clone()


def unpack(packed: Tensor, num_bits: int, quant_min: int, shape: tuple[int, ...]) -> Tensor:
    """The int32 codes of :func:`pack`, in ``shape``; ValueError if ``packed`` is not exactly as long as they need."""
    num_codes = math.prod(shape)
    if packed.numel() != -(-num_codes * num_bits // 8):
        raise ValueError(f"{packed.numel()} bytes are not {num_codes} codes of {num_bits} bits")
    rows = torch.nn.functional.pad(packed.to(torch.uint8), (0, -packed.numel() % num_bits)).view(-1, num_bits)
    codes = torch.zeros(len(rows), 8, dtype=torch.uint8)
    for position in range(8 * num_bits):
        code, bit = divmod(position, num_bits)
        codes[:, code] |= ((rows[:, position // 8] >> (position % 8)) & 1) << bit
    return (codes.reshape(-1)[:num_codes].to(torch.int32) + quant_min).view(shape)
