"""What a stage of a run costs, told from a few steps of the very thing (docs/plan.md has the formulas).

A method's seconds are linear in its settings: a constant, plus so much for each step, each sample, each look. Each is
told by running the method with two small values of that setting, everything else held small: the network, the machine,
the scheme and the method are those of the run, so no table of known networks is needed. The same pair of runs counts
bytes (:func:`~dfq.generators._memory.peak_bytes`). What can't be run here is counted instead: multiply-accumulates and
bytes on tensors without memory, over what this machine does in a second.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dfq import pipeline, quality
from dfq.algorithms._base import STEPS as TRAINING_STEPS
from dfq.algorithms._base import trains
from dfq.algorithms.auto import Auto, seconds_of
from dfq.algorithms.sequence import Sequence
from dfq.dataset import SyntheticDataset, samples_of
from dfq.generators._base import Generator
from dfq.generators._memory import peak_bytes
from dfq.lightning.sharding import units
from dfq.lightning.trainer import Training
from dfq.scheme import MixedScheme, Scheme
from dfq.settings import resolve
from dfq.student import Student
from dfq.teacher import Teacher, TokenSpec

STEPS = (*TRAINING_STEPS, "final_iterations")  # the last is a generator's
SAMPLES = ("num_samples", "num_calibration_samples")
TRIAL_S = 0.4  # what one setting's part of a trial may take
FORWARDS = 8  # a training step with two networks, in forwards of one; says how large a trial may be, not what it costs
SHORT = 6  # tokens of the shorter trial of text
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Of one stage. ``memory_bytes``: tensors alive at once beside the networks that are there before."""

    seconds: float = 0.0  # by the clock on the wall
    cpu_seconds: float = 0.0  # of the process
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """One after the other: times add, of memory the larger counts, files stay."""
        return Cost(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.memory_bytes, other.memory_bytes),
            self.disk_bytes + other.disk_bytes,
        )

    def times(self, factor: float) -> Cost:
        """As often: times and files multiply, memory stays."""
        return replace(
            self,
            seconds=self.seconds * factor,
            cpu_seconds=self.cpu_seconds * factor,
            disk_bytes=self.disk_bytes * factor,
        )


# ------------------------------------------------------------------------------------------------ trials


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars and lines of what is only tried."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def timed(work: Callable[[], Any], device: torch.device) -> Cost:
    """Seconds that ``work`` takes."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def difference(more: Cost, less: Cost) -> Cost:
    """Time that ``more`` takes beyond ``less``; noise gives none back."""
    return Cost(max(0.0, more.seconds - less.seconds), max(0.0, more.cpu_seconds - less.cpu_seconds))


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def extrapolated(
    run: Callable[..., Cost],
    small: Mapping[str, float],
    larger: Mapping[str, float],
    full: Mapping[str, float],
    base: Cost | None = None,
) -> Cost:
    """Cost of ``run`` at ``full``: a constant, and for each setting so much a unit.

    Args:
        run: called with the settings as keywords, at ``small`` and with one of them at a time as in ``larger``.
        base: what it costs at ``small``, where that is known.
    """
    base = base or run(**small)
    seconds, cpu, memory = base.seconds, base.cpu_seconds, base.memory_bytes
    for name, value in larger.items():
        if value == small[name] or full[name] == small[name]:
            continue
        more, units = run(**{**small, name: value}), (full[name] - small[name]) / (value - small[name])
        seconds += max(0.0, more.seconds - base.seconds) * units
        cpu += max(0.0, more.cpu_seconds - base.cpu_seconds) * units
        memory += max(0.0, more.memory_bytes - base.memory_bytes) * units
    return Cost(seconds, cpu, memory, base.disk_bytes)


def forward_seconds(teacher: Teacher) -> float:
    """Of one sample, in a batch that is large enough to tell; the first one, which prepares kernels, is not counted."""
    count, took = 1, 0.0
    while took < TRIAL_S / 8 and count <= 64:
        example = teacher.example(count)
        with torch.no_grad():
            teacher(example)
            cost = timed(lambda example=example: teacher(example), teacher.device)  # type: ignore[misc]
        # What others do on a busy computer says nothing of how large a trial may be.
        took = min(cost.seconds, cost.cpu_seconds) if teacher.device.type == "cpu" else cost.seconds
        count *= 2
    return took / (count / 2)


def _count(seconds_each: float, least: int, most: int, trial_s: float = TRIAL_S) -> int:
    """As many as fit into a trial."""
    return max(least, min(most, int(trial_s / max(seconds_each, 1e-9))))


def _has(method: Any, names: tuple[str, ...]) -> list[str]:
    known = {field.name for field in fields(method)}
    return [name for name in names if name in known]


# ------------------------------------------------------------------------------------------------ generation


def of_generation(
    teacher: Teacher, generator: Generator, num_samples: int, batch_size: int, folder: Path, world_size: int = 1
) -> tuple[Cost, SyntheticDataset]:
    """Cost of a dataset for the rank with the most to do; and one like it, of samples that were made to tell.

    Args:
        folder: empty, for what is made.
    """
    if parts := getattr(generator, "generators", ()):  # of a mixture: each makes its share, one after the other
        share = math.ceil(num_samples / len(parts))
        found = []
        for index, part in enumerate(parts):
            size = math.ceil(batch_size / len(parts))
            size = size if part.batch_size == "auto" else min(size, part.batch_size)
            (folder / f"part_{index}").mkdir(parents=True)
            found.append(of_generation(teacher, part, share, size, folder / f"part_{index}", world_size))
        return sum((cost for cost, _ in found), start=Cost()), found[0][1]
    each = forward_seconds(teacher)
    batch = _count(FORWARDS * each, min(2, batch_size), batch_size)
    steps = _has(generator, STEPS)
    settings: dict[str, tuple[int, int, int]] = {}  # small, larger, full
    for name in steps:
        full = getattr(generator, name)
        settings[name] = (min(1, full), min(1 + _count(FORWARDS * each * batch, 2, 20), full), full)
    spec = teacher.input_spec
    if isinstance(spec, TokenSpec):
        a_token = each / spec.length * batch
        settings["length"] = (
            min(SHORT, spec.length),
            min(SHORT + _count(4 * a_token, 4, 48), spec.length),
            spec.length,
        )
    shares = type(generator).prepare is not Generator.prepare  # trains something once for all batches
    count = 0

    def trial(counted: bool, size: int, batches: int, values: Mapping[str, float]) -> Cost:
        nonlocal count
        count += 1
        length = int(values.get("length", 0))
        shorter = teacher
        if length:
            shorter = replace(teacher, input_spec=replace(spec, length=length))  # type: ignore[arg-type]
            shorter.__dict__["sha256"] = teacher.sha256  # of the same weights: not hashed anew
        shrunk = replace(generator, batch_size=size, **{name: int(values[name]) for name in steps})  # type: ignore[arg-type]
        path = folder / f"trial_{count}"

        def work() -> None:
            # Of two ranks, so that nobody looks at the quality of what is not whole.
            pipeline.generate(shorter, shrunk, 2 * batches * size, 0, path, 0, 2)

        return Cost(memory_bytes=peak_bytes(work)) if counted else timed(work, teacher.device)

    small, larger, full = ({name: values[i] for name, values in settings.items()} for i in range(3))
    first = trial(False, batch, 1, small)  # prepares kernels
    base, two = trial(False, batch, 1, small), trial(False, batch, 2, small)
    one = extrapolated(lambda **values: trial(False, batch, 1, values), small, larger, full, base)
    made = SyntheticDataset(folder / "trial_1")
    batches = math.ceil(math.ceil(num_samples / batch_size) / world_size) * batch_size / batch
    # What a call costs, its steps (of all batches, or once for all) and whatever else each further batch takes.
    steps_of_one, a_batch = difference(one, base), difference(two, base)
    time_ = base + steps_of_one.times(1 if shares else batches) + a_batch.times(batches - 1)
    warm = difference(first, base)
    # Bytes: of a batch of two and of four, and of a shorter and a longer text.
    sizes = {"size": (2, 4, batch_size), **{k: v for k, v in settings.items() if k == "length"}}
    few = {name: min(2, value) for name, value in full.items() if name != "length"}

    def counted(size: float, **values: float) -> Cost:
        return trial(True, int(size), 1, {**few, **{k: v for k, v in values.items() if k == "length"}})

    few_of, more_of, all_of = ({name: values[i] for name, values in sizes.items()} for i in range(3))
    bytes_ = extrapolated(counted, few_of, more_of, all_of)
    dataset = _grown(teacher, generator, made, num_samples, _count(each, 16, 512), folder / "grown")
    look = timed(lambda: quality.assess(teacher, dataset), teacher.device)
    looked_at = min(num_samples, quality.MOST_SAMPLES) / min(len(dataset), quality.MOST_SAMPLES)
    on_disk = sum(file.stat().st_size for file in (dataset.path / "shards").iterdir()) / len(dataset) * num_samples
    total = time_ + look.times(looked_at) + warm
    return replace(total, memory_bytes=bytes_.memory_bytes, disk_bytes=on_disk), dataset


def _grown(
    teacher: Teacher, generator: Generator, made: SyntheticDataset, num_samples: int, most: int, path: Path
) -> SyntheticDataset:
    """The samples of ``made`` again and again (random ids for text, which was made too short)."""
    wanted = min(num_samples, most)
    dataset = SyntheticDataset.create(path, made.manifest["settings"], made.provenance)
    tensors = made.tensors()
    if isinstance(teacher.input_spec, TokenSpec):
        count = len(samples_of(tensors))
        ids = teacher.input_spec.example(count, torch.Generator().manual_seed(0))
        same = {
            k: v for k, v in tensors.items() if isinstance(v, Tensor) and v.shape[1:2] != samples_of(tensors).shape[1:]
        }
        tensors = {**same, "input_ids": ids.to(samples_of(tensors).dtype)}
        if "num_tokens" in tensors:
            tensors["num_tokens"] = torch.full_like(tensors["num_tokens"], ids.shape[1])
        if getattr(generator, "cache_teacher", 0):
            from dfq.generators.self_generation import teacher_cache

            tensors |= teacher_cache(teacher, ids, generator.cache_teacher)  # type: ignore[attr-defined]
    size = len(samples_of(tensors))
    for index, start in enumerate(range(0, wanted, size)):
        dataset.write_shard(index, {k: v[: wanted - start] for k, v in tensors.items()}, 0.0)
    return SyntheticDataset(path)


# ------------------------------------------------------------------------------------------------ quantization


def of_quantization(
    teacher: Teacher,
    dataset: SyntheticDataset,
    num_samples: int,
    scheme: Scheme,
    algorithm: Any,
    weight_quantizer: Any,
    activation_quantizer: Any,
) -> tuple[Cost, Student | None]:
    """Cost of a student from ``num_samples`` samples in one process, and one that was made to tell.

    Args:
        dataset: samples like those, not as many.
    """
    if isinstance(scheme, MixedScheme):
        scheme = scheme.with_bits({})  # which bits a layer gets changes little of what it costs
    if isinstance(algorithm, Auto):
        budget = seconds_of(algorithm.budget)
        inside = [resolve("algorithm", rung) for rung in algorithm.rungs]
        largest = _sum(teacher, dataset, num_samples, scheme, inside, weight_quantizer, activation_quantizer)
        cost, student = largest
        busy = cost.cpu_seconds / cost.seconds if cost.seconds else 1.0
        return replace(cost, seconds=budget, cpu_seconds=budget * busy), student
    methods, views = (weight_quantizer, activation_quantizer), views_of(algorithm)
    return _sum(teacher, dataset, num_samples, scheme, steps_of(algorithm), *methods, views=views)


def _sum(
    teacher: Teacher,
    dataset: SyntheticDataset,
    num_samples: int,
    scheme: Scheme,
    steps: list[Any],
    *quantizers: Any,
    views: int = 1,
) -> tuple[Cost, Student | None]:
    total, student = Cost(), None
    for step in steps:
        cost, student = _of_algorithm(teacher, dataset, num_samples, scheme, step, *quantizers, views=views)
        total = replace(total + cost, disk_bytes=max(total.disk_bytes, cost.disk_bytes))
    return total, student


def _of_algorithm(
    teacher: Teacher,
    dataset: SyntheticDataset,
    num_samples: int,
    scheme: Scheme,
    algorithm: Any,
    *quantizers: Any,
    views: int = 1,
) -> tuple[Cost, Student]:
    each, kept, last = forward_seconds(teacher), len(dataset.split()[0]), Student.from_teacher(teacher, scheme)
    takes_steps = trains(algorithm)
    full_batch = min(getattr(algorithm, "batch_size", 1), max(1, round(0.9 * num_samples)))
    batch = min(_count(FORWARDS * each, 2, full_batch), kept)
    settings: dict[str, tuple[int, int, float]] = {}  # small, larger, full
    for name in _has(algorithm, STEPS) if takes_steps else []:
        full = getattr(algorithm, name)
        if full:
            settings[name] = (2, 2 + _count(FORWARDS * each * batch, 2, 30), full)
    for name in _has(algorithm, SAMPLES):
        full = min(getattr(algorithm, name), round(0.9 * num_samples))
        most = min(full, kept)
        settings[name] = (max(1, min(batch, most)), most, views * full)  # another view costs what another sample does
    if checks := getattr(algorithm, "checks", 0):
        settings["checks"] = (1, 4, checks)

    def run(counted: bool, **values: float) -> Cost:
        nonlocal last
        changed = {name: int(value) for name, value in values.items()}
        if takes_steps:
            changed["batch_size"] = changed.get("batch_size", batch)
            if "checks" in changed:  # a look needs a step
                changed["max_steps"] = max(changed["max_steps"], changed["checks"])
        shrunk = replace(algorithm, **changed)
        with tempfile.TemporaryDirectory() as scratch:

            def work() -> Student:
                student = Student.from_teacher(teacher, scheme)
                shrunk.quantize(student, teacher, dataset, *quantizers, 0, Path(scratch))
                return student

            def keep() -> None:
                nonlocal last
                last = work()

            if counted:
                return Cost(memory_bytes=peak_bytes(work))
            took = timed(keep, teacher.device)
            files = [file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file()]
            return replace(took, disk_bytes=sum(files))

    small, larger, full_values = ({name: values[i] for name, values in settings.items()} for i in range(3))
    if "checks" in small:
        small["max_steps"] = max(small["max_steps"], 4)
    first = run(False, **small)  # imports, and prepares kernels: the run pays for that too
    again = run(False, **small)
    for name in STEPS:  # enough to be told from what a trial takes anyway, which is not the same every time
        if name in settings:
            larger[name] = small[name] + _count(FORWARDS * each * batch, 2, 30, max(TRIAL_S, again.cpu_seconds))
    time_ = extrapolated(
        lambda **values: run(False, **values),
        small,
        larger,
        {
            name: small[name] + (value - small[name]) * (full_batch / batch if name in STEPS else 1)
            for name, value in full_values.items()
        },
        again,
    )
    if checks:  # the trials' looks were at fewer held-out samples; there is one before the first step
        time_ = time_ + _of_more_held_out(teacher, last, dataset, num_samples).times(checks + 1)
    once = difference(first, again)
    sizes: dict[str, tuple[int, int, float]] = {k: v for k, v in settings.items() if k in SAMPLES}
    if takes_steps:
        sizes["batch_size"] = (max(1, batch // 2), batch, full_batch)
    fixed = {name: value for name, value in small.items() if name not in SAMPLES}
    few_of, more_of, all_of = ({name: values[i] for name, values in sizes.items()} for i in range(3))
    bytes_ = extrapolated(lambda **values: run(True, **{**fixed, **values}), few_of, more_of, all_of)
    limit = getattr(algorithm, "time_limit_s", None) or math.inf
    stored = 2 * num_samples * samples_of(dataset.tensors(1)).nbytes  # they are read at once, shard by shard
    total = time_ + once
    if total.seconds > limit:  # by the clock on the wall; several threads use more
        total = total.times(limit / total.seconds)
    return replace(total, memory_bytes=bytes_.memory_bytes + stored, disk_bytes=again.disk_bytes), last


@torch.no_grad()
def _of_more_held_out(teacher: Teacher, student: Student, dataset: SyntheticDataset, num_samples: int) -> Cost:
    """What a look takes longer at the held-out samples of ``num_samples`` than at those of ``dataset``."""
    more = num_samples / len(dataset) - 1
    if more <= 0:
        return Cost()
    held_out = dataset.samples(dataset.split()[1]).to(teacher.device)

    def look() -> None:
        for batch in teacher.input_spec.batches(held_out, len(held_out)):
            teacher(batch)
            student(batch)

    look()
    return timed(look, teacher.device).times(more)


# ------------------------------------------------------------------------------------------------ counting


@dataclass(frozen=True)
class Counts:
    """Of a network and one sample, counted without memory."""

    num_parameters: int
    macs: float  # multiply-accumulates of a forward
    activation_bytes: float  # alive at once in forward and gradient
    output_bytes: float  # all outputs of one sample
    unit_parameters: int = 0  # of the largest part that fsdp gathers at a time

    @property
    def weight_bytes(self) -> int:
        return FLOAT_BYTES * self.num_parameters


def count(build: Callable[[], Teacher]) -> tuple[Teacher, Counts]:
    """The network that ``build`` makes, on tensors that have shapes and no content, and what one sample costs it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        teacher = build()
        spec = teacher.input_spec
        # A text is counted by a short part of it: what attention adds for a longer one is little.
        length = min(spec.length, 64) if isinstance(spec, TokenSpec) else 1
        share = spec.length / length if isinstance(spec, TokenSpec) else 1.0
        shape = (1, length) if isinstance(spec, TokenSpec) else spec.batch_shape(1)
        sample = torch.zeros(shape, dtype=torch.long if isinstance(spec, TokenSpec) else torch.float32)
        sizes: list[int] = []

        def work() -> None:
            from dfq.hooks import tensors_in

            if sample.is_floating_point():
                sample.requires_grad_()
            else:
                next(teacher.module.parameters()).requires_grad_()  # the embedding: gradients all the way
            outputs = [t for t in tensors_in(teacher.module(sample)) if t.is_floating_point()]
            sizes.append(sum(t.nbytes for t in outputs))
            sum(t.float().sum() for t in outputs if t.requires_grad).backward()  # type: ignore[union-attr]

        alive = peak_bytes(work)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            teacher.module(sample.detach())
    return teacher, Counts(
        sum(p.numel() for p in teacher.module.parameters()),
        flops.get_total_flops() / 2 * share,
        alive * share,
        sizes[0] * share,
        largest_unit(teacher),
    )


@dataclass(frozen=True)
class Machine:
    """What the device does in a second, measured in a fraction of one."""

    macs_per_s: float  # of a large matrix product
    bytes_per_s: float  # read and written by a copy

    @classmethod
    def measure(cls, device: torch.device) -> Machine:
        size = 1024 if device.type == "cpu" else 8192
        left, right = (torch.ones(size, size, device=device) for _ in range(2))
        copied = torch.ones(size * 8192, device=device)
        products, copies = [], []
        for _ in range(3):
            products.append(timed(lambda: left @ right, device).seconds)
            copies.append(timed(lambda: copied.clone(), device).seconds)
        return cls(size**3 / min(products), 2 * copied.nbytes / min(copies))


REACHED = 0.5  # of a matrix product's rate; what benchmarks/generation.py finds for images lies from 0.37 to 0.65


def counted_generation(
    counts: Counts,
    machine: Machine,
    generator: Generator,
    num_samples: int,
    batch_size: int,
    spec: Any,
    world_size: int,
) -> Cost:
    """docs/plan.md, "generation"."""
    batches = math.ceil(math.ceil(num_samples / batch_size) / world_size)
    rate = REACHED * machine.macs_per_s
    steps = sum(getattr(generator, name) for name in _has(generator, STEPS))
    if isinstance(spec, TokenSpec):
        of_batch = max(batch_size * counts.macs / rate, spec.length * counts.weight_bytes / machine.bytes_per_s)
        alive, stored = batch_size * counts.activation_bytes / max(1, spec.length), 8 * spec.length
    else:
        of_batch = batch_size * 2 * counts.macs * max(1, steps) / rate
        alive, stored = batch_size * counts.activation_bytes, FLOAT_BYTES * math.prod(spec.size)
    seconds = batches * of_batch
    return Cost(
        seconds, seconds, alive, num_samples * (stored + (0 if isinstance(spec, TokenSpec) else counts.output_bytes))
    )


def counted_quantization(counts: Counts, machine: Machine, algorithm: Any, num_samples: int, bits: float) -> Cost:
    """docs/plan.md, "distillation", "block reconstruction" and "layer by layer"; the teacher's weights are there."""
    rate = REACHED * machine.macs_per_s
    seconds, memory, disk = 0.0, 0.0, 0.0
    for step in steps_of(algorithm):
        kept = min(max((getattr(step, name) for name in _has(step, SAMPLES)), default=num_samples), num_samples)
        kept *= views_of(algorithm)
        work, alive, copies = 2 * kept * counts.macs, 4 * counts.activation_bytes, 1  # the student
        if trains(step):
            trained = sum(getattr(step, name) for name in _has(step, STEPS)) * step.batch_size
            work += 4 * trained * counts.macs
            looks = 0.1 * num_samples * (getattr(step, "checks", 0) + 1)
            work += 2 * looks * counts.macs
            if trains_whole(step):
                alive, copies, files = 2 * step.batch_size * counts.activation_bytes, TRAINED_COPIES, 4
            else:  # block by block
                alive, copies, files = alive + min(kept * counts.activation_bytes, step.memory_bytes), 2, 1
            disk = max(disk, files * counts.weight_bytes)
        seconds += min(work / rate, getattr(step, "time_limit_s", None) or math.inf)
        memory = max(memory, copies * counts.weight_bytes + alive)
    if isinstance(algorithm, Auto):
        seconds = seconds_of(algorithm.budget)
    return Cost(seconds, seconds, memory, disk + counts.num_parameters * bits / 8)


def counted_looks(counts: Counts, machine: Machine, num_samples: int) -> Cost:
    """Of ``num_samples`` samples of an evaluation, at teacher and student."""
    seconds = 2 * num_samples * counts.macs / (REACHED * machine.macs_per_s)
    return Cost(seconds, seconds, counts.weight_bytes)


# ------------------------------------------------------------------------------------------------ several processes


TRAINED_COPIES = 5  # of the weights, that training makes: weights, gradient, two moments, one copy in a step


def in_processes(
    cost: Cost, training: Training, device: torch.device, weight_bytes: int, unit_bytes: int, held_bytes: int
) -> Cost:
    """``cost`` of a distillation in one process, as that of those on this computer (docs/plan.md).

    With GPUs each process has one, and memory is that of one of them; else they share what the computer has.

    Args:
        cost: with ``memory_bytes`` beside what is held before, in which the teacher's weights are.
        unit_bytes: of the largest part that ``fsdp`` gathers at a time.
        held_bytes: what a process holds before.
    """
    if training.world_size == 1:
        return cost
    has_gpus = device.type == "cuda"
    memory = cost.memory_bytes
    if training.strategy == "fsdp":
        sharded = (TRAINED_COPIES + 1) * weight_bytes / training.world_size
        # Whole networks, the teacher's and the student's, wait in the computer's memory.
        whole = -weight_bytes if has_gpus else weight_bytes
        memory += sharded + whole + 2 * unit_bytes - TRAINED_COPIES * weight_bytes
    else:
        memory += weight_bytes  # in which gradients travel
    if has_gpus:
        return replace(cost, memory_bytes=memory)
    crowded = max(1.0, training.devices * torch.get_num_threads() / (os.cpu_count() or 1))
    return replace(
        cost,
        seconds=cost.seconds * crowded,
        cpu_seconds=cost.cpu_seconds * training.devices,
        memory_bytes=training.devices * (held_bytes + memory) - held_bytes,
    )


def trains_in_processes(algorithm: Any) -> bool:
    """Whether several processes have a part in it."""
    return any(trains_whole(step) for step in steps_of(algorithm))


def trains_whole(algorithm: Any) -> bool:
    """Whether it is a distillation, or trains by one; others that train go block by block."""
    return trains(algorithm) and not _has(algorithm, ("memory_bytes",))


def steps_of(algorithm: Any) -> list[Any]:
    return [resolve("algorithm", step) for step in algorithm.steps] if isinstance(algorithm, Sequence) else [algorithm]


def views_of(algorithm: Any) -> int:
    """How often an algorithm sees each sample that it looks at."""
    return algorithm.views if isinstance(algorithm, Sequence) else 1


def largest_unit(teacher: Teacher) -> int:
    """Parameters of the largest part of a network that ``fsdp`` gathers at a time."""
    return max((sum(p.numel() for p in unit.parameters()) for unit in units(teacher.module)), default=0)
