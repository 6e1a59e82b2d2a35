"""``dfq plan``: what a run will do, how long it takes and what room it needs, before anything is made.

A network that is there and can take a few steps on this machine is tried (:mod:`dfq.costs`); one that has no weights
here, does not fit or is too slow to try is counted. Nothing is left behind but what trials leave in a temporary folder
until they are done.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dfq import pipeline
from dfq.costs import (
    FLOAT_BYTES,
    Cost,
    Counts,
    Machine,
    count,
    counted_generation,
    counted_looks,
    counted_quantization,
    forward_seconds,
    in_processes,
    largest_unit,
    of_generation,
    of_quantization,
    quietly,
    timed,
    trains_in_processes,
)
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.pipeline import Experiment
from dfq.student import Student
from dfq.teacher import Teacher

TOO_SLOW_S = 10.0  # a forward of one sample: such a network is counted, not tried
ESTIMATED, THERE, UNKNOWN = "to do", "there already", "not estimated"


@dataclass(frozen=True)
class Stage:
    """One arrow (or a row beside it) of a run."""

    name: str
    what: str
    state: str  # ESTIMATED, THERE or UNKNOWN
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Plan:
    """What a run will do. ``resident_bytes``: what the process holds before a stage begins, networks included."""

    stages: list[Stage]
    how: str
    device: torch.device
    resident_bytes: int
    free_memory_bytes: int | None
    free_disk_bytes: int

    @property
    def total(self) -> Cost:
        total = Cost()
        for stage in self.stages:
            total = total + stage.cost
        return total

    def memory_bytes(self, stage: Stage) -> float:
        """The most that the process holds during ``stage``."""
        return self.resident_bytes + stage.cost.memory_bytes

    @property
    def lacks(self) -> list[str]:
        """What will not fit, a line each."""
        found = []
        largest = max((s for s in self.stages if s.state == ESTIMATED), key=self.memory_bytes, default=None)
        if largest is not None and self.free_memory_bytes is not None:
            needed = self.memory_bytes(largest)
            if needed > self.free_memory_bytes:
                found.append(
                    f"{largest.name} takes {amount(needed)} of memory, and {amount(self.free_memory_bytes)} are there"
                )
        if self.total.disk_bytes > self.free_disk_bytes:
            found.append(f"files take {amount(self.total.disk_bytes)}, and {amount(self.free_disk_bytes)} are free")
        return found


# ------------------------------------------------------------------------------------------------ making it


def make(
    build: Callable[..., Teacher], experiment: Callable[[Teacher], Experiment], device: torch.device, **options: Any
) -> Plan:
    """The plan of a run.

    Args:
        build: makes the teacher; with ``weights=False`` its structure alone.
        experiment: of a teacher.
        options: ``world_size`` of the generation; ``has_weights``, whether the teacher's are here and may fit.
    """
    world_size = options.get("world_size", 1)
    reason, there = "no weights here, or too large for this device", (False, False)
    if options.get("has_weights", True):
        teacher = build()
        if forward_seconds(teacher) < TOO_SLOW_S:
            with tempfile.TemporaryDirectory() as scratch, quietly():
                stages = _tried(experiment(teacher), Path(scratch), world_size)
            how = "told from trials of a few steps on this machine, as busy as it is now"
            return _plan(stages, how, device, 0)
        reason, there = "too slow to try here", _there(experiment(teacher))
    teacher, counts = count(lambda: build(weights=False))
    machine = Machine.measure(device)
    e = experiment(teacher)
    how = (
        f"counted, not tried ({reason}): {number(counts.num_parameters)} parameters, {number(counts.macs)} "
        f"multiply-accumulates a sample, at half of the {machine.macs_per_s / 1e9:.0f} G/s of a matrix product here"
    )
    there = there if any(there) else _given(e)
    return _plan(_counted(e, counts, machine, world_size, device, there), how, device, counts.weight_bytes)


def _plan(stages: list[Stage], how: str, device: torch.device, extra_bytes: int) -> Plan:
    held = allocated_bytes(device)
    free = free_memory_bytes(device)
    return Plan(
        stages,
        how,
        device,
        held + extra_bytes,
        None if free is None else free + held,
        free_disk_bytes(pipeline.OUTPUTS),
    )


def _tried(e: Experiment, folder: Path, world_size: int) -> list[Stage]:
    """Every stage, by trials; a stage whose result is there costs nothing, and those behind it are told from it."""
    path, settings = pipeline.dataset_place(e.teacher, e.generator, e.num_samples, e.seed, e.dataset_dir)
    sample = _whole(path, e.num_samples)
    generation, has_student = None, sample is not None and _has_student(e, sample)
    if sample is None:
        generator = pipeline.as_recorded(e.generator, settings)
        generation, sample = of_generation(
            e.teacher, generator, e.num_samples, settings["batch_size"], folder / "generate", world_size
        )
    methods = (e.scheme, e.algorithm, e.weight_quantizer, e.activation_quantizer)
    cost, student = of_quantization(e.teacher, sample, e.num_samples, *methods)
    weight_bytes, unit_bytes = (FLOAT_BYTES * n for n in (e.teacher.num_parameters, largest_unit(e.teacher)))
    cost = _shared(e, cost, e.teacher.device, weight_bytes, unit_bytes, allocated_bytes(e.teacher.device))
    if student is not None and not has_student:
        cost = replace(cost, disk_bytes=cost.disk_bytes + _saved_bytes(e, student, folder))
    measured = _num_measured(e)
    looks = _looks(e.teacher, student, measured) if measured and student is not None else None
    return _stages(e, world_size, generation, cost, has_student, looks)


def _counted(
    e: Experiment,
    counts: Counts,
    machine: Machine,
    world_size: int,
    device: torch.device,
    there: tuple[bool, bool],
) -> list[Stage]:
    spec, batch = e.teacher.input_spec, e.generator.batch_size
    size = min(32 if batch == "auto" else batch, e.num_samples)
    generation = counted_generation(counts, machine, e.generator, e.num_samples, size, spec, world_size)
    bits = 32 if e.scheme.weight.is_float else e.scheme.weight.bits_per_value
    quantization = counted_quantization(counts, machine, e.algorithm, e.num_samples, bits)
    unit_bytes, held = FLOAT_BYTES * counts.unit_parameters, allocated_bytes(device) + counts.weight_bytes
    quantization = _shared(e, quantization, device, counts.weight_bytes, unit_bytes, held)
    looks = counted_looks(counts, machine, _num_measured(e))
    return _stages(e, world_size, None if there[0] else generation, quantization, there[1], looks)


def _stages(
    e: Experiment,
    world_size: int,
    generation: Cost | None,
    quantization: Cost,
    has_student: bool,
    looks: Cost | None,
) -> list[Stage]:
    """The arrows and the rows beside them; ``generation``: None where the dataset is there."""
    what = f"{e.num_samples:,} samples by {pipeline._label(e.generator)}"
    if generation is None:
        stages = [Stage("generate", what, THERE)]
    else:
        ranks = f", {world_size} ranks" if world_size > 1 else ""
        stages = [Stage("generate", what + ranks, ESTIMATED, generation)]
    what = f"{e.scheme.name} {e.scheme.policy} by {pipeline._label(e.algorithm)}"
    if e.training.world_size > 1 and trains_in_processes(e.algorithm):
        what += f", {e.training.world_size} processes of {e.training.strategy}"
    stages.append(Stage("quantize", what, THERE) if has_student else Stage("quantize", what, ESTIMATED, quantization))
    if e.exporter is not None:
        stages.append(Stage("export", pipeline._label(e.exporter), UNKNOWN))
    if (measured := _num_measured(e)) and looks is not None:
        stages.append(Stage("evaluate", f"{measured:,} samples, twice", ESTIMATED, looks))
    again = replace(quantization, disk_bytes=0)
    if "gaussian" in e.references:
        stages.append(Stage("reference", "the same from noise", ESTIMATED, again))
    if "real" in e.references and getattr(e.evaluation, "reference_path", None) is not None:
        stages.append(Stage("reference", "the same from real data, as many samples at most", ESTIMATED, again))
    return stages


def _shared(e: Experiment, cost: Cost, device: torch.device, *sizes: int) -> Cost:
    """``cost`` of a quantization, in the processes that the experiment trains in."""
    return in_processes(cost, e.training, device, *sizes) if trains_in_processes(e.algorithm) else cost


def _num_measured(e: Experiment) -> int:
    return getattr(pipeline._for_teacher(e.evaluation, e.teacher), "num_samples", 0) or 0


def _there(e: Experiment) -> tuple[bool, bool]:
    """Whether dataset and student are there, of a network whose weights are; nothing is tried."""
    if e.dataset_dir is None and e.generator.batch_size == "auto":  # it would have to be counted for the folder's name
        return _given(e)
    path, _ = pipeline.dataset_place(e.teacher, e.generator, e.num_samples, e.seed, e.dataset_dir)
    dataset = _whole(path, e.num_samples)
    return dataset is not None, dataset is not None and _has_student(e, dataset)


def _given(e: Experiment) -> tuple[bool, bool]:
    """The same of the folders that are named; the weights that would decide others are not here."""
    dataset = None if e.dataset_dir is None else _whole(e.dataset_dir, e.num_samples)
    has_student = e.student_dir is not None and (e.student_dir / "student.json").exists()
    return dataset is not None, dataset is not None and has_student


def _has_student(e: Experiment, dataset: SyntheticDataset) -> bool:
    methods = (e.scheme, e.algorithm, e.weight_quantizer, e.activation_quantizer)
    path, _ = pipeline.student_place(e.teacher, dataset, *methods, e.seed, e.student_dir, e.training)
    return (path / "student.json").exists()


def _whole(path: Path, num_samples: int) -> SyntheticDataset | None:
    if not (path / "manifest.json").exists():
        return None
    dataset = SyntheticDataset(path)
    return dataset if len(dataset) >= num_samples else None


def _saved_bytes(e: Experiment, student: Student, folder: Path) -> int:
    student.freeze()
    student.settings = {"seed": e.seed}
    saved = student.save(folder / "student")
    return sum(file.stat().st_size for file in saved.iterdir())


def _looks(teacher: Teacher, student: Student, num_samples: int) -> Cost:
    example = teacher.example(8)

    def both() -> None:
        with torch.no_grad():
            teacher(example)
            student(example)

    both()
    return timed(both, teacher.device).times(num_samples / len(example))


# ------------------------------------------------------------------------------------------------ room


def may_load(config: Mapping[str, Any], device: torch.device) -> bool:
    """Whether the weights of a network that lies in files are here, and so small that trials with it fit as well."""
    name = config.get("name")
    if config["_target_"] != "dfq.teachers.huggingface.load":
        return True
    files = list(Path(str(name)).glob("*.safetensors"))
    free = free_memory_bytes(device)
    # In float32 they may take twice their file; then a student, gradients and Adam's moments.
    return bool(files) and (free is None or 10 * sum(file.stat().st_size for file in files) < free)


def allocated_bytes(device: torch.device) -> int:
    """What this process holds: of the device's memory, or resident in the computer's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what trials have left
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory_bytes(device: torch.device) -> int | None:
    """What this process can still get; None where nothing says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    try:  # a container may have less
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return min(found) if found else None


def free_disk_bytes(path: Path) -> int:
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


# ------------------------------------------------------------------------------------------------ showing it


def table(plan: Plan) -> Table:
    """For the terminal."""
    shown = Table(title=plan.how, title_justify="left", box=None, padding=(0, 2, 0, 0))
    shown.add_column("stage", style="bold", no_wrap=True)
    shown.add_column("what")
    for name in ("time", "cpu", "memory", "disk"):
        shown.add_column(name, justify="right", no_wrap=True)
    for stage in plan.stages:
        if stage.state == ESTIMATED:
            cost = stage.cost
            times = duration(cost.seconds), duration(cost.cpu_seconds)
            shown.add_row(stage.name, stage.what, *times, amount(plan.memory_bytes(stage)), amount(cost.disk_bytes))
        else:
            shown.add_row(stage.name, f"{stage.what} ({stage.state})", *["-"] * 4)
    total = plan.total
    most = max((plan.memory_bytes(stage) for stage in plan.stages), default=plan.resident_bytes)
    times = duration(total.seconds), duration(total.cpu_seconds)
    shown.add_row("in all", "", *times, amount(most), amount(total.disk_bytes), style="bold")
    room = "?" if plan.free_memory_bytes is None else amount(plan.free_memory_bytes)
    shown.add_row("there is", f"{plan.device}", "", "", room, amount(plan.free_disk_bytes))
    return shown


def refuse(plan: Plan) -> None:
    """A :class:`UserError` where the plan does not fit."""
    if plan.lacks:
        raise UserError(
            f"got a run that will not fit: {'; '.join(plan.lacks)}",
            do="lower generator.batch_size, algorithm.batch_size or num_samples, or take a device with more memory",
        )


def to_dict(plan: Plan) -> dict[str, Any]:
    """For json."""
    return {
        "how": plan.how,
        "device": str(plan.device),
        "free_memory_bytes": plan.free_memory_bytes,
        "free_disk_bytes": plan.free_disk_bytes,
        "fits": not plan.lacks,
        "stages": [
            {
                "name": stage.name,
                "what": stage.what,
                "state": stage.state,
                "seconds": stage.cost.seconds,
                "cpu_seconds": stage.cost.cpu_seconds,
                "memory_bytes": plan.memory_bytes(stage),
                "disk_bytes": stage.cost.disk_bytes,
            }
            for stage in plan.stages
        ],
    }


def amount(value: float) -> str:
    """Bytes, for people."""
    return f"{number(value)}B"


def number(value: float) -> str:
    """A count, for people; with a space before what follows."""
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} T"


def duration(seconds: float) -> str:
    """Seconds, for people."""
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"
