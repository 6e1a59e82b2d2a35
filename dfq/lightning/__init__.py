"""The plug-in for Lightning projects: modules and data modules, loaded on first use (no torch until then)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["DistillationModule", "QuantizationCallback", "QuantizedModuleMixin", "SyntheticDataModule", "student_of"]

if TYPE_CHECKING:
    from dfq.lightning.callback import QuantizationCallback
    from dfq.lightning.data import SyntheticDataModule
    from dfq.lightning.distillation import DistillationModule
    from dfq.lightning.quantized import QuantizedModuleMixin, student_of
else:

    def __getattr__(name: str) -> Any:
        home = {"DistillationModule": "distillation", "SyntheticDataModule": "data", "QuantizationCallback": "callback"}
        home |= dict.fromkeys(("QuantizedModuleMixin", "student_of"), "quantized")
        if name not in home:
            raise AttributeError(f"module 'dfq.lightning' has no attribute {name!r}")
        return getattr(import_module(f"dfq.lightning.{home[name]}"), name)
