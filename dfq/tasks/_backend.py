"""Which package counts boxes in COCO's way."""

from __future__ import annotations

import importlib.util

from dfq.errors import UserError

BACKENDS = ("faster_coco_eval", "pycocotools")  # of torchmetrics, the fastest first


def coco_backend() -> str:
    """The fastest one that is installed."""
    for name in BACKENDS:
        if importlib.util.find_spec(name) is not None:
            return name
    raise UserError(
        "got boxes to evaluate, which needs faster_coco_eval or pycocotools, not installed here",
        do="pip install 'dfq[detection]'",
    )
