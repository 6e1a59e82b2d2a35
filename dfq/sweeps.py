"""The table of all runs of a sweep: what each was given and what came of it, on the terminal and in a file.

Each job leaves ``job.json`` in its folder, whatever process or computer it ran on; the table is read from
these. No torch.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

JOB, TABLE = "job.json", "runs.csv"
FIGURES = ("agreement", "kl")  # of how a student follows its teacher


def note(swept: Collection[str]) -> Callable[..., None]:
    """What writes down how the job ended that this process runs now: called with its start, its result, its error."""

    def write(start: float, result: Any, error: BaseException | None = None) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        run = HydraConfig.get() if HydraConfig.initialized() else None
        if run is None or run.mode != RunMode.MULTIRUN:
            return
        values = dict(word.lstrip("+~").partition("=")[::2] for word in run.overrides.task)
        shown = {key.rpartition("@")[2]: value for key, value in values.items()}
        content = {
            "job": run.job.num,
            "values": {key: value for key, value in shown.items() if key in swept},
            "result": result if isinstance(result, int | float) else None,
            "seconds": round(time.time() - start, 1),
            "error": "" if error is None else " ".join(str(error).split()) or type(error).__name__,
        }
        folder = Path(run.runtime.output_dir)
        if folder.is_dir():
            (folder / JOB).write_text(json.dumps(content) + "\n", encoding="utf-8")

    return write


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each job of the sweep in ``folder``, in order: its values, its figures, its error."""
    found = []
    for path in folder.glob(f"*/{JOB}"):
        content = json.loads(path.read_text(encoding="utf-8"))
        row = {"job": content["job"], **content["values"]}
        report = _report(path.parent)
        student, fidelity = report.get("student") or {}, report.get("fidelity") or {}
        row |= student.get("metrics") or {}
        row |= {name: fidelity[name] for name in FIGURES if name in fidelity}
        if "size_bytes" in student:
            row["size_bytes"] = student["size_bytes"]
        found.append({**row, "result": content["result"], "seconds": content["seconds"], "error": content["error"]})
    return sorted(found, key=lambda row: row["job"])


def _report(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def show(folder: Path) -> None:
    """Print the table of the sweep in ``folder`` and leave it there as ``runs.csv``; nothing where no job has ended."""
    found = rows(folder)
    if not found:
        return
    names = list(dict.fromkeys(name for row in found for name in row))
    names = [name for name in names if any(row.get(name) not in (None, "") for row in found)]
    with open(folder / TABLE, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(found)} runs, also in {folder / TABLE}", title_justify="left", box=None)
    for name in names:
        table.add_column(name, justify="right" if name != "error" else "left")
    for row in found:
        table.add_row(*(_text(row.get(name)) for name in names))
    Console().print(table)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
