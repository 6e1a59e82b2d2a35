"""What can be wrong with a whole configuration, found before anything is imported, made or run.

:data:`CHECKS` is the list, in the order in which mistakes are reported; each is a short function that raises
:class:`UserError`. No torch: files are looked at, sources are read, nothing is executed. What only the
network itself can tell (a checkpoint with the wrong keys, a device that is not there) is said when it is loaded.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dfq import settings, source
from dfq.commands import COMMANDS, group_options, root, text
from dfq.errors import UserError, did_you_mean
from dfq.ranks import resolve
from dfq.scheme import Scheme
from dfq.teachers._folder import check_folder
from dfq.teachers._task_settings import check_task_settings

PLAIN_TYPES = {
    "num_samples": "PositiveInt",
    "seed": "NonNegativeInt",
    "rank": "NonNegativeInt | Literal['auto']",
    "world_size": "PositiveInt | Literal['auto']",
    "processes": "PositiveInt",
    "parts": "list[str]",
    "dataset_dir": "str | None",
    "student_dir": "str | None",
    "artifact_path": "str | None",
    "references": "list[Literal['gaussian', 'real']]",
    "optimized_metric": "str | None",
    "name": "str | None",
}


@dataclass(frozen=True)
class Request:
    """A command with its composed configuration, as far as the command uses it."""

    command: str
    config: dict[str, Any]  # plain values of conf/config.yaml
    choices: dict[str, str]  # group: name of its yaml
    given: frozenset[str]  # dotted keys that the user set, on the command line or in an experiment

    def uses(self, key: str) -> bool:
        if key == "teacher" and self.command in ("evaluate", "export") and not self.teacher_given:
            return False  # the student's folder says which one it was
        return key in COMMANDS[self.command].options

    @property
    def teacher_given(self) -> bool:
        return any(key.split(".")[0] == "teacher" for key in self.given)

    def choice(self, key: str) -> str | None:
        return self.choices.get(key) if self.uses(key) else None

    def get(self, key: str, option: str) -> Any:
        """``teacher.checkpoint`` of the configuration; None where the command does not use it or it is not set."""
        value = (self.config.get(key) or {}).get(option) if self.uses(key) else None
        return None if value == settings.MISSING else value


def check(request: Request, complete: bool = True) -> None:
    """All of :data:`CHECKS`; not ``complete``: only whether the options exist, for who wants to look at them."""
    for function in CHECKS if complete else OPTION_CHECKS:
        function(request)


# ------------------------------------------------------------------------------------------------ names and types


def plain_options(request: Request) -> None:
    for key, annotation in PLAIN_TYPES.items():
        if request.uses(key):
            settings.check_value(request.config[key], annotation, key)


def device(request: Request) -> None:
    name = text(request.config["device"])
    if request.uses("device") and not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise UserError(f"got device={name}", "auto | cpu | cuda | cuda:N | mps")


def ranks(request: Request) -> None:
    if request.uses("rank"):
        rank, world_size, processes = (request.config[key] for key in ("rank", "world_size", "processes"))
        _, size = resolve(rank, world_size)
        if processes > 1 and size > 1:
            raise UserError(
                f"got processes={processes} in one of {size} processes", "processes=1 where a launcher has started them"
            )


def scheme(request: Request) -> None:
    if request.uses("scheme"):
        Scheme.from_dict(request.config["scheme"])


def known_options(request: Request) -> None:
    """``generator.iteration=5``: an option that neither the yaml nor the method's class has."""
    groups, plain = root()
    for key in sorted(request.given):
        group, _, option = key.partition(".")
        if group not in (*groups, *plain) and not group.startswith("hydra"):  # in an experiment's yaml
            raise UserError(f"got {key}", ", ".join((*groups, *plain)), did_you_mean(group, (*groups, *plain)))
        name = request.choice(group)
        if not option or name is None or group == "scheme" or f"{group}._target_" in request.given:
            continue  # the scheme and a _target_ of the user's own are checked as a whole, below
        known = group_options(group, name)
        option = option.partition(".")[0]
        if option not in known and "**" not in known:
            others = [
                other for other in settings.choices(groups[group].family) if option in group_options(group, other)
            ]
            raise UserError(
                f"got {group}.{option}",
                ", ".join(f"{group}.{other}" for other in known) or f"nothing, {group}={name} has no options",
                did_you_mean(option, known).replace("'", f"'{group}.", 1)
                or (f"{group}={others[0]} takes it" if others else ""),
            )


def methods(request: Request) -> None:
    """Every setting of every method of its type, in its range, and none missing."""
    for key in root()[0]:
        if key not in ("scheme", "experiment") and request.uses(key):
            settings.check(request.config[key], key)


def required_options(request: Request) -> None:
    _, plain = root()
    for key in COMMANDS[request.command].required:
        if request.config[key] is None:
            make = {"dataset_dir": "dfq generate makes one", "student_dir": "dfq quantize makes one"}[key]
            raise UserError(f"got no {key}", plain[key].doc.partition(";")[0], f"give {key}=DIR; {make}")


# ------------------------------------------------------------------------------------------------ teachers


def either_weights_or_checkpoint(request: Request) -> None:
    if request.get("teacher", "checkpoint") is None:
        return
    for other in ("pretrained", "weights"):
        if request.get("teacher", other):
            raise UserError(
                f"got teacher.checkpoint and teacher.{other}={text(request.get('teacher', other))}",
                "one of the two",
                "leave one away",
            )


def input_spec(request: Request) -> None:
    size = request.get("teacher", "input_size")
    if size is None:
        return
    if len(size) != 3 or any(not isinstance(side, int) or side < 1 for side in size):
        raise UserError(f"got teacher.input_size={text(size)}", "[channels, height, width], whole numbers >= 1")
    for option in ("mean", "std"):
        values = request.get("teacher", option)
        if values is not None and len(values) != size[0]:
            channels = f"{size[0]} channel{'s' * (size[0] > 1)}"
            raise UserError(
                f"got teacher.{option}={text(values)} and teacher.input_size={text(size)}",
                f"one number a channel, and {channels}",
            )


def factories(request: Request) -> None:
    """The module and the function (or class) of a ``module:function`` exist, as far as its source can tell."""
    named = [("teacher", choice, "adapter") for choice in ("factory", "torchvision", "lightning")]
    named += [("teacher", "factory", "factory"), ("teacher", "lightning", "module")]
    for part, choice, option in (*named, ("algorithm", "distillation", "student_network")):
        name = request.get(part, option) if request.choice(part) == choice else None
        if name is not None:
            _is_factory(f"{part}.{option}", name)


def _is_factory(key: str, name: str) -> None:
    kind = "class" if key.endswith((".adapter", ".module")) else "function"
    module, colon, function = name.partition(":")
    if not colon or not all(part.isidentifier() for part in f"{module}.{function}".split(".")):
        raise UserError(f"got {key}={name}", f"package.module:{kind}")
    spec = source.find_spec(module)
    if spec is None:
        raise UserError(
            f"got {key}={name}, and no module {module} was found",
            "a module that python can import",
            "put its folder on PYTHONPATH, or run dfq in that folder",
        )
    known = source.names(module)
    if known is not None and function.partition(".")[0] not in known:
        raise UserError(
            f"got {key}={name}, and {module} has no {function}",
            f"a {kind} of that module",
            did_you_mean(function, known) or f"look into {spec.origin}",
        )


def task_settings(request: Request) -> None:
    given = request.get("teacher", "task_settings")
    if given is not None:
        check_task_settings(given)


def model_name(request: Request) -> None:
    """The model is one that the installed package registers."""
    package, name = request.choice("teacher"), request.get("teacher", "name")
    if package not in ("timm", "torchvision") or not isinstance(name, str) or ":" in name:  # hf-hub:..., local-dir:...
        return
    architecture, _, tag = name.partition(".")
    known = registered_models(package)
    if known and architecture not in known:
        raise UserError(
            f"got teacher.name={name}, and {package} has no such model",
            f"one of its {len(known)} models, such as resnet18",
            did_you_mean(architecture, sorted(known)),
        )
    names = registered_weights(architecture) if package == "timm" and tag else []
    if names and name not in names:
        raise UserError(
            f"got teacher.name={name}, and timm has no such weights",
            " | ".join([architecture, *names]),
            did_you_mean(name, names),
        )


def registered_models(package: str) -> set[str]:
    """Architectures in the sources of an installed package (timm or torchvision); empty if none are found."""
    known: set[str] = set()
    for content in _sources_of_models(package):
        known.update(re.findall(r"\n@register_model\b.*\n(?:@.*\n)*def (\w+)", content))
        known.update(re.findall(r"\n@register_model\(name=[\"'](\w+)", content))
        for renamed in re.findall(r"\nregister_model_deprecations\(__name__, \{([^}]*)\}", content):
            known.update(re.findall(r"[\"'](\w+)[\"']:", renamed))
    return known


def registered_weights(architecture: str) -> list[str]:
    """Names of a model of timm with the tag of their weights: ``resnet18.a1_in1k``; empty if its sources list none."""
    listed = re.compile(rf"[\"']({architecture}\.\w+)\*?[\"']:")
    return list(dict.fromkeys(name for content in _sources_of_models("timm") for name in listed.findall(content)))


@lru_cache
def _sources_of_models(package: str) -> list[str]:
    spec = source.find_spec(f"{package}.models")
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.py"))]
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


# ------------------------------------------------------------------------------------------------ files


TEXTS = {  # by evaluation
    "text": ('a .txt file, or a .jsonl file with a {"text": ...} a line', (".txt", ".jsonl")),
    "tokens": ("a .npz file with input_ids [N, T]", (".npz",)),
}


def files_to_read(request: Request) -> None:
    if (checkpoint := request.get("teacher", "checkpoint")) is not None:
        _is_file(
            "teacher.checkpoint",
            checkpoint,
            "weights as .safetensors, .pt or .pth",
            (".safetensors", ".pt", ".pth", ".bin", ".ckpt"),
        )
    for option in ("path", "reference_path"):
        path = request.get("evaluation", option)
        if path is not None and request.choice("evaluation") == "arrays":
            _is_arrays(f"evaluation.{option}", path)
        if path is not None and (text := TEXTS.get(str(request.choice("evaluation")))):
            _is_file(f"evaluation.{option}", path, *text)
        if path is not None and request.choice("evaluation") == "imagefolder":
            _is_folder(f"evaluation.{option}", path, "a folder with one folder of images per class")
            if not any(entry.is_dir() for entry in Path(path).iterdir()):
                raise UserError(
                    f"got evaluation.{option}={path}, which has no folders in it", "one folder of images per class"
                )
    if request.choice("evaluation") == "coco":
        for option in ("images", "reference_path"):
            if (path := request.get("evaluation", option)) is not None:
                _is_folder(f"evaluation.{option}", path, "a folder of images")
        if (path := request.get("evaluation", "annotations")) is not None:
            _is_file("evaluation.annotations", path, "boxes in COCO's format, a .json file", (".json",))
    command, config = request.command, request.config
    if (prompts := request.get("generator", "prompts")) is not None and request.choice(
        "generator"
    ) == "self_generation":
        _is_file("generator.prompts", prompts, "prompts as .txt (one a line) or .jsonl", (".txt", ".jsonl"))
    if request.choice("teacher") == "huggingface" and isinstance(name := request.get("teacher", "name"), str):
        check_folder(name, weights=command != "plan")  # whose structure is enough to count
    if command in ("evaluate", "export"):
        _holds("student_dir", config["student_dir"], "student.json", "a student's folder", "dfq quantize makes one")
    if command == "quantize" or (command == "evaluate" and config["dataset_dir"] is not None):
        _holds("dataset_dir", config["dataset_dir"], "manifest.json", "a dataset's folder", "dfq generate makes one")


def _is_file(key: str, path: str, what: str, suffixes: tuple[str, ...]) -> None:
    if not Path(path).exists():
        raise UserError(f"got {key}={path}, which does not exist", what, _nearby(path))
    if Path(path).is_dir():
        raise UserError(f"got {key}={path}, which is a folder", what, "name the file in it")
    if Path(path).suffix not in suffixes:
        raise UserError(f"got {key}={path}", what)


def _is_folder(key: str, path: str, what: str, do: str = "") -> None:
    if not Path(path).exists():
        raise UserError(f"got {key}={path}, which does not exist", what, _nearby(path) or do)
    if not Path(path).is_dir():
        raise UserError(f"got {key}={path}, which is a file", what, do)


def _is_arrays(key: str, path: str) -> None:
    what = "a .npz file with images uint8 [N, H, W, C] and labels int64 [N]"
    _is_file(key, path, what, (".npz",))
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"got {key}={path}, which is no .npz file ({error})", what, "write it with numpy.savez"
        ) from None
    missing = [name for name in ("images", "labels") if name not in found]
    if missing:
        raise UserError(
            f"got {key}={path} without {' and '.join(missing)}", what, f"it holds {', '.join(sorted(found))}"
        )


def _holds(key: str, path: str, file: str, what: str, do: str) -> None:
    _is_folder(key, path, what, do)
    if not (Path(path) / file).is_file():
        raise UserError(f"got {key}={path}, which has no {file}", what, do)


def _nearby(path: str) -> str:
    parent = Path(path).parent
    if not parent.is_dir():
        return f"there is no folder {parent} either"
    return did_you_mean(Path(path).name, [entry.name for entry in parent.iterdir()])


def files_to_write(request: Request) -> None:
    command, config = request.command, request.config
    if "hydra.run.dir" not in request.given:
        _can_become_folder("hydra.run.dir", "outputs")
    if command in ("run", "plan", "generate") and config["dataset_dir"] is not None:
        _can_become_folder("dataset_dir", config["dataset_dir"])
    if command in ("run", "plan", "quantize") and config["student_dir"] is not None:
        _can_become_folder("student_dir", config["student_dir"])
    path = config["artifact_path"] if request.uses("artifact_path") else None
    if path is not None:
        suffix = source.attribute(config["exporter"]["_target_"], "suffix")
        if suffix and Path(path).suffix != suffix:
            raise UserError(
                f"got artifact_path={path}",
                f"a file name that ends in {suffix}",
                f"give artifact_path={Path(path).with_suffix(suffix)}",
            )
        if Path(path).is_dir():
            raise UserError(f"got artifact_path={path}, which is a folder", "a file name")
        _can_become_folder("artifact_path", str(Path(path).parent), path)


def _can_become_folder(key: str, path: str, shown: str = "") -> None:
    if Path(path).exists() and not Path(path).is_dir():
        raise UserError(f"got {key}={shown or path}, and {path} is a file", "a folder that is there or can be made")
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "can't be written to" if place.is_dir() else "is a file"
        raise UserError(f"got {key}={shown or path}, and {place} {why}", "a folder that is there or can be made")


# ------------------------------------------------------------------------------------------------ packages


def installed_packages(request: Request) -> None:
    """The packages that the source of a chosen method imports, with the rest of the extra of dfq they belong to."""
    for key in root()[0]:
        if key in ("scheme", "experiment") or not request.uses(key):
            continue
        missing, install = missing_packages(request.config[key]["_target_"])
        if missing:
            raise UserError(
                f"got {key}={request.choices.get(key)}, which needs {' and '.join(missing)}, not installed here",
                do=f"pip install '{install}'",
            )


def missing_packages(target: str) -> tuple[list[str], str]:
    """What the method ``target`` needs and is not installed here, and what pip is to be told."""
    extras, imported = _extras(), source.packages(target)
    extra = next((name for name, members in extras.items() if imported & set(members)), None)
    needed = imported | set(extras[extra] if extra else ())
    missing = sorted(name for name in needed if source.find_spec(name) is None)
    return missing, f"dfq[{extra}]" if extra else " ".join(missing)


def _extras() -> dict[str, list[str]]:
    """The packages of each extra of dfq as installed; empty where it runs from a folder that was never installed."""
    try:
        requirements = metadata.requires("dfq") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        matched = re.match(r"([\w-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if matched and matched[2] != "dev":
            found.setdefault(matched[2], []).append(matched[1].replace("-", "_"))
    return found


OPTION_CHECKS: list[Callable[[Request], None]] = [plain_options, device, known_options, scheme]
CHECKS: list[Callable[[Request], None]] = [
    *OPTION_CHECKS,
    required_options,
    methods,
    ranks,
    either_weights_or_checkpoint,
    input_spec,
    factories,
    task_settings,
    model_name,
    files_to_read,
    files_to_write,
    installed_packages,
]
