"""Transformers that find boxes, of the package transformers: a set of queries, each with a box and a class.

DETR (Carion et al., ECCV 2020, arXiv 2005.12872), Table Transformer and YOLOS (Fang et al., 2021, arXiv 2106.00666):
one softmax, the last class is nothing. Conditional and Deformable DETR, RT-DETR (Zhao et al., 2023, arXiv 2304.08069)
and D-FINE: one sigmoid a class. Where queries are chosen by the image, those of student and teacher are paired by their
boxes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torchvision.ops import box_convert

from dfq.detectors._base import Candidates, Detector

SOFTMAX: tuple[str, ...] = (
    "detr.modeling_detr.DetrFor",
    "table_transformer.modeling_table_transformer.TableTransformerFor",
    "yolos.modeling_yolos.YolosFor",
)
SIGMOID: tuple[str, ...] = (
    "conditional_detr.modeling_conditional_detr.ConditionalDetrFor",
    "deformable_detr.modeling_deformable_detr.DeformableDetrFor",
)
CHOSEN: tuple[str, ...] = (
    "rt_detr.modeling_rt_detr.RTDetrFor",
    "rt_detr_v2.modeling_rt_detr_v2.RTDetrV2For",
    "d_fine.modeling_d_fine.DFineFor",
)


class Adapter(Detector):
    """Raw: ``logits`` [N, Q, K] and ``pred_boxes`` [N, Q, 4], center and size in fractions of the image."""

    fits: ClassVar[tuple[str, ...]] = tuple(
        f"transformers.models.{name}ObjectDetection" for name in (*SOFTMAX, *SIGMOID, *CHOSEN)
    )
    overlap: ClassVar[float] = 0.9  # queries do not repeat each other; only copies go

    def raw(self, images: Tensor) -> dict[str, Tensor]:
        found = self.network(pixel_values=images)
        return {"logits": found.logits, "pred_boxes": found.pred_boxes}

    def candidates(self, raw: Any) -> Candidates:
        boxes = box_convert(raw["pred_boxes"], "cxcywh", "xyxy")
        name = f"{type(self.network).__module__}.{type(self.network).__name__}"
        exclusive = any(kind in name for kind in SOFTMAX)
        fixed = not any(kind in name for kind in CHOSEN)
        return Candidates(boxes, raw["logits"], None, exclusive, -1 if exclusive else None, fixed)
