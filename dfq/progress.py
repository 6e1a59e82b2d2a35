"""Progress of long work on the terminal: one rich bar with rate and time left, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[float], None]


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {task.fields['unit']}/s" if speed else "")


class _Count(MofNCompleteColumn):
    """Whole units, although work advances by fractions of them."""

    def render(self, task) -> Text:
        total = int(task.total or 0)
        return Text(f"{int(task.completed):{len(str(total))}d}/{total} {task.fields['unit']}")


@contextmanager
def progress_bar(description: str, total: float, unit: str, completed: float = 0) -> Iterator[Advance]:
    """A bar while the context is open; call what it gives with the amount of work just done (in ``unit``)."""
    columns = (TextColumn("{task.description}"), BarColumn(), _Count(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=completed, unit=unit)
        yield lambda amount: progress.advance(task, amount)
