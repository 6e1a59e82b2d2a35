"""The loop of all generators that move images by gradient descent, and what they add to the loss.

Whatever makes the images (pixels themselves, a network with its latents) is moved so that what is measured in the
teacher's forward falls. Nothing in the loop waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dfq.errors import UserError
from dfq.generators._filters import low_pass
from dfq.hooks import evaluation_mode, tensors_in
from dfq.losses.batch_norm_statistics import batch_norm_distance
from dfq.losses.output_stretching import log_output_range
from dfq.progress import Advance
from dfq.tasks._task import task_of
from dfq.teacher import InputSpec, Teacher

Penalty = Callable[[Tensor, Any], Tensor]  # (images, the teacher's outputs) → what is added to the loss
PICTURES = (0.45, 0.25)  # mean and deviation of photographs, in units of white


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
) -> None:
    """Take ``iterations`` steps.

    Args:
        measured: a list to which every forward in the context adds scalars, whose mean is the loss; None: the penalty
            is.
        make: the images [N, C, H, W] to show to the teacher, with the gradient of what makes them.
        schedules: of the optimizers that hold what makes the images.
        penalty: added to the loss.
        observe: called with the loss, a scalar on the device, before each step; without gradient.
        after_step: called after each step, without gradient.
    """
    nothing: list[Tensor] = []
    with evaluation_mode(teacher.module), measured or nullcontext(nothing) as scalars:
        for _ in range(iterations):
            scalars.clear()
            images = make()
            outputs = teacher.module(images.clone())  # some networks write into their input
            terms = [torch.stack(scalars).mean()] if scalars else []
            if penalty is not None:
                terms.append(penalty(images, outputs))
            loss = sum(terms[1:], start=terms[0])
            with torch.no_grad():
                observe(loss)
            for schedule in schedules:
                schedule.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for schedule in schedules:
                schedule.optimizer.step()
                schedule.step()
            with torch.no_grad():
                after_step()
            advance(len(images) / iterations)


def cosine(optimizer: torch.optim.Optimizer, iterations: int, warmup: int = 0) -> LRScheduler:
    """The optimizer's learning rate, reached in ``warmup`` equal steps; then to zero along half a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, iterations - warmup)))

    return LambdaLR(optimizer, factor)


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
) -> Penalty | None:
    """The pull of each image to a class of its own; None for a weight of 0.

    Args:
        label_smoothing: share of a target spread over all classes.
        min_confidence: an image is pulled up to a confidence drawn from [min_confidence, 1].
        difficulty: exponent of what the class lacks to certainty, by which an image's pull is multiplied.
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
        logits = task.raw_outputs(lambda _: outputs, images)
        if far_enough is not None:  # what is certain enough counts without pulling
            reached = logits.detach().softmax(1).gather(1, labels) >= far_enough
            logits = torch.where(reached, logits.detach(), logits)
        if difficulty == 0:
            return weight * task.synthesis_loss(logits, targets)
        lacks = 1 - logits.softmax(1).gather(1, labels)
        pulls = F.cross_entropy(logits, targets, reduction="none")
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


def picture_distance(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """How far each image's own mean and deviation a channel are from those of pictures, mean over both; scalar."""
    variance, means = torch.var_mean(images, dim=(2, 3), correction=0)
    return batch_norm_distance(means, variance, mean, std.square()).mean()
