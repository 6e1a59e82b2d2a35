"""ONNX for torch operations that torch.onnx has no translation of.

``aten::sort`` that keeps the order of equal values is TopK, which has the first of them first. ``dfq::best_apart``, by
which detectors of two stages choose proposals::

    boxes [N, A, 4] ──────────────────────── NonMaxSuppression ── [M, 3] ── ScatterND ── TopK ── places [N, P], or -1
    scores [N, A] ── Where (its level) ── [N, L, A] ──┘     all -1 [N, A] ──────┘

Suppression has the levels as classes, the P best of each; the best of all of them are then taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dfq.detectors._proposals import NONE


def translations() -> dict[Callable, Callable]:
    """For torch.onnx.export(custom_translation_table=...)."""
    return {torch.ops.aten.sort.stable: _sort, torch.ops.dfq.best_apart.default: _best_apart}


def _opset() -> Any:
    """Of onnxscript, as what mypy does not read; torch.onnx takes the nodes to the opset that is asked for."""
    import onnxscript

    return onnxscript.opset18


def _sort(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    op = _opset()
    size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))
    return op.TopK(values, size, axis=dim, largest=descending)


def _best_apart(boxes: Any, scores: Any, sizes: Sequence[int], overlap: float, most: int) -> Any:
    from onnx import numpy_helper

    op = _opset()

    def constant(*values: float) -> Any:
        return op.Constant(value=numpy_helper.from_array(np.array(values, np.float32)))

    levels = np.repeat(np.arange(len(sizes)), sizes) == np.arange(len(sizes))[:, None]  # [L, A]
    of_levels = op.Constant(value=numpy_helper.from_array(levels[None]))
    each = op.Where(of_levels, op.Unsqueeze(scores, [1]), constant(NONE))
    limit = op.Constant(value_ints=[most])
    kept = op.NonMaxSuppression(boxes, each, limit, constant(overlap), constant(NONE / 2))
    rows = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)  # image, place
    none = op.Expand(constant(NONE), op.Shape(scores))
    best, places = op.TopK(op.ScatterND(none, rows, op.GatherND(scores, rows)), limit, axis=1)
    return op.Where(op.GreaterOrEqual(best, constant(0)), places, op.Constant(value_int=-1))
