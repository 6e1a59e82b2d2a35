"""KL of what two detectors say of each place (anchor, cell, query), place by place.

dfq-toolkit (ICCV 2025, arXiv 2507.16782) takes one softmax over the flattened map of all places and classes, which
makes places compete that have nothing to do with each other. Here each place a has a distribution of its own, of
teacher p and student q, and an image has about as many objects as the teacher's confidences c add up to::

    L = sum_a KL(p_a || q_a) / max(1, sum_a c_a)

p_a is over the classes (one of which may be "no object"), or over {object, none} for each class by itself. Where
objectness o says whether there is anything at all and the classes only what it is, "none or class k" is one
distribution, whose divergence is KL(o_p || o_q) + o_p KL(classes): where the teacher sees nothing, its classes are
noise and count for nothing.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dfq.losses._box_overlap import in_full

FAR = 1e30  # a logit of a class that is ruled out is minus infinity, and 0 times that is no number


def binary_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of one yes-or-no each, in nats; the shape of both."""
    student_logits, teacher_logits = _finite(student_logits), _finite(teacher_logits)
    yes = teacher_logits.sigmoid()
    return yes * (F.logsigmoid(teacher_logits) - F.logsigmoid(student_logits)) + (1 - yes) * (
        F.logsigmoid(-teacher_logits) - F.logsigmoid(-student_logits)
    )


def anchor_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    confidence: Tensor,
    exclusive: bool,
    student_objectness: Tensor | None = None,
    teacher_objectness: Tensor | None = None,
) -> Tensor:
    """The loss above, a scalar in nats an object.

    Args:
        student_logits, teacher_logits: [N, A, K].
        confidence: [N, A], the teacher's; how many objects there are.
        exclusive: classes exclude each other (softmax); otherwise each has a sigmoid.
        student_objectness, teacher_objectness: [N, A] logits, where the detector has them.
    """
    if exclusive:
        p, q = _finite(teacher_logits).log_softmax(-1), _finite(student_logits).log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1)
    else:
        divergence = binary_kl(student_logits, teacher_logits).sum(-1)
    if teacher_objectness is not None:
        assert student_objectness is not None
        divergence = binary_kl(student_objectness, teacher_objectness) + teacher_objectness.sigmoid() * divergence
    return divergence.sum() / confidence.sum().clamp(min=1)


def _finite(logits: Tensor) -> Tensor:
    return in_full(logits).clamp(-FAR, FAR)
