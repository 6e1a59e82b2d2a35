"""Language modeling: token ids [N, T] in, logits [N, T, V] out, one distribution over the vocabulary a position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.losses.distillation import kl_divergence
from dfq.tasks._logits import logits_in

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

NO_LABEL = -100  # padding and the like, as torch and transformers mark it


def known_tokens(batch: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Which of ``ids`` [N, T] are no padding: the first ``num_tokens`` of each, or all; bool [N, T]."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    counts = batch.get("num_tokens")
    return torch.ones_like(places, dtype=torch.bool) if counts is None else places < counts.to(ids.device)[:, None]


def of_tokens(x: Tensor, known: Tensor, whole: bool = False) -> Tensor:
    """Of ``x`` [N, T, ...] what is no padding [M, ...]; ``whole``: all of it, padding being zero."""
    if x.shape[:2] != known.shape or bool(known.all()):
        return x
    return x * known.view(*known.shape, *[1] * (x.dim() - 2)) if whole else x[known]


@dataclass(frozen=True)
class LanguageModeling:
    """What a language model's outputs mean. The one place that knows."""

    causal: bool = True  # logits at t predict token t + 1; false: token t, which was masked

    def raw_outputs(self, model: Callable[[Tensor], Any], ids: Tensor) -> Tensor:
        """Logits [N, T, V] of ids [N, T]; what is understood, :func:`logits_in` says."""
        allowed = "logits [N, T, vocabulary] of token ids [N, T] for a language model"
        logits = logits_in(model(ids), 3, allowed)
        if logits.shape[:2] != ids.shape:
            raise UserError(f"got logits {list(logits.shape)} of token ids {list(ids.shape)} from the network", allowed)
        return logits

    @property
    def writes(self) -> bool:
        """Whether the network can go on with a text."""
        return self.causal

    def num_outputs(self, logits: Tensor) -> int:
        return logits.shape[-1]

    def synthesis_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise _no_gradient()

    def synthesis_targets(self, num_samples: int, num_classes: int, rng: torch.Generator, smoothing: float) -> Tensor:
        raise _no_gradient()

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL(teacher || student), mean over samples and positions, in nats."""
        return kl_divergence(student_logits, teacher_logits)

    def agreement(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Share of positions at which both name the same token."""
        return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()

    def metrics(self, num_classes: int) -> MetricCollection:
        """perplexity; its labels are ids [N, T], for a causal network those that it is fed (the shift is made here)."""
        from torchmetrics import MetricCollection

        from dfq.tasks._perplexity import Perplexity

        return MetricCollection({"perplexity": Perplexity(self.causal, NO_LABEL)})


def _no_gradient() -> UserError:
    return UserError(
        "got a network that takes token ids, and a generator that pulls its input toward a target by gradient descent",
        "a generator that makes token ids",
    )
