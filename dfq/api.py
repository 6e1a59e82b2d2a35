"""What ``import dfq`` gives: the arrows as functions that take a yaml's name or an object, settings as keywords."""

from __future__ import annotations

import copy
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from rich.console import Console
from torch import nn

from dfq import inspection, pipeline, ranks
from dfq import report as reports
from dfq.dataset import SyntheticDataset, read_json
from dfq.errors import UserError, did_you_mean
from dfq.lightning.quantized import (
    find_network,
    is_lightning_class,
    load_module,
    network_of,
    read_checkpoint,
    read_record,
    replace_network,
    student_of,
    write_records,
)
from dfq.lightning.trainer import Training
from dfq.pipeline import Experiment
from dfq.scheme import MixedScheme, Scheme
from dfq.settings import build, resolve
from dfq.settings import load as config_of
from dfq.student import Student, build_network, read_manifest
from dfq.teacher import AnyInputSpec, InputSpec, Teacher, TokenSpec, input_spec_from_dict, resolve_device
from dfq.teachers._import import import_named

TOKEN_TASKS = ("language_modeling", "masked_language_modeling")  # a classifier may take images or token ids


def load_teacher(
    model: nn.Module | str,
    task: str | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "auto",
    vocab_size: int | None = None,
    length: int | None = None,
    adapter: Any = None,
    task_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Teacher:
    """A teacher from a network in memory, or from a loader by name.

    Args:
        model: an ``nn.Module``, or the name of a teacher yaml (``digits``, ``timm``, ``torchvision``, ``huggingface``,
            ``factory``), whose settings go in as keywords: ``name="resnet18"``.
        task: what its outputs mean; None: ``classification``, or what the loader finds.
        input_size: (C, H, W). A network in memory that takes images needs it, ``mean`` and ``std``.
        mean, std: of the normalization (byte / 255 - mean) / std, one a channel.
        adapter: of a detector: a class derived from ``dfq.Detector``, or its ``package.module:Name``; None: that of the
            network's family.
        task_settings: of a detector: ``least_score`` of what it finds in images that are labelled by it, and
            ``box_weight`` of the distance of boxes beside the divergence of what is said of them.
        vocab_size, length: of the token ids [N, length], below ``vocab_size``, that a network in memory takes instead
            of images.
    """
    images = {"input_size": input_size, "mean": mean, "std": std}
    tokens = {"vocab_size": vocab_size, "length": length}
    if isinstance(model, str):
        config = config_of("teacher", model)
        given = images | tokens | {"adapter": adapter, "task_settings": task_settings}
        given |= {"task": task} if "task" in config else {}
        teacher = _build_teacher(config | settings | {k: v for k, v in given.items() if v is not None}, device)
        if task not in (None, teacher.task):
            raise UserError(f"got task={task} for teacher={model}, whose networks are for task={teacher.task}")
        return teacher
    takes_tokens = task in TOKEN_TASKS or any(value is not None for value in tokens.values())
    needed, others = (tokens, images) if takes_tokens else (images, tokens)
    missing = [name for name, value in needed.items() if value is None]
    wrong = missing or [*settings, *(name for name, value in others.items() if value is not None)]
    if wrong:
        raise UserError(
            f"got {'no ' if missing else ''}{', '.join(wrong)} for a network in memory",
            "task, vocab_size, length, device" if takes_tokens else "task, input_size=(C, H, W), mean, std, device",
            "give exactly these",
        )
    spec: AnyInputSpec
    if takes_tokens:
        assert vocab_size is not None and length is not None
        spec = TokenSpec(vocab_size, length)
    else:
        assert input_size is not None and mean is not None and std is not None
        spec = InputSpec(tuple(input_size), tuple(mean), tuple(std))
    name = type(model).__name__
    if task == "detection":
        from dfq.teachers._detector import as_detector

        model = as_detector(model, adapter, task_settings)
    elif adapter is not None:
        raise UserError(f"got adapter={adapter} and task={task}", "task='detection' for adapters")
    elif task_settings:
        raise UserError(f"got task_settings={task_settings} and task={task}", "task='detection' for task_settings")
    return Teacher(model, task or "classification", spec, name, device=resolve_device(device))


def generate(
    teacher: Teacher,
    generator: Any = "zeroq",
    num_samples: int = 1024,
    dataset_dir: str | os.PathLike | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    parts: Iterable[str | os.PathLike] = (),
    **settings: Any,
) -> SyntheticDataset:
    """Synthetic samples for ``teacher``, on disk; goes on where an interrupted call stopped.

    Args:
        generator: a yaml's name (``zeroq``, ``gaussian``) with settings as keywords, or an object.
        dataset_dir: null: a folder under ``outputs/datasets`` named after what makes it.
        rank, world_size: make every ``world_size``-th batch only, beginning with batch ``rank``; several processes can
            fill one folder.
        parts: folders that ranks elsewhere have filled; their batches are taken over.
    """
    chosen = resolve("generator", generator, **settings)
    folders = [Path(part) for part in parts]
    return pipeline.generate(teacher, chosen, num_samples, seed, _path(dataset_dir), rank, world_size, folders)


@overload
def quantize(teacher: Teacher, dataset: SyntheticDataset | str | os.PathLike, *args: Any, **kw: Any) -> Student: ...
@overload
def quantize(teacher: nn.Module, dataset: SyntheticDataset | str | os.PathLike, *args: Any, **kw: Any) -> Any: ...
def quantize(
    teacher: Teacher | nn.Module,
    dataset: SyntheticDataset | str | os.PathLike,
    scheme: Scheme | str = "w4a4",
    policy: str | None = None,
    algorithm: Any = "distillation",
    weight_quantizer: Any = "mse",
    activation_quantizer: Any = "mse",
    student_dir: str | os.PathLike | None = None,
    seed: int = 0,
    budget: Mapping[str, Any] | str | float | None = None,
    attribute: str | None = None,
    task: str = "classification",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trainer: Any = "single",
    **settings: Any,
) -> Any:
    """A quantized student of ``teacher``, made with ``dataset``; settings of the algorithm go in as keywords.

    With ``student_dir`` the student is saved there, an interrupted call goes on, and a finished one is loaded.

    Of a LightningModule a copy is given back whose network is the student's; the module itself stays as it is.
    ``dfq.lightning.student_of`` gives its student, to export.

    Args:
        attribute: the network's name in a LightningModule; None: the only part that has weights; ``"."``: the module.
        task, mean, std: what a LightningModule's outputs mean, and the normalization of its images; None: as the
            dataset records it.
        budget: ``{"size_bytes": 150000}`` and the like: bits are chosen layer by layer (see ``scheme="mixed"``). A time
            such as ``"10min"`` is the algorithm's (``auto``).
        trainer: where a distillation runs: ``single``, ``ddp``, ``ddp_spawn``, ``fsdp``, or a
            :class:`~dfq.lightning.trainer.Training`.
    """
    if not isinstance(teacher, Teacher):
        given = locals()
        options = {key: given[key] for key in ("scheme", "policy", "algorithm", "weight_quantizer", "seed", "budget")}
        options |= {
            "activation_quantizer": activation_quantizer,
            "student_dir": student_dir,
            "trainer": trainer,
            **settings,
        }
        return _quantize_module(teacher, _dataset(dataset), attribute, task, mean, std, options)
    chosen = Scheme.from_dict(config_of("scheme", scheme)) if isinstance(scheme, str) else scheme
    if policy is not None:
        chosen = replace(chosen, policy=policy)
    if isinstance(budget, Mapping):
        name = chosen.name if isinstance(chosen, MixedScheme) else ""
        chosen = Scheme.from_dict({**chosen.to_dict(), "name": name, "budget": budget})
    elif budget is not None:
        settings["budget"] = budget
    methods = (
        resolve("algorithm", algorithm, **settings),
        resolve("quantizer", weight_quantizer),
        resolve("quantizer", activation_quantizer),
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = _path(student_dir) or Path(scratch) / "student"
        training = resolve("trainer", trainer)
        return pipeline.quantize(
            teacher, _dataset(dataset), chosen, *methods, seed=seed, student_dir=path, training=training
        )[0]


def _quantize_module(
    module: nn.Module,
    dataset: SyntheticDataset,
    attribute: str | None,
    task: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    options: dict[str, Any],
) -> nn.Module:
    if not is_lightning_class(type(module)):
        raise UserError(
            f"got a {type(module).__name__} to quantize",
            "a Teacher, or a LightningModule",
            "dfq.load_teacher(model, task=..., input_size=..., mean=..., std=...) makes a Teacher",
        )
    module = copy.deepcopy(module)
    name = find_network(module, attribute)
    recorded = dataset.manifest["settings"].get("input_spec")
    if mean is not None and std is not None:
        recorded = {"size": list(dataset.samples(1).shape[1:]), "mean": mean, "std": std}
    if recorded is None:
        raise UserError(f"got {dataset.path}, which does not say how its images are normalized", "mean=... and std=...")
    network = copy.deepcopy(network_of(module, name))
    device = next(network.parameters()).device
    student = quantize(Teacher(network, task, input_spec_from_dict(recorded), device=device), dataset, **options)
    if student.network is not None:
        raise UserError(
            f"got student_network={student.network} and a LightningModule, whose network stays its own",
            "student_network=None",
        )
    replace_network(module, name, student)
    return module


def load(
    path: str | os.PathLike,
    module: Any = None,
    attribute: str | None = None,
    as_module: bool = False,
    device: str | torch.device = "auto",
    **arguments: Any,
) -> Any:
    """The quantized network in a Lightning checkpoint, or in a student's folder: a :class:`Student`.

    Args:
        module: the LightningModule's class, or one that is made; None: the class that the checkpoint names.
        attribute: name of the network, if several are quantized.
        as_module: give the LightningModule instead, its weights as they were trained.
        arguments: of the class, beyond the hyper-parameters in the checkpoint.
    """
    if Path(path).is_dir():
        return load_student(path, device=device)
    content = read_checkpoint(path)
    record = read_record(content, f"path={path}")
    if isinstance(module, nn.Module):
        write_records(module)
        module.on_load_checkpoint(content)  # type: ignore[operator]  # of a LightningModule
        module.load_state_dict(content["state_dict"])
    else:
        kind = module or import_named("module", record["module"], "dfq.load(path, module=THE_CLASS)")
        module = load_module(kind, path, "path", "dfq.load(path, NAME=VALUE)", arguments)
    module = module.to(resolve_device(device))
    return module if as_module else student_of(module, attribute)


def load_student(
    path: str | os.PathLike, teacher: Teacher | None = None, device: str | torch.device = "auto"
) -> Student:
    """The student in a folder; its network is rebuilt from what the folder records unless the teacher is given."""
    if teacher is None:
        manifest = read_manifest(path)
        if manifest.get("network") is None:
            teacher = _recorded_teacher(Path(path), device, weights=False)
        else:  # its teacher may be one in memory, and isn't needed
            teacher = build_network(manifest["network"], manifest["teacher"]).to(resolve_device(device))
    return Student.load(path, teacher)


def evaluate(
    teacher: Teacher,
    student: Student | None = None,
    evaluation: Any = "none",
    dataset: SyntheticDataset | str | os.PathLike | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """``{"teacher": metrics, "student": metrics, "fidelity": ...}``.

    Args:
        evaluation: a yaml's name with settings as keywords, an object, or any iterable of (images, labels) batches
            (a DataLoader) whose images are normalized for the network.
        dataset: synthetic samples; fidelity is measured on the held-out part.
    """
    if not isinstance(evaluation, str | Mapping) and isinstance(evaluation, Iterable):
        chosen = evaluation
    else:
        chosen = resolve("evaluation", evaluation, **settings)
    return pipeline.evaluate(teacher, student, chosen, None if dataset is None else _dataset(dataset))


def export(
    student: Student,
    artifact_path: str | os.PathLike,
    exporter: Any = "onnx_qdq",
    teacher: Teacher | None = None,
    dataset: SyntheticDataset | str | os.PathLike | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write the artifact and check it in its runtime; returns its description (size, parity, latency).

    Args:
        teacher: the float network, for the size and latency beside it.
        dataset: synthetic samples; the artifact is compared to the student on the held-out part.
    """
    method = resolve("exporter", exporter, **settings)
    opened = None if dataset is None else _dataset(dataset)
    return pipeline.export(student, method, Path(artifact_path), teacher, opened)


# ------------------------------------------------------------------------------------------------ the command line


def command(name: str, config: Mapping[str, Any]) -> float | None:
    """Run a command of the command line with its resolved configuration; returns the figure a sweeper optimizes."""
    ranks.end_with_parent()
    return {
        "run": _run,
        "plan": _plan,
        "generate": _generate,
        "quantize": _quantize,
        "evaluate": _evaluate,
        "export": _export,
        "report": _report,
        "inspect": _inspect,
    }[name](config)


def _run(config: Mapping[str, Any]) -> float | None:
    report = pipeline.run(_experiment(config, _build_teacher(config["teacher"], config["device"])))
    if not report:  # another process has it
        return None
    return _figure(report, config["optimized_metric"])


def figure(folder: Path, name: str | None) -> float | None:
    """The one that a sweeper optimizes, of the run in ``folder``; None where another process has it."""
    path = folder / "report.json"
    return _figure(read_json(path, "run"), name) if path.exists() else None


def _figure(report: Mapping[str, Any], name: str | None) -> float:
    """The figure that a sweeper is told: a metric's name, or a path of names in the report."""
    metrics, fidelity = report["student"]["metrics"], report["fidelity"]
    if name is None:
        return next(iter(metrics.values()), fidelity["agreement"])
    known = {key: value for key, value in _leaves(report).items() if key.split(".")[0] != "environment"}
    known |= {key: fidelity[key] for key in ("agreement", "kl")} | metrics
    if name not in known:
        raise UserError(f"got optimized_metric={name}", " | ".join(known), did_you_mean(name, known))
    return known[name]


def _leaves(values: Mapping[str, Any], start: str = "") -> dict[str, float]:
    """Every number in nested mappings, by its dotted path."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{start}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[start + key] = value
    return found


def _experiment(config: Mapping[str, Any], teacher: Teacher) -> Experiment:
    return Experiment(
        teacher=teacher,
        generator=build(config["generator"], "generator"),
        scheme=Scheme.from_dict(config["scheme"]),
        algorithm=build(config["algorithm"], "algorithm"),
        weight_quantizer=build(config["weight_quantizer"], "weight_quantizer"),
        activation_quantizer=build(config["activation_quantizer"], "activation_quantizer"),
        evaluation=build(config["evaluation"], "evaluation"),
        exporter=build(config["exporter"], "exporter"),
        num_samples=config["num_samples"],
        seed=config["seed"],
        dataset_dir=_path(config["dataset_dir"]),
        student_dir=_path(config["student_dir"]),
        artifact_path=_path(config["artifact_path"]),
        output_dir=Path(config["output_dir"]),
        references=tuple(config["references"]),
        command=config["command"],
        training=_training(config),
    )


def _plan(config: Mapping[str, Any]) -> None:
    from dfq import plan

    device = resolve_device(config["device"])

    def teacher(**extra: Any) -> Teacher:
        return _build_teacher(config["teacher"], "cpu" if extra else device, **extra)

    fits = plan.may_load(config["teacher"], device)
    found = plan.make(
        teacher,
        lambda teacher: _experiment(config, teacher),
        device,
        world_size=1 if config["world_size"] == "auto" else config["world_size"],
        has_weights=fits,
    )
    Console().print(plan.table(found))
    plan.refuse(found)


def _generate(config: Mapping[str, Any]) -> None:
    rank, world_size = ranks.resolve(config["rank"], config["world_size"])
    if config["processes"] > 1:
        _in_processes(config)  # what they leave undone is done below
    teacher = _build_teacher(config["teacher"], config["device"])
    generator = build(config["generator"], "generator")
    dataset = pipeline.generate(
        teacher,
        generator,
        config["num_samples"],
        config["seed"],
        _path(config["dataset_dir"]),
        rank,
        world_size,
        [Path(part) for part in config["parts"]],
    )
    if len(dataset) >= config["num_samples"]:  # else other ranks are not done
        Console().print(inspection.describe(dataset.path), soft_wrap=True)


def _in_processes(config: Mapping[str, Any]) -> None:
    """``dfq generate processes=N``: the same command line as each of N ranks; ends when all have."""
    count = config["processes"]
    words = [word for word in shlex.split(config["command"])[2:] if not word.lstrip("+").startswith("processes=")]
    threads = max(1, (os.cpu_count() or 1) // count)
    running = []
    for rank in range(count):
        folder = f"hydra.run.dir={Path(config['output_dir']) / f'rank_{rank}'}"
        own = ["processes=1", f"rank={rank}", f"world_size={count}", folder]  # processes: an experiment may set it
        line = [sys.executable, "-m", "dfq", "generate", *words, *own]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "LOCAL_RANK": str(rank)}
        running.append(subprocess.Popen(line, env=environment))
    try:
        ended = [process.wait() for process in running]
    except BaseException:
        for process in running:
            process.terminate()
        raise
    failed = [rank for rank, status in enumerate(ended) if status]
    if failed:
        raise UserError(
            f"got processes={count}, of which {', '.join(map(str, failed))} ended with status {ended[failed[0]]}",
            do="see above for why; what is done is kept, and the same command goes on",
        )


def _quantize(config: Mapping[str, Any]) -> None:
    training = _training(config)
    _, path = pipeline.quantize(
        _build_teacher(config["teacher"], config["device"]),
        SyntheticDataset(config["dataset_dir"]),
        Scheme.from_dict(config["scheme"]),
        build(config["algorithm"], "algorithm"),
        build(config["weight_quantizer"], "weight_quantizer"),
        build(config["activation_quantizer"], "activation_quantizer"),
        config["seed"],
        _path(config["student_dir"]),
        training,
    )
    if training.world_size > 1 and ranks.from_environment()[0]:
        return
    Console().print(inspection.describe(path), soft_wrap=True)


def _evaluate(config: Mapping[str, Any]) -> float | None:
    student_dir = Path(config["student_dir"])
    teacher = _teacher_of(config, student_dir, weights=True)
    student = Student.load(student_dir, teacher)
    if student.teacher["sha256"] != teacher.sha256:
        raise UserError(
            f"got a student made from {student.teacher['name']} (sha256 {student.teacher['sha256'][:12]}) and a "
            f"teacher {teacher.name} (sha256 {teacher.sha256[:12]})",
            "the teacher it was made from",
        )
    dataset = _dataset_of(config, student)
    evaluation = build(config["evaluation"], "evaluation")
    return pipeline.report_student(
        teacher, student, student_dir, evaluation, dataset, Path(config["output_dir"]), config["command"]
    )


def _export(config: Mapping[str, Any]) -> None:
    student_dir = Path(config["student_dir"])
    exporter = build(config["exporter"], "exporter")
    teacher = _teacher_of(config, student_dir, weights=True)
    student = Student.load(student_dir, teacher)
    description = pipeline.export(
        student, exporter, _path(config["artifact_path"]), teacher, _dataset_of(config, student)
    )
    Console().print(inspection.describe(Path(description["path"])), soft_wrap=True)


def _report(config: Mapping[str, Any]) -> None:
    page = reports.render(Path(config["output_dir"]))
    reports.summary(*reports.read(Path(config["output_dir"])), Console(), report_path=page)


def _inspect(config: Mapping[str, Any]) -> None:
    Console().print(inspection.describe(Path(config["path"])), soft_wrap=True)


# ------------------------------------------------------------------------------------------------ pieces


def _build_teacher(config: Mapping[str, Any], device: str | torch.device, **extra: Any) -> Teacher:
    target = resolve_device(device)
    teacher = build(config, "teacher", **extra)
    if not isinstance(teacher, Teacher):
        raise UserError(
            f"got a {type(teacher).__name__} from teacher._target_={config['_target_']}",
            "a function that returns a dfq Teacher",
        )
    teacher.config = dict(config)
    return teacher.to(target)


def _recorded_teacher(student_dir: Path, device: str | torch.device, weights: bool) -> Teacher:
    recorded = read_manifest(student_dir)["teacher"]
    if recorded["config"] is None:
        raise UserError(
            f"got a student of {recorded['name']}, a network handed over in Python that can't be rebuilt from here",
            do="give the teacher: teacher=factory teacher.factory=... , or load_student(path, teacher=...)",
        )
    config = dict(recorded["config"])
    return _build_teacher(config, device) if weights else _build_teacher(config, device, weights=False)


def _teacher_of(config: Mapping[str, Any], student_dir: Path, weights: bool) -> Teacher:
    if config.get("teacher_given"):
        return _build_teacher(config["teacher"], config["device"])
    return _recorded_teacher(student_dir, config["device"], weights)


def _dataset_of(config: Mapping[str, Any], student: Student) -> SyntheticDataset | None:
    """The dataset on the command line, else the one the student was made with if it is still there."""
    if config.get("dataset_dir"):
        return SyntheticDataset(config["dataset_dir"])
    recorded = student.settings.get("dataset", {}).get("path")
    if recorded and (Path(recorded) / "manifest.json").exists():
        return SyntheticDataset(recorded)
    return None


def _dataset(dataset: SyntheticDataset | str | os.PathLike) -> SyntheticDataset:
    return dataset if isinstance(dataset, SyntheticDataset) else SyntheticDataset(dataset)


def _training(config: Mapping[str, Any]) -> Training:
    """Where a distillation runs, and who is told of it."""
    logger = build(config["logger"], "logger")
    logger = replace(logger, folder=logger.folder or config["output_dir"])
    return build(config["trainer"], "trainer").with_logger(logger)


def _path(value: str | os.PathLike | None) -> Path | None:
    return None if value is None else Path(value)
