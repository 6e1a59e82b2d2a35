"""The task of a teacher, which knows its network where outputs cannot be read without it (boxes of a detector)."""

from __future__ import annotations

from typing import Any

from dfq.settings import resolve
from dfq.teacher import InputSpec, Teacher


def task_of(teacher: Teacher) -> Any:
    """What ``teacher``'s outputs mean."""
    task = resolve("task", teacher.task)
    if not hasattr(task, "of"):
        return task
    spec = teacher.input_spec
    return task.of(teacher.module, spec.size[1:] if isinstance(spec, InputSpec) else None)
