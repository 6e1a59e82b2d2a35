"""Transformers that find boxes, of the package transformers: a set of queries, each with a box and a class.

DETR (Carion et al., ECCV 2020, arXiv 2005.12872), Table Transformer and YOLOS (Fang et al., 2021, arXiv 2106.00666):
one softmax, the last class is nothing. Conditional and Deformable DETR, RT-DETR (Zhao et al., 2023, arXiv 2304.08069)
and D-FINE: one sigmoid a class. Where queries are chosen by the image (in two stages), those of student and teacher are
paired by their boxes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.ops import box_convert

from dfq.detectors._base import Candidates, Detector, named_unused
from dfq.hooks import Choice, op_name

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


def _class_of(family: str) -> str:
    return f"transformers.models.{family}ObjectDetection"


class Adapter(Detector):
    """Raw: ``logits`` [N, Q, K] and ``pred_boxes`` [N, Q, 4], center and size in fractions of the image."""

    fits: ClassVar[tuple[str, ...]] = tuple(map(_class_of, (*SOFTMAX, *SIGMOID, *CHOSEN)))
    overlap: float = 0.9  # queries do not repeat each other; only copies go

    def __init__(self, network: nn.Module):
        super().__init__(network)
        config: Any = network.config
        self.exclusive = _is_of(network, SOFTMAX)
        self.chooses = _is_of(network, CHOSEN) or getattr(config, "two_stage", False)
        self.chosen = Choice()
        self.unused_labels = named_unused(getattr(config, "id2label", None) or {})

    def raw(self, images: Tensor) -> dict[str, Tensor]:
        # Not while it is traced: torch.export does not follow a mode.
        with _ChosenBy(self.chosen) if self.chooses and self.chosen.is_watched else nullcontext():
            found = self.network(pixel_values=images)
        return {"logits": found.logits, "pred_boxes": found.pred_boxes}

    def candidates(self, raw: Any) -> Candidates:
        boxes = box_convert(raw["pred_boxes"], "cxcywh", "xyxy")
        nothing = -1 if self.exclusive else None
        return Candidates(boxes, raw["logits"], None, self.exclusive, nothing, not self.chooses)


def _is_of(network: nn.Module, families: tuple[str, ...]) -> bool:
    """Whether its class is of one of them, or derived from one."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(network).__mro__}
    return bool(names & {_class_of(family) for family in families})


class _ChosenBy(TorchFunctionMode):
    """Hands on through a :class:`~dfq.hooks.Choice` which of an image's places become queries."""

    def __init__(self, choice: Choice):
        super().__init__()
        self.choice = choice

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if op_name(func) != "topk" or result[1].dim() != 2:  # of [N, places]; D-FINE takes some of other things too
            return result
        places = self.choice(result[1])
        return args[0].gather(1, places), places
