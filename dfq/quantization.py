"""All rounding lives here: choose_qparams, quantize, dequantize, fake_quantize, and the bit packing of codes.

The affine grid, as ONNX ``QuantizeLinear``/``DequantizeLinear`` define it::

    q = clamp(round(x / scale) + zero_point, quant_min, quant_max)        round: half to even
    x_hat = (q - zero_point) * scale

``scale`` and ``zero_point`` are tensors: scalars for ``per_tensor``, one entry per channel for ``per_channel``
(then ``axis`` names the channel dimension of ``x``), or of as many dimensions as ``x`` where they broadcast against it.
Divisions are written as divisions, not as products with a reciprocal, because runtimes divide and the two differ at
ties. The other grids (:mod:`dfq.scheme` says which) are levels of their own times ``scale``, see :func:`_snap`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dfq.errors import UserError
from dfq.scheme import FLOAT_FORMATS, FloatFormat, TensorScheme

# StableQAT's first harmonic: sqrt(2) * pi * A_0 with A_0 = 0.21.
STABLE_AMPLITUDE = math.sqrt(2) * math.pi * 0.21
# AdaRound's stretched sigmoid (Nagel et al., ICML 2020, arXiv 2004.10568, eq. 23).
ZETA, GAMMA = 1.1, -0.1
TRITS = 5  # ternary codes in a byte: 3^5 = 243


def broadcast(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """``values`` (scalar, one entry per channel, or as many dimensions as ``x``) shaped to broadcast against ``x``."""
    if values.dim() == 0 or axis is None or values.dim() == x.dim() > 1:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.view(shape)


def to_groups(x: Tensor, axis: int, group_size: int) -> Tensor:
    """Weight [.., C along ``axis``, ..] as [C, G, K]: its other dimensions in groups of K = ``group_size`` values."""
    return x.movedim(axis, 0).reshape(x.shape[axis], -1, group_size)


def from_groups(groups: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """The inverse of :func:`to_groups`, for a weight of ``shape``."""
    moved = [shape[axis], *(n for d, n in enumerate(shape) if d != axis % len(shape))]
    return groups.reshape(moved).movedim(0, axis)


def check_finite(x: Tensor) -> None:
    """A UserError for NaN and infinite values: no grid holds them."""
    if not torch.isfinite(x).all():
        raise UserError(
            "got a tensor with NaN or infinite values to quantize",
            "finite values",
            "look for a network or an input that overflows",
        )


# ------------------------------------------------------------------------------------------------ ranges


def choose_qparams(minimum: Tensor, maximum: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers minimum..maximum (and zero, which a uniform grid holds exactly).

    Symmetric: the larger magnitude lands on the largest level (a ``seq`` or ``ternary`` grid clips at half a step above
    it, ParetoQ's stretched range). Asymmetric: the grid runs from min(minimum, 0) to max(maximum, 0), so a tensor
    without negative values gets an unsigned grid with zero_point 0. A ternary grid with a shift is centered; one with a
    float zero point runs from minimum to maximum.

    Args:
        minimum, maximum: scalars, or one entry per channel or group; finite. All of one tensor: e4m3 scales share one.
        scheme: bits and grid.

    Returns:
        scale (float, > 0, never denormal) and zero_point (int32, in quant_min..quant_max; float for a grid with a float
        zero point), shaped like ``minimum``.
    """
    check_finite(torch.stack([minimum, maximum]))
    scale, zero_point = _qparams(minimum, maximum, scheme)
    return round_scale(scale, scheme), zero_point


def _qparams(minimum: Tensor, maximum: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """:func:`choose_qparams` without a look at the values, which would make the host wait."""
    tiny = torch.finfo(torch.float32).tiny
    if scheme.has_float_zero_point and scheme.grid == "uniform":
        scale = shifted_scale((maximum - minimum) / scheme.quant_max, minimum, scheme)
        return scale, round_zero_point(-minimum / scale, scale, scheme)
    if scheme.has_float_zero_point:
        scale = shifted_scale((maximum / 2 - minimum / 2) / _largest_level(scheme), maximum / 2 + minimum / 2, scheme)
        return scale, round_zero_point(-(maximum / 2 + minimum / 2) / scale, scale, scheme)
    low, high = minimum.clamp(max=0), maximum.clamp(min=0)
    if scheme.symmetric or scheme.grid != "uniform":
        scale = (torch.maximum(-low, high) / _largest_level(scheme)).clamp(min=tiny)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    levels = scheme.quant_max - scheme.quant_min  # divided first: high - low can overflow
    scale = (high / levels - low / levels).clamp(min=tiny)
    if scheme.scale_format != "float32":
        scale = round_scale(scale, scheme)  # the zero point belongs to the scale that will be used
    return scale, round_zero_point(scheme.quant_min - low / scale, scale, scheme).to(torch.int32)


def round_zero_point(zero_point: Tensor, scale: Tensor, scheme: TensorScheme) -> Tensor:
    """The nearest code that may stand for zero; with scales that are powers of two the nearest even one.

    Sums of powers of two often end exactly between two codes. Runtimes round before or after they add the zero point,
    which comes to the same if it is even. A float zero point stays as it is, unless scales are float16: then zero_point
    * scale is such a number too, as GGUF stores it (but for the last bits of a float32).
    """
    if scheme.has_float_zero_point:
        if scheme.scale_format != "float16":
            return zero_point
        return ((zero_point * scale).clamp(-65504.0, 65504.0).half().to(scale.dtype) / scale).to(zero_point.dtype)
    step = 2 if scheme.scale_format == "e8m0" else 1
    return (torch.round(zero_point / step) * step).clamp(scheme.quant_min, scheme.quant_max // step * step)


def shifted_scale(scale: Tensor, shift: Tensor, scheme: TensorScheme) -> Tensor:
    """``scale`` in its format, so wide that the zero point -shift / scale is a number where all values are equal."""
    tiny, epsilon = torch.finfo(torch.float32).tiny, 2.0**-23
    return round_scale(torch.maximum(scale.clamp(min=tiny), shift.abs() * epsilon), scheme)


def _largest_level(scheme: TensorScheme) -> float:
    """Where a grid of scale 1 begins to clip."""
    if scheme.grid in FLOAT_FORMATS:
        return FLOAT_FORMATS[scheme.grid].maximum
    if scheme.grid in ("seq", "ternary"):
        return scheme.quant_max + (1.0 if scheme.grid == "seq" else 0.5)
    return 1.0 if scheme.grid == "log2" else scheme.quant_max


def dynamic_qparams(x: Tensor, scheme: TensorScheme, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each slice of ``x`` over ``dims``, from its own extremes; dimensions stay, of size 1."""
    x = x.detach()
    scale, zero_point = _qparams(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True), scheme)
    return round_scale(scale, scheme), zero_point


def round_scale(scale: Tensor, scheme: TensorScheme) -> Tensor:
    """``scale`` in its format.

    float16: what GGUF stores.
    e8m0: a power of two; of a small float the one that OCP's microscaling formats take, 2^(floor(log2 max|x|) - largest
    exponent), which may clip the largest values; of other grids the next larger one. e4m3: a small float times one
    float32 scale for the tensor, which puts the largest at 448 (NVFP4).
    """
    if scheme.scale_format == "float16":  # no denormals: few bits of them are left
        return scale.clamp(2.0**-14, 65504.0).half().to(scale.dtype)
    if scheme.scale_format == "e8m0":
        if scheme.grid in FLOAT_FORMATS:
            maximum = FLOAT_FORMATS[scheme.grid].maximum
            return torch.exp2(_exponent(scale * maximum) - float(math.floor(math.log2(maximum))))
        mantissa, exponent = torch.frexp(scale)
        return torch.exp2((exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(max=127).to(scale.dtype))
    if scheme.scale_format == "e4m3":
        shared = tensor_scale(scale)
        small = _round_float(scale / shared, FLOAT_FORMATS["fp8_e4m3"])
        return small.clamp(min=2.0**-9) * shared  # never zero
    return scale


def tensor_scale(scale: Tensor) -> Tensor:
    """The float32 scale that e4m3 scales of a tensor share: with 16 bits of mantissa, so that products are exact."""
    least = scale.max() / FLOAT_FORMATS["fp8_e4m3"].maximum
    mantissa, exponent = torch.frexp(least.clamp(min=2.0**-117))  # times the smallest e4m3, 2^-9, it is no denormal
    return torch.ldexp(torch.ceil(mantissa * 2**16), exponent - 16)


# ------------------------------------------------------------------------------------------------ levels


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|), exactly, as float."""
    return (torch.frexp(x)[1] - 1).to(x.dtype)


def _round_float(v: Tensor, form: FloatFormat) -> Tensor:
    """The nearest value of a small float format, ties to the even mantissa; saturates."""
    v = v.clamp(-form.maximum, form.maximum)
    step = torch.exp2(_exponent(v).clamp(min=form.smallest_exponent) - form.mantissa_bits)
    return torch.round(v / step) * step


def _snap(v: Tensor, scheme: TensorScheme) -> Tensor:
    """The level of a grid of scale 1 that stands for ``v``; for all grids but ``uniform``."""
    if scheme.grid in FLOAT_FORMATS:
        return _round_float(v, FLOAT_FORMATS[scheme.grid])
    if scheme.grid == "log2":
        # The exponent is rounded, as in FQ-ViT: the border between 1 and 1/2 is at 2^-0.5.
        exponent = torch.round(-torch.log2(v.clamp(min=2.0 ** -(scheme.quant_max + 1))))
        return torch.exp2(-exponent.clamp(0, scheme.quant_max))
    if scheme.grid == "seq":
        return torch.round(v - 0.5).clamp_(scheme.quant_min, scheme.quant_max) + 0.5
    return torch.round(v).clamp_(scheme.quant_min, scheme.quant_max)


def _steps_between(v: Tensor, level: Tensor, scheme: TensorScheme) -> Tensor:
    """v - level in steps of the grid at v, at most half a one inside it; a small float has steps of many sizes."""
    if scheme.grid in FLOAT_FORMATS:
        form = FLOAT_FORMATS[scheme.grid]
        return (v - level) / torch.exp2(_exponent(v).clamp(min=form.smallest_exponent) - form.mantissa_bits)
    return torch.log2(v / level) if scheme.grid == "log2" else v - level


def _clip_limits(scheme: TensorScheme) -> tuple[float, float]:
    """Outside of these a value of a grid of scale 1 counts as clipped: no gradient reaches it."""
    largest = _largest_level(scheme)
    return (2.0**-scheme.quant_max if scheme.grid == "log2" else -largest), largest


# ------------------------------------------------------------------------------------------------ codes


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme, axis: int | None = None) -> Tensor:
    """Integer codes of ``x``, int32, same shape: quant_min..quant_max, of a small float its bits.

    Infinite values saturate; NaN is a UserError.
    """
    if torch.isnan(x).any():
        raise UserError("got a tensor with NaN to quantize", "numbers", "look for a network that overflows")
    scale, zero_point = broadcast(scale, x, axis), broadcast(zero_point, x, axis)
    if scheme.has_float_zero_point:
        return torch.round(x / scale + zero_point).clamp(scheme.quant_min, scheme.quant_max).to(torch.int32)
    if scheme.grid == "uniform":
        codes = torch.round(x / scale) + zero_point
        return codes.clamp(scheme.quant_min, scheme.quant_max).to(torch.int32)
    level = _snap(x / scale, scheme)
    if scheme.grid in FLOAT_FORMATS:
        return _float_bits(level, FLOAT_FORMATS[scheme.grid], scheme.num_bits)
    if scheme.grid == "log2":
        return (-torch.log2(level)).round().to(torch.int32)
    return torch.floor(level).to(torch.int32)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme, axis: int | None = None
) -> Tensor:
    """The float values that ``codes`` stand for, in the dtype of ``scale``."""
    scale, zero_point = broadcast(scale, codes, axis), broadcast(zero_point, codes, axis)
    if scheme.grid in FLOAT_FORMATS:
        return _from_float_bits(codes, FLOAT_FORMATS[scheme.grid], scheme.num_bits).to(scale.dtype) * scale
    if scheme.grid == "log2":
        return torch.exp2(-codes.to(scale.dtype)) * scale
    if scheme.grid == "seq":
        return (codes.to(scale.dtype) + 0.5) * scale
    return (codes - zero_point).to(scale.dtype) * scale


def _float_bits(level: Tensor, form: FloatFormat, num_bits: int) -> Tensor:
    """sign | exponent | mantissa of values that a small float holds."""
    exponent = _exponent(level).clamp(min=form.smallest_exponent)
    steps = (level.abs() / torch.exp2(exponent - form.mantissa_bits)).to(torch.int32)  # 2^m + mantissa if normal
    magnitude = ((exponent - form.smallest_exponent).to(torch.int32) << form.mantissa_bits) + steps
    magnitude = torch.where(steps > 0, magnitude, 0)  # zero has no exponent
    return torch.where(level < 0, magnitude + (1 << (num_bits - 1)), magnitude).to(torch.int32)


def _from_float_bits(codes: Tensor, form: FloatFormat, num_bits: int) -> Tensor:
    magnitude = codes & ((1 << (num_bits - 1)) - 1)
    exponent, mantissa = magnitude >> form.mantissa_bits, magnitude & ((1 << form.mantissa_bits) - 1)
    steps = torch.where(exponent > 0, mantissa + (1 << form.mantissa_bits), mantissa)
    power = (exponent.clamp(min=1) - 1 + form.smallest_exponent - form.mantissa_bits).float()
    return torch.where(codes >> (num_bits - 1) > 0, -1.0, 1.0) * steps.float() * torch.exp2(power)


# ------------------------------------------------------------------------------------------------ with gradients


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize with the gradients of LSQ (Esser et al., ICLR 2020, arXiv 1902.08153, eq. 3 and 5).

    With v = x / scale, r the level it is rounded to, and n, p the ends of the grid:
        d x_hat / d x          = 1 inside n <= v <= p, else 0                         (straight-through)
        d x_hat / d scale      = r - v inside, r outside
        d x_hat / d zero_point = 0 inside, -scale outside                             (LSQ+, arXiv 2004.09576, eq. 4)

    ``stable``: StableQAT's surrogate (first harmonic of the staircase's Fourier series) instead of the 1 inside,
    (1 - S) / (1 + S) with S = sqrt(2) pi A_0 cos(pi (v + round(v))), which is cos(pi (v - r)): small on a level, 1 half
    way between two.

    One fused function instead of a chain of elementwise ones: on a CPU the chain's traffic costs as much as the
    convolution behind it.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, scheme, gradient_scale, stable):
        v, needs_grad = x / scale, any(ctx.needs_input_grad)
        inside = None
        if (
            scheme.grid == "uniform" and not scheme.has_float_zero_point
        ):  # rounded before a zero point is added, be it an integer or one that is trained
            low, high = (scheme.quant_min - zero_point).to(x.dtype), (scheme.quant_max - zero_point).to(x.dtype)
            if zero_point.is_floating_point():
                level = _clip(torch.round(v), low, high)
            else:  # between whole numbers it does not matter what comes first
                clipped = _clip(v, low, high)
                inside = clipped == v if needs_grad else None
                level, v = torch.round(clipped, out=v), clipped
        elif scheme.has_float_zero_point:
            low, high = scheme.quant_min - 0.5 - zero_point, scheme.quant_max + 0.5 - zero_point
            level = torch.round(v + zero_point).clamp_(scheme.quant_min, scheme.quant_max) - zero_point
        else:
            low, high = _clip_limits(scheme)
            level = _snap(v, scheme)
        if inside is None and needs_grad:
            inside = (v >= low) & (v <= high)
            v = torch.where(inside, v, 0.0)  # it may be infinite outside
        ctx.scheme, ctx.gradient_scale, ctx.stable = scheme, gradient_scale, stable
        ctx.shapes = scale.shape, zero_point.shape
        needs_v = ctx.needs_input_grad[1] or stable
        ctx.save_for_backward(inside, scale, *((level, v) if needs_v else ()))
        return level * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inside, scale, *rest = ctx.saved_tensors
        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[0]:
            grad_x = grad * inside
            if ctx.stable:
                level, v = rest
                offset = torch.where(inside, _steps_between(v, level, ctx.scheme), 0.0)  # on a log2 grid 0 has none
                surrogate = STABLE_AMPLITUDE * torch.cos(math.pi * offset)
                grad_x.mul_((1 - surrogate) / (1 + surrogate))
        if ctx.needs_input_grad[1]:
            level, v = rest
            slope = (level - v * inside).mul_(grad)
            grad_scale = slope.sum_to_size(ctx.shapes[0]) * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            slope = (grad * ~inside).mul_(-scale)
            grad_zero_point = slope.sum_to_size(ctx.shapes[1]) * ctx.gradient_scale
        return grad_x, grad_scale, grad_zero_point, None, None, None


def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return x.clamp(low, high) if low.dim() == 0 else torch.minimum(torch.maximum(x, low), high)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: TensorScheme,
    axis: int | None = None,
    gradient_scale: float = 1.0,
    stable: bool = False,
) -> Tensor:
    """``dequantize(quantize(x))`` with LSQ's gradients for ``x`` and ``scale`` (times ``gradient_scale``).

    Shapes: ``x`` any; ``scale`` and ``zero_point`` scalars, [C] along ``axis``, or broadcastable with all dimensions. A
    float ``zero_point`` gets LSQ+'s gradient. ``stable``: StableQAT's surrogate (Microsoft, 2026) for ``x``.
    """
    scale, zero_point = broadcast(scale, x, axis), broadcast(zero_point, x, axis)
    return _FakeQuantize.apply(x, scale, zero_point, scheme, gradient_scale, stable)


def round_to_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme, axis: int | None = None
) -> Tensor:
    """The values of :func:`fake_quantize` in plain operations, which an exporter can translate; no gradients."""
    scale, zero_point = broadcast(scale, x, axis), broadcast(zero_point, x, axis)
    if scheme.has_float_zero_point:
        codes = torch.clamp(torch.round(x / scale + zero_point), scheme.quant_min, scheme.quant_max)
        return (codes - zero_point) * scale
    if scheme.grid != "uniform":
        return _snap(x / scale, scheme) * scale
    codes = torch.clamp(torch.round(x / scale) + zero_point, scheme.quant_min, scheme.quant_max)
    return (codes - zero_point) * scale


def round_through(x: Tensor) -> Tensor:
    """round(x) whose gradient is that of x (straight-through)."""
    return x + (torch.round(x) - x).detach()


def scale_through(scale: Tensor, scheme: TensorScheme) -> Tensor:
    """``scale``, if it is trained, as :func:`round_scale` will leave it; its gradient is that of ``scale``."""
    if scheme.scale_format == "float32" or not scale.requires_grad:
        return scale
    return scale + (round_scale(scale.detach(), scheme) - scale).detach()


def zero_point_through(zero_point: Tensor, scale: Tensor, scheme: TensorScheme) -> Tensor:
    """``zero_point``, if it or the scale is trained, as :func:`round_zero_point` will leave it; its own gradient."""
    if not zero_point.is_floating_point() or not (zero_point.requires_grad or scale.requires_grad):
        return zero_point
    return zero_point + (round_zero_point(zero_point.detach(), scale.detach(), scheme) - zero_point).detach()


def soft_quantize(
    base: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme, logits: Tensor, axis: int | None = None
) -> Tensor:
    """AdaRound's soft rounding on evenly spaced levels: codes base + h(logits) + zero_point, base = floor(x / scale).

    A fractional ``zero_point`` asks for the ``base`` that makes base + zero_point a code.
    h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1 (Nagel et al., ICML 2020, arXiv
    2004.10568, eq. 22-23). Differentiable with respect to ``logits`` and ``scale``, which may be trained together
    because ``base`` stays what it is (Genie, CVPR 2023, arXiv 2212.04780, section 3.2).
    """
    scale, zero_point = broadcast(scale, base, axis), broadcast(zero_point, base, axis)
    codes = base + soft_rounding(logits) + zero_point
    return (codes.clamp(scheme.quant_min, scheme.quant_max) - zero_point) * scale


def soft_rounding(logits: Tensor) -> Tensor:
    """h(V) of :func:`soft_quantize`: 0 rounds down, 1 up."""
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def soft_rounding_logits(x: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """The logits for which :func:`soft_quantize` gives ``x`` itself: h(V) = x / scale - floor(x / scale)."""
    v = x / broadcast(scale, x, axis)
    return torch.logit(((v - torch.floor(v)) - GAMMA) / (ZETA - GAMMA))


# ------------------------------------------------------------------------------------------------ packing


def pack(codes: Tensor, scheme: TensorScheme) -> Tensor:
    """Codes as a dense bit stream: ``num_bits`` bits each, offset by ``quant_min``, first code in the lowest bits.

    Returns:
        uint8 [ceil(num_codes * num_bits / 8)]: 4-bit codes take half a byte each, 3-bit codes three eighths. Ternary
        ones: five in a byte, uint8 [ceil(num_codes / 5)], the first the lowest digit to base 3.
    """
    num_bits, last = scheme.num_bits, scheme.quant_max - scheme.quant_min
    unsigned = codes.reshape(-1).to("cpu", torch.int32) - scheme.quant_min
    if unsigned.numel() and not (int(unsigned.min()) >= 0 and int(unsigned.max()) <= last):
        raise ValueError(
            f"codes {int(codes.min())}..{int(codes.max())} do not fit {num_bits} bits from {scheme.quant_min}"
        )
    if scheme.grid == "ternary":
        rows = torch.nn.functional.pad(unsigned, (0, -unsigned.numel() % TRITS)).view(-1, TRITS)
        return (rows * 3 ** torch.arange(TRITS, dtype=torch.int32)).sum(1).to(torch.uint8)
    rows = torch.nn.functional.pad(unsigned.to(torch.uint8), (0, -unsigned.numel() % 8)).view(-1, 8)
    packed = torch.zeros(len(rows), num_bits, dtype=torch.uint8)  # 8 codes fill exactly num_bits bytes
    for position in range(8 * num_bits):
        code, bit = divmod(position, num_bits)
        packed[:, position // 8] |= ((rows[:, code] >> bit) & 1) << (position % 8)
    return packed.reshape(-1)[: -(-unsigned.numel() * num_bits // 8)].clone()


def unpack(packed: Tensor, scheme: TensorScheme, shape: tuple[int, ...]) -> Tensor:
    """The int32 codes of :func:`pack`, in ``shape``; ValueError if ``packed`` is not exactly as long as they need."""
    num_bits, num_codes = scheme.num_bits, math.prod(shape)
    num_bytes = -(-num_codes // TRITS) if scheme.grid == "ternary" else -(-num_codes * num_bits // 8)
    if packed.numel() != num_bytes:
        raise ValueError(f"{packed.numel()} bytes are not {num_codes} codes of {scheme.bits_per_value:g} bits")
    if scheme.grid == "ternary":
        digits = packed.to(torch.int32)[:, None] // 3 ** torch.arange(TRITS, dtype=torch.int32) % 3
        return (digits.reshape(-1)[:num_codes] + scheme.quant_min).view(shape)
    rows = torch.nn.functional.pad(packed.to(torch.uint8), (0, -packed.numel() % num_bits)).view(-1, num_bits)
    codes = torch.zeros(len(rows), 8, dtype=torch.uint8)
    for position in range(8 * num_bits):
        code, bit = divmod(position, num_bits)
        codes[:, code] |= ((rows[:, position // 8] >> (position % 8)) & 1) << bit
    return (codes.reshape(-1)[:num_codes].to(torch.int32) + scheme.quant_min).view(shape)
