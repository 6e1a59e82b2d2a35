"""Options of distillation on tiny networks: each does what it says, and survives an interruption."""

import itertools
import math
import time
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NETS, NUM_CLASSES, SPEC, as_teacher, settle
from pytorch_lightning import Callback
from rich.progress import Progress
from torch import nn

import dfq
import dfq.lightning.distillation as lightning_distillation
from dfq.algorithms.auto import _Figures
from dfq.algorithms.distillation import Distillation
from dfq.algorithms.round_to_nearest import RoundToNearest
from dfq.calibration import calibrate
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.hooks import capture_outputs
from dfq.lightning.augmentation import augment
from dfq.lightning.distillation import DistillationModule
from dfq.lightning.freezing import FrozenChannels
from dfq.lightning.looks import Looks, Patience
from dfq.lightning.trainer import Training
from dfq.modules import stage_ends
from dfq.pipeline import quantize
from dfq.quantizers.mse import MSE
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import load, resolve
from dfq.student import Student
from dfq.teacher import hash_tensors

W3A3 = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(3))
SHORT = {"max_steps": 12, "batch_size": 16, "checks": 2, "num_calibration_samples": 32, "weight_lr": 0.05}
QUANTIZER = MSE(num_candidates=20)


def run(teacher, dataset, folder, student=None, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    student = student or Student.from_teacher(teacher, W3A3)
    algorithm = Distillation(**{**SHORT, **settings})
    algorithm.quantize(student, teacher, dataset, QUANTIZER, QUANTIZER, 0, folder)
    return student


def calibrated(teacher, scheme=W3A3, **settings):
    """A module with a calibrated student, as the algorithm makes it, and a trainer that only counts."""
    student = Student.from_teacher(teacher, scheme)
    images = settle(NETS["bare"](), seed=2, num_samples=32)
    algorithm = Distillation(**{**SHORT, **settings})
    algorithm._learn_steps(student, calibrate(student, images, QUANTIZER, QUANTIZER), 0)
    features = {name: name for name in stage_ends(teacher.dataflow)}
    module = DistillationModule(student, teacher, resolve("task", "classification"), features, algorithm)
    module._trainer = SimpleNamespace(global_step=0, should_stop=False)
    return module, images


@pytest.fixture
def counted(monkeypatch):
    """Lightning's ``trainer`` property gives whatever was set, without asking whether it is one."""
    monkeypatch.setattr(DistillationModule, "trainer", property(lambda self: self._trainer))
    monkeypatch.setattr(DistillationModule, "log", lambda *_args, **_kwargs: None, raising=False)


class WithoutGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = NETS["plain"]()

    @torch.no_grad()
    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("algorithm", ["distillation", "e2e_rounding"])
def test_a_network_without_a_gradient_is_told_of(algorithm, make_dataset):
    teacher = as_teacher(WithoutGradient())
    dataset = make_dataset(teacher, 32)
    with pytest.raises(UserError) as error:
        dfq.quantize(teacher, dataset, "w4a8", algorithm=algorithm, max_steps=2)
    assert str(error.value) == (
        f"got {teacher.name}, whose outputs have no gradient (torch.no_grad, detach, argmax or NumPy in its forward); "
        "allowed: a differentiable network where it is trained; gptq, quantease and other algorithms that go layer by "
        "layer need none"
    )
    student = dfq.quantize(teacher, dataset, "w4a8", algorithm="distillation", zeroth_order=True, max_steps=2)
    assert torch.isfinite(student(dataset.tensors()["images"][:2])).all()


# ------------------------------------------------------------------------------------------------ every option

OPTIONS = {
    "reverse_kl": {"kl_weight": 0.0, "reverse_kl_weight": 1.0},
    "jensen_shannon": {"jensen_shannon_weight": 1.0},
    "logits": {"logits_weight": 1.0},
    "temperature": {"temperature": 4.0},
    "no features": {"feature_weight": 0.0},
    "affinity": {"feature_loss": "affinity"},
    "qfd": {"feature_loss": "qfd", "feature_bits": 2},
    "cam": {"cam_weight": 1.0},
    "label": {"label_weight": 1.0, "label_difficulty": 0.9},
    "balance": {"balance": "learned"},
    "intervention": {"intervention": 0.8},
    "blocks_first": {"blocks_first": 0.6},
    "frozen_channels": {"frozen_channels": 0.5, "refreeze_steps": 4},
    "dampen": {"dampen": 1.0},
    "average": {"average": 0.9},
    "no flip": {"flip": False},
    "shift": {"shift": 2},
    "mixup": {"mixup": 1.0},
    "jitter": {"jitter": 0.3},
    "lsq_plus": {"gradient": "lsq_plus"},
    "stable": {"gradient": "stable"},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Teacher, dataset and the student of the defaults: what every option is compared to."""
    folder = tmp_path_factory.mktemp("shared")
    teacher = as_teacher(NETS["plain"]())
    images = settle(NETS["bare"](), seed=1, num_samples=48)
    dataset = SyntheticDataset.create(folder / "dataset", {"seed": 0}, {"pixels": False, "labels": False})
    with torch.no_grad():
        dataset.write_shard(0, {"images": images, "logits": teacher(images)}, 0.0)
    return teacher, dataset, hash_tensors(run(teacher, dataset, folder / "work").module.state_dict())


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_student(shared, tmp_path, option):
    teacher, dataset, default = shared
    student = run(teacher, dataset, tmp_path, **OPTIONS[option])
    state = student.module.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert hash_tensors(state) != default
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.module.modules()]
    assert not any(hooks) and not any("forward" in vars(m) for m in student.module.modules())
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_all_options_at_once_are_repeatable_and_survive_an_interruption(shared, tmp_path, monkeypatch):
    teacher, dataset, _ = shared
    everything = {k: v for settings in OPTIONS.values() for k, v in settings.items()} | {
        "kl_weight": 1.0,
        "feature_weight": 1.0,
        "flip": True,
        "frozen_channels": 0.25,
    }
    first = run(teacher, dataset, tmp_path / "a", **everything)
    second = run(teacher, dataset, tmp_path / "b", **everything)
    assert hash_tensors(first.module.state_dict()) == hash_tensors(second.module.state_dict())
    states = []
    train = DistillationModule.on_load_checkpoint

    def loaded(self, checkpoint):
        train(self, checkpoint)
        states.append((self.rng.get_state(), [a.clone() for a in self.averages], self.earlier_s, checkpoint))

    monkeypatch.setattr(DistillationModule, "on_load_checkpoint", loaded)
    monkeypatch.setattr(DistillationModule, "configure_callbacks", lambda self: [Stop(8)], raising=False)
    with pytest.raises(RuntimeError, match="killed"):
        run(teacher, dataset, tmp_path / "c", **everything)
    kept = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 6 and not states
    fresh = torch.Generator().manual_seed(0).get_state()
    monkeypatch.setattr(DistillationModule, "configure_callbacks", lambda self: [], raising=False)
    resumed = run(teacher, dataset, tmp_path / "c", **everything)
    ((rng, averages, earlier_s, checkpoint),) = states
    assert torch.equal(rng, kept["distillation"]["rng"]) and not torch.equal(rng, fresh)
    assert earlier_s > 0 and all(map(torch.equal, averages, kept["distillation"]["averages"]))
    # Training goes on from the weights, not from their averages, which are what was looked at and kept.
    for name, weight in kept["distillation"]["weights"].items():
        assert torch.equal(checkpoint["state_dict"][name], weight)
    assert any(not torch.equal(kept["state_dict"][n], w) for n, w in kept["distillation"]["weights"].items())
    assert all(torch.isfinite(tensor).all() for tensor in resumed.module.state_dict().values())
    assert torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)["global_step"] == 12


@pytest.mark.parametrize("checks", [2, 4], ids=["at the end of an epoch", "inside an epoch"])
@pytest.mark.parametrize("options", [{}, {"frozen_channels": 0.5, "refreeze_steps": 5, "average": 0.9, "shift": 1}])
def test_a_resumed_run_ends_at_the_bits_of_one_that_was_not_interrupted(
    shared, tmp_path, monkeypatch, recwarn, checks, options
):
    """Two batches an epoch; the last look before the interruption is after 6 of 12 steps, or after 9."""
    teacher, dataset, _ = shared
    seen, teach = [], DistillationModule._teach
    monkeypatch.setattr(
        DistillationModule, "_teach", lambda self, images: (seen.append(images.clone()), teach(self, images))[1]
    )
    whole = run(teacher, dataset, tmp_path / "whole", checks=checks, **options)
    expected, at = seen[:], {2: 6, 4: 9}[checks]
    seen.clear()
    monkeypatch.setattr(
        DistillationModule, "configure_callbacks", lambda self: [Stop(at + 1, KeyboardInterrupt)], raising=False
    )
    with pytest.raises(KeyboardInterrupt):
        run(teacher, dataset, tmp_path / "parts", checks=checks, **options)
    assert torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)["global_step"] == at
    del seen[at:]
    monkeypatch.setattr(DistillationModule, "configure_callbacks", lambda self: [], raising=False)
    resumed = run(teacher, dataset, tmp_path / "parts", checks=checks, **options)
    assert len(seen) == len(expected) == 12 and all(map(torch.equal, seen, expected))
    state, wanted = resumed.module.state_dict(), whole.module.state_dict()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
    assert not [warning for warning in recwarn if "resum" in str(warning.message)]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_bar_is_off_the_terminal_when_training_fails(shared, tmp_path, monkeypatch, error):
    """Else rich's thread would go on drawing it under whatever comes after, the error's own message first."""
    teacher, dataset, _ = shared
    monkeypatch.setattr(DistillationModule, "configure_callbacks", lambda self: [Stop(2, error)], raising=False)
    bars, start = [], Progress.start
    monkeypatch.setattr(Progress, "start", lambda self: (bars.append(self), start(self))[1])
    with pytest.raises(error):
        run(teacher, dataset, tmp_path / "a")
    assert "distill" in [bar.tasks[0].description for bar in bars]
    assert not [bar.tasks[0].description for bar in bars if bar.live.is_started]


def test_training_without_gradients_takes_one_process(shared, tmp_path):
    teacher, dataset, _ = shared
    algorithm = resolve("algorithm", "distillation", **SHORT, zeroth_order=True)
    with pytest.raises(UserError, match=r"got algorithm\.zeroth_order=true and 2 processes; allowed: trainer=single"):
        quantize(teacher, dataset, W3A3, algorithm, QUANTIZER, QUANTIZER, 0, tmp_path / "a", Training("ddp_spawn", 2))


class Stop(Callback):
    """Fails like a killed process would, after ``step`` optimizer steps."""

    def __init__(self, step, error=RuntimeError):
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step >= self.step:
            raise self.error("killed")


def test_every_channel_moves_in_units_of_its_own_step(counted):
    """Channels that a folded batch norm made a thousand times smaller are not moved by the large ones' rate."""
    teacher = as_teacher(NETS["plain"]())
    with torch.no_grad():
        teacher.module[0].weight[::2] *= 1e-3
    module, images = calibrated(teacher, flip=False)
    layer = next(iter(module._student[0].layers.values()))
    steps = layer.weight_quantizer.scale.detach().clone()
    before = layer.weight.detach().clone()
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step({"images": images}, 0).backward()
    optimizer.step()
    moved = (layer.weight.detach() - before).abs().flatten(1).amax(1) / steps
    alive = layer.weight.grad.flatten(1).any(1)  # behind the ReLU
    assert float(steps[alive].max() / steps[alive].min()) > 100
    torch.testing.assert_close(moved[alive], torch.full_like(moved[alive], 0.05), rtol=0.05, atol=0)
    turned = (layer.weight_quantizer.scale.detach() / steps - 1).abs()
    torch.testing.assert_close(turned[alive], torch.full_like(turned[alive], 1e-3), rtol=0.05, atol=1e-5)


# ------------------------------------------------------------------------------------------------ images


def test_augment_moves_and_mirrors_as_numpy_would():
    images = torch.randn(40, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    got = augment(images, torch.Generator().manual_seed(1), flip=True, shift=2)
    seen = set()
    for image, moved in zip(images.numpy(), got.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        found = [
            (dy, dx, mirrored)
            for dy in range(5)
            for dx in range(5)
            for mirrored in (False, True)
            if np.array_equal(padded[:, dy : dy + 7, dx : dx + 9][:, :, :: -1 if mirrored else 1], moved)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {dy for dy, _, _ in seen} == {dx for _, dx, _ in seen} == set(range(5)) and {m for *_, m in seen} == {0, 1}
    assert torch.equal(augment(images, torch.Generator().manual_seed(1), True, 2), got)


def test_augment_off_is_nothing_and_tokens_are_left_alone():
    images, tokens = torch.randn(4, 3, 5, 5), torch.arange(12).view(3, 4)
    assert augment(images, torch.Generator(), flip=False) is images
    assert augment(tokens, torch.Generator(), flip=True, shift=1, mixup=1.0) is tokens
    assert torch.isfinite(augment(torch.randn(2, 1, 1, 1), torch.Generator(), shift=3)).all()  # wider than the image


def test_jitter_is_one_brightness_and_one_contrast_an_image_within_the_limits():
    images = torch.randn(500, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    got = augment(images, torch.Generator().manual_seed(1), flip=False, jitter=0.3)
    x, y = images.flatten(1).numpy().astype(float), got.flatten(1).numpy().astype(float)
    lines = np.array([np.polyfit(a, b, 1) for a, b in zip(x, y, strict=True)])  # contrast, brightness
    np.testing.assert_allclose(lines[:, :1] * x + lines[:, 1:], y, atol=1e-5)
    for values in (np.log(lines[:, 0]), lines[:, 1]):
        assert abs(values.std() - 0.3) < 0.03 and abs(values.mean()) < 0.04
    low, high = -torch.ones(3, 1, 1), torch.tensor([0.5, 1.0, 1.5]).view(3, 1, 1)
    clipped = augment(images, torch.Generator().manual_seed(1), flip=False, jitter=0.3, limits=(low, high))
    assert torch.equal(clipped, got.clamp(low, high)) and not torch.equal(clipped, got)
    tokens = torch.arange(12).view(3, 4)
    assert augment(tokens, torch.Generator(), jitter=1.0) is tokens


def test_mixup_is_a_blend_of_two_of_the_batch():
    images = torch.eye(6)[:, None, None, :].expand(-1, 1, 2, -1).contiguous()
    got = augment(images, torch.Generator().manual_seed(3), flip=False, mixup=1.0)[:, 0, 0]
    amount = float(got.diagonal().min())  # of a sample that was not blended with itself
    others = (got - amount * torch.eye(6)) / (1 - amount)
    assert 0 < amount < 1
    order = others.argmax(1)
    torch.testing.assert_close(others, torch.eye(6)[order])  # a permutation of the batch
    assert sorted(order.tolist()) == list(range(6))
    assert torch.equal(augment(images, torch.Generator().manual_seed(3), flip=False, mixup=0.0), images)


# ------------------------------------------------------------------------------------------------ stages


def test_intervention_hands_on_the_teachers_features(counted):
    module, images = calibrated(as_teacher(NETS["plain"]()), intervention=1.0, flip=False)
    assert module.cuts == ["2", "6"]  # no layer between 5 and 6
    assert module._chances(0.0) == dict.fromkeys(module.cuts, 1.0)
    assert module._chances(0.25) == dict.fromkeys(module.cuts, 0.5)
    assert module._chances(0.5) == module._chances(1.0) == dict.fromkeys(module.cuts, 0.0)
    seen = module._teach(images)
    module._learn(images, seen, module._chances(0.0))
    for name in module.cuts:
        assert torch.equal(seen.given[name], seen.wanted[name])
        assert not torch.equal(seen.got[name], seen.wanted[name])
    module._learn(images, seen, dict.fromkeys(module.cuts, 0.5))
    taken = (seen.given["2"] == seen.wanted["2"]).flatten(1).all(1)
    kept = (seen.given["2"] == seen.got["2"]).flatten(1).all(1)
    assert (taken ^ kept).all() and taken.any() and kept.any()


def test_stages_are_trained_apart_and_merged_from_the_input_on(counted):
    module, images = calibrated(as_teacher(NETS["plain"]()), blocks_first=0.6, flip=False)
    closed = [[name for name, p in module._chances(done).items() if p == 1] for done in (0, 0.29, 0.31, 0.59, 0.6, 1)]
    assert closed == [["2", "6"], ["2", "6"], ["6"], ["6"], [], []]
    # The output's loss reaches nothing before the last cut, and each feature's loss its own stage alone.
    seen = module._teach(images)
    module._learn(images, seen, module._chances(0.0))
    layers = module._student[0].layers

    def reached(loss):
        found = torch.autograd.grad(
            loss, [layer.weight for layer in layers.values()], retain_graph=True, allow_unused=True
        )
        return [name for name, g in zip(layers, found, strict=True) if g is not None and float(g.abs().max()) > 0]

    assert reached(module._loss("kl", seen)) == ["8"]
    assert reached(module._feature_loss("5", seen.got["5"], seen.wanted["5"])) == ["3"]
    module._learn(images, seen, module._chances(0.4))
    assert reached(module._feature_loss("5", seen.got["5"], seen.wanted["5"])) == ["0", "3"]


def test_class_activation_maps_train_what_is_before_them(counted):
    module, images = calibrated(as_teacher(NETS["plain"]()), cam_weight=1.0, flip=False)
    assert module.cam_place == "5"  # the last of more than one position
    with torch.no_grad(), capture_outputs(module._teacher[0].module, ["5"]) as captured:
        logits = module._teacher[0](images)
    head = module._teacher[0].module[8].weight[logits.argmax(1)] / 9  # pooled over 3 x 3
    want = torch.relu((head[:, :, None, None] * captured["5"]).sum(1))
    seen = module._teach(images)
    torch.testing.assert_close(seen.cam, want, rtol=1e-4, atol=1e-5)
    assert not any(feature.requires_grad for feature in seen.wanted.values()) and not seen.target.requires_grad
    module._learn(images, seen, {})
    loss = module._loss("cam", seen)
    loss.backward()
    layers = module._student[0].layers
    assert (
        float(loss.detach()) > 0 and float(layers["3"].weight.grad.abs().max()) > 0 and layers["8"].weight.grad is None
    )


def test_images_are_not_written_into():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, NUM_CLASSES)

        def forward(self, x):
            return self.head(self.conv(x.mul_(2)).relu_().mean((2, 3)))

    module, images = calibrated(as_teacher(Writes()))
    before = images.clone()
    module._teach(images)
    assert torch.equal(images, before)


# ------------------------------------------------------------------------------------------------ frozen channels


@pytest.mark.parametrize("kind", ["plain", "residual", "mlp"])
@pytest.mark.parametrize("share", [0.3, 0.75])
def test_partial_gradients_are_those_of_the_whole(kind, share, counted):
    """Trained channels get the very gradient, frozen ones none, everything else what it got."""
    module, images = calibrated(as_teacher(NETS[kind]()), flip=False)
    student = module._student[0]
    channels = FrozenChannels(list(student.layers.values()), share)
    channels.choose()
    names = [name for name, _ in student.module.named_parameters()]

    def gradients():
        student.module.zero_grad()
        student.module(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in student.module.named_parameters()}

    whole = gradients()
    with channels.partial_gradients():
        part = gradients()
    assert list(part) == names
    for name, layer in student.layers.items():
        frozen, trained = channels.frozen[layer][0], channels.trained[layer]
        assert sorted([*frozen.tolist(), *trained.tolist()]) == list(range(len(layer.weight)))
        assert len(trained) == max(1, round(len(layer.weight) * (1 - share)))
        size = layer.weight.detach().flatten(1).abs().mean(1)
        assert len(frozen) == 0 or float(size[frozen].max()) <= float(size[trained].min())
        expected = whole[f"{name}.weight"].clone()
        if getattr(layer, "groups", 1) == 1:
            expected[frozen] = 0
        torch.testing.assert_close(part[f"{name}.weight"], expected, rtol=1e-4, atol=1e-5)
    for name in names:
        if not name.endswith(".weight") and "weight_quantizer" not in name:
            torch.testing.assert_close(part[name], whole[name], rtol=1e-4, atol=1e-5)


def test_frozen_channels_do_not_move_until_they_are_chosen_again(shared, tmp_path, monkeypatch):
    teacher, dataset, _ = shared
    weights, chosen = [], []
    end, choose = DistillationModule.on_train_batch_end, FrozenChannels.choose

    def watched(self, *arguments):
        end(self, *arguments)
        weights.append([layer.weight.detach().clone() for layer in self.channels.layers])
        chosen[-1] = [self.channels.frozen[layer][0] for layer in self.channels.layers]

    monkeypatch.setattr(DistillationModule, "on_train_batch_end", watched)
    monkeypatch.setattr(FrozenChannels, "choose", lambda self: (choose(self), chosen.append(None))[0])
    run(teacher, dataset, tmp_path, frozen_channels=0.5, refreeze_steps=6)
    assert len(chosen) == 2 and len(weights) == 12
    for before, after in itertools.pairwise(weights[:6]):
        for a, b, frozen in zip(before, after, chosen[0], strict=True):
            moved = (a != b).flatten(1).any(1)
            assert not moved[frozen].any() and moved.any()


# ------------------------------------------------------------------------------------------------ the schedule


def test_the_learning_rate_is_that_of_steps_or_of_time_whichever_is_further(counted, monkeypatch):
    module, _ = calibrated(as_teacher(NETS["plain"]()), max_steps=100, time_limit_s=50.0)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(lightning_distillation.time, "perf_counter", lambda: clock.now)
    module.start = clock.now
    rate = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert rate(0) == 1 and rate(50) == pytest.approx(0.5) and rate(100) == pytest.approx(0)
    clock.now += 25
    assert rate(0) == pytest.approx(0.5) and rate(75) == pytest.approx(0.5 * (1 + math.cos(0.75 * math.pi)))
    module.earlier_s = 12.5  # of an interrupted run before
    assert module.done(0) == 0.75
    module.earlier_s, module.look_s, module.step_s = 0.0, 9.0, 1.0  # have to fit in as well
    assert module.done(0) == 25 / 40
    clock.now += 1000
    assert module.done(0) == 1


def test_a_time_limit_ends_a_run_with_a_look(shared, tmp_path):
    teacher, dataset, _ = shared
    run(teacher, dataset, tmp_path / "warm")  # imports are done
    start = time.perf_counter()
    run(teacher, dataset, tmp_path / "a", max_steps=100_000, time_limit_s=1.5)
    assert time.perf_counter() - start < 3
    kept = torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    assert 1 <= kept["global_step"] < 100_000 and 0 < kept["distillation"]["elapsed_s"] < 3
    run(teacher, dataset, tmp_path / "b", max_steps=100_000, time_limit_s=1e-3)  # one step at a rate of zero
    assert torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_looks_are_taken_at_equal_shares_of_the_run():
    module = DistillationModule.__new__(DistillationModule)
    trainer = SimpleNamespace(global_step=0, val_check_batch=None)
    looks, taken = Looks(4), []
    DistillationModule.done, done = (lambda self, step: min(step / 10, 1.0)), DistillationModule.done
    try:
        for trainer.global_step in range(1, 11):
            looks.on_train_batch_end(trainer, module)
            if trainer.val_check_batch == 1:
                taken.append(trainer.global_step)
    finally:
        DistillationModule.done = done
    assert taken == [3, 5, 8, 10]
    again = Looks(4)
    again.load_state_dict(looks.state_dict())
    assert again.taken == 4


@pytest.mark.parametrize("patience, steps", [(1, 12), (None, 24)])
def test_a_run_that_gets_no_better_stops_in_its_second_half(shared, tmp_path, patience, steps):
    """A ruinous learning rate: the first look is the best one, and what came in is better still."""
    teacher, dataset, _ = shared
    settings = {"max_steps": 24, "checks": 8, "weight_lr": 50.0, "bias_lr": 50.0, "patience": patience}
    student = run(teacher, dataset, tmp_path, **settings)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] in range(steps, steps + 10)
    rounded = Student.from_teacher(teacher, W3A3)
    RoundToNearest(32).quantize(rounded, teacher, dataset, QUANTIZER, QUANTIZER, 0, tmp_path)
    images = settle(NETS["bare"](), seed=5, num_samples=8)
    with torch.no_grad():
        assert torch.equal(student(images), rounded(images))


def test_patience_counts_looks_of_the_first_half_too(monkeypatch):
    stop = Patience(2)
    module = DistillationModule.__new__(DistillationModule)
    done = {"now": 0.1}
    monkeypatch.setattr(DistillationModule, "done", lambda self, step: done["now"])
    trainer = SimpleNamespace(
        should_stop=False,
        fast_dev_run=False,
        global_step=0,
        current_epoch=0,
        sanity_checking=False,
        callback_metrics={},
        state=SimpleNamespace(fn="fit"),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all=True: decision),
    )
    stop._check_on_train_epoch_end = False
    monkeypatch.setattr(Patience, "_should_skip_check", lambda self, trainer: False)
    for share, loss, stops in (
        (0.1, 1.0, 0),
        (0.2, 2.0, 0),
        (0.3, 2.0, 0),
        (0.4, 0.5, 0),
        (0.6, 0.7, 0),
        (0.8, 0.7, 1),
    ):
        done["now"], trainer.callback_metrics = share, {"held_out_loss": torch.tensor(loss)}
        stop.on_validation_end(trainer, module)
        assert trainer.should_stop == bool(stops), (share, loss)
    trainer.should_stop, done["now"] = False, 0.1
    trainer.callback_metrics = {"held_out_loss": torch.tensor(math.nan)}
    stop.on_validation_end(trainer, module)
    assert trainer.should_stop  # nothing comes back from NaN


def test_the_average_of_weights_is_what_is_looked_at_and_kept(shared, tmp_path):
    teacher, dataset, _ = shared
    student = run(teacher, dataset, tmp_path, average=0.9, patience=None, flip=False)
    best = torch.load(next(tmp_path.glob("best*.ckpt")), weights_only=True)["state_dict"]
    for name, tensor in student.module.state_dict().items():
        assert torch.equal(tensor, best[f"student_module.{name}"])
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    names = list(kept["distillation"]["weights"])
    for name, average in zip(names, kept["distillation"]["averages"], strict=True):
        assert torch.equal(kept["state_dict"][name], average)


def test_an_average_is_the_recursion(counted):
    module, _ = calibrated(as_teacher(NETS["plain"]()), average=0.5)
    name, parameter = next(iter(module.trained.items()))
    want = parameter.detach().clone()
    module.step_began = 0.0
    for step in range(1, 12):
        module.trainer.global_step = step
        parameter.data.add_(1.0)
        module.on_train_batch_end()
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * parameter.detach()
    torch.testing.assert_close(module.averages[0], want)
    assert name == "student_module.0.weight"


# ------------------------------------------------------------------------------------------------ networks


def test_a_student_that_has_grids_keeps_them(shared, tmp_path):
    teacher, dataset, _ = shared
    rounded = Student.from_teacher(teacher, W3A3)
    RoundToNearest(32).quantize(rounded, teacher, dataset, QUANTIZER, QUANTIZER, 0, tmp_path)
    for layer in rounded.layers.values():
        layer.weight_quantizer.scale.mul_(1.5)
    before = {name: layer.weight_quantizer.scale.clone() for name, layer in rounded.layers.items()}
    student = run(teacher, dataset, tmp_path, student=rounded, step_lr=1e-12, weight_lr=1e-6, bias_lr=1e-12)
    for name, layer in student.layers.items():
        torch.testing.assert_close(layer.weight_quantizer.scale.detach(), before[name])


class Views(nn.Module):
    """Insists on channels one after the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, NUM_CLASSES)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(x.view(len(x), -1))


@pytest.mark.parametrize("kind, fast", [("plain", True), ("views", False), ("mlp", False)])
def test_memory_is_laid_out_for_convolutions_where_the_network_allows(make_dataset, tmp_path, kind, fast, monkeypatch):
    teacher = as_teacher(Views() if kind == "views" else NETS[kind]())
    dataset, seen = make_dataset(teacher), []
    train = DistillationModule.training_step
    monkeypatch.setattr(
        DistillationModule,
        "training_step",
        lambda self, *a: (seen.append(self.layout is torch.channels_last), train(self, *a))[1],
    )
    student = run(teacher, dataset, tmp_path / "work")
    assert seen == [fast] * len(seen) and seen
    for module in (student.module, teacher.module):
        assert all(p.is_contiguous() for p in module.parameters())


def test_the_folded_teacher_is_the_teacher():
    for kind in ("plain", "residual", "mlp", "bare"):
        teacher = as_teacher(NETS[kind]())
        folded, images = lightning_distillation._folded(teacher), settle(NETS["bare"](), seed=4, num_samples=8)
        has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in teacher.module.modules())
        assert (folded is teacher.module) != has_norms
        with torch.no_grad():
            torch.testing.assert_close(folded(images), teacher(images), rtol=1e-4, atol=1e-4)


def small():
    """A narrower network than the tiny teachers."""
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 12, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, NUM_CLASSES),
    )
    settle(net, seed=7)
    return net


def test_a_smaller_network_is_trained_saved_and_loaded(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("dfq.teachers.factory._import_function", lambda name: small)
    teacher, dataset, _ = shared
    name = "my_networks:small"
    features = {}
    init = DistillationModule.__init__
    monkeypatch.setattr(
        DistillationModule, "__init__", lambda self, s, t, k, f, *a: (features.update(f), init(self, s, t, k, f, *a))[1]
    )
    algorithm = Distillation(**SHORT, student_network=name)
    student, path = quantize(teacher, dataset, W3A3, algorithm, QUANTIZER, QUANTIZER, 0, tmp_path / "student")
    assert features == {"4": "5", "5": "6"}  # of the same shape: 12 channels
    assert sum(p.numel() for p in student.module.parameters()) < sum(p.numel() for p in teacher.module.parameters())
    images = settle(NETS["bare"](), seed=5, num_samples=8)
    for again in (dfq.load_student(path, device="cpu"), Student.load(path, teacher)):
        assert again.network == name and again.teacher["sha256"] == teacher.sha256
        with torch.no_grad():
            assert torch.equal(again(images), student(images)) and again(images).shape == (8, NUM_CLASSES)
    figures = dfq.evaluate(teacher, student, dataset=dataset)["fidelity"]
    assert 0 <= figures["agreement"] <= 1 and figures["kl"] > 0
    assert [layer["name"] for layer in figures["layers"]] == list(student.layers)
    assert all(layer["sqnr_db"] is None and layer["clipped_fraction"] is not None for layer in figures["layers"])
    features.clear()
    run(teacher, dataset, tmp_path / "affinity", student_network=name, feature_loss="affinity")
    assert features == {"2": "2", "4": "5", "5": "6"}  # of the same size, whatever the width
    untrained = Student.from_teacher(as_teacher(small(), seed=7), W3A3)
    RoundToNearest(32).quantize(untrained, teacher, dataset, QUANTIZER, QUANTIZER, 0, tmp_path)
    task = resolve("task", "classification")
    with torch.no_grad():
        wanted = teacher(images)
        assert task.distillation_loss(student(images), wanted) < task.distillation_loss(untrained(images), wanted)


def test_a_smaller_network_is_built_the_same_again_and_is_the_last_step(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("dfq.teachers.factory._import_function", lambda name: NETS["bare"])  # random weights
    teacher, dataset, _ = shared
    sizes = {"student_network": "my_networks:bare", "max_steps": 1, "checks": 1}
    states = [run(teacher, dataset, tmp_path / str(i), **sizes).module.state_dict() for i in range(2)]
    assert hash_tensors(states[0]) == hash_tensors(states[1])
    distillation = {"_target_": "dfq.algorithms.distillation.Distillation", **SHORT, **sizes}
    rungs = resolve("algorithm", "auto", rungs=["round_to_nearest", distillation], budget="60s")
    monkeypatch.setattr("dfq.algorithms.auto._Judge.__call__", lambda _, s: _Figures(float(s.network is None), 0.5))
    student = Student.from_teacher(teacher, W3A3)
    rungs.quantize(student, teacher, dataset, QUANTIZER, QUANTIZER, 0, tmp_path)
    assert student.network == "my_networks:bare"
    steps = resolve("algorithm", "sequence", steps=[distillation, "bias_correction"])
    with pytest.raises(UserError) as error:
        steps.quantize(Student.from_teacher(teacher, W3A3), teacher, dataset, QUANTIZER, QUANTIZER, 0, tmp_path / "s")
    assert str(error.value) == (
        "got algorithm.student_network=my_networks:bare and an algorithm behind it, BiasCorrection; "
        "allowed: the distillation as the last one"
    )


# ------------------------------------------------------------------------------------------------ mistakes


NO_LOSS = (
    "got a distillation without a loss; allowed: at least one of algorithm.kl_weight, algorithm.reverse_kl_weight, "
    "algorithm.jensen_shannon_weight, algorithm.logits_weight, algorithm.label_weight, algorithm.cam_weight, "
    "algorithm.feature_weight above 0"
)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("plain", {"kl_weight": 0.0, "feature_weight": 0.0}, NO_LOSS),
        ("mlp", {"kl_weight": 0.0}, f"{NO_LOSS}, feature_weight not being enough for a network without feature maps"),
        (
            "plain",
            {"blocks_first": 0.3, "feature_weight": 0.0},
            "got algorithm.blocks_first=0.3 without a feature loss; allowed: algorithm.blocks_first=0, or "
            "algorithm.feature_weight above 0 and a network with feature maps; stages that are trained apart have "
            "nothing but their own features to learn from",
        ),
        (
            "mlp",
            {"cam_weight": 2.0},
            "got algorithm.cam_weight=2.0 and mlp, in which no feature map of two dimensions changes its size; "
            "allowed: algorithm.cam_weight=0 for such a network",
        ),
    ],
)
def test_settings_that_do_not_go_together(make_teacher, make_dataset, tmp_path, kind, settings, message):
    teacher = make_teacher(kind)
    with pytest.raises(UserError) as error:
        run(teacher, make_dataset(teacher), tmp_path / "work", **settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "setting, value, allowed",
    [
        ("kl_weight", -1.0, "a number >= 0"),
        ("temperature", 0, "a number > 0"),
        ("feature_loss", "mse", "relative_mse | affinity | qfd"),
        ("feature_bits", 1, "a whole number from 2 to 8"),
        ("label_difficulty", 1.5, "a number from 0 to 1"),
        ("balance", "equal", "fixed | learned"),
        ("intervention", 2, "a number from 0 to 1"),
        ("frozen_channels", 1, "a number from 0 to 0.999"),
        ("average", 1.0, "a number from 0 to 0.999"),
        ("shift", -1, "a whole number >= 0"),
        ("patience", 0, "a whole number >= 1 | null"),
        ("time_limit_s", 0, "a number > 0 | null"),
    ],
)
def test_wrong_values(setting, value, allowed):
    with pytest.raises(UserError) as error:
        resolve("algorithm", "distillation", **{setting: value})
    assert str(error.value).startswith(f"got algorithm.{setting}={value!r}; allowed: {allowed}")


def test_outputs_that_are_no_logits():
    with pytest.raises(
        UserError, match=r"got algorithm.label_weight above 0 and a network whose outputs are no logits"
    ):
        lightning_distillation._logits({"boxes": torch.ones(1)}, "label_weight")


def test_the_yaml_has_every_setting():
    config = load("algorithm", "distillation")
    assert {field.name for field in fields(Distillation)} == config.keys() - {"_target_"}
    assert resolve("algorithm", "distillation") == Distillation()
    assert SPEC.size == (3, 8, 8)


@pytest.mark.parametrize("flip", [True, False])
def test_a_look_is_on_mirror_images_too_where_training_mirrors(flip, shared):
    teacher, dataset, _ = shared
    module, _ = calibrated(teacher, flip=flip)
    student = module._student[0]
    held_out = dataset.split()[1]
    batch = {name: tensor[held_out] for name, tensor in dataset.tensors().items()}
    loss, agreement = module.look(batch)
    images = batch["images"]
    losses, agreements = [], []
    for view in (images, images.flip(-1)) if flip else (images,):
        with torch.no_grad():
            wanted, got = teacher(view).double(), student(view).double()
        p = wanted.softmax(1).numpy()
        losses.append(float((p * (wanted.log_softmax(1) - got.log_softmax(1)).numpy()).sum(1).mean()))
        agreements.append(float((wanted.argmax(1) == got.argmax(1)).double().mean()))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(agreement) == pytest.approx(np.mean(agreements))


class InPlace(nn.Module):
    """Writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.conv(x.sub_(0.5).mul_(2)).relu().mean((2, 3)))


class OnACopy(InPlace):
    def forward(self, x):
        return super().forward(x.clone())


@pytest.mark.parametrize("flip", [True, False])
def test_looks_are_at_what_is_stored_whoever_writes_into_it(flip, counted):
    found = []
    for kind in (InPlace, OnACopy):
        torch.manual_seed(0)
        module, images = calibrated(as_teacher(kind()), flip=flip)
        batch, before = {"images": images}, images.clone()
        found.append(torch.stack([*module.look(batch), module.training_step(batch, 0).detach()]))
        assert torch.equal(images, before)
    assert torch.equal(*found)


def test_blocks_are_fitted_to_what_is_stored_whoever_writes_into_it(make_dataset):
    found = []
    for kind in (InPlace, OnACopy):
        torch.manual_seed(0)
        teacher = as_teacher(kind())
        dataset = make_dataset(teacher, name=kind.__name__)
        settings = {"iterations": 4, "finish_iterations": 6, "batch_size": 8, "sensitivity": "elements"}
        student = dfq.quantize(teacher, dataset, W3A3, algorithm="reconstruction", **settings)
        found.append([layer.weight for layer in student.layers.values()])
    assert all(map(torch.equal, *found))
