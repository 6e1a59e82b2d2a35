"""DistillationModule: a LightningModule that trains a quantized student on its teacher's outputs."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dfq.calibration import calibrate, calibration_images
from dfq.channels import output_scales
from dfq.dataset import SyntheticDataset, samples_of
from dfq.detectors._base import Boxes
from dfq.errors import UserError
from dfq.hooks import forward_hooks, tensors_in
from dfq.lightning.augmentation import Moves, augment, draw_moves
from dfq.lightning.freezing import FrozenChannels
from dfq.lightning.packages import for_all_packages, settle
from dfq.lightning.settings import DistillationSettings
from dfq.lightning.sharding import average_gradients, is_sharded, local_part, shard
from dfq.losses.balance import balanced_sum
from dfq.losses.cosine_features import cosine_distance
from dfq.losses.dampening import dampening_loss
from dfq.losses.distillation import kl_divergence, relative_mse
from dfq.losses.feature_affinity import feature_affinity, num_positions, random_projection
from dfq.losses.grad_cam import class_activation_map, class_scores, grad_cam_loss
from dfq.losses.hard_labels import gated_cross_entropy
from dfq.losses.jensen_shannon import jensen_shannon
from dfq.losses.logits_mse import logits_mse
from dfq.losses.quantized_features import quantized_feature_loss
from dfq.losses.reverse_kl import reverse_kl
from dfq.modules import LowRank, Quantizer, find_foldable, fold_batch_norm, to_fast_layout, weight_layers
from dfq.optimizer import ScaledAdam, ZerothOrder, local
from dfq.quantizers._soft import SoftQuantizer, decided, soft_quantizers, total
from dfq.quantizers.lsq import learn_steps
from dfq.scheme import MixedScheme, Scheme
from dfq.settings import load, locate, resolve
from dfq.sites import map_tensors
from dfq.student import Student
from dfq.tasks._outputs import outputs_of
from dfq.tasks._task import task_of
from dfq.tasks.language_modeling import known_tokens, of_tokens
from dfq.teacher import InputSpec, Teacher

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
else:
    LightningModule = nn.Module  # of the packages that are there when a module is made

PROJECTIONS = 64  # k of the fast feature affinity
LOG_STEPS = 10  # between two figures for loggers and bars: Lightning's log costs as much as a small layer
BALANCE_LR = 0.02  # of the logarithms of the learned balance


class DistillationModule(LightningModule):
    """Losses between student and teacher (see :class:`DistillationSettings`), Adam, and a cosine schedule.

    Features are compared where the network changes resolution or width. The student stays in evaluation mode: its batch
    norms are folded or frozen, since synthetic images must not move statistics. The teacher is no part of the module's
    state, so it is neither trained nor saved in checkpoints.

    Teacher intervention (Kim et al., EACL 2023, arXiv 2302.11812): at the places where features are compared, a sample
    goes on with the teacher's features with probability ``intervention`` (1 - 2 t)+, t the share of the run that is
    done, so that later stages learn from inputs that earlier ones do not disturb. Block decomposition (StableKD, Chen,
    Kao & Chan, 2023, arXiv 2312.13223) is the same with probability 1: each stage is trained on the teacher's input to
    it and on its own output, and the stages are merged, from the input on, one after the other.

    Differences from the papers: intervention acts on stages of any network (there on attention of Transformers) and
    sample by sample; StableKD's stages are where resolution or width change, merged at equal intervals.

    Args:
        student: a calibrated student (:func:`student_to_train`); those of its parameters that require gradients are
            trained: weights and, where they are parameters, its quantizers' steps.
        teacher: the float network, on the same device as the data.
        task: gives ``raw_outputs``, ``distillation_loss`` and ``agreement``; None: the teacher's own.
        features: sub-module of the student → sub-module of the teacher whose outputs are compared; None: outputs alone.
        settings: losses, learning rates, what is done to images and student.
        seed: of everything random.
        start: when the run began on the clock of ``time.perf_counter``; None: when training does.
    """

    given_loss = 1.0  # of the student as it came: the unit of what drives soft weights to their codes
    runs_teacher = True  # False: every batch has the teacher's answers, and its network stays where it is

    def __new__(cls, *_: Any, **__: Any) -> DistillationModule:
        return object.__new__(for_all_packages(cls, "LightningModule"))

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        task: Any = None,
        features: Mapping[str, str] | None = None,
        settings: DistillationSettings | None = None,
        seed: int = 0,
        start: float | None = None,
    ):
        super().__init__()
        if not any(p.requires_grad for p in student.module.parameters()):
            raise UserError(
                "got a student of which nothing is trained",
                "dfq.lightning.student_to_train(teacher, dataset, ...), or student.module.requires_grad_(True)",
            )
        self.student_module = student.module
        self._student, self._teacher = [student], [teacher]  # lists: not registered as sub-modules
        self.task, self.features = task_of(teacher) if task is None else task, dict(features or {})
        self.feature_scales = output_scales(student, teacher, self.features)
        self.settings = s = settings or DistillationSettings()
        self.seed, self.rng = seed, torch.Generator().manual_seed(seed)
        self.automatic_optimization = not s.zeroth_order
        self.start, self.earlier_s, self.step_s, self.look_s = start, 0.0, 0.0, 0.0
        self.fast_teacher, self.layout = [teacher.module], torch.contiguous_format
        spec = teacher.input_spec
        self.limits = spec.limits(teacher.device) if isinstance(spec, InputSpec) else None
        self.finds_boxes = hasattr(self.task, "distillation_terms")
        is_text = teacher.task == "language_modeling"
        self.terms = _terms(s, bool(self.features), self.task if self.finds_boxes else None, is_text)
        if student.surgery.rotated:
            self._check_rotated()
        self.cuts = self._places_before_layers() if s.intervention or s.blocks_first else []
        self.cam_place = self._last_map() if s.cam_weight else None
        self.log_scales = nn.Parameter(torch.zeros(len(self.terms))) if s.balance == "learned" else None
        self.channels = FrozenChannels(list(student.layers.values()), s.frozen_channels) if s.frozen_channels else None
        self.held_channels: list[Tensor] | None = None  # those that a resumed run trains until it chooses anew
        self.soft = soft_quantizers(student.module)
        # A step that crossed zero would flip the sign of its whole tensor.
        self.steps = [p for name, p in student.module.named_parameters() if _is_step(student.module, name)]
        self.smallest_steps = [p.detach().abs() * 1e-2 for p in self.steps]
        self.sizes: dict[Tensor, Tensor] = {}  # parameter → what its learning rate is relative to
        self.groups = self._parameters_by_rate()
        self.trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        self.averages = [p.detach().clone() for p in self.trained.values()] if s.average else None
        self.set_aside: list[Tensor] | None = None  # the trained weights, while their averages are looked at
        self.seed, self.agreed, self.is_sharded = seed, 0.0, False

    @property
    def trainer(self) -> Any:
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        if trainer is not None:
            settle(self, trainer)
        super(DistillationModule, type(self)).trainer.fset(self, trainer)  # type: ignore[attr-defined]

    # -- the schedule ------------------------------------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began, without those between its interruption and its resumption."""
        return self.earlier_s + (0.0 if self.start is None else time.perf_counter() - self.start)

    def done(self, step: int) -> float:
        """Share of the run that is over after ``step`` steps: of the steps or of the time, whichever is more."""
        share = step / self.settings.max_steps
        if self.settings.time_limit_s is not None:
            share = max(share, self.agreed or self._share_of_time())
        return min(share, 1.0)

    def _share_of_time(self) -> float:
        assert self.settings.time_limit_s is not None
        # Another step and the last look at held-out samples have to fit in too.
        left = self.settings.time_limit_s - self.step_s - self.look_s
        return self.elapsed_s / max(left, 1e-9)

    def configure_optimizers(self) -> Any:
        """The settings' optimizer on a cosine schedule; a sub-class may have another."""
        # One kernel a group: small networks are all overhead.
        groups = [{"params": parameters, "lr": lr} for lr, parameters in self.groups.items()]
        sizes = {parameter: size.to(parameter.device) for parameter, size in self.sizes.items()}
        s = self.settings
        if self.is_sharded:  # no kernel takes sharded and whole tensors together
            groups = [
                {"params": some, "lr": lr}
                for lr, parameters in self.groups.items()
                for some in ([p for p in parameters if is_sharded(p) is kind] for kind in (True, False))
                if some
            ]
        optimizer: Any
        if s.zeroth_order:
            optimizer = ZerothOrder(groups, sizes, s.zeroth_eps, s.zeroth_rate, self.seed)
        elif s.optimizer is not None:
            optimizer = _optimizer(s.optimizer, list(self.trained.values()))
        else:
            optimizer = ScaledAdam(groups, sizes, fused=not self.is_sharded)
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * self.done(step)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _parameters_by_rate(self) -> dict[float, list[nn.Parameter]]:
        """Learning rate → parameters, by the grids that the student came with."""
        groups: dict[float, list[nn.Parameter]] = {}
        own = {id(layer.weight): layer for layer in self._student[0].layers.values()}
        low_rank = {id(layer.low_rank): layer for layer in self._student[0].layers.values()}
        for name, parameter in self.student_module.named_parameters():
            if not parameter.requires_grad:
                continue
            owner = self.student_module.get_submodule(name.rpartition(".")[0])
            layer = own.get(id(parameter))
            if _is_step(self.student_module, name):
                lr, self.sizes[parameter] = self.settings.step_lr, parameter.detach().abs()
            elif isinstance(owner, SoftQuantizer):
                if parameter is owner.logits:
                    lr = self.settings.weight_lr
                else:
                    lr, self.sizes[parameter] = self.settings.step_lr, parameter.detach().abs()
            elif isinstance(owner, Quantizer):  # a zero point, in units of codes
                lr = self.settings.step_lr * owner.scheme.quant_max
            elif isinstance(owner, LowRank):
                lr, of = self.settings.bias_lr, low_rank[id(owner)]
                if of.weight_quantizer.has_qparams:
                    weight, lr = of.weight.detach(), self.settings.weight_lr
                    self.sizes[parameter] = owner.units(parameter, weight, of.weight_quantizer.steps_of(weight))
            elif layer is not None and layer.weight_quantizer.has_qparams:
                lr, self.sizes[parameter] = self.settings.weight_lr, layer.weight_quantizer.steps_of(parameter.detach())
            else:
                lr = self.settings.bias_lr
            groups.setdefault(lr, []).append(parameter)
        if self.log_scales is not None:
            groups.setdefault(BALANCE_LR, []).append(self.log_scales)
        return groups

    def configure_model(self) -> None:
        """Shard the networks that run where the trainer's strategy is to (``trainer=fsdp``)."""
        mesh: Any = getattr(self, "_device_mesh", None)
        if mesh is None and self.trainer.world_size > 1:
            self._lay_out()  # DDP reads gradients in the order that weights lie in when it wraps them
        if mesh is None or self.is_sharded:
            return
        for name in ("average", "frozen_channels"):
            if getattr(self.settings, name):
                raise UserError(
                    f"got algorithm.{name}={getattr(self.settings, name)} and trainer=fsdp",
                    f"algorithm.{name}=0, or trainer=ddp",
                )
        self.is_sharded, mesh = True, mesh["data_parallel"]
        before, teacher = dict(self.named_parameters()), self._teacher[0]
        if mesh.device_type != "cpu":
            teacher.module.to("cpu")  # whole networks wait there; the device has parts
            self.student_module.to("cpu")
        if self.runs_teacher:
            folded = _folded(teacher)
            self.fast_teacher[0] = copy.deepcopy(folded) if folded is teacher.module else folded
            shard(self.fast_teacher[0], mesh)
            self.fast_teacher[0].to(self.trainer.strategy.root_device)
        shard(self.student_module, mesh)
        self._follow(before, mesh.get_local_rank(), mesh.size())

    def _follow(self, before: Mapping[str, nn.Parameter], rank: int, world_size: int) -> None:
        """Hold the parameters that sharding has put in the place of ``before``."""
        now = dict(self.named_parameters())
        new = {old: now[name] for name, old in before.items()}

        def part(values: Tensor, old: Tensor) -> Tensor:
            return local_part(values, old, rank, world_size) if is_sharded(new[old]) else values  # type: ignore[index]

        self.sizes = {new[old]: part(size, old) for old, size in self.sizes.items()}  # type: ignore[index]
        self.smallest_steps = [part(size, old) for old, size in zip(self.steps, self.smallest_steps, strict=True)]
        self.steps = [new[old] for old in self.steps]
        self.groups = {lr: [new[old] for old in parameters] for lr, parameters in self.groups.items()}
        self.trained = {name: now[name] for name in self.trained}

    def on_after_backward(self) -> None:
        if self.is_sharded:
            average_gradients(p for p in self.trained.values() if not is_sharded(p))

    def on_fit_start(self) -> None:
        if self.start is None:
            self.start = time.perf_counter()
        if not self.is_sharded and self.trainer.world_size == 1:
            self._lay_out()

    def _lay_out(self) -> None:
        """The networks that run as they are fastest."""
        teacher, networks = self._teacher[0], [self.student_module]
        if self.runs_teacher:
            self.fast_teacher[0] = _folded(teacher)
            networks.append(self.fast_teacher[0])
        self.layout = to_fast_layout(networks, teacher.example())

    def on_fit_end(self) -> None:
        if self.is_sharded:
            return
        self.fast_teacher[0] = self._teacher[0].module
        for network in (self.student_module, self.fast_teacher[0]):
            network.to(memory_format=torch.contiguous_format)

    def on_train_start(self) -> None:
        if self.channels is not None and self.held_channels is not None:
            self.channels.hold(self.held_channels)  # here, where the weights are back
        self._draw_anew()

    def _draw_anew(self) -> None:
        """At the start and behind each look, from where an interrupted run goes on: what is saved is of rank 0."""
        if self.trainer.global_rank > 0:  # other changes to other samples; the first process goes on as one alone does
            name = f"{self.seed}:{self.trainer.global_rank}:{self.trainer.global_step}"
            self.rng.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))

    def on_train_epoch_start(self) -> None:
        self.student_module.eval()

    def on_train_batch_start(self, *_: Any) -> None:
        self.step_began = time.perf_counter()
        if self.settings.time_limit_s is not None and self.trainer.world_size > 1:  # one clock for all
            self.agreed = self.trainer.strategy.broadcast(self._share_of_time())
        if self.channels is not None and (
            not self.channels.trained or self.trainer.global_step % self.settings.refreeze_steps == 0
        ):
            self.channels.choose()

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        step = self.trainer.global_step
        if self.channels is not None:
            self.channels.restore()
        if self.steps:
            torch._foreach_maximum_([local(p) for p in self.steps], self.smallest_steps)
        if self.averages is not None:
            # Young averages forget faster: the first steps are far from the last.
            decay = min(self.settings.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averages, [p.data for p in self.trained.values()], 1 - decay)
        self.step_s = time.perf_counter() - self.step_began
        if self.done(step) >= 1:
            self.trainer.should_stop = True  # after a last look

    # -- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor | None:
        if not self.settings.zeroth_order:
            return self.step_loss(batch)
        before = self.rng.get_state()

        def loss() -> Tensor:
            self.rng.set_state(before)  # the same augmentation for both
            return self.step_loss(batch)

        optimizer: Any = self.optimizers()
        with torch.no_grad():
            optimizer.step(closure=loss)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return None

    def step_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """What a step makes smaller."""
        s, done = self.settings, self.done(self.trainer.global_step)
        samples = samples_of(batch)
        moves = draw_moves(samples, self.rng, s.flip, s.shift)
        images = augment(samples, self.rng, False, 0, s.mixup, s.jitter, self.limits, moves)
        if images.dim() == 4:
            images = images.contiguous(memory_format=self.layout)
        seen = self._teach(images)
        seen.boxes = self._boxes(batch, moves) if "task" in self.terms else []
        with self.channels.partial_gradients() if self.channels is not None else nullcontext():
            self._learn(images, seen, self._chances(done))
        self._leave_out_padding(batch, seen)
        losses = [self._loss(name, seen) for name in self.terms]
        if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses):
            raise UserError(
                f"got {self._teacher[0].name}, whose outputs have no gradient (torch.no_grad, detach, argmax or NumPy "
                "in its forward)",
                "a differentiable network where it is trained",
                "gptq, quantease and other algorithms that go layer by layer need none",
            )
        loss = balanced_sum(losses, list(self.terms.values()), self.log_scales)
        if s.dampen:
            loss = loss + s.dampen * 0.5 * (1 - math.cos(math.pi * done)) * self._dampening()
        if (self.trainer.global_step + 1) % LOG_STEPS == 0 or self.trainer.global_step + 1 == s.max_steps:
            self.log("loss", loss)
        return self.with_penalty(loss)

    def _teach(self, images: Tensor) -> _Seen:
        """What the teacher makes of ``images``."""
        seen = _Seen()
        cam = self.cam_place and self.features[self.cam_place]
        handed_on = {self.features[name] for name in self.cuts}

        def keep(name: str, _module: nn.Module, _inputs: tuple, output: Any) -> Any:
            feature = next(tensors_in(output))
            seen.wanted[name] = feature.detach().requires_grad_() if name == cam else feature
            # What comes next may write into its input.
            return _with(output, feature, seen.wanted[name].clone()) if name == cam or name in handed_on else None

        places = [(name, self.fast_teacher[0].get_submodule(name)) for name in set(self.features.values())]
        with torch.set_grad_enabled(cam is not None), forward_hooks(places, after=keep):
            seen.target = self.task.raw_outputs(self.fast_teacher[0], images.clone())
        if cam is not None:
            seen.classes = _logits(seen.target, "cam_weight").argmax(1)
            scores = class_scores(seen.target, seen.classes)
            seen.cam = class_activation_map(seen.wanted[cam], *torch.autograd.grad(scores, seen.wanted[cam])).detach()
            seen.target = seen.target.detach()
            seen.wanted = {name: feature.detach() for name, feature in seen.wanted.items()}
        return seen

    def _learn(self, images: Tensor, seen: _Seen, chances: Mapping[str, float]) -> None:
        """What the student makes of ``images``; with a chance it goes on with the teacher's features."""

        def keep(name: str, _module: nn.Module, _inputs: tuple, output: Any) -> Any:
            seen.got[name] = own = next(tensors_in(output))
            if name == self.cam_place or chances.get(name, 0) > 0:
                theirs = self._in_students_units(name, seen.wanted[self.features[name]])
                seen.given[name] = self._mixed(own, theirs, chances.get(name, 0))
                return _with(output, own, seen.given[name])
            return None

        places = [(name, self.student_module.get_submodule(name)) for name in self.features]
        with forward_hooks(places, after=keep):
            seen.output = self.task.raw_outputs(self.student_module, images.clone())

    def _leave_out_padding(self, batch: Mapping[str, Tensor], seen: _Seen) -> None:
        """Of texts of several lengths the tokens alone, as those of one text [1, M, ...]; affinities stay in a text."""
        if "num_tokens" not in batch:
            return
        known = known_tokens(batch, samples_of(batch).to(seen.output.device))
        if bool(known.all()):
            return
        seen.output, seen.target = seen.output[known][None], seen.target[known][None]
        whole = self.settings.feature_loss == "affinity"
        for found in (seen.got, seen.wanted):
            for name, x in found.items():
                tokens = of_tokens(x, known, whole)
                found[name] = tokens if whole or tokens is x else tokens[None]

    def _chances(self, done: float) -> dict[str, float]:
        """Place → probability that a sample goes on with the teacher's features there."""
        s = self.settings
        chance = s.intervention * max(0.0, 1 - 2 * done)
        closed = math.ceil(len(self.cuts) * (1 - done / s.blocks_first)) if done < s.blocks_first else 0
        return {name: 1.0 if i >= len(self.cuts) - closed else chance for i, name in enumerate(self.cuts)}

    def _mixed(self, own: Tensor, theirs: Tensor, chance: float) -> Tensor:
        """The student's features [N, ...], those of some samples taken from the teacher's."""
        if chance == 0 or own.shape != theirs.shape:
            return own.clone()
        taken = (torch.rand(len(own), generator=self.rng) < chance).to(own.device)
        return torch.where(taken.view(-1, *[1] * (own.dim() - 1)), theirs, own)

    def _boxes(self, batch: dict[str, Any], moves: Moves | None) -> list[Boxes]:
        """What the images were made from, in fractions of them, where it went."""
        if "boxes" not in batch:
            raise UserError(
                f"got algorithm.task_weight={self.settings.task_weight} and a dataset without boxes",
                "algorithm.task_weight=0, or a dataset made for a detector",
            )
        height, width = batch["images"].shape[-2:]
        rows = batch["boxes"] if moves is None else moves.boxes(batch["boxes"], (height, width))
        found = []
        for boxes, labels, scores in zip(rows, batch["labels"], batch["scores"], strict=True):
            boxes = boxes / boxes.new_tensor([width, height, width, height])
            found.append(Boxes(boxes, scores, labels).with_area())
        return found

    def _loss(self, name: str, seen: _Seen) -> Tensor:
        s = self.settings
        if name == "task":
            return self.task.synthesis_loss(seen.output, seen.boxes)
        if name in ("kl", "box") and self.finds_boxes:
            if not seen.terms:
                seen.terms = self.task.distillation_terms(seen.output, seen.target)
            return seen.terms[name]
        if name == "kl" and s.temperature == 1:
            return self.task.distillation_loss(seen.output, seen.target)
        if name == "feature":
            return torch.stack(
                [self._feature_loss(n, seen.got[n], seen.wanted[t]) for n, t in self.features.items()]
            ).mean()
        if name == "loss":
            return s.loss(seen.output, seen.target)
        output, target = _logits(seen.output, f"{name}_weight"), _logits(seen.target, f"{name}_weight")
        if name == "kl":
            return kl_divergence(output, target, s.temperature)
        if name == "reverse_kl":
            return reverse_kl(output, target, s.temperature)
        if name == "jensen_shannon":
            return jensen_shannon(output, target, temperature=s.temperature)
        if name == "logits":
            return logits_mse(output, target)
        if name == "label":
            return gated_cross_entropy(output, target, s.label_difficulty)
        assert name == "cam" and self.cam_place is not None and seen.classes is not None and seen.cam is not None
        scores = class_scores(output, seen.classes)
        gradient = torch.autograd.grad(scores, seen.given[self.cam_place], retain_graph=True)
        return grad_cam_loss(class_activation_map(seen.got[self.cam_place], *gradient), seen.cam)

    def _feature_loss(self, name: str, got: Tensor, wanted: Tensor) -> Tensor:
        """Between what the student makes at ``name`` and what the teacher makes there."""
        wanted = self._in_students_units(name, wanted)
        if self.settings.feature_loss == "affinity":
            return feature_affinity(
                got, wanted, random_projection(num_positions(wanted), PROJECTIONS, self.rng, wanted)
            )
        if self.settings.feature_loss == "qfd":
            return quantized_feature_loss(got, wanted, self.settings.feature_bits)
        if self.settings.feature_loss == "cosine":
            return cosine_distance(got, wanted)
        return relative_mse(got, wanted)

    def _in_students_units(self, name: str, wanted: Tensor) -> Tensor:
        """What the teacher makes where the student's sub-module ``name`` does, its channels scaled as the student's."""
        scale = self.feature_scales.get(name)
        return self._student[0].in_its_units(name, wanted) if scale is None else wanted / scale.to(wanted)

    def with_penalty(self, loss: Tensor) -> Tensor:
        """With what drives soft weights to their codes, where there are any."""
        done = self.done(self.trainer.global_step)
        penalty = total(quantizer.penalty(done) for quantizer in self.soft)
        return loss if penalty is None else loss + self.given_loss * penalty

    def _dampening(self) -> Tensor:
        """Mean over layers of the distance of weights to their level."""
        found = []
        for quantizer, layer in {layer.weight_quantizer: layer for layer in self._student[0].layers.values()}.items():
            if not quantizer.has_qparams:
                continue
            with torch.no_grad():
                rounded = quantizer.rows(quantizer(layer.weight))
                scale = quantizer.scale.reshape(-1, 1)
                # Only a uniform grid has its ends at whole steps; weights beyond another's are held to it as well.
                shift = quantizer.zero_point.reshape(-1, 1)
                uniform = quantizer.scheme.grid == "uniform"
                low = scale * (quantizer.scheme.quant_min - shift) if uniform else torch.full_like(scale, -torch.inf)
                high = scale * (quantizer.scheme.quant_max - shift) if uniform else torch.full_like(scale, torch.inf)
            found.append(dampening_loss(quantizer.rows(layer.weight), rounded, scale, low, high))
        return torch.stack(found).mean() if found else torch.zeros((), device=self._teacher[0].device)

    # -- looks at held-out samples -----------------------------------------------------------------------------------

    @torch.no_grad()
    def on_validation_start(self) -> None:
        self.look_began = time.perf_counter()
        if self.averages is not None:
            self.set_aside = [p.detach().clone() for p in self.trained.values()]
            torch._foreach_copy_([p.data for p in self.trained.values()], self.averages)

    def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
        with decided(self.soft):
            size, (loss, agreement) = len(samples_of(batch)), self.look(batch)
        several = self.trainer.world_size > 1  # all look at the same samples, and believe the same figure
        self.log("held_out_loss", loss, batch_size=size, sync_dist=several)
        self.log("held_out_agreement", agreement, batch_size=size, sync_dist=several)

    @torch.no_grad()
    def look(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss and agreement of the student as it is, on samples and, where training mirrors them, their mirror images.

        Images that descended on the network's statistics have patterns that are tuned to its weights as they lie, which
        a student of their kin knows. Mirrored ones do not, and tell better what it makes of images from elsewhere.
        """
        samples = samples_of(batch)
        teacher, student = self.fast_teacher[0], self.student_module

        def teach(images: Tensor) -> Any:
            return teacher(images.clone())  # some networks write into their input

        views = [(samples, outputs_of(self.task, teach, batch))]
        if self.settings.flip and samples.is_floating_point() and samples.dim() == 4:
            mirrored = samples.flip(-1)
            views.append((mirrored, self.task.raw_outputs(teach, mirrored)))
        figures = []
        for images, target in views:
            seen = _Seen(target, output=self.task.raw_outputs(student, images.clone()))
            self._leave_out_padding(batch, seen)
            output, target = seen.output, seen.target
            figures.append((self.task.distillation_loss(output, target), self.task.agreement(output, target)))
        losses, agreements = zip(*figures, strict=True)
        return torch.stack(losses).mean(), torch.stack(agreements).mean()

    def on_validation_end(self) -> None:  # after those of callbacks, which save what was looked at
        if self.set_aside is not None:
            torch._foreach_copy_([p.data for p in self.trained.values()], self.set_aside)
            self.set_aside = None
        self.look_s = time.perf_counter() - self.look_began
        self._draw_anew()

    # -- what an interrupted run goes on from ------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept: dict[str, Any] = {"rng": self.rng.get_state(), "elapsed_s": self.elapsed_s, "look_s": self.look_s}
        if (loss := self.trainer.callback_metrics.get("held_out_loss")) is not None:
            kept["held_out_loss"] = float(loss)  # of these weights, where they are saved for a look
        if self.averages is not None:
            weights = self.set_aside or [p.detach() for p in self.trained.values()]
            kept["weights"] = dict(zip(self.trained, weights, strict=True))
            kept["averages"] = self.averages
        if self.channels is not None:
            kept["channels"] = [self.channels.trained[layer] for layer in self.channels.layers]
        checkpoint["distillation"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["distillation"]
        self.rng.set_state(kept["rng"].cpu())
        self.earlier_s, self.look_s = kept["elapsed_s"], kept["look_s"]
        if self.averages is not None:
            torch._foreach_copy_(self.averages, kept["averages"])
            checkpoint["state_dict"] |= kept["weights"]  # the averages were saved as the network's weights
        self.held_channels = kept.get("channels")

    # -- places in the network ---------------------------------------------------------------------------------------

    def _check_rotated(self) -> None:
        """A UserError where features of a rotated student are wanted: they are the teacher's in other coordinates."""
        s = self.settings
        given = {"feature_weight": self.terms.get("feature"), "intervention": s.intervention}
        for name in [name for name, value in given.items() if value]:
            raise UserError(
                f"got algorithm.{name}={given[name]} and a student whose residual stream was rotated",
                f"algorithm.{name}=0",
                "features of such a student are the teacher's in other coordinates",
            )

    def _places_before_layers(self) -> list[str]:
        """Features with a weight layer between them and the next one: what is there can be taken from the teacher."""
        calls = [call.name for call in self._teacher[0].dataflow.calls]
        layers = [i for i, name in enumerate(calls) if name in weight_layers(self._teacher[0].module)]
        places = sorted((calls.index(theirs), name) for name, theirs in self.features.items())
        ends = [position for position, _ in places[1:]] + [len(calls)]
        return [name for (start, name), end in zip(places, ends, strict=True) if any(start < i < end for i in layers)]

    def _last_map(self) -> str:
        """The last feature map [N, C, H, W] of more than one position, whose class activation maps are compared."""
        shapes = {call.name: call.output_shape for call in self._teacher[0].dataflow.calls}
        maps = [name for name, t in self.features.items() if len(shapes[t]) == 4 and math.prod(shapes[t][2:]) > 1]
        if not maps:
            raise UserError(
                f"got algorithm.cam_weight={self.settings.cam_weight} and {self._teacher[0].name}, in which no feature "
                "map of two dimensions changes its size",
                "algorithm.cam_weight=0 for such a network",
            )
        return maps[-1]


@dataclass
class _Seen:
    """Outputs and features of one batch; features by the name of the sub-module."""

    target: Any = None  # the teacher's output
    wanted: dict[str, Tensor] = field(default_factory=dict)  # the teacher's features
    classes: Tensor | None = None  # [N], those that the teacher names
    cam: Tensor | None = None  # [N, H, W], the teacher's class activation maps
    boxes: list[Boxes] = field(default_factory=list)  # what the images of a detector were made from
    output: Any = None  # the student's output
    terms: dict[str, Tensor] = field(default_factory=dict)  # losses between the outputs of two detectors
    got: dict[str, Tensor] = field(default_factory=dict)  # the student's features
    given: dict[str, Tensor] = field(default_factory=dict)  # what it went on with in their place


def student_to_train(
    teacher: Teacher,
    dataset: SyntheticDataset,
    scheme: Scheme | str = "w4a4",
    weight_quantizer: Any = "mse",
    activation_quantizer: Any = "mse",
    gradient: Literal["lsq", "lsq_plus", "stable", "straight_through"] = "lsq",
    num_calibration_samples: int = 512,
) -> Student:
    """A student of ``teacher`` for a :class:`DistillationModule`: calibrated, weights not rounded, all of it trained.

    ``student.freeze()`` ends the training, ahead of ``save`` and ``dfq.export``.

    Args:
        scheme: a yaml's name or a :class:`~dfq.Scheme`.
        gradient: of the quantizers' steps; straight_through: ranges stay as calibrated.
    """
    chosen = Scheme.from_dict(load("scheme", scheme)) if isinstance(scheme, str) else scheme
    if isinstance(chosen, MixedScheme):
        raise UserError(
            f"got scheme={chosen.name}, whose bits are chosen layer by layer", "a scheme with bits of its own"
        )
    student = Student.from_teacher(teacher, chosen)
    methods = resolve("quantizer", weight_quantizer), resolve("quantizer", activation_quantizer)
    elements = calibrate(student, calibration_images(dataset, num_calibration_samples), *methods)
    student.module.requires_grad_(True)
    if gradient != "straight_through":
        learn_steps(student, gradient, elements)
    return student


LOGITS = ("reverse_kl", "jensen_shannon", "logits", "label", "cam")  # losses of what has one answer a sample
BOXES = ("box", "task")


def _terms(
    settings: DistillationSettings, has_features: bool, detection: Any = None, is_text: bool = False
) -> dict[str, float]:
    """Name → weight of each loss that counts; ``detection``: the task of a detector, None for other networks."""
    finds_boxes = detection is not None
    names = ("kl", *(BOXES if finds_boxes else LOGITS), "feature", *(() if settings.loss is None else ("loss",)))
    if settings.loss is not None and not callable(settings.loss):
        raise UserError(f"got algorithm.loss={settings.loss!r}", "{_target_: package.module.Class} with a __call__")
    weights = {name: getattr(settings, f"{name}_weight") for name in names}
    if settings.feature_weight is None:
        weights["feature"] = 0.0 if is_text else 1.0
    wrong = {f"{name}_weight": getattr(settings, f"{name}_weight") for name in LOGITS} if finds_boxes else {}
    wrong |= {"temperature": settings.temperature - 1, "mixup": settings.mixup if settings.task_weight else 0}
    for name in [name for name, value in wrong.items() if value and finds_boxes]:
        raise UserError(
            f"got algorithm.{name}={getattr(settings, name)} and a detector",
            "algorithm.kl_weight, algorithm.box_weight, algorithm.task_weight (without mixup) and "
            "algorithm.feature_weight for detectors",
        )
    if finds_boxes and not detection.compares_boxes:
        del weights["box"]
        if settings.box_weight:
            raise UserError(
                f"got algorithm.box_weight={settings.box_weight} and the adapter {type(detection.detector).__name__}, "
                "whose raw outputs alone are compared",
                "algorithm.box_weight=0, or an adapter with candidates(raw)",
            )
    elif finds_boxes and settings.box_weight is None:
        weights["box"] = detection.box_weight
    found = {name: weight for name, weight in weights.items() if weight and (has_features or name != "feature")}
    if not found:
        raise UserError(
            "got a distillation without a loss",
            f"at least one of {', '.join(f'algorithm.{name}_weight' for name in names)} above 0"
            + ("" if has_features else ", feature_weight not being enough for a network without feature maps"),
        )
    if settings.blocks_first and "feature" not in found:
        raise UserError(
            f"got algorithm.blocks_first={settings.blocks_first} without a feature loss",
            "algorithm.blocks_first=0, or algorithm.feature_weight above 0 and a network with feature maps",
            "stages that are trained apart have nothing but their own features to learn from",
        )
    return found


def _optimizer(settings: Mapping[str, Any], parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """``{name: package.Class, ...}`` of what it is called with beside the parameters."""
    options = dict(settings)
    name = options.pop("name", None)
    kind = locate(str(name), "algorithm.optimizer.name")
    try:
        return kind(parameters, **options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"got algorithm.optimizer={dict(settings)}, which {name} does not take ({str(error).splitlines()[0]})",
            "name: an optimizer's class, and what it takes",
        ) from error


def _logits(outputs: Any, setting: str) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise UserError(
            f"got algorithm.{setting} above 0 and a network whose outputs are no logits",
            f"algorithm.{setting}=0 for this task (kl_weight with temperature=1 is the task's own loss)",
        )
    return outputs


def _with(output: Any, old: Tensor, new: Tensor) -> Any:
    """``output`` with one of its tensors replaced."""
    return map_tensors(lambda value: new if value is old else value, output)


def _folded(teacher: Teacher) -> nn.Module:
    """The teacher's network, or a copy with its batch norms folded: the same function in fewer passes over memory."""
    pairs = find_foldable(teacher.module, teacher.dataflow)
    if not pairs:
        return teacher.module
    module = copy.deepcopy(teacher.module)
    fold_batch_norm(module, pairs)
    return module


def _is_step(module: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute == "scale" and isinstance(module.get_submodule(owner), Quantizer)
