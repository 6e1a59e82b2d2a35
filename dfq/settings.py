"""Settings: from the yaml of a method (its name and settings) to the object, checked before anything heavy is imported.

A method (generator, quantizer, algorithm, exporter, evaluation, teacher loader, task) is a frozen dataclass whose
fields are its settings, or a function whose keyword arguments are its settings. ``conf/<family>/<name>.yaml`` names
it by ``_target_: package.module.Name``; nothing else in the project lists it.

Importing a method usually imports torch, which takes seconds. So settings are checked against what ``dfq.source`` reads
from the method's source, and a mistake on the command line is answered in milliseconds.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from dfq.errors import UserError, did_you_mean
from dfq.source import Parameter, code_of, find, signature, statement_of

search_path = [Path(__file__).with_name("conf")]  # folders of yaml files; the command line appends that of --config-dir
MISSING = "???"  # OmegaConf's word for "has to be given"


@dataclass(frozen=True)
class Bound:
    """Range of a number: ``Annotated[int, Bound(at_least=2, at_most=8)]``."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
        )

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        parts = (("> ", self.above), (">= ", self.at_least), ("<= ", self.at_most))
        return " and ".join(f"{sign}{limit}" for sign, limit in parts if limit is not None)


PositiveInt = Annotated[int, Bound(at_least=1)]
NonNegativeInt = Annotated[int, Bound(at_least=0)]
PositiveFloat = Annotated[float, Bound(above=0)]
NonNegativeFloat = Annotated[float, Bound(at_least=0)]
Fraction = Annotated[float, Bound(at_least=0, at_most=1)]
Share = Annotated[float, Bound(at_least=0, at_most=0.999)]  # of something of which a rest has to remain


# ------------------------------------------------------------------------------------------------ yaml files


class _Loader(yaml.SafeLoader):
    """Safe yaml that reads ``1e-3`` as a number, as OmegaConf does and YAML 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def choices(family: str) -> list[str]:
    """Names of the yaml files of a family: what ``family=`` can be on the command line."""
    return sorted(
        {
            path.relative_to(folder / family).with_suffix("").as_posix()
            for folder in search_path
            for path in (folder / family).rglob("*.yaml")
        }
    )


def load(family: str, name: str) -> dict[str, Any]:
    """The plain content of ``conf/<family>/<name>.yaml``; an unknown name is a :class:`UserError` with the choices."""
    config = read_yaml(yaml_path(family, name))
    config.pop("defaults", None)  # Hydra's own list, not a setting
    return config


def yaml_path(family: str, name: str, where: str = "") -> Path:
    for folder in search_path:
        path = folder / family / f"{name}.yaml"
        if path.is_file():
            return path
    known = choices(family)
    raise UserError(f"got {where or family}={name}", " | ".join(known), did_you_mean(name, known))


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}


# ------------------------------------------------------------------------------------------------ objects


def check(config: Mapping[str, Any], where: str) -> None:
    """Each key of ``config`` known to its ``_target_``, each value of its type and range, each required one given."""
    _checked(config, where, ())


def options(config: Mapping[str, Any]) -> dict[str, Parameter]:
    """What can be set in ``config``: its keys, and for a class all that it takes; defaults are those of ``config``.

    A function takes run-time arguments beside its settings, so what no yaml names is not an option of it.
    """
    target = config.get("_target_", "")
    known = (signature(target) if isinstance(target, str) else None) or {}
    found = {}
    for key, default in config.items():
        if key != "_target_":
            parameter = known.get(key) or Parameter("Any", ..., False, "")
            found[key] = dataclasses.replace(parameter, default=default, required=default == MISSING)
    if isinstance(target, str) and isinstance(statement_of(target), ast.ClassDef):
        found.update({key: parameter for key, parameter in known.items() if key not in found})
    return found


def build(config: Mapping[str, Any], where: str = "", **extra: Any) -> Any:
    """The object that ``config`` names and sets; ``extra`` are run-time arguments that no yaml can hold."""
    values = _checked(config, where, extra)
    for key, value in values.items():
        if isinstance(value, Mapping) and "_target_" in value:
            values[key] = build(value, _join(where, key))
    return locate(config["_target_"], where)(**{**values, **extra})


def resolve(family: str, value: Any, **settings: Any) -> Any:
    """A method from what a caller in Python gave: a yaml's name, a mapping with ``_target_``, or an object."""
    if isinstance(value, str):
        return build({**load(family, value), **settings}, family)
    if isinstance(value, Mapping):
        return build({**value, **settings}, family)
    if settings:
        raise UserError(
            f"got {family}={type(value).__name__}(...) together with {', '.join(settings)}",
            f"settings beside one of the names {' | '.join(choices(family))}",
            "set them on the object itself",
        )
    return value


def to_config(method: Any) -> dict[str, Any]:
    """``{"_target_": ..., **settings}`` of a method, plain enough for json; what :func:`build` makes it from again."""
    kind = method if isinstance(method, type) or hasattr(method, "__qualname__") else type(method)
    config = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
    if dataclasses.is_dataclass(method) and not isinstance(method, type):
        for field in dataclasses.fields(method):
            if field.init:
                config[field.name] = _plain(getattr(method, field.name))
    return config


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) or hasattr(value, "__qualname__"):
        return to_config(value)
    return repr(value)


def code_record(*methods: Any) -> str:
    """Hash of the code that methods and their parts run (:func:`dfq.source.code_of`), and of settings of the parts.

    A part is what a method takes by name in a method of its own: its yaml's settings are not among the method's.
    """
    waiting, targets, settings = list(methods), set[str](), list[dict[str, Any]]()
    while waiting:
        method = waiting.pop()
        parts = method.parts() if hasattr(method, "parts") else []
        waiting += parts
        settings += map(to_config, parts)
        targets |= _targets(to_config(method))
    return hashlib.sha256(json.dumps([code_of(targets), settings], sort_keys=True).encode()).hexdigest()


def _targets(config: Any) -> set[str]:
    if isinstance(config, Mapping):
        own = {config["_target_"]} if "_target_" in config else set()
        return own.union(*map(_targets, config.values()))
    return set().union(*map(_targets, config)) if isinstance(config, list) else set()


def locate(target: str, where: str = "") -> Any:
    """Import what ``package.module.Name`` names. Nothing of the standard library: only mischief would."""
    _check_target(target, where)
    parts, got = target.split("."), f"got {_join(where, '_target_')}={target!r}"
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                continue  # that part of the path is not a module: perhaps a class
            raise UserError(got, "a method that can be imported", f"importing it says: {error}") from error
        except ImportError as error:
            raise UserError(got, "a method that can be imported", f"importing it says: {error}") from error
        for part in parts[length:]:
            if not hasattr(found, part):
                public = [name for name in vars(found) if not name.startswith("_")]
                raise UserError(got, f"a name in {module_name}", did_you_mean(part, public) or f"it has no {part!r}")
            found = getattr(found, part)
        return found
    raise UserError(got, "package.module.Name of an installed package", f"no module named {parts[0]!r} was found")


def _check_target(target: Any, where: str) -> None:
    got = f"got {_join(where, '_target_')}={target!r}"
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")) or "." not in target:
        raise UserError(got, "package.module.Name")
    if target.split(".")[0] in sys.stdlib_module_names:
        raise UserError(got, "a method of dfq or of an installed package", "nothing of Python's standard library")


def _checked(config: Mapping[str, Any], where: str, extra: Any) -> dict[str, Any]:
    """The settings in ``config``, each in the type that its annotation states (a list as the tuple it stands for)."""
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise UserError(f"got {where or 'a method'}={config!r}", "a mapping with _target_: package.module.Name")
    _check_target(config["_target_"], where)
    parameters = signature(config["_target_"])
    settings = {key: value for key, value in config.items() if key != "_target_"}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "_target_" in value:
            _checked(value, _join(where, key), ())
        elif isinstance(value, str) and value == MISSING:
            raise _not_given(where, key, parameters.get(key) if parameters else None)
        elif parameters is None:
            continue
        elif key in parameters and key not in extra:
            parameter = parameters[key]
            settings[key] = check_value(value, parameter.annotation, _join(where, key), parameter.module)
        elif "**" not in parameters:
            known = [name for name in parameters if name not in extra]
            raise UserError(
                f"got {_join(where, key)}={value!r}",
                ", ".join(_join(where, name) for name in known) or f"no settings: {where} has none",
                did_you_mean(key, known).replace("'", f"'{_join(where, '')}", 1),
            )
    for key, parameter in (parameters or {}).items():
        if parameter.required and key not in settings and key not in extra and key != "**":
            raise _not_given(where, key, parameter)
    return settings


def _not_given(where: str, key: str, parameter: Parameter | None) -> UserError:
    name = _join(where, key)
    return UserError(f"got no {name}", explain(parameter) if parameter else "", f"give {name}=...")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


# ------------------------------------------------------------------------------------------------ types of values


class _Mismatch(Exception):
    """A value is not of its annotated type."""


@dataclass(frozen=True)
class _Type:
    describe: str  # for people: "a whole number >= 1"
    convert: Callable[[Any], Any]  # the value in this type, or _Mismatch


def check_value(value: Any, annotation: str, where: str, module: str = __name__) -> Any:
    """``value`` in the type that ``annotation`` (source text from ``module``) states, or a :class:`UserError`."""
    kind = _parse(annotation, module)
    try:
        return kind.convert(value)
    except _Mismatch:
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        options = kind.describe.split(" | ")
        hint = did_you_mean(value, options) if isinstance(value, str) else ""
        raise UserError(f"got {where}={shown}", kind.describe, hint) from None


def describe(parameter: Parameter) -> str:
    """What the type of a setting allows, in words: "a whole number >= 1"; empty for a type of no known vocabulary."""
    kind = _parse(parameter.annotation, parameter.module)
    return "" if kind is _ANYTHING else kind.describe


def explain(parameter: Parameter) -> str:
    """The comment behind a setting, and what its type allows."""
    allowed = describe(parameter)
    if parameter.doc and allowed and allowed != "text":
        return f"{parameter.doc} ({allowed})"
    return parameter.doc or allowed


def _parse(annotation: str, module: str) -> _Type:
    try:
        return _type_of(ast.parse(annotation, mode="eval").body, module)
    except SyntaxError:
        return _ANYTHING


def _only(*kinds: type) -> Callable[[Any], Any]:
    def convert(value):
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _Mismatch
        return value

    return convert


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _Mismatch
    return float(value)


def _sequence(value: Any) -> list[Any]:
    if isinstance(value, str | Mapping) or not hasattr(value, "__iter__"):
        raise _Mismatch
    return list(value)


_ANYTHING = _Type("anything", lambda value: value)
_NULL = _Type("null", _only(type(None)))
_PLAIN_TYPES = {
    "int": _Type("a whole number", _only(int)),
    "float": _Type("a number", _number),
    "bool": _Type("true | false", _only(bool)),
    "str": _Type("text", _only(str)),
    "Path": _Type("a path", _only(str, Path)),
    "None": _NULL,
    "list": _Type("a list [x, ...]", _sequence),
    "Sequence": _Type("a list [x, ...]", _sequence),
    "tuple": _Type("a list [x, ...]", lambda value: tuple(_sequence(value))),
    "dict": _Type("a mapping {key: value}", _only(Mapping)),
    "Mapping": _Type("a mapping {key: value}", _only(Mapping)),
}


def _type_of(node: ast.expr, module: str) -> _Type:
    """What an annotation's syntax tree accepts; what is not in the vocabulary accepts anything."""
    if isinstance(node, ast.Constant):
        if node.value is None:
            return _NULL
        return _parse(node.value, module) if isinstance(node.value, str) else _ANYTHING
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_type_of(node.left, module), _type_of(node.right, module)])
    if isinstance(node, ast.Attribute):  # typing.Any, settings.PositiveInt
        return _type_of(ast.Name(node.attr), __name__)
    if isinstance(node, ast.Name):
        if node.id in _PLAIN_TYPES:
            return _PLAIN_TYPES[node.id]
        found = find(module, [node.id]) if node.id != "Any" else None
        if found and isinstance(found[1], ast.Assign | ast.AnnAssign) and found[1].value is not None:
            return _type_of(found[1].value, found[0])
        return _ANYTHING
    if isinstance(node, ast.Subscript):
        name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _generic(name, items, module)
    return _ANYTHING


def _generic(name: str, items: list[ast.expr], module: str) -> _Type:
    if name == "Literal":
        return _literal([item.value for item in items if isinstance(item, ast.Constant)])
    if name in ("Optional", "Union"):
        return _union([_type_of(item, module) for item in items] + ([_NULL] if name == "Optional" else []))
    if name == "Annotated":
        kind = _type_of(items[0], module)
        for item in items[1:]:
            if isinstance(item, ast.Call) and getattr(item.func, "id", getattr(item.func, "attr", "")) == "Bound":
                kind = _bounded(kind, _bound(item))
        return kind
    if name in ("list", "Sequence", "Iterable"):
        return _list_of(_type_of(items[0], module), list)
    if name == "tuple":
        if len(items) == 2 and isinstance(items[1], ast.Constant) and items[1].value is Ellipsis:
            return _list_of(_type_of(items[0], module), tuple)
        return _tuple_of([_type_of(item, module) for item in items])
    if name in ("dict", "Mapping"):
        return _PLAIN_TYPES["dict"]
    return _ANYTHING


def _bound(call: ast.Call) -> Bound:
    names = [field.name for field in dataclasses.fields(Bound)]
    given = {name: ast.literal_eval(value) for name, value in zip(names, call.args, strict=False)}
    return Bound(**given, **{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg})


def _bounded(kind: _Type, bound: Bound) -> _Type:
    def convert(value):
        value = kind.convert(value)
        if not bound.holds(value):
            raise _Mismatch
        return value

    return _Type(f"{kind.describe} {bound}", convert)


def _literal(values: list[Any]) -> _Type:
    def convert(value):
        for allowed in values:
            if value == allowed and type(value) is type(allowed):
                return value
        raise _Mismatch

    return _Type(" | ".join("null" if value is None else str(value) for value in values), convert)


def _union(kinds: list[_Type]) -> _Type:
    def convert(value):
        results = []
        for kind in kinds:
            try:
                results.append(kind.convert(value))
            except _Mismatch:
                continue
        if not results:
            raise _Mismatch
        unchanged = [result for result in results if type(result) is type(value)]  # 5 stays an int in float | int
        return (unchanged or results)[0]

    if _ANYTHING in kinds:
        return _ANYTHING
    return _Type(" | ".join(dict.fromkeys(kind.describe for kind in kinds)), convert)


def _list_of(kind: _Type, container: type) -> _Type:
    what = "a list [x, ...]" if kind is _ANYTHING else f"a list [x, ...], each x {kind.describe}"
    return _Type(what, lambda value: container(kind.convert(item) for item in _sequence(value)))


def _tuple_of(kinds: list[_Type]) -> _Type:
    def convert(value):
        items = _sequence(value)
        if len(items) != len(kinds):
            raise _Mismatch
        return tuple(kind.convert(item) for kind, item in zip(kinds, items, strict=True))

    return _Type(f"a list of {len(kinds)}: [{', '.join(kind.describe for kind in kinds)}]", convert)
