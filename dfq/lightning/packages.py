"""``lightning`` and ``pytorch_lightning``: two sets of classes under the same names, of which a Trainer knows one."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def for_all_packages(cls: Any, name: str) -> Any:
    """``cls`` derived from the class ``name`` of every package that is imported; of the one that dfq needs, if none."""
    found = [sys.modules[package] for package in PACKAGES if hasattr(sys.modules.get(package), name)]
    found = found or [importlib.import_module("pytorch_lightning")]
    return _derived(cls, tuple(getattr(package, name) for package in found))


@functools.cache
def _derived(cls: Any, bases: tuple[type, ...]) -> Any:
    bases = tuple(base for base in bases if not issubclass(cls, base))
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, *bases), own) if bases else cls
