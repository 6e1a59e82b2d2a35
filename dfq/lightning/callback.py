"""QuantizationCallback: quantization-aware training in somebody else's Lightning project, and distillation with it.

::

    trainer = Trainer(callbacks=[QuantizationCallback("w4a4", dataset="outputs/r20", distill=True)])
    trainer.fit(module, datamodule)             # their training_step, their optimizers
    dfq.export(student_of(module), "net.onnx")

Layers are swapped in place in ``setup()``, before optimizers are made and checkpoints are read, and nothing is
converted afterwards: fit can be called again, and every checkpoint fits the module. Ranges are chosen when training
starts, or after ``start_step`` optimizer steps; until then the network computes what it did.

Distillation adds a loss between the outputs of the network's forwards in ``training_step`` and those of a frozen float
copy for the same inputs (Hinton et al., 2015, arXiv 1503.02531), and the relative squared error of outputs of named
parts. The copy is no part of the module: in no checkpoint, in no optimizer, and not among ``module.parameters()``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dfq.calibration import Ranges, calibrate, calibration_images
from dfq.dataset import SAMPLES, SyntheticDataset, samples_of
from dfq.errors import UserError
from dfq.hooks import around_method, capture_outputs, evaluation_mode, tensors_in
from dfq.lightning.packages import PACKAGES, for_all_packages
from dfq.lightning.quantized import (
    ITSELF,
    elements_per_sample,
    find_network,
    float_network,
    keep_float,
    network_of,
    quantize_in_place,
    records,
    write_records,
)
from dfq.losses.distillation import kl_divergence, relative_mse
from dfq.modules import Quantizer
from dfq.quantizers.lsq import learn_steps
from dfq.scheme import MixedScheme, Scheme
from dfq.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_value, load, resolve
from dfq.sites import map_tensors
from dfq.student import Student
from dfq.teacher import Teacher, hash_tensors

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    Callback = object  # of the packages that are there when a callback is made

Gradient = Literal["straight_through", "lsq", "lsq_plus", "stable"]
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
FIRST_STEPS = 10  # quantized ones, in which a distillation has to have begun
SMALLEST_STEP = 1e-2  # of the step that training starts with: one that crossed zero would flip its tensor's sign


@dataclass(frozen=True)
class CallbackSettings:
    """What a checkpoint records of a callback beside the scheme."""

    start_step: NonNegativeInt = 0  # optimizer steps in float before ranges are chosen
    freeze_step: NonNegativeInt | None = None  # optimizer steps after which ranges stay; null: never
    refresh_steps: NonNegativeInt = 0  # steps between ranges chosen anew; 0: they stay as calibrated, or are learned
    gradient: Gradient = "straight_through"  # of the quantizers' steps; straight_through: ranges are not learned
    num_calibration_samples: PositiveInt = 256  # of a dataset or dataloader
    num_calibration_batches: PositiveInt = 8  # of training, without either
    fold: bool = True  # batch norms into the layers before them
    distill_weight: NonNegativeFloat = 1.0  # of the distillation loss beside that of training_step
    feature_weight: NonNegativeFloat = 1.0  # of the relative squared error of named outputs, in the same units
    temperature: PositiveFloat = 1.0  # of the divergence

    def __post_init__(self):
        for name, annotation in type(self).__annotations__.items():
            check_value(getattr(self, name), annotation, f"QuantizationCallback.{name}", __name__)
        if self.freeze_step is not None and self.freeze_step < self.start_step:
            raise UserError(
                f"got freeze_step={self.freeze_step} and start_step={self.start_step}",
                "a freeze_step that is not before start_step",
            )


class QuantizationCallback(Callback):
    """Quantizes one network of the LightningModule that is trained.

    Args:
        scheme: a yaml's name or a :class:`~dfq.Scheme`; ``policy`` replaces the scheme's own.
        dataset: what ranges are chosen from: a synthetic dataset or its folder, or batches (a DataLoader) whose first
            tensor goes into the network; None: what goes through the network in the first batches of training, which
            are trained in float.
        attribute: name of the network in the LightningModule; None: the only part that has weights; ``"."``: the
            LightningModule itself, which calls its layers in its own ``forward``.
        example: an input of the network [N, ...] to see how data flows; None: from the dataset, the module's
            ``example_input_array``, or the first training batch's first tensor.
        distill: add the distillation loss. ``"kl"`` (True): Kullback-Leibler divergence of logits [N, ..., classes];
            ``"mse"``: relative squared error of every tensor of the output; or a function (student's output, teacher's
            output) -> scalar.
        features: parts of the network whose outputs are compared as well.
        teacher: the float network to distil from; None: a copy of the network as it is before layers are swapped.
        task, mean, std: what the network's outputs mean and how its images are normalized, for what is exported later.
        settings: see :class:`CallbackSettings`.
    """

    def __new__(cls, *_: Any, **__: Any) -> QuantizationCallback:
        # Trainers look for their own package's class in places. Both may be imported; none has to be, before.
        return object.__new__(for_all_packages(cls, "Callback"))

    def __init__(
        self,
        scheme: Scheme | str = "w8a8",
        dataset: SyntheticDataset | str | os.PathLike | Iterable | None = None,
        attribute: str | None = None,
        policy: str | None = None,
        weight_quantizer: Any = "mse",
        activation_quantizer: Any = "mse",
        example: Tensor | None = None,
        distill: bool | Literal["kl", "mse"] | Callable[[Any, Any], Tensor] = False,
        features: Sequence[str] = (),
        teacher: nn.Module | Teacher | None = None,
        task: str = "classification",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **settings: Any,
    ):
        super().__init__()
        chosen = Scheme.from_dict(load("scheme", scheme)) if isinstance(scheme, str) else scheme
        self.scheme = chosen if policy is None else replace(chosen, policy=policy)
        if isinstance(self.scheme, MixedScheme):
            raise UserError(
                f"got scheme={self.scheme.name}, whose bits are chosen layer by layer",
                "a scheme with bits of its own",
                "let dfq.quantize choose them, and train its student with scheme.overrides",
            )
        self.dataset = SyntheticDataset(dataset) if isinstance(dataset, str | os.PathLike) else dataset
        self.attribute, self.example = attribute, example
        self.quantizers = resolve("quantizer", weight_quantizer), resolve("quantizer", activation_quantizer)
        known = CallbackSettings.__dataclass_fields__
        for key in settings.keys() - known.keys():
            raise UserError(f"got QuantizationCallback({key}=...)", ", ".join(known))
        self.settings = CallbackSettings(**settings)
        self.loss = _loss(distill, self.settings.temperature)
        self.features = list(features)
        if self.loss is None and (self.features or teacher is not None):
            raise UserError("got features or a teacher, and distill=False", "distill=True for them")
        if self.loss is not None and teacher is None and self.settings.start_step:
            raise UserError(
                f"got distill=True and start_step={self.settings.start_step}, of which no checkpoint knows the float "
                "weights that quantization starts from",
                "start_step=0, or teacher=..., the float network to distil from",
            )
        self.given_teacher = teacher.module if isinstance(teacher, Teacher) else teacher
        self.description = {"task": task, "mean": mean, "std": std}
        self._name = ""
        self._ranges: Ranges | None = None  # while batches are looked at
        self._num_wanted = 0  # batches to look at still
        self._chosen_at = -1  # the step
        self._num_undistilled: int | None = None  # quantized steps before the first one with a distillation loss
        self._metric = ""
        self._smallest: list[tuple[nn.Parameter, Tensor]] = []
        self._held: list[tuple[Tensor, Tensor]] | None = None  # ranges that stay, with their values
        self._watch, self._hooks = ExitStack(), ExitStack()

    @property
    def state_key(self) -> str:
        """One callback for each network of a module."""
        return f"QuantizationCallback{{'attribute': {self.attribute!r}}}"

    def student(self, module: nn.Module) -> Student:
        """The record of the network in ``module``."""
        return records(module)[self._name]

    # -- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        _check_trainer(trainer, self.settings)
        write_records(pl_module)  # a checkpoint that is read has its layers swapped before its weights are loaded
        if stage != "fit":
            return
        self._leave()
        if _is_overridden(pl_module, "configure_model"):
            pl_module.configure_model()  # Lightning calls it again, for which it has to be made
        self._name = find_network(pl_module, self.attribute)
        self._check_compiled(pl_module)
        if self._name in records(pl_module):
            self._check_same(self.student(pl_module))
        else:
            self._swap(trainer, pl_module)
        for callback in trainer.callbacks:
            if callback is self:
                break
            if getattr(callback, "_average_model", None) is not None:  # a copy of the module, made before
                callback.setup(trainer, pl_module, stage)
        # Behind averages of weights, ahead of what writes checkpoints. A new list: the old one is being gone through.
        others = [callback for callback in trainer.callbacks if callback is not self]
        first = next((i for i, callback in enumerate(others) if _writes_checkpoints(callback)), len(others))
        trainer.callbacks = [*others[:first], self, *others[first:]]

    def _swap(self, trainer: Any, pl_module: Any) -> None:
        example = self._example(trainer, pl_module)
        parts = dict(network_of(pl_module, self._name).named_modules())
        for feature in self.features:
            if feature not in parts:
                raise UserError(f"got features with {feature!r}, which is no part of {self._name}")
        if self.loss is not None and self.given_teacher is None:
            keep_float(pl_module, self.attribute)
        describe: dict[str, Any] = {"task": self.description["task"]}
        mean, std = self.description["mean"], self.description["std"]
        if isinstance(self.dataset, SyntheticDataset):
            describe["input_spec"] = self.dataset.manifest["settings"].get("input_spec")
        if mean is not None and std is not None:
            describe["input_spec"] = {"size": list(example.shape[1:]), "mean": list(mean), "std": list(std)}
        student = quantize_in_place(pl_module, self.attribute, self.scheme, example, self.settings.fold, describe)
        student.settings = {"callback": asdict(self.settings)}
        if self.settings.gradient != "straight_through":
            elements = elements_per_sample(student, example.to(student.device))
            learn_steps(student, self.settings.gradient, elements)

    def _example(self, trainer: Any, pl_module: Any) -> Tensor:
        if self.example is not None:
            return self.example
        if isinstance(self.dataset, SyntheticDataset):
            return calibration_images(self.dataset, 2)
        if self.dataset is not None:
            return _first_samples(self.dataset, 2)
        given = getattr(pl_module, "example_input_array", None)
        if given is not None:
            return next(tensors_in(given))
        source = getattr(trainer.fit_loop, "_data_source", None)
        wanted = "QuantizationCallback(example=...), a tensor [N, ...] that it takes"
        try:
            with _isolated_rng():
                loader = None if source is None else source.dataloader()
            if isinstance(loader, Iterable) and not isinstance(loader, Mapping):  # a mapping: of several loaders
                return _first_samples(loader, 2)
        except UserError:
            raise
        except Exception as error:  # whatever a user's loader raises that is asked before the module's own setup()
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(
                f"got an error from the training data of {type(pl_module).__name__}, which is looked at before the "
                f"module's setup() runs: {type(error).__name__}: {reason}",
                wanted,
            ) from error
        raise UserError(
            f"got a {type(pl_module).__name__} and nothing to see what its network takes",
            wanted,
        )

    def _check_compiled(self, pl_module: Any) -> None:
        """A graph that torch.compile has made calls no hook that comes later."""
        whole = getattr(pl_module, "_compiler_ctx", None) is not None
        if not whole and self._called(pl_module) is network_of(pl_module, self._name):
            return
        s = self.settings
        later = self.dataset is None and s.start_step > 0
        if (whole and self.loss is not None) or self.features or s.refresh_steps or later:
            raise UserError(
                f"got a compiled {'LightningModule' if whole else 'network'} with distill, features, refresh_steps, or "
                "start_step without dataset, which look into it",
                "a compiled network with distill and without features; a compiled LightningModule without distill",
                "compile later or less: what is compiled can't be looked into",
            )

    def _called(self, pl_module: Any) -> nn.Module:
        """What the module calls: the network, or what torch.compile has made of it."""
        return pl_module if self._name == ITSELF else pl_module.get_submodule(self._name)

    def _check_same(self, student: Student) -> None:
        if student.scheme.to_dict() != self.scheme.to_dict():
            raise UserError(
                f"got QuantizationCallback({self.scheme.name!r}, policy={self.scheme.policy!r}) and a module that is "
                f"quantized with {student.scheme.name}, policy {student.scheme.policy}",
                "the same scheme, or a module that is not quantized yet",
            )
        learned = {key for key in _grids(student.module) if key in dict(student.module.named_parameters())}
        if bool(learned) != (self.settings.gradient != "straight_through"):
            raise UserError(
                f"got gradient={self.settings.gradient} and a module whose quantizers' steps are "
                f"{'parameters' if learned else 'no parameters'}",
                "the gradient that it was quantized with, or a module that is not quantized yet",
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        student = self.student(pl_module)
        if self.loss is not None:
            others = [other for other in trainer.callbacks if other is not self]
            several = any(isinstance(other, QuantizationCallback) and other.loss is not None for other in others)
            self._metric = f"distillation_loss_{self._name}" if several else "distillation_loss"
            self._num_undistilled = 0
            teacher = self._teacher(pl_module, student)
            self._hooks.callback(teacher.to, next((p.device for p in teacher.parameters()), student.device))
            teacher.to(student.device)
            self._hooks.enter_context(self._distilling(pl_module, student, teacher))
        if student.has_grids:
            self._note_steps(student)
        elif self.settings.start_step == 0 and self.dataset is not None:
            self._calibrate(trainer, pl_module)

    def _teacher(self, pl_module: Any, student: Student) -> nn.Module:
        if self.given_teacher is not None:
            return self.given_teacher.eval().requires_grad_(False)
        kept = float_network(pl_module, self._name)
        if kept is None:
            raise UserError(
                "got distill=True and a network that was quantized before, without it",
                "QuantizationCallback(teacher=...), its float self",
            )
        if hash_tensors(kept.state_dict()) != student.teacher["sha256"]:
            raise UserError(
                "got distill=True and a checkpoint of a run that distilled from other float weights than those that "
                "the module came with",
                "a module with the same float weights as when the run began, or QuantizationCallback(teacher=...)",
            )
        return kept

    # -- ranges ------------------------------------------------------------------------------------------------------

    def _calibrate(self, trainer: Any, pl_module: Any) -> None:
        """From a dataset or a dataloader."""
        student, self._chosen_at = self.student(pl_module), trainer.global_step
        if isinstance(self.dataset, SyntheticDataset):
            images = calibration_images(self.dataset, self.settings.num_calibration_samples)
        else:
            assert self.dataset is not None and not isinstance(self.dataset, str | os.PathLike)
            images = _first_samples(self.dataset, self.settings.num_calibration_samples)
        calibrate(student, images, *self.quantizers)
        self._started(trainer, pl_module)

    def _started(self, trainer: Any, pl_module: Any) -> None:
        """Grids are there: the same in every process, and in averages of weights."""
        student = self.student(pl_module)
        if trainer.world_size > 1:
            mine = _grids(student.module)
            theirs = trainer.strategy.broadcast([tensor.detach().cpu() for tensor in mine.values()], src=0)
            with torch.no_grad():
                for tensor, value in zip(mine.values(), theirs, strict=True):
                    tensor.copy_(value)
        self._note_steps(student)
        self._into_averages(trainer, pl_module, parameters=True)

    def _note_steps(self, student: Student) -> None:
        steps = [p for key, p in student.module.named_parameters() if key.endswith("_quantizer.scale")]
        self._smallest = [(p, p.detach() * SMALLEST_STEP) for p in steps]

    @torch.no_grad()
    def _into_averages(self, trainer: Any, pl_module: Any, parameters: bool = False) -> None:
        """Grids of moving averages (EMA) are those of the module: a zero point in between is none."""
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None)
            if average is not None:
                average = average.module if isinstance(average, AveragedModel) else average
                theirs = dict(average.named_modules())
                for name, part in pl_module.named_modules():
                    if isinstance(part, Quantizer):
                        other = theirs[name]
                        pairs = [(part._buffers, other._buffers)]
                        pairs += [(part._parameters, other._parameters)] if parameters else []
                        for mine, copies in pairs:
                            for key, tensor in mine.items():
                                if tensor is not None:
                                    copies[key].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        """Nothing where nobody will ask: Lightning misses callbacks that a checkpoint has something of."""
        return {"chosen_at": self._chosen_at} if self.settings.refresh_steps else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._chosen_at = state_dict["chosen_at"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._chosen_at = min(self._chosen_at, trainer.global_step)  # another Trainer counts from zero

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        student, s, step = self.student(pl_module), self.settings, trainer.global_step
        if student.has_grids:
            is_frozen = s.freeze_step is not None and step >= s.freeze_step
            if is_frozen and self._held is None:
                self._held = [(tensor, tensor.detach().clone()) for tensor in _grids(student.module).values()]
            # Several optimizers make several steps a batch: a multiple of the interval may never be seen.
            due = s.refresh_steps and step // s.refresh_steps > self._chosen_at // s.refresh_steps
            if due and not is_frozen:
                self._ranges, self._num_wanted = Ranges(student, *self.quantizers), 1
        elif step >= s.start_step and self.dataset is not None:
            self._calibrate(trainer, pl_module)
        elif step >= s.start_step and self._ranges is None:
            self._ranges, self._num_wanted = Ranges(student, *self.quantizers), s.num_calibration_batches
        if self._ranges is not None:
            self._chosen_at = step
            self._watch.enter_context(self._ranges.watching())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._watch.close()
        if self._ranges is not None:
            self._num_wanted -= 1
            if self._num_wanted <= 0:
                self._choose(trainer, pl_module)
        for parameter, smallest in self._smallest:
            parameter.clamp_(min=smallest.to(parameter.device))
        for tensor, value in self._held or ():
            tensor.copy_(value)
        self._into_averages(trainer, pl_module)

    def _choose(self, trainer: Any, pl_module: Any) -> None:
        """Ranges from the batches so far, if something has gone into every quantizer."""
        if self._ranges is not None and not self._ranges.unseen:
            self._ranges.choose()
            self._ranges = None
            self._started(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._choose(trainer, pl_module)  # what is validated, and kept as the best, is quantized

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._choose(trainer, pl_module)
        student = self.student(pl_module)
        if 0 < (self._num_undistilled or 0) < FIRST_STEPS:
            self._warn_undistilled(pl_module)
        if not student.has_grids and trainer.global_step > self.settings.start_step:
            unseen = self._ranges.unseen if self._ranges is not None else []
            warnings.warn(
                f"{type(pl_module).__name__} is not quantized: nothing went into {', '.join(unseen[:3])} in training",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._leave()

    def _leave(self) -> None:
        """Leave nothing on the module but its quantized layers."""
        self._watch.close()
        self._hooks.close()
        self._ranges, self._held, self._smallest = None, None, []

    # -- distillation ------------------------------------------------------------------------------------------------

    @contextmanager
    def _distilling(self, pl_module: Any, student: Student, teacher: nn.Module) -> Iterator[None]:
        """``training_step`` gives a loss with the distillation's in it, or ``manual_backward`` takes one."""
        forwards: list[_Forward] = []
        called = self._called(pl_module)

        def forward(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            """The teacher's too, on the same input, where gradients are wanted."""
            if not torch.is_grad_enabled():
                return method(*args, **kwargs)
            copies = map_tensors(torch.clone, [args, kwargs])  # a network may write into its input
            with torch.no_grad(), evaluation_mode(teacher), capture_outputs(teacher, self.features) as wanted:
                target = teacher.forward(*copies[0], **copies[1])
            with capture_outputs(student.module, self.features) as got:
                output = method(*args, **kwargs)
            # Here, ahead of what is done to the output, which may be written into.
            loss = self._distance(output, target, got, wanted)
            forwards.append(_Forward({tensor.grad_fn for tensor in tensors_in(output)} - {None}, loss))
            return output

        def training_step(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            forwards.clear()
            if not student.has_grids:
                return method(*args, **kwargs)
            with around_method(called, "forward", forward):
                result = method(*args, **kwargs)
            if pl_module.automatic_optimization and isinstance(result, Mapping):
                result = {**result, "loss": self._added(pl_module, result["loss"], forwards)}
            elif pl_module.automatic_optimization and result is not None:
                result = self._added(pl_module, result, forwards)
            if self._num_undistilled is not None:
                self._num_undistilled += 1
                if self._num_undistilled == FIRST_STEPS:
                    self._warn_undistilled(pl_module)
            return result

        def manual_backward(method: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> None:
            method(self._added(pl_module, loss, forwards), *args, **kwargs)

        with (
            around_method(pl_module, "training_step", training_step),
            around_method(pl_module, "manual_backward", manual_backward),
        ):
            yield

    def _distance(self, output: Any, target: Any, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        """The distillation loss of one forward; copies, since its gradient may need what it is computed from."""
        assert self.loss is not None
        total = self.loss(map_tensors(torch.clone, output), target)
        for name in self.features:
            total = total + self.settings.feature_weight * relative_mse(got[name].clone(), wanted[name])
        return total

    def _added(self, pl_module: Any, loss: Tensor, forwards: list[_Forward]) -> Tensor:
        """``loss`` and the mean distillation loss of those forwards that it was computed from."""
        reached = _graph(loss) if forwards else set()
        mine = [forward.loss for forward in forwards if forward.operations & reached]
        if not mine:
            return loss
        total = torch.stack(mine).mean()
        pl_module.log(self._metric, total.detach())
        self._num_undistilled = None
        return loss + self.settings.distill_weight * total

    def _warn_undistilled(self, pl_module: Any) -> None:
        what = "its own" if self._name == ITSELF else f"{self._name}'s"
        warnings.warn(
            f"QuantizationCallback(distill=...) has added nothing to the losses of {type(pl_module).__name__}: none of "
            f"the first {self._num_undistilled} quantized steps computed its loss from what {what} forward gave. "
            "Call the network as a whole, or name the part that is called as attribute=; with manual optimization, "
            "give losses to self.manual_backward",
            stacklevel=2,
        )


@dataclass
class _Forward:
    """Of the network, with gradients: the last operations of its outputs, and what it adds to a loss."""

    operations: set[Any]
    loss: Tensor


def _graph(loss: Tensor) -> set[Any]:
    """Every operation that ``loss`` depends on."""
    found: set[Any] = set()
    open_ = [loss.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in found:
            found.add(node)
            open_ += [parent for parent, _ in node.next_functions]
    return found


def _loss(distill: Any, temperature: float) -> Callable[[Any, Any], Tensor] | None:
    if distill is False:
        return None
    if distill is True or distill == "kl":
        return functools.partial(_kl, temperature=temperature)
    if distill == "mse":
        return _mse
    if not callable(distill):
        raise UserError(f"got distill={distill!r}", "true | false | kl | mse | a function of two outputs")
    return distill


def _kl(output: Any, target: Any, temperature: float) -> Tensor:
    output, target = getattr(output, "logits", output), getattr(target, "logits", target)
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise UserError(
            f"got distill='kl' and a network whose output is a {type(output).__name__}",
            "logits [N, ..., classes]",
            "distill='mse', or a function of two outputs",
        )
    return kl_divergence(output.float(), target.float(), temperature)


def _mse(output: Any, target: Any) -> Tensor:
    pairs = zip(tensors_in(output), tensors_in(target), strict=True)
    found = [relative_mse(mine.float(), theirs.float()) for mine, theirs in pairs if mine.is_floating_point()]
    return torch.stack(found).mean()


# ------------------------------------------------------------------------------------------------ Lightning's ways


def _check_trainer(trainer: Any, settings: CallbackSettings) -> None:
    strategy, precision = trainer.strategy, str(trainer.precision)
    if type(strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise UserError(
            "got a strategy that spawns or forks its processes (ddp_spawn, ddp_fork, ddp_notebook), from which "
            "swapped layers do not come back",
            'Trainer(strategy="ddp") and other strategies that start processes of their own',
        )
    if strategy.restore_checkpoint_after_setup:
        raise UserError(
            f"got {type(strategy).__name__}, which shards the module, and ranges are chosen by running parts of it",
            'Trainer(strategy="ddp"), or one process',
            "distil larger networks with dfq run algorithm=distillation trainer=fsdp",
        )
    if precision not in PRECISIONS:
        raise UserError(f"got Trainer(precision={precision!r}), in which ranges are no float32", " | ".join(PRECISIONS))
    # A step that nothing is rounded with yet has no gradient, for which DDP waits.
    waits = trainer.world_size > 1 and not getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
    if waits and settings.gradient != "straight_through" and settings.start_step > 0:
        raise UserError(
            f"got gradient={settings.gradient} with start_step={settings.start_step} and several processes",
            'Trainer(strategy="ddp_find_unused_parameters_true"), start_step=0, or gradient="straight_through"',
        )


def _is_overridden(module: Any, method: str) -> bool:
    return not getattr(type(module), method).__module__.startswith(PACKAGES)


def _writes_checkpoints(callback: Any) -> bool:
    return any(kind.__name__ == "Checkpoint" for kind in type(callback).__mro__)


def _grids(network: nn.Module) -> dict[str, Tensor]:
    """Scales and zero points, by name."""
    return {
        f"{name}.{key}": tensor
        for name, part in network.named_modules()
        if isinstance(part, Quantizer)
        for key, tensor in [*part._buffers.items(), *part._parameters.items()]
        if tensor is not None
    }


def _inputs(batches: Iterable[Any]) -> Iterator[Tensor]:
    """What goes into the network in each batch: its first tensor."""
    for batch in batches:
        known = isinstance(batch, Mapping) and any(name in batch for name in SAMPLES)
        found = samples_of(batch) if known else next(tensors_in(batch), None)  # type: ignore[arg-type]
        if found is None:
            raise UserError(f"got batches without a tensor ({type(batch).__name__})", "tensors, or lists of them")
        yield found


def _isolated_rng() -> AbstractContextManager[None]:
    """torch's, numpy's and Python's random numbers go on afterwards as if nothing had been drawn."""
    from pytorch_lightning.utilities.seed import isolate_rng  # here: what is imported decides what a callback is

    return isolate_rng(include_cuda=False)


def _first_samples(batches: Iterable[Any], num_samples: int) -> Tensor:
    """Up to ``num_samples`` samples [N, ...]; what is given afterwards, and in which order, stays what it would be."""
    state = batches.state_dict() if hasattr(batches, "state_dict") else None
    found: list[Tensor] = []
    with _isolated_rng():
        for x in _inputs(batches):
            found.append(x)
            if sum(map(len, found)) >= num_samples:
                break
    if state is not None:
        batches.load_state_dict(state)  # type: ignore[attr-defined]
    if not found:
        raise UserError("got a dataset without batches", "at least one")
    return torch.cat(found)[:num_samples]
