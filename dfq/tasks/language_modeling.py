"""Language modeling: token ids [N, T] in, logits [N, T, V] out, one distribution over the vocabulary a position."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection

from dfq.errors import UserError
from dfq.losses.distillation import kl_divergence
from dfq.tasks._logits import logits_in

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
        return MetricCollection({"perplexity": Perplexity(self.causal)})


class Perplexity(Metric):
    """exp(mean negative log-likelihood of a token, in nats). Updated with logits [N, T, V] and labels [N, T].

    torchmetrics' own takes the logarithm of float32 probabilities: infinite from one token on that a quantized network
    all but rules out.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, causal: bool = True):
        super().__init__(sync_on_compute=False)  # rank 0 alone evaluates
        self.causal = causal
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # Summed in float64: a test set has more tokens than float32 can add up.
        nll = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL, reduction="none")
        self.total += nll.double().sum()
        self.count += (labels != NO_LABEL).sum()

    def compute(self) -> Tensor:
        return torch.exp(self.total / self.count)


def _no_gradient() -> UserError:
    return UserError(
        "got a network that takes token ids, and a generator that pulls its input toward a target by gradient descent",
        "a generator that makes token ids",
    )
