"""The loss of a detector whose own is not known: its boxes matched to the wanted ones.

Carion et al., "End-to-End Object Detection with Transformers" (DETR), ECCV 2020, arXiv 2005.12872 (eq. 1, 2). With
probabilities p [A, K] and boxes b [A, 4] of the places of one image, and n wanted boxes t of classes c::

    cost(a, i) = -log p_a(c_i) + w (1 - GIoU(b_a, t_i))
    L          = 1 / max(1, n) [ sum_i -log p_match(i)(c_i) + 1 - GIoU(b_match(i), t_i)
                                 + sum_(a, k) p_a(k)^gamma (-log(1 - p_a(k))) ]

the second sum over the places and classes that are matched to nothing and do not repeat a wanted box: one of the same
class that they overlap, so that the suppression of doubles removes them.

Differences from the paper: matches are chosen greedily, cheapest pair first (with a handful of boxes the Hungarian
algorithm would find much the same, and it is not differentiable either); the distance of corners is left out, and the
place counts w = 5 times in the choice (the paper's weight of that distance): where nothing is seen yet, a place far
away that is a little less unsure would be taken otherwise; places
that match nothing are weighed by gamma = 2 as in the focal loss (Lin et al., arXiv 1708.02002), so that it does not
matter how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.losses._box_overlap import giou, pairwise_iou

GAMMA = 2.0
OVERLAP = 0.5  # from which a place repeats a wanted box
PLACE = 5.0  # w
SMALLEST = 1e-9  # added to probabilities: their logarithms stay finite


def set_prediction_loss(boxes: Tensor, scores: Tensor, wanted_boxes: Tensor, wanted_labels: Tensor) -> Tensor:
    """The loss above for one image, a scalar.

    Shapes: ``boxes`` [A, 4] and ``wanted_boxes`` [n, 4] xyxy in the same units, ``scores`` [A, K], ``wanted_labels``
    [n].
    """
    surplus = torch.ones_like(scores, dtype=torch.bool)  # [A, K]
    missed = -(scores[:, wanted_labels] + SMALLEST).log()  # [A, n]
    apart = 1 - giou(boxes[:, None], wanted_boxes[None])
    matched = torch.zeros((), device=boxes.device)
    if len(boxes) and len(wanted_boxes):
        places, order = match((missed + PLACE * apart).detach())
        matched = (missed + apart)[places, order].sum()
        repeats = pairwise_iou(boxes.detach(), wanted_boxes) >= OVERLAP  # [A, n]
        repeats[places, order] = True
        for column, label in enumerate(wanted_labels.tolist()):
            surplus[:, label] &= ~repeats[:, column]
    others = scores[surplus]
    none = (others.pow(GAMMA) * -(1 - others + SMALLEST).log()).sum()
    return (matched + none) / max(1, len(wanted_boxes))


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the pairs of ``cost`` [A, n], cheapest first, each row and each column at most once."""
    cost = cost.clone()
    rows, columns = [], []
    for _ in range(min(cost.shape)):
        place = int(cost.argmin())
        row, column = divmod(place, cost.shape[1])
        rows.append(row)
        columns.append(column)
        cost[row], cost[:, column] = torch.inf, torch.inf
    return torch.tensor(rows, device=cost.device), torch.tensor(columns, device=cost.device)
