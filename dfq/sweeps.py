"""The table of all runs of a sweep: what each was given and what came of it, on the terminal and in a file.

Each job leaves ``job.json`` in its folder, whatever process or computer it runs on, when it begins and when it ends;
the table is read from these. Where they lie and which jobs there are to be, Hydra says (:class:`Table`). No torch.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from dfq.errors import UserError
from dfq.ranks import STARTED_BY

JOB, TABLE = "job.json", "runs.csv"
FIGURES = ("agreement", "kl")  # of how a student follows its teacher
TOLD = "DFQ_ERROR_FILE"  # variable with the file in which a job's process leaves its error
UNFINISHED, UNKNOWN = "still running, or killed", "did not begin, or could not say so"


# ------------------------------------------------------------------------------------------------ in a job


def is_job() -> bool:
    """Whether this process runs a job of a sweep now."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def values(swept: Collection[str]) -> dict[str, str]:
    """What this job was given of the options that change from job to job.

    Args:
        swept: those on the command line; a sweeper may have more of its own.
    """
    run = HydraConfig.get()
    keys = {*swept, *(_plain(str(key)) for key in run.sweeper.get("params") or {})}
    given = dict(word.partition("=")[::2] for word in run.overrides.task)
    return {_plain(key): value for key, value in given.items() if _plain(key) in keys}


def note(swept: Collection[str]) -> Callable[..., None]:
    """Write down that this job has begun; returns what writes down how it ended: called with its result, its error."""
    start = time.time()

    def write(result: Any, error: str) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        content = {
            "job": HydraConfig.get().job.num,
            "values": values(swept),
            "result": result if isinstance(result, int | float) else None,
            "seconds": round(time.time() - start, 1),
            "error": error,
        }
        if folder.is_dir():
            (folder / JOB).write_text(json.dumps(content) + "\n", encoding="utf-8")

    def ended(result: Any, error: BaseException | None = None) -> None:
        write(result, "" if error is None else in_one_line(error))

    write(None, UNFINISHED)
    return ended


def in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def apart(words: list[str], folder: Path) -> None:
    """Run this job in a process of its own, to its end: one whose training is shared out, whatever runs the jobs.

    Lightning starts the other processes once in a process, and what it tells them (a port, LOCAL_RANK) stays in its
    environment; so a second job there would wait for others that have served the first.

    Args:
        words: the command and its options.
        folder: of the job.

    Raises:
        UserError: with what that process said; it has shown it.
    """
    quoted = str(folder).replace("\\", r"\\").replace("'", r"\'")
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "error"
        line = [sys.executable, "-m", "dfq", *words, f"hydra.run.dir='{quoted}'"]
        with subprocess.Popen(line, env={**os.environ, TOLD: str(told), STARTED_BY: str(os.getpid())}) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # it was told as well, and saves what it has
                process.wait()
                raise
        if status == 0:
            return
        if status == 130:
            raise KeyboardInterrupt
        said = told.read_text(encoding="utf-8") if told.exists() else ""
    error = UserError(said or f"got a job whose process ended with status {status}")
    error.shown = bool(said)  # type: ignore[attr-defined]
    raise error


def _plain(key: str) -> str:
    """``weight_quantizer`` of Hydra's ``quantizer@weight_quantizer``, ``a.b`` of ``++a.b``."""
    return key.lstrip("+~").rpartition("@")[2]


# ------------------------------------------------------------------------------------------------ around all jobs


@dataclass(frozen=True)
class Sweep:
    """One that has begun. ``expected``: what each job is given; empty where a sweeper draws it."""

    folder: Path
    expected: list[dict[str, str]]
    earlier: dict[Path, int]  # notes that other sweeps have left there, and when

    @classmethod
    def of(cls, config: Any) -> Sweep:
        """The one that Hydra begins with ``config``."""
        folder = Path(config.hydra.sweep.dir)
        expected = _jobs(config) if config.hydra.sweeper._target_.endswith(".BasicSweeper") else []
        return cls(folder, expected, {path: path.stat().st_mtime_ns for path in folder.rglob(JOB)})

    def rows(self) -> list[dict[str, Any]]:
        """One for each job, in order: its values, its figures, its error."""
        found = {}
        for path in self.folder.rglob(JOB):
            if self.earlier.get(path) != path.stat().st_mtime_ns:
                content = json.loads(path.read_text(encoding="utf-8"))
                found[content["job"]] = _row(content, {} if content["error"] else _report(path.parent))
        silent = {
            job: _row({"job": job, "values": given, "result": None, "seconds": None, "error": UNKNOWN}, {})
            for job, given in enumerate(self.expected)
        }
        return [row for _, row in sorted({**silent, **found}.items())]


class Table(Callback):
    """What Hydra tells of a sweep before its jobs begin, to :func:`tables`."""

    def on_multirun_start(self, config: Any, **_: Any) -> None:
        if (begun := _BEGUN.get()) is not None:
            begun.append(Sweep.of(config))


_BEGUN: ContextVar[list[Sweep] | None] = ContextVar("begun", default=None)


@contextmanager
def tables() -> Iterator[None]:
    """Show the table of each sweep that begins inside, however it ends."""
    begun: list[Sweep] = []
    token = _BEGUN.set(begun)
    try:
        yield
    finally:
        _BEGUN.reset(token)
        for sweep in begun:
            show(sweep)


def _jobs(config: Any) -> list[dict[str, str]]:
    """The changing options of each job of Hydra's own sweeper: all combinations, the last option changing first."""
    words = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    options: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides([*words, *config.hydra.overrides.task]):
        if override.is_sweep_override() and override.is_discrete_sweep():
            options[_plain(override.get_key_element())] = [str(value) for value in override.sweep_string_iterator()]
    return [dict(zip(options, job, strict=True)) for job in itertools.product(*options.values())]


def _row(content: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    row = {"job": content["job"], **content["values"]}
    student, fidelity = report.get("student") or {}, report.get("fidelity") or {}
    row |= student.get("metrics") or {}
    row |= {name: fidelity[name] for name in FIGURES if name in fidelity}
    if "size_bytes" in student:
        row["size_bytes"] = student["size_bytes"]
    return {**row, "result": content["result"], "seconds": content["seconds"], "error": content["error"]}


def _report(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def show(sweep: Sweep) -> None:
    """Print the table of a sweep and leave it in its folder as ``runs.csv``; nothing where it has not come to jobs."""
    if not sweep.folder.is_dir():
        return
    found = sweep.rows()
    names = list(dict.fromkeys(name for row in found for name in row))
    names = [name for name in names if any(row.get(name) not in (None, "") for row in found)]
    with open(sweep.folder / TABLE, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found)
    from rich.console import Console
    from rich.table import Table as Shown

    table = Shown(box=None)
    for name in names:
        table.add_column(name, justify="right" if name != "error" else "left")
    for row in found:
        table.add_row(*(_text(row.get(name)) for name in names))
    Console().print(f"{len(found)} runs, also in {sweep.folder / TABLE}", soft_wrap=True, highlight=False)
    Console().print(table)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
