"""Block-AP and E2E-QP: what is trained and what stays, gradients by their formulas, resumed runs, better students."""

import numpy as np
import pytest
import torch
from conftest import as_teacher
from tiny_language import TEXT, kl, own_text, run, tiny_llama, transformers
from torch import nn

import dfq
from dfq.algorithms.block_ap import BlockAP
from dfq.algorithms.e2e_qp import E2EQP, FixedCodes, fixed_codes
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student

W2 = Scheme(TensorScheme(2, False, "per_group", 16), FLOAT)
TERNARY = Scheme(TensorScheme(grid="ternary", granularity="per_group", group_size=16), FLOAT)
SEQ = Scheme(TensorScheme(2, True, "per_channel", grid="seq"), TensorScheme(8, True, "per_token"))
STATIC = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4))


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama()


@pytest.fixture(scope="module")
def dataset(teacher, tmp_path_factory):
    return own_text(teacher, tmp_path_factory.mktemp("text") / "d")


@pytest.mark.parametrize("scheme", [W2, TERNARY, SEQ, STATIC], ids=lambda s: s.name)
def test_a_block_is_nearer_to_the_float_one(scheme, teacher, dataset, tmp_path):
    nearest = dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest")
    settings = {"iterations": 60, "batch_size": 8, "zero_point_lr": 0.05}
    student = dfq.quantize(teacher, dataset, scheme, algorithm="block_ap", student_dir=tmp_path / "s", **settings)
    assert kl(teacher, student) < (0.85 if scheme is STATIC else 0.7) * kl(teacher, nearest)
    again = dfq.load_student(tmp_path / "s", teacher)
    ids = dataset.samples(4)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)
    moved = []
    for name, layer in student.layers.items():
        start, quantizer = nearest.layers[name].weight_quantizer, layer.weight_quantizer
        assert not torch.equal(quantizer.scale, start.scale)
        moved.append(not torch.equal(quantizer.zero_point, start.zero_point))
        assert not torch.equal(student.integer_weight(name), nearest.integer_weight(name))
    assert any(moved) != scheme.weight.symmetric


@pytest.mark.parametrize("rate", ["weight_step_lr", "zero_point_lr", "bias_lr"])
def test_what_has_no_rate_stays(rate, teacher, dataset, tmp_path):
    student = Student.from_teacher(teacher, W2)
    run(resolve("algorithm", "round_to_nearest"), student, teacher, dataset, tmp_path / "a")
    before = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}
    run(
        BlockAP(**{"iterations": 3, "batch_size": 8, "zero_point_lr": 1.0, rate: 0.0}),
        student,
        teacher,
        dataset,
        tmp_path / "b",
    )
    ends = {"weight_step_lr": ".scale", "zero_point_lr": ".zero_point", "bias_lr": "norm.weight"}
    for kind, end in ends.items():
        names = [name for name in before if name.endswith(end) and name.startswith("model.layers")]
        moved = [name for name in names if not torch.equal(before[name], student.module.state_dict()[name])]
        assert names and (not moved if kind == rate else moved)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):  # in no block
        assert torch.equal(before[name], student.module.state_dict()[name])
    assert not any(p.requires_grad for p in student.module.parameters())


def test_a_weight_that_another_block_reads_stays(dataset, tmp_path):
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True))
    tied = dfq.load_teacher(module, "language_modeling", vocab_size=48, length=16, device="cpu")
    student = Student.from_teacher(tied, Scheme(W2.weight, FLOAT, skip=()))
    before = student.module.lm_head.weight.detach().clone()
    run(BlockAP(iterations=2, batch_size=8), student, tied, dataset, tmp_path / "a")
    assert torch.equal(student.module.lm_head.weight, before)


def test_a_killed_run_goes_on(teacher, dataset, tmp_path):
    algorithm = BlockAP(iterations=4, batch_size=8)
    whole = run(algorithm, Student.from_teacher(teacher, W2), teacher, dataset, tmp_path / "whole").freeze()
    files = sorted((tmp_path / "whole").glob("block_*.pt"))
    stored = [torch.load(file, weights_only=True) for file in files]
    for index, state in enumerate(stored):
        assert state and all(name.startswith(f"model.layers.{index}.") for name in state), "a block and no more"
    student, calls = Student.from_teacher(teacher, W2), []
    with pytest.MonkeyPatch.context() as patch:
        from dfq.algorithms import _reconstruction

        fit = _reconstruction._Fit.run

        def once(self, *args):
            if calls:
                raise KeyboardInterrupt
            calls.append(self)
            fit(self, *args)

        patch.setattr(_reconstruction._Fit, "run", once)
        with pytest.raises(KeyboardInterrupt):
            run(algorithm, student, teacher, dataset, tmp_path / "killed")
    resumed = run(algorithm, Student.from_teacher(teacher, W2), teacher, dataset, tmp_path / "killed").freeze()
    ours, theirs = resumed.module.state_dict(), whole.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------ E2E-QP


@pytest.mark.parametrize("scheme", [W2, TERNARY, SEQ, STATIC], ids=lambda s: s.name)
def test_codes_stay_and_steps_get_the_gradient_of_the_paper(scheme, teacher, dataset):
    student = dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest")
    name = "model.layers.1.mlp.up_proj"
    layer, codes = student.layers[name], student.integer_weight(name)
    quantizer = layer.weight_quantizer
    scale, zero_point = quantizer.scale.clone(), quantizer.zero_point.float()
    with fixed_codes(student):
        assert isinstance(quantizer, FixedCodes)
        quantizer.scale = nn.Parameter(scale.clone())
        gradient = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
        (quantizer(layer.weight) * gradient).sum().backward()
        size = scheme.weight.group_size or layer.weight.shape[1]
        parts = [t.float().numpy().reshape(len(codes), -1, size) for t in (gradient, codes)]
        levels = parts[1] - zero_point.numpy().reshape(len(codes), -1, 1) + (0.5 if scheme is SEQ else 0)
        wanted = (parts[0] * levels).sum(-1).reshape(scale.shape)
        np.testing.assert_allclose(quantizer.scale.grad.numpy(), wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            quantizer.scale.mul_(1.7)  # far enough to round every weight anew
    assert type(quantizer).__name__ == "Quantizer" and "codes" not in dict(quantizer.named_buffers())
    assert torch.equal(student.integer_weight(name), codes)
    torch.testing.assert_close(quantizer.scale, scale * 1.7)


@pytest.mark.parametrize("scheme", [W2, TERNARY], ids=lambda s: s.name)
def test_end_to_end_training_helps_and_keeps_codes(scheme, teacher, dataset, tmp_path):
    settings = {"max_steps": 60, "step_lr": 0.01, "batch_size": 8, "checks": 2}
    student = Student.from_teacher(teacher, scheme)
    run(resolve("algorithm", "round_to_nearest"), student, teacher, dataset, tmp_path / "a")
    before, codes = kl(teacher, student), {name: student.integer_weight(name) for name in student.layers}
    norms = student.module.model.norm.weight.detach().clone()
    run(E2EQP(**settings), student, teacher, dataset, tmp_path / "b")
    student.freeze()
    assert kl(teacher, student) < 0.9 * before
    assert all(torch.equal(student.integer_weight(name), codes[name]) for name in codes)
    assert torch.equal(student.module.model.norm.weight, norms)
    run(E2EQP(**{**settings, "max_steps": 4, "checks": 1, "bias_lr": 1e-3}), student, teacher, dataset, tmp_path / "c")
    assert all(torch.equal(student.integer_weight(name), codes[name]) for name in codes)
    path = student.freeze().save(tmp_path / "saved")
    ids = dataset.samples(4)
    with torch.no_grad():
        assert torch.equal(dfq.load_student(path, teacher)(ids).logits, student(ids).logits)


def test_in_a_sequence(teacher, dataset):
    steps = [
        {"_target_": "dfq.algorithms.block_ap.BlockAP", "iterations": 30, "batch_size": 8},
        {"_target_": "dfq.algorithms.e2e_qp.E2EQP", "max_steps": 30, "batch_size": 8, "step_lr": 5e-3, "checks": 2},
    ]
    found = [
        kl(teacher, dfq.quantize(teacher, dataset, W2, algorithm="sequence", steps=steps[:number])) for number in (1, 2)
    ]
    assert found[1] < found[0]


def test_behind_an_algorithm_that_rounds_it_is_fitted_to_the_teacher(teacher, dataset):
    block_ap = {"_target_": "dfq.algorithms.block_ap.BlockAP", "iterations": 100, "batch_size": 8}
    task, ids, found = resolve("task", "language_modeling"), dataset.samples(32), []
    for steps in (["squant"], ["squant", block_ap]):
        student = dfq.quantize(teacher, dataset, W2, algorithm="sequence", steps=steps)
        with torch.no_grad():
            outputs = task.raw_outputs(student, ids), task.raw_outputs(teacher, ids)
        found.append(float(task.distillation_loss(*outputs)))
    assert found[1] < 0.7 * found[0]
    rotated = Scheme(TensorScheme(4, True, "per_channel"), FLOAT)
    with pytest.raises(dfq.UserError, match="got a student that was rotated and rounded"):
        dfq.quantize(teacher, dataset, rotated, algorithm="sequence", steps=["rotation", "gptq", block_ap])


def test_for_images_too(make_dataset):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    teacher = as_teacher(network)
    data, errors = make_dataset(teacher), {}
    images = make_dataset(teacher, 64).samples()
    for name, settings in (("round_to_nearest", {}), ("block_ap", {"iterations": 60}), ("e2e_qp", {"max_steps": 60})):
        student = dfq.quantize(teacher, data, "w3a3", algorithm=name, **settings)
        with torch.no_grad():
            errors[name] = float((student(images) - teacher(images)).square().mean())
    assert errors["block_ap"] < 0.6 * errors["round_to_nearest"] and errors["e2e_qp"] < errors["round_to_nearest"]


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("block_ap", {"weight_lr": 0}, "got algorithm.weight_lr=0; allowed: a number > 0"),
        ("block_ap", {"zero_point_lr": -1}, "got algorithm.zero_point_lr=-1; allowed: a number >= 0"),
        ("e2e_qp", {"step_lr": 0}, "got algorithm.step_lr=0; allowed: a number > 0"),
    ],
)
def test_wrong_settings(name, settings, message):
    with pytest.raises(dfq.UserError) as error:
        resolve("algorithm", name, **settings)
    assert str(error.value) == message
