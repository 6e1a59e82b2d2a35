"""Data-free quantization: from a trained network alone to a quantized artifact and a report.

Everything here is loaded on first use, so that ``import dfq`` costs milliseconds and no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "load_teacher",
    "generate",
    "quantize",
    "evaluate",
    "export",
    "load",
    "load_student",
    "export_coco",
    "SyntheticDataset",
    "Scheme",
    "Detector",
    "Candidates",
    "Boxes",
    "UserError",
    "__version__",
]

if TYPE_CHECKING:
    from dfq.api import evaluate, export, generate, load, load_student, load_teacher, quantize
    from dfq.coco import export_coco
    from dfq.dataset import SyntheticDataset
    from dfq.detectors._base import Boxes, Candidates, Detector
    from dfq.errors import UserError
    from dfq.scheme import Scheme
else:  # a type checker would take any name for granted if it saw __getattr__

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'dfq' has no attribute {name!r}")
        home = {"SyntheticDataset": "dfq.dataset", "Scheme": "dfq.scheme", "UserError": "dfq.errors"}
        home["export_coco"] = "dfq.coco"
        home |= dict.fromkeys(("Detector", "Candidates", "Boxes"), "dfq.detectors._base")
        value = globals()[name] = getattr(import_module(home.get(name, "dfq.api")), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
