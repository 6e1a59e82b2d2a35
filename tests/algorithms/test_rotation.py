"""Rotation of the residual stream: the function stays, large channels go, other networks are told why not."""

import numpy as np
import pytest
import torch
from conftest import language
from tiny_language import random_teacher, transformers
from torch import nn

import dfq
from dfq.algorithms import rotation
from dfq.algorithms.rotation import Heads, Rotation, cayley, drawn_errors, orthogonal, rotate
from dfq.calibration import enable
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.modules import Quantizer
from dfq.quantizers.min_max import MinMax
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve
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
    turns = rotate(other.module, teacher, torch.Generator().manual_seed(0))
    attentions = [f"model.layers.{i}.self_attn" for i in range(2)]
    assert turns.heads == [Heads(f"{a}.v_proj", f"{a}.o_proj", teacher.module.config.head_dim) for a in attentions]
    ids = torch.randint(48, (4, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, got = teacher(ids).logits, other(ids).logits
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))
    before, after = (dict(t.module.named_parameters())["model.embed_tokens.weight"] for t in (teacher, other))
    assert not torch.allclose(before, after) and torch.allclose(before.norm(dim=1), after.norm(dim=1), rtol=1e-4)


def test_norms_of_heads_are_not_the_streams():
    """Behind linear attention: a norm of each head with a gate; the layer that reads it writes into the stream."""
    config = transformers.Qwen3NextConfig(
        **UNTIED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    teacher = random_teacher(config)
    other = Student.from_teacher(teacher, W4A4)  # experts are layers there
    turns = rotate(other.module, teacher, torch.Generator().manual_seed(0))
    assert "model.layers.0.linear_attn.out_proj" in turns.writers
    ids = teacher.example(4)
    with torch.no_grad():
        wanted, got = teacher(ids).logits, other(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_values_are_turned_within_their_heads(name):
    """Each head of values by the same matrix, and what reads its mixtures by its inverse: by hand."""
    teacher, stream, both = teacher_of(name), teacher_of(name), teacher_of(name)
    for other, heads in ((stream, False), (both, True)):
        turns = rotate(other.module, teacher, torch.Generator().manual_seed(0), heads)
        assert bool(turns.heads) == heads
    before, after = (dict(t.module.named_parameters()) for t in (stream, both))
    for part in turns.heads:
        v, turned = (state[f"{part.value}.weight"].double() for state in (before, after))
        turn = torch.linalg.lstsq(v[: part.size].mT, turned[: part.size].mT).solution
        torch.testing.assert_close(turn @ turn.mT, torch.eye(part.size).double(), rtol=1e-4, atol=1e-4)
        for i in range(0, len(v), part.size):
            torch.testing.assert_close(turned[i : i + part.size], turn.mT @ v[i : i + part.size], rtol=1e-4, atol=1e-5)
        o, turned = (state[f"{part.output}.weight"].double() for state in (before, after))
        for i in range(0, o.shape[1], part.size):
            torch.testing.assert_close(
                turned[:, i : i + part.size], o[:, i : i + part.size] @ turn, rtol=1e-4, atol=1e-5
            )


def test_heads_of_an_attention_that_is_no_single_operation_stay():
    teacher, other = teacher_of("llama"), teacher_of("llama")
    teacher.module.set_attn_implementation("eager")
    assert rotate(other.module, teacher, torch.Generator().manual_seed(0)).heads == []


def texts(path, rows=40):
    ids = torch.randint(48, (rows, 12), generator=torch.Generator().manual_seed(1))
    dataset = SyntheticDataset.create(path, {"seed": 0}, {"pixels": False, "labels": False})
    dataset.write_shard(0, {"input_ids": ids}, 0.0)
    return dataset


def test_values_with_a_large_channel_hurt_a_rounded_cache_less(tmp_path):
    teacher, dataset = teacher_of("llama"), texts(tmp_path / "d")
    with torch.no_grad():
        for layer in teacher.module.model.layers:
            layer.self_attn.v_proj.weight.view(2, 8, -1)[:, 3] *= 30
            layer.self_attn.o_proj.weight.view(-1, 4, 8)[..., 3] /= 30
    key = TensorScheme(8, False, "per_channel", 4, dynamic=True)
    weight = TensorScheme(8, True, "per_channel")
    scheme = Scheme(weight, FLOAT, key_value=TensorScheme(4, False, "per_token"), key=key)
    ids, errors = teacher.example(8), {}
    for heads in (False, True):
        student = dfq.quantize(teacher, dataset, scheme, algorithm="rotation", heads=heads)
        with torch.no_grad():
            errors[heads] = float((student(ids).logits - teacher(ids).logits).square().mean())
    assert errors[True] < 0.75 * errors[False]  # of a head's 8 values: a range of 2 / sqrt(8) instead of 1, squared


def test_cayley():
    angles = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = cayley(angles)
    skew = (angles - angles.mT).numpy() / 2
    np.testing.assert_allclose(turn.numpy(), np.linalg.inv(np.eye(6) + skew) @ (np.eye(6) - skew), atol=1e-12)
    np.testing.assert_allclose(turn @ turn.mT, np.eye(6), atol=1e-12)
    assert torch.equal(cayley(torch.zeros(3, 3)), torch.eye(3))


def test_drawn_errors_are_as_large_as_those_of_rounding_and_have_a_gradient():
    """sum of (x_hat - x)^2 near steps^2 / 12, and d steps / d x is where the range ends."""
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for scheme in (TensorScheme(4, True, "per_token"), TensorScheme(4, False, "per_token")):
        quantizer = Quantizer(scheme)
        quantizer.enabled = True
        rounded = quantizer(x).detach()
        with drawn_errors(quantizer, torch.Generator().manual_seed(1)):
            drawn = quantizer(x)
        assert torch.equal(quantizer(x), rounded), "it rounds again"
        errors = [float((y.detach() - x.detach()).square().mean()) for y in (rounded, drawn)]
        assert errors[1] == pytest.approx(errors[0], rel=0.1)
        (gradient,) = torch.autograd.grad((drawn - x).square().sum(), x)
        moved = gradient != 0
        ends = x.abs() == x.abs().amax(1, True) if scheme.symmetric else (x == x.amax(1, True)) | (x == x.amin(1, True))
        assert torch.equal(moved, ends)


STATIC = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4, False))


@pytest.mark.parametrize("scheme", [W4A4, STATIC], ids=["per_token", "static"])
def test_trained_rotations(scheme, tmp_path):
    """Held-out samples' divergence falls, and the float function is the one of before."""
    teacher, dataset = teacher_of("llama", 1), texts(tmp_path / "d", 400)
    with torch.no_grad():  # what all tokens have in common is large: how it lies among the channels matters
        shared = torch.randn(48, generator=torch.Generator().manual_seed(7))
        teacher.module.model.embed_tokens.weight.add_(3 * teacher.module.model.embed_tokens.weight.std() * shared)
    settings = {"algorithm": "rotation", "refresh": 10}
    held_out, losses = dataset.without_padding(dataset.split()[1]), {}
    for steps in (0, 80):
        student = dfq.quantize(teacher, dataset, scheme, **settings, iterations=steps)
        with torch.no_grad():
            p, q = (net(held_out).logits.log_softmax(-1) for net in (teacher, student))
        losses[steps] = float((p.exp() * (p - q)).sum(-1).mean())
    assert losses[80] < 0.9 * losses[0]
    # In float, of weights that are not on a grid yet.
    fresh = Student.from_teacher(teacher, scheme)
    turn(fresh, teacher, dataset, tmp_path / "w", iterations=40, refresh=10)
    enable(fresh, False)
    with torch.no_grad():
        wanted, got = teacher(held_out).logits, fresh(held_out).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


def turn(student, teacher, dataset, work_dir, **settings):
    quantizers = MinMax(), MinMax()
    Rotation(**settings).quantize(student, teacher, dataset, *quantizers, 0, work_dir)


def test_what_is_no_better_on_held_out_samples_is_not_taken(tmp_path, monkeypatch):
    teacher, dataset, found = teacher_of("llama"), texts(tmp_path / "d"), []
    losses = iter([0.2, 0.3])
    monkeypatch.setattr(rotation._Training, "_held_out_loss", lambda self: next(losses))
    for settings in ({}, {"iterations": 6, "refresh": 3}):
        student = Student.from_teacher(teacher, W4A4)
        turn(student, teacher, dataset, tmp_path / f"w{len(found)}", **settings)
        found.append(student.sha256)
    assert found[0] == found[1]


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    teacher, dataset, settings = teacher_of("llama"), texts(tmp_path / "d"), {"iterations": 8, "refresh": 3}
    whole = Student.from_teacher(teacher, W4A4)
    turn(whole, teacher, dataset, tmp_path / "whole", **settings)
    real, calls = rotation.output_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:  # looks at held-out samples before the first step included
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rotation, "output_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        turn(Student.from_teacher(teacher, W4A4), teacher, dataset, tmp_path / "w", **settings)
    assert (tmp_path / "w/rotation/state.safetensors").exists()
    calls += [1]
    again = Student.from_teacher(teacher, W4A4)
    turn(again, teacher, dataset, tmp_path / "w", **settings)
    assert again.sha256 == whole.sha256 and len(calls) < 9 + 1 + 8, "what was done is not done again"


def test_channels_with_large_values_hurt_less(tmp_path):
    teacher = teacher_of("llama")
    with torch.no_grad():  # one channel of the stream holds nearly all there is
        teacher.module.model.embed_tokens.weight[:, 5] *= 40
    dataset, errors = texts(tmp_path / "d"), {}
    ids = dataset.without_padding(range(40))
    for name, algorithm in (
        ("nearest", {"algorithm": "round_to_nearest"}),
        ("rotation", {"algorithm": "rotation", "heads": False}),
    ):
        student = dfq.quantize(teacher, dataset, W4A4, student_dir=tmp_path / name, **algorithm)
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
    assert rotate(student.module, teacher, torch.Generator().manual_seed(0)).untied == []
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

    teacher = teacher_of("llama")
    student = Student.from_teacher(teacher, W4A4)
    ids = teacher.input_spec.example(16, torch.Generator().manual_seed(3))
    scale_inputs(student, teacher.example(), ids, resolve("quantizer", "min_max"), 20)
    module, _ = distillation_of(student, teacher, feature_weight=1.0)
    assert not any("rotary" in name for name in module.features)
    assert any(name in student.surgery.rescaled for name in module.features), list(module.features)
    for seen in module._seen:
        assert float(module._feature_loss(*seen)) < 1e-6, seen[0]
