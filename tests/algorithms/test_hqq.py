"""HQQ against a loop over rows in plain NumPy."""

import numpy as np
import pytest
import torch

import dfq
from dfq.algorithms.hqq import HQQ
from dfq.errors import UserError
from dfq.quantization import choose_qparams
from dfq.scheme import TensorScheme
from dfq.settings import resolve


def plainly(rows, scales, zeros, low, high, symmetric, iterations=20, p=0.7, beta=10.0, growth=1.01):
    found = []
    for w, s, z in zip(rows, scales, zeros, strict=True):

        def codes(s, z, w=w):
            return np.clip(np.round(w / s + z), low, high)

        def error(s, z, w=w):
            return (np.abs(w - (codes(s, z) - z) * s) ** p).sum()

        best = (error(s, z), s, z)
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
            t, y, b = s * share, z, beta
            q = codes(t, y)
            for _ in range(iterations):
                x = w - (q - y) * t
                e = np.array([np.sign(v) * max(abs(v) - abs(v) ** (p - 1) / b, 0) if v else 0.0 for v in x])
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


@pytest.mark.parametrize("scheme", [TensorScheme(b, s) for b in (2, 3, 4) for s in (True, False)], ids=str)
def test_against_a_loop_over_rows(scheme):
    rows, scale, zero_point = problem(scheme)
    got_scale, got_zero = HQQ().fit(rows, scale, zero_point, scheme)
    arrays = (t.double().numpy() for t in (rows, scale, zero_point))
    errors, scales, zeros = plainly(*arrays, scheme.quant_min, scheme.quant_max, scheme.symmetric)
    np.testing.assert_allclose(got_scale.numpy(), scales, rtol=1e-6)
    np.testing.assert_array_equal(got_zero.numpy(), zeros)
    before = (rows - (torch.round(rows / scale[:, None] + zero_point[:, None]).clamp(scheme.quant_min, scheme.quant_max)
              - zero_point[:, None]) * scale[:, None]).abs().double().pow(0.7).sum(1).numpy()  # fmt: skip
    assert (errors <= before * (1 + 1e-4)).all() and errors.sum() < 0.97 * before.sum()


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
        found[algorithm] = float((layer.weight - own.weight).abs().pow(0.7).sum())
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
