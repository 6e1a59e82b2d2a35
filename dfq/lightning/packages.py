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


def settle(module: Any, trainer: Any) -> None:
    """Make what :func:`for_all_packages` has derived one of ``trainer``'s package alone.

    A Trainer asks which methods a module overrides. In a class of both packages one of them overrides the other.
    """
    kind, theirs = type(module), [part.__module__ for part in trainer.__class__.__mro__]  # a proxy has another type
    packages = tuple(p for p in PACKAGES if any(name.startswith(p) for name in theirs))
    bases = tuple(base for base in vars(kind).get("_package_bases", ()) if base.__module__.startswith(packages))
    if bases:
        module.__class__ = _derived(kind.__mro__[1], bases)


@functools.cache
def _derived(cls: Any, bases: tuple[type, ...]) -> Any:
    bases = tuple(base for base in bases if not issubclass(cls, base))
    own = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_package_bases": bases,
    }
    return type(cls.__name__, (cls, *bases), own | {"__reduce_ex__": _reduce}) if bases else cls


def _reduce(instance: Any, protocol: int) -> Any:
    """Go by the class that has a name; whoever reads it (a spawned process) derives it again."""
    reduced: Any = object.__reduce_ex__(instance, protocol)
    return _new, (type(instance).__mro__[1],), *reduced[2:]


def _new(cls: Any) -> Any:
    return cls.__new__(cls)
