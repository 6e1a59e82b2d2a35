"""The loop of all generators that move images by gradient descent, and what they add to the loss.

Whatever makes the images (pixels themselves, a network with its latents) is moved so that what is measured in the
teacher's forward falls. Nothing in a step waits for the device.

One batch at a time: on a CPU the convolutions of one already keep every core busy, and on a GPU a larger batch does
what a second one in flight would do, with fewer launches (``batch_size=auto`` sizes it to the memory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dfq.errors import UserError
from dfq.generators._filters import low_pass
from dfq.generators._precision import Precision, arithmetic, as_float
from dfq.hooks import evaluation_mode, repeatable, tensors_in
from dfq.losses.batch_norm_statistics import batch_norm_distance
from dfq.losses.output_stretching import log_output_range
from dfq.progress import Advance, say
from dfq.tasks._task import task_of
from dfq.teacher import InputSpec, Teacher

Penalty = Callable[[Tensor, Any], Tensor]  # (images, the teacher's outputs) → what is added to the loss
PICTURES = (0.45, 0.25)  # mean and deviation of photographs, in units of white


Compile = Literal["auto"] | bool
Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # images → (loss, gradient to the images)
Descend = Callable[[Tensor, int, int], Tensor]  # (images to start from, first step, last step) → what they become


@repeatable()
def optimize(
    teacher: Teacher,
    measured: AbstractContextManager[list[Tensor]] | None,
    make: Callable[[], Tensor],
    schedules: Sequence[LRScheduler],
    iterations: int,
    advance: Advance,
    penalty: Penalty | None = None,
    observe: Callable[[Tensor], object] = lambda loss: None,
    after_step: Callable[[], object] = lambda: None,
    of: int | None = None,
    patience: int = 0,
    tolerance: float = 0.0,
    settled: int = 0,
    compiled: Compile = False,
    precision: Precision = "float32",
) -> int:
    """Take ``iterations`` steps, or fewer; returns how many.

    Args:
        measured: a list to which every forward in the context adds scalars, whose mean is the loss; None: the penalty
            is.
        make: the images [N, C, H, W] to show to the teacher, with the gradient of what makes them.
        schedules: of the optimizers that hold what makes the images.
        penalty: added to the loss.
        observe: called with the loss, a scalar on the device, before each step; without gradient.
        after_step: called after each step, without gradient.
        of: steps that each image gets in all, for ``advance``; None: ``iterations``.
        patience: stop after so many steps whose mean loss is not by ``tolerance`` (a share of it) below that of as many
            before them; 0: never. The loss is read once in so many steps.
        settled: steps before which it does not stop.
        compiled: see :func:`compiled_step`. Only where nothing is drawn, and nothing changes from step to step, between
            the images and the loss.
        precision: of the teacher's forward and gradient, see :func:`dfq.generators._precision.arithmetic`.
    """
    nothing: list[Tensor] = []
    window = _Window(patience, tolerance)
    with evaluation_mode(teacher.module), measured or nullcontext(nothing) as scalars:

        def loss_of(images: Tensor) -> Tensor:
            scalars.clear()
            with arithmetic(images.device, precision):
                outputs = teacher.module(images.clone())  # some networks write into their input
            if precision == "bfloat16":
                outputs = as_float(outputs)
            terms = [torch.stack(scalars).mean()] if scalars else []
            if penalty is not None:
                terms.append(penalty(images, outputs))
            return sum(terms[1:], start=terms[0])

        step: Step | None = None
        for number in range(iterations):
            images = make()
            if number == 0 and wants_compiled(compiled, teacher.device):
                step = compiled_step(loss_of, images.detach())
            loss, gradient = (loss_of(images), None) if step is None else step(images.detach())
            with torch.no_grad():
                observe(loss)
            for schedule in schedules:
                schedule.optimizer.zero_grad(set_to_none=True)
            (loss if gradient is None else images).backward(gradient)
            for schedule in schedules:
                schedule.optimizer.step()
                schedule.step()
            with torch.no_grad():
                after_step()
            advance(len(images) / (of or iterations))
            if number >= settled and window.is_flat(loss):
                return number + 1
    return iterations


class _Window:
    """Whether a loss still falls, from means over ``patience`` steps; the host learns of it once in so many."""

    def __init__(self, patience: int, tolerance: float):
        self.patience, self.tolerance = patience, tolerance
        self.losses: list[Tensor] = []
        self.before = math.inf

    def is_flat(self, loss: Tensor) -> bool:
        if self.patience == 0:
            return False
        self.losses.append(loss.detach())
        if len(self.losses) < self.patience:
            return False
        mean, before = float(torch.stack(self.losses).mean()), self.before
        self.losses, self.before = [], mean
        return math.isfinite(before) and before - mean < self.tolerance * abs(before)


def wants_compiled(compiled: Compile, device: torch.device) -> bool:
    """``auto`` compiles on CUDA. On a CPU ResNet-18's step took as long as before, after 77 s of compiling."""
    return device.type == "cuda" if compiled == "auto" else bool(compiled)


def compiled_step(loss_of: Callable[[Tensor], Tensor], images: Tensor) -> Step | None:
    """Loss and gradient as one program for images of this shape; None, and a line that says why, where that fails.

    Operations are recorded (hooks, modes and the backward pass with them) and handed to the compiler. What was constant
    while they were, stays so: the program serves one batch. Its first result is compared with the plain one.
    """

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.detach().requires_grad_()
        loss = loss_of(images)
        return loss.detach(), torch.autograd.grad(loss, images)[0]

    try:
        import torch._inductor
        from torch.fx.experimental.proxy_tensor import make_fx

        step: Step = torch._inductor.compile(make_fx(both)(images), [images])
        (loss, gradient), (loss_wanted, gradient_wanted) = step(images), both(images)
        off = (gradient - gradient_wanted).norm() / gradient_wanted.norm()
        if not (torch.allclose(loss, loss_wanted, rtol=1e-3, atol=1e-5) and float(off) < 1e-2):
            raise RuntimeError(f"loss {float(loss):.4g} instead of {float(loss_wanted):.4g}, gradient off by {off:.2g}")
    except Exception as error:  # whatever a compiler, or what it calls, may raise
        reason = str(error).strip().splitlines()
        say(f"generate: steps run uncompiled ({type(error).__name__}: {reason[0] if reason else 'no message'})")
        return None

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = step(images)
        return loss, gradient

    return run


def cosine(
    optimizer: torch.optim.Optimizer, iterations: int, warmup: int = 0, first: int = 0, turns: int = 1
) -> LRScheduler:
    """The optimizer's learning rate, reached in ``warmup`` equal steps; then to zero along half a cosine.

    Args:
        first: step of ``iterations`` to start with.
        turns: calls that are one step, where the images are moved in so many parts.
    """

    def factor(call: int) -> float:
        step = first + call // turns
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, iterations - warmup)))

    return LambdaLR(optimizer, factor)


def coarse_to_fine(
    teacher: Teacher, start: Tensor, share: float, scale: float, iterations: int, descend: Descend
) -> Tensor:
    """What ``descend(images, first, last)`` makes of ``start`` [N, C, H, W], the first steps on smaller images.

    What these have moved by is added to ``start`` at its own size, so that its fine detail is there from then on.

    Args:
        share: of the steps that are taken on smaller images; 0: none.
        scale: of their sides.
    """
    coarse, size = int(share * iterations), [max(1, round(scale * n)) for n in start.shape[-2:]]
    if coarse == 0:
        return descend(start, 0, iterations)
    _check_takes(teacher, size, share, scale)
    small = F.interpolate(start, size, mode="area").contiguous(memory_format=torch.channels_last)
    moved = descend(small.clone(), 0, coarse) - small
    larger = start + F.interpolate(moved, start.shape[-2:], mode="bilinear")
    return descend(larger.contiguous(memory_format=torch.channels_last), coarse, iterations)


@torch.no_grad()
def _check_takes(teacher: Teacher, size: list[int], share: float, scale: float) -> None:
    try:
        teacher(torch.zeros(2, teacher.input_spec.size[0], *size))
    except Exception as error:  # whatever a user's forward raises
        reason = str(error).strip().splitlines()
        raise UserError(
            f"got generator.coarse_share={share}, generator.coarse_scale={scale} and a network that does not take "
            f"images of {size[0]}x{size[1]} pixels ({type(error).__name__}: {reason[0] if reason else 'no message'})",
            do="set generator.coarse_share=0, or a larger generator.coarse_scale",
        ) from error


@torch.no_grad()
def finish(images: Tensor, spec: InputSpec, cutoff: float, clip: bool) -> Tensor:
    """What is stored of the optimized images: filtered (``cutoff`` 0: not), then between black and white (if asked)."""
    if cutoff > 0:
        images = low_pass(images, cutoff)
    return images.clamp(*spec.limits(images.device)) if clip else images


def class_penalty(
    teacher: Teacher,
    num_samples: int,
    rng: torch.Generator,
    weight: float,
    label_smoothing: float,
    min_confidence: float = 1.0,
    difficulty: float = 0.0,
    shown: Callable[[], slice] = lambda: slice(None),
) -> Penalty | None:
    """The pull of each image to a class of its own; None for a weight of 0.

    Args:
        label_smoothing: share of a target spread over all classes.
        min_confidence: an image is pulled up to a confidence drawn from [min_confidence, 1].
        difficulty: exponent of what the class lacks to certainty, by which an image's pull is multiplied.
        shown: which of the images a forward sees.
    """
    if weight == 0:
        return None
    task, num_classes = task_and_classes(teacher)
    targets = task.synthesis_targets(num_samples, num_classes, rng, label_smoothing).to(teacher.device)
    labels, far_enough = targets.argmax(1, keepdim=True), None
    if min_confidence < 1:
        drawn = torch.rand(num_samples, 1, generator=rng)
        far_enough = (min_confidence + (1 - min_confidence) * drawn).to(teacher.device)

    def penalty(images: Tensor, outputs: Any) -> Tensor:
        logits, rows = task.raw_outputs(lambda _: outputs, images), shown()
        if far_enough is not None:  # what is certain enough counts without pulling
            reached = logits.detach().softmax(1).gather(1, labels[rows]) >= far_enough[rows]
            logits = torch.where(reached, logits.detach(), logits)
        if difficulty == 0:
            return weight * task.synthesis_loss(logits, targets[rows])
        lacks = 1 - logits.softmax(1).gather(1, labels[rows])
        pulls = F.cross_entropy(logits, targets[rows], reduction="none")
        return weight * (lacks.flatten().clamp(min=1e-6) ** difficulty * pulls).mean()

    return penalty


def task_and_classes(teacher: Teacher) -> tuple[Any, int]:
    """What the network's outputs mean, and how many classes they tell apart."""
    task = task_of(teacher)
    with torch.no_grad():
        return task, task.num_outputs(task.raw_outputs(teacher, teacher.example(1)))


def mean_log_range(outputs: Any, without: str) -> Tensor:
    """:func:`log_output_range` of every tensor among ``outputs`` that the images have a say in, mean over them.

    Args:
        without: what is left without it, for the message where no tensor is.
    """
    found = [log_output_range(tensor) for tensor in tensors_in(outputs) if tensor.requires_grad and tensor.numel() > 1]
    if not found:
        raise UserError(
            f"got a {type(outputs).__name__} from the network, without a tensor that its input has a gradient to",
            "a network whose outputs follow its input, for generator.stretch_weight",
            f"set generator.stretch_weight=0, which leaves {without}",
        )
    return torch.stack(found).mean()


def together(*penalties: Penalty | None) -> Penalty | None:
    """The sum of those that there are."""
    wanted = [penalty for penalty in penalties if penalty is not None]
    if not wanted:
        return None
    return lambda images, outputs: sum((one(images, outputs) for one in wanted[1:]), start=wanted[0](images, outputs))


def picture_statistics(spec: InputSpec) -> tuple[Tensor, Tensor]:
    """Mean and deviation [C] that pictures have as the network takes them.

    0 and 1 where the normalization is by the deviation of pictures; where it only sets the range of numbers ([0, 1],
    [-1, 1], bytes), those of photographs, carried through it.
    """
    if all(0.05 < std < 0.45 for std in spec.std):
        return torch.zeros(spec.size[0]), torch.ones(spec.size[0])
    offset, unit = torch.tensor(spec.mean), torch.tensor(spec.std)
    return (PICTURES[0] - offset) / unit, PICTURES[1] / unit


def picture_distance(images: Tensor, mean: Tensor, std: Tensor, looks: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """How far each image's own mean and deviation a channel are from those of pictures, mean over both; scalar.

    Args:
        looks: what sets each image apart from the average of pictures: an offset [N, C] in units of ``std``, and a
            contrast [N, 1], the factor on its deviation.
    """
    variance, means = torch.var_mean(images, dim=(2, 3), correction=0)
    if looks is not None:
        offset, contrast = looks
        means, variance = means - offset * std, variance / contrast.square()
    return batch_norm_distance(means, variance, mean, std.square()).mean()
