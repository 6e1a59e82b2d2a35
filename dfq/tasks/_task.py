"""The task of a teacher, which knows its network where outputs cannot be read without it (boxes of a detector)."""

from __future__ import annotations

from typing import Any

from dfq.settings import resolve
from dfq.teacher import Teacher


def task_of(teacher: Teacher) -> Any:
    """What ``teacher``'s outputs mean."""
    task = resolve("task", teacher.task)
    return task.of(teacher.module) if hasattr(task, "of") else task
