"""READ FIRST: the five arrows.

    teacher ──generate──▶ synthetic dataset ──quantize──▶ student ──export──▶ artifact
                                                             └──evaluate──▶ report

Each arrow is one function here; each result is a folder that says what made it, so an arrow whose result is there
already is skipped, and one that was interrupted goes on. :func:`run` walks all five. No mathematics in this file.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import dfq
from dfq import evaluation as evaluations
from dfq import mixed_precision, quality
from dfq import report as reports
from dfq.dataset import (
    LEFT_OUT,
    SyntheticDataset,
    file_sha256,
    first_difference,
    read_json,
    remove_if_empty,
    write_json,
)
from dfq.detectors._base import adapter_record
from dfq.errors import UserError
from dfq.generators._base import Generator, Independent, Sampler, Source, batch_rng, dataset_rng
from dfq.generators._memory import fitting_batch_size
from dfq.generators._precision import faster_precision
from dfq.hooks import repeatable
from dfq.lightning.trainer import SINGLE, Training
from dfq.progress import Advance, progress_bar, say
from dfq.ranks import from_environment
from dfq.scheme import ALLOCATION, MixedScheme, Scheme, read_allocation
from dfq.settings import choices, code_record, load, locate, resolve, to_config
from dfq.student import Student, read_manifest
from dfq.tasks._outputs import LOGITS, bytes_of_a_sample, moved, to_store
from dfq.tasks._task import task_of
from dfq.teacher import InputSpec, Teacher

OUTPUTS = Path("outputs")
QUIET_S = 3600.0  # in which no rank has added a batch: those that are missing will not come
DATA_FREE = {"pixels": False, "labels": False}
LABELING = ("least_score",)  # settings of a detector's task that datasets depend on
NOISE = {"images": ("gaussian", "Gaussian noise"), "token ids": ("random_tokens", "random tokens")}  # by kind of input


@dataclass
class Experiment:
    """Everything a run needs, as objects. What a field is: DESIGN words, or the class it names."""

    teacher: Teacher
    generator: Generator
    scheme: Scheme
    algorithm: Any
    weight_quantizer: Any
    activation_quantizer: Any
    evaluation: Any = field(default_factory=evaluations.NoEvaluation)
    exporter: Any = None
    num_samples: int = 1024
    seed: int = 0
    dataset_dir: Path | None = None
    student_dir: Path | None = None
    artifact_path: Path | None = None
    output_dir: Path = OUTPUTS
    references: tuple[str, ...] = ()
    command: str = ""
    training: Training = SINGLE


# ------------------------------------------------------------------------------------------------ the arrows


@repeatable()
def generate(
    teacher: Teacher,
    generator: Generator,
    num_samples: int,
    seed: int = 0,
    dataset_dir: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
    parts: Sequence[Path] = (),
) -> SyntheticDataset:
    """Arrow 1: ``num_samples`` synthetic samples in ``dataset_dir`` (null: a folder named after what makes them).

    Samples that are there already, whole and made with the same settings, stay; a larger ``num_samples`` appends.

    Args:
        rank, world_size: make the batches rank, rank + world_size, ... only: in a folder of its own, or in one that all
            ranks on this machine write to. Whoever adds the last one measures the dataset's quality.
        parts: folders of datasets with the same settings, whose batches are taken over before missing ones are made.
    """
    if not 0 <= rank < world_size:
        raise UserError(f"got rank={rank} and world_size={world_size}", f"rank from 0 to {max(0, world_size - 1)}")
    path, settings = dataset_place(teacher, generator, num_samples, seed, dataset_dir, parts)
    batch_size, generator = settings["batch_size"], as_recorded(generator, settings)
    dataset = SyntheticDataset.create(path, settings, {**DATA_FREE, "teacher": teacher.name})
    if dataset.num_samples > num_samples:
        raise UserError(
            f"got num_samples={num_samples} and dataset_dir={path}, which holds {dataset.num_samples}",
            f"{dataset.num_samples} or more",
            "choose another dataset_dir for fewer",
        )
    sizes = [min(batch_size, num_samples - start) for start in range(0, num_samples, batch_size)]
    for part in parts:
        dataset.adopt(SyntheticDataset(part))
    absent = _absent(dataset, sizes)
    if not absent:
        say(f"generate: the {num_samples} samples are there already, in {path}")
        _describe_whole(teacher, generator, dataset)  # measures where a run ended just before
        return dataset
    missing = [index for index in absent if index % world_size == rank]
    task = task_of(teacher)
    mine = sum(sizes[rank::world_size])
    done = mine - sum(sizes[index] for index in missing)
    try:
        start = time.perf_counter()  # the first batch pays for what all share
        sampler = _sampler(teacher, generator, dataset, seed) if missing else generator
        with progress_bar(f"generate {_label(generator)}", mine, "samples", completed=done) as advance:
            for index in missing:
                told = _Told(advance, sizes[index] / batch_size)  # a last, shorter batch is the head of a whole one
                if isinstance(sampler, Independent):
                    start_at, told = index * batch_size, _Told(advance, 1)
                    made = rows = sampler.make(teacher, range(start_at, start_at + sizes[index]), seed, told)
                    told(sizes[index] - told.amount)
                else:
                    made = sampler.sample(teacher, batch_size, batch_rng(seed, index), told)
                    told(batch_size - told.amount)  # a generator need not tell how far it is
                    rows = _stored(teacher, task, made, dataset)
                    rows = {name: values[: sizes[index]] for name, values in rows.items()}
                _check_finite(teacher, generator, index, rows)
                if "boxes" in rows:
                    own = isinstance(made, Mapping) and "boxes" in made
                    dataset.note(boxes_from="generator" if own else "teacher")
                dataset.write_shard(index, rows, time.perf_counter() - start)
                start = time.perf_counter()
    except UserError:  # a network that the generator can do nothing with leaves nothing behind
        dataset.discard_if_empty()
        raise
    dataset = SyntheticDataset(path)  # with what other ranks have added meanwhile
    absent = _absent(dataset, sizes)
    if absent:
        count = num_samples - sum(sizes[index] for index in absent)
        say(f"generate: {count} of {num_samples} samples are there, in {path}; the others are for other ranks to make")
    else:
        _describe_whole(teacher, generator, dataset)
    return dataset


@repeatable()
def quantize(
    teacher: Teacher,
    dataset: SyntheticDataset,
    scheme: Scheme,
    algorithm: Any,
    weight_quantizer: Any,
    activation_quantizer: Any,
    seed: int = 0,
    student_dir: Path | None = None,
    training: Training = SINGLE,
) -> tuple[Student, Path]:
    """Arrow 2: the student and the folder it is saved in (null: a folder named after what makes it).

    With a ``training`` in several processes each of them calls this; rank 0 alone saves.
    """
    _check_dataset(teacher, dataset)
    used_again = None
    if isinstance(scheme, MixedScheme) and scheme.allocation is not None:  # its bits make the student, not its path
        used_again = read_allocation(scheme.allocation)
        scheme = scheme.with_bits(used_again["overrides"])
    path, settings = student_place(
        teacher, dataset, scheme, algorithm, weight_quantizer, activation_quantizer, seed, student_dir, training
    )
    identity = _hash(settings)
    if (path / "student.json").exists():
        made = _identity(read_manifest(path)["settings"])
        other = made.pop("code", None) != settings["code"]  # in a folder that was asked for: others are named after it
        difference = first_difference(made, {key: value for key, value in settings.items() if key != "code"})
        if difference:
            raise UserError(
                f"got student_dir={path}, a student made with other settings ({difference})",
                "an empty or new folder, or the same settings",
                "choose another student_dir",
            )
        by = ", made by other code of dfq or of its algorithm: remove the folder to have it made anew" if other else ""
        say(f"quantize: the student is there already, in {path}{by}")
        return Student.load(path, teacher), path
    if path.exists() and not path.is_dir():
        raise UserError(f"got student_dir={path}, which is a file", "a folder")
    work_dir = path / f"work_{identity}"  # what an interrupted run left is taken up only by the very same settings
    rank = from_environment()[0] if training.world_size > 1 else 0
    own_dir = work_dir / f"rank_{rank}" if rank else work_dir
    own_dir.mkdir(parents=True, exist_ok=True)
    several: dict[str, Any] = {} if training.is_default else {"training": training, "shared_dir": work_dir}
    start = time.perf_counter()
    try:
        if isinstance(scheme, MixedScheme):
            scheme = _allocate(own_dir, scheme, teacher, dataset, weight_quantizer, activation_quantizer, seed)
        student = Student.from_teacher(teacher, scheme)
        quantizers = weight_quantizer, activation_quantizer
        algorithm.quantize(student, teacher, dataset, *quantizers, seed, own_dir, **several)
    except UserError:  # a network that can't be quantized leaves nothing behind
        remove_if_empty(path)
        raise
    student.freeze()
    if rank:
        return student, path
    student.seconds = round(time.perf_counter() - start, 3)
    student.settings = {
        **settings,
        "dataset": {"path": str(dataset.path), "num_samples": len(dataset), "provenance": dataset.provenance},
    }
    if (work_dir / ALLOCATION).exists():
        (work_dir / ALLOCATION).replace(path / ALLOCATION)
    if used_again is not None:
        write_json(path / ALLOCATION, _as_used(used_again, student))
    student.save(path)
    shutil.rmtree(work_dir)
    return student, path


def evaluate(
    teacher: Teacher, student: Student | None, evaluation: Any, dataset: SyntheticDataset | None = None
) -> dict[str, Any]:
    """Arrow 3: metrics on labelled data (where there is some), fidelity on held-out synthetic samples.

    Args:
        evaluation: an evaluation, or any iterable of (images, labels) batches that are normalized for the network.

    Returns:
        ``{"teacher": metrics, "student": metrics, "fidelity": ..., "num_judged": samples that metrics come from}``.
    """
    _check_kind(teacher, evaluation, "evaluation")
    task = task_of(teacher)
    found: dict[str, Any] = {"teacher": _measure(teacher, teacher.sha256, task, evaluation, teacher, "teacher")}
    found["num_judged"] = getattr(evaluation, "num_samples", None) or None
    if student is not None:
        found["student"] = _measure(student, student.sha256, task, evaluation, teacher, "student")
        if dataset is not None:
            found["fidelity"] = evaluations.fidelity(teacher, student, task, held_out_images(dataset))
            if dataset.is_poor:
                found["fidelity"]["estimated_drop"] = None
    return found


def export(
    student: Student,
    exporter: Any,
    artifact_path: Path | None = None,
    teacher: Teacher | None = None,
    dataset: SyntheticDataset | None = None,
) -> dict[str, Any]:
    """Arrow 4: the artifact in ``artifact_path`` (null: named after what makes it), its json description beside it.

    Returns:
        that description, with ``path``.
    """
    settings = {"exporter": to_config(exporter), "student_sha256": student.sha256, **adapter_record(student.module)}
    name = f"{student.teacher['name']}_{student.scheme.name}_{student.scheme.policy}_{_hash(settings)}"
    file_name = f"{student.teacher['name']}_{student.scheme.name}{exporter.suffix}"
    path = artifact_path or OUTPUTS / "artifacts" / name / getattr(exporter, "file_name", file_name)
    description_path = path.with_name(path.name + ".json")
    if path.exists():
        known = read_json(description_path, "artifact") if description_path.exists() else {}
        if known.get("format") != "dfq.artifact":
            raise UserError(
                f"got artifact_path={path}, a file that dfq did not make", "a new file", "choose another artifact_path"
            )
        if known.get("settings") == settings and known["sha256"] == file_sha256(path):
            say(f"export: the artifact is there already, in {path}")
            return {**known, "path": str(path)}
    images = held_out_images(dataset) if dataset is not None else None
    description = {**exporter.export(student, path, teacher, images), "settings": settings}
    write_json(description_path, description)
    return {**description, "path": str(path)}


def run(experiment: Experiment) -> dict[str, Any]:
    """All five arrows, and the reference rows; returns the report.

    Raises the UserError of an export that fails behind the report, which has all but the artifact.

    Of several processes (torchrun, srun, ``trainer=ddp``) each makes its share of samples and trains; the others return
    nothing but an empty report.
    """
    e, start = experiment, time.perf_counter()
    if (processes := from_environment()[1]) not in (1, e.training.world_size):
        raise UserError(
            f"got a launcher of {processes} processes and a trainer of {e.training.world_size}",
            "trainer=ddp trainer.devices=N (trainer.num_nodes=M) for all of them; dfq generate under any launcher",
        )
    task = task_of(e.teacher)
    _check_kind(e.teacher, e.evaluation, "evaluation")  # now rather than after hours
    dataset = _generate(e, e.generator, e.dataset_dir, *from_environment())
    student, student_path = _quantize(e, dataset, e.student_dir, e.training)
    # Here, where no process is ahead: others would wait for rank 0 to have exported and evaluated.
    noise = _noise(e) if "gaussian" in e.references else None
    if from_environment()[0]:
        for reference in e.references if e.training.world_size > 1 else ():
            if (found := noise if reference == "gaussian" else _real_dataset(e)) is not None:
                _quantize(e, found, None, e.training.within(reference))
        return {}
    artifact, refused = None, None
    try:
        if e.exporter is not None:
            artifact = export(student, e.exporter, e.artifact_path, e.teacher, dataset)
    except UserError as error:  # a network that can't be exported has a student and a report nevertheless
        refused = error
        say(f"export: {error}; the report follows")
    # From here on real data may be read: nothing above will change any more.
    figures = evaluate(e.teacher, student, e.evaluation, dataset)
    report = describe(e.teacher, dataset, student, student_path, figures, artifact, e.seed, e.command)
    images = held_out_images(dataset)
    details = _details(e.teacher, student, student_path, figures, dataset, e.seed)
    for reference in e.references:
        row = _reference(e, reference, noise, task, images, details)
        if row is not None:
            details["references"].append(row)
    details["notes"].append(f"the whole run took {time.perf_counter() - start:.0f} s")
    if refused is not None:
        details["notes"].append(f"nothing was exported: {refused}")
    _write(e.output_dir, e.teacher, dataset, report, details, student)
    if refused is not None:
        raise refused
    return report


def report_student(
    teacher: Teacher,
    student: Student,
    student_path: Path,
    evaluation: Any,
    dataset: SyntheticDataset | None,
    output_dir: Path,
    command: str,
) -> float | None:
    """Arrow 3 alone, with its report; returns the student's first metric (or its agreement with the teacher)."""
    figures = evaluate(teacher, student, evaluation, dataset)
    seed = student.settings.get("seed", 0)
    report = describe(teacher, dataset, student, student_path, figures, None, seed, command)
    details = _details(teacher, student, student_path, figures, dataset, seed)
    _write(output_dir, teacher, dataset, report, details, student)
    return next(iter([*figures["student"].values(), figures.get("fidelity", {}).get("agreement")]), None)


# ------------------------------------------------------------------------------------------------ report


def describe(
    teacher: Teacher,
    dataset: SyntheticDataset | None,
    student: Student | None,
    student_path: Path | None,
    figures: Mapping[str, Any],
    artifact: Mapping[str, Any] | None,
    seed: int,
    command: str,
) -> dict[str, Any]:
    """The report (DESIGN 3.2)."""
    fidelity = figures.get("fidelity")
    return {
        "dfq_version": dfq.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "environment": reports.environment(teacher.device),
        "teacher": {
            "name": teacher.name,
            "sha256": teacher.sha256,
            "task": teacher.task,
            "num_parameters": teacher.num_parameters,
            "size_bytes": teacher.size_bytes,
            "metrics": figures.get("teacher", {}),
        },
        "dataset": None
        if dataset is None
        else {
            "path": str(dataset.path),
            "generator": _target_label(dataset.manifest["settings"]["generator"]),
            "num_samples": len(dataset),
            "sha256": dataset.sha256,
            "seconds": dataset.seconds,
            "provenance": {key: dataset.provenance[key] for key in DATA_FREE},
        },
        "student": None
        if student is None or student_path is None
        else {
            "scheme": student.scheme.name,
            "policy": student.scheme.policy,
            "algorithm": _target_label(student.settings["algorithm"]),
            "size_bytes": read_manifest(student_path)["size_bytes"],
            "mean_weight_bits": student.mean_weight_bits,
            "seconds": student.seconds,
            "metrics": figures.get("student", {}),
        },
        "fidelity": None if fidelity is None else {key: fidelity[key] for key in ("agreement", "kl", "layers")},
        "artifact": None
        if artifact is None
        else {
            "path": artifact["path"],
            "format": _target_label(artifact["exporter"]),
            **{key: artifact[key] for key in ("size_bytes", "parity", "latency_ms")},
        },
    }


def _details(
    teacher: Teacher,
    student: Student,
    student_path: Path,
    figures: Mapping[str, Any],
    dataset: SyntheticDataset | None,
    seed: int,
) -> dict[str, Any]:
    """What report.html shows beside report.json."""
    fidelity = figures.get("fidelity", {})
    row = {
        "role": "student",
        "metrics": figures["student"],
        "agreement": fidelity.get("agreement"),
        "kl": fidelity.get("kl"),
    }
    match: list[dict[str, Any]] = []
    if dataset is None:
        row |= {"row": "student", "generator": None, "seconds": student.seconds, "num_samples": None}
    else:
        name = _target_label(dataset.manifest["settings"]["generator"])
        row |= {"row": f"synthetic ({name})", "generator": name, "seconds": dataset.seconds + student.seconds}
        row |= {"num_samples": len(dataset)}
        synthetic = evaluations.batch_norm_match(teacher, dataset.samples())
        noise = teacher.input_spec.example(min(256, len(dataset)), batch_rng(seed, -1))
        gaussian = evaluations.batch_norm_match(teacher, noise)
        match = [{"name": n, "synthetic": d, "gaussian": gaussian[n], "real": None} for n, d in synthetic.items()]
    first = {"row": "float teacher", "role": "teacher", "generator": None, "agreement": 1.0, "kl": 0.0}
    allocation = student_path / ALLOCATION
    return {
        "references": [{**first, "metrics": figures["teacher"]}, row],
        "allocation": read_allocation(allocation) if allocation.exists() else None,
        "batch_norm_match": match,
        "images": {} if dataset is None else {"dataset": str(dataset.path)},
        "student_dir": str(student_path),
        "network": student.network,
        "kept_float": student.swap.kept_float,
        "unreached": student.unreached,
        "held_out": {"num_samples": 0 if dataset is None else len(dataset.split()[1])},
        "judged": {"num_samples": figures.get("num_judged")},
        "estimated_drop": fidelity.get("estimated_drop"),
        "quality": None if dataset is None else quality.read(dataset),
        "boxes_from": None if dataset is None else dataset.manifest.get("boxes_from"),
        "continuation": (same := fidelity.get("continuation")),
        "notes": [
            f"goes on with a text as the teacher does for {same['match_length']:.1f} of {same['num_tokens']} tokens"
        ]
        if same
        else [],
    }


def _reference(
    e: Experiment,
    reference: str,
    noise: SyntheticDataset | None,
    task: Any,
    images: Tensor,
    details: dict[str, Any],
) -> dict[str, Any] | None:
    """A row made with the same algorithm from other samples: noise, or real ones."""
    label = NOISE[e.teacher.input_spec.kind][1] if reference == "gaussian" else "real data"
    dataset = noise if reference == "gaussian" else _real_dataset(e)
    if dataset is None:
        details["notes"].append("no real-data row: give evaluation.reference_path=... to have one")
        return None
    if reference == "real":
        match = evaluations.batch_norm_match(e.teacher, dataset.samples())
        for layer in details["batch_norm_match"]:
            layer["real"] = match[layer["name"]]
    student, _ = _quantize(e, dataset, None, e.training.within(reference))
    metrics = _measure(student, student.sha256, task, e.evaluation, e.teacher, label)
    fidelity = evaluations.fidelity(e.teacher, student, task, images)
    return {
        "row": label,
        "role": "reference",
        "generator": reference,
        "metrics": metrics,
        "agreement": fidelity["agreement"],
        "kl": fidelity["kl"],
        "seconds": dataset.seconds + student.seconds,
        "num_samples": len(dataset),
    }


def _generate(
    e: Experiment, generator: Generator, dataset_dir: Path | None, rank: int, world_size: int
) -> SyntheticDataset:
    """The whole dataset: this process's share of it, and then those of others, which a launcher has started too."""
    dataset = generate(e.teacher, generator, e.num_samples, e.seed, dataset_dir, rank, world_size)
    count, since = len(dataset), time.monotonic()
    while len(dataset) < e.num_samples:
        time.sleep(1)
        dataset = SyntheticDataset(dataset.path)
        if len(dataset) > count:
            count, since = len(dataset), time.monotonic()
        elif time.monotonic() - since > (limit := max(QUIET_S, dataset.seconds)):  # no batch takes as long as all
            raise UserError(
                f"got {count} of {e.num_samples} samples in {dataset.path}, and no more for {limit:.0f} s",
                "ranks that all make their share",
                "one of them has ended: run the same command again, which makes what is missing",
            )
    return dataset


def _noise(e: Experiment) -> SyntheticDataset:
    """As many samples without any knowledge."""
    noise = resolve("generator", NOISE[e.teacher.input_spec.kind][0], batch_size=e.generator.batch_size)
    # Rank 0 makes all of it: behind training it may not know of the others, which Lightning has started.
    share = (e.num_samples, e.num_samples + 1) if from_environment()[0] else (0, 1)
    return _generate(e, noise, None, *share)


def _real_dataset(e: Experiment) -> SyntheticDataset | None:
    """The real images (or texts) of the evaluation in the same kind of store, marked as what they are."""
    if getattr(e.evaluation, "reference_path", None) is None:
        return None
    evaluation = _for_teacher(e.evaluation, e.teacher)
    images = evaluation.reference_images(e.teacher.input_spec, e.num_samples)
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    settings = {
        "generator": {"_target_": "real"},
        "images_sha256": digest,
        "teacher_sha256": e.teacher.sha256,
        **adapter_record(e.teacher.module, LABELING),
        "input_spec": e.teacher.input_spec.to_dict(),
    }
    path = OUTPUTS / "datasets" / f"{e.teacher.name}_real_{len(images)}_{_hash(settings)}"
    dataset = SyntheticDataset.create(path, settings, {"pixels": True, "labels": False, "teacher": e.teacher.name})
    task = task_of(e.teacher)
    for index, batch in enumerate(images.split(128)):
        if not dataset.has_shard(index, len(batch)):
            dataset.write_shard(index, _stored(e.teacher, task, batch, dataset), 0.0)
    return dataset


def _write(
    output_dir: Path,
    teacher: Teacher,
    dataset: SyntheticDataset | None,
    report: dict[str, Any],
    details: dict[str, Any],
    student: Student | None = None,
) -> None:
    images, predictions, layout = None, None, reports.SMALL
    if dataset is not None and isinstance(teacher.input_spec, InputSpec):
        finds_boxes = "boxes" in dataset.lists
        tensors = dataset.tensors(reports.WIDE.most if finds_boxes else reports.SMALL.most)
        images = teacher.input_spec.to_pixels(tensors["images"])
        if finds_boxes:
            layout = reports.WIDE
            images, predictions = _scenes(teacher, student, tensors, images, details.get("boxes_from"))
        else:
            predictions = [str(int(label)) for label in tensors["logits"].argmax(1)]
    page = reports.write(output_dir, report, details, images, predictions, layout)
    reports.summary(report, details, Console(), report_path=page)


@torch.no_grad()
def _scenes(
    teacher: Teacher, student: Student | None, tensors: Mapping[str, Any], pixels: Tensor, boxes_from: str | None
) -> tuple[Tensor, list[str]]:
    """Each image with its own boxes, with what the teacher and what the student finds in it; and how many boxes."""
    task, size = task_of(teacher), tuple(pixels.shape[-2:])
    shown = [(tensors["boxes"], tensors["labels"], "white")]
    for model, color in ((teacher, "lime"), (student, "red")):
        if model is not None:
            found = [task.annotate(task.raw_outputs(model, x), size) for x in tensors["images"].split(1)]
            shown.append(([row["boxes"][0] for row in found], [row["labels"][0] for row in found], color))
    views = [reports.draw_boxes(pixels, boxes, labels, color) for boxes, labels, color in shown]
    names = ("made from" if boxes_from == "generator" else "labels", "teacher", "student")
    counts = [
        ", ".join(f"{name} {len(boxes[i])}" for name, (boxes, _, _) in zip(names, shown, strict=False))
        for i in range(len(pixels))
    ]
    return torch.cat(views, -1), counts


# ------------------------------------------------------------------------------------------------ places


def dataset_place(
    teacher: Teacher,
    generator: Generator,
    num_samples: int,
    seed: int,
    dataset_dir: Path | None,
    parts: Sequence[Path] = (),
) -> tuple[Path, dict[str, Any]]:
    """The folder that :func:`generate` fills, and the settings that decide what is in it; nothing is made."""
    _check_kind(teacher, generator, "generator")
    generator = _with_precision(teacher, generator, dataset_dir, *parts)
    batch_size = min(_batch_size(teacher, generator, dataset_dir, *parts), num_samples)
    config = to_config(generator)
    for key in ("batch_size", "memory_bytes"):
        config.pop(key, None)  # what counts is the size that batches really have, which is recorded below
    for key in generator.files:
        if config[key] is not None:  # a file that was moved is the same file: its hash is recorded below
            del config[key]
    settings = {
        "generator": config,
        "seed": seed,
        "teacher_sha256": teacher.sha256,
        **adapter_record(teacher.module, LABELING),
        "input_spec": teacher.input_spec.to_dict(),
        **generator.recorded(teacher),
    }
    name = f"{teacher.name}_{_label(generator)}"
    path = dataset_dir or OUTPUTS / "datasets" / f"{name}_{num_samples}_{_hash({**settings, 'batch_size': batch_size})}"
    if (path / "manifest.json").exists():  # grown from a first batch smaller than the generator's: keep its size
        batch_size = min(batch_size, SyntheticDataset(path).manifest["settings"].get("batch_size", batch_size))
    return path, {**settings, "batch_size": batch_size}


def student_place(
    teacher: Teacher,
    dataset: SyntheticDataset,
    scheme: Scheme,
    algorithm: Any,
    weight_quantizer: Any,
    activation_quantizer: Any,
    seed: int,
    student_dir: Path | None,
    training: Training = SINGLE,
) -> tuple[Path, dict[str, Any]]:
    """The folder that :func:`quantize` fills, and the settings that decide what is in it; nothing is made."""
    settings = {
        "teacher_sha256": teacher.sha256,
        **adapter_record(teacher.module),
        "dataset_sha256": dataset.sha256,
        "scheme": scheme.to_dict(),
        "algorithm": to_config(algorithm),
        "weight_quantizer": to_config(weight_quantizer),
        "activation_quantizer": to_config(activation_quantizer),
        "seed": seed,
        "code": code_record(algorithm, weight_quantizer, activation_quantizer),
        **training.recorded(),
    }
    settings = json.loads(json.dumps(settings))
    name = f"{teacher.name}_{scheme.name}_{scheme.policy}_{_label(algorithm)}_{_hash(settings)}"
    return student_dir or OUTPUTS / "students" / name, settings


# ------------------------------------------------------------------------------------------------ pieces


def _batch_size(teacher: Teacher, generator: Generator, *folders: Path | None) -> int:
    """What the generator states; for ``auto`` that of the dataset in one of the ``folders``, else what fits."""
    if generator.batch_size != "auto":
        return generator.batch_size
    for folder in folders:
        if folder is not None and (folder / "manifest.json").exists():
            recorded = SyntheticDataset(folder).manifest["settings"].get("batch_size")
            if recorded is not None:
                return recorded
    return fitting_batch_size(generator, teacher)


def _sampler(teacher: Teacher, generator: Generator, dataset: SyntheticDataset, seed: int) -> Sampler:
    """What batches are asked of; where it has a network, the one that is stored."""
    weights = dataset.source()
    if weights is not None:
        return generator.restored(teacher, weights)
    sampler = generator.prepare(teacher, dataset_rng(seed))
    if isinstance(sampler, Source):
        dataset.write_source(sampler.network.state_dict())
    return sampler


def as_recorded(generator: Generator, settings: Mapping[str, Any]) -> Generator:
    """The generator with the precision that :func:`dataset_place` has settled on."""
    if getattr(generator, "precision", None) != "auto":
        return generator
    return generator.with_known({"precision": settings["generator"]["precision"]})


def _with_precision(teacher: Teacher, generator: Generator, *folders: Path | None) -> Generator:
    """With ``precision=auto`` that of the dataset in one of the ``folders``, else the faster one."""
    if getattr(generator, "precision", None) != "auto":
        return generator
    for folder in folders:
        if folder is not None and (folder / "manifest.json").exists():
            return as_recorded(generator, SyntheticDataset(folder).manifest["settings"])
    return generator.with_known({"precision": faster_precision(generator, teacher)})


def _describe_whole(teacher: Teacher, generator: Generator, dataset: SyntheticDataset) -> None:
    """What can be said once all samples are there, whichever ranks have made them."""
    facts = generator.facts(dataset) if isinstance(generator, Independent) else {}
    dataset.note(num_samples=len(dataset), **facts)
    quality.assess(teacher, dataset)


def _absent(dataset: SyntheticDataset, sizes: Sequence[int]) -> list[int]:
    """The batches that are not there, or not whole."""
    return [index for index, size in enumerate(sizes) if not dataset.has_shard(index, size)]


@torch.no_grad()
def _stored(teacher: Teacher, task: Any, made: Tensor | Mapping[str, Any], dataset: SyntheticDataset) -> dict[str, Any]:
    """What a dataset holds of a batch: samples, the teacher's outputs, and its own annotations where there are none.

    What it says of each token of a text would take a thousand times the room of the text, and is left out. So are raw
    outputs of a detector beyond ``most_bytes`` of its task, which its manifest then says.
    """
    if isinstance(made, Tensor) and not made.is_floating_point():
        return {"input_ids": made}
    given = made if isinstance(made, Mapping) else {"images": made}
    images = given["images"].detach().float().contiguous()
    outputs = task.raw_outputs(teacher, images)
    most = getattr(task, "most_bytes", math.inf)
    kept = to_store(outputs, most)
    if not kept:
        _tell_left_out(dataset, bytes_of_a_sample(outputs), most)
    found = {**given, "images": images, **moved(kept, "cpu")}
    if hasattr(task, "annotate") and "boxes" not in found:
        found |= task.annotate(outputs, images.shape[-2:])
    return found


def _tell_left_out(dataset: SyntheticDataset, size: int, most: float) -> None:
    if LEFT_OUT not in dataset.manifest:
        say(
            f"generate: the teacher's raw outputs take {size / 2**20:.1f} MiB a sample, more than the {most / 2**20:g} "
            "that are stored: they are left out, and whatever needs them runs the teacher again"
        )
    dataset.note(**{LEFT_OUT: {"bytes_a_sample": size, "most_bytes": most}})


def _check_finite(teacher: Teacher, generator: Generator, index: int, rows: Mapping[str, Any]) -> None:
    """A UserError where samples, or what the teacher says to them, are no finite numbers."""
    for name in ("images", LOGITS):
        values = rows.get(name)
        if values is not None and not bool(values.isfinite().all()):
            raise UserError(
                f"got {name} that are not finite in batch {index} of generator={_label(generator)} on {teacher.name}",
                "finite numbers",
                "look for NaN in the network's weights and running statistics, or lower the generator's learning rate",
            )


class _Told:
    """Passes progress on, scaled, and remembers how much there was."""

    def __init__(self, advance: Advance, share: float):
        self.advance, self.share, self.amount = advance, share, 0.0

    def __call__(self, amount: float, note: str = "") -> None:
        self.amount += amount
        self.advance(amount * self.share, note)


def held_out_images(dataset: SyntheticDataset) -> Tensor:
    """The samples that selection and fidelity look at, and training does not."""
    return dataset.without_padding(dataset.split()[1])


def _allocate(
    work_dir: Path,
    scheme: MixedScheme,
    teacher: Teacher,
    dataset: SyntheticDataset,
    weight_quantizer: Any,
    activation_quantizer: Any,
    seed: int,
) -> Scheme:
    """The plain scheme; bits that an interrupted run has chosen stay."""
    path = work_dir / ALLOCATION
    if path.exists():
        return scheme.with_bits(read_allocation(path)["overrides"])
    measures = scheme.budget.kind == "latency_ms" and scheme.budget.latency_table is None
    exporter = resolve("exporter", "onnx_qdq") if measures else None
    plain, found = mixed_precision.resolve(
        scheme, teacher, dataset, weight_quantizer, activation_quantizer, seed, exporter
    )
    write_json(path, found)
    return plain


def _as_used(allocation: dict[str, Any], student: Student) -> dict[str, Any]:
    """An allocation of another student for this one: with its layers and figures if they are this one's too."""
    layers = {name: [None if s.is_float else s.num_bits for s in both] for name, both in student.swap.layers.items()}
    shown = {la["name"]: [la["weight_bits"], la["activation_bits"]] for la in allocation.get("layers", [])}
    if layers == shown:
        return allocation
    return {"format": allocation["format"], "overrides": student.scheme.overrides}


def _quantize(
    e: Experiment, dataset: SyntheticDataset, student_dir: Path | None, training: Training
) -> tuple[Student, Path]:
    return quantize(
        e.teacher,
        dataset,
        e.scheme,
        e.algorithm,
        e.weight_quantizer,
        e.activation_quantizer,
        e.seed,
        student_dir,
        training,
    )


def _measure(model: Any, sha256: str, task: Any, evaluation: Any, teacher: Teacher, what: str) -> dict[str, float]:
    """Metrics of ``model`` (whose content is ``sha256``); those measured before on the same data are read again."""
    evaluation = _for_teacher(evaluation, teacher)
    if not (
        hasattr(evaluation, "batches") or hasattr(evaluation, "metrics_of")
    ):  # any iterable of batches: nothing says whether it is the same as before
        return evaluations.measure(model, task, evaluation, 0, what)
    if not evaluation.num_samples:
        return {}
    key = {
        "model": sha256,
        "evaluation": to_config(evaluation),
        "data": evaluation.fingerprint(),
        **adapter_record(teacher.module),
        "input_spec": teacher.input_spec.to_dict(),
    }
    path = OUTPUTS / "evaluations" / f"{what.replace(' ', '_')}_{_hash(key)}.json"
    if path.exists():
        return read_json(path, "evaluation")["metrics"]
    if hasattr(evaluation, "metrics_of"):  # it asks its questions itself
        metrics = evaluation.metrics_of(model, teacher)
    else:
        metrics = evaluations.measure(model, task, evaluation.batches(teacher.input_spec), evaluation.num_samples, what)
    write_json(path, {"format": "dfq.evaluation", **key, "metrics": metrics})
    return metrics


def _for_teacher(evaluation: Any, teacher: Teacher) -> Any:
    """An evaluation of text, with what it needs to know of the teacher: how text becomes token ids."""
    return evaluation.for_teacher(teacher) if hasattr(evaluation, "for_teacher") else evaluation


def _check_kind(teacher: Teacher, method: Any, family: str) -> None:
    """A generator or an evaluation of images is of no use to a network that takes token ids, and vice versa."""
    wanted = teacher.input_spec.kind
    got = getattr(method, "kind", wanted)  # one without a kind, and plain batches, go with any network
    if got == wanted:
        return
    targets = {name: load(family, name)["_target_"] for name in choices(family)}
    its_target = to_config(method)["_target_"]
    named = next((name for name, target in targets.items() if target == its_target), type(method).__name__)
    fitting = [name for name, target in targets.items() if getattr(locate(target), "kind", wanted) == wanted]
    raise UserError(
        f"got {family}={named}, which is for {got}, and {teacher.name}, which takes {wanted}",
        " | ".join(f"{family}={name}" for name in fitting) or f"a {family} for {wanted}",
    )


def _check_dataset(teacher: Teacher, dataset: SyntheticDataset) -> None:
    dataset.verify()
    if len(dataset) < 2:
        raise UserError(f"got {dataset.path} with {len(dataset)} samples", "at least 2", "generate into it first")
    spec = dataset.manifest["settings"].get("input_spec")
    if spec is not None and spec != teacher.input_spec.to_dict():
        difference = first_difference(spec, teacher.input_spec.to_dict())
        raise UserError(
            f"got {dataset.path}, made for another input than that of {teacher.name} ({difference})",
            do="generate a dataset for this teacher",
        )


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "dataset"}


def _label(method: Any) -> str:
    return _target_label(to_config(method))


def _target_label(config: Mapping[str, Any]) -> str:
    """The method's file name: what its yaml is called."""
    parts = str(config["_target_"]).split(".")
    return parts[-2] if len(parts) > 1 else parts[0]


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
