"""RSQ: attention's probabilities against torch's own product, weighted moments against NumPy, GPTQ on both."""

import numpy as np
import pytest
import torch
from layer_problems import inputs
from test_block_ap import W2, dataset, teacher  # noqa: F401  (fixtures)
from tiny_language import kl
from torch import nn
from torch.nn import functional as F

import dfq
from dfq.algorithms._hessian import Moments
from dfq.algorithms._token_weights import token_weights
from dfq.blocks import Captures, find_blocks
from dfq.hooks import record_dataflow
from dfq.sites import attention_probabilities
from dfq.student import Student

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"enable_gqa": True, "is_causal": True},
        {"attn_mask": torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.2},
        {"attn_mask": torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(1))},
    ],
    ids=lambda s: ",".join(s),
)
def test_probabilities_give_the_attention_of_torch(settings):
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 8, generator=rng)
    key, value = torch.randn(2, 2, 2 if settings.get("enable_gqa") else 4, 7, 8, generator=rng)
    if "attn_mask" in settings and settings["attn_mask"].dtype == torch.bool:
        settings = {"attn_mask": settings["attn_mask"] | torch.eye(7, dtype=torch.bool)}
    found = attention_probabilities(query, key, **settings)
    values = value.repeat_interleave(2, 1) if settings.get("enable_gqa") else value
    wanted = F.scaled_dot_product_attention(query, key, value, **settings)
    torch.testing.assert_close(found @ values, wanted, rtol=1e-4, atol=1e-5)


def test_weighted_moments():
    x, float_x = inputs(num_columns=60), inputs(num_columns=60, seed=5)
    r2 = torch.rand(60, generator=torch.Generator().manual_seed(0)).double()
    moments = Moments()
    for part in (slice(0, 25), slice(25, 60)):
        moments.add(x[..., part], float_x[..., part], weights=r2[part])
    a, b, w = x[0].numpy(), float_x[0].numpy(), r2.numpy() / r2.numpy().sum()
    np.testing.assert_allclose(moments.hessian()[0].numpy(), 2 * (a * w) @ a.T, rtol=1e-9)
    np.testing.assert_allclose(moments.cross_hessian()[0].numpy(), 2 * (b * w) @ a.T, rtol=1e-9)
    np.testing.assert_allclose(moments.hessian(True)[0].numpy(), 2 * np.cov(a, aweights=w, bias=True), rtol=1e-8)
    np.testing.assert_allclose(moments.float_mean[0].numpy(), b @ w, rtol=1e-9)


def captured_block(teacher, ids, tmp_path):  # noqa: F811
    student = Student.from_teacher(teacher, W2)
    block = find_blocks(student.module, record_dataflow(student.module, teacher.example()), student.layers)[1]
    return Captures(student.module, teacher.module, ids, 4, tmp_path).of(block)


def test_tokens_count_what_attention_gives_them(teacher, dataset, tmp_path):  # noqa: F811
    ids = dataset.samples(6)
    found = token_weights(teacher.module, captured_block(teacher, ids, tmp_path), "attention", 0.05, 4)
    eager = transformers.LlamaForCausalLM._from_config(teacher.module.config, attn_implementation="eager")
    eager.load_state_dict(teacher.module.state_dict())
    with torch.no_grad():
        received = eager(ids, output_attentions=True).attentions[1].sum((1, 2)).numpy()
    low, high = received.min(1, keepdims=True), received.max(1, keepdims=True)
    wanted = (0.05 + 0.95 * (received - low) / (high - low)) ** 2
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-4)


def test_by_norm_and_where_there_is_nothing_to_weigh(teacher, dataset, tmp_path):  # noqa: F811
    ids = dataset.samples(6)
    block = captured_block(teacher, ids, tmp_path)
    size = block.float_inputs.norm(dim=-1).numpy()
    low, high = size.min(1, keepdims=True), size.max(1, keepdims=True)
    found = token_weights(teacher.module, block, "norm", 0.0, 4)
    np.testing.assert_allclose(found.numpy(), ((size - low) / (high - low)) ** 2, rtol=1e-3, atol=1e-6)
    assert token_weights(teacher.module, block, "none", 0.01, 4) is None
    block.float_inputs = torch.ones_like(block.float_inputs)
    assert (token_weights(teacher.module, block, "norm", 0.01, 4) == 1).all()
    block.float_inputs = torch.ones(2, 3, 4, 4)
    assert token_weights(teacher.module, block, "norm", 0.01, 4) is None


@pytest.mark.parametrize("kind", ["attention", "norm"])
def test_gptq_by_important_tokens(kind, teacher, dataset):  # noqa: F811
    nearest = dfq.quantize(teacher, dataset, W2, algorithm="round_to_nearest")
    plain = dfq.quantize(teacher, dataset, W2, algorithm="gptq")
    student = dfq.quantize(teacher, dataset, W2, algorithm="gptq", token_weights=kind, num_positions=12)
    assert kl(teacher, student) < 0.9 * kl(teacher, nearest)
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(plain.layers[name].weight, student.layers[name].weight)


def test_images_have_no_tokens(make_dataset):
    from conftest import as_teacher

    network = as_teacher(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)))
    data = make_dataset(network)
    students = [dfq.quantize(network, data, "w4a8", algorithm="gptq", token_weights=k) for k in ("none", "attention")]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(*(s.layers.values() for s in students), strict=True))


def test_wrong_settings():
    from dfq.settings import resolve

    with pytest.raises(dfq.UserError, match=r"got algorithm\.token_weights='size'; allowed: none \| attention \| norm"):
        resolve("algorithm", "gptq", token_weights="size")
