"""What a second stage goes on with: the best boxes of the first that lie apart, and the features inside each.

The computations are torchvision's, in a form that torch.export follows for any number of images: sizes are fixed, and
what suppresses doubles is one operation, ``dfq::best_apart``. ONNX has a node for it (:mod:`dfq.exporters._operators`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import batched_nms, roi_align
from torchvision.ops.poolers import LevelMapper

NONE = -1.0  # the score of what is no candidate; those of candidates are not negative


def filtered(rpn: Any, boxes: Tensor, objectness: Tensor, levels: Sequence[int], unit: Tensor, most: int) -> Tensor:
    """torchvision's ``rpn.filter_proposals``: the best ``most`` boxes of each image [N, most, 4], best first.

    Fewer are filled up with the whole image. Of equally good boxes of a level the first go on, in every runtime.

    Args:
        boxes: [N, A, 4] xyxy in pixels.
        objectness: [N, A] logits.
        levels: how many of the A places belong to each level.
        unit: [4] pixels of width, height, width, height.
    """
    first, places = 0, []
    for part in objectness.split(list(levels), 1):  # not topk, which takes any of several that are equal
        best = part.sort(dim=1, descending=True, stable=True)[1][:, : rpn.pre_nms_top_n()]
        places.append(best + first)
        first += part.shape[1]
    order = torch.cat(places, 1)
    scores = objectness.gather(1, order).sigmoid()
    boxes = torch.minimum(_rows(boxes, order).clamp(min=0), unit)
    there = (boxes[..., 2:] - boxes[..., :2] >= rpn.min_size).all(-1) & (scores >= rpn.score_thresh)
    sizes = [part.shape[1] for part in places]
    if (lacking := most - order.shape[1]) > 0:
        boxes, sizes[-1] = pad(boxes, (0, 0, 0, lacking)), sizes[-1] + lacking
        scores, there = pad(scores, (0, lacking)), pad(there, (0, lacking))
    rows = best_apart(boxes, scores.where(there, NONE), sizes, rpn.nms_thresh, most)
    found = (rows >= 0) & (torch.arange(most, device=rows.device) < rpn.post_nms_top_n())
    whole = torch.cat([torch.zeros_like(unit[:2]), unit[:2]])
    return _rows(boxes, rows.clamp(min=0)).where(found[..., None], whole)


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """[N, P, 4] of ``values`` [N, A, 4] at ``places`` [N, P]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


@torch.library.custom_op(
    "dfq::best_apart",
    mutates_args=(),
    schema="(Tensor boxes, Tensor scores, int[] sizes, float overlap, int most) -> Tensor",
)
def best_apart(boxes: Tensor, scores: Tensor, sizes: Sequence[int], overlap: float, most: int) -> Tensor:
    """Places [N, most] of the best boxes that no better one of their level overlaps, best first; -1: there are no more.

    Args:
        boxes: [N, A, 4] xyxy.
        scores: [N, A]; what has a negative one is no candidate.
        sizes: how many of the A lie in each level, one level after the other.
        overlap: above which the weaker of two boxes goes.
    """
    levels = torch.cat([torch.full((size,), level) for level, size in enumerate(sizes)]).to(boxes.device)
    found = torch.full((len(boxes), most), -1, device=boxes.device)
    for image, (own, score) in enumerate(zip(boxes, scores, strict=True)):
        there = torch.where(score >= 0)[0]
        kept = there[batched_nms(own[there], score[there], levels[there], overlap)[:most]]
        found[image, : len(kept)] = kept
    return found


@best_apart.register_fake
def _(boxes: Tensor, _scores: Tensor, _sizes: Sequence[int], _overlap: float, most: int) -> Tensor:
    return boxes.new_empty((boxes.shape[0], most), dtype=torch.int64)


def pooled(pool: Any, features: Mapping[str, Tensor], boxes: Tensor, height: int) -> Tensor:
    """torchvision's MultiScaleRoIAlign: what lies in each box [N P, C, h, w], from the level that fits its size.

    Args:
        boxes: [N, P, 4] xyxy in pixels.
        height: of the image in pixels.
    """
    maps = [values for name, values in features.items() if name in pool.featmap_names]
    strides = [round(log2(height / values.shape[-2])) for values in maps]  # as powers of two
    rows = boxes.flatten(0, 1)
    image = torch.arange(boxes.shape[0], device=boxes.device).repeat_interleave(boxes.shape[1])
    rois = torch.cat([image[:, None].to(rows), rows], 1)
    if len(maps) == 1:
        return roi_align(maps[0], rois, pool.output_size, 2.0 ** -strides[0], pool.sampling_ratio)
    levels = LevelMapper(strides[0], strides[-1], pool.canonical_scale, pool.canonical_level)([rows])
    found = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *pool.output_size)  # not len: it fixes N
    for level, (values, stride) in enumerate(zip(maps, strides, strict=True)):
        here = torch.where(levels == level)[0]
        inside = roi_align(values, rois[here], pool.output_size, 2.0**-stride, pool.sampling_ratio)
        found[here] = inside.to(found.dtype)  # autocast may have others for some levels
    return found
