"""Fit each block's output to the float network's, one after the other: the pieces that block-wise methods share.

:class:`BlockFitting` walks the blocks; what is trained in them is each method's own. :class:`BlockReconstruction`
chooses how every weight is rounded (AdaRound, BRECQ, QDrop, Genie-M and ``reconstruction``; each of those files says
which pieces it uses).

For a block with input x (float) and x_q (with everything before it quantized), in the order blocks run::

    minimize    C |f_q(x') - f(x)|^2 / |f(x)|^2  +  lambda sum_i 1 - |2 h(V_i) - 1|^beta        (AdaRound, eq. 21, 24)
    weights     s (clamp(B + h(V) + z, quant_min, quant_max) - z),  B = floor(w / s_0)           (Genie-M, eq. 7)
    x'          x_q, or element by element x or x_q with probability ``drop``                    (QDrop, eq. 8)

h(V) is AdaRound's stretched sigmoid, beta falls from 20 to 2 after a warm-up without the second term, s is trained with
V where ``weight_step_lr`` is above zero (Genie-M keeps B constant for it), activation steps have LSQ's gradient.
``sensitivity`` says what errors e count by, from gradients g of log p(label) at the block's output, labels drawn from
the teacher's own distribution: ``elements`` multiplies each square by g^2 (BRECQ, eq. 10, the diagonal of the Fisher
information), ``channels`` takes e^T F e, F = E[g g^T] [C, C] over samples and places, so that errors of channels make
up for each other (YAQA's G, arXiv 2505.22988, of blocks in the place of layers).
The error is relative and counted per channel (C of them), so lambda and the learning rates mean the same in every block
of every network; the papers' absolute errors do not. A block that runs several times in a forward (the head of a
detector, once a level) is fitted by all of its calls: each step draws samples for every one of them, and the first term
is the mean of their relative errors, whatever their sizes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfq.algorithms._base import Algorithm, Clock, Work, tell_left
from dfq.algorithms._bias_correction import undo_bias_correction
from dfq.algorithms._likelihood import drawn_log_likelihood
from dfq.algorithms._linear_algebra import cholesky, damped
from dfq.blocks import Block, Captured, Captures, find_blocks, run_block
from dfq.channels import (
    scaled_float_network,
)
from dfq.errors import UserError
from dfq.hooks import evaluation_mode, forward_hooks, record_dataflow
from dfq.modules import QuantizedLayer, Quantizer, to_fast_layout
from dfq.optimizer import ScaledAdam
from dfq.precision import exact_device
from dfq.progress import progress_bar
from dfq.quantizers._soft import SoftQuantizer, is_off_grid, total
from dfq.quantizers.lsq import learn_step
from dfq.settings import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from dfq.student import Student
from dfq.tasks._task import task_of
from dfq.teacher import Teacher
from dfq.weights import copy_network

FISHER_DAMPING = 0.01  # of the channels' Fisher information, in units of its diagonal's mean

Sensitivity = Literal["none", "elements", "channels"]
Measure = Callable[[Tensor, Tensor, Tensor], Tensor]  # output and wanted [B, ...], numbers of the samples [B] → errors


@dataclass(frozen=True)
class BlockFitting(Algorithm):
    """Blocks in the order they run, each on what the quantized ones before it make. :meth:`trainable` is a method's."""

    iterations: PositiveInt = 1000  # steps a block
    batch_size: PositiveInt = 32  # samples a step
    num_samples: PositiveInt = 1024  # synthetic samples that blocks are fitted on
    time_limit_s: PositiveFloat | None = None  # seconds for all blocks; null: no limit (the same seed, the same bits)
    memory_bytes: PositiveInt = 2**31  # activations of one tensor kept in memory; more go to a file
    single_layers: ClassVar[bool] = False

    @property
    def float_share(self) -> float:
        """Chance of an input, and of activations inside, to stay float during training."""
        return 0.0

    @property
    def num_parts(self) -> int:
        """How many parts come after the blocks, each with as much of the time limit as one of them."""
        return 0

    @staticmethod
    def takes(layer: QuantizedLayer) -> bool:
        """Whether the layer's weight is trained; a block may have others, whose biases and inputs' steps are."""
        return True

    def trainable(
        self, student: Student, block: Block, activations: list[Quantizer], elements: dict[Quantizer, int]
    ) -> Trainable:
        """What is trained in ``block``."""
        raise NotImplementedError

    def error(self, output: Tensor, wanted: Tensor) -> Tensor:
        """What is minimized of a block's output [N, ...], before it is averaged and divided by the outputs' size."""
        return (output - wanted).square()

    def measures(
        self, reference: nn.Module, teacher: Teacher, block: Block, images: Tensor, rng: torch.Generator
    ) -> list[Measure]:
        """How far what each of a block's calls gives is from what is wanted; the block is fitted on ``images``."""
        return [lambda output, wanted, _chosen: self.error(output, wanted)] * block.calls

    def finish(
        self, work: Work, reference: nn.Module, images: Tensor, elements: dict[Quantizer, int], limit_s: float
    ) -> None:
        """After the last block."""

    def run(self, work: Work) -> None:
        """Fit the student block by block; finished blocks are kept in ``work_dir`` for a resumed run."""
        clock = Clock(self.time_limit_s)
        student, teacher, seed, work_dir = work.student, work.teacher, work.seed, work.work_dir
        images = work.images(self.num_samples)
        reference = float_reference(student, teacher)
        counts = work.ensure_calibrated(images)
        elements = {student.activation_quantizers[name]: count for name, count in counts.items()}
        student.module.requires_grad_(False)
        flow = record_dataflow(reference, teacher.example())
        blocks = find_blocks(reference, flow, student.layers, self.single_layers)
        mine = {name for block in blocks for name in block.layers if self.takes(student.layers[name])}
        tell_left(self, student, mine)
        # Those that run once have the random numbers that they would have without the others.
        numbers = {block: number for number, block in enumerate(sorted(blocks, key=lambda block: block.calls > 1))}
        done, looking_s = _Done(work_dir), 0.0  # seconds from one block's fit to the next one's
        for index in range(len(blocks)):  # what an interrupted run had finished
            done.load(index, student)
        layout = to_fast_layout([student.module, reference], teacher.example())
        if images.dim() == 4:
            images = images.contiguous(memory_format=layout)
        captures = Captures(student.module, reference, images, 4 * self.batch_size, work_dir, self.memory_bytes)
        with captures, progress_bar("reconstruct", len(blocks) * self.iterations, "steps") as advance:
            for index, block in enumerate(blocks):
                if done.has(index):
                    advance(self.iterations)
                    continue
                if clock.left_s <= looking_s:  # blocks that are left keep nearest rounding
                    break
                began = time.perf_counter()
                rng = torch.Generator().manual_seed(seed * 100_003 + numbers[block])
                calls = captures.calls_of(block)
                if calls is None:
                    tell_left(self, student, student.layers.keys() - block.layers)
                    advance(self.iterations)
                    continue
                measures = self.measures(reference, teacher, block, images, rng)
                looking_s, blocks_left = time.perf_counter() - began, len(blocks) - index
                limit_s = (clock.left_s - looking_s * (blocks_left - 1)) / (blocks_left + self.num_parts)
                fit = _Fit(self, student, calls, elements, measures, rng)
                fit.run(limit_s, advance)
                done.save(index, student, block, fit.trainable.activations)
        if clock.left_s > 0:
            self.finish(work, reference, images, elements, clock.left_s)
        student.module.to(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class BlockReconstruction(BlockFitting):
    """What all methods that choose roundings have; a method's file sets its own defaults."""

    rounds_weights: ClassVar[bool] = True
    rounding_lr: PositiveFloat = 1e-2  # Adam on the rounding logits V
    weight_step_lr: NonNegativeFloat = 0.0  # Adam on weight steps, relative to each; 0: they stay
    activation_step_lr: NonNegativeFloat = 0.0  # Adam on activation steps, relative to each; 0: they stay
    bias_lr: NonNegativeFloat = 0.0  # Adam on biases, in units of their mean magnitude; 0: they stay
    drop: Fraction = 0.0  # share of inputs, and of activations inside, that stay float during training (QDrop)
    rounding_weight: NonNegativeFloat = 0.05  # lambda
    warm_up: Fraction = 0.2  # share of the steps before lambda sets in
    finish_iterations: NonNegativeInt = 0  # steps at the end that train steps and biases on the teacher's outputs
    sensitivity: Sensitivity = "none"  # what errors count by: gradients of the teacher's likelihood (see above)

    @property
    def float_share(self) -> float:
        return self.drop

    @property
    def num_parts(self) -> int:
        return int(self.finish_iterations > 0)

    @staticmethod
    def takes(layer: QuantizedLayer) -> bool:
        """Weights between two codes: those on levels of many sizes (small floats) stay rounded to nearest."""
        return layer.weight_quantizer.scheme.grid in ("uniform", "ternary", "seq")

    def trainable(
        self, student: Student, block: Block, activations: list[Quantizer], elements: dict[Quantizer, int]
    ) -> Trainable:
        found = student.layers
        return _Roundings(self, [found[name] for name in block.layers], activations, elements, True)

    def measures(
        self, reference: nn.Module, teacher: Teacher, block: Block, images: Tensor, rng: torch.Generator
    ) -> list[Measure]:
        plain = super().measures(reference, teacher, block, images, rng)
        if self.sensitivity == "none":
            return plain
        found = self._gradients(reference, teacher, block, images, rng)
        pairs = zip(plain, found, strict=True)
        return [plain if g is None else self._weighted(g, teacher.device) for plain, g in pairs]

    def _weighted(self, gradients: list[Tensor], device: torch.device) -> Measure:
        if self.sensitivity == "channels":
            factor = channel_factor(gradients).to(device)
            return lambda output, wanted, _chosen: mixed(output - wanted, factor).square()
        weights = torch.cat(gradients).square_()
        weights /= weights.mean().clamp(min=1e-30)
        return lambda output, wanted, chosen: self.error(output, wanted) * weights[chosen].to(output.device)

    def finish(
        self, work: Work, reference: nn.Module, images: Tensor, elements: dict[Quantizer, int], limit_s: float
    ) -> None:
        """Train steps and biases, not the codes, on the float outputs: blocks were fitted one by one."""
        if not self.finish_iterations:
            return
        student, task = work.student, task_of(work.teacher)
        rng = torch.Generator().manual_seed(work.seed)
        activations = [quantizer for quantizer in elements if quantizer.has_qparams]
        trainable = _Roundings(self, student.layers.values(), activations, elements, False)

        def float_outputs(batch: Tensor) -> Any:
            with evaluation_mode(reference):
                return reference(batch)

        def loss(_done: float) -> Tensor:
            chosen = torch.randint(len(images), (min(self.batch_size, len(images)),), generator=rng)
            parts = student.batches(images[chosen].to(student.device), len(chosen))
            return output_loss(task, student, float_outputs, parts)

        with trainable as groups, progress_bar("finish", self.finish_iterations, "steps") as advance:
            descend(groups, loss, trainable.keep_steps_positive, self.finish_iterations, max(limit_s, 1e-3), advance)

    def _gradients(
        self, reference: nn.Module, teacher: Teacher, block: Block, images: Tensor, rng: torch.Generator
    ) -> list[list[Tensor] | None]:
        """Gradients [n, ...] of log p(label) at the output of each of the block's calls, batch by batch.

        None where no label depends on it. The label of a sample is drawn from what the teacher says of it.
        """
        task = task_of(teacher)
        last = reference.get_submodule(block.modules[-1])
        parts: list[tuple[Tensor | None, ...]] = []
        for batch in teacher.input_spec.batches(images, 4 * self.batch_size):
            kept: list[Tensor] = []

            def keep(_name: str, _module: nn.Module, _inputs: tuple, output: Any, kept: list = kept) -> Tensor:
                kept.append(output.detach().requires_grad_())
                return kept[-1].clone()  # the next operation may write into it

            with forward_hooks([(block.name, last)], after=keep):
                value = drawn_log_likelihood(task, reference, batch.to(teacher.device), rng)
            if not value.requires_grad:  # a block of boxes alone
                return [None] * block.calls
            found = torch.autograd.grad(value, kept[: block.calls], allow_unused=True)
            parts.append(tuple(None if gradient is None else gradient.cpu() for gradient in found))  # of all samples
        calls = zip(*parts, strict=True)
        return [None if any(part is None for part in call) else list(call) for call in calls]


def channel_factor(gradients: list[Tensor]) -> Tensor:
    """L [C, C] of L L^T = C F / tr(F), F = E[g g^T] the Fisher information of the channels at one place.

    Args:
        gradients: [n, C, H, W] or [n, ..., C] each.
    """
    rows = [g.float().movedim(1 if g.dim() == 4 else -1, 0).flatten(1) for g in gradients]
    moment = torch.stack([part @ part.mT for part in rows]).sum(0)[None]
    factor = cholesky(damped(moment, FISHER_DAMPING))[0]
    return factor * (len(factor) / factor.square().sum().clamp(min=1e-30)).sqrt()


def mixed(error: Tensor, factor: Tensor) -> Tensor:
    """Errors e [n, C, H, W] or [n, ..., C] as e^T L, channels last: their squares sum to e^T L L^T e."""
    return (error.movedim(1, -1) if error.dim() == 4 else error) @ factor.to(error.dtype)


def output_loss(task: Any, student: Callable, reference: Callable, parts: tuple[Tensor, ...]) -> Tensor:
    """The task's distillation loss between two networks' outputs for a batch, which comes in ``parts``.

    Of several parts whole outputs (logits of many tokens) stand in memory one at a time, in the backward pass too.
    """

    def of_part(batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = task.raw_outputs(reference, batch.clone())  # some networks write into their input
        return task.distillation_loss(task.raw_outputs(student, batch), wanted)

    if len(parts) == 1:
        return of_part(*parts)
    losses = [checkpoint(of_part, part, use_reentrant=False) * len(part) for part in parts]
    return torch.stack(losses).sum() / sum(len(part) for part in parts)


def float_reference(student: Student, teacher: Teacher) -> nn.Module:
    """What blocks are fitted to: the student in float, or the teacher where the student's weights are rounded for good,
    its channels scaled as the student's (what AWQ does stays inside blocks)."""
    rounded = student.has_grids and not any(
        is_off_grid(layer) for layer in student.layers.values() if layer.weight_quantizer.has_qparams
    )
    if not rounded:
        return float_copy(student, teacher)
    if student.surgery.rotated:
        raise UserError(
            "got a student that was rotated and rounded: what its blocks should give is not known any more",
            "rotation and then one algorithm that rounds",
        )
    undo_bias_correction(student)
    return scaled_float_network(student, teacher).module.requires_grad_(False).eval()


def float_copy(student: Student, teacher: Teacher) -> nn.Module:
    """The student's module tree in float, to be run and not to be changed: weights that are the teacher's it shares.

    What bias correction has added is taken back first, in the student too.
    """
    undo_bias_correction(student)
    reference = copy_network(student.module, teacher.module).requires_grad_(False)
    for part in reference.modules():
        if isinstance(part, Quantizer):
            part.enabled = False
    return reference


def magnitude(parameter: Tensor, beside: Tensor | None = None) -> Tensor:
    """What a rate is in units of, []: the mean magnitude of what is trained; of what is zero throughout, that of what
    it stands ``beside``; where that is zero or missing, 1, as that of a gain mostly is."""
    sizes = [tensor.detach().abs().mean() for tensor in (parameter, beside) if tensor is not None]
    return next((size for size in sizes if size > 0), torch.ones_like(sizes[0]))


class Trainable:
    """What is trained of some layers: in place while the context is open, rounded and frozen where it ends.

    Args:
        activations: quantizers whose steps are trained.
        elements: of each activation quantizer, that it rounds in one sample.
    """

    def __init__(
        self,
        settings: BlockFitting,
        layers: Iterable[QuantizedLayer],
        activations: list[Quantizer],
        elements: dict[Quantizer, int],
        activation_step_lr: float = 0.0,
        bias_lr: float = 0.0,
    ):
        self.settings, self.layers, self.activations, self.elements = settings, list(layers), activations, elements
        self.activation_step_lr, self.bias_lr = activation_step_lr, bias_lr

    def __enter__(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer; those whose rate decays say so."""
        groups = []
        if self.activation_step_lr > 0:
            for quantizer in self.activations:
                steps = learn_step(quantizer, self.elements.get(quantizer, 1))
                groups += [self.group(step, self.activation_step_lr, step.detach().abs()) for step in steps]
        if self.bias_lr > 0:
            for layer in self.layers:
                if layer.bias is not None:
                    layer.bias.requires_grad_(True)
                    groups.append(self.group(layer.bias, self.bias_lr, magnitude(layer.bias, layer.weight)))
        self.smallest = {quantizer: quantizer.scale.detach() * 1e-2 for quantizer in self.activations}
        return groups

    @staticmethod
    def group(parameter: Tensor, lr: float, size: Tensor) -> dict[str, Any]:
        return {"params": [parameter], "lr": lr, "size": size, "decays": True}

    def __exit__(self, *_: Any) -> None:
        for quantizer in self.activations:
            quantizer.freeze()
        for layer in self.layers:
            if layer.bias is not None:
                layer.bias.requires_grad_(False)

    def penalty(self, done: float) -> Tensor | None:
        """A term of the loss that has nothing to do with samples; ``done`` is the share of the steps that is over."""
        return None

    @torch.no_grad()
    def keep_steps_positive(self) -> None:
        """A step that crossed zero would flip the sign of its whole tensor."""
        for quantizer, smallest in self.smallest.items():
            quantizer.scale.clamp_(min=smallest)


class _Roundings(Trainable):
    """With ``roundings``: those of weights too; else only what is not an integer in the artifact."""

    settings: BlockReconstruction

    def __init__(
        self,
        settings: BlockReconstruction,
        layers: Iterable[QuantizedLayer],
        activations: list[Quantizer],
        elements: dict[Quantizer, int],
        roundings: bool,
    ):
        super().__init__(settings, layers, activations, elements, settings.activation_step_lr, settings.bias_lr)
        self.roundings = roundings
        self.hard = {layer: layer.weight_quantizer for layer in self.layers}
        # A weight that is on its grid already (tied to a layer of an earlier block) keeps its codes.
        self.soft = {
            layer: SoftQuantizer(
                layer.weight_quantizer,
                layer.weight,
                settings.weight_step_lr > 0,
                settings.rounding_weight,
                settings.warm_up,
            )
            for layer in self.layers
            if settings.takes(layer) and (is_off_grid(layer) if roundings else settings.weight_step_lr > 0)
        }

    def __enter__(self) -> list[dict[str, Any]]:
        s, groups = self.settings, []
        for layer, soft in self.soft.items():
            layer.weight_quantizer = soft  # type: ignore[assignment]  # quacks like one
            if self.roundings:
                groups.append({"params": [soft.logits], "lr": s.rounding_lr, "decays": False})
            else:
                soft.decide()
            if soft.step.requires_grad:
                groups.append(self.group(soft.step, s.weight_step_lr, soft.step.detach().abs()))
        return groups + super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for layer, soft in self.soft.items():
            layer.weight_quantizer = self.hard[layer]
            layer.weight.data.copy_(soft.hardened())
            layer.weight_quantizer.set_qparams(soft.scale.detach(), layer.weight_quantizer.zero_point)
        super().__exit__(*error)

    def penalty(self, done: float) -> Tensor | None:
        return total([soft.penalty(done) for soft in self.soft.values()])


def descend(
    groups: list[dict[str, Any]],
    loss: Callable[[float], Tensor],
    after: Callable[[], None],
    iterations: int,
    limit_s: float,
    advance: Any,
) -> None:
    """Adam on ``groups`` for ``iterations`` steps or ``limit_s`` seconds; ``loss`` is told the share that is done."""
    groups = [group for group in groups if group["lr"] > 0]
    start, step = time.perf_counter(), 0
    if groups:
        sizes = {group["params"][0]: group.pop("size") for group in groups if "size" in group}
        optimizer = ScaledAdam(groups, sizes, fused=groups[0]["params"][0].device.type != "mps")
        first = [group["lr"] for group in optimizer.param_groups]
        while (done := max(step / iterations, (time.perf_counter() - start) / limit_s)) < 1:
            for group, lr in zip(optimizer.param_groups, first, strict=True):
                if group["decays"]:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.zero_grad(set_to_none=True)
            loss(done).backward()
            optimizer.step()
            after()
            step += 1
            advance(1)
    advance(iterations - step)


class _Fit:
    """One block's optimization."""

    def __init__(
        self,
        settings: BlockFitting,
        student: Student,
        calls: list[Captured],
        elements: dict[Quantizer, int],
        measures: list[Measure],
        rng: torch.Generator,
    ):
        self.settings, self.calls, self.measures, self.rng = settings, calls, measures, rng
        self.block, self.network, self.device = calls[0].block, student.module, student.device
        self.trainable = settings.trainable(student, self.block, self._activation_quantizers(student), elements)
        # One size for all batches: a batch of its own would weigh samples with small outputs up.
        squares = (call.float_outputs.square() for call in calls)
        self.sizes = [x.to(exact_device(x.device)).mean(dtype=torch.float64).item() or 1.0 for x in squares]

    def _activation_quantizers(self, student: Student) -> list[Quantizer]:
        """Those that run in the block and have a grid."""
        ran: dict[Quantizer, None] = {}

        def note(_name: str, module: nn.Module, _inputs: tuple) -> None:
            assert isinstance(module, Quantizer)
            ran[module] = None

        with torch.no_grad(), forward_hooks(student.activation_quantizers.items(), before=note):
            for call in self.calls:
                run_block(self.network, self.block, call.inputs[:2].to(self.device), call.arguments)
        return [quantizer for quantizer in ran if quantizer.has_qparams]

    def run(self, limit_s: float, advance: Any) -> None:
        with self.trainable as groups, self._drop():
            descend(
                groups,
                self._loss,
                self.trainable.keep_steps_positive,
                self.settings.iterations,
                max(limit_s, 1e-3),
                advance,
            )

    def _loss(self, done: float) -> Tensor:
        calls = zip(self.calls, self.measures, self.sizes, strict=True)
        loss = torch.stack([self._error(*call) for call in calls]).mean()
        penalty = self.trainable.penalty(done)
        return loss if penalty is None else loss + penalty

    def _error(self, call: Captured, measure: Measure, size: float) -> Tensor:
        """Of a batch of one of the block's calls, relative to its outputs' ``size``; samples are drawn for each."""
        s, count = self.settings, len(call.inputs)
        chosen = torch.randint(count, (min(s.batch_size, count),), generator=self.rng)
        x, wanted = call.inputs[chosen].to(self.device), call.float_outputs[chosen].to(self.device)
        if s.float_share > 0:
            x = torch.lerp(x, call.float_inputs[chosen].to(self.device), self._chance(x, s.float_share))
        error = measure(run_block(self.network, self.block, x, call.arguments), wanted, chosen)
        return wanted.shape[1 if wanted.dim() == 4 else -1] * error.mean() / size

    def _chance(self, like: Tensor, p: float) -> Tensor:
        """1 with probability ``p``, to a 256th, and else 0, element by element; random numbers on the CPU.

        A byte an element is four times as fast as a float, and a mixture by 1 and 0 twice as fast as by a condition.
        """
        words = torch.empty((like.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None, generator=self.rng)
        share, numbers = round(256 * p), words.view(torch.uint8)[: like.numel()]
        # 256 is no byte: compared with it, every number would be the larger one.
        taken = numbers < share if share < 256 else torch.ones_like(numbers)
        return torch.empty_like(like).copy_(taken.view(like.shape))

    @contextmanager
    def _drop(self) -> Iterator[None]:
        """QDrop inside the block: some activations pass their quantizer by."""
        p = self.settings.float_share

        def mix(_name: str, _module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            return torch.lerp(output, inputs[0], self._chance(output, p))

        with forward_hooks([("", q) for q in self.trainable.activations] if p > 0 else [], after=mix):
            yield


class _Done:
    """Finished blocks on disk, so that an interrupted run goes on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, index: int) -> Path:
        return self.folder / f"block_{index:04d}.pt"

    def has(self, index: int) -> bool:
        return self._path(index).exists()

    def save(self, index: int, student: Student, block: Block, activations: Iterable[Quantizer]) -> None:
        """What a fit of ``block`` can have changed: what is inside, and ``activations``, some of them elsewhere."""
        ran = set(activations)
        names = [*block.modules, *(name for name, part in student.activation_quantizers.items() if part in ran)]
        inside = tuple(f"{name}." for name in names)
        state = student.module.state_dict()
        # Copies: of a tensor that is a part of another, the whole other one would be written.
        state = {name: tensor.clone() for name, tensor in state.items() if name.startswith(inside)}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path(index).with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._path(index))

    def load(self, index: int, student: Student) -> None:
        if self.has(index):
            state = torch.load(self._path(index), map_location=student.device, weights_only=True)
            student.module.load_state_dict(state, strict=False)
