"""Ranges against brute force in NumPy, from the tensor itself and from a histogram."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dfq.errors import UserError
from dfq.modules import Quantizer
from dfq.quantization import choose_qparams
from dfq.quantizers._observation import Histogram, Observation
from dfq.quantizers.lsq import LSQ, learn_step
from dfq.quantizers.min_max import MinMax
from dfq.quantizers.mse import MSE
from dfq.quantizers.percentile import Percentile
from dfq.scheme import TensorScheme

SIGNED, UNSIGNED = TensorScheme(4, True), TensorScheme(4, False)
METHODS = [MinMax(), Percentile(), Percentile(99.0), MSE(), MSE(2.4, 20), LSQ()]


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
    quantizer = Quantizer(SIGNED, num_channels=3, axis=0)
    quantizer.set_qparams(torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int32))
    x = randn(3, 50)
    before = quantizer(x)
    scale = learn_step(quantizer, 50)
    assert dict(quantizer.named_parameters()).keys() == {"scale"} and "scale" not in dict(quantizer.named_buffers())
    assert torch.equal(quantizer(x), before)
    quantizer(x).sum().backward()
    v = x.numpy() / scale.detach().numpy()[:, None]
    inside = (v >= -8) & (v <= 7)
    slope = np.where(inside, np.rint(v) - v, np.where(v < 0, -8, 7)).sum(1)
    np.testing.assert_allclose(scale.grad, slope / np.sqrt(50 * 7), rtol=1e-3, atol=1e-4)
