"""All rounding, against NumPy, against torch's own kernels, and against autograd of a straight-through composition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.errors import UserError
from dfq.quantization import (
    broadcast,
    choose_qparams,
    dequantize,
    dynamic_qparams,
    fake_quantize,
    from_groups,
    pack,
    quantize,
    round_scale,
    round_to_grid,
    soft_quantize,
    soft_rounding,
    soft_rounding_logits,
    tensor_scale,
    to_groups,
    unpack,
)
from dfq.scheme import FLOAT_FORMATS, TensorScheme

SCHEMES = [TensorScheme(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
INT4 = TensorScheme(4, True)
SHIFTED = TensorScheme(grid="ternary")
FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FLOATS = [TensorScheme(grid=name, symmetric=True) for name in FLOAT_FORMATS]
# One of each kind of grid around zero, then all of them.
SOME = [INT4, TensorScheme(8, True, range="7bit"), TensorScheme(1, True, grid="seq"), TensorScheme(3, True, grid="seq")]
SOME += [TensorScheme(grid="ternary", symmetric=True), *FLOATS]
SYMMETRIC = [TensorScheme(bits, True) for bits in range(2, 9)]
SYMMETRIC += [TensorScheme(bits, True, range="narrow") for bits in range(2, 9)]
SYMMETRIC += [TensorScheme(bits, True, grid="seq") for bits in range(1, 9)]
SYMMETRIC += [TensorScheme(8, True, range="7bit"), TensorScheme(grid="ternary", symmetric=True), *FLOATS]
LOG2 = [TensorScheme(bits, grid="log2") for bits in (2, 3, 4)]
STORED = [*SYMMETRIC, *(TensorScheme(bits) for bits in range(2, 9)), SHIFTED]
POWERS = [TensorScheme(4, True, scale_format="e8m0"), TensorScheme(4, scale_format="e8m0")]
POWERS += [TensorScheme(grid=name, symmetric=True, scale_format="e8m0") for name in FLOAT_FORMATS]
EVERY = [*STORED, *LOG2, *POWERS, TensorScheme(12), TensorScheme(16), TensorScheme(16, True)]
FINITE = st.floats(-1e6, 1e6, width=32)


def label(value):
    """Of a scheme in a test's name: what it sets beside the defaults."""
    if not isinstance(value, TensorScheme):
        return str(value)
    chosen = [
        str(v) for (k, v), (_, d) in zip(vars(value).items(), vars(TensorScheme()).items(), strict=True) if v != d
    ]
    return "-".join(chosen) or "default"


def grid(x, scale, zero_point, low, high):
    """The equations of the file's docstring in NumPy, in float32 (its division is what runtimes do)."""
    return np.clip(np.rint(x / scale) + zero_point, low, high)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ choose_qparams


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.0, 5.0), (-7.0, 0.0), (0.5, 2.0), (-2.0, -0.5), (-1e-3, 1e3)])
def test_grid_covers_the_range_and_zero_is_exact(scheme, low, high):
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    bottom = float((scheme.quant_min - zero_point) * scale)
    top = float((scheme.quant_max - zero_point) * scale)
    step = float(scale)
    assert bottom <= min(low, 0) + step / 2 * 1.0001 and top >= max(high, 0) - step / 2 * 1.0001
    assert zero_point.dtype == torch.int32
    assert scheme.quant_min <= int(zero_point) <= scheme.quant_max
    assert float(fake_quantize(torch.tensor(0.0), scale, zero_point, scheme)) == 0.0
    if scheme.symmetric:
        assert int(zero_point) == 0 and step == pytest.approx(max(-low, high, 0) / scheme.quant_max, rel=1e-6)
    else:
        assert step == pytest.approx((max(high, 0) - min(low, 0)) / (2**scheme.num_bits - 1), rel=1e-6)
        if low >= 0:
            assert int(zero_point) == 0


def test_per_channel_is_the_same_as_channel_by_channel():
    scheme, low, high = TensorScheme(4), torch.tensor([-1.0, 0.0, -3.0, 0.0]), torch.tensor([2.0, 1.0, 0.0, 0.0])
    scale, zero_point = choose_qparams(low, high, scheme)
    for i in range(4):
        one = choose_qparams(low[i], high[i], scheme)
        assert float(one[0]) == float(scale[i]) and int(one[1]) == int(zero_point[i])


@pytest.mark.parametrize("scheme", [TensorScheme(8, True), TensorScheme(2, False)], ids=label)
@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-42])
def test_a_tensor_of_nothing_gets_a_usable_scale(scheme, value):
    scale, zero_point = choose_qparams(torch.tensor([value]), torch.tensor([value]), scheme)
    assert float(scale) >= torch.finfo(torch.float32).tiny
    rounded = fake_quantize(torch.tensor([[value, 0.0]]), scale, zero_point, scheme, axis=0)
    assert torch.isfinite(rounded).all() and float(rounded[0, 1]) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_and_infinity_are_the_users_mistake(bad, place):
    ends = [torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])]
    ends[place][1] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        choose_qparams(*ends, TensorScheme(8))


def test_the_whole_range_of_float32_gives_a_finite_scale():
    largest = torch.finfo(torch.float32).max
    for scheme in (TensorScheme(8, True), TensorScheme(8, False)):
        scale, _ = choose_qparams(torch.tensor(-largest), torch.tensor(largest), scheme)
        assert torch.isfinite(scale)


# ------------------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_equations_against_numpy(scheme, axis):
    x = randn(5, 6, 7) * 3
    channels = () if axis is None else (x.shape[axis],)
    scale = torch.rand(channels, generator=torch.Generator().manual_seed(1)) + 0.05
    zero_point = (
        torch.zeros(channels, dtype=torch.int32)
        if scheme.symmetric
        else torch.full(channels, scheme.quant_max // 3, dtype=torch.int32)
    )
    shape = [1] * 3
    if axis is not None:
        shape[axis] = -1
    s, z = (t.numpy().reshape(shape) for t in (scale, zero_point))
    want = grid(x.numpy(), s, z, scheme.quant_min, scheme.quant_max)
    codes = quantize(x, scale, zero_point, scheme, axis)
    assert codes.dtype == torch.int32
    np.testing.assert_array_equal(codes.numpy(), want)
    values = ((want - z).astype(np.float32) * s).astype(np.float32)
    np.testing.assert_array_equal(dequantize(codes, scale, zero_point, scheme, axis).numpy(), values)
    fake = fake_quantize(x, scale, zero_point, scheme, axis)
    np.testing.assert_array_equal(fake.numpy(), values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_forward_against_torchs_kernels(scheme):
    """torch multiplies with 1 / scale where we divide: codes may differ where x / scale is next to a midpoint."""
    x, low, high = randn(6, 50) * 2, scheme.quant_min, scheme.quant_max
    scale, zero_point = torch.tensor(0.37), torch.tensor(0 if scheme.symmetric else 1, dtype=torch.int32)
    no_tie = ((x / scale) % 1 - 0.5).abs() > 1e-4
    want = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, scheme)[no_tie], want[no_tie], rtol=1e-6, atol=0)
    scales, zeros = torch.rand(6, generator=torch.Generator().manual_seed(2)) + 0.1, zero_point.repeat(6)
    no_tie = ((x / scales[:, None]) % 1 - 0.5).abs() > 1e-4
    want = torch.fake_quantize_per_channel_affine(x, scales, zeros, 0, low, high)
    torch.testing.assert_close(fake_quantize(x, scales, zeros, scheme, axis=0)[no_tie], want[no_tie], rtol=1e-6, atol=0)


def test_midpoints_go_to_the_even_code():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]) * 0.25  # exact in binary
    codes = quantize(x, torch.tensor(0.25), torch.tensor(0, dtype=torch.int32), INT4)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4]
    # Rounded before the zero point is added: with an odd zero point the sum may be odd.
    codes = quantize(x, torch.tensor(0.25), torch.tensor(3, dtype=torch.int32), TensorScheme(4))
    assert codes.tolist() == [1, 1, 3, 3, 5, 5, 7]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(FINITE, min_size=1, max_size=20),
    st.sampled_from(SCHEMES),
)
def test_codes_lie_on_the_grid_and_errors_within_half_a_step(values, scheme):
    x = torch.tensor(values)
    scale, zero_point = choose_qparams(x.min(), x.max(), scheme)
    codes = quantize(x, scale, zero_point, scheme)
    assert scheme.quant_min <= int(codes.min()) and int(codes.max()) <= scheme.quant_max
    rounded = dequantize(codes, scale, zero_point, scheme)
    # The zero point is rounded to a code, so an end of the range may be clipped by half a step more.
    assert ((rounded - x).abs() <= scale * (1.001 + 1e-4)).all()
    if scheme.symmetric or float(x.min()) >= 0:
        assert ((rounded - x).abs() <= scale * 0.5001).all()
    fake = fake_quantize(x, scale, zero_point, scheme)
    assert torch.equal(fake, rounded)
    assert torch.equal(fake_quantize(fake, scale, zero_point, scheme), fake)  # idempotent


def test_empty_and_single():
    zero = torch.tensor(0, dtype=torch.int32)
    assert fake_quantize(torch.zeros(0, 3), torch.tensor(1.0), zero, INT4).shape == (0, 3)
    assert quantize(torch.tensor(3.4), torch.tensor(1.0), zero, INT4).item() == 3


# ------------------------------------------------------------------------------------------------ gradients


def closed_form(x, scale, low, high, grad):
    """LSQ, eq. 3 and 5, in NumPy; everything of the shape of ``x``."""
    v = x / scale
    inside = (v >= low) & (v <= high)
    slope = np.where(inside, np.rint(v) - v, np.where(v < low, low, high))
    return grad * inside, grad * slope


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize(
    "scheme, zero", [(TensorScheme(3, True), 0), (TensorScheme(3, False), 2), (TensorScheme(8, False), 0)], ids=str
)
def test_gradients_against_the_closed_form(axis, scheme, zero):
    x, grad = randn(4, 5, 6) * 3, randn(4, 5, 6, seed=1)
    channels = () if axis is None else (x.shape[axis],)
    scale = torch.rand(channels, generator=torch.Generator().manual_seed(2)) + 0.2
    zero_point = torch.full(channels, zero, dtype=torch.int32)
    x.requires_grad_(), scale.requires_grad_()
    fake_quantize(x, scale, zero_point, scheme, axis, gradient_scale=0.125).backward(grad)
    shape = [1] * 3
    if axis is not None:
        shape[axis] = -1
    s = scale.detach().numpy().reshape(shape)
    want_x, want_scale = closed_form(
        x.detach().numpy(), s, scheme.quant_min - zero, scheme.quant_max - zero, grad.numpy()
    )
    np.testing.assert_allclose(x.grad.numpy(), want_x, rtol=1e-6)
    others = tuple(d for d in range(3) if axis is None or d != axis % 3)
    np.testing.assert_allclose(scale.grad.numpy(), want_scale.sum(others) * 0.125, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_against_autograd_of_a_straight_through_composition(axis):
    x, grad = randn(4, 30) * 3, randn(4, 30, seed=1)
    scale = torch.tensor(0.7) if axis is None else torch.tensor([0.3, 0.5, 0.7, 1.1])
    zero_point = torch.full(scale.shape, 2, dtype=torch.int32)
    found = []
    for ours in (True, False):
        a, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
        if ours:
            y = fake_quantize(a, s, zero_point, TensorScheme(3), axis)
        else:
            shaped = s if axis is None else s[:, None]
            v = (a / shaped).clamp(-2, 5)
            y = (v + (v.round() - v).detach()) * shaped
        y.backward(grad)
        found.append((y.detach(), a.grad, s.grad))
    for mine, reference in zip(*found, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_needs, scale_needs", [(True, False), (False, True)])
def test_a_gradient_that_is_not_asked_for_is_not_given(x_needs, scale_needs):
    x, scale = randn(3, 3).requires_grad_(x_needs), torch.tensor(0.5).requires_grad_(scale_needs)
    fake_quantize(x, scale, torch.tensor(0, dtype=torch.int32), INT4).sum().backward()
    assert (x.grad is not None) == x_needs and (scale.grad is not None) == scale_needs


def test_gradients_stay_finite_on_a_grid_that_saw_only_zeros():
    """A layer whose input was zero in calibration has the smallest scale there is; x / scale then overflows."""
    scheme = TensorScheme(4)
    scale, zero_point = choose_qparams(torch.tensor(0.0), torch.tensor(0.0), scheme)
    x, scale = torch.tensor([0.0, 1.0, 100.0], requires_grad=True), scale.requires_grad_()
    y = fake_quantize(x, scale, zero_point, scheme)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all() and torch.isfinite(scale.grad).all()


# ------------------------------------------------------------------------------------------------ packing


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(STORED), st.lists(st.integers(0, 4), min_size=0, max_size=4), st.integers(0, 2**32))
def test_pack_and_unpack_are_inverse(scheme, shape, seed):
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.quant_min, scheme.quant_max + 1, tuple(shape), generator=rng, dtype=torch.int32)
    packed = pack(codes, scheme)
    size = math.ceil(codes.numel() / 5) if scheme.grid == "ternary" else math.ceil(codes.numel() * scheme.num_bits / 8)
    assert packed.dtype == torch.uint8 and packed.shape == (size,)
    back = unpack(packed, scheme, tuple(shape))
    assert back.dtype == torch.int32 and torch.equal(back, codes)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_bit_stream_is_the_documented_one(num_bits):
    """First code in the lowest bits of one long little-endian number."""
    rng = torch.Generator().manual_seed(num_bits)
    codes = torch.randint(0, 2**num_bits, (37,), generator=rng)
    number = sum(int(code) << (i * num_bits) for i, code in enumerate(codes))
    assert bytes(pack(codes, TensorScheme(num_bits)).tolist()) == number.to_bytes(
        math.ceil(37 * num_bits / 8), "little"
    )


@pytest.mark.parametrize("codes", [[-9], [8], [0, 300]])
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(torch.tensor(codes), INT4)


@pytest.mark.parametrize("num_bytes", [0, 4, 6])
def test_a_wrong_length_is_refused(num_bytes):
    with pytest.raises(ValueError, match="bytes are not 9 codes"):
        unpack(torch.zeros(num_bytes, dtype=torch.uint8), INT4, (3, 3))


# ------------------------------------------------------------------------------------------------ every grid


def levels(scheme):
    """(codes, values) of a grid of scale 1 and zero point 0, each listed by itself."""
    if scheme.grid == "fp4_e2m1":
        magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP microscaling formats, table of FP4
        return np.array([*range(8), *range(9, 16)]), np.array([*magnitudes, *(-m for m in magnitudes[1:])])
    if scheme.grid in FLOAT8:
        values = torch.arange(256, dtype=torch.uint8).view(FLOAT8[scheme.grid]).double().numpy()
        codes = np.flatnonzero(np.isfinite(values) & ~((values == 0) & np.signbit(values)))  # without -0, inf and NaN
        return codes, values[codes]
    if scheme.grid == "log2":
        codes = np.arange(2**scheme.num_bits)
        return codes, 0.5**codes
    if scheme.grid == "ternary":
        return np.array([-1, 0, 1]), np.array([-1.0, 0, 1])
    half = 2 ** (scheme.num_bits - 1)
    codes = {
        "full": np.arange(-half, half) if scheme.symmetric else np.arange(2 * half),
        "narrow": np.arange(1 - half, half),
        "7bit": np.arange(-64, 64),
    }[scheme.range]
    return codes, codes + (0.5 if scheme.grid == "seq" else 0.0)


def nearest(v, scheme):
    """Code and level nearest to each of ``v`` (of log2: in the exponent), ties to the even code, by looking at all."""
    codes, values = levels(scheme)
    v = np.clip(v, -1e6, 1e6)
    with np.errstate(divide="ignore"):
        if scheme.grid == "log2":
            distance = np.abs(np.log2(np.maximum(v, 1e-30))[..., None] - np.log2(values))
        else:
            distance = np.abs(v[..., None] - values)
    closest = distance == distance.min(-1, keepdims=True)
    choice = np.argmax(closest * (2 - codes % 2), -1)  # an even one counts 2, an odd one 1
    return codes[choice], values[choice]


def scaled(scheme, seed=0):
    """Values all over a grid and beyond it, its midpoints, and extremes; a scale under which midpoints are exact."""
    _, values = levels(scheme)
    ordered, largest = np.sort(values), np.abs(values).max()
    special = [0.0, 1e-42, -1e-42, 1e-6, 1e30, -1e30, np.inf, -np.inf]
    v = np.concatenate([(ordered[1:] + ordered[:-1]) / 2, ordered, special, np.linspace(-1.3, 1.3, 400) * largest])
    v = np.concatenate([v, np.random.default_rng(seed).standard_normal(200) * largest / 3])
    return torch.tensor(v, dtype=torch.float32) * 0.25, torch.tensor(0.25)


@pytest.mark.parametrize("scheme", [*SYMMETRIC, *LOG2], ids=label)
def test_every_grid_is_the_nearest_of_its_levels(scheme):
    x, scale = scaled(scheme)
    zero_point = torch.tensor(0, dtype=torch.int32)
    codes, values = nearest((x / scale).double().numpy(), scheme)
    found = quantize(x, scale, zero_point, scheme)
    assert found.dtype == torch.int32 and len(np.unique(codes)) == len(levels(scheme)[0])
    np.testing.assert_array_equal(found.numpy(), codes)
    np.testing.assert_array_equal(dequantize(found, scale, zero_point, scheme).numpy(), values * 0.25)
    for function in (fake_quantize, round_to_grid):
        np.testing.assert_array_equal(function(x, scale, zero_point, scheme).numpy(), values * 0.25)
    assert scheme.quant_min <= codes.min() and codes.max() <= scheme.quant_max


@pytest.mark.parametrize("zero_point", [0.0, 0.3, -1.7, 40.25])
def test_ternary_with_a_shift(zero_point):
    x, scale, z = randn(50, 4) * 0.4 - 0.3 * zero_point, torch.tensor(0.3), torch.tensor(zero_point)
    codes = np.clip(np.rint(x.numpy() / np.float32(0.3) + np.float32(zero_point)), -1, 1)
    assert len(np.unique(codes)) == 3
    found = quantize(x, scale, z, SHIFTED)
    np.testing.assert_array_equal(found.numpy(), codes)
    values = (codes - np.float32(zero_point)).astype(np.float32) * np.float32(0.3)
    for rounded in (
        dequantize(found, scale, z, SHIFTED),
        fake_quantize(x, scale, z, SHIFTED),
        round_to_grid(x, scale, z, SHIFTED),
    ):
        np.testing.assert_array_equal(rounded.numpy(), values)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
def test_seq_is_paretoqs_formula(num_bits):
    """a (round(clamp(w / a, +-0.99) n - sh) + sh) / n (2502.02631, eq. 3), with n half of the levels, sh one half."""
    a, n, sh = np.float32(0.8), 2 ** (num_bits - 1), 0.5
    w = (randn(2000) * 0.5).numpy()
    want = a * (np.rint(np.clip(w / a, -0.99, 0.99) * n - sh) + sh) / n
    found = fake_quantize(
        torch.tensor(w), torch.tensor(a / n), torch.tensor(0), TensorScheme(num_bits, True, grid="seq")
    )
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-6)
    assert len(np.unique(want)) == 2**num_bits
    scale, _ = choose_qparams(torch.tensor(-0.5), torch.tensor(0.8), TensorScheme(num_bits, True, grid="seq"))
    assert float(scale) == pytest.approx(0.8 / n)  # a = max |w|


@pytest.mark.parametrize("grid_name", FLOAT8)
def test_fp8_is_torchs_saturated_cast(grid_name):
    scheme, largest = TensorScheme(grid=grid_name, symmetric=True), torch.finfo(FLOAT8[grid_name]).max
    exponents = torch.exp2(torch.randint(-20, 18, (20_000,), generator=torch.Generator().manual_seed(1)).float())
    x = torch.cat([randn(20_000) * exponents, torch.tensor([0.0, largest, largest * 1.04, 1e38, -math.inf])])
    want = x.clamp(-largest, largest).to(FLOAT8[grid_name])
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    assert torch.equal(fake_quantize(x, one, zero, scheme), want.float())
    bits = want.view(torch.uint8).int()
    assert torch.equal(quantize(x, one, zero, scheme), torch.where(bits == 128, 0, bits))  # no -0
    assert len(bits.unique()) > 230  # nearly all that there are


def test_fp4_ties_go_to_the_even_mantissa():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -2.5, -5.0])
    found = fake_quantize(x, torch.tensor(1.0), torch.tensor(0), TensorScheme(grid="fp4_e2m1", symmetric=True))
    assert found.tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -2, -4]


def test_log2_is_zero_nowhere_and_halves_from_the_scale():
    scheme = TensorScheme(3, grid="log2")
    x = torch.tensor([0.9, 0.71, 0.70, 0.36, 0.35, 1e-3, 0.0, 2.0])
    found = fake_quantize(x, torch.tensor(1.0), torch.tensor(0), scheme)
    assert found.tolist() == [1, 1, 0.5, 0.5, 0.25, 2**-7, 2**-7, 1]


# ------------------------------------------------------------------------------------------------ formats of scales


@pytest.mark.parametrize("grid_name, largest_exponent", [("fp4_e2m1", 2), ("fp8_e4m3", 8), ("fp8_e5m2", 15)])
def test_e8m0_scales_are_those_of_ocps_microscaling_formats(grid_name, largest_exponent):
    """2^(floor(log2 max|x|) - exponent of the format's largest power of two), exactly, at powers of two above all."""
    rng = np.random.default_rng(0)
    mantissas = np.concatenate([1 + rng.integers(0, 2**23, 50_000) / 2**23, [1, 1 + 2**-23, 1.5, 1.75, 2 - 2**-23]])
    maximum = (mantissas * 2.0 ** rng.integers(-90, 120, len(mantissas))).astype(np.float32)
    scheme = TensorScheme(symmetric=True, grid=grid_name, scale_format="e8m0")
    scale, zero_point = choose_qparams(torch.tensor(-maximum / 2), torch.tensor(maximum), scheme)
    np.testing.assert_array_equal(scale.numpy(), np.exp2(np.frexp(maximum)[1] - 1.0 - largest_exponent))
    assert torch.equal(round_scale(scale, scheme), scale) and not zero_point.any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_e8m0_scales_of_integers_clip_nothing(symmetric):
    scheme = TensorScheme(4, symmetric, scale_format="e8m0")
    plain = TensorScheme(4, symmetric)
    maximum = torch.exp2(randn(500) * 20)
    minimum = -maximum * torch.rand(500, generator=torch.Generator().manual_seed(3))
    exact, _ = choose_qparams(minimum, maximum, plain)
    scale, zero_point = choose_qparams(minimum, maximum, scheme)
    assert torch.equal(torch.frexp(scale)[0], torch.full((500,), 0.5))  # powers of two
    assert not (zero_point % 2).any()  # runtimes that add it before they round break ties alike
    assert symmetric or ((minimum / scale + zero_point).abs() <= 1).all()  # of the scale that is used
    assert (scale >= exact).all() and (scale < 2 * exact).all()
    for end in (minimum, maximum):
        error = (fake_quantize(end[:, None], scale, zero_point, scheme, axis=0)[:, 0] - end).abs()
        assert (error <= scale * (0.5 if symmetric else 1.0)).all()
    if not symmetric:  # all codes are needed, 15 is no even zero point
        assert choose_qparams(torch.tensor(-15.0), torch.tensor(0.0), scheme)[1] == 14
        assert choose_qparams(torch.tensor(-5.4), torch.tensor(8.0), scheme)[1] == 6
    power = torch.tensor(4.0)  # stays what it is
    assert float(choose_qparams(-7 * power, 7 * power, TensorScheme(4, True, scale_format="e8m0"))[0]) == 4.0


def test_nvfp4_scales_are_an_fp8_number_times_one_float():
    scheme = TensorScheme(symmetric=True, granularity="per_group", group_size=16, grid="fp4_e2m1", scale_format="e4m3")
    largest = randn(40, 6).abs() * torch.logspace(-7, 1, 6)
    largest[3] = 0.0
    scale, _ = choose_qparams(-largest, largest, scheme)
    shared, least = float(tensor_scale(scale)), float(largest.max()) / 6 / 448
    assert least * (1 - 1e-6) <= shared <= least * (1 + 2**-14)
    assert float(tensor_scale(largest / 6)) == shared
    for seed in range(50):  # a number of 16 bits, and no scale is above 448 times it
        scales = randn(20, seed=seed).abs()
        least = float(scales.max()) / 448
        assert 0 <= float(tensor_scale(scales)) / least - 1 < 2**-14
        assert (math.frexp(float(tensor_scale(scales)))[0] * 2**16).is_integer()
    small = (scale.double() / shared).float()
    assert torch.equal(small.to(torch.float8_e4m3fn).float(), small)  # an e4m3 number
    assert torch.equal((small.double() * shared).float(), scale) and (small > 0).all()  # and the product is exact
    want = (largest.double() / 6 / shared).float().to(torch.float8_e4m3fn).float().clamp(min=2**-9)
    assert ((small - want).abs() <= want / 8).all() and (small == want).double().mean() > 0.99  # ties may differ
    assert torch.equal(round_scale(scale, scheme), scale)


@pytest.mark.parametrize("grid_name", [*FLOAT8, "fp4_e2m1"])
def test_e4m3_scales_are_no_denormals(grid_name):
    scheme = TensorScheme(symmetric=True, granularity="per_group", group_size=16, grid=grid_name, scale_format="e4m3")
    tiny = torch.finfo(torch.float32).tiny
    for largest in ([0.0, 0.0], [0.0, 1e-30], [1e-38, 1e-33], [1e-38, 1e38]):
        scale, _ = choose_qparams(-torch.tensor(largest), torch.tensor(largest), scheme)
        assert (scale >= tiny).all() and torch.isfinite(scale).all()
        assert torch.equal(round_scale(scale, scheme), scale)


def test_a_shift_belongs_to_the_scale_in_its_format():
    """The middle of the range stays where it is when the scale is rounded to a power of two."""
    scheme = TensorScheme(grid="ternary", scale_format="e8m0")
    scale, zero_point = choose_qparams(torch.tensor([1.0, -9.0]), torch.tensor([3.0, 4.0]), scheme)
    assert scale.tolist() == [1.0, 8.0] and (-zero_point * scale).tolist() == [2.0, -2.5]


@pytest.mark.parametrize("scale_format", ["float32", "e8m0"])
@pytest.mark.parametrize("value", [10.0, -0.7, 1e-30, 1e30, 0.0])
def test_a_ternary_channel_of_equal_values_is_its_shift(value, scale_format):
    scheme, x = TensorScheme(grid="ternary", scale_format=scale_format), torch.full((1, 5), value)
    scale, zero_point = choose_qparams(x.amin(1), x.amax(1), scheme)
    np.testing.assert_allclose(fake_quantize(x, scale, zero_point, scheme, axis=0).numpy(), x.numpy(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("scheme", EVERY, ids=label)
def test_what_is_no_number(scheme):
    """NaN is the user's mistake; infinity is the last level."""
    scale = torch.tensor(0.5)
    zero_point = torch.tensor(1.25) if scheme.has_float_zero_point else torch.tensor(0, dtype=torch.int32)
    with pytest.raises(UserError, match="got a tensor with NaN to quantize"):
        quantize(torch.tensor([1.0, math.nan]), scale, zero_point, scheme)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="NaN or infinite"):
            choose_qparams(torch.tensor([0.0, min(bad, 0.0)]), torch.tensor([1.0, bad]), scheme)
    x = torch.tensor([math.inf, -math.inf, 1e38, -1e38])
    codes = quantize(x, scale, zero_point, scheme)
    values = dequantize(codes, scale, zero_point, scheme)
    assert torch.equal(fake_quantize(x, scale, zero_point, scheme), values)
    top, bottom = float(values[0]), float(values[1])
    assert values.tolist() == [top, bottom] * 2
    _, all_values = levels(TensorScheme(grid="ternary", symmetric=True) if scheme.has_float_zero_point else scheme)
    assert (
        top == (all_values.max() - float(zero_point)) * 0.5 and bottom == (all_values.min() - float(zero_point)) * 0.5
    )


def spacing(v, scheme):
    """Half of the distance between the two levels around each of ``v``: how far off rounding may be."""
    ordered = np.sort(levels(scheme)[1])
    place = np.clip(np.searchsorted(ordered, v), 1, len(ordered) - 1)
    return (ordered[place] - ordered[place - 1]) / 2


EDGES = st.sampled_from([0.0, -0.0, 1e-45, -1e-42, 1.1754944e-38, 1e-30, 65504.0, 1e38, -1.7e38])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rounding_of_any_tensor(data):
    """In range: off by half a step at most. Codes within bounds; finite, idempotent, equal to dequantize(quantize)."""
    scheme = data.draw(st.sampled_from(EVERY), label="scheme")
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), label="shape")
    axis = data.draw(st.sampled_from([None, *range(len(shape))]), label="axis")
    values = data.draw(st.lists(FINITE | EDGES, min_size=math.prod(shape), max_size=math.prod(shape)), label="values")
    x = torch.tensor(values).view(shape)
    if scheme.grid == "log2":
        x = x.abs()
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)
    scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), scheme)
    assert torch.isfinite(scale).all() and (scale >= torch.finfo(torch.float32).tiny).all()
    assert torch.isfinite(zero_point).all()
    if axis is None:
        scale, zero_point = scale[0], zero_point[0]
    codes = quantize(x, scale, zero_point, scheme, axis)
    assert codes.shape == x.shape and scheme.quant_min <= int(codes.min()) and int(codes.max()) <= scheme.quant_max
    rounded = dequantize(codes, scale, zero_point, scheme, axis)
    assert torch.isfinite(rounded).all()
    assert torch.equal(fake_quantize(x, scale, zero_point, scheme, axis), rounded)
    assert torch.equal(fake_quantize(rounded, scale, zero_point, scheme, axis), rounded)
    s, z = (
        t if axis is None else t.view([-1 if d == axis else 1 for d in range(x.dim())]) for t in (scale, zero_point)
    )
    v = (x.double() / s.double()).numpy()
    off = np.abs(rounded.double().numpy() / s.double().numpy() - v)
    if scheme.grid == "log2":
        inside = v >= 0.5**scheme.quant_max
        assert (np.abs(np.log2(np.maximum(v, 1e-45) / (rounded / s).double().numpy()))[inside] <= 0.5 + 1e-6).all()
        return
    if scheme.has_float_zero_point:
        assert (off <= 0.5 + 1e-5 + np.abs(z.numpy()) * 1e-6).all()
        return
    if not scheme.symmetric:  # the zero point is a whole number: an end of the range is off by up to half a step more
        low, high = ((end - z).double().numpy() for end in (scheme.quant_min, scheme.quant_max))
        assert (off <= 1 + 1e-5).all() and (off <= 0.5 + 1e-5)[(v >= low) & (v <= high)].all()
        return
    largest = np.abs(levels(scheme)[1]).max()
    half = np.maximum(spacing(v, scheme), np.abs(v) - largest)  # powers of two may clip small floats
    if scheme.scale_format != "e8m0" or scheme.grid == "uniform":
        assert (np.abs(v) <= largest + 0.5 + 1e-5).all()  # chosen so that the range is covered
    assert (off <= half * (1 + 1e-5) + 1e-5 * np.maximum(1, np.abs(v))).all()


# ------------------------------------------------------------------------------------------------ storage


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_is_stored_is_what_was_computed_with(data):
    """quantize, pack, unpack, dequantize = fake_quantize, for scales of a tensor, of channels and of groups."""
    scheme = data.draw(st.sampled_from(STORED), label="scheme")
    channels, groups, size = (data.draw(st.integers(1, 5), label=name) for name in ("channels", "groups", "size"))
    axis = data.draw(st.sampled_from([0, 1]), label="axis")
    kind = data.draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]), label="kind")
    seed = data.draw(st.integers(0, 2**16), label="seed")
    shape = [groups * size, 1]
    shape.insert(axis, channels)
    w = randn(*shape, seed=seed) * 3 + 0.5
    x = {"per_tensor": w.reshape(1, -1), "per_channel": w.movedim(axis, 0).flatten(1)}.get(kind)
    x = to_groups(w, axis, size).flatten(0, 1) if x is None else x
    if kind == "per_group":  # by the words of the docstring: values along the input dimension, channel by channel
        flat = np.moveaxis(w.numpy(), axis, 0).reshape(channels, -1)
        want = [flat[c, g * size : (g + 1) * size] for c in range(channels) for g in range(groups)]
        np.testing.assert_array_equal(x.numpy(), np.array(want))
        assert torch.equal(from_groups(x.view(channels, groups, size), axis, w.shape), w)
    scale, zero_point = choose_qparams(x.amin(1), x.amax(1), scheme)
    codes = quantize(x, scale, zero_point, scheme, axis=0)
    packed = pack(codes, scheme)
    per_byte = {"ternary": 5}.get(scheme.grid)
    bits = codes.numel() * scheme.num_bits
    assert packed.numel() == (math.ceil(codes.numel() / per_byte) if per_byte else math.ceil(bits / 8))
    back = dequantize(unpack(packed, scheme, tuple(x.shape)), scale, zero_point, scheme, axis=0)
    assert torch.equal(back, fake_quantize(x, scale, zero_point, scheme, axis=0))


def test_ternary_codes_take_a_little_more_than_log2_of_3_bits():
    scheme = TensorScheme(grid="ternary", symmetric=True)
    codes = torch.randint(-1, 2, (10_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = pack(codes, scheme)
    assert 8 * packed.numel() / 10_000 == scheme.bits_per_value == 1.6
    assert math.log2(3) < 1.6 < math.log2(3) * 1.01
    # The documented digits: the first code is the lowest digit to base 3 of the first byte.
    digits = (codes[:5] + 1).tolist()
    assert int(packed[0]) == sum(digit * 3**place for place, digit in enumerate(digits))


@pytest.mark.parametrize("codes", [[-2], [2], [0, 3]])
def test_ternary_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(ValueError, match="do not fit 2 bits from -1"):
        pack(torch.tensor(codes), TensorScheme(grid="ternary"))


# ------------------------------------------------------------------------------------------------ gradients of grids


def ends(scheme, z=0.0):
    """Where gradients end, in codes: the last levels, of ternary and seq half a step beyond, of log2 not below."""
    if scheme.grid == "uniform":
        return scheme.quant_min, scheme.quant_max
    largest = np.abs(levels(TensorScheme(grid="ternary", symmetric=True) if z else scheme)[1]).max()
    if scheme.grid in ("ternary", "seq"):
        return -largest - 0.5, largest + 0.5
    return (0.5**scheme.quant_max if scheme.grid == "log2" else -largest), largest


@pytest.mark.parametrize("scheme", [*SOME, *LOG2, SHIFTED, TensorScheme(3)], ids=label)
def test_gradients_are_differences_of_the_clipped_function(scheme):
    """With the rounding error r held, x_hat = s (clip(x / s + z) + r - z) is smooth; float64 differences of it."""
    z = 1.3 if scheme.has_float_zero_point else 2.0 if scheme.grid == "uniform" and not scheme.symmetric else 0.0
    low, high = ends(scheme, z)
    s = 0.7
    x = (np.random.default_rng(0).uniform(1.4 * min(low, -high), 1.4 * high, 300) - z).astype(np.float32) * np.float32(
        s
    )
    edges = np.abs((x / s + z)[:, None] - [low, high]).min(1) > 1e-3  # not where the slope jumps
    x = x[edges]
    weights = randn(len(x)).numpy()
    a, b = torch.tensor(x, requires_grad=True), torch.tensor(s, requires_grad=True)
    c = torch.tensor(z, requires_grad=True)
    y = fake_quantize(a, b, c, scheme, gradient_scale=0.5)
    r = y.detach().double().numpy() / s + z - np.clip(x.astype(np.float64) / s + z, low, high)
    y.backward(torch.tensor(weights))

    def smooth(x, s, z):
        return s * (np.clip(x / s + z, low, high) + r - z)

    x, e = x.astype(np.float64), 1e-6
    inside = (x / s + z > low) & (x / s + z < high)
    assert 0.1 < inside.mean() < 0.95
    np.testing.assert_allclose(a.grad, weights * (smooth(x + e, s, z) - smooth(x - e, s, z)) / (2 * e), atol=1e-4)
    want = (weights * (smooth(x, s + e, z) - smooth(x, s - e, z))).sum() / (2 * e) * 0.5
    assert float(b.grad) == pytest.approx(want, rel=1e-3, abs=1e-3)
    want = (weights * (smooth(x, s, z + e) - smooth(x, s, z - e))).sum() / (2 * e) * 0.5
    assert float(c.grad) == pytest.approx(want, rel=1e-3, abs=1e-3) and (want != 0)


@pytest.mark.parametrize("axis", [None, 1])
def test_lsq_plus_trains_a_zero_point_for_every_channel(axis):
    """d x_hat / d z is -scale outside of the grid and 0 inside (2004.09576, eq. 4)."""
    x, grad, scheme = randn(6, 3) * 4, randn(6, 3, seed=1), TensorScheme(3)
    scale = torch.tensor(0.5) if axis is None else torch.tensor([0.3, 0.5, 0.9])
    zero_point = torch.full(scale.shape, 3.0, requires_grad=True)
    fake_quantize(x, scale, zero_point, scheme, axis).backward(grad)
    v = x.numpy() / scale.numpy()
    outside = (v < -3) | (v > 4)
    want = -grad.numpy() * outside * scale.numpy()
    assert 0 < outside.mean() < 1
    np.testing.assert_allclose(zero_point.grad, want.sum() if axis is None else want.sum(0), rtol=1e-4, atol=1e-6)


def test_a_trained_zero_point_rounds_as_the_integer_that_it_becomes():
    """Ties go to the even step of x / scale, before the zero point is added, whatever its type."""
    x, scheme = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), TensorScheme(4)
    integer = fake_quantize(x, torch.tensor(1.0), torch.tensor(3, dtype=torch.int32), scheme)
    assert integer.tolist() == [-2, 0, 0, 2, 2]
    assert torch.equal(fake_quantize(x, torch.tensor(1.0), torch.tensor(3.0), scheme), integer)


@pytest.mark.parametrize("scheme", [*SOME, *LOG2, SHIFTED, TensorScheme(3)], ids=label)
def test_stable_gradient(scheme):
    """(1 - S) / (1 + S), S = sqrt(2) pi A cos(pi d), A = 0.21, at d steps from a level: 0.035 on it, 1 half way."""
    z = torch.tensor(0.25) if scheme.has_float_zero_point else torch.tensor(0, dtype=torch.int32)
    x, scale = scaled(scheme)
    x = x.clone().requires_grad_()
    fake_quantize(x, scale, z, scheme, stable=True).sum().backward()
    assert torch.isfinite(x.grad).all()
    v = (x.detach() / scale).double().numpy() + float(z)
    low, high = ends(scheme, float(z))
    inside = (v >= low) & (v <= high)
    v = v[inside]
    grid_of = TensorScheme(grid="ternary", symmetric=True) if scheme.has_float_zero_point else scheme
    _, level = nearest(v, grid_of)
    if scheme.grid == "log2":
        steps = np.log2(v / level)
    elif scheme.grid in FLOAT_FORMATS:  # the distance of neighbors in the binade of v
        form = FLOAT_FORMATS[scheme.grid]
        exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(v), 1e-45))), form.smallest_exponent)
        steps = (v - level) / 2.0 ** (exponent - form.mantissa_bits)
    else:
        steps = v - level
    surrogate = math.sqrt(2) * math.pi * 0.21 * np.cos(math.pi * steps)
    want = (1 - surrogate) / (1 + surrogate)
    found = x.grad.numpy()
    np.testing.assert_allclose(found[inside], want, rtol=1e-3)
    assert not found[~inside].any() and (~inside).any()
    assert want.min() == pytest.approx(0.0347, abs=1e-4) and want.max() == pytest.approx(1, abs=0.02)


def test_stable_gradient_stays_finite_on_a_grid_that_saw_only_zeros():
    scale, zero_point = choose_qparams(torch.tensor(0.0), torch.tensor(0.0), INT4)
    x = torch.tensor([0.0, 1.0, -100.0], requires_grad=True)
    fake_quantize(x, scale, zero_point, INT4, stable=True).sum().backward()
    assert torch.isfinite(x.grad).all() and float(x.grad[0]) > 0 and not x.grad[1:].any()


# ------------------------------------------------------------------------------------------------ soft rounding


@pytest.mark.parametrize("scheme, zero", [(TensorScheme(4, True), 0), (TensorScheme(4), 6)], ids=label)
@pytest.mark.parametrize("axis", [None, 0])
def test_soft_rounding_starts_at_the_value_itself(scheme, zero, axis):
    x = randn(3, 200)
    scale = torch.tensor(0.3) if axis is None else torch.tensor([0.2, 0.3, 0.5])
    zero_point = torch.full(scale.shape, zero, dtype=torch.int32)
    s = scale if axis is None else scale[:, None]
    low, high = (scheme.quant_min - zero) * s, (scheme.quant_max - zero) * s
    logits = soft_rounding_logits(x, scale, axis)
    base = torch.floor(x / broadcast(scale, x, axis))
    found = soft_quantize(base, scale, zero_point, scheme, logits, axis)
    np.testing.assert_allclose(found, torch.minimum(torch.maximum(x, low), high), atol=1e-6)
    h = soft_rounding(logits)
    np.testing.assert_allclose(h.numpy(), (x / s - torch.floor(x / s)).numpy(), atol=1e-6)
    # h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1 (1910: AdaRound, eq. 23)
    v = np.linspace(-6, 6, 50)
    want = np.clip(1 / (1 + np.exp(-v)) * 1.2 - 0.1, 0, 1)
    np.testing.assert_allclose(soft_rounding(torch.tensor(v)).numpy(), want, rtol=1e-6)
    assert want.min() == 0 and want.max() == 1
    for saturated, rounding in ((-9.0, np.floor), (9.0, np.ceil)):
        codes = np.clip(rounding(x.numpy() / s.numpy()) + zero, scheme.quant_min, scheme.quant_max)
        rounded = soft_quantize(base, scale, zero_point, scheme, torch.full_like(x, saturated), axis)
        np.testing.assert_allclose(rounded.numpy(), (codes - zero) * s.numpy(), rtol=1e-6)


def test_soft_roundings_gradients_by_finite_differences():
    x, scheme, zero_point = randn(40).double() * 1.2, TensorScheme(3, True), torch.tensor(0, dtype=torch.int32)
    scale = torch.tensor(0.41, dtype=torch.float64, requires_grad=True)
    logits = (soft_rounding_logits(x, scale.detach()) + randn(40, seed=1).double()).requires_grad_()
    weights = randn(40, seed=2).double()

    def loss(scale, logits):
        floors = torch.floor(x / 0.41)  # whole codes do not move with the scale
        codes = (floors + (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1)).clamp(-4, 3)
        return float((weights * codes * scale).sum())

    base = torch.floor(x / scale.detach())
    found = (weights * soft_quantize(base, scale, zero_point, scheme, logits)).sum()
    assert float(found.detach()) == pytest.approx(loss(0.41, logits.detach()), rel=1e-9)
    found.backward()
    e = 1e-6
    assert float(scale.grad) == pytest.approx(
        (loss(0.41 + e, logits.detach()) - loss(0.41 - e, logits.detach())) / (2 * e), rel=1e-5
    )
    for i in range(40):
        step = torch.zeros(40, dtype=torch.float64)
        step[i] = e
        want = (loss(0.41, logits.detach() + step) - loss(0.41, logits.detach() - step)) / (2 * e)
        assert float(logits.grad[i]) == pytest.approx(want, abs=1e-6)
    assert 5 < int((logits.grad != 0).sum()) < 40  # some are clipped


# ------------------------------------------------------------------------------------------------ ranges of a batch


@pytest.mark.parametrize("scheme", [TensorScheme(8), TensorScheme(4, True), *SOME], ids=label)
def test_dynamic_ranges_are_those_of_each_slice(scheme):
    x = randn(3, 4, 5) * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    x[1, 2] = 0.0
    scale, zero_point = dynamic_qparams(x, scheme, (-1,))
    assert scale.shape == zero_point.shape == (3, 4, 1)
    for i in range(3):
        for j in range(4):
            one = choose_qparams(x[i, j].min(), x[i, j].max(), scheme)
            assert float(scale[i, j]) == float(one[0]) and int(zero_point[i, j]) == int(one[1])
