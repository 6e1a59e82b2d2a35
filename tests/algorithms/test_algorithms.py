"""Calibration and distillation on tiny networks."""

import pytest
import torch
from conftest import NETS, SPEC, as_teacher, settle
from pytorch_lightning import Callback
from torch import nn

import dfq.lightning.distillation as lightning_distillation
from dfq.algorithms.distillation import Distillation
from dfq.algorithms.round_to_nearest import RoundToNearest
from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.lightning.data import SyntheticDataModule
from dfq.losses.distillation import kl_divergence
from dfq.quantizers.min_max import MinMax
from dfq.quantizers.mse import MSE
from dfq.scheme import Scheme, TensorScheme
from dfq.student import Student
from dfq.teacher import Teacher, hash_tensors

W3A3 = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(3))
W8A8 = Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(8))
SHORT = Distillation(max_steps=24, batch_size=16, checks=4, num_calibration_samples=64)


def images(num_samples=64):
    return settle(NETS["bare"](), seed=3, num_samples=num_samples)


def run(algorithm, teacher, dataset, tmp_path, name="work", scheme=W3A3, seed=0, freeze=True):
    student = Student.from_teacher(teacher, scheme)
    (tmp_path / name).mkdir(exist_ok=True)
    algorithm.quantize(student, teacher, dataset, MSE(num_candidates=20), MSE(num_candidates=20), seed, tmp_path / name)
    return student.freeze() if freeze else student


def divergence(teacher, student, x):
    with torch.no_grad():
        return float(kl_divergence(student(x), teacher(x)))


# ------------------------------------------------------------------------------------------------ calibration


def test_calibration_sees_the_float_networks_activations(make_teacher):
    """Min-max grids have to cover exactly what the float network's layers read, over all batches."""
    teacher = make_teacher("residual")
    student = Student.from_teacher(teacher, W8A8)
    x = images(50)
    seen = {}

    def look(name):
        return lambda _m, args: seen.setdefault(name, []).append(args[0])

    handles = [teacher.module.get_submodule(name).register_forward_pre_hook(look(name)) for name in student.layers]
    with torch.no_grad():
        teacher(x)
    for handle in handles:
        handle.remove()
    elements = calibrate(student, x, MinMax(), MinMax(), batch_size=16)
    for name, layer in student.layers.items():
        values = torch.cat(seen[name])
        low, high = min(float(values.min()), 0), max(float(values.max()), 0)
        assert float(layer.input_quantizer.scale) == pytest.approx((high - low) / 255, rel=1e-4)
        assert elements[f"{name}.input_quantizer"] == values[0].numel()
        assert layer.input_quantizer.enabled and layer.weight_quantizer.enabled
        if low == 0:
            assert int(layer.input_quantizer.zero_point) == 0
        weights = layer.weight.detach().flatten(1).abs().amax(1) / 127
        torch.testing.assert_close(layer.weight_quantizer.scale, weights.clamp(min=torch.finfo(torch.float32).tiny))


def test_calibration_does_not_depend_on_the_batch_size_and_can_be_repeated(make_teacher):
    student = Student.from_teacher(make_teacher("plain"), W3A3)
    found = []
    for batch_size in (64, 64, 7):
        calibrate(student, images(), MSE(), MSE(), batch_size=batch_size)
        found.append({name: float(layer.input_quantizer.scale) for name, layer in student.layers.items()})
    assert found[0] == found[1] and found[2] == pytest.approx(found[0], rel=0.03)


@pytest.mark.parametrize("kind", NETS)
def test_eight_bits_are_close_and_fewer_are_not(make_teacher, make_dataset, tmp_path, kind):
    teacher = make_teacher(kind)
    dataset, x = make_dataset(teacher), images()
    fine, coarse = (
        divergence(teacher, run(RoundToNearest(), teacher, dataset, tmp_path, scheme=s), x) for s in (W8A8, W3A3)
    )
    assert fine < 2e-3 and coarse > 5 * fine


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_network_that_overflows_is_the_users_mistake(make_dataset, make_teacher, bad, tmp_path):
    class Overflows(nn.Module):
        def forward(self, x):
            return x * bad

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Overflows(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UserError, match="NaN or infinite"):
        run(RoundToNearest(), Teacher(net, "classification", SPEC), make_dataset(make_teacher("bare")), tmp_path)


# ------------------------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("kind", ["plain", "mlp"])
def test_distillation_beats_rounding(make_teacher, make_dataset, tmp_path, kind):
    teacher = make_teacher(kind)
    dataset, x = make_dataset(teacher, 160), images()
    rounded = divergence(teacher, run(RoundToNearest(), teacher, dataset, tmp_path, "rounded"), x)
    algorithm = Distillation(max_steps=120, batch_size=16, checks=4, weight_lr=0.05, step_lr=5e-3, bias_lr=2e-3)
    trained = divergence(teacher, run(algorithm, teacher, dataset, tmp_path), x)
    assert trained < 0.7 * rounded


def test_distillation_leaves_the_teacher_and_learns_positive_steps(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("plain")
    dataset, before = make_dataset(teacher), hash_tensors(teacher.module.state_dict())
    wild = Distillation(max_steps=24, batch_size=16, checks=4, step_lr=1.0)  # steps that would go through zero
    student = run(wild, teacher, dataset, tmp_path)
    assert hash_tensors(teacher.module.state_dict()) == before
    assert not any(p.requires_grad for p in teacher.module.parameters()) and not teacher.module.training
    for layer in student.layers.values():
        assert (layer.weight_quantizer.scale > 0).all() and (layer.input_quantizer.scale > 0).all()
    assert torch.isfinite(student(images())).all()


def test_the_teacher_is_no_part_of_a_checkpoint(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("plain")
    run(SHORT, teacher, make_dataset(teacher), tmp_path)
    state = torch.load(tmp_path / "work" / "last.ckpt", weights_only=True)["state_dict"]
    assert state and all(name.startswith("student_module.") for name in state)
    assert not any("running_mean" in name for name in state)  # folded in the student, present in the teacher


def test_the_same_seed_gives_the_same_bits(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher)
    hashes = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # nothing may read the global random numbers
        hashes.append(hash_tensors(run(SHORT, teacher, dataset, tmp_path, f"w{i}", seed=seed).module.state_dict()))
    assert hashes[0] == hashes[1] != hashes[2]


class Stop(Callback):
    """Fails like a killed process would, after ``step`` optimizer steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step >= self.step:
            raise RuntimeError("killed")


def test_an_interrupted_run_goes_on(make_teacher, make_dataset, tmp_path, monkeypatch):
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher)
    steps = []
    train = lightning_distillation.DistillationModule.training_step

    def counted(self, batch, index):
        steps.append(self.trainer.global_step)
        return train(self, batch, index)

    monkeypatch.setattr(lightning_distillation.DistillationModule, "training_step", counted)
    monkeypatch.setattr(
        lightning_distillation.DistillationModule, "configure_callbacks", lambda self: [Stop(14)], raising=False
    )
    with pytest.raises(RuntimeError, match="killed"):
        run(SHORT, teacher, dataset, tmp_path)
    assert max(steps) == 13
    monkeypatch.setattr(
        lightning_distillation.DistillationModule, "configure_callbacks", lambda self: [], raising=False
    )
    steps.clear()
    student = run(SHORT, teacher, dataset, tmp_path)
    assert min(steps) == 12 and max(steps) == 23  # looked at every 6 steps: 12 of the 14 were kept
    assert torch.isfinite(student(images())).all()


def test_a_finished_run_can_be_started_again(make_teacher, make_dataset, tmp_path):
    """Killed between the last step and the student's folder: nothing is left to train, the result is the same."""
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher)
    first = hash_tensors(run(SHORT, teacher, dataset, tmp_path).module.state_dict())
    assert hash_tensors(run(SHORT, teacher, dataset, tmp_path).module.state_dict()) == first


def test_the_best_look_is_kept(make_teacher, make_dataset, tmp_path):
    """A learning rate that ruins the student: what comes out is the best of the looks, not the last."""
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher, 160)
    run(Distillation(max_steps=40, batch_size=16, checks=8, weight_lr=3.0, bias_lr=1.0), teacher, dataset, tmp_path)
    best = next((tmp_path / "work").glob("best*.ckpt"))
    callbacks = torch.load(tmp_path / "work" / "last.ckpt", weights_only=True)["callbacks"]
    state = next(v for k, v in callbacks.items() if "ModelCheckpoint" in k)
    assert state["best_model_path"].endswith(best.name)
    assert float(state["best_model_score"]) <= float(state["current_score"])


class PreActivation(nn.Module):
    """Batch norms that cannot be folded, and dropout."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.drop, self.head = nn.Conv2d(8, 8, 3), nn.Dropout(0.5), nn.Linear(8, 10)

    def forward(self, x):
        x = self.bn(torch.relu(self.conv(x)))
        return self.head(self.drop(self.conv2(x).relu().mean((2, 3))))


def test_synthetic_images_never_move_running_statistics(make_dataset, tmp_path):
    teacher = as_teacher(PreActivation())
    want = {k: v.clone() for k, v in teacher.module.bn.named_buffers()}
    student = run(SHORT, teacher, make_dataset(teacher), tmp_path)
    assert student.surgery.folded == []
    for name, value in student.module.bn.named_buffers():
        assert torch.equal(value, want[name]), name


def test_a_layer_that_saw_only_zeros_does_not_poison_the_others(make_dataset, tmp_path):
    net = NETS["bare"]()
    settle(net)
    net[0].weight.data.mul_(1e-3)
    net[0].bias.data.fill_(-1)  # the second convolution reads zeros in calibration
    teacher = Teacher(net, "classification", SPEC)
    student = run(SHORT, teacher, make_dataset(teacher), tmp_path)
    assert all(torch.isfinite(t).all() for t in student.module.state_dict().values())


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_very_few_samples(make_teacher, make_dataset, tmp_path, num_samples):
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher, num_samples)
    student = run(Distillation(max_steps=4, batch_size=2, checks=2), teacher, dataset, tmp_path)
    assert torch.isfinite(student(images())).all()


def test_fewer_steps_than_looks(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("mlp")
    run(Distillation(max_steps=3, batch_size=16, checks=10), teacher, make_dataset(teacher), tmp_path)
    assert torch.load(tmp_path / "work" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_data_module(make_teacher, make_dataset):
    dataset = make_dataset(make_teacher("bare"), 40)
    module = SyntheticDataModule(dataset.path, batch_size=8, seed=3)
    train = [batch["images"] for batch in module.train_dataloader()]
    again = [batch["images"] for batch in SyntheticDataModule(dataset, batch_size=8, seed=3).train_dataloader()]
    other = [batch["images"] for batch in SyntheticDataModule(dataset, batch_size=8, seed=4).train_dataloader()]
    assert [len(x) for x in train] == [8] * 4
    assert all(map(torch.equal, train, again)) and not all(map(torch.equal, train, other))
    held_out = torch.cat([batch["images"] for batch in module.val_dataloader()])
    assert torch.equal(held_out, dataset.tensors()["images"][9::10])
    seen = {tuple(x.flatten().tolist()) for x in torch.cat(train)}
    assert not seen & {tuple(x.flatten().tolist()) for x in held_out}
