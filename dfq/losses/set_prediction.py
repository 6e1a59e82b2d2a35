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

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from dfq.losses._box_overlap import giou, in_full, pairwise_iou

GAMMA = 2.0
OVERLAP = 0.5  # from which a place repeats a wanted box
PLACE = 5.0  # w
SMALLEST = 1e-9  # added to probabilities: their logarithms stay finite


def set_prediction_loss(
    boxes: Tensor, scores: Tensor, wanted_boxes: Sequence[Tensor], wanted_labels: Sequence[Tensor]
) -> Tensor:
    """The loss above of each image, [N]. Nothing in it waits for the device.

    Shapes: ``boxes`` [N, A, 4] and an image's ``wanted_boxes`` [n, 4] xyxy in the same units, ``scores`` [N, A, K], an
    image's ``wanted_labels`` [n].
    """
    scores = in_full(scores)  # in half precision the logarithms below are infinite
    wanted, labels, there = (
        pad_sequence(list(rows), batch_first=True)  # to the n of the image with the most
        for rows in (wanted_boxes, wanted_labels, [torch.ones_like(row, dtype=torch.bool) for row in wanted_labels])
    )
    missed = -(scores.gather(2, labels[:, None].expand(-1, scores.shape[1], -1)) + SMALLEST).log()  # [N, A, n]
    apart = 1 - giou(boxes[:, :, None], wanted[:, None])
    rows, columns, is_match = match((missed + PLACE * apart).detach().masked_fill(~there[:, None], torch.inf))
    pairs = rows * wanted.shape[1] + columns
    matched = torch.where(is_match, (missed + apart).flatten(1).gather(1, pairs), 0.0).sum(1)
    repeats = (pairwise_iou(boxes.detach(), wanted) >= OVERLAP) & there[:, None]
    repeats = repeats.to(scores).flatten(1).scatter_add(1, pairs, is_match.to(scores)).view(missed.shape)
    surplus = repeats @ one_hot(labels, scores.shape[2]).to(scores) == 0  # [N, A, K]
    none = torch.where(surplus, scores.pow(GAMMA) * -(1 - scores + SMALLEST).log(), 0.0).sum((1, 2))
    return (matched + none) / there.sum(1).clamp(min=1)


def match(cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, whether it is one) [N, min(A, n)] of the pairs of each ``cost`` [A, n] out of [N, A, n].

    Cheapest first, each row and each column at most once; none are those that cost infinitely much.
    """
    cost = cost.clone()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(min(cost.shape[1:])):
        least, place = cost.flatten(1).min(1)
        row, column = place // cost.shape[2], place % cost.shape[2]
        found.append((row, column, least < torch.inf))
        cost.scatter_(1, row[:, None, None].expand(-1, 1, cost.shape[2]), torch.inf)
        cost.scatter_(2, column[:, None, None].expand(-1, cost.shape[1], 1), torch.inf)
    if not found:
        none = torch.zeros(len(cost), 0, dtype=torch.long, device=cost.device)
        return none, none, none.bool()
    rows, columns, is_pair = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return rows, columns, is_pair
