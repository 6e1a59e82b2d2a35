"""Progress of long work on the terminal: one rich bar with rate and time left, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Advance(Protocol):
    """Called with the amount of work just done, and now and then with a short note on how it goes."""

    def __call__(self, amount: float, note: str = "") -> None: ...


def say(text: str) -> None:
    """One line on stderr, where the bars are: stdout is for results."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "")


class _Count(MofNCompleteColumn):
    """Whole units, although work advances by fractions of them."""

    def render(self, task: Task) -> Text:
        total = int(task.total or 0)
        return Text(f"{int(task.completed + 1e-6):{len(str(total))}d}/{total}")


@contextmanager
def progress_bar(description: str, total: float, unit: str, completed: float = 0) -> Iterator[Advance]:
    """A bar while the context is open; call what it gives with the amount of work just done (in ``unit``)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        _Count(),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=int(completed), unit=unit, note="")

        def advance(amount: float, note: str = "") -> None:
            progress.advance(task, amount)
            if note:
                progress.update(task, note=note)

        yield advance
