"""Distillation on images drawn anew from the network that is stored with a dataset, and on what it learns meanwhile."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import as_teacher
from pytorch_lightning import Callback

from dfq.algorithms.distillation import Distillation
from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.generators.gdfq import GDFQ
from dfq.generators.zeroq import ZeroQ
from dfq.lightning.distillation import DistillationModule
from dfq.lightning.fresh import FreshImages
from dfq.lightning.trainer import Training
from dfq.pipeline import generate
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student
from dfq.testing import tiny_network

W3A3 = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(3))
GENERATOR = GDFQ(batch_size=24, iterations=4, train_batch_size=8, num_channels=8, num_latents=16)
SHORT = Distillation(max_steps=6, batch_size=8, checks=2, num_calibration_samples=16, patience=None, flip=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    teacher = as_teacher(tiny_network())
    return teacher, generate(teacher, GENERATOR, 24, 5, tmp_path_factory.mktemp("data") / "gdfq")


@pytest.fixture
def seen(monkeypatch):
    """Batches that a run trains on."""
    found, teach = [], DistillationModule._teach
    monkeypatch.setattr(
        DistillationModule, "_teach", lambda self, images: (found.append(images.clone()), teach(self, images))[1]
    )
    return found


def run(made, folder, **settings):
    teacher, dataset = made
    folder.mkdir()
    return go_on(teacher, dataset, folder, **settings)


def go_on(teacher, dataset, folder, **settings):
    student = Student.from_teacher(teacher, W3A3)
    replace(SHORT, **settings).quantize(student, teacher, dataset, MinMax(), MinMax(), 5, folder)
    return student.module.state_dict()


def stored(images, dataset):
    """Which of ``images`` the dataset holds."""
    return [any(torch.equal(image, other) for other in dataset.samples()) for image in images]


def test_a_share_of_every_batch_is_new(made, tmp_path, seen):
    teacher, dataset = made
    run(made, tmp_path / "a", fresh_share=0.4)
    source = GENERATOR.restored(teacher, dataset.source())
    assert len(seen) == 6
    for step, images in enumerate(seen):
        assert stored(images, dataset) == [False] * 3 + [True] * 5
        torch.testing.assert_close(images[:3], source.fresh(teacher, 3, 5, step))


def test_nothing_is_read_where_all_is_new(made, tmp_path, seen):
    run(made, tmp_path / "a", fresh_share=1.0)
    assert not any(stored(torch.cat(seen), made[1]))
    assert len({image.numpy().tobytes() for image in torch.cat(seen)}) == 6 * 8


class Killed(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_a_resumed_run_ends_at_the_bits_of_one_that_was_not_interrupted(made, tmp_path, seen, monkeypatch, weight):
    options = {"fresh_share": 0.5, "adversarial_weight": weight, "adversarial_lr": 0.01}
    whole = run(made, tmp_path / "whole", **options)
    expected = seen[:]
    seen.clear()
    monkeypatch.setattr(DistillationModule, "configure_callbacks", lambda self: [Killed()], raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "parts", **options)
    assert torch.load(tmp_path / "parts" / "last.ckpt", weights_only=True)["global_step"] == 3
    del seen[3:]
    monkeypatch.setattr(DistillationModule, "configure_callbacks", lambda self: [], raising=False)
    resumed = go_on(*made, tmp_path / "parts", **options)
    assert len(seen) == 6 and all(map(torch.equal, seen, expected))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_network_learns_what_the_student_gets_wrong_and_the_student_does_not_notice(made):
    teacher, dataset = made
    student = Student.from_teacher(teacher, W3A3)
    student.module.requires_grad_(True)
    calibrate(student, dataset.samples(), MinMax(), MinMax())
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    distances = {}
    for weight in (0.0, 20.0):
        source = GENERATOR.restored(teacher, dataset.source())
        callback = FreshImages(source, teacher, 1.0, 0, 16, weight, 0.01)
        task = resolve("task", "classification")
        module = DistillationModule(student, teacher, task, {}, Distillation(feature_weight=0.0))
        for step in range(10):
            callback._learn(module, step)
        assert not any(p.requires_grad for p in source.network.parameters())
        with torch.no_grad():
            images = source.fresh(teacher, 100, 1, 0)
            distances[weight] = float(task.distillation_loss(student(images), teacher(images)))
    assert distances[20.0] > 1.3 * distances[0.0], distances
    assert all(p.grad is None and p.requires_grad for p in student.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.module.state_dict().items())


def test_a_step_of_every_process_is_taken_on_the_same_images(made):
    teacher, dataset = made
    student = Student.from_teacher(teacher, W3A3)
    student.module.requires_grad_(True)
    weights, batches = [], []
    for rank in (0, 1):
        source = GENERATOR.restored(teacher, dataset.source())
        callback = FreshImages(source, teacher, 0.5, 0, 8, 1.0, 0.01)
        task = resolve("task", "classification")
        module = DistillationModule(student, teacher, task, {}, Distillation(feature_weight=0.0))
        batch = {"images": dataset.samples(6)}
        callback.on_train_batch_start(SimpleNamespace(global_step=2, global_rank=rank), module, batch, 0)
        weights.append(source.network.state_dict())
        batches.append(batch["images"])
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
    assert not torch.equal(*batches) and torch.equal(batches[0][3:], batches[1][3:])
    assert not torch.equal(weights[0]["embedding"], dataset.source()["embedding"])


def test_what_a_dataset_has_no_network_for(made, tmp_path):
    teacher, _ = made
    dataset = generate(teacher, ZeroQ(batch_size=8, iterations=1), 8, 0, tmp_path / "zeroq")
    with pytest.raises(UserError) as error:
        run((teacher, dataset), tmp_path / "a", fresh_share=0.5)
    assert str(error.value) == (
        f"got algorithm.fresh_share=0.5 and {dataset.path}, with which no network is stored; allowed: a dataset made "
        "by generator=gdfq; generate it with that, into a new folder, or set algorithm.fresh_share=0"
    )
    with pytest.raises(UserError, match=r"adversarial_weight=1.0 and algorithm.fresh_share=0; allowed: algorithm.fre"):
        run(made, tmp_path / "b", adversarial_weight=1.0)
    student = Student.from_teacher(teacher, W3A3)
    algorithm = replace(SHORT, fresh_share=0.5, adversarial_weight=1.0)
    with pytest.raises(UserError, match=r"adversarial_weight=1.0 and trainer=fsdp; allowed"):
        algorithm.quantize(student, *made, MinMax(), MinMax(), 0, tmp_path, Training("fsdp"))
