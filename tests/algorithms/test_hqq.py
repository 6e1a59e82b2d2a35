"""HQQ against a loop over rows in plain NumPy."""

import numpy as np
import pytest
import torch

import dfq
from dfq.algorithms.hqq import HQQ
from dfq.errors import UserError
from dfq.quantization import choose_qparams, fake_quantize
from dfq.scheme import TensorScheme
from dfq.settings import resolve


def plainly(rows, scales, zeros, low, high, symmetric, iterations=20, p=0.7, beta=10.0, growth=1.01, norm=2.0):
    found = []
    for w, s, z in zip(rows, scales, zeros, strict=True):

        def codes(s, z, w=w):
            return np.clip(np.round(w / s + z), low, high)

        def error(s, z, w=w):
            return (np.abs(w - (codes(s, z) - z) * s) ** norm).sum()

        best = (error(s, z), s, z)
        for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5):
            t, y, b = s * share, z, beta
            q = codes(t, y)
            for _ in range(iterations):
                x = w / t - (q - y)
                e = t * np.array([np.sign(v) * max(abs(v) - abs(v) ** (p - 1) / b, 0) if v else 0.0 for v in x])
                if symmetric:
                    fitted = (q * (w - e)).sum() / max((q * q).sum(), 1)
                    t = fitted if fitted > 0 else t
                else:
                    y = np.mean(q - (w - e) / t)
                q = codes(t, y)
                stored = float(np.float32(t)), float(np.clip(np.round(y), low, high))
                if error(*stored) < best[0]:
                    best = (error(*stored), *stored)
                b *= growth
        found.append(best)
    return np.array(found).T


def problem(scheme, seed=0):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(12, 40, generator=rng)
    rows[:, 0] *= 6  # an outlier in each
    rows[3] = 0
    rows *= torch.logspace(-3, 1, 12)[:, None]
    return rows, *choose_qparams(rows.amin(1), rows.amax(1), scheme)


@pytest.mark.parametrize("norm", [0.7, 2.0])
@pytest.mark.parametrize("scheme", [TensorScheme(b, s) for b in (2, 3, 4) for s in (True, False)], ids=str)
def test_against_a_loop_over_rows(scheme, norm):
    rows, scale, zero_point = problem(scheme)
    got_scale, got_zero = HQQ(norm=norm).fit(rows, scale, zero_point, scheme)
    arrays = (t.double().numpy() for t in (rows, scale, zero_point))
    errors, scales, zeros = plainly(*arrays, scheme.quant_min, scheme.quant_max, scheme.symmetric, norm=norm)
    np.testing.assert_allclose(got_scale.numpy(), scales, rtol=1e-6)
    np.testing.assert_array_equal(got_zero.numpy(), zeros)
    before = (rows - (torch.round(rows / scale[:, None] + zero_point[:, None]).clamp(scheme.quant_min, scheme.quant_max)
              - zero_point[:, None]) * scale[:, None]).abs().double().pow(norm).sum(1).numpy()  # fmt: skip
    assert (errors <= before * (1 + 1e-4)).all() and errors.sum() < 0.98 * before.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_large_tensor_has_the_codes_of_a_small_one(bits):
    scheme = TensorScheme(bits, False)
    rows, scale, zero_point = problem(scheme)
    found, larger = HQQ().fit(rows, scale, zero_point, scheme), HQQ().fit(rows * 64, scale * 64, zero_point, scheme)
    assert torch.equal(larger[0], found[0] * 64) and torch.equal(larger[1], found[1])


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_without_outliers_are_no_worse_than_rounded_to_nearest(bits):
    # In groups of 32 normal weights the paper's norm as the judge cuts the largest off.
    scheme, rows = TensorScheme(bits, False), torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), scheme)

    def squared(scale, zero_point):
        return float((fake_quantize(rows, scale, zero_point, scheme, 0) - rows).square().mean())

    nearest = squared(scale, zero_point)
    assert squared(*HQQ().fit(rows, scale, zero_point, scheme)) < 0.95 * nearest
    by_its_own_norm = squared(*HQQ(norm=0.7).fit(rows, scale, zero_point, scheme))
    assert by_its_own_norm > (1.2 * nearest if bits == 4 else 0)


@pytest.mark.parametrize("name", ["w4a16_g128", "w2a16_g64"])
def test_rounding_hurts_less_in_groups(name, make_dataset, tmp_path):
    from conftest import as_teacher
    from torch import nn

    teacher = as_teacher(
        nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(128), nn.Linear(128, 128), nn.Linear(128, 10))
    )
    dataset, found = make_dataset(teacher), {}
    for algorithm in ("round_to_nearest", "hqq"):
        student = dfq.quantize(teacher, dataset, name, algorithm=algorithm, weight_quantizer="min_max")
        layer, own = student.layers["2"], teacher.module[2]
        found[algorithm] = float((layer.weight - own.weight).square().sum())
        assert layer.weight_quantizer.zero_point.dtype == torch.int32
    assert found["hqq"] < found["round_to_nearest"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"power": 2}, "got algorithm.power=2; allowed: a number from 0.1 to 1"),
        ({"growth": 0.5}, "got algorithm.growth=0.5; allowed: a number >= 1"),
        ({"beta": 0}, "got algorithm.beta=0; allowed: a number > 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError) as error:
        resolve("algorithm", "hqq", **settings)
    assert str(error.value) == message
