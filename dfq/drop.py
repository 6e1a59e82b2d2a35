"""How much of its accuracy a student has lost, estimated without a label and without a real image.

On held-out synthetic samples, d_1 is the share for which the student names another class than the teacher, and d_2 the
share for which the sum of the two's logits does: what the student would say with the same errors if the teacher's
margins were twice as large. Real images have larger margins than images matched to batch-norm statistics (on average
2.7 to 3.3 times, on the networks below), and not all answers that change were right before. With shares of n samples
smoothed as (n d + 1/2) / (n + 1)::

    logit(drop) = A + B (logit d_1 + logit d_2) / 2        drop = 1 - accuracy of the student / accuracy of the teacher

A and B were fitted once by ``benchmarks/drop.py`` to 38 students of three public networks (8x8 digits, CIFAR-10
ResNet-20, ImageNet FD-MobileNet 0.25; docs/drop.md). S, the deviation of what is left on that scale, is such that the
interval holds nine in ten students of a network that A and B were not fitted to: 1.645 S to both sides, and FLOOR more,
because a handful of test images is won or lost by chance.

It is a rule of thumb from three networks, and says so by the width of its interval. Where the generator fails (a
student from Gaussian noise) the samples say little about real images, and so would the estimate: none is given for a
dataset that :mod:`dfq.quality` calls poor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

A, B, S = -0.82, 1.64, 1.2
FLOOR = 0.01
Z = 1.645  # of a normal distribution: 90 % lie within


@dataclass(frozen=True)
class DropEstimate:
    """Shares of the teacher's accuracy: 0.02 of 0.90 are 1.8 points.

    Attributes:
        drop: expected; low, high: the ends of an interval for nine in ten students, low may be below zero.
        disagreement, doubled_disagreement: d_1 and d_2, smoothed.
    """

    drop: float
    low: float
    high: float
    disagreement: float
    doubled_disagreement: float


def estimate_drop(student_logits: Tensor, teacher_logits: Tensor) -> DropEstimate:
    """From the logits [N, num_classes] of both for the same held-out synthetic samples."""
    answer = teacher_logits.argmax(1)

    def share(logits: Tensor) -> float:
        return (float((logits.argmax(1) != answer).sum()) + 0.5) / (len(answer) + 1)

    once, twice = share(student_logits), share(student_logits + teacher_logits)
    x = A + B * (_logit(once) + _logit(twice)) / 2
    low, high = _sigmoid(x - Z * S) - FLOOR, min(_sigmoid(x + Z * S) + FLOOR, 1.0)
    return DropEstimate(_sigmoid(x), low, high, once, twice)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
