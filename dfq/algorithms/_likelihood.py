"""How likely the teacher finds labels that are drawn from what it says itself: the Fisher information needs no data.

The Hessian of KL(teacher || student) where both are the same is the Fisher information F = E[g g^T] of the gradients g
of log p(label), labels drawn from p (e.g. Tseng et al. 2025, arXiv 2505.22988, section 3.1; BRECQ, eq. 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfq.channels import channel_dim
from dfq.errors import UserError
from dfq.hooks import forward_hooks
from dfq.progress import progress_bar
from dfq.tasks._task import task_of
from dfq.teacher import Teacher


def drawn_log_likelihood(task: Any, reference: nn.Module, batch: Tensor, rng: torch.Generator) -> Tensor:
    """sum log p(label), of one label for each sample (token, object) of ``batch``, drawn from the network's own p."""
    outputs = task.raw_outputs(reference, batch.clone())  # some networks write into their input
    logits = task.class_logits(outputs) if hasattr(task, "class_logits") else outputs
    log_p = logits.flatten(0, -2).log_softmax(-1)
    if log_p.isnan().any():
        raise UserError("got outputs with NaN to draw labels from", "numbers", "look for a network that overflows")
    labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=rng).to(log_p.device)
    return log_p.gather(1, labels).sum()


@contextmanager
def probes(reference: nn.Module, names: list[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """Name of a layer and a zero that is added to its output, call by call: gradients of zeros are those of outputs."""
    kept: list[tuple[str, Tensor]] = []

    def probe(name: str, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        kept.append((name, torch.zeros_like(output, requires_grad=True)))
        return output + kept[-1][1]

    with forward_hooks([(name, reference.get_submodule(name)) for name in names], after=probe):
        yield kept


def output_moments(
    reference: nn.Module,
    teacher: Teacher,
    images: Tensor,
    groups: Mapping[str, int],
    batch_size: int,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Layer → sum of g g^T over samples and places, g the gradient of a drawn label's log p at the layer's output.

    Args:
        reference: the float network, of the teacher's task.
        groups: layer → P, the groups that its output channels are cut into.

    Returns:
        [P, O / P, O / P] each. Layers on which no label depends (boxes of a detector) have none.
    """
    task = task_of(teacher)
    total: dict[str, Tensor] = {}
    with progress_bar("gradients", len(images), "samples") as advance:
        for batch in teacher.input_spec.batches(images, batch_size):
            with torch.enable_grad(), probes(reference, list(groups)) as kept:
                value = drawn_log_likelihood(task, reference, batch.to(teacher.device), rng)
                zeros = [zero for _, zero in kept]
                found = torch.autograd.grad(value, zeros, allow_unused=True) if value.requires_grad else []
            for (name, _), gradient in zip(kept, found, strict=False):
                if gradient is None or not gradient.numel():
                    continue
                channels = channel_dim(reference.get_submodule(name), gradient)
                of_channels = gradient.float().movedim(channels, 0)
                rows = of_channels.reshape(groups[name], len(of_channels) // groups[name], -1)
                total[name] = total.get(name, 0) + rows @ rows.mT
            advance(len(batch))
    return {name: moment for name, moment in total.items() if moment.any()}
