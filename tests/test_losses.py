"""Losses against NumPy."""

import numpy as np
import pytest
import torch

from dfq.losses.attention import attention_map_loss
from dfq.losses.balance import balanced_sum
from dfq.losses.batch_norm_statistics import batch_norm_distance, channel_statistics, moments
from dfq.losses.cosine_features import cosine_distance
from dfq.losses.dampening import dampening_loss
from dfq.losses.distillation import kl_divergence, relative_mse
from dfq.losses.feature_affinity import feature_affinity, num_positions, random_projection
from dfq.losses.grad_cam import class_activation_map, class_scores, grad_cam_loss
from dfq.losses.hard_labels import gated_cross_entropy
from dfq.losses.jensen_shannon import jensen_shannon
from dfq.losses.logits_mse import logits_mse
from dfq.losses.quantized_features import quantized_feature_loss
from dfq.losses.reverse_kl import reverse_kl
from dfq.losses.token_scaling import token_scales


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


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(6, 10), (3, 5, 7)])
def test_reverse_kl_and_jensen_shannon(temperature, shape):
    student, teacher = randn(*shape) * 3, randn(*shape, seed=1) * 3
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    want = kl(q, p).mean() * temperature**2
    assert float(reverse_kl(student, teacher, temperature)) == pytest.approx(want, rel=1e-9)
    assert float(reverse_kl(student, teacher)) == pytest.approx(float(kl_divergence(teacher, student)), rel=1e-9)
    for mix in (0.1, 0.5, 0.8):
        mixture = mix * p + (1 - mix) * q
        want = (mix * kl(p, mixture) + (1 - mix) * kl(q, mixture)).mean() * temperature**2
        assert float(jensen_shannon(student, teacher, mix, temperature)) == pytest.approx(want, rel=1e-9)
        assert float(jensen_shannon(student, student, mix)) == pytest.approx(0, abs=1e-12)


def test_jensen_shannon_is_bounded_symmetric_and_tends_to_both_kls():
    student, teacher = randn(6, 10) * 3, randn(6, 10, seed=1) * 3
    assert float(jensen_shannon(student, teacher)) == pytest.approx(float(jensen_shannon(teacher, student)), rel=1e-9)
    certain = torch.tensor([[1e4, 0.0], [0.0, 1e4]], dtype=torch.float64)
    assert float(jensen_shannon(certain, certain.flip(1))) == pytest.approx(np.log(2), rel=1e-6)
    for mix, limit in ((1e-6, kl_divergence(student, teacher)), (1 - 1e-6, reverse_kl(student, teacher))):
        assert float(jensen_shannon(student, teacher, mix)) / 1e-6 == pytest.approx(float(limit), rel=1e-2)


def test_logits_mse_does_not_see_what_a_softmax_does_not():
    student, teacher = randn(4, 7), randn(4, 7, seed=1)
    difference = (student - teacher).numpy()
    want = ((difference - difference.mean(-1, keepdims=True)) ** 2).mean()
    assert float(logits_mse(student, teacher)) == pytest.approx(want, rel=1e-9)
    shifted = student + randn(4, 1, seed=2) * 10
    assert float(logits_mse(shifted, teacher)) == pytest.approx(want, rel=1e-9)


def affinities(features):
    rows = features.numpy().reshape(*features.shape[:2], -1).transpose(0, 2, 1)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)
    return rows @ rows.transpose(0, 2, 1)


def test_feature_affinity():
    student, teacher = randn(3, 4, 5, 6), randn(3, 9, 5, 6, seed=1)  # of another width
    student[0, :, 0, 0] = 0  # a position without features
    want = ((affinities(student) - affinities(teacher)) ** 2).sum((1, 2)).mean() / 30**2
    assert float(feature_affinity(student, teacher)) == pytest.approx(want, rel=1e-9)
    assert float(feature_affinity(student * 7, student)) == pytest.approx(0, abs=1e-12)  # cosines
    tokens = student.flatten(2).mT, teacher.flatten(2).mT
    assert float(feature_affinity(*tokens)) == pytest.approx(want, rel=1e-9)
    assert num_positions(student) == num_positions(tokens[0]) == 30


def test_fast_feature_affinity_is_an_unbiased_estimate_with_less_spread_for_more_projections():
    student, teacher = randn(2, 4, 6, 6), randn(2, 8, 6, 6, seed=1)
    rng = torch.Generator().manual_seed(0)

    def estimates(size, count):
        draws = [random_projection(36, size, rng, student) for _ in range(count)]
        return np.array([float(feature_affinity(student, teacher, z)) for z in draws])

    exact = float(feature_affinity(student, teacher))
    few, many = estimates(1, 800), estimates(16, 200)
    assert few.mean() == pytest.approx(exact, abs=4 * few.std() / 800**0.5)
    assert many.mean() == pytest.approx(exact, abs=4 * many.std() / 200**0.5)
    assert many.std() < few.std() / 2.5 and few.std() > 0.1 * exact
    # No estimate where the exact one costs less.
    assert float(feature_affinity(student, teacher, random_projection(36, 36, rng, student))) == exact


def test_fast_feature_affinity_never_makes_the_matrix_of_all_pairs(monkeypatch):
    sizes = []
    product = torch.Tensor.__matmul__

    def counted(a, b):
        result = product(a, b)
        sizes.append(result.shape[-2] * result.shape[-1])
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    features = randn(2, 4, 16, 16)
    feature_affinity(features, features, random_projection(256, 8, torch.Generator().manual_seed(0), features))
    assert sizes and max(sizes) == 256 * 8


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_quantized_feature_loss(num_bits):
    student, teacher = randn(4, 3, 5, 5), randn(4, 3, 5, 5, seed=1)
    t = teacher.numpy()
    low, high = min(t.min(), 0), max(t.max(), 0)
    levels = 2**num_bits - 1
    scale = high / levels - low / levels
    zero = np.round(-low / scale)
    target = (np.clip(np.round(t / scale) + zero, 0, levels) - zero) * scale
    want = ((student.numpy() - target) ** 2).sum() / (t**2).sum()
    assert float(quantized_feature_loss(student, teacher, num_bits)) == pytest.approx(want, rel=1e-6)
    on_grid = torch.from_numpy(target)
    assert float(quantized_feature_loss(on_grid, teacher, num_bits)) == pytest.approx(0, abs=1e-9)


class Head(torch.nn.Module):
    """A feature map, pooled, with a linear layer: what class activation maps have a closed form for."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 6).double()

    def forward(self, features):
        return self.linear(features.mean((2, 3)))


def test_class_activation_map_of_a_linear_head():
    """d y_c / d A_k is w_ck / (H W) at every position."""
    head, features = Head(), randn(3, 4, 2, 5).requires_grad_()
    classes = torch.tensor([0, 5, 2])
    (gradient,) = torch.autograd.grad(class_scores(head(features), classes), features)
    got = class_activation_map(features, gradient)
    weights = head.linear.weight.detach().numpy()[classes] / 10
    want = np.maximum(np.einsum("nk,nkhw->nhw", weights, features.detach().numpy()), 0)
    np.testing.assert_allclose(got.detach(), want, atol=1e-12)
    other = randn(3, 2, 5, seed=4).relu()
    want = ((want - other.numpy()) ** 2).sum() / (other.numpy() ** 2).sum()
    assert float(grad_cam_loss(got.detach(), other)) == pytest.approx(want, rel=1e-9)
    assert float(grad_cam_loss(other, other)) == 0


def test_the_gate_of_hard_labels():
    teacher = torch.tensor([[3.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 9.0]], dtype=torch.float64)
    student = randn(3, 3).requires_grad_()
    difficulty = 1 - softmax(teacher.numpy()).max(-1)
    loss = gated_cross_entropy(student, teacher, 0.3)
    assert (difficulty <= 0.3).tolist() == [True, False, True]
    q = softmax(student.detach().numpy())
    assert float(loss.detach()) == pytest.approx(-(np.log(q[0, 0]) + np.log(q[2, 2])) / 3, rel=1e-9)
    loss.backward()
    assert float(student.grad[1].abs().max()) == 0 < float(student.grad[0].abs().max())
    assert float(gated_cross_entropy(student.detach(), teacher, 0.0)) == 0
    all_of_them = gated_cross_entropy(student, teacher, 1.0)
    assert float(all_of_them.detach()) == pytest.approx(-np.log(q[[0, 1, 2], [0, 0, 2]]).mean(), rel=1e-9)


def test_the_learned_balance():
    losses, weights = [torch.tensor(4.0), torch.tensor(0.01)], [1.0, 3.0]
    assert float(balanced_sum(losses, weights)) == pytest.approx(4.03)
    scales = torch.zeros(2, requires_grad=True)
    assert float(balanced_sum(losses, weights, scales)) == pytest.approx(4.03)  # the start is the fixed balance
    for _ in range(400):
        (gradient,) = torch.autograd.grad(balanced_sum(losses, weights, scales), scales)
        scales.data.sub_(0.1 * gradient)
    np.testing.assert_allclose(scales.detach(), np.log([4.0, 0.01]), atol=1e-3)  # each counts relative to its size
    one = torch.tensor(4.0, requires_grad=True)
    balanced_sum([one, losses[1]], weights, scales.detach()).backward()
    assert float(one.grad) == pytest.approx(1 / 4, rel=1e-3)  # the gradient of log L


def test_dampening_pulls_to_the_level_and_leaves_clipped_weights_alone():
    weight = torch.tensor([[0.3, -0.74, 5.0, 1.0]], dtype=torch.float64, requires_grad=True)
    scale, low, high = (torch.tensor([[v]], dtype=torch.float64) for v in (0.5, -1.0, 1.5))
    rounded = (weight / scale).round().clamp(-2, 3) * scale
    loss = dampening_loss(weight, rounded, scale, low, high)
    want = (((0.3 - 0.5) / 0.5) ** 2 + ((-0.74 + 0.5) / 0.5) ** 2) / 4
    assert float(loss.detach()) == pytest.approx(want, rel=1e-9)
    loss.backward()
    np.testing.assert_allclose(weight.grad[0, :2], [-0.4, -0.48])
    assert weight.grad[0, 2] == weight.grad[0, 3] == 0


GRADIENTS = {
    "kl": lambda s, t: kl_divergence(s, t, 2.0),
    "reverse_kl": lambda s, t: reverse_kl(s, t, 2.0),
    "jensen_shannon": lambda s, t: jensen_shannon(s, t, 0.3, 2.0),
    "logits": logits_mse,
    "label": lambda s, t: gated_cross_entropy(s, t, 0.8),
    "relative_mse": relative_mse,
    "affinity": lambda s, t: feature_affinity(s.view(1, 4, 5), t.view(1, 4, 5)),
    "qfd": lambda s, t: quantized_feature_loss(s, t, 4),
    "cam": lambda s, t: grad_cam_loss(s, t),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_the_student_against_finite_differences(name):
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1) * 2
    assert torch.autograd.gradcheck(lambda s: GRADIENTS[name](s, teacher), student)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6), (5, 4, 3, 2), (1, 4, 3, 3)])
def test_channel_statistics(shape):
    x = randn(*shape)
    mean, variance = channel_statistics(x)
    others = tuple(d for d in range(len(shape)) if d != 1)
    np.testing.assert_allclose(mean, x.numpy().mean(others), atol=1e-12)
    np.testing.assert_allclose(variance, x.numpy().var(others), atol=1e-12)


@pytest.mark.parametrize("dims", [(0, 2, 3), (2, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_and_their_gradient(dims, layout):
    """Those of torch.var_mean, for means a hundred deviations away too; the gradient keeps the layout."""
    x = (randn(3, 4, 5, 6) + 100).to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moments(x, dims), x)
    weights = [randn(*mean.shape, seed=2) for mean in moments(x, dims)]
    found, wanted = (
        torch.autograd.grad(sum((part * w).sum() for part, w in zip(both, weights, strict=True)), x)[0]
        for both in (moments(x, dims), torch.var_mean(x, dims, correction=0)[::-1])
    )
    torch.testing.assert_close(found, wanted)
    assert found.stride() == x.stride()
    single = x.detach().float()
    _, variance = moments(single, dims)
    np.testing.assert_allclose(variance, single.double().numpy().var(dims), rtol=1e-5)


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


def test_cosine_distance_of_tokens_and_of_maps():
    student, teacher = randn(3, 5, 8), randn(3, 5, 8, seed=1)
    a, b = student.numpy(), teacher.numpy()
    cosine = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    assert float(cosine_distance(student, teacher)) == pytest.approx((1 - cosine).mean(), rel=1e-9)
    scales = torch.rand(3, 5, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    assert float(cosine_distance(student, student * scales)) == pytest.approx(0, abs=1e-9), "a length does not count"
    maps = student.movedim(-1, 1)[..., None], teacher.movedim(-1, 1)[..., None]  # [N, C, T, 1]
    assert float(cosine_distance(*maps)) == pytest.approx((1 - cosine).mean(), rel=1e-9)


def test_attention_map_loss_with_a_mask():
    mask = np.tril(np.ones((6, 6)))
    student, teacher = (softmax(randn(2, 3, 6, 6, seed=i).numpy() + np.log(mask + 1e-300)) for i in (0, 1))
    student, teacher = student * mask, teacher * mask
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.where(teacher > 0, teacher * np.log(teacher / student), 0).sum(-1).mean()
    got = attention_map_loss(torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher))
    assert float(got.detach()) == pytest.approx(want, rel=1e-9)
    got.backward()


@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_token_scales(tau):
    """Softmax over the tokens of a text that have a successor, times how many those are."""
    nll = randn(2, 5).abs() * 4
    counts = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
    got = token_scales(nll, counts, tau)
    for row, count, mine in zip(nll.numpy(), (4, 2), got.numpy(), strict=True):
        want = np.zeros(5)
        want[:count] = count * softmax(row[:count] / tau)
        np.testing.assert_allclose(mine, want, rtol=1e-9)
