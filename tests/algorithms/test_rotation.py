"""Rotation of the residual stream: the function stays, large channels go, other networks are told why not."""

import pytest
import torch
from conftest import language
from tiny_language import random_teacher, transformers
from torch import nn

import dfq
from dfq.algorithms.rotation import orthogonal, rotate
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student

TEXT = {"vocab_size": 48, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
UNTIED = {**GROUPED, "tie_word_embeddings": False}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**UNTIED),
    "qwen3": lambda: transformers.Qwen3Config(**UNTIED),
    "gemma": lambda: transformers.GemmaConfig(**UNTIED),
    "tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "phi": lambda: transformers.PhiConfig(**TEXT),
    "mixtral": lambda: transformers.MixtralConfig(**UNTIED, num_local_experts=4),
}
W4A4 = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4, True, "per_token"))


def teacher_of(name, seed=0):
    return random_teacher(CONFIGS[name](), seed)


@pytest.mark.parametrize("width", [1, 7, 16, 48, 160])
def test_orthogonal(width):
    turn = orthogonal(width, torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn @ turn.mT, torch.eye(width, dtype=torch.float64))
    if width == 16:
        assert (turn.abs() == 0.25).all(), "Hadamard"
    assert width == 1 or not torch.equal(turn, orthogonal(width, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "tied"])
def test_the_function_is_unchanged(name):
    teacher, other = teacher_of(name), teacher_of(name)
    rotate(other.module, teacher, torch.Generator().manual_seed(0))
    ids = torch.randint(48, (4, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, got = teacher(ids).logits, other(ids).logits
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))
    before, after = (dict(t.module.named_parameters())["model.embed_tokens.weight"] for t in (teacher, other))
    assert not torch.allclose(before, after) and torch.allclose(before.norm(dim=1), after.norm(dim=1), rtol=1e-4)


def test_channels_with_large_values_hurt_less(tmp_path):
    teacher = teacher_of("llama")
    with torch.no_grad():  # one channel of the stream holds nearly all there is
        teacher.module.model.embed_tokens.weight[:, 5] *= 40
    ids = torch.randint(48, (40, 12), generator=torch.Generator().manual_seed(1))
    dataset = SyntheticDataset.create(tmp_path / "d", {"seed": 0}, {"pixels": False, "labels": False})
    dataset.write_shard(0, {"input_ids": ids}, 0.0)
    errors = {}
    for name, algorithm in (("nearest", "round_to_nearest"), ("rotation", "rotation")):
        student = dfq.quantize(teacher, dataset, W4A4, algorithm=algorithm, student_dir=tmp_path / name)
        with torch.no_grad():
            errors[name] = float((student(ids).logits - teacher(ids).logits).square().mean())
            again = dfq.load_student(tmp_path / name, teacher)
            assert torch.equal(again(ids).logits, student(ids).logits)
    assert errors["rotation"] < 0.5 * errors["nearest"]
    figures = dfq.evaluate(teacher, student, dataset=dataset)["fidelity"]
    assert all(layer["sqnr_db"] is None for layer in figures["layers"]), "outputs in other coordinates"
    steps = dfq.quantize(teacher, dataset, W4A4, algorithm="sequence", steps=["rotation", "gptq"])
    with torch.no_grad():
        assert float((steps(ids).logits - teacher(ids).logits).square().mean()) < errors["rotation"]


@pytest.mark.parametrize(
    "name, why",
    [
        ("phi", "in which no layer reads from a norm"),
        ("mixtral", "whose function changes when its residual stream is turned"),  # experts in one piece
    ],
)
def test_networks_that_cannot_be_turned(name, why):
    teacher = teacher_of(name)
    with pytest.raises(UserError) as error:
        rotate(teacher_of(name).module, teacher, torch.Generator())
    assert str(error.value).startswith(f"got algorithm=rotation and {teacher.name}, {why}; allowed: decoders with")


def test_experts_that_were_taken_apart_are_turned_with_their_router():
    teacher = teacher_of("mixtral")
    student = Student.from_teacher(teacher, W4A4)
    ids = torch.randint(48, (4, 12), generator=torch.Generator().manual_seed(5))
    assert rotate(student.module, teacher, torch.Generator().manual_seed(0)) == []
    with torch.no_grad():
        wanted, got = teacher(ids).logits, student(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))
    gates = [dict(net.module.named_parameters())["model.layers.0.mlp.gate.weight"] for net in (teacher, student)]
    assert not torch.allclose(*gates)


def test_a_tied_head_gets_a_weight_of_its_own_and_keeps_it(tmp_path):
    teacher = teacher_of("tied")
    ids = torch.randint(48, (24, 12), generator=torch.Generator().manual_seed(1))
    dataset = SyntheticDataset.create(tmp_path / "d", {"seed": 0}, {"pixels": False, "labels": False})
    dataset.write_shard(0, {"input_ids": ids}, 0.0)
    scheme = Scheme(TensorScheme(4, True, "per_channel"), FLOAT)
    student = dfq.quantize(teacher, dataset, scheme, algorithm="rotation", student_dir=tmp_path / "s")
    assert ("lm_head", "untied") in student.surgery.rewrites
    assert student.module.lm_head.weight is not student.module.model.embed_tokens.weight
    again = dfq.load_student(tmp_path / "s", teacher)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)
    pytest.importorskip("compressed_tensors")
    found = dfq.export(student, tmp_path / "a/model.safetensors", "compressed_tensors", teacher, dataset)
    assert found["parity"]["max_abs_error"] == 0.0


def test_networks_without_norms():
    with pytest.raises(UserError, match="in which no layer reads from a norm"):
        rotate(language().module, language(), torch.Generator())
    assert isinstance(language().module.head, nn.Linear)


def distillation_of(student, teacher, **settings):
    """The module that trains ``student``, and a batch that it has looked at with all terms."""
    from dfq.algorithms.distillation import Distillation
    from dfq.lightning.tokens import TokenDistillationModule
    from dfq.modules import stage_ends
    from dfq.tasks._task import task_of

    places = {name: name for name in stage_ends(teacher.dataflow)}
    student.module.requires_grad_(True)
    module = TokenDistillationModule(student, teacher, task_of(teacher), places, Distillation(**settings))
    loss = module._token_loss({"input_ids": teacher.example(4)}, "forward", training=True)
    return module, float(loss.detach())


def test_distillation_behind_a_rotation_compares_no_features():
    """Those of a float student are the teacher's in other coordinates: nothing to pull it away from."""
    teacher = teacher_of("llama")
    student = Student.from_teacher(teacher, W4A4)
    rotate(student.module, teacher, torch.Generator().manual_seed(0))
    student.surgery.rotated = True
    module, loss = distillation_of(student, teacher)
    assert module.terms == {"kl": 1.0} and loss < 1e-5
    with pytest.raises(UserError) as error:
        distillation_of(student, teacher, feature_weight=0.5)
    assert str(error.value) == (
        "got algorithm.feature_weight=0.5 and a student whose residual stream was rotated; "
        "allowed: algorithm.feature_weight=0; features of such a student are the teacher's in other coordinates"
    )
    with pytest.raises(UserError, match="intervention=0"):
        distillation_of(student, teacher, intervention=0.3)


def test_features_in_the_units_that_awq_gave_them(tmp_path):
    """A float student whose values were scaled has no error; positions, the same for every text, are no feature."""
    from dfq.algorithms.awq import scale_inputs
    from dfq.settings import resolve

    teacher = teacher_of("llama")
    student = Student.from_teacher(teacher, W4A4)
    ids = teacher.input_spec.example(16, torch.Generator().manual_seed(3))
    scale_inputs(student, teacher.example(), ids, resolve("quantizer", "min_max"), 20)
    module, _ = distillation_of(student, teacher, feature_weight=1.0)
    assert not any("rotary" in name for name in module.features)
    assert any(name in student.surgery.rescaled for name in module.features), list(module.features)
    for seen in module._seen:
        assert float(module._feature_loss(*seen)) < 1e-6, seen[0]
