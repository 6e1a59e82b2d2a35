"""All rounding, against NumPy, against torch's own kernels, and against autograd of a straight-through composition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.errors import UserError
from dfq.quantization import choose_qparams, dequantize, fake_quantize, pack, quantize, unpack
from dfq.scheme import TensorScheme

SCHEMES = [TensorScheme(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
FINITE = st.floats(-1e6, 1e6, width=32)


def grid(x, scale, zero_point, low, high):
    """The equations of the file's docstring in NumPy, in float32 (its division is what runtimes do)."""
    return np.clip(np.rint(x / scale) + zero_point, low, high)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ choose_qparams


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.0, 5.0), (-7.0, 0.0), (0.5, 2.0), (-2.0, -0.5), (-1e-3, 1e3)])
def test_grid_covers_the_range_and_zero_is_exact(scheme, low, high):
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    bottom = float((scheme.quant_min - zero_point) * scale)
    top = float((scheme.quant_max - zero_point) * scale)
    step = float(scale)
    assert bottom <= min(low, 0) + step / 2 * 1.0001 and top >= max(high, 0) - step / 2 * 1.0001
    assert zero_point.dtype == torch.int32
    assert scheme.quant_min <= int(zero_point) <= scheme.quant_max
    assert float(fake_quantize(torch.tensor(0.0), scale, zero_point, scheme.quant_min, scheme.quant_max)) == 0.0
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


@pytest.mark.parametrize("scheme", [TensorScheme(8, True), TensorScheme(2, False)], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-42])
def test_a_tensor_of_nothing_gets_a_usable_scale(scheme, value):
    scale, zero_point = choose_qparams(torch.tensor([value]), torch.tensor([value]), scheme)
    assert float(scale) >= torch.finfo(torch.float32).tiny
    rounded = fake_quantize(torch.tensor([[value, 0.0]]), scale, zero_point, scheme.quant_min, scheme.quant_max, axis=0)
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


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
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
    codes = quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max, axis)
    assert codes.dtype == torch.int32
    np.testing.assert_array_equal(codes.numpy(), want)
    values = ((want - z).astype(np.float32) * s).astype(np.float32)
    np.testing.assert_array_equal(dequantize(codes, scale, zero_point, axis).numpy(), values)
    fake = fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max, axis)
    np.testing.assert_array_equal(fake.numpy(), values)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_forward_against_torchs_kernels(scheme):
    """torch multiplies with 1 / scale where we divide: codes may differ where x / scale is next to a midpoint."""
    x, low, high = randn(6, 50) * 2, scheme.quant_min, scheme.quant_max
    scale, zero_point = torch.tensor(0.37), torch.tensor(0 if scheme.symmetric else 1, dtype=torch.int32)
    no_tie = ((x / scale) % 1 - 0.5).abs() > 1e-4
    want = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, low, high)[no_tie], want[no_tie], rtol=1e-6, atol=0)
    scales, zeros = torch.rand(6, generator=torch.Generator().manual_seed(2)) + 0.1, zero_point.repeat(6)
    no_tie = ((x / scales[:, None]) % 1 - 0.5).abs() > 1e-4
    want = torch.fake_quantize_per_channel_affine(x, scales, zeros, 0, low, high)
    torch.testing.assert_close(
        fake_quantize(x, scales, zeros, low, high, axis=0)[no_tie], want[no_tie], rtol=1e-6, atol=0
    )


def test_midpoints_go_to_the_even_code():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]) * 0.25  # exact in binary
    codes = quantize(x, torch.tensor(0.25), torch.tensor(0, dtype=torch.int32), -8, 7)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4]
    # Rounded before the zero point is added: with an odd zero point the sum may be odd.
    codes = quantize(x, torch.tensor(0.25), torch.tensor(3, dtype=torch.int32), 0, 15)
    assert codes.tolist() == [1, 1, 3, 3, 5, 5, 7]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(FINITE, min_size=1, max_size=20),
    st.sampled_from(SCHEMES),
)
def test_codes_lie_on_the_grid_and_errors_within_half_a_step(values, scheme):
    x = torch.tensor(values)
    scale, zero_point = choose_qparams(x.min(), x.max(), scheme)
    codes = quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max)
    assert scheme.quant_min <= int(codes.min()) and int(codes.max()) <= scheme.quant_max
    rounded = dequantize(codes, scale, zero_point)
    # The zero point is rounded to a code, so an end of the range may be clipped by half a step more.
    assert ((rounded - x).abs() <= scale * (1.001 + 1e-4)).all()
    if scheme.symmetric or float(x.min()) >= 0:
        assert ((rounded - x).abs() <= scale * 0.5001).all()
    fake = fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max)
    assert torch.equal(fake, rounded)
    assert torch.equal(fake_quantize(fake, scale, zero_point, scheme.quant_min, scheme.quant_max), fake)  # idempotent


def test_empty_and_single():
    zero = torch.tensor(0, dtype=torch.int32)
    assert fake_quantize(torch.zeros(0, 3), torch.tensor(1.0), zero, -8, 7).shape == (0, 3)
    assert quantize(torch.tensor(3.4), torch.tensor(1.0), zero, -8, 7).item() == 3


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
    fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max, axis, gradient_scale=0.125).backward(grad)
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
            y = fake_quantize(a, s, zero_point, 0, 7, axis)
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
    fake_quantize(x, scale, torch.tensor(0, dtype=torch.int32), -8, 7).sum().backward()
    assert (x.grad is not None) == x_needs and (scale.grad is not None) == scale_needs


def test_gradients_stay_finite_on_a_grid_that_saw_only_zeros():
    """A layer whose input was zero in calibration has the smallest scale there is; x / scale then overflows."""
    scheme = TensorScheme(4)
    scale, zero_point = choose_qparams(torch.tensor(0.0), torch.tensor(0.0), scheme)
    x, scale = torch.tensor([0.0, 1.0, 100.0], requires_grad=True), scale.requires_grad_()
    y = fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all() and torch.isfinite(scale.grad).all()


# ------------------------------------------------------------------------------------------------ packing


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 4), min_size=0, max_size=4), st.booleans(), st.integers(0, 2**32))
def test_pack_and_unpack_are_inverse(num_bits, shape, symmetric, seed):
    scheme = TensorScheme(num_bits, symmetric)
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(scheme.quant_min, scheme.quant_max + 1, tuple(shape), generator=rng, dtype=torch.int32)
    packed = pack(codes, num_bits, scheme.quant_min)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(codes.numel() * num_bits / 8),)
    back = unpack(packed, num_bits, scheme.quant_min, tuple(shape))
    assert back.dtype == torch.int32 and torch.equal(back, codes)


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_bit_stream_is_the_documented_one(num_bits):
    """First code in the lowest bits of one long little-endian number."""
    rng = torch.Generator().manual_seed(num_bits)
    codes = torch.randint(0, 2**num_bits, (37,), generator=rng)
    number = sum(int(code) << (i * num_bits) for i, code in enumerate(codes))
    assert bytes(pack(codes, num_bits, 0).tolist()) == number.to_bytes(math.ceil(37 * num_bits / 8), "little")


@pytest.mark.parametrize("codes", [[-9], [8], [0, 300]])
def test_codes_that_do_not_fit_are_refused(codes):
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack(torch.tensor(codes), 4, -8)


@pytest.mark.parametrize("num_bytes", [0, 4, 6])
def test_a_wrong_length_is_refused(num_bytes):
    with pytest.raises(ValueError, match="bytes are not 9 codes"):
        unpack(torch.zeros(num_bytes, dtype=torch.uint8), 4, -8, (3, 3))
