"""Ranges against brute force in NumPy, from the tensor itself and from a histogram."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from dfq.errors import UserError
from dfq.modules import Quantizer
from dfq.quantization import choose_qparams, fake_quantize, round_scale
from dfq.quantizers._observation import Histogram, Observation
from dfq.quantizers.lsq import LSQ, learn_step
from dfq.quantizers.min_max import MinMax
from dfq.quantizers.moving_average import MovingAverage
from dfq.quantizers.mse import MSE
from dfq.quantizers.percentile import Percentile
from dfq.quantizers.twn import TWN
from dfq.scheme import FLOAT, TensorScheme

SIGNED, UNSIGNED = TensorScheme(4, True), TensorScheme(4, False)
TERNARY, SHIFTED = TensorScheme(grid="ternary", symmetric=True), TensorScheme(grid="ternary")
SEQ, FP4 = TensorScheme(2, True, grid="seq"), TensorScheme(grid="fp4_e2m1", symmetric=True)
MXFP4 = replace(FP4, granularity="per_group", group_size=32, scale_format="e8m0")
NVFP4 = replace(MXFP4, scale_format="e4m3")
METHODS = [MinMax(), Percentile(), Percentile(99.0), MSE(), MSE(2.4, 20), LSQ(), TWN(), MovingAverage()]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram.observation()


def fake(x, scale, zero_point, scheme):
    return (np.clip(np.rint(x / scale) + zero_point, scheme.quant_min, scheme.quant_max) - zero_point) * scale


# ------------------------------------------------------------------------------------------------ observations


@pytest.mark.parametrize("axis, channels", [(None, 1), (0, 4), (1, 5)])
def test_of_tensor(axis, channels):
    x = randn(4, 5, 6)
    found = Observation.of_tensor(x, axis)
    assert found.values.shape == (channels, x.numel() // channels)
    rows = x.numpy().reshape(1, -1) if axis is None else np.moveaxis(x.numpy(), axis, 0).reshape(channels, -1)
    np.testing.assert_array_equal(found.minimum, rows.min(1))
    np.testing.assert_array_equal(found.maximum, rows.max(1))


def test_histogram_counts_everything_and_knows_the_exact_extremes():
    batches = [torch.zeros(7), randn(1000) * 0.01, randn(500) * 30, torch.full((3,), -200.0)]
    found = seen(*batches)
    x = torch.cat(batches)
    assert float(found.counts.sum()) == len(x)
    assert float(found.minimum) == float(x.min()) and float(found.maximum) == float(x.max())
    assert found.values.min() >= x.min() and found.values.max() <= x.max()
    mean = float((found.values * found.counts).sum() / found.counts.sum())
    assert mean == pytest.approx(float(x.mean()), abs=0.2)  # a bin is 400 / 4096 wide


def test_histogram_does_not_depend_on_the_order_of_batches():
    batches = [randn(1000, seed=s) * scale for s, scale in enumerate((1.0, 3.0, 0.2))]
    a, b = seen(*batches), seen(*batches[::-1])
    for method in METHODS:
        if isinstance(method, MovingAverage):
            continue  # it forgets the first batches
        first, second = (float(method.qparams(o, UNSIGNED)[0]) for o in (a, b))
        assert first == pytest.approx(second, rel=0.03)


def test_histogram_counts_more_than_float32_can():
    """After a ReLU half of a large batch lies in one bin: 2**24 + 1 equal values are not 2**24."""
    histogram = Histogram()
    histogram.add(torch.zeros(2**24 + 4096))
    assert int(histogram.counts.sum()) == 2**24 + 4096


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("order", ["alone", "first", "last"])
def test_a_bad_activation_is_the_users_mistake(method, bad, order):
    good, broken = randn(50_000).relu(), randn(1000)
    broken[17] = bad
    batches = {"alone": [broken], "first": [broken, good], "last": [good, broken]}[order]
    with pytest.raises(UserError, match="NaN or infinite"):
        method.qparams(seen(*batches), UNSIGNED)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_the_users_mistake(method, bad):
    weight = randn(2, 50_000)
    weight[1, 5] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        method.qparams(Observation.of_tensor(weight, 0), SIGNED)


# ------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("scheme", [SIGNED, UNSIGNED, TensorScheme(2, True)], ids=str)
def test_degenerate_channels(method, scheme):
    """All zero, constant, a single outlier: finite positive scales, and zero stays zero."""
    rows = torch.stack([torch.zeros(32), torch.full((32,), 0.7), torch.full((32,), -0.7), torch.eye(32)[3] * 100])
    scale, zero_point = method.qparams(Observation.of_tensor(rows, 0), scheme)
    assert scale.shape == zero_point.shape == (4,) and zero_point.dtype == torch.int32
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert (zero_point >= scheme.quant_min).all() and (zero_point <= scheme.quant_max).all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_single_element(method):
    scale, zero_point = method.qparams(Observation.of_tensor(torch.tensor([[2.0]]), 0), SIGNED)
    assert float(fake(np.float32(2.0), scale.numpy(), zero_point.numpy(), SIGNED)[0]) == pytest.approx(2.0, rel=0.51)


@pytest.mark.parametrize("scheme", [SIGNED, UNSIGNED], ids=str)
def test_min_max(scheme):
    x = randn(3, 100)
    want = choose_qparams(x.amin(1), x.amax(1), scheme)
    for mine, reference in zip(MinMax().qparams(Observation.of_tensor(x, 0), scheme), want, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("percentile", ["51", "75", "90", "97", "99", "99.9", "99.99", "100"])
@pytest.mark.parametrize("num_values", [1, 10, 20, 100, 1000, 20_000])
@pytest.mark.parametrize("sign", ["signed", "positive"])
def test_percentile_against_counting(percentile, num_values, sign):
    """The smallest upper end with at most the share of values above it; the largest lower end likewise; exact."""
    x = torch.arange(num_values) / 7.0 + 0.01
    if sign == "signed":
        x = x - x.mean() - 0.013
    x = x[torch.randperm(num_values, generator=torch.Generator().manual_seed(0))]
    rest = (1 - Fraction(percentile) / 100) * num_values
    ordered = np.sort(x.numpy())
    if sign == "signed" and float(x.min()) < 0:
        allowed = int(rest / 2)
        low, high = ordered[allowed], ordered[num_values - 1 - allowed]
    else:
        low, high = np.float32(0), ordered[num_values - 1 - int(rest)]
    want = choose_qparams(torch.tensor([low]), torch.tensor([high]), UNSIGNED)
    found = Percentile(float(percentile)).qparams(Observation.of_tensor(x, None), UNSIGNED)
    assert float(found[0]) == pytest.approx(float(want[0]), rel=1e-6)
    assert int(found[1]) == int(want[1])


@pytest.mark.parametrize("percentile", [50, 0, -1, 100.1, float("nan")])
def test_percentile_out_of_range(percentile):
    with pytest.raises(UserError, match="above 50, at most 100"):
        Percentile(percentile)


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("scheme", [SIGNED, UNSIGNED, TensorScheme(2, True)], ids=str)
def test_mse_against_brute_force(norm, scheme):
    x = randn(3, 400) * torch.tensor([[0.1], [1.0], [20.0]])
    x[2] = x[2].relu()
    scale, zero_point = MSE(norm, 40).qparams(Observation.of_tensor(x, 0), scheme)
    for row, s, z in zip(x, scale, zero_point, strict=True):

        def error(scale, zero_point, row=row):
            rounded = fake(row.numpy().astype(np.float64), float(scale), int(zero_point), scheme)
            return (np.abs(rounded - row.numpy()) ** norm).sum()

        ratios = torch.arange(1, 41) / 40
        candidates = [error(*choose_qparams(row.min() * r, row.max() * r, scheme)) for r in ratios]
        assert error(s, z) == pytest.approx(min(candidates), rel=1e-5)
        assert min(candidates) < candidates[-1]  # the clip bought something, or this test shows nothing


@pytest.mark.parametrize("method", [Percentile(99.0), MSE(), LSQ(), MinMax()], ids=str)
@pytest.mark.parametrize("scheme", [TensorScheme(4, False), TensorScheme(8, False)], ids=str)
@pytest.mark.parametrize("positive", [True, False])
def test_a_histogram_gives_what_the_values_give(method, scheme, positive):
    x = randn(20_000) * 2 + 0.3
    x = x.relu() if positive else x
    exact, _ = method.qparams(Observation.of_tensor(x, None), scheme)
    binned, zero_point = method.qparams(seen(*x.split(3000)), scheme)
    assert float(binned) == pytest.approx(float(exact), rel=0.04)
    if positive:
        assert int(zero_point) == 0


def test_lsq_initial_step():
    """2 <|x|> / sqrt(Q_P), section 2.1, where that is inside the range."""
    x = randn(2, 1000)
    x[:, 0] = 50.0
    scale, _ = LSQ().qparams(Observation.of_tensor(x, 0), SIGNED)
    np.testing.assert_allclose(scale, 2 * np.abs(x.numpy()).mean(1) / np.sqrt(7), rtol=1e-5)


def test_learn_step_trains_with_the_papers_gradient_scale():
    quantizer = Quantizer(SIGNED, (3,), axis=0)
    quantizer.set_qparams(torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int32))
    x = randn(3, 50)
    before = quantizer(x)
    [scale] = learn_step(quantizer, 50)
    assert dict(quantizer.named_parameters()).keys() == {"scale"} and "scale" not in dict(quantizer.named_buffers())
    assert torch.equal(quantizer(x), before)
    quantizer(x).sum().backward()
    v = x.numpy() / scale.detach().numpy()[:, None]
    inside = (v >= -8) & (v <= 7)
    slope = np.where(inside, np.rint(v) - v, np.where(v < 0, -8, 7)).sum(1)
    np.testing.assert_allclose(scale.grad, slope / np.sqrt(50 * 7), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", [UNSIGNED, TERNARY, SHIFTED, SEQ, FP4], ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("offset", [True, False])
def test_learn_step_says_what_it_trains(scheme, offset):
    quantizer = Quantizer(scheme, (3,), axis=0)
    x = randn(3, 50) + 0.3
    quantizer.set_qparams(*MinMax().qparams(Observation.of_tensor(x, 0), scheme))
    before = quantizer(x)
    parameters = learn_step(quantizer, 50, offset=offset, stable=True)
    names = ["scale", "zero_point"] if scheme is SHIFTED or (offset and scheme is UNSIGNED) else ["scale"]
    assert list(dict(quantizer.named_parameters())) == names
    assert [id(p) for p in parameters] == [id(getattr(quantizer, name)) for name in names]
    assert torch.equal(quantizer(x), before) and quantizer.stable
    assert quantizer.gradient_scale == pytest.approx((50 * (15 if scheme is UNSIGNED else 1)) ** -0.5)
    quantizer.freeze()
    assert torch.equal(quantizer(x), before) and not list(quantizer.parameters())
    assert (quantizer.gradient_scale, quantizer.stable) == (1.0, False)


@pytest.mark.parametrize(
    "scheme", [replace(s, scale_format="e8m0") for s in (SIGNED, TERNARY, SHIFTED, SEQ, FP4)], ids=str
)
def test_a_power_of_two_that_is_learned_stays_itself_at_first(scheme):
    """A small step of an optimizer leaves it where it was; at the end of its interval one would double it."""
    quantizer, x = Quantizer(scheme, (3,), axis=0), randn(3, 50)
    quantizer.set_qparams(*MinMax().qparams(Observation.of_tensor(x, 0), scheme))
    before = quantizer(x)
    [scale, *_] = learn_step(quantizer, 50)
    for factor in (1.2, 1 / 1.44):
        with torch.no_grad():
            scale.mul_(factor)
        assert torch.equal(quantizer(x), before)
    with torch.no_grad():
        scale.mul_(2.4)
    assert not torch.equal(quantizer(x), before)


@pytest.mark.parametrize("scheme", [TensorScheme(8, granularity="per_token"), FLOAT], ids=str)
def test_there_is_no_step_to_learn_without_a_grid(scheme):
    quantizer = Quantizer(scheme)
    assert learn_step(quantizer, 50, offset=True) == [] and not list(quantizer.parameters())


# ------------------------------------------------------------------------------------------------ other grids


def error_of(rows, scale, zero_point, scheme):
    return (fake_quantize(rows, scale, zero_point, scheme, axis=0) - rows).double().square().sum(1)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("scheme", [TERNARY, SHIFTED, SEQ, FP4, MXFP4, NVFP4], ids=lambda scheme: scheme.label)
def test_every_method_finds_a_scale_of_every_grid(method, scheme):
    """All zero, constant, one outlier, far from zero: finite, in its format, and not worse than nothing at all."""
    rows = torch.stack(
        [torch.zeros(32), torch.full((32,), 7.0), torch.eye(32)[3] * 100, randn(32) * 1e-3 + 5, randn(32)]
    )
    scale, zero_point = method.qparams(Observation.of_tensor(rows, 0), scheme)
    assert scale.shape == zero_point.shape == (5,) and scale.dtype == torch.float32
    assert (scale >= torch.finfo(torch.float32).tiny).all() and torch.isfinite(scale).all()
    assert torch.isfinite(zero_point).all() and zero_point.is_floating_point() == scheme.has_float_zero_point
    assert scheme.has_float_zero_point or not zero_point.any()
    rounded = fake_quantize(rows, scale, zero_point, scheme, axis=0)
    assert torch.isfinite(rounded).all()
    error, energy = error_of(rows, scale, zero_point, scheme), rows.double().square().sum(1)
    dense = [0, 1, 3, 4] if scheme.grid == "seq" else range(5)  # without a level at zero an outlier costs all others
    assert (error <= energy * 1.001 + 1e-30)[list(dense)].all()
    if scheme.has_float_zero_point:  # the shift takes what channels have in common
        np.testing.assert_allclose(rounded[1], rows[1], rtol=1e-6)
        assert float((rounded[3] - rows[3]).abs().max()) < 0.01


@pytest.mark.parametrize("method", [MSE(), MSE(2.4)], ids=str)
@pytest.mark.parametrize("scheme", [TERNARY, SHIFTED, SEQ, FP4], ids=lambda scheme: scheme.label)
def test_mse_is_at_least_as_good_as_min_max_on_every_grid(method, scheme):
    rows = randn(6, 200) + torch.linspace(0, 1, 6)[:, None]
    best, widest = (
        error_of(rows, *m.qparams(Observation.of_tensor(rows, 0), scheme), scheme) for m in (method, MinMax())
    )
    assert (best <= widest).all() and (best < 0.99 * widest).any()


@pytest.mark.parametrize("grid", ["ternary", "seq"])
def test_lsq_starts_ternary_and_seq_steps_from_the_mean(grid):
    """2 <|x|> / sqrt(Q_P) with one positive step; a shift is taken off first."""
    x = randn(2, 1000) + torch.tensor([[0.0], [0.5]])
    scale, _ = LSQ().qparams(Observation.of_tensor(x, 0), TensorScheme(2, True, grid=grid))
    widest = x.abs().amax(1).numpy() / (1.5 if grid == "ternary" else 2)
    np.testing.assert_allclose(scale, np.minimum(2 * np.abs(x.numpy()).mean(1), widest), rtol=1e-5)
    scale, zero_point = LSQ().qparams(Observation.of_tensor(x, 0), SHIFTED)
    middle = (x.amax(1) + x.amin(1)).numpy() / 2
    np.testing.assert_allclose(-zero_point * scale, middle, rtol=1e-5)
    spread = np.abs(x.numpy() - middle[:, None])
    np.testing.assert_allclose(scale, np.minimum(2 * spread.mean(1), spread.max(1) / 1.5), rtol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != Percentile(99.0)], ids=str)
def test_a_softmax_is_not_cut_off_on_powers_of_two(method):
    """Most probabilities are tiny and a few are all that counts: the largest stays within a quarter of itself."""
    histogram = Histogram()
    p = (randn(200, 64) * 3).softmax(-1)
    histogram.add(p)
    scale, zero_point = method.qparams(histogram.observation(), TensorScheme(4, grid="log2"))
    assert zero_point.tolist() == [0]
    assert float(p.max()) * 0.7 <= float(scale) <= float(p.max()) * 1.001


# ------------------------------------------------------------------------------------------------ ternary


def best_of_all_thresholds(row):
    """The least squared error of -s, 0, s over every set of largest magnitudes, each with the best s for it."""
    magnitude = np.sort(np.abs(row.astype(np.float64)))[::-1]
    candidates = []
    for count in range(1, len(magnitude) + 1):
        s = magnitude[:count].mean()
        error = ((magnitude[:count] - s) ** 2).sum() + (magnitude[count:] ** 2).sum()
        candidates.append((error, s))
    return min(candidates)


@pytest.mark.parametrize("shift", [False, True])
def test_twn_against_all_thresholds(shift):
    x = randn(7, 61) * torch.logspace(-3, 2, 7)[:, None] + (0.4 if shift else 0.0)
    x[1] = x[1].abs() ** 3  # skewed
    x[2, 5:] = 0
    scheme = SHIFTED if shift else TERNARY
    scale, zero_point = TWN().qparams(Observation.of_tensor(x, 0), scheme)
    errors = error_of(x, scale, zero_point, scheme)
    for row, s, z, error in zip(x.numpy(), scale, zero_point, errors, strict=True):
        mean = row.mean() if shift else 0.0
        least, best = best_of_all_thresholds(row - mean)
        assert float(s) == pytest.approx(best, rel=1e-5)
        assert float(error) == pytest.approx(least, rel=1e-4, abs=1e-10)  # rounding finds the very threshold
        assert float(-z * s) == pytest.approx(mean, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shift", [False, True])
def test_twn_with_the_papers_threshold(shift):
    """s = mean of the magnitudes above 0.7 times the mean magnitude (1605.04711, eq. 4 and 6)."""
    x = randn(3, 500) + (0.3 if shift else 0.0)
    scale, _ = TWN(0.7).qparams(Observation.of_tensor(x, 0), SHIFTED if shift else TERNARY)
    rows = x.numpy() - (x.numpy().mean(1, keepdims=True) if shift else 0)
    magnitude = np.abs(rows)
    above = magnitude > 0.7 * magnitude.mean(1, keepdims=True)
    np.testing.assert_allclose(scale, (magnitude * above).sum(1) / above.sum(1), rtol=1e-5)


def test_twn_leaves_other_grids_to_their_extremes():
    x = randn(3, 50)
    for scheme in (SIGNED, UNSIGNED, SEQ, FP4):
        found, want = (m.qparams(Observation.of_tensor(x, 0), scheme) for m in (TWN(), MinMax()))
        assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_a_shift_of_twn_belongs_to_the_scale_in_its_format():
    scheme = TensorScheme(grid="ternary", scale_format="e8m0")
    x = randn(4, 100) + 2
    scale, zero_point = TWN().qparams(Observation.of_tensor(x, 0), scheme)
    assert torch.equal(round_scale(scale, scheme), scale)
    np.testing.assert_allclose(-zero_point * scale, x.mean(1), rtol=1e-5)


# ------------------------------------------------------------------------------------------------ moving averages


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0, 1.0])
def test_moving_average_against_a_loop(momentum):
    batches = [randn(100, seed=s) * scale for s, scale in enumerate((1.0, 1.2, 40.0, 0.8, 1.1))]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low = momentum * low + (1 - momentum) * float(batch.min())
        high = momentum * high + (1 - momentum) * float(batch.max())
    for scheme in (SIGNED, UNSIGNED):
        want = choose_qparams(torch.tensor([low]), torch.tensor([high]), scheme)
        found = MovingAverage(momentum).qparams(seen(*batches), scheme)
        np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
        assert torch.equal(found[1], want[1])
    widest = float(MinMax().qparams(seen(*batches), UNSIGNED)[0])
    found = float(MovingAverage(momentum).qparams(seen(*batches), UNSIGNED)[0])
    assert found < 0.5 * widest  # one outlier moves it a little


def test_moving_average_of_a_weight_is_min_max():
    x = randn(3, 100)
    for mine, reference in zip(
        *(m.qparams(Observation.of_tensor(x, 0), UNSIGNED) for m in (MovingAverage(), MinMax())), strict=True
    ):
        assert torch.equal(mine, reference)
