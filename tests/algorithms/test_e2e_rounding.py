"""Roundings trained end to end: where a weight begins, where it may end, what it is looked at as, and a killed run."""

import pytest
import torch
from conftest import as_teacher
from pytorch_lightning import Callback
from tiny_language import TEXT, kl, own_text, run, tiny_llama, transformers
from torch import nn

import dfq
from dfq.algorithms.e2e_rounding import E2ERounding, _float_weights
from dfq.lightning.distillation import DistillationModule
from dfq.modules import Quantizer
from dfq.quantization import soft_rounding
from dfq.quantizers._soft import SoftQuantizer, decided, soft_quantizers
from dfq.quantizers.lsq import learn_step
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student

W2 = Scheme(TensorScheme(2, False, "per_group", 16), FLOAT)
W3 = Scheme(TensorScheme(3, False, "per_group", 16), FLOAT)
SCHEMES = {
    "w3": W3,
    "float_zero_point": Scheme(TensorScheme(2, False, "per_group", 16, zero_point="float"), FLOAT),
    "per_channel": Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(8, True, "per_token")),
    "ternary": Scheme(TensorScheme(grid="ternary", granularity="per_group", group_size=16), FLOAT),
    "seq": Scheme(TensorScheme(2, True, "per_channel", grid="seq"), FLOAT),
}
FEW = {"max_steps": 60, "batch_size": 8, "checks": 2}


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama()


@pytest.fixture(scope="module")
def dataset(teacher, tmp_path_factory):
    return own_text(teacher, tmp_path_factory.mktemp("text") / "d")


def nearest(teacher, dataset, work_dir, scheme=W3):
    student = run(
        resolve("algorithm", "round_to_nearest"), Student.from_teacher(teacher, scheme), teacher, dataset, work_dir
    )
    return student.freeze()


def network():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, 10))


def codes(student):
    return {name: student.integer_weight(name) for name in student.layers}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_weight_ends_at_one_of_the_two_codes_beside_its_float_value(scheme, teacher, dataset, tmp_path):
    student = nearest(teacher, dataset, tmp_path / "a", scheme)
    before, loss = codes(student), kl(teacher, student)
    grids = {name: layer.weight_quantizer for name, layer in student.layers.items()}
    run(E2ERounding(**FEW), student, teacher, dataset, tmp_path / "b")
    assert kl(teacher, student) < 0.95 * loss
    moved = 0
    for name, layer in student.layers.items():
        assert layer.weight_quantizer is grids[name] and not isinstance(layer.weight_quantizer, SoftQuantizer)
        torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight, rtol=1e-5, atol=1e-7)
        step = student.integer_weight(name).int() - before[name].int()
        assert int(step.abs().max()) <= 1
        moved += int(step.abs().sum())
    assert moved
    path = student.freeze().save(tmp_path / "saved")
    ids = dataset.samples(4)
    with torch.no_grad():
        assert torch.equal(dfq.load_student(path, teacher)(ids).logits, student(ids).logits)


def test_a_code_moves_toward_the_float_value_alone(teacher, dataset, tmp_path):
    """Behind an algorithm that has rounded: what lies beyond the code, away from the teacher's weight, is no choice."""
    student = nearest(teacher, dataset, tmp_path / "a", W2)
    before, moved = codes(student), 0
    floats = {name: teacher.module.get_submodule(name).weight.detach() for name in before}
    levels = {name: layer.weight.detach().clone() for name, layer in student.layers.items()}
    run(E2ERounding(**FEW, step_lr=1e-12), student, teacher, dataset, tmp_path / "b")
    for name, codes_now in codes(student).items():
        step = codes_now.int() - before[name].int()
        toward = torch.sign(floats[name] - levels[name])
        assert bool(((step == 0) | (step == toward)).all())
        moved += int(step.abs().sum())
    assert moved


@pytest.mark.parametrize("scheme", ["w3", "float_zero_point"])
def test_a_second_round_knows_the_float_values(scheme, teacher, dataset, tmp_path):
    """Levels beside float zero points are a rounding error away from what was stored: no float weights of their own."""
    student = nearest(teacher, dataset, tmp_path / "a", SCHEMES[scheme])
    run(E2ERounding(**FEW), student, teacher, dataset, tmp_path / "b")
    for name, wanted in _float_weights(student, teacher, list(student.layers)):
        torch.testing.assert_close(wanted, teacher.module.get_submodule(name).weight)


def test_where_a_weight_begins_and_what_it_is_looked_at_as(teacher, dataset, tmp_path):
    student = nearest(teacher, dataset, tmp_path)
    levels = {name: layer.weight.detach().clone() for name, layer in student.layers.items()}
    steps = {name: layer.weight_quantizer.steps_of(levels[name]) for name, layer in student.layers.items()}
    codes_before, ids = codes(student), dataset.samples(4)
    with torch.no_grad(), E2ERounding(looseness=0.2)._soft(student, teacher):
        for name, layer in student.layers.items():
            wanted = teacher.module.get_submodule(name).weight
            away = (layer.weight_quantizer(layer.weight) - levels[name]) / steps[name]
            code = codes_before[name]
            at_end = (code == code.min()) | (code == code.max())  # there is no code beyond those
            toward = torch.sign(wanted - levels[name])
            torch.testing.assert_close(away[~at_end], 0.2 * toward[~at_end], rtol=0, atol=1e-3)
            assert bool(((away - 0.2 * toward).abs() < 1e-3)[at_end].any()) and bool((away.abs() < 0.201).all())
        soft = student(ids).logits
        with decided(soft_quantizers(student.module)):
            hard = student(ids).logits
    with torch.no_grad():
        assert torch.equal(student(ids).logits, hard) and not torch.allclose(soft, hard, atol=1e-4)
    assert all(torch.equal(layer.weight, levels[name]) for name, layer in student.layers.items())


def test_roundings_are_decided_in_the_end(teacher, dataset, tmp_path, monkeypatch):
    seen, save = [], DistillationModule.on_fit_end

    def note(self):
        seen.append(torch.cat([soft_rounding(q.logits.detach()).flatten() for q in self.soft]))
        save(self)

    monkeypatch.setattr(DistillationModule, "on_fit_end", note)
    student = nearest(teacher, dataset, tmp_path / "a")
    for weight in (1e4, 0.0):
        run(E2ERounding(**FEW, rounding_weight=weight), student, teacher, dataset, tmp_path / str(weight))
    decided_share, free_share = (float(((h < 0.01) | (h > 0.99)).float().mean()) for h in seen)
    assert decided_share > 0.9 > free_share


def test_a_killed_run_goes_on(teacher, dataset, tmp_path, monkeypatch):
    algorithm = E2ERounding(**{**FEW, "max_steps": 12, "checks": 4})
    whole = run(algorithm, nearest(teacher, dataset, tmp_path), teacher, dataset, tmp_path / "whole")

    class Stop(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step >= 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "configure_callbacks", lambda _: [Stop()], raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(algorithm, nearest(teacher, dataset, tmp_path), teacher, dataset, tmp_path / "parts")
    assert torch.load(tmp_path / "parts/distillation/last.ckpt", weights_only=True)["global_step"] == 6
    resumed = run(algorithm, nearest(teacher, dataset, tmp_path), teacher, dataset, tmp_path / "parts")
    state, wanted = resumed.module.state_dict(), whole.module.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_what_nothing_is_better_than_stays(teacher, dataset, tmp_path):
    student = nearest(teacher, dataset, tmp_path / "a")
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    run(E2ERounding(**{**FEW, "rounding_lr": 100.0, "max_steps": 4}), student, teacher, dataset, tmp_path / "b")
    assert all(torch.equal(value, before[name]) for name, value in student.module.state_dict().items())


@pytest.mark.parametrize("bias_lr", [0.0, 1e-3])
def test_what_is_float_is_trained_where_it_has_a_rate(bias_lr, teacher, dataset, tmp_path):
    student = nearest(teacher, dataset, tmp_path / "a")
    before = student.module.model.norm.weight.detach().clone()
    run(E2ERounding(**FEW, bias_lr=bias_lr), student, teacher, dataset, tmp_path / "b")
    assert torch.equal(student.module.model.norm.weight, before) == (bias_lr == 0)


def test_tied_layers_keep_one_weight(dataset, tmp_path):
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=True))
    tied = dfq.load_teacher(module, "language_modeling", vocab_size=48, length=16, device="cpu")
    student = nearest(tied, dataset, tmp_path / "a", Scheme(W3.weight, FLOAT, skip=()))
    run(E2ERounding(**FEW), student, tied, dataset, tmp_path / "b")
    head, embedding = student.layers["lm_head"], student.layers["model.embed_tokens"]
    assert head.weight is embedding.weight
    assert torch.equal(head.weight_quantizer(head.weight), head.weight)


def test_powers_of_two_stay(teacher, dataset, tmp_path):
    scheme = Scheme(TensorScheme(4, True, "per_group", 16, scale_format="e8m0"), FLOAT)
    student = nearest(teacher, dataset, tmp_path / "a", scheme)
    before = {name: layer.weight_quantizer.scale.clone() for name, layer in student.layers.items()}
    run(E2ERounding(**FEW), student, teacher, dataset, tmp_path / "b")
    assert all(torch.equal(layer.weight_quantizer.scale, before[name]) for name, layer in student.layers.items())


def test_float_values_are_those_of_a_student_whose_layers_were_rescaled(make_dataset):
    teacher = as_teacher(network())
    with torch.no_grad():
        teacher.module[0].weight[::2] *= 20
    scheme = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(8))
    steps = ["equalization", "squant"]
    student = dfq.quantize(teacher, make_dataset(teacher), scheme, algorithm="sequence", steps=steps)
    assert student.surgery.rescaled
    differs = []
    for name, wanted in _float_weights(student, teacher, list(student.layers)):
        layer, code = student.layers[name], student.integer_weight(name)
        away = ((wanted - layer.weight) / layer.weight_quantizer.steps_of(layer.weight)).abs()
        inside = code.abs() < layer.weight_quantizer.scheme.quant_max
        assert float(away[inside].max()) < 1, "squant takes the code above or below"
        differs.append(not torch.allclose(wanted, teacher.module.get_submodule(name).weight, rtol=0.1))
    assert any(differs)


def test_for_images_too(make_dataset):
    teacher, task = as_teacher(network()), resolve("task", "classification")
    data = make_dataset(teacher, 512)
    images, scheme = data.samples(), Scheme(TensorScheme(2, True, "per_channel"), TensorScheme(8))
    ours = {
        "_target_": "dfq.algorithms.e2e_rounding.E2ERounding",
        **FEW,
        "max_steps": 200,
        "feature_weight": 0,
        "flip": False,
    }
    losses = []
    for steps in (["round_to_nearest"], ["round_to_nearest", ours]):
        student = dfq.quantize(teacher, data, scheme, algorithm="sequence", steps=steps)
        with torch.no_grad():
            losses.append(float(task.distillation_loss(student(images), teacher(images))))
    assert losses[1] < 0.8 * losses[0]


def test_rotated_and_rounded_is_refused(teacher, dataset):
    rotated = Scheme(TensorScheme(4, True, "per_channel"), FLOAT)
    with pytest.raises(dfq.UserError, match="got a student that was rotated and rounded: what its weights were"):
        dfq.quantize(teacher, dataset, rotated, algorithm="sequence", steps=["rotation", "gptq", "e2e_rounding"])


TRAINED = {
    "zero_points": (Scheme(TensorScheme(3, False, "per_channel"), FLOAT), "lsq_plus"),
    "powers_of_two": (Scheme(TensorScheme(4, True, "per_channel", scale_format="e8m0"), FLOAT), "lsq"),
    "float16": (Scheme(TensorScheme(3, False, "per_group", 8, "uniform", False, "float16"), FLOAT), "lsq"),
}


@pytest.mark.parametrize("name", ["e2e_rounding", "e2e_qp"])
@pytest.mark.parametrize(("scheme", "gradient"), TRAINED.values(), ids=TRAINED)
def test_what_a_distillation_has_trained_is_where_it_begins(name, scheme, gradient, make_dataset):
    """Trained grids are on their way until they are frozen: codes are those of the grids that are stored."""
    teacher = as_teacher(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)))
    scheme = Scheme(scheme.weight, scheme.activation, overrides={"0": {"weight": {"grid": "float"}}})
    dataset = make_dataset(teacher)
    trained = resolve(
        "algorithm", "distillation", max_steps=60, batch_size=16, checks=1, gradient=gradient, step_lr=0.01
    )
    still = {"max_steps": 1, "checks": 1, "batch_size": 8, "step_lr": 1e-12}
    still |= {"rounding_lr": 1e-12, "bias_lr": 0.0} if name == "e2e_rounding" else {}
    found = []
    for steps in ([trained], [trained, resolve("algorithm", name, **still)]):
        found.append(dfq.quantize(teacher, dataset, scheme, algorithm="sequence", steps=steps))
    codes_of = [student.integer_weight("3") for student in found]
    assert torch.equal(*codes_of)
    torch.testing.assert_close(*[student.layers["3"].weight for student in found])


@pytest.mark.parametrize("looseness", [0.5, 0.9])
def test_a_weight_does_not_begin_nearer_to_another_code(looseness, make_teacher, make_dataset):
    """It would be at that one where nothing is learned, and the student that it was given would not stay."""
    teacher = make_teacher("bare")
    with pytest.raises(dfq.UserError, match=f"got algorithm.looseness={looseness}; allowed: a number from 0 to 0.49"):
        dfq.quantize(teacher, make_dataset(teacher), "w4a8", algorithm="e2e_rounding", looseness=looseness)


def test_weights_on_levels_of_many_sizes_are_named(make_teacher, make_dataset, capfd):
    teacher = make_teacher("bare")
    scheme = Scheme(TensorScheme(4, True, "per_channel", grid="fp4_e2m1"), FLOAT)
    scheme = Scheme(scheme.weight, FLOAT, overrides={"2": {"weight": {"grid": "uniform", "num_bits": 3}}})
    steps = ["round_to_nearest", resolve("algorithm", "e2e_rounding", **FEW)]
    dfq.quantize(teacher, make_dataset(teacher), scheme, algorithm="sequence", steps=steps)
    assert "E2ERounding leaves as they are: 0, 6\n" in capfd.readouterr().err


@pytest.mark.parametrize("zero_point", ["integer", "float"])
def test_what_is_looked_at_is_what_is_stored_in_float16(zero_point, make_dataset):
    """A float zero point is stored as its product with the step, and moves with a step that is trained."""
    teacher = as_teacher(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)))
    with torch.no_grad():
        teacher.module[3].weight += 0.3
    weight = TensorScheme(3, False, "per_group", 8, scale_format="float16", zero_point=zero_point)
    plain = {"weight": {"granularity": "per_channel", "group_size": None}}
    dataset, scheme = make_dataset(teacher), Scheme(weight, FLOAT, overrides={"0": plain})
    student = dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest")
    before, quantizer = codes(student), student.layers["3"].weight_quantizer
    with torch.no_grad(), E2ERounding()._soft(student, teacher):
        for soft in soft_quantizers(student.module):
            soft.step *= 1.0137
        looked_at = student.layers["3"].weight_quantizer.hardened()
    assert student.layers["3"].weight_quantizer is quantizer and torch.equal(codes(student)["3"], before["3"])
    away = (quantizer(looked_at) - looked_at) / quantizer.steps_of(looked_at)
    assert float(away.abs().max()) < 1e-4


@pytest.mark.parametrize("scale_format", ["float32", "e8m0"])
def test_a_grid_that_was_trained_is_trained_on_from_what_is_stored(scale_format):
    scheme = TensorScheme(4, False, "per_channel", scale_format=scale_format)
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    grids = []
    for _ in range(3):
        quantizer = Quantizer(scheme, (6,), 0)
        quantizer.set_qparams(torch.linspace(0.1, 0.4, 6), torch.full((6,), 6))
        learn_step(quantizer, 20, offset=True)
        with torch.no_grad():
            quantizer.scale *= 0.9
            quantizer.zero_point += 1.3
        grids.append(quantizer)
    again, soft, quantizer = grids
    with torch.no_grad():
        stored = quantizer(weight)
        learn_step(again, 20, offset=True)
        assert torch.equal(again(weight), stored)
        torch.testing.assert_close(SoftQuantizer(soft, weight, True).hardened(), stored)
