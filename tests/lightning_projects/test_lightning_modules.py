"""LightningModules in the rest of dfq: ``dfq.quantize``, the teacher loader, and the modules that are derived from."""

import importlib
import logging

import pytest
import pytorch_lightning as pl
import torch
from conftest import NETS, SPEC, as_teacher
from torch import nn

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
    teacher = dfq.load_teacher("lightning", module=f"{__name__}:Classifier", checkpoint=str(path), **PLACE)
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
