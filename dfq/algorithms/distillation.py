"""Distillation: train weights and steps of the student on the teacher's outputs for synthetic images.

Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531) with learned steps (LSQ, arXiv 1902.08153; LSQ+, arXiv
2004.09576, zero points too; StableQAT's gradient). By default KL to the teacher's soft outputs plus, but for language
models, the relative error of features where the network changes width or resolution. Each loss is a file of
:mod:`dfq.losses`, which states its paper and equations, and has a weight here; teacher intervention and block
decomposition are described in :mod:`dfq.lightning.distillation`, frozen channels in :mod:`dfq.lightning.freezing`.

With ``low_rank`` weights stay and W + B A is rounded in their place (L4Q, arXiv 2402.04902), A, B, steps and biases
being trained; with ``zeroth_order`` there is no backward pass (ZeroQAT; :class:`dfq.optimizer.ZerothOrder`).

Nothing but synthetic samples is read. The run looks at held-out ones ``checks`` times and keeps the student of the best
look, the one that it was given among them; it may stop early in its second half. Batch norms that were not folded stay
as they are: synthetic images must not move statistics.

With ``time_limit_s`` the cosine schedule ends at the limit, counted from the start of this algorithm; how many steps
that allows depends on the machine, so that the same seed does not give the same bits.

With ``fresh_share`` that part of every batch is not read but drawn from the network that ``generator=gdfq`` has stored
with the dataset, with ``adversarial_weight`` from one that learns what the student gets wrong
(:mod:`dfq.lightning.fresh`); looks are at stored samples, as always.

``student_network`` trains a smaller network than the teacher (quantized distillation; Polino, Pascanu & Alistarh, ICLR
2018, arXiv 1802.05668, section 3). Features are compared where both networks have maps of the same size. The
function is recorded with the student, which it rebuilds; no algorithm goes behind.

Differences from the papers: L4Q begins with steps of its own and computes gradients of weights anew in the backward
pass to save memory; here grids are calibrated and autograd keeps what it needs. LSQ's, see :mod:`dfq.quantizers.lsq`;
Polino et al. distil into weights that are rounded at each step (here as all students are trained), and train batch
norms, which are folded here before training begins: a network that was trained in float before, or has none, is the
better start.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors

from dfq.algorithms._base import Algorithm, Work
from dfq.dataset import SyntheticDataset, samples_of
from dfq.errors import UserError
from dfq.lightning.settings import DistillationSettings
from dfq.modules import LowRank, repeated_blocks, stage_ends, weight_layers
from dfq.quantizers._soft import decided
from dfq.quantizers.lsq import learn_steps
from dfq.settings import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, resolve
from dfq.student import Student, build_network
from dfq.tasks._task import task_of
from dfq.teacher import Teacher
from dfq.weights import to_memory


@dataclass(frozen=True)
class Distillation(DistillationSettings, Algorithm):
    """Minutes on small networks, hours on large ones."""

    batch_size: PositiveInt = 64  # samples a step
    gradient: Literal["lsq", "lsq_plus", "stable", "straight_through"] = "lsq"  # straight_through: ranges stay
    checks: PositiveInt = 10  # looks at held-out synthetic samples during a run
    patience: PositiveInt | None = 5  # looks without a better loss before the second half of a run stops; null: never
    num_calibration_samples: PositiveInt = 512  # samples that set the first ranges
    fresh_share: Fraction = 0.0  # share of a batch that is drawn anew from the network stored with the dataset (gdfq)
    adversarial_weight: NonNegativeFloat = 0.0  # of the student's loss, which that network raises; 0: it stays as it is
    adversarial_lr: PositiveFloat = 1e-3  # Adam on it
    student_network: str | None = None  # package.module:function of a smaller network; null: the teacher's own
    goes_on: ClassVar[bool] = True

    def run(self, work: Work) -> None:
        """Train the student; ``work_dir`` holds the checkpoint an interrupted run goes on from."""
        start = time.perf_counter()
        student, teacher, seed, training = work.student, work.teacher, work.seed, work.training
        work_dir = work.shared_dir or work.work_dir
        # Lightning takes seconds to import; who only rounds does not pay for it.
        import pytorch_lightning as pl
        from pytorch_lightning.callbacks import ModelCheckpoint

        from dfq.lightning.checkpoints import FileCheckpointIO
        from dfq.lightning.data import SyntheticDataModule
        from dfq.lightning.distillation import DistillationModule
        from dfq.lightning.fresh import FreshImages
        from dfq.lightning.looks import Looks, Patience
        from dfq.lightning.progress import StepProgress
        from dfq.lightning.tokens import TokenDistillationModule, has_cache

        self._check(teacher)
        source = self._source(teacher, work.dataset)
        if self.adversarial_weight and training.strategy == "fsdp":  # no process has the whole teacher where it trains
            raise UserError(
                f"got algorithm.adversarial_weight={self.adversarial_weight} and trainer=fsdp",
                "algorithm.adversarial_weight=0, or trainer=ddp",
            )
        if self.zeroth_order and training.world_size > 1:  # nothing goes backward, so nothing would be averaged
            raise UserError(
                f"got algorithm.zeroth_order=true and {training.world_size} processes", "trainer=single", "one process"
            )
        features = {name: name for name in self._places(teacher) if _is_of_samples(teacher, name)}
        if self.student_network is not None:
            features = _replace_network(student, teacher, self.student_network, self.feature_loss != "affinity", seed)
        to_memory(student.module)
        self._learn_steps(student, work.ensure_calibrated(work.images(self.num_calibration_samples)), seed)
        data = SyntheticDataModule(work.dataset, batch_size=self.batch_size, seed=seed)
        task = task_of(teacher)
        kind = TokenDistillationModule if self._is_of_tokens(teacher) else DistillationModule
        # What is sharded for training doesn't come back; the one to keep takes the weights over.
        trained = copy.deepcopy(student) if training.strategy == "fsdp" else student
        module = kind(trained, teacher, task, features, self, seed, start)
        module.runs_teacher = kind is DistillationModule or not has_cache(work.dataset[0])
        before = time.perf_counter()
        # Not in memory: what the run began with is wanted in the end, or not at all. Each process has its own.
        given, loss_before = work.work_dir / "given.safetensors", _held_out_loss(module, data)
        module.given_loss = loss_before
        work.work_dir.mkdir(parents=True, exist_ok=True)
        save_safetensors(_state(module), given)
        module.look_s = time.perf_counter() - before
        best = ModelCheckpoint(
            work_dir, filename="best", monitor="held_out_loss", save_weights_only=True, save_on_train_epoch_end=False
        )
        # One of its own: what goes on after an interruption is the last look, be it better or not.
        last = ModelCheckpoint(work_dir, filename="last", save_on_train_epoch_end=False, enable_version_counter=False)
        callbacks = [best, last, Looks(self.checks), StepProgress("distill", self.max_steps, SHOWN)]
        if source is not None:
            against = (self.batch_size, self.adversarial_weight, self.adversarial_lr)
            callbacks.append(FreshImages(source, teacher, self.fresh_share, seed, *against))
        aside = nullcontext() if module.runs_teacher else _on_cpu(teacher)
        with aside, quiet_lightning(), training.logger.opened() as logger:
            trainer = pl.Trainer(
                **training.arguments(teacher.device),
                max_steps=self.max_steps,
                max_epochs=-1,
                check_val_every_n_epoch=None,
                val_check_interval=self.max_steps,  # Looks says when
                num_sanity_val_steps=0,
                plugins=[FileCheckpointIO()],
                callbacks=callbacks if self.patience is None else [*callbacks, Patience(self.patience)],
                enable_progress_bar=False,
                logger=logger,
                log_every_n_steps=1,  # what is logged at all
                enable_model_summary=False,
                default_root_dir=work_dir,
            )
            checkpoint = work_dir / "last.ckpt"
            with shared_by_name() if training.strategy == "ddp_spawn" else nullcontext():
                _fit(trainer, module, data, str(checkpoint) if checkpoint.exists() else None)
        state: Mapping[str, torch.Tensor] | None = None
        if best.best_model_path:  # its figure is read from there too: the process that looked may be gone
            found = torch.load(best.best_model_path, map_location="cpu", weights_only=True, mmap=True)
            if found["distillation"]["held_out_loss"] < loss_before:
                state = found["state_dict"]
        state = load_safetensors(given) if state is None else state
        prefix = "student_module."
        student.module.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
        state = found = None  # mapped, and read only now
        wait_for_all()  # behind this, rank 0 may remove what was read
        given.unlink()
        for network in (student.module, teacher.module):
            network.to(teacher.device)
        _merge_low_rank(student)

    def _is_of_tokens(self, teacher: Teacher) -> bool:
        """Whether nothing is asked for but a divergence of text, and features: logits need not be whole then."""
        others = (self.reverse_kl_weight, self.jensen_shannon_weight, self.logits_weight, self.label_weight)
        more = (*others, self.cam_weight, self.intervention, self.blocks_first, self.dampen, self.frozen_channels)
        whole = self.loss is not None or self.balance != "fixed"
        return teacher.task == "language_modeling" and not any(more) and not whole

    def _places(self, teacher: Teacher) -> list[str]:
        """Where features are compared."""
        if self.feature_places == "stages":
            return stage_ends(teacher.dataflow)
        found = repeated_blocks(teacher.module, teacher.dataflow)
        if not found:
            raise UserError(
                f"got algorithm.feature_places=blocks and {teacher.name}, which has no list of blocks with outputs of "
                "one shape",
                "algorithm.feature_places=stages",
            )
        return found

    def _check(self, teacher: Teacher) -> None:
        """A UserError for settings that do not go together."""
        of_text = {"token_tau": None, "ntp_weight": 0.0, "attention_map_weight": 0.0, "attention_output_weight": 0.0}
        wrong = [name for name, unset in of_text.items() if getattr(self, name) != unset]
        if wrong and not self._is_of_tokens(teacher):
            raise UserError(
                f"got algorithm.{wrong[0]}={getattr(self, wrong[0])} and {teacher.name}",
                "a language model, and no loss of another kind (reverse_kl_weight, logits_weight, intervention, ...)",
                f"leave algorithm.{wrong[0]} away",
            )
        asked = {"feature_loss": self.feature_loss != "relative_mse", "feature_places": self.feature_places != "stages"}
        for name in [name for name, is_asked in asked.items() if is_asked and self.feature_weight is None]:
            if teacher.task == "language_modeling":
                raise UserError(
                    f"got algorithm.{name}={getattr(self, name)} and {teacher.name} without algorithm.feature_weight",
                    "algorithm.feature_weight above 0",
                    "of language models features are compared on request alone",
                )
        both = [name for name in ("frozen_channels", "dampen") if getattr(self, name)]
        if self.low_rank is not None and both:
            raise UserError(
                f"got algorithm.low_rank={self.low_rank} and algorithm.{both[0]}={getattr(self, both[0])}",
                "one of the two",
                "weights stay what they are with low_rank",
            )
        if self.zeroth_order and (self.frozen_channels or self.cam_weight or self.balance == "learned"):
            what = "frozen_channels" if self.frozen_channels else "cam_weight" if self.cam_weight else "balance"
            raise UserError(
                f"got algorithm.zeroth_order=true and algorithm.{what}={getattr(self, what)}",
                "losses and schedules that need no gradient",
                f"leave algorithm.{what} away",
            )

    def _source(self, teacher: Teacher, dataset: SyntheticDataset) -> Any:
        """The network that images are drawn from during the run; None: no image is."""
        if self.fresh_share == 0:
            if self.adversarial_weight:
                raise UserError(
                    f"got algorithm.adversarial_weight={self.adversarial_weight} and algorithm.fresh_share=0",
                    "algorithm.fresh_share above 0: what a network has learned shows in the images drawn from it",
                )
            return None
        weights = dataset.source()
        if weights is None:
            raise UserError(
                f"got algorithm.fresh_share={self.fresh_share} and {dataset.path}, with which no network is stored",
                "a dataset made by generator=gdfq",
                "generate it with that, into a new folder, or set algorithm.fresh_share=0",
            )
        return resolve("generator", dataset.manifest["settings"]["generator"]).restored(teacher, weights)

    def _learn_steps(self, student: Student, elements: dict[str, int], seed: int) -> None:
        student.module.requires_grad_(True)
        if not self.train_float:
            own = {id(layer.weight) for layer in student.layers.values()}
            for layer in weight_layers(student.module).values():
                layer.weight.requires_grad_(id(layer.weight) in own)
        if self.low_rank is not None:
            _add_low_rank(student, self.low_rank, seed)
        if self.gradient == "straight_through":
            return
        learn_steps(student, self.gradient, elements)


def _is_of_samples(teacher: Teacher, name: str) -> bool:
    """Whether a feature has a row a sample, and not of proposals or queries, which each network chooses anew."""
    flow = teacher.dataflow
    rows = flow.calls_of(name)[0].output_shape[0]
    return rows == len(teacher.example()) and not flow.follows_choice(teacher.module, name)


SHOWN = {"loss": "loss", "held_out_loss": "held-out"}


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All entries; tied ones, which safetensors takes once, and others that overlap as copies."""
    seen: set[int] = set()
    found = {}
    for name, tensor in module.state_dict().items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return found


def _add_low_rank(student: Student, rank: int, seed: int) -> None:
    """A pair of matrices beside each weight, which is not trained itself; tied weights have one pair."""
    rng = torch.Generator().manual_seed(seed)
    pairs: dict[int, LowRank] = {}
    for layer in student.layers.values():
        if id(layer.weight) not in pairs:
            pairs[id(layer.weight)] = LowRank(layer.weight.detach(), rank, rng)
        layer.low_rank = pairs[id(layer.weight)]
        layer.weight.requires_grad_(False)


@torch.no_grad()
def _merge_low_rank(student: Student) -> None:
    merged: set[int] = set()
    for layer in student.layers.values():
        if layer.low_rank is None:
            continue
        if id(layer.weight) not in merged:
            layer.weight.copy_(layer.low_rank(layer.weight))
            merged.add(id(layer.weight))
        del layer.low_rank  # a sub-module until here
        layer.low_rank = None


@torch.no_grad()
def _held_out_loss(module: Any, data: Any) -> float:
    """Of the student as it is, on what the run will look at."""
    device = next(module.parameters()).device
    total = 0.0
    for batch in data.val_dataloader():
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        with decided(module.soft):
            total += float(module.look(batch)[0]) * len(samples_of(batch))
    return total / len(data.held_out_indices)


def _replace_network(student: Student, teacher: Teacher, factory: str, same_width: bool, seed: int) -> dict[str, str]:
    """Make ``student`` one of the network that ``factory`` builds; returns the places in both that can be compared."""
    with torch.random.fork_rng(devices=[]):  # the network may come with random weights
        torch.default_generator.manual_seed(seed)
        network = build_network(factory, student.teacher).to(teacher.device)
    small = Student.from_teacher(network, student.scheme)
    small.network = factory
    student.become(small)
    theirs = {name: teacher.dataflow.calls_of(name)[0].output_shape for name in stage_ends(teacher.dataflow)}
    pairs: dict[str, str] = {}
    for name in stage_ends(network.dataflow):
        shape = network.dataflow.calls_of(name)[0].output_shape
        fitting = [n for n, other in theirs.items() if (other == shape if same_width else other[2:] == shape[2:])]
        if fitting:
            pairs[name] = fitting[-1]
    return pairs


@contextmanager
def _on_cpu(teacher: Teacher) -> Iterator[None]:
    """The device is the student's alone inside; ``teacher.device`` stays what it is."""
    try:
        teacher.module.to("cpu")
        yield
    finally:
        teacher.module.to(teacher.device)


@contextmanager
def shared_by_name() -> Iterator[None]:
    """Tensors go to processes that are started here by the name of their memory: handing on open files fails in some
    containers, and takes one for each tensor."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def wait_for_all() -> None:
    """Until every process has come here; at once where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's lines on devices it does not use and products it recommends; warnings of substance stay."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # The data is a memory map or a few tensors: worker processes would only cost.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # The student is in evaluation mode on purpose.
            warnings.filterwarnings("ignore", message=".*module.s. in eval mode.*")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # inside Lightning
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fit(trainer: Any, module: Any, data: Any, checkpoint: str | None) -> None:
    """``trainer.fit`` that ends in KeyboardInterrupt after Ctrl-C, as everything else here does.

    Lightning ignores SIGINT from then on and leaves by ``sys.exit(1)``.
    """
    handler, world_size = signal.getsignal(signal.SIGINT), os.environ.get("WORLD_SIZE")
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
    finally:
        if world_size is not None:  # Lightning takes it away, and with it who of several processes this one is
            os.environ["WORLD_SIZE"] = world_size
