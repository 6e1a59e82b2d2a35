"""AWQ: the float function stays, scales are those of the formula, channels with large values hurt less."""

import numpy as np
import pytest
import torch
from conftest import as_teacher
from tiny_language import TEXT, random_teacher, transformers
from torch import nn

import dfq
from dfq.algorithms._inputs import in_float, input_squares
from dfq.algorithms._paths import (
    without_surprises,
)
from dfq.algorithms.awq import _best_scale, gated, readers_of_norms, scale_inputs
from dfq.channels import (
    FloatNetwork,
)
from dfq.dataset import SyntheticDataset
from dfq.hooks import record_dataflow
from dfq.quantizers.min_max import MinMax
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student

GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED),
    "phi": lambda: transformers.PhiConfig(**TEXT),
    "gated_norms": lambda: transformers.Qwen3NextConfig(
        **GROUPED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
}  # fmt: skip
W3 = Scheme(TensorScheme(3, False, "per_group", 16), FLOAT)


def teacher_of(name, seed=0):
    return random_teacher(CONFIGS[name](), seed)


def text(rows=40, seed=1):
    return torch.randint(48, (rows, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def dataset(tmp_path):
    made = SyntheticDataset.create(tmp_path / "d", {"seed": 0}, {"pixels": False, "labels": False})
    made.write_shard(0, {"input_ids": text()}, 0.0)
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_the_function_is_unchanged(name):
    teacher = teacher_of(name)
    student = Student.from_teacher(teacher, W3)
    before = {key: layer.weight.detach().clone() for key, layer in student.layers.items()}
    found = scale_inputs(student, teacher.example(), text(), MinMax(), 10)
    with torch.no_grad():
        wanted, got = teacher(text(seed=5)).logits, student(text(seed=5)).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))
    moved = {key for key, weight in before.items() if not torch.equal(weight, student.layers[key].weight)}
    assert found and moved
    if name != "phi":  # whose MLP is not gated, so that nothing passes factors on
        assert any("q_proj" in key for key in moved) and any("down_proj" in key for key in moved)


def test_readers_of_norms():
    teacher = teacher_of("llama")
    found = readers_of_norms(teacher.module, record_dataflow(teacher.module, teacher.example()))
    layer = "model.layers.1."
    assert found[f"{layer}input_layernorm"] == [f"{layer}self_attn.{name}_proj" for name in "qkv"]
    assert found[f"{layer}post_attention_layernorm"] == [f"{layer}mlp.{name}_proj" for name in ("gate", "up")]
    assert "model.norm" not in found, "the head has the embedding's weight"


def test_pairs_around_a_gate():
    teacher = teacher_of("llama")
    network = FloatNetwork(teacher.module, record_dataflow(teacher.module, teacher.example()), teacher.example(), {})
    layers = {name: part for name, part in teacher.module.named_modules() if name.endswith("_proj")}
    pairs = [(path.first, path.last) for path in gated(network, layers)]
    assert pairs == [(f"model.layers.{i}.mlp.up_proj", f"model.layers.{i}.mlp.down_proj") for i in (0, 1)]
    assert len(without_surprises(network, gated(network, layers))) == 2


def test_a_scale_is_the_best_of_the_paper_s():
    teacher = teacher_of("llama")
    student = Student.from_teacher(teacher, W3)
    squares = input_squares(student, text())
    name = "model.layers.0.mlp.down_proj"
    found = _best_scale(student, [name], squares, MinMax(), 10)
    weight, x2 = student.layers[name].weight.detach().double().numpy(), squares[name].double().numpy()
    errors, scales = [], []
    for alpha in np.arange(11) / 10:
        s = np.sqrt(x2) ** alpha
        s = s / np.sqrt(s.max() * s.min())
        rows = (weight * s).astype(np.float32).reshape(-1, 16)
        low, high = np.minimum(rows.min(1), 0)[:, None], np.maximum(rows.max(1), 0)[:, None]
        step = (high - low) / 7
        zero = np.clip(np.round(-low / step), 0, 7)
        rounded = ((np.clip(np.round(rows / step) + zero, 0, 7) - zero) * step).reshape(weight.shape) / s
        errors.append((x2 * (weight - rounded) ** 2).sum())
        scales.append(s)
    assert errors[0] > min(errors)
    np.testing.assert_allclose(found.numpy(), scales[int(np.argmin(errors))], rtol=1e-4)


def test_channels_with_large_values_hurt_less(dataset, tmp_path):
    teacher = teacher_of("qwen3")
    with torch.no_grad():
        for norm in (part for name, part in teacher.module.named_modules() if name.endswith("layernorm")):
            norm.weight[::8] *= 20
    errors = {}
    for name in ("round_to_nearest", "awq"):
        student = dfq.quantize(teacher, dataset, W3, algorithm=name, student_dir=tmp_path / name)
        with torch.no_grad():
            errors[name] = float((student(text(seed=5)).logits - teacher(text(seed=5)).logits).square().mean())
            again = dfq.load_student(tmp_path / name, teacher)
            assert torch.equal(again(text()).logits, student(text()).logits)
    assert errors["awq"] < 0.9 * errors["round_to_nearest"]
    student = dfq.quantize(teacher, dataset, W3, algorithm="sequence", steps=["awq", "gptq"])
    with torch.no_grad():
        assert float((student(text(seed=5)).logits - teacher(text(seed=5)).logits).square().mean()) < errors["awq"]


def test_layers_of_other_networks_and_wrong_order(make_dataset, dataset):
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.LayerNorm(24), nn.Linear(24, 10))
    with torch.no_grad():
        network[3].weight.uniform_(0.5, 8, generator=torch.Generator().manual_seed(0))
    teacher = as_teacher(network)
    student = Student.from_teacher(teacher, Scheme(TensorScheme(3, True, "per_channel"), FLOAT))
    images = make_dataset(teacher).samples()
    assert scale_inputs(student, teacher.example(), images, MinMax(), 10) >= 1
    with torch.no_grad(), in_float(student):
        torch.testing.assert_close(student(images), teacher(images), rtol=1e-3, atol=1e-4)
    with pytest.raises(
        dfq.UserError, match="got algorithm=awq behind an algorithm that has given the student its grids"
    ):
        dfq.quantize(teacher_of("llama"), dataset, W3, algorithm="sequence", steps=["hqq", "awq"])
