"""The commands: what each takes, its help text and its completion, read from the yaml files and the methods' sources.

No Hydra and no torch, so a help text, a completion or the answer to a misspelled option takes a fraction of a second.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dfq import settings, source
from dfq.errors import UserError, did_you_mean
from dfq.scheme import OPERANDS, PARTS, Scheme


@dataclass(frozen=True)
class Command:
    """One word behind ``dfq``: the root keys of conf/config.yaml that it uses, those it cannot do without first."""

    summary: str
    example: str
    options: tuple[str, ...]
    required: tuple[str, ...] = ()


METHOD = ("scheme", "algorithm", "weight_quantizer", "activation_quantizer")
RUN = (
    *("teacher", "generator", *METHOD, "evaluation", "exporter", "num_samples", "seed", "device"),
    *("dataset_dir", "student_dir", "artifact_path", "references", "trainer", "logger", "optimized_metric", "name"),
    "experiment",
)

COMMANDS = {
    "run": Command(
        "all five arrows: synthetic data, student, evaluation, artifact, report",
        "dfq run teacher=digits generator=zeroq scheme=w4a4",
        RUN,
    ),
    "plan": Command(
        "what dfq run with the same options will do, in how much time and room; nothing is made",
        "dfq plan teacher=timm teacher.name=resnet50.a1_in1k generator=zeroq scheme=w4a4",
        (*RUN, "world_size"),
    ),
    "generate": Command(
        "make synthetic samples out of the network alone",
        "dfq generate teacher=digits generator=zeroq num_samples=1024 dataset_dir=outputs/my_data",
        (
            *("teacher", "generator", "num_samples", "seed", "device", "dataset_dir", "rank", "world_size"),
            *("processes", "parts", "name", "experiment"),
        ),
    ),
    "quantize": Command(
        "make a quantized student with a synthetic dataset",
        "dfq quantize teacher=digits dataset_dir=outputs/my_data scheme=w4a4 student_dir=outputs/my_student",
        ("dataset_dir", "teacher", *METHOD, "student_dir", "seed", "device", "trainer", "logger", "name", "experiment"),
        required=("dataset_dir",),
    ),
    "evaluate": Command(
        "measure a student beside its teacher, and write a report",
        "dfq evaluate student_dir=outputs/my_student evaluation=arrays evaluation.path=test.npz",
        ("student_dir", "teacher", "evaluation", "dataset_dir", "device", "name", "experiment"),
        required=("student_dir",),
    ),
    "export": Command(
        "write a student as a file that a runtime loads, and check it there",
        "dfq export student_dir=outputs/my_student exporter=onnx_qdq artifact_path=my_student.onnx",
        ("student_dir", "teacher", "exporter", "artifact_path", "device", "name"),
        required=("student_dir",),
    ),
    "report": Command(
        "print the table of a run again and rewrite its page",
        "dfq report output_dir=outputs/digits_zeroq_w4a4_distillation/2026-01-31_12-00-00-000000",
        ("output_dir",),
        required=("output_dir",),
    ),
    "inspect": Command(
        "say what is in a dataset, student or artifact, and verify its checksums",
        "dfq inspect outputs/my_data",
        (),
    ),
}
WITHOUT_RUN_FOLDER = ("report", "inspect")  # and plan, which composes as run does

FLAGS = {
    "--help, -h": "this text; groups chosen before it are the ones described",
    "--multirun, -m": "a run for every combination of the values given with commas: scheme=w4a4,w8a8 seed=0,1,2",
    "--cfg, -c job|hydra|all": "print the configuration instead of running",
    "--resolve": "with --cfg: with references between values filled in",
    "--config-dir, -cd DIR": "a folder of your own with yaml files in the layout of conf/",
    "--info, -i WHAT": "Hydra's own view: all | config | defaults | defaults-tree | plugins | searchpath",
}
ROOT_FLAGS = {
    "--help, -h": "this text",
    "--version": "the version of dfq",
    "--completion bash|zsh": 'the shell\'s completion: put eval "$(dfq --completion bash)" into ~/.bashrc',
}


# ------------------------------------------------------------------------------------------------ conf/config.yaml


class Group(NamedTuple):
    """A root key whose value is the name of a yaml file."""

    family: str  # folder of conf/
    default: str | None
    doc: str

    def override_key(self, key: str) -> str:
        """What Hydra calls it: ``quantizer@weight_quantizer``."""
        return key if key == self.family else f"{self.family}@{key}"


@lru_cache
def root() -> tuple[dict[str, Group], dict[str, source.Parameter]]:
    """(groups, plain options) of conf/config.yaml, with their defaults and the comments behind them."""
    path = settings.search_path[0] / "config.yaml"
    config = settings.read_yaml(path)
    docs = dict(
        re.findall(r"^ *(?:- )?(?:optional )?([\w@]+): .*?# (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    )
    groups = {}
    for entry in config["defaults"]:
        if isinstance(entry, dict):
            [(written, default)] = entry.items()
            if not written.startswith("override "):
                name = written.removeprefix("optional ")
                family, _, package = name.partition("@")
                groups[package or family] = Group(family, default, docs.get(name, "").partition(". ")[0])
    plain = {
        key: source.Parameter("Any", default, False, docs.get(key, ""))
        for key, default in config.items()
        if key not in ("defaults", "hydra")
    }
    return groups, plain


def chosen(words: Iterable[str]) -> dict[str, str]:
    """The choice of every group, given the overrides on a command line; an unknown one is a :class:`UserError`."""
    groups, _ = root()
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        package = key.lstrip("+").rpartition("@")[2]
        if equals and package in groups and "," not in value:
            settings.yaml_path(groups[package].family, value, package)
            given[package] = value
    choices = {key: group.default for key, group in groups.items() if group.default}
    choices.update(given)
    teacher = settings.read_yaml(settings.yaml_path("teacher", choices["teacher"]))
    for entry in teacher.get("defaults", []):  # a teacher may choose its evaluation
        for key, value in entry.items() if isinstance(entry, dict) else ():
            package = key.removeprefix("override /").partition("@")[0]
            if package in groups and package not in given:
                choices[package] = value
    return choices


def group_options(key: str, name: str) -> dict[str, source.Parameter]:
    """Options of a choice: ``{"iterations": Parameter(...)}``; those of a scheme are called ``weight.num_bits``."""
    family = root()[0][key].family
    config = settings.load(family, name)
    if family != "scheme":
        return settings.options(config)
    scheme = Scheme.from_dict(config)
    kinds = (type(scheme).__name__, "TensorScheme", "Budget")
    whole, of_part, of_budget = (source.signature(f"dfq.scheme.{name}") or {} for name in kinds)
    values = asdict(scheme) | {"name": config.get("name")}
    nested = {*PARTS, "budget"}
    found = {option: replace(whole[option], default=values[option]) for option in whole if option not in nested}
    if "budget" in whole:
        found |= {f"budget.{name}": replace(known, default=None) for name, known in of_budget.items()}
    for part in PARTS:
        found |= {f"{part}.{name}": replace(known, default=values[part][name]) for name, known in of_part.items()}
    for part in OPERANDS:
        grid = found[f"{part}.grid"]
        found[f"{part}.grid"] = replace(grid, doc=f"{whole[part].doc}: {grid.doc}")
    return found


def _worth_showing(options: dict[str, source.Parameter]) -> dict[str, source.Parameter]:
    """Without the other options of a part of attention that is float: they are those of an activation."""
    hidden = [
        f"{part}." for part in OPERANDS if f"{part}.grid" in options and options[f"{part}.grid"].default == "float"
    ]
    return {
        name: option for name, option in options.items() if name.endswith(".grid") or not name.startswith(tuple(hidden))
    }


def unknown_option(command: str, word: str) -> UserError:
    """What to say of a root key that ``command`` does not take."""
    groups, plain = root()
    options = COMMANDS[command].options
    key = re.split(r"[.@/]", word)[0]
    elsewhere = [name for name, other in COMMANDS.items() if key in other.options]
    used = f", which dfq {command} does not use" if key in (*groups, *plain) else ""
    choices = chosen([])  # perhaps an option of a group, written without it
    homes = [f"{group}.{key}" for group in options if group in choices and key in group_options(group, choices[group])]
    hint = f"did you mean '{homes[0]}'?" if homes else did_you_mean(key, options)
    if not hint and elsewhere:
        hint = f"dfq {elsewhere[0]} takes it"
    return UserError(f"got {word}{used}", ", ".join(options) or f"no options, see dfq {command} --help", hint)


# ------------------------------------------------------------------------------------------------ help


def help_text() -> str:
    """``dfq --help``."""
    lines = ["dfq: from a trained network, and no data, to a quantized artifact and a report", ""]
    lines += ["usage: dfq COMMAND [option=value ...]", ""]
    lines += _columns([(name, command.summary) for name, command in COMMANDS.items()])
    lines += ["", *_columns(ROOT_FLAGS.items()), ""]
    lines += ["`dfq COMMAND --help` lists the options of a command. The shortest complete run:", "", "  dfq run"]
    return "\n".join(lines)


def command_help(name: str, words: Iterable[str]) -> str:
    """``dfq COMMAND --help``, for the groups chosen in ``words``."""
    command = COMMANDS[name]
    if name == "inspect":
        return f"dfq inspect: {command.summary}\n\nusage: dfq inspect DIR\n\nexample: {command.example}"
    lines = [f"dfq {name}: {command.summary}", ""]
    usage = " ".join(f"{key}=..." for key in command.required)
    lines += [f"usage: dfq {name} {usage}{' ' if usage else ''}[option=value ...]", f"example: {command.example}", ""]
    if name == "report":
        return "\n".join([*lines, *_columns([("output_dir=DIR", "folder of a run, with its report.json (required)")])])
    groups, plain = root()
    choices = chosen(words)
    rows = []
    for key in command.options:
        if key in plain:
            value = "DIR" if key in command.required else text(plain[key].default)
            note = " (required)" if key in command.required else ""
            rows.append((f"{key}={value}", plain[key].doc.partition(";")[0] + note if note else plain[key].doc))
    lines += ["Options, with their defaults", *_columns(rows), ""]
    lines += ["Choices, with the options of the one chosen"]
    for key in (option for option in command.options if option in groups):
        group, name_ = groups[key], choices.get(key)
        known = settings.choices(group.family)
        if not known:
            continue
        lines += [f"  {key}={text(name_)}", f"      {group.doc}: {' | '.join(known)}"]
        if name_:
            rows = [
                (f"    {key}.{option}={text(parameter.default, parameter.required)}", settings.explain(parameter))
                for option, parameter in _worth_showing(group_options(key, name_)).items()
            ]
            lines += _columns(rows)
    lines += ["", "Flags", *_columns(FLAGS.items())]
    return "\n".join(lines)


def _columns(rows: Iterable[tuple[str, str]], width: int = 46) -> list[str]:
    rows = list(rows)
    width = min(width, max((len(left) for left, _ in rows), default=0) + 2)
    return [f"  {left:<{width}}{right}" if len(left) < width else f"  {left}  {right}" for left, right in rows]


def text(value: Any, required: bool = False) -> str:
    """A value as it is written on the command line; ``...`` where one has to be given."""
    if value is None or value is ... or required:
        return "..." if required else "null" if value is None else "default"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(text(item) for item in value)}]"
    return str(value)


# ------------------------------------------------------------------------------------------------ completion

COMPLETION_SCRIPTS = {
    "bash": """\
_dfq() {
    local IFS=$'\\n' word="${COMP_LINE:0:COMP_POINT}"
    COMPREPLY=($(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" "${COMP_WORDS[0]}" --complete 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace 2>/dev/null
    word="${word##* }"
    # Where readline breaks words at "=", it wants what follows it alone.
    [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
    return 0
}
complete -F _dfq dfq
""",
    "zsh": """\
_dfq() {
    local -a found finished
    found=("${(@f)$(COMP_LINE="${words[1,CURRENT]}" COMP_POINT=1000000 ${words[1]} --complete 2>/dev/null)}")
    finished=(${found:#*[=./]})
    found=(${(M)found:#*[=./]})
    compadd -Q -- $finished
    compadd -Q -S '' -- $found
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _dfq dfq
""",
}


def completions(line: str, point: int) -> list[str]:
    """Whole words that the word before the cursor can become, in ``line`` typed so far (COMP_LINE, COMP_POINT)."""
    words = line[:point].split()
    word = "" if not words or line[:point][-1:].isspace() else words.pop()
    before = words[1:]
    if not before:
        return _starting(word, [*COMMANDS, *_names(ROOT_FLAGS)])
    name = before[0]
    if name == "--completion":
        return _starting(word, COMPLETION_SCRIPTS)
    if name not in COMMANDS:
        return []
    if word.startswith("-"):
        return _starting(word, ["--help"] if name in WITHOUT_RUN_FOLDER else _names(FLAGS))
    if name == "inspect":
        return _paths("", word)
    if name == "report":
        key, equals, value = word.partition("=")
        return _paths("output_dir=", value) if key == "output_dir" and equals else _starting(word, ["output_dir="])
    try:
        choices = chosen(other for other in before[1:] if other != word)
    except UserError:
        choices = chosen([])
    return _option_completions(COMMANDS[name], word, choices)


def _option_completions(command: Command, word: str, choices: dict[str, str]) -> list[str]:
    groups, _ = root()
    key, equals, value = word.partition("=")
    group, dot, option = key.partition(".")
    usable = {option: parameter for option, parameter in _usable(command, group, choices).items()} if dot else {}
    if not equals:
        if dot:
            return _starting(word, [f"{group}.{name}=" for name in usable])
        found = []
        for name in command.options:
            found += [f"{name}="] + ([f"{name}."] if name in groups and _usable(command, name, choices) else [])
        return _starting(word, [*found, *(["hydra/launcher=", "hydra/sweeper="] if word.startswith("h") else [])])
    done, _, last = value.rpartition(",")
    start = f"{key}={done},".removesuffix(",") + ("," if done else "")
    if key in groups and key in command.options:
        return _starting(start + last, [start + name for name in settings.choices(groups[key].family)])
    if key in ("hydra/launcher", "hydra/sweeper"):
        return _starting(start + last, [start + name for name in ("basic", *plugins(key.partition("/")[2]))])
    if key == "device":
        return _starting(word, [start + name for name in ("auto", "cpu", "cuda", "mps")])
    if dot and option in usable:
        allowed = settings.describe(usable[option]).split(" | ")
        listed = re.search(r"\w+(?: \| \w+)+", usable[option].doc)  # a comment with "all | edges_8bit"
        values = listed[0].split(" | ") if listed else allowed if len(allowed) > 1 else []
        if values:
            return _starting(start + last, [start + name for name in values if re.fullmatch(r"\w+", name)])
    if re.search(r"(_dir|path|checkpoint)$", key) and (key in command.options or option in usable):
        return _paths(f"{key}=", value)
    return []


def _usable(command: Command, group: str, choices: dict[str, str]) -> dict[str, source.Parameter]:
    return group_options(group, choices[group]) if group in command.options and group in choices else {}


def _starting(word: str, candidates: Iterable[str]) -> list[str]:
    return [candidate for candidate in candidates if candidate.startswith(word)]


def _names(flags: dict[str, str]) -> list[str]:
    return [re.split(r"[, ]", flag)[0] for flag in flags]


def plugins(kind: str) -> list[str]:
    """Launchers (or sweepers) of Hydra that are installed beside the basic one."""
    known = {
        "launcher": {"joblib": ["joblib"], "submitit": ["submitit_local", "submitit_slurm"]},
        "sweeper": {"optuna": ["optuna"]},
    }
    found = known.get(kind, {})
    folder = importlib.util.find_spec("hydra_plugins")
    places = list(folder.submodule_search_locations or []) if folder else []
    return [
        name
        for plugin, names in found.items()
        if any((Path(place) / f"hydra_{plugin}_{kind}").is_dir() for place in places)
        for name in names
    ]


def _paths(start: str, typed: str) -> list[str]:
    folder, slash, name = typed.rpartition("/")
    parent = Path(folder or ("/" if slash else "."))
    try:
        entries = sorted(entry for entry in parent.iterdir() if entry.name.startswith(name))
    except OSError:
        return []
    hidden = name.startswith(".")
    return [
        f"{start}{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in entries
        if hidden or not entry.name.startswith(".")
    ]
