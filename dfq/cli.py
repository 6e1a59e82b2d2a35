"""The command line: ``dfq COMMAND [overrides]``. The only file that imports Hydra.

Everything is composed and checked first, every value of a sweep too; only then does Hydra make its folder and the job
import torch. A mistake of the user's is one line on stderr and exit status 2, wherever it is found.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfq import __version__, checks, commands, ranks, settings
from dfq.errors import UserError, did_you_mean
from dfq.scheme import Scheme

INTERRUPTED = "interrupted: everything finished so far is kept; run the same command to go on"
MAX_CHECKED_COMBINATIONS = 64  # a larger sweep is checked value by value instead


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _restored():
            _dispatch(arguments)
    except UserError as error:
        if not getattr(error, "shown", False):
            _say(error)
        return 2
    except KeyboardInterrupt:
        _say(INTERRUPTED)
        return 130
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's Trainer turns Ctrl-C into exit(1)
            _say(INTERRUPTED)
            return 130
        raise
    return 0


def _say(what: object) -> None:
    sys.stdout.flush()
    print(f"dfq: {' '.join(str(what).split())}", file=sys.stderr)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """The process as it was, for callers that are not the console script."""
    argv, path, folders = sys.argv, list(sys.path), list(settings.search_path)
    try:
        yield
    finally:
        sys.argv, sys.path[:], settings.search_path[:] = argv, path, folders


# ------------------------------------------------------------------------------------------------ words and flags


def _dispatch(arguments: list[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(commands.help_text())
    elif name == "--version":
        print(f"dfq {__version__}")
    elif name == "--completion":
        shell = rest[0] if rest else ""
        if shell not in commands.COMPLETION_SCRIPTS:
            raise UserError(f"got --completion {shell}".rstrip(), " | ".join(commands.COMPLETION_SCRIPTS))
        print(commands.COMPLETION_SCRIPTS[shell], end="")
    elif name == "--complete":  # the shell asks, with the line in the environment
        line = os.environ.get("COMP_LINE", "")
        print("\n".join(commands.completions(line, int(os.environ.get("COMP_POINT", len(line))))))
    elif name in commands.COMMANDS:
        sys.path.append(os.getcwd())  # a factory of the user's own is found in the folder where dfq is called
        if name in commands.WITHOUT_RUN_FOLDER:
            _look(name, rest)
        else:
            _compose_and_run(name, rest)
    elif "=" in name:
        raise UserError(
            f"got {name} before a command", ", ".join(commands.COMMANDS), f"write dfq run {shlex.join(arguments)}"
        )
    elif name.startswith("-"):
        raise UserError(f"got {name}", ", ".join((*commands.ROOT_FLAGS, "COMMAND --help")))
    else:
        raise UserError(f"got the command {name}", ", ".join(commands.COMMANDS), did_you_mean(name, commands.COMMANDS))


def _look(name: str, words: list[str]) -> None:
    """``dfq inspect DIR`` and ``dfq report output_dir=DIR``: they read a folder and leave none behind."""
    if {"--help", "-h"} & set(words):
        print(commands.command_help(name, []))
        return
    key, usage = ("folder", "dfq inspect DIR") if name == "inspect" else ("output_dir", "dfq report output_dir=DIR")
    wrong = [
        word for word in words if word.startswith("-") or (name == "report" and not word.startswith("output_dir="))
    ]
    if wrong:
        raise UserError(f"got {wrong[0]}", usage)
    values = [word.removeprefix("output_dir=") if name == "report" else word for word in words]
    if len(values) != 1 or not values[0]:
        raise UserError(f"got {shlex.join(values)}" if any(values) else f"got no {key}", usage)
    path = Path(values[0])
    if not path.exists():
        raise UserError(f"got {path}, which does not exist", usage)
    if name == "report" and not (path / "report.json").is_file():
        raise UserError(f"got output_dir={path}, which has no report.json", "the folder of a run", "dfq run makes one")
    from dfq import api

    api.command(name, {"path" if name == "inspect" else key: str(path)})


@dataclass
class _Line:
    """What follows the command, taken apart."""

    flags: list[str]  # for Hydra
    overrides: list[str]  # option=value
    help: bool = False
    multirun: bool = False
    only_look: bool = False  # --cfg, --info: print instead of run


def _read_flags(command: str, words: list[str]) -> _Line:
    line, pending = _Line([], []), list(words)
    with_value = {
        "--cfg": "job | hydra | all",
        "--info": "all | config | defaults | defaults-tree | plugins | searchpath",
        "--config-dir": "",
    }
    short = {"-h": "--help", "-m": "--multirun", "-c": "--cfg", "-cd": "--config-dir", "-i": "--info"}
    while pending:
        word = pending.pop(0)
        if not word.startswith("-"):
            line.overrides.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = short.get(flag, flag)
        if flag in with_value:
            value = value if equals else (pending.pop(0) if pending else "")
            allowed = with_value[flag]
            if allowed and value not in allowed.split(" | "):
                raise UserError(f"got {flag} {value}".rstrip(), allowed)
            if flag == "--config-dir":
                if not Path(value).is_dir() or not value:
                    raise UserError(
                        f"got --config-dir {value}".rstrip(), "a folder with yaml files in the layout of conf/"
                    )
                settings.search_path.append(Path(value))
                value = str(Path(value).resolve())
            line.only_look = line.only_look or flag != "--config-dir"
            line.flags += [flag, value]
        elif flag == "--help" and not equals:
            line.help = True
        elif flag in ("--multirun", "--resolve") and not equals:
            line.multirun = line.multirun or flag == "--multirun"
            line.flags.append(flag)
        else:
            known = [name for names in commands.FLAGS for name in re.findall(r"--[\w-]+", names)]
            raise UserError(
                f"got {word}", ", ".join(commands.FLAGS), did_you_mean(flag, known) or f"see dfq {command} --help"
            )
    return line


# ------------------------------------------------------------------------------------------------ overrides


@dataclass(frozen=True)
class _Override:
    """One ``option=value`` as the user wrote it and as Hydra takes it."""

    key: str  # dotted, without prefix and package: weight_quantizer, generator.iterations, hydra.verbose
    hydra_key: str  # with them: quantizer@weight_quantizer, ++generator.iterations
    value: str | None  # None: the key is deleted (~key)

    @property
    def is_plain(self) -> bool:
        """Sets a value, and chooses neither a yaml nor anything of Hydra's own."""
        return self.key not in commands.root()[0] and not self.key.startswith("hydra")

    def __str__(self) -> str:
        return self.hydra_key if self.value is None else f"{self.hydra_key}={self.value}"


def _read_override(command: str, word: str) -> _Override:
    matched = re.fullmatch(r"(?s)(~|\+{0,2})([\w./@-]+)(?:=(.*))?", word)
    if not matched or (matched[3] is None and matched[1] != "~"):
        key = matched[2] if matched else ""
        do = (
            f"write {key}=VALUE"
            if key in commands.COMMANDS[command].options
            else "quote it for the shell if it holds spaces or brackets"
        )
        raise UserError(f"got {word}", "option=value", do)
    prefix, written, value = matched.groups()
    written = _in_full(written)
    groups, plain = commands.root()
    usable = commands.COMMANDS[command].options
    key = written.rpartition("@")[2]  # quantizer@weight_quantizer is Hydra's word for weight_quantizer
    first, dot, _ = key.partition(".")
    if key.split(".")[0].split("/")[0] == "hydra":
        return _Override(key, prefix + written, value)
    if (
        first not in usable
        or (dot and first in plain)
        or ("@" in written and written != groups[first].override_key(first))
    ):
        raise commands.unknown_option(command, key if first in (*groups, *plain) and not dot else written)
    if prefix == "~" and not dot:
        raise UserError(f"got {word}, and {first} can't be left out", "option=value")
    if dot:  # what a method takes is checked against the method, not against the yaml: ++ lets Hydra take it
        return _Override(key, ("~" if prefix == "~" else "++") + key, value)
    if first in groups:
        return _Override(key, groups[first].override_key(first), value)
    return _Override(key, key, value)


def _in_full(key: str) -> str:
    """``budget.size_bytes`` and the like are the scheme's, ``budget`` itself, a time, is the algorithm's."""
    first, dot, _ = key.partition(".")
    return f"{'scheme' if dot else 'algorithm'}.{key}" if first == "budget" else key


def _combinations(values: list[list[str]]) -> Iterator[tuple[str, ...]]:
    """One value of each list: all combinations of a small sweep, of a large one each value once."""
    if math.prod(len(options) for options in values) <= MAX_CHECKED_COMBINATIONS:
        yield from itertools.product(*values)
        return
    first = [options[0] for options in values]
    yield tuple(first)
    for position, options in enumerate(values):
        for value in options[1:]:
            yield (*first[:position], value, *first[position + 1 :])


# ------------------------------------------------------------------------------------------------ Hydra


def _version_base() -> dict[str, Any]:
    """Hydra before 1.4 warns if it is not told whose defaults to follow; from 1.4 on it warns if it is."""
    import hydra

    major, minor = hydra.__version__.split(".")[:2]
    return {"version_base": "1.3"} if (int(major), int(minor)) < (1, 4) else {}


@contextlib.contextmanager
def _hydra_errors(overrides: list[_Override]) -> Iterator[None]:
    """Hydra's and OmegaConf's own complaints, several lines long, in one line as mistakes of the user's."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        got = " ".join(str(override) for override in overrides)  # ours are checked, so it is about one of Hydra's own
        mine = " ".join(str(override) for override in overrides if override.key.startswith("hydra"))
        raise UserError(
            f"got {mine or got}", do=re.split(r" full_key:| See https:| Config search path:", text)[0]
        ) from error


def _values_of(override: _Override) -> list[str]:
    """The values that a sweep gives ``override``; one where it is no sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if override.value is None:
        return []
    try:
        parsed = OverridesParser.create().parse_override(str(override))
        if parsed.is_sweep_override() and parsed.is_discrete_sweep():
            return [str(value) for value in parsed.sweep_string_iterator()]
    except HydraException:
        quoted_key = re.search(r"[{,]\s*(['\"])[^'\"]*\1\s*:", override.value)
        do = "quote it for the shell if it holds spaces or brackets"
        raise UserError(
            f"got {override.key}={override.value}",
            "option=value with a plain value, [a,b] or {k: v}",
            f"write {quoted_key[0].strip('{, ')} without the quotes" if quoted_key else do,
        ) from None
    return [] if parsed.is_sweep_override() else [override.value]


def _check_choices(key: str, values: list[str]) -> None:
    """Every value of a sweep over a group is one of its choices, and a launcher is installed."""
    groups, _ = commands.root()
    for value in values:
        if key in groups:
            settings.yaml_path(groups[key].family, value, key)
        elif key == "hydra/launcher" and value not in (known := ["basic", *commands.plugins("launcher")]):
            raise UserError(
                f"got {key}={value}", " | ".join(known), "pip install 'dfq[launch]' for joblib and submitit"
            )
        elif key == "hydra/sweeper" and value not in (known := ["basic", *commands.plugins("sweeper")]):
            raise UserError(f"got {key}={value}", " | ".join(known), "pip install 'dfq[sweep]' for optuna")


def _compose(overrides: Sequence[str]) -> Any:
    from hydra import compose, initialize_config_module

    extra = [f"file://{folder.resolve()}" for folder in settings.search_path[1:]]
    found = [f"hydra.searchpath=[{','.join(extra)}]"] if extra else []
    with initialize_config_module("dfq.conf", **_version_base()):
        return compose("config", [*overrides, *found], return_hydra_config=True)


def _compose_and_run(command: str, words: list[str]) -> None:
    line = _read_flags(command, words)
    overrides = [_read_override(command, word) for word in line.overrides]
    # Here already, so that an unknown choice is answered before Hydra is imported.
    chosen = commands.chosen(str(override) for override in overrides)
    if line.help:
        print(commands.command_help(command, [f"{key}={value}" for key, value in chosen.items()]))
        return
    if command == "evaluate":
        overrides += _evaluation_of_the_student(overrides)
    with _hydra_errors(overrides):
        values = [_values_of(override) for override in overrides]
        for override, options in zip(overrides, values, strict=True):
            _check_choices(override.key, options)
        requests = []
        for request in _requests(command, line, overrides, values):
            checks.check(request, complete=not line.only_look)
            requests.append(request)
    if command == "plan" and not line.only_look:
        _plan(words, requests)
        return
    has = {override.key: override.value for override in overrides}
    arguments = [*line.flags, *(str(override) for override in overrides)]
    if "name" not in has:
        arguments.append(f"name={_name(requests)}")
    if "hydra.job.name" not in has:
        arguments.append(f"hydra.job.name={command}")
    swept = {
        override.key
        for override, options in zip(overrides, values, strict=True)
        if len(options) > 1 or (not options and override.value is not None)  # or a range, for a sweeper that draws
    }
    _run(command, words, arguments, overrides, requests[0], swept)


def _plan(words: list[str], requests: list[checks.Request]) -> None:
    """Makes nothing, so it gets no folder from Hydra; of a sweep, each run by itself."""
    from dfq import api

    for request in requests:
        config = {key: value for key, value in request.config.items() if key in commands.COMMANDS["plan"].options}
        config.pop("experiment", None)
        line = shlex.join(["dfq", "plan", *words])
        api.command("plan", {**config, "command": line, "output_dir": "", "teacher_given": request.teacher_given})


def _evaluation_of_the_student(overrides: list[_Override]) -> list[_Override]:
    """``dfq evaluate student_dir=DIR`` alone: the evaluation that the teacher chooses which the folder records."""
    given = {override.key.partition(".")[0]: override.value for override in overrides}
    if {"teacher", "evaluation", "experiment"} & set(given):
        return []
    try:
        manifest = json.loads((Path(given.get("student_dir") or "") / "student.json").read_text(encoding="utf-8"))
        target = manifest["teacher"]["config"]["_target_"]
    except (OSError, ValueError, KeyError, TypeError):
        target = None  # what is wrong with the folder is said later, or its network came from Python
    same = [name for name in settings.choices("teacher") if settings.load("teacher", name).get("_target_") == target]
    evaluation = commands.chosen([f"teacher={same[0]}"])["evaluation"] if same else "none"
    return [_Override("evaluation", "evaluation", evaluation)]


def _requests(
    command: str, line: _Line, overrides: list[_Override], values: list[list[str]]
) -> Iterator[checks.Request]:
    """What is to be checked: the configuration, or those of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    parser = OverridesParser.create()
    sweeps = [override for override, options in zip(overrides, values, strict=True) if len(options) > 1]
    if sweeps and not line.multirun and not any(override.key == "hydra.mode" for override in overrides):
        got = f"{sweeps[0].key}={sweeps[0].value}"
        raise UserError(f"got {got} without --multirun", "one value", "add --multirun for a run with each of them")
    swept = [(override, options) for override, options in zip(overrides, values, strict=True) if options]
    deleted = [str(override) for override in overrides if override.value is None]
    groups, _ = commands.root()
    # Composing takes a tenth of a second: it is done once for each choice of groups, plain values are set afterwards.
    composed: dict[tuple[str, ...], tuple[Any, Any]] = {}
    for combination in _combinations([options for _, options in swept]):
        pairs = [(override, value) for (override, _), value in zip(swept, combination, strict=True)]
        plain = [(override.key, value) for override, value in pairs if override.is_plain]
        choosing = (*(f"{override.hydra_key}={value}" for override, value in pairs if not override.is_plain), *deleted)
        if choosing not in composed:
            whole = _compose(choosing)
            composed[choosing] = (_without_hydra(whole), whole.hydra.runtime.choices)
        found, choices = copy.deepcopy(composed[choosing][0]), composed[choosing][1]
        for key, value in plain:
            OmegaConf.update(found, key, parser.parse_override(f"{key}={value}").value(), force_add=True)
        given = frozenset({override.key for override, _ in pairs} | _set_by_experiment(choices.get("experiment")))
        names = {key: choices.get(group.override_key(key)) for key, group in groups.items()}
        yield checks.Request(command, _plain(found, given), names, given)


def _without_hydra(composed: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])


def _plain(composed: Any, given: frozenset[str]) -> dict[str, Any]:
    """The configuration in plain values; a folder that is called 2024 is text all the same.

    With a ``_target_`` of the user's own, the settings of the yaml that it stands in for are not its settings.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(config, dict)
    for key, annotation in checks.PLAIN_TYPES.items():
        if annotation.startswith("str") and isinstance(config[key], int) and not isinstance(config[key], bool):
            config[key] = str(config[key])
    for key in commands.root()[0]:
        if f"{key}._target_" in given:
            mine = {option.split(".")[1] for option in given if option.startswith(f"{key}.")}
            config[key] = {option: value for option, value in config[key].items() if option in mine}
    return {str(key): value for key, value in config.items()}


def _set_by_experiment(name: str | None) -> set[str]:
    """Dotted keys that an experiment's yaml sets, its choices of groups included."""
    if name is None:
        return set()
    content = settings.read_yaml(settings.yaml_path("experiment", name))
    chosen = [key for entry in content.pop("defaults", []) if isinstance(entry, dict) for key in entry]
    keys = {key.removeprefix("override ").removeprefix("/").rpartition("@")[2] for key in chosen}
    for key, value in content.items():
        keys |= {f"{key}.{option}" for option in value} if isinstance(value, dict) else {key}
    return keys


def _name(requests: list[checks.Request]) -> str:
    """Of the run's folder: the choices that all jobs of a sweep share."""
    parts = [_name_parts(request) for request in requests]
    shared = [same[0] for same in zip(*parts, strict=False) if len(set(same)) == 1]
    name = re.sub(r"[^\w.-]+", "_", "_".join(shared)).strip("_.-")
    return name if re.match(r"[a-zA-Z]", name) else f"{requests[0].command}_{name}".rstrip("_")


def _name_parts(request: checks.Request) -> list[str]:
    if request.choices.get("experiment"):
        return [str(request.choices["experiment"])]
    teacher = str(request.choices["teacher"])
    if teacher == "factory":
        teacher = str(request.config["teacher"]["factory"]).partition(":")[0].rpartition(".")[2]
    elif teacher != "digits":
        teacher = Path(request.config["teacher"].get("name") or teacher).absolute().name  # a folder's, a hub id's last
    if request.command in ("evaluate", "export"):
        return [request.command, Path(request.config["student_dir"] or "student").absolute().name]
    scheme = Scheme.from_dict(request.config["scheme"]).name if "scheme" in request.config else ""
    whole = [teacher, str(request.choices["generator"]), scheme, str(request.choices["algorithm"])]
    return {
        "run": whole,
        "plan": whole,
        "generate": [teacher, str(request.choices["generator"])],
        "quantize": [teacher, scheme, str(request.choices["algorithm"])],
    }[request.command]


def _run(
    command: str,
    words: list[str],
    arguments: list[str],
    overrides: list[_Override],
    request: checks.Request,
    swept: set[str],
) -> None:
    """Hand the checked command line to Hydra, which makes the folder and calls the job, once or for each of a sweep."""
    import hydra

    from dfq import sweeps

    pid, folders, told = os.getpid(), settings.search_path[1:], os.environ.pop(sweeps.TOLD, None)
    failures: list[Exception] = []

    def job(composed: Any) -> Any:
        settings.search_path[1:] = folders  # a launcher's own process has not read the command line
        ended = sweeps.note(swept) if sweeps.is_job() else None
        try:
            result = _job(command, words, request, swept, composed)
            if ended:
                ended(result)
            return result
        except Exception as error:
            if told:  # the process that has started this one for a job of a sweep wants to know
                Path(told).write_text(sweeps.in_one_line(error), encoding="utf-8")
            if ended:
                ended(None, error)
            if os.getpid() != pid:  # a launcher's own process: the error travels back as its result, and is shown there
                raise
            if ended and not getattr(error, "shown", False):
                _say(error if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
                error.shown = True  # type: ignore[attr-defined]
            failures.append(error)  # raised below: Hydra would wrap it into lines of its own
            return math.nan

    sys.argv = [sys.argv[0], *arguments]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them
    try:
        with _hydra_errors(overrides), sweeps.tables():
            hydra.main(config_path="pkg://dfq.conf", config_name="config", **_version_base())(job)()
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
    if failures:
        raise failures[0]


def _shares_training(trainer: Any) -> bool:
    """Whether the others of its processes serve one job; a UserError where they are there from the start, for all."""
    given = trainer or {}
    if given.get("strategy") not in ("ddp", "fsdp") or given.get("devices", 1) * given.get("num_nodes", 1) == 1:
        return False
    if (world_size := ranks.from_environment()[1]) > 1:
        raise UserError(
            f"got --multirun and trainer.strategy={trainer.strategy} in one launch of {world_size} processes for all",
            "a launch for each job; or --multirun without a launcher",
        )
    return True


def _job(command: str, words: list[str], request: checks.Request, swept: set[str], composed: Any) -> Any:
    from hydra.core.hydra_config import HydraConfig

    from dfq import sweeps

    run = HydraConfig.get()
    output_dir = run.runtime.output_dir
    if sweeps.is_job():
        words = [f"--config-dir={folder.resolve()}" for folder in settings.search_path[1:]] + list(run.overrides.task)
        values = [f"{key}={value}" for key, value in sweeps.values(swept).items()]
        print(f"job {run.job.num}: {' '.join(values)}", flush=True)
        if command != "plan" and _shares_training(composed.get("trainer")):
            sweeps.apart([command, *words], Path(output_dir))
            from dfq import api

            return api.figure(Path(output_dir), composed.get("optimized_metric"))
    sys.argv = [sys.argv[0], command, *words]  # so does such a process learn which command it belongs to
    config = {
        key: value
        for key, value in _plain(composed, request.given).items()
        if key in commands.COMMANDS[command].options
    }
    config.pop("experiment", None)
    from dfq import api

    return api.command(
        command,
        {
            **config,
            "command": shlex.join(["dfq", command, *words]),
            "output_dir": output_dir,
            "teacher_given": request.teacher_given,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
