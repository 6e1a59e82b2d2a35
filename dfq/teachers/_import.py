"""What a user names as ``package.module:name``, imported."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from dfq.errors import UserError, did_you_mean


def import_named(key: str, name: str, allowed: str) -> Any:
    """The function or class that ``key=name`` names; never one of Python's standard library. ``allowed``: in words."""
    module_name, _, attribute = name.partition(":")
    # Student folders record such names; nobody's folder may name a function of the system.
    parts = module_name.split(".")
    named = attribute.isidentifier() and all(part.isidentifier() for part in parts)
    if not named or parts[0] in sys.stdlib_module_names:
        raise UserError(f"got {key}={name}", allowed)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"got {key}={name}, whose module can't be imported ({error})",
            do="put its folder on PYTHONPATH or install its package",
        ) from None
    if not hasattr(module, attribute):
        raise UserError(
            f"got {key}={name}, and {module_name} has no {attribute}",
            do=did_you_mean(attribute, vars(module)) or "name something of that module",
        )
    return getattr(module, attribute)
