"""QuantizationCallback: each of its options against an independent computation, and what it may not leave behind."""

import copy
import logging
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import NETS, as_teacher, settle
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dfq
from dfq.calibration import calibrate, calibration_images
from dfq.errors import UserError
from dfq.lightning import QuantizationCallback, QuantizedModuleMixin, SyntheticDataModule, student_of
from dfq.lightning.callback import _graph
from dfq.lightning.quantized import KEY, records
from dfq.quantizers.min_max import MinMax
from dfq.quantizers.mse import MSE
from dfq.scheme import Scheme, TensorScheme
from dfq.student import Student
from dfq.teacher import hash_tensors

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
W4A8 = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8))


def network(kind="plain"):
    return as_teacher(NETS[kind]()).module.requires_grad_(True)


IMAGES = settle(NETS["bare"](), seed=3, num_samples=32)
LABELS = torch.arange(32) % 10


def loader(batch_size=8):
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=batch_size)


class Plain(pl.LightningModule):
    """Notes the loss of each step, and whether the network was quantized in it."""

    def __init__(self, kind="plain", lr=0.0):
        super().__init__()
        self.save_hyperparameters()
        self.network = network(kind)
        self.losses, self.quantized = [], []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, _index):
        self.quantized.append(bool(records(self)) and records(self)["network"].has_grids)
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_before_backward(self, loss):
        self.losses.append(float(loss))

    def validation_step(self, batch, _index):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class Mixed(QuantizedModuleMixin, Plain):
    pass


def fit(module, callback, *callbacks, epochs=1, batches=None, **options):
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks] if callback is None else [*callbacks, callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, batches or loader())
    return trainer


def independent(module, scheme, images, quantizer):
    """A student made beside the module's network, with ranges from ``images``."""
    teacher = as_teacher(NETS[module.hparams.kind]())
    assert hash_tensors(teacher.module.state_dict()) == hash_tensors(network(module.hparams.kind).state_dict())
    student = Student.from_teacher(teacher, scheme)
    calibrate(student, images, quantizer, quantizer)
    return student


# ------------------------------------------------------------------------------------------------ ranges


@pytest.mark.parametrize("policy", ["all", "hardware"])
def test_ranges_are_those_of_a_student_of_the_same_samples(policy, make_dataset):
    module = Plain()
    dataset = make_dataset(as_teacher(NETS["plain"]()))
    callback = QuantizationCallback(W4A8, dataset.path, policy=policy, num_calibration_samples=20)
    fit(module, callback)
    student = independent(module, callback.scheme, calibration_images(dataset, 20), MSE())
    assert student_of(module).sha256 == student.freeze().sha256
    assert module.quantized == [True] * 4


def test_ranges_of_a_dataloader_are_those_of_its_first_samples():
    module = Plain()
    fit(module, QuantizationCallback(W4A8, loader(), num_calibration_samples=12))
    assert student_of(module).sha256 == independent(module, W4A8, IMAGES[:12], MSE()).freeze().sha256


def test_ranges_of_the_first_batches_are_those_of_what_went_through_the_network():
    """With a learning rate of zero and min-max, which sees the same in one pass as in several."""
    module = Plain("bare")  # without batch norm: training and evaluation are the same
    options = {"weight_quantizer": "min_max", "activation_quantizer": "min_max"}
    fit(module, QuantizationCallback(W4A8, num_calibration_batches=3, **options))
    student = independent(module, W4A8, IMAGES[:24], MinMax())
    assert student_of(module).sha256 == student.freeze().sha256
    assert module.quantized == [False] * 3 + [True]


def test_fewer_batches_than_asked_for_do():
    module = Plain("bare")
    fit(module, QuantizationCallback(W4A8, num_calibration_batches=100))
    assert module.quantized == [False] * 4 and student_of(module).has_grids


def test_a_loader_is_not_used_up_and_the_order_of_samples_stays(make_dataset):
    dataset = make_dataset(as_teacher(NETS["plain"]()))

    class Notes(Plain):
        def training_step(self, batch, _index):
            images = batch["images"] if isinstance(batch, dict) else batch[0]
            self.losses.append(float(images.double().sum()))
            return self(images).square().mean()

        def on_before_backward(self, loss):
            pass

    def seen(quantized, batches):
        module = Notes()
        pl.seed_everything(0, verbose=False)
        fit(module, QuantizationCallback(W4A8, batches) if quantized else None, batches=batches, epochs=2)
        return module.losses

    for make in (
        lambda: SyntheticDataModule(dataset, batch_size=8, seed=1).train_dataloader(),
        lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True),
    ):
        assert seen(True, make()) == seen(False, make())


def test_the_network_is_what_it_was_until_start_step():
    module, plain = Plain("bare", lr=0.05), Plain("bare", lr=0.05)
    fit(plain, None, epochs=2)
    fit(module, QuantizationCallback("w4a4", loader(), start_step=5), epochs=2)
    assert module.quantized == [False] * 5 + [True] * 3
    np.testing.assert_allclose(module.losses[:5], plain.losses[:5], rtol=1e-5)
    assert not np.allclose(module.losses[5:], plain.losses[5:], rtol=1e-4)


def test_steps_are_the_optimizers():
    module = Plain("bare")
    fit(module, QuantizationCallback("w4a4", loader(), start_step=2), epochs=2, accumulate_grad_batches=2)
    assert module.quantized == [False] * 4 + [True] * 4


class Scales(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        parts = records(pl_module)["network"].module.state_dict()
        self.seen.append(torch.cat([v.flatten() for k, v in parts.items() if k.endswith("_quantizer.scale")]))


@pytest.mark.parametrize("gradient", ["lsq", "lsq_plus", "stable"])
def test_steps_are_learned_until_freeze_step(gradient):
    module, scales = Plain("bare", lr=0.5), Scales()
    callback = QuantizationCallback("w4a4", loader(), gradient=gradient, freeze_step=4)
    trainer = fit(module, callback, scales, epochs=2)
    learned = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    assert {id(p) for p in named.values()} == learned
    assert any(name.endswith("zero_point") for name in named) == (gradient == "lsq_plus")
    first, last = scales.seen[0], scales.seen[4]
    assert not torch.equal(first, last) and all(torch.equal(last, later) for later in scales.seen[5:])
    assert not torch.equal(last, scales.seen[3]) and (last > 0).all()


def test_a_learned_step_never_changes_its_sign():
    module = Plain("bare", lr=1e4)  # a learning rate that throws everything about
    fit(module, QuantizationCallback("w4a4", loader(), gradient="lsq"), gradient_clip_val=1.0)
    values = [p for name, p in module.named_parameters() if name.endswith("_quantizer.scale")]
    assert values and all((p > 0).all() for p in values)


def test_ranges_are_chosen_anew_until_freeze_step():
    class Growing(Plain):
        def on_train_batch_start(self, *_):
            with torch.no_grad():
                self.network[0].weight.mul_(2)

    for every, wanted in ((2, [2, 4]), (1, [1, 2, 3, 4, 5])):  # seen when the next one begins; not after 6
        module, scales = Growing("bare"), Scales()
        fit(module, QuantizationCallback("w4a4", loader(), refresh_steps=every, freeze_step=6), scales, epochs=3)
        first = torch.stack([seen[:1] for seen in scales.seen]).flatten()
        assert (first[1:] != first[:-1]).nonzero().flatten().tolist() == wanted


@pytest.mark.parametrize("first_batches", [False, True])
def test_ranges_are_chosen_anew_with_several_optimizers(first_batches):
    """Two steps a batch, seen at odd numbers alone: no multiple of the interval is among them."""

    class Odd(Manual):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            with torch.no_grad():
                self.network[0].weight.mul_(2)
            if self.trainer.global_step == 2:
                self.optimizers()[0].step()

    module, scales = Odd(), Scales()
    options = {"num_calibration_batches": 2} if first_batches else {"dataset": loader()}
    fit(module, QuantizationCallback("w4a4", attribute="network", refresh_steps=4, **options), scales, epochs=2)
    first = torch.stack([seen[0] for seen in scales.seen])
    changed = (first[1:] != first[:-1]).nonzero().flatten().tolist()  # steps before each batch: 0, 3, 5, 7, 9, ...
    assert changed == ([1, 2, 4, 6] if first_batches else [2, 4, 6])


def test_a_resumed_run_chooses_ranges_when_the_whole_one_does(tmp_path):
    class Growing(Mixed):
        def on_train_batch_start(self, *_):
            with torch.no_grad():
                self.network[0].weight.mul_(2)

    def run(epochs, **options):
        module, scales = Growing("bare"), Scales()
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=[QuantizationCallback("w4a4", loader(), refresh_steps=3), scales],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, loader(), weights_only=True, **options)
        return trainer, [float(seen[0]) for seen in scales.seen]

    _, whole = run(3)
    half, first = run(2)
    half.save_checkpoint(tmp_path / "x.ckpt")
    _, rest = run(3, ckpt_path=tmp_path / "x.ckpt")
    assert first + rest == whole and len(set(whole)) == 4
    again = Mixed.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert fit(again, None).callback_metrics is not None  # without the callback too


# ------------------------------------------------------------------------------------------------ distillation


def test_the_distillation_loss_is_added_to_that_of_the_step():
    module = Plain("bare")
    seen = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.callback_metrics["distillation_loss"]))

    callback = QuantizationCallback(
        "w4a4", loader(), distill=True, temperature=2.0, distill_weight=3.0, features=["2"], feature_weight=0.5
    )
    fit(module, callback, Notes())
    teacher, student = network("bare"), records(module)["network"].module
    for batch, (loss, noted) in enumerate(zip(module.losses, seen, strict=True)):
        x, labels = IMAGES[8 * batch : 8 * batch + 8], LABELS[8 * batch : 8 * batch + 8]
        with torch.no_grad():
            mine, theirs = student(x).double().numpy(), teacher(x).double().numpy()
            got, wanted = student[:3](x).double().numpy(), teacher[:3](x).double().numpy()
        p, q = (np.exp(v / 2) / np.exp(v / 2).sum(1, keepdims=True) for v in (theirs, mine))
        kl = 4 * (p * np.log(p / q)).sum(1).mean() + 0.5 * ((got - wanted) ** 2).sum() / (wanted**2).sum()
        task = -np.log((np.exp(mine) / np.exp(mine).sum(1, keepdims=True))[np.arange(8), labels.numpy()]).mean()
        assert noted == pytest.approx(kl, rel=1e-4)
        assert loss == pytest.approx(task + 3 * kl, rel=1e-4)


class Manual(Plain):
    """Two losses of which one does not come from the network's forward."""

    def __init__(self):
        super().__init__("bare")
        self.automatic_optimization = False
        self.other = nn.Linear(10, 1)
        self.graded = []

    def training_step(self, batch, _index):
        first, second = self.optimizers()
        outputs = self.network(batch[0])
        for optimizer, loss in ((first, outputs.square().mean() * 0), (second, self.other(outputs.detach()).mean())):
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.graded.append(
                (float(loss), sum(float(p.grad.abs().sum()) for p in optimizer.param_groups[0]["params"]))
            )
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.0) for part in (self.network, self.other)]


def test_manual_backward_gets_it_where_the_loss_comes_from_the_network():
    module = Manual()
    fit(module, QuantizationCallback("w4a4", loader(), attribute="network", distill=True))
    graded = [gradient for _, gradient in module.graded[::2]]
    assert min(graded) > 0  # of a loss that is zero: what is there is the distillation's
    apart = Manual()
    fit(apart, QuantizationCallback("w4a4", loader(), attribute="network"))
    assert max(gradient for _, gradient in apart.graded[::2]) == 0
    torch.manual_seed(0)
    assert all(gradient > 0 for _, gradient in module.graded[1::2])


def distilled(step, attribute=None, **options):
    """The distillation losses of a fit whose ``training_step`` is ``step(module, images)``."""
    module, seen = Plain("bare"), []
    module.training_step = lambda batch, _i, m=module: step(m, batch[0])

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.callback_metrics.get("distillation_loss"))

    options = {"distill": True, **options}
    fit(module, QuantizationCallback("w4a4", loader(), attribute=attribute, **options), Notes())
    return seen


@pytest.mark.parametrize("attribute", [None, "."])
@pytest.mark.filterwarnings("error:QuantizationCallback")
def test_a_forward_counts_by_either_of_its_names(attribute):
    if attribute is None:
        ways = [lambda m, x: m.network(x).mean(), lambda m, x: m.network.forward(x).mean()]
    else:
        ways = [lambda m, x: m(x).mean(), lambda m, x: m.forward(x).mean()]
    by_call, by_name = (distilled(step, attribute, features=["2"] if attribute is None else []) for step in ways)
    assert len(by_name) == 4 and all(loss > 0 for loss in by_name) and by_name == by_call


@pytest.mark.parametrize(
    "step",
    [
        lambda m, x: m.network[1:](m.network[0](x)).mean(),  # part by part
        lambda m, x: m.network(x).detach().mean() + m.network[0].weight.sum(),
    ],
)
def test_a_distillation_of_nothing_is_said(step):
    with pytest.warns(
        UserWarning, match=r"added nothing to the losses of Plain: none of the first 4 .* network's forwa"
    ):
        assert distilled(step) == [None] * 4
    with pytest.warns(UserWarning, match="none of the first 10 quantized steps") as found:
        module = Plain("bare")
        module.training_step = lambda batch, _i, m=module: step(m, batch[0])
        fit(module, QuantizationCallback("w4a4", loader(), distill=True), epochs=6)
    assert sum("added nothing" in str(warning.message) for warning in found) == 1


@pytest.mark.parametrize("distill", [True, "mse", lambda mine, theirs: (mine * mine * theirs).mean()])
def test_what_is_done_to_an_output_does_not_change_its_distillation(distill):
    """Masks of logits are written in place. The last part's output is the network's own."""

    def masked(module, x):
        outputs = module.network(x)
        outputs[:, 0] = -1e4
        return outputs[:, 1:].mean()

    options = {"distill": distill, "features": [str(len(network("bare")) - 1)]}
    losses = [distilled(s, **options) for s in (masked, lambda m, x: m.network(x)[:, 1:].mean())]
    assert losses[0] == losses[1]


class Both(Plain):
    """Two networks of which one goes through the other."""

    def __init__(self):
        super().__init__("bare")
        self.second = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 5))

    def training_step(self, batch, _index):
        return self.second(self.network(batch[0])).square().mean()


def test_two_networks_of_a_module_are_distilled(tmp_path):
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    rows = DataLoader(TensorDataset(logits), batch_size=4)

    def callbacks():
        return [
            QuantizationCallback("w4a4", loader(), attribute="network", distill=True),
            QuantizationCallback("w4a4", rows, attribute="second", distill="mse", distill_weight=2.0),
        ]

    module = Both()
    before = module.training_step
    trainer = fit(module, None, *callbacks(), epochs=2)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found.keys() == {"distillation_loss_network", "distillation_loss_second"}
    assert all(value > 0 for value in found.values()) and module.training_step == before
    assert not {"training_step", "manual_backward", "forward"} & vars(module).keys()
    assert "forward" not in {**vars(module.network), **vars(module.second)}
    x = IMAGES[24:]
    with torch.no_grad():
        task = float(module.second(module.network(x)).square().mean())
    added = found["distillation_loss_network"] + 2 * found["distillation_loss_second"]
    assert module.losses[-1] == pytest.approx(task + added, rel=1e-4)
    fit(module, None, *callbacks())  # and again


def test_the_teacher_goes_back_to_where_it_was():
    class Moved(nn.Sequential):
        def to(self, device):
            moves.append(str(device))
            return self

    moves = []
    fit(Plain("bare"), QuantizationCallback("w4a4", loader(), distill=True, teacher=Moved(*network("bare"))))
    assert moves == ["cpu", "cpu"]


def test_a_graph_is_what_a_loss_depends_on():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    x, y = a * 2, b * 3
    found = _graph((x + 1).sum())
    assert x.grad_fn in found and y.grad_fn not in found
    assert _graph(torch.ones(1)) == set()


def test_the_teacher_is_in_no_checkpoint_and_no_parameter(tmp_path):
    sizes = []
    for distill in (False, True):
        module = Plain()
        trainer = fit(module, QuantizationCallback("w4a4", loader(), distill=distill), enable_checkpointing=True,
                      default_root_dir=tmp_path)  # fmt: skip
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        sizes.append((tmp_path / "x.ckpt").stat().st_size)
        assert len(list(module.parameters())) == 6 and len(module.state_dict()) == 3 * 2 + 3 * 4
    assert abs(sizes[0] - sizes[1]) < 100


def test_a_copy_of_the_module_shares_its_teacher():
    module = Plain()
    fit(module, QuantizationCallback("w4a4", loader(), distill=True))
    assert copy.deepcopy(module).float_networks["network"] is module.float_networks["network"]


# ------------------------------------------------------------------------------------------------ Lightning's callbacks


@pytest.mark.parametrize("order", ["before", "behind"])
@pytest.mark.parametrize("gradient", ["straight_through", "lsq"])
def test_moving_averages_of_weights(order, gradient):
    average = EMAWeightAveraging(decay=0.5)
    module, twin = Plain("bare", lr=0.05), []

    class Twin(pl.Callback):
        """The average by hand, of what it should be of."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            now = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            twin.append(now if not twin else {n: 0.5 * twin[-1][n] + 0.5 * now[n] for n in now})

    callback = QuantizationCallback("w4a4", num_calibration_batches=2, gradient=gradient)
    others = [average, Twin()] if order == "before" else [Twin()]
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[*others, callback, *([average] if order == "behind" else [])],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    grids = []

    class Grids(pl.Callback):
        def on_train_epoch_end(self, _trainer, pl_module):
            grids.append({k: v.clone() for k, v in pl_module.state_dict().items() if "_quantizer" in k})

    trainer.callbacks.append(Grids())
    trainer.fit(module, loader())
    names = [name for name in twin[-1] if "_quantizer" not in name]
    for name in names:
        torch.testing.assert_close(dict(module.named_parameters())[name], twin[-1][name])
    state = module.state_dict()
    if gradient == "straight_through":  # grids are no averages: of ones, before they were chosen
        assert all(torch.equal(state[key], grids[-1][key]) for key in grids[-1])
    assert all(float(state[key].min()) > 0 and float(state[key].max()) < 1 for key in state if key.endswith("scale"))


def test_stochastic_weight_averaging(tmp_path):
    for callbacks in ("before", "behind"):
        module, average = Plain("bare", lr=0.05), StochasticWeightAveraging(0.05, swa_epoch_start=2)
        mine = QuantizationCallback("w4a4", loader())
        order = [average, mine] if callbacks == "before" else [mine, average]
        fit(module, None, *order, epochs=3)
        assert len(list(average._average_model.parameters())) == len(list(module.parameters()))
        assert records(module)["network"].has_grids and math.isfinite(module.losses[-1])


# ------------------------------------------------------------------------------------------------ precision, compile


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])  # on a CPU Lightning makes the former of the latter
def test_mixed_precision(precision):
    module = Plain("bare", lr=0.01)
    fit(module, QuantizationCallback("w4a4", num_calibration_batches=1, distill=True), precision=precision)
    assert all(map(math.isfinite, module.losses)) and module.quantized[-1]
    assert all(p.dtype == torch.float32 for p in module.parameters())
    scales = [v for key, v in module.state_dict().items() if key.endswith("scale")]
    assert all(v.dtype == torch.float32 and torch.isfinite(v).all() and (v != 1).any() for v in scales)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["network", "module"])
@pytest.mark.parametrize("ranges", ["dataset", "first batches"])
def test_compiled_modules_compute_the_same(what, ranges, backend):
    losses = []
    for compiled in (False, True):
        module = Plain(lr=0.05)
        if compiled and what == "network":
            module.network = torch.compile(module.network, backend=backend)
        given = torch.compile(module, backend=backend) if compiled and what == "module" else module
        module.training_step = lambda batch, _i, m=module: F.cross_entropy(m.network(batch[0]), batch[1])
        options = {"dataset": loader()} if ranges == "dataset" else {"num_calibration_batches": 2}
        fit(given, QuantizationCallback("w4a4", distill=what == "network", **options))
        losses.append(module.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "what, options",
    [
        ("module", {"distill": True}),
        ("network", {"distill": True, "features": ["0"]}),
        ("network", {"refresh_steps": 2}),
        ("network", {"start_step": 2}),
    ],
)
def test_what_cannot_be_done_with_a_compiled_module_is_said(what, options):
    module = Plain()
    if what == "network":
        module.network = torch.compile(module.network, backend="eager")
    given = torch.compile(module, backend="eager") if what == "module" else module
    with pytest.raises(UserError, match=r"got a compiled .*, which look into it; allowed: "):
        fit(given, QuantizationCallback("w4a4", **options))


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_of_weights_alone_has_the_scheme(tmp_path):
    module = Mixed(lr=0.01)
    best = ModelCheckpoint(tmp_path, "w", save_weights_only=True)
    fit(module, QuantizationCallback("w4a4", loader()), best, enable_checkpointing=True)
    loaded = Mixed.load_from_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    loaded.eval()
    module.eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), module(IMAGES))
    assert student_of(loaded).sha256 == student_of(module).sha256 == dfq.load(tmp_path / "w.ckpt", Mixed).sha256


@pytest.mark.parametrize("gradient", ["straight_through", "lsq_plus"])
def test_what_is_loaded_goes_on_as_what_was_saved(gradient, tmp_path):
    module = Mixed(lr=0.05)
    trainer = fit(module, QuantizationCallback("w4a4", loader(), gradient=gradient), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = Mixed.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in module.named_parameters()]
    pairs = zip(records(loaded)["network"].layers.values(), records(module)["network"].layers.values(), strict=True)
    for mine, theirs in pairs:
        assert mine.weight_quantizer.gradient_scale == theirs.weight_quantizer.gradient_scale
        assert (mine.weight_quantizer.gradient_scale == 1) == (gradient == "straight_through")
    whole = Mixed(lr=0.05)
    fit(whole, QuantizationCallback("w4a4", loader(), gradient=gradient), epochs=3)
    resumed = Mixed(lr=0.05)
    trainer = pl.Trainer(max_epochs=3, callbacks=[QuantizationCallback("w4a4", loader(), gradient=gradient)],
                         accelerator="cpu", logger=False, enable_progress_bar=False,
                         enable_checkpointing=False)  # fmt: skip
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert resumed.losses == whole.losses[8:]
    assert hash_tensors(resumed.state_dict()) == hash_tensors(whole.state_dict())


@pytest.fixture
def saved(tmp_path):
    module = Plain()
    trainer = fit(module, QuantizationCallback("w4a4", loader(), distill=True))
    trainer.save_checkpoint(tmp_path / "quantized.ckpt")
    fit(Plain(), None).save_checkpoint(tmp_path / "float.ckpt")
    return tmp_path


def resume(path, callback, module=None):
    trainer = pl.Trainer(max_epochs=2, callbacks=[callback], accelerator="cpu", logger=False,
                         enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(module or Plain(), loader(), ckpt_path=path)


def test_checkpoints_that_do_not_fit(saved):
    with pytest.raises(UserError, match=r"got a checkpoint of a network quantized with w4a4, .* quantized with w8a8"):
        resume(saved / "quantized.ckpt", QuantizationCallback("w8a8", loader()))
    with pytest.raises(UserError, match=r"got a checkpoint in which nothing is quantized, for a Plain that is"):
        resume(saved / "float.ckpt", QuantizationCallback("w4a4", loader()))
    other = Plain()
    with torch.no_grad():
        other.network[0].weight.add_(1)
    with pytest.raises(UserError, match="distilled from other float weights than those that the module came with"):
        resume(saved / "quantized.ckpt", QuantizationCallback("w4a4", loader(), distill=True), other)
    resume(saved / "quantized.ckpt", QuantizationCallback("w4a4", loader(), distill=True, teacher=network()), other)
    resume(saved / "quantized.ckpt", QuantizationCallback("w4a4", loader(), distill=True))
    with pytest.raises(UserError, match=r"got path=.*float\.ckpt, in which nothing is quantized"):
        dfq.load(saved / "float.ckpt", Plain)
    with pytest.raises(UserError, match="got a checkpoint of Sequential and a Mixed whose layers differ"):
        Mixed.load_from_checkpoint(saved / "quantized.ckpt", kind="mlp")
    with pytest.raises(UserError, match=r"got path=.*nowhere.ckpt, which does not exist"):
        dfq.load(saved / "nowhere.ckpt")


def test_a_checkpoint_names_its_class(saved):
    record = torch.load(saved / "quantized.ckpt", weights_only=True)[KEY]
    assert record["module"] == f"{__name__}:Plain" and record["networks"]["network"]["scheme"]["name"] == "w4a4"
    assert dfq.load(saved / "quantized.ckpt").scheme.name == "w4a4"
    assert type(dfq.load(saved / "quantized.ckpt", as_module=True)).__name__ == "Plain"


# ------------------------------------------------------------------------------------------------ mistakes


class Two(Plain):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(3, 3)


class Built(Plain):
    def __init__(self):
        super().__init__()
        del self.network

    def configure_model(self):
        if not hasattr(self, "network"):
            self.network = network()


def test_networks_are_found_or_asked_for():
    with pytest.raises(UserError, match=r"got a Two with several networks: network, second; allowed: attribute="):
        fit(Two(), QuantizationCallback("w4a4", loader()))
    with pytest.raises(
        UserError, match=r"attribute=netwrok and a Two, which has no such part; .*did you mean 'network'"
    ):
        fit(Two(), QuantizationCallback("w4a4", loader(), attribute="netwrok"))
    module = Two()
    fit(module, QuantizationCallback("w4a4", loader(), attribute="network"))
    assert list(records(module)) == ["network"]
    built = Built()
    fit(built, QuantizationCallback("w4a4", loader()))
    assert built.quantized[-1]
    both = Two()
    second = QuantizationCallback("w8a8", TensorDataset(torch.randn(4, 2, 3)), attribute="second",
                                  example=torch.randn(2, 3))  # fmt: skip
    fit(both, QuantizationCallback("w4a4", loader(), attribute="network"), second)
    assert {name: s.scheme.name for name, s in records(both).items()} == {"second": "w8a8", "network": "w4a4"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start_stpe": 1}, r"got QuantizationCallback\(start_stpe=\.\.\.\); allowed: start_step"),
        ({"start_step": -1}, r"got QuantizationCallback\.start_step=-1; allowed: a whole number >= 0"),
        ({"start_step": 5, "freeze_step": 4}, "got freeze_step=4 and start_step=5"),
        ({"gradient": "sgd"}, r"QuantizationCallback\.gradient='sgd'; allowed: straight_through \| lsq"),
        ({"distill": "ce"}, r"got distill='ce'; allowed: true \| false \| kl \| mse"),
        ({"features": ["0"]}, "got features or a teacher, and distill=False"),
        ({"distill": True, "start_step": 3}, "got distill=True and start_step=3"),
        ({"scheme": "w4a5"}, "got scheme=w4a5; allowed: "),
        ({"scheme": "mixed"}, "got scheme=mixed, whose bits are chosen layer by layer"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(UserError, match=message):
        QuantizationCallback(**options)


def test_trainers_that_do_not_work():
    for precision in ("bf16-true", "64-true"):
        with pytest.raises(UserError, match=rf"got Trainer\(precision='{precision}'\), in which ranges are no float32"):
            fit(Plain(), QuantizationCallback("w4a4", loader()), precision=precision)
    module = Plain()
    fit(module, QuantizationCallback("w4a4", loader()))
    with pytest.raises(UserError, match=r"got QuantizationCallback\('w8a8', policy='all'\) and a module that is "):
        fit(module, QuantizationCallback("w8a8", loader()))
    with pytest.raises(UserError, match="got gradient=lsq and a module whose quantizers' steps are no parameters"):
        fit(module, QuantizationCallback("w4a4", loader(), gradient="lsq"))
    with pytest.raises(UserError, match=r"got an error from Sequential on an input of \[2, 7\]"):
        fit(Plain(), QuantizationCallback("w4a4", example=torch.zeros(2, 7)))
    with pytest.raises(UserError, match="got features with 'nothing', which is no part of network"):
        fit(Plain(), QuantizationCallback("w4a4", loader(), distill=True, features=["nothing"]))


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_are_refused(kind):
    trainer = SimpleNamespace(strategy=object.__new__(kind), precision="32-true", world_size=2)
    trainer.strategy._launcher = None
    with pytest.raises(UserError, match=rf"got {kind.__name__}, which shards the module.*allowed: Trainer\(strategy="):
        QuantizationCallback("w4a4", loader()).setup(trainer, Plain(), "fit")


def test_data_that_the_module_makes_in_its_setup_asks_for_an_example():
    class Late(Plain):
        def setup(self, stage):
            self.data = loader()

        def train_dataloader(self):
            return self.data

    def run(**options):
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                             callbacks=[QuantizationCallback("w4a4", **options)])  # fmt: skip
        module = Late("bare")
        trainer.fit(module)
        return module

    with pytest.raises(
        UserError, match=r"training data of Late.* setup\(\) runs: AttributeError: .*; allowed: Quantiza"
    ):
        run()
    assert run(example=IMAGES[:2], num_calibration_batches=2).quantized == [False, False, True, True]


def test_a_look_at_samples_draws_no_random_numbers_of_any_library():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            return IMAGES[index] + 0 * float(np.random.rand() + random.random() + torch.rand(())), LABELS[index]

    def drawn(callback):
        pl.seed_everything(0, verbose=False)
        callback.setup(pl_trainer(callback, Noisy()), Plain("bare"), "fit")
        return np.random.rand(), random.random(), float(torch.rand(()))

    def pl_trainer(callback, data):
        loop = SimpleNamespace(_data_source=SimpleNamespace(dataloader=lambda: DataLoader(data, 8, shuffle=True)))
        strategy = SingleDeviceStrategy("cpu")
        return SimpleNamespace(
            strategy=strategy, precision="32-true", world_size=1, fit_loop=loop, callbacks=[callback]
        )

    assert drawn(QuantizationCallback("w4a4")) == drawn(QuantizationCallback("w4a4", example=IMAGES[:2]))


def test_a_network_that_cannot_be_quantized_stays_as_it_is():
    wrong = Scheme(W4A8.weight, W4A8.activation, overrides={"nothing": {"weight": {"num_bits": 8}}})
    for callback in (
        QuantizationCallback(wrong, loader()),
        QuantizationCallback("w4a4", loader(), distill=True, features=["nothing"]),
        QuantizationCallback("w4a16_g128", loader()),  # groups of 128 do not divide 27
    ):
        module = Plain()
        before = list(map(str, module.modules()))
        with pytest.raises(UserError, match=r"got features with|got scheme\."):
            fit(module, callback)
        assert list(map(str, module.modules())) == before and not records(module)
        assert hash_tensors(module.network.state_dict()) == hash_tensors(network().state_dict())


def test_an_interrupted_fit_leaves_nothing_on_the_module():
    class Broken(Plain):
        def on_train_batch_end(self, *_):
            raise RuntimeError("broken")

    module = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        fit(module, QuantizationCallback("w4a4", distill=True))
    assert not {"training_step", "manual_backward"} & vars(module).keys()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


def test_a_callback_is_one_of_the_packages_that_are_imported():
    callback = QuantizationCallback("w4a4")
    assert isinstance(callback, pl.Callback) and type(callback).__name__ == "QuantizationCallback"
    assert isinstance(copy.deepcopy(callback), QuantizationCallback)
    assert callback.state_key != QuantizationCallback("w4a4", attribute="network").state_key
