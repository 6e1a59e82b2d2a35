"""Settings of a detector's task, seen without torch: the command line asks before it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfq import settings
from dfq.errors import UserError, did_you_mean

KEY = "teacher.task_settings"


def check_task_settings(given: Any) -> dict[str, Any]:
    """Those of ``given`` that are not what conf/task/detection.yaml says; a wrong one is a UserError."""
    defaults = settings.load("task", "detection")
    known = settings.signature(defaults.pop("_target_")) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"got {KEY}={given}", f"a mapping of {', '.join(defaults)}: {{least_score: 0.5}}")
    for key in given:
        if key not in defaults:
            raise UserError(f"got {KEY}.{key}", ", ".join(f"{KEY}.{name}" for name in defaults), _meant(key, defaults))
    values = {
        key: settings.check_value(value, known[key].annotation, f"{KEY}.{key}", known[key].module)
        for key, value in given.items()
    }
    return {key: value for key, value in values.items() if value != defaults[key]}


def no_detector(found: str, adapter: Any, task_settings: Mapping[str, Any] | None, allowed: str = "a detector") -> None:
    """What only a detector takes was given for another network, ``found``: a UserError."""
    for key, value in (("teacher.adapter", adapter), (KEY, task_settings)):
        if value:
            raise UserError(f"got {key}={value} and {found}", allowed)


def _meant(key: Any, defaults: Mapping[str, Any]) -> str:
    return did_you_mean(str(key), defaults).replace("'", f"'{KEY}.", 1)
