"""LightningModules in the rest of dfq: ``dfq.quantize``, the teacher loader, and the modules that are derived from."""

import importlib
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from conftest import NETS, SPEC, as_teacher
from launching import launch
from torch import nn
from torch.utils.data import DistributedSampler

import dfq
from dfq import cli
from dfq.algorithms.distillation import Distillation
from dfq.errors import UserError
from dfq.lightning import DistillationModule, QuantizedModuleMixin, SyntheticDataModule, student_of
from dfq.lightning.quantized import records
from dfq.lightning.settings import DistillationSettings
from dfq.pipeline import quantize
from dfq.quantizers.mse import MSE
from dfq.scheme import Scheme, TensorScheme
from dfq.student import Student
from dfq.tasks._task import task_of
from dfq.teacher import hash_tensors
from dfq.teachers import lightning as loader

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
W4A8 = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8))
PLACE = {"input_size": SPEC.size, "mean": SPEC.mean, "std": SPEC.std}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Classifier(QuantizedModuleMixin, pl.LightningModule):
    def __init__(self, kind="plain", loss=None, needed="given"):
        super().__init__()
        self.save_hyperparameters(ignore=["loss"])
        self.network, self.weights = as_teacher(NETS[kind]()).module, loss

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, _index):
        return self(batch["images"]).square().mean() + 0 * sum(p.sum() for p in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Pair(Classifier):
    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(3, 3)


@pytest.fixture
def saved(tmp_path):
    """A float checkpoint, as a Trainer writes it."""

    def save(module, name="float.ckpt"):
        trainer = pl.Trainer(max_steps=0, enable_checkpointing=False, **QUIET)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / name)
        return tmp_path / name

    return save


# ------------------------------------------------------------------------------------------------ dfq.quantize


def test_a_module_comes_back_quantized(make_dataset, tmp_path, saved):
    module, teacher = Classifier(), as_teacher(NETS["plain"]())
    dataset = make_dataset(teacher)
    before = hash_tensors(module.state_dict())
    options = {"mean": SPEC.mean, "std": SPEC.std, "scheme": W4A8, "algorithm": "round_to_nearest"}
    quantized = dfq.quantize(module, dataset, **options)
    assert hash_tensors(module.state_dict()) == before and type(module) is Classifier
    assert isinstance(quantized, Classifier) and quantized is not module
    student = dfq.quantize(teacher, dataset, scheme=W4A8, algorithm="round_to_nearest")
    x = dataset.samples(8)
    assert torch.equal(quantized.eval()(x), student(x)) and not torch.equal(quantized(x), module.eval()(x))
    assert student_of(quantized).sha256 == student.sha256
    assert student_of(quantized).input_spec == SPEC
    path = saved(quantized, "quantized.ckpt")
    assert dfq.load(path, Classifier).sha256 == student.sha256
    assert torch.equal(Classifier.load_from_checkpoint(path, weights_only=True).eval()(x), student(x))
    trained = pl.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)  # and it can be trained on
    quantized.network.requires_grad_(True)
    trained.fit(quantized.train(), SyntheticDataModule(dataset, batch_size=8))
    assert student_of(quantized).sha256 != student.sha256 and records(quantized)["network"].has_grids
    quantized = dfq.quantize(module, dataset, **options)
    student_of(quantized).save(tmp_path / "student")
    assert torch.equal(Student.load(tmp_path / "student", teacher)(x), student(x))
    assert dfq.load_student(tmp_path / "student", teacher).sha256 == student.sha256


def test_what_is_quantized_has_to_be_named(make_dataset):
    dataset = make_dataset(as_teacher(NETS["plain"]()))
    options = {"mean": SPEC.mean, "std": SPEC.std, "scheme": W4A8, "algorithm": "round_to_nearest"}
    message = r"got a Pair with several networks: network, critic; allowed: attribute=network \| critic \| \.;"
    pair = Pair()
    pair.__class__ = type("Pair", (Pair,), {"forward": pl.LightningModule.forward})
    with pytest.raises(UserError, match=message):
        dfq.quantize(pair, dataset, **options)
    found = dfq.quantize(pair, dataset, attribute="network", **options)
    assert student_of(found).scheme == W4A8 and type(found.critic) is nn.Linear
    with pytest.raises(UserError, match="got a Sequential to quantize; allowed: a Teacher, or a LightningModule"):
        dfq.quantize(NETS["plain"](), dataset)
    with pytest.raises(UserError, match="does not say how its images are normalized; allowed: mean="):
        dfq.quantize(Classifier(), dataset)
    with pytest.raises(UserError, match="got a Classifier in which nothing is quantized"):
        student_of(Classifier())
    with pytest.raises(UserError, match="got a Pair and attribute=critic; allowed: network"):
        student_of(found, "critic")


# ------------------------------------------------------------------------------------------------ the teacher


def test_a_teacher_from_a_lightning_checkpoint(saved):
    module = Classifier("residual")
    path = saved(module)
    place = {**PLACE, "device": "cpu"}
    teacher = dfq.load_teacher("lightning", module=f"{__name__}:Classifier", checkpoint=str(path), **place)
    assert hash_tensors(teacher.module.state_dict()) == hash_tensors(module.network.state_dict())
    assert teacher.task == "classification" and teacher.input_spec == SPEC and not teacher.module.training
    whole = loader.load(f"{__name__}:Classifier", str(path), "classification", attribute=".", **PLACE)
    x = teacher.example()
    assert isinstance(whole.module, Classifier) and torch.equal(whole(x), teacher(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"module": f"{__name__}:Nothing"}, r"got teacher\.module=.*:Nothing, and .* has no Nothing"),
        ({"module": "os:getcwd"}, r"got teacher\.module=os:getcwd; allowed: package\.module:Class of your own"),
        ({"module": "conftest:Residual"}, r"got teacher\.module=conftest:Residual, which is no LightningModule"),
        ({"checkpoint": "nowhere.ckpt"}, r"got teacher\.checkpoint=nowhere\.ckpt, which does not exist"),
        ({"attribute": "net"}, r"got attribute=net and a Classifier, which has no such part; allowed: network"),
        ({"kwargs": {"kind": "mlp"}}, r"got teacher\.checkpoint=.* and a Classifier that it does not fit"),
        ({"adapter": "a:B"}, r"got teacher\.adapter=a:B and teacher\.task=classification"),
    ],
)
def test_teachers_that_do_not_work(saved, options, message):
    options = {"module": f"{__name__}:Classifier", "checkpoint": str(saved(Classifier())), **options}
    with pytest.raises(UserError, match=message) as error:
        loader.load(task="classification", **options, **PLACE)
    assert "\n" not in str(error.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return importlib.import_module("os").mkdir, (str(self.path),)


def test_checkpoints_are_not_unpickled(saved, tmp_path):
    path = saved(Classifier())
    content = torch.load(path, weights_only=True)
    torch.save({**content, "hyper_parameters": {"kind": Bomb(tmp_path / "executed")}}, path)
    with pytest.raises(UserError, match="which holds pickled objects, and dfq never unpickles"):
        loader.load(f"{__name__}:Classifier", str(path), "classification", **PLACE)
    assert not (tmp_path / "executed").exists()
    torch.save(Classifier().network.state_dict(), path)
    with pytest.raises(UserError, match=r"which no Trainer wrote; allowed: a \.ckpt file of a Trainer"):
        loader.load(f"{__name__}:Classifier", str(path), "classification", **PLACE)
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"which can't be read|holds pickled objects"):
        loader.load(f"{__name__}:Classifier", str(path), "classification", **PLACE)


def test_the_command_line_knows_the_loader(capsys):
    assert cli.main(["generate", "teacher=lightning", "teacher.module=no_such_module:Class"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dfq: got ") and "teacher." in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------ to derive from


def distillation(teacher, make_dataset, kind=DistillationModule, **settings):
    dataset = make_dataset(teacher)
    student = Student.from_teacher(teacher, W4A8)
    from dfq.calibration import calibrate

    calibrate(student, dataset.samples(16), MSE(), MSE())
    student.module.requires_grad_(True)
    module = kind(student, teacher, task_of(teacher), {}, DistillationSettings(max_steps=3, **settings))
    trainer = pl.Trainer(max_steps=3, enable_checkpointing=False, **QUIET)
    trainer.fit(module, SyntheticDataModule(dataset, batch_size=8))
    return module, trainer


def test_modules_are_derived_from(make_teacher, make_dataset):
    class Mine(DistillationModule):
        def configure_optimizers(self):
            return torch.optim.RMSprop(self.student_module.parameters(), 1e-4)

        def training_step(self, batch, index):
            return 2 * super().training_step(batch, index)

    _, trainer = distillation(make_teacher(), make_dataset, Mine)
    assert isinstance(trainer.optimizers[0], torch.optim.RMSprop) and trainer.global_step == 3

    class Twice(SyntheticDataModule):
        def train_dataloader(self):
            return [super().train_dataloader()] * 2

    data = Twice(make_dataset(make_teacher(), name="other"), batch_size=8)
    assert isinstance(data, Twice) and len(data.train_dataloader()) == 2


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_distillation_module_of_public_names_in_either_package(package, make_dataset, tmp_path):
    """As docs/lightning.md has it, with a loss of one's own; neither package takes its methods for overridden ones."""
    found = pytest.importorskip(package, reason="pip install lightning")
    importlib.import_module("pytorch_lightning")
    teacher = dfq.load_teacher(NETS["plain"](), task="classification", device="cpu", **PLACE)
    dataset = make_dataset(as_teacher(teacher.module))

    class Mine(dfq.lightning.DistillationModule):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss + 1e-3 * sum(p.square().mean() for p in self.student_module.parameters())

    student = dfq.lightning.student_to_train(teacher, dataset, scheme="w4a4", num_calibration_samples=16)
    module = Mine(student, teacher, settings=dfq.lightning.DistillationSettings(max_steps=6))
    assert isinstance(module, found.LightningModule) and isinstance(module, Mine)
    before = hash_tensors(student.module.state_dict())
    trainer = found.Trainer(max_steps=6, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, SyntheticDataModule(dataset, batch_size=8))
    assert trainer.global_step == 6 and "held_out_loss" in trainer.callback_metrics
    assert hash_tensors(student.module.state_dict()) != before
    overridden = importlib.import_module(f"{package}.utilities.model_helpers").is_overridden
    hooks = ("configure_sharded_model", "train_dataloader", "predict_step", "lr_scheduler_step")
    assert overridden("training_step", module) and not any(overridden(name, module) for name in hooks)
    again = Mine(student, teacher, settings=dfq.lightning.DistillationSettings(max_steps=8))
    # without a loader of validation batches, from a checkpoint
    other = found.Trainer(max_steps=8, default_root_dir=tmp_path, **QUIET)
    checkpoint = trainer.checkpoint_callback.best_model_path
    other.fit(again, SyntheticDataModule(dataset, batch_size=8).train_dataloader(), ckpt_path=checkpoint)
    assert other.global_step == 8
    student.freeze()
    with pytest.raises(UserError, match="got a student of which nothing is trained; allowed: "):
        Mine(student, teacher)
    student.save(tmp_path / "student")
    assert dfq.load_student(tmp_path / "student", teacher).sha256 == student.sha256


def test_students_to_train():
    with pytest.raises(UserError, match="got scheme=mixed, whose bits are chosen layer by layer"):
        dfq.lightning.student_to_train(as_teacher(NETS["plain"]()), None, scheme="mixed")


def test_what_is_of_both_packages_can_be_sent_to_a_process(make_teacher, make_dataset):
    pytest.importorskip("lightning.pytorch", reason="pip install lightning")
    data = SyntheticDataModule(make_dataset(make_teacher()), batch_size=8, seed=5)
    read = pickle.loads(pickle.dumps(data))
    assert type(read) is type(data) and read.seed == 5 and read.train_indices == data.train_indices


class Squared:
    calls = 0

    def __call__(self, output, target):
        Squared.calls += 1
        return (output - target).square().mean()


def test_losses_and_optimizers_by_config(make_teacher, make_dataset, tmp_path):
    options = {"loss": Squared(), "loss_weight": 5.0, "optimizer": {"name": "torch.optim.SGD", "lr": 0.0}}
    module, trainer = distillation(make_teacher(), make_dataset, kl_weight=0.0, **options)
    assert module.terms == {"loss": 5.0} and Squared.calls == 3
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["lr"] == 0
    assert len(optimizer.param_groups[0]["params"]) == len(module.trained)
    teacher = make_teacher()
    for wrong, message in [
        ({"name": "torch.optim.SGD", "rate": 1}, r"got algorithm\.optimizer=.*which torch\.optim\.SGD does not take"),
        ({"name": "torch.optim.SDG", "lr": 1}, r"torch\.optim\.SDG.*did you mean 'SGD'"),
        ({"lr": 1}, r"got algorithm\.optimizer\.name\._target_='None'; allowed: package\.module\.Name"),
    ]:
        with pytest.raises(UserError, match=message):
            distillation(teacher, make_dataset, optimizer=wrong)
    with pytest.raises(UserError, match=r"got algorithm\.loss=3; allowed: "):
        distillation(teacher, make_dataset, loss=3)
    # A rate of zero leaves the weights where rounding to nearest puts them.
    method = Distillation(max_steps=2, checks=1, optimizer={"name": "torch.optim.SGD", "lr": 0.0}, batch_size=8)
    dataset = make_dataset(teacher)
    student, _ = quantize(teacher, dataset, W4A8, method, MSE(), MSE(), 0, tmp_path / "s")
    assert student.settings["algorithm"]["optimizer"] == {"name": "torch.optim.SGD", "lr": 0.0}


def rank_of(dataset, rank, world_size=2, batch_size=4):
    data = SyntheticDataModule(dataset, batch_size=batch_size, seed=3)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data.train_dataloader()


def rows(batches):
    return [batch["images"].double().sum((1, 2, 3)).tolist() for batch in batches]


def test_processes_of_any_trainer_share_the_order_of_the_seed(make_teacher, make_dataset):
    dataset = make_dataset(make_teacher(), 40)
    loaders = [rank_of(dataset, rank) for rank in (0, 1)]
    one = rows(rank_of(dataset, 0, 1, 8))
    assert not isinstance(rank_of(dataset, 0, 1).sampler, DistributedSampler)  # Lightning may share it out
    assert all(isinstance(loader.sampler, DistributedSampler) for loader in loaders)  # no other is put in its place
    for epoch in range(2):
        parts = [rows(loader) for loader in loaders]
        both = [sorted(x + y) for x, y in zip(*parts, strict=True)]
        assert (both == [sorted(row) for row in one]) == (epoch == 0), "the seed's order, and another in the next epoch"
        assert len({sample for step in both for sample in step}) == 32, "no sample comes twice"


@pytest.mark.parametrize("replaced", [False, True])
def test_an_epoch_goes_on_in_its_middle(replaced, make_teacher, make_dataset):
    """Also with another sampler in the place of its own, which Lightning puts there for a loader without a trainer."""
    dataset = make_dataset(make_teacher(), 40)

    def loader():
        found = rank_of(dataset, 1)
        if replaced:
            sampler = DistributedSampler(found.dataset, 2, 1, seed=3)
            found = type(found)(found.dataset, 4, sampler=sampler, collate_fn=found.collate_fn)
        return found

    first, resumed = loader(), loader()
    whole = rows(loader())
    batches = iter(first)
    assert rows([next(batches)]) == whole[:1]
    resumed.load_state_dict(first.state_dict())
    assert rows(resumed) == whole[1:]


@pytest.mark.slow
def test_two_processes_of_a_users_trainer(tmp_path, make_teacher, make_dataset):
    """They see what one with twice the batch sees, also where the run is interrupted in the middle of an epoch."""
    dataset = make_dataset(make_teacher(), 40)
    script = str(Path(__file__).parent / "batches_in_ranks.py")

    def seen(name, world_size, batch_size, *steps):
        launch(
            [script, str(dataset.path), str(tmp_path / name), str(batch_size), *map(str, steps)], world_size, tmp_path
        )
        parts = [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in range(world_size)]
        return [sorted(sample for part in step for sample in part) for step in zip(*parts, strict=True)]

    one = seen("one", 1, 8, 7)
    assert len(one) == 7 and one[0] != one[4]
    assert seen("two", 2, 4, 7) == one and seen("resumed", 2, 4, 2, 7) == one


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_data_module_is_one_of_both_packages(package, make_teacher, make_dataset):
    found = pytest.importorskip(package, reason="pip install lightning")
    data = SyntheticDataModule(make_dataset(make_teacher()), batch_size=8)
    assert isinstance(data, found.LightningDataModule) and type(data).__name__ == "SyntheticDataModule"

    class Module(found.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = NETS["plain"]()

        def training_step(self, batch, _index):
            return self.network(batch["images"]).square().mean()

        def validation_step(self, batch, _index):
            self.log("loss", self.network(batch["images"]).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    trainer = found.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Module(), datamodule=data)
    assert trainer.global_step == 4 and "loss" in trainer.callback_metrics
