"""Classification of images, or of token sequences: outputs are logits [N, num_classes], or one logit [N, 1]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.drop import DropEstimate, estimate_drop
from dfq.losses.distillation import kl_divergence
from dfq.tasks._logits import logits_in

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class Classification:
    """What a classifier's outputs mean. The one place that knows."""

    def raw_outputs(self, model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """Logits [N, num_classes], differentiable; what is understood, :func:`logits_in` says.

        One logit z alone [N, 1] is that of the second of two classes: softmax(0, z) = (1 - sigmoid(z), sigmoid(z)).
        """
        logits = logits_in(model(images), 2, "logits [N, num_classes] for task=classification")
        return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits

    def num_outputs(self, logits: Tensor) -> int:
        return logits.shape[1]

    def synthesis_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy to (soft) targets [N, num_classes]: what a generator pulls images toward."""
        return F.cross_entropy(logits, targets)

    def synthesis_targets(self, num_samples: int, num_classes: int, rng: torch.Generator, smoothing: float) -> Tensor:
        """Smoothed targets [N, num_classes] in random order; classes come equally often, but for one sample."""
        rounds = -(-num_samples // num_classes)  # fewer samples than classes: which ones there are is drawn
        labels = torch.cat([torch.randperm(num_classes, generator=rng) for _ in range(rounds)])[:num_samples]
        return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes

    def distillation_loss(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """KL(teacher || student), mean over samples, in nats."""
        return kl_divergence(student_logits, teacher_logits)

    def agreement(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Share of samples for which both name the same class."""
        return (student_logits.argmax(1) == teacher_logits.argmax(1)).float().mean()

    def metrics(self, num_classes: int) -> MetricCollection:
        """top1, and top5 where there are more than five classes, as fractions."""
        from torchmetrics import Metric, MetricCollection  # seconds, which nothing but an evaluation has to wait
        from torchmetrics.classification import MulticlassAccuracy

        options: dict[str, Any] = {"average": "micro", "sync_on_compute": False}  # rank 0 alone evaluates
        found: dict[str, Metric | MetricCollection] = {"top1": MulticlassAccuracy(num_classes, **options)}
        if num_classes > 5:
            found["top5"] = MulticlassAccuracy(num_classes, top_k=5, **options)
        return MetricCollection(found)

    def estimate_drop(self, student_logits: Tensor, teacher_logits: Tensor) -> DropEstimate:
        """How much accuracy is lost, from logits for held-out synthetic samples. Tasks without such a rule lack it."""
        return estimate_drop(student_logits, teacher_logits)
