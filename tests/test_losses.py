"""Losses against NumPy."""

import numpy as np
import pytest
import torch

from dfq.losses.batch_norm_statistics import batch_norm_distance, channel_statistics
from dfq.losses.distillation import kl_divergence, relative_mse


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(6, 10), (1, 2), (3, 5, 7)])
def test_kl_divergence(temperature, shape):
    student, teacher = randn(*shape) * 3, randn(*shape, seed=1) * 3
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    want = (p * (np.log(p) - np.log(q))).sum(-1).mean() * temperature**2
    assert float(kl_divergence(student, teacher, temperature)) == pytest.approx(want, rel=1e-9)
    assert float(kl_divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_kl_divergence_of_certain_outputs_is_finite_and_pulls_the_student():
    teacher = torch.tensor([[1000.0, 0.0]])
    student = torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = kl_divergence(student, teacher)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(1 + np.e), rel=1e-5)
    assert student.grad[0, 0] < 0 < student.grad[0, 1]


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_relative_mse(factor):
    student, teacher = randn(4, 3, 2) * factor, randn(4, 3, 2, seed=1) * factor
    want = ((student - teacher).numpy() ** 2).sum() / (teacher.numpy() ** 2).sum()
    assert float(relative_mse(student, teacher)) == pytest.approx(want, rel=1e-9)
    assert torch.isfinite(relative_mse(student, torch.zeros_like(teacher)))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6), (5, 4, 3, 2), (1, 4, 3, 3)])
def test_channel_statistics(shape):
    x = randn(*shape)
    mean, variance = channel_statistics(x)
    others = tuple(d for d in range(len(shape)) if d != 1)
    np.testing.assert_allclose(mean, x.numpy().mean(others), atol=1e-12)
    np.testing.assert_allclose(variance, x.numpy().var(others), atol=1e-12)


def test_batch_norm_distance():
    mean, variance, running_mean = randn(6), randn(6, seed=1).abs() + 0.1, randn(6, seed=2)
    running_var = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.0], dtype=torch.float64)  # the last was constant in training
    eps = 1e-3
    m, v, rm, rv = (t.numpy() for t in (mean, variance, running_mean, running_var))
    unit = np.sqrt(np.maximum(rv + eps, eps + 0.01 * rv.mean()))
    want = ((m - rm) / unit) ** 2 + ((np.sqrt(v + eps) - np.sqrt(rv + eps)) / unit) ** 2
    np.testing.assert_allclose(batch_norm_distance(mean, variance, running_mean, running_var, eps), want, rtol=1e-12)
    np.testing.assert_allclose(
        want[:5], ((m - rm) ** 2 / (rv + eps) + (np.sqrt((v + eps) / (rv + eps)) - 1) ** 2)[:5]
    )  # the docstring's formula
    assert float(batch_norm_distance(running_mean, running_var, running_mean, running_var).abs().max()) == 0


def test_the_gradient_of_constant_images_is_finite():
    x = torch.zeros(4, 3, 2, 2, requires_grad=True)
    batch_norm_distance(*channel_statistics(x), torch.ones(3), torch.zeros(3)).sum().backward()
    assert torch.isfinite(x.grad).all()
