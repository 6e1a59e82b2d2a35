"""Settings: from the yaml of a method (its name and settings) to the object, checked before anything heavy is imported.

A method (generator, quantizer, algorithm, exporter, evaluation, teacher loader, task) is a frozen dataclass whose
fields are its settings, or a function whose keyword arguments are its settings. ``conf/<family>/<name>.yaml`` names
it by ``_target_: package.module.Name``; nothing else in the project lists it.

Importing a method usually imports torch, which takes seconds. So :func:`signature` reads names, types, defaults and
the comment behind each setting from the method's *source*, and a mistake on the command line is answered in
milliseconds. What cannot be read that way (C code, names made at run time) is not checked.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import io
import math
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml

from dfq.errors import UserError, did_you_mean

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


@dataclass(frozen=True)
class Parameter:
    """One setting of a method, as its source states it."""

    annotation: str  # source text, "Any" where there is none
    default: Any  # the value; Ellipsis where there is none or it is not a plain literal
    required: bool
    doc: str  # the comment behind it
    module: str = ""  # where names in the annotation are to be looked up


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
    """Every key of ``config`` known to its ``_target_``, every value of its type and range, every required one given."""
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
    if isinstance(target, str) and isinstance(_statement(target), ast.ClassDef):
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
    """A method from what a caller of the Python functions gave: a yaml's name, a mapping with ``_target_``, or an object."""
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


def locate(target: str, where: str = "") -> Any:
    """Import what ``package.module.Name`` names. Nothing of the standard library: no method lives there, mischief does."""
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
                did_you_mean(key, known),
            )
    for key, parameter in (parameters or {}).items():
        if parameter.required and key not in settings and key not in extra and key != "**":
            raise _not_given(where, key, parameter)
    return settings


def _not_given(where: str, key: str, parameter: Parameter | None) -> UserError:
    name = _join(where, key)
    allowed = describe(parameter) if parameter else ""
    doc = f" ({parameter.doc})" if parameter and parameter.doc else ""
    return UserError(f"got no {name}", allowed, f"give {name}=...{doc}")


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
    """``value`` as ``annotation`` (source text, its names looked up in ``module``) has it; a :class:`UserError` if it is not."""
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
        found = _find(module, [node.id]) if node.id != "Any" else None
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


# ------------------------------------------------------------------------------------------------ reading the source


def signature(target: str) -> dict[str, Parameter] | None:
    """Settings of ``package.module.Name``, read from its source without importing it; None where that cannot be read.

    A dataclass: its fields, those of its bases first. Another class: the arguments of its ``__init__``. A function: its
    keyword-only arguments, or all of them where it has none. A key ``"**"`` says that any further name is taken too.
    """
    found = _definition(target)
    return _signature(*found) if found else None


def attribute(target: str, name: str) -> Any:
    """The literal that the class ``target`` holds as ``name`` (``suffix: ClassVar[str] = ".onnx"``); None where it cannot be read."""
    value = getattr(_statement(f"{target}.{name}"), "value", None)
    literal = _default(value)
    return None if literal is ... else literal


def names(module: str) -> set[str] | None:
    """Names that a module defines or imports, from its source; None where the source cannot tell."""
    source = _source(module)
    if source is None:
        return None
    found: set[str] = set()
    for statement in _statements(source.tree.body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            found.update((alias.asname or alias.name).split(".")[0] for alias in statement.names)
        found.update(_defined(statement))
        if not isinstance(statement, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign | ast.If | ast.Try | ast.Expr):
            if not isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                return None  # a loop or the like may define anything
    return None if found & {"*", "__getattr__"} else found


def packages(target: str) -> set[str]:
    """Top-level packages that the module of ``target`` imports, inside functions too, those in a ``try`` left out."""
    found = _definition(target)
    source = _source(found[0]) if found else None
    imported: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            imported.add(node.module.split(".")[0])
        elif not isinstance(node, ast.Try) and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    if source:
        visit(source.tree)
    return imported - set(sys.stdlib_module_names)


def _definition(target: str) -> tuple[str, ast.stmt] | None:
    """(module, statement) that defines ``package.module.Name``."""
    parts = target.replace(":", ".").split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        if source_path(module):
            return _find(module, parts[length:])
    return None


def _statement(target: str) -> ast.stmt | None:
    found = _definition(target)
    return found[1] if found else None


def source_path(module: str) -> Path | None:
    """The ``.py`` file of a module, found without importing it or the packages it lies in."""
    spec = find_spec(module)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def find_spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module lies; nothing is imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # imports nothing for a top-level name
    except (ImportError, ValueError):
        return None
    name = top
    for part in rest:
        name = f"{name}.{part}"
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec


@dataclass(frozen=True)
class _Source:
    tree: ast.Module
    comments: dict[int, str]  # line number -> comment behind the code of that line


def _source(module: str) -> _Source | None:
    path = source_path(module)
    try:
        return _read_source(path, path.stat().st_mtime_ns) if path else None
    except (OSError, SyntaxError, ValueError, tokenize.TokenError):
        return None


@lru_cache(maxsize=256)
def _read_source(path: Path, _modified: int) -> _Source:
    text = path.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    return _Source(ast.parse(text), comments)


def _find(module: str, names: list[str], depth: int = 8) -> tuple[str, ast.stmt] | None:
    """(module, statement) that defines ``names`` ([Class] or [Class, method]), imports followed."""
    source = _source(module)
    if source is None or depth == 0:
        return None
    found: tuple[str, ast.stmt] | None = None
    for statement in _statements(source.tree.body):
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == names[0]:
                    origin = _origin(module, statement)
                    found = _find(origin, [alias.name], depth - 1) if origin else None
        elif names[0] in _defined(statement):
            found = (module, statement)
    for name in names[1:]:
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        inner = [statement for statement in found[1].body if name in _defined(statement)]
        found = (found[0], inner[-1]) if inner else None
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those in its ``if`` and ``try`` blocks too."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "handlers", "finalbody") if isinstance(statement, ast.If | ast.Try) else ():
            for inner in getattr(statement, block, []):
                yield from _statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _origin(module: str, statement: ast.ImportFrom) -> str:
    """The module that ``from ... import`` reads in ``module``."""
    if not statement.level:
        return statement.module or ""
    path = source_path(module)
    package = module.split(".") if path and path.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - statement.level + 1]
    return ".".join([*package, *(statement.module or "").split(".")]).strip(".")


def _signature(module: str, statement: ast.stmt) -> dict[str, Parameter] | None:
    if isinstance(statement, ast.ClassDef):
        if any(_name(decorator) == "dataclass" for decorator in statement.decorator_list):
            return _fields(module, statement)
        for inner in statement.body:
            if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
                return _arguments(module, inner, skip=1, only_keywords=False)
        if len(statement.bases) == 1 and isinstance(statement.bases[0], ast.Name):
            found = _find(module, [statement.bases[0].id])
            return _signature(*found) if found else None
        return {} if not statement.bases else None
    if isinstance(statement, ast.FunctionDef):
        in_class = any(_name(decorator) == "classmethod" for decorator in statement.decorator_list)
        return _arguments(module, statement, skip=int(in_class))
    return None


def _name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _fields(module: str, statement: ast.ClassDef) -> dict[str, Parameter] | None:
    parameters: dict[str, Parameter] = {}
    for base in reversed(statement.bases):
        if _name(base) in ("ABC", "Protocol", "Generic", "object"):
            continue
        found = _find(module, [base.id]) if isinstance(base, ast.Name) else None
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None  # its fields, if it has any, are not to be seen: check nothing rather than refuse good settings
        if any(_name(decorator) == "dataclass" for decorator in found[1].decorator_list):
            inherited = _fields(*found)
            if inherited is None:
                return None
            parameters.update(inherited)
    for inner in statement.body:
        if not isinstance(inner, ast.AnnAssign) or not isinstance(inner.target, ast.Name):
            continue
        if _name(inner.annotation) in ("ClassVar", "KW_ONLY"):
            continue
        default, required = _default(inner.value), inner.value is None
        if isinstance(inner.value, ast.Call) and _name(inner.value) == "field":
            keywords = {keyword.arg: keyword.value for keyword in inner.value.keywords}
            if isinstance(keywords.get("init"), ast.Constant) and keywords["init"].value is False:
                continue
            default = _default(keywords.get("default"))
            required = "default" not in keywords and "default_factory" not in keywords
        parameters[inner.target.id] = _parameter(module, inner.annotation, default, required, inner.end_lineno)
    return parameters


def _arguments(
    module: str, function: ast.FunctionDef, skip: int = 0, only_keywords: bool = True
) -> dict[str, Parameter]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = list(zip(positional, defaults, strict=True))[skip:]
    if arguments.kwonlyargs:
        keywords = list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
        pairs = keywords if only_keywords else pairs + keywords
    parameters = {}
    for argument, default in pairs:
        line = default.end_lineno if default is not None else argument.end_lineno
        parameters[argument.arg] = _parameter(module, argument.annotation, _default(default), default is None, line)
    if arguments.kwarg:
        parameters["**"] = Parameter("Any", ..., False, "")
    return parameters


def _parameter(module: str, annotation: ast.expr | None, default: Any, required: bool, line: int | None) -> Parameter:
    source = _source(module)
    doc = source.comments.get(line or 0, "") if source else ""
    return Parameter(ast.unparse(annotation) if annotation else "Any", default, required, doc, module)


def _default(node: ast.expr | None) -> Any:
    try:
        return ... if node is None else ast.literal_eval(node)
    except ValueError:
        return ...
