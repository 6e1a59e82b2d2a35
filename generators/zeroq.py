"""ZeroQ: images whose activations have the statistics that the network's batch norms remember.

Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, arXiv 2001.00281 (eq. 1: distilled data).

    images = argmin  bn_loss(images) + class_weight * cross_entropy(teacher(images), targets)

bn_loss is :func:`dfq.losses.batch_norm_statistics.batch_norm_distance`, averaged over channels and over layers.

Differences from the paper: statistics are those of the whole batch at each batch norm's own input, taken by hooks on
the batch norms themselves (the paper pairs convolutions with batch norms by order and uses per-image statistics); the
loss is normalized by the running deviation per channel and averaged per layer, so its weights depend neither on the
batch nor on the resolution; the step decays to zero along a cosine, so some tens of iterations do what took 500;
pixels stay legal (Sony MCT), so that a range calibrated on the images is not wider than any real
image; optional class targets (DeepInversion, arXiv 1912.08795), balanced and smoothed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.generators._base import Generator
from dfq.hooks import evaluation_mode, forward_hooks
from dfq.losses.batch_norm_statistics import batch_norm_distance, channel_statistics
from dfq.progress import Advance
from dfq.settings import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, choices, load, resolve
from dfq.teacher import InputSpec, Teacher


@dataclass(frozen=True)
class ZeroQ(Generator):
    """Gradient descent on the pixels of one batch at a time."""

    iterations: PositiveInt = 50  # steps per batch
    learning_rate: PositiveFloat = 0.2  # first step of Adam, in units of the input's standard deviation
    clip: bool = True  # keep pixels between black and white
    class_weight: NonNegativeFloat = 0.0  # weight of the class targets; 0: statistics alone
    label_smoothing: Fraction = 0.3  # share of a class target spread over all classes
    needs_batch_norm: ClassVar[bool] = True

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        norms = teacher.batch_norms
        if not norms:
            raise UserError(
                f"got a network without batch norm ({teacher.name}), and zeroq matches batch-norm statistics",
                " | ".join(f"generator={name}" for name in _without_batch_norm()),
            )
        assert isinstance(teacher.input_spec, InputSpec)  # the pipeline sees to it
        task = resolve("task", teacher.task)
        images = torch.randn(num_samples, *teacher.input_spec.size, generator=rng)
        images = images.to(teacher.device, memory_format=torch.channels_last).requires_grad_()
        limits = teacher.input_spec.limits(teacher.device)
        targets = None
        if self.class_weight > 0:
            with torch.no_grad():
                num_classes = task.num_outputs(task.raw_outputs(teacher, images[:1]))
            targets = task.synthesis_targets(num_samples, num_classes, rng, self.label_smoothing).to(teacher.device)
        optimizer = torch.optim.Adam([images], lr=self.learning_rate, betas=(0.9, 0.9))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / self.iterations))
        )
        distances: list[Tensor] = []

        def measure(_name: str, norm: nn.Module, inputs: tuple) -> None:
            mean, variance = channel_statistics(inputs[0])
            distances.append(batch_norm_distance(mean, variance, norm.running_mean, norm.running_var, norm.eps).mean())

        with evaluation_mode(teacher.module), forward_hooks(norms.items(), before=measure):
            for _ in range(self.iterations):
                distances.clear()
                outputs = teacher.module(images.clone())  # some networks write into their input
                loss = torch.stack(distances).mean()
                if targets is not None:
                    logits = task.raw_outputs(lambda _, outputs=outputs: outputs, images)
                    loss = loss + self.class_weight * task.synthesis_loss(logits, targets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                if self.clip:
                    with torch.no_grad():
                        images.clamp_(*limits)
                advance(num_samples / self.iterations)
        return images.detach()


def _without_batch_norm() -> list[str]:
    """Names of the generators that work on any network."""
    from importlib import import_module

    names = []
    for name in choices("generator"):
        module, _, attribute = load("generator", name)["_target_"].rpartition(".")
        if not getattr(import_module(module), attribute).needs_batch_norm:
            names.append(name)
    return names
