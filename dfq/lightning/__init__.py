"""The plug-in for Lightning projects: modules and data modules, loaded on first use (no torch until then)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "DistillationModule",
    "DistillationSettings",
    "QuantizationCallback",
    "QuantizedModuleMixin",
    "SyntheticDataModule",
    "student_of",
    "student_to_train",
]

if TYPE_CHECKING:
    from dfq.lightning.callback import QuantizationCallback
    from dfq.lightning.data import SyntheticDataModule
    from dfq.lightning.distillation import DistillationModule, student_to_train
    from dfq.lightning.quantized import QuantizedModuleMixin, student_of
    from dfq.lightning.settings import DistillationSettings
else:

    def __getattr__(name: str) -> Any:
        home = {"DistillationSettings": "settings", "SyntheticDataModule": "data", "QuantizationCallback": "callback"}
        home |= dict.fromkeys(("QuantizedModuleMixin", "student_of"), "quantized")
        home |= dict.fromkeys(("DistillationModule", "student_to_train"), "distillation")
        if name not in home:
            raise AttributeError(f"module 'dfq.lightning' has no attribute {name!r}")
        return getattr(import_module(f"dfq.lightning.{home[name]}"), name)
