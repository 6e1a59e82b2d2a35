"""How far a student's boxes are from its teacher's, where the teacher is confident.

With boxes b, the teacher's confidence c and GIoU (:mod:`dfq.losses._box_overlap`), over all places a of a batch::

    L = sum_a c_a (1 - GIoU(b_a student, b_a teacher)) / max(1, sum_a c_a)

dfq-toolkit (ICCV 2025, arXiv 2507.16782) takes the squared error of raw outputs of all places alike; most of them are
background, where no box means anything, and raw outputs of one box differ in their units from those of another.
"""

from __future__ import annotations

from torch import Tensor

from dfq.losses._box_overlap import giou


def box_distance(student_boxes: Tensor, teacher_boxes: Tensor, confidence: Tensor) -> Tensor:
    """The loss above, a scalar from 0 to 2. Shapes: boxes [N, A, 4] xyxy, ``confidence`` [N, A]."""
    return (confidence * (1 - giou(student_boxes, teacher_boxes))).sum() / confidence.sum().clamp(min=1)
