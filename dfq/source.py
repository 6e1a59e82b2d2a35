"""What a method's source says of it, read without importing it: settings, their types, defaults and comments.

Importing a method usually imports torch, which takes seconds; reading its file takes milliseconds. Modules are found
as Python's import would find them, ``from ... import`` is followed, and what cannot be read that way (C code, names
made at run time) is None.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.util
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """One setting of a method, as its source states it."""

    annotation: str  # source text, "Any" where there is none
    default: Any  # the value; Ellipsis where there is none or it is not a plain literal
    required: bool
    doc: str  # the comment behind it
    module: str = ""  # where names in the annotation are to be looked up


def signature(target: str) -> dict[str, Parameter] | None:
    """Settings of ``package.module.Name``, read from its source without importing it; None where that cannot be read.

    A dataclass: its fields, those of its bases first. Another class: the arguments of its ``__init__``. A function: its
    keyword-only arguments, or all of them where it has none. A key ``"**"`` says that any further name is taken too.
    """
    found = definition(target)
    return _signature(*found) if found else None


def attribute(target: str, name: str) -> Any:
    """The literal that the class ``target`` holds as ``name`` (``suffix: ClassVar[str] = ".onnx"``), None if none."""
    value = getattr(statement_of(f"{target}.{name}"), "value", None)
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
        elif isinstance(statement, ast.For | ast.While | ast.With | ast.Match):
            return None  # may define anything
        found.update(_defined(statement))
    return None if found & {"*", "__getattr__"} else found


def packages(target: str) -> set[str]:
    """Top-level packages that the :func:`modules` of ``target`` import, inside functions too, those in a ``try`` left
    out."""
    sources = [_source(module) for module in modules(target)]
    imported = {name.split(".")[0] for source in sources if source for name in source.imported}
    return imported - set(sys.stdlib_module_names)


def code_of(targets: Iterable[str]) -> str:
    """Hash of the code that ``targets`` (``package.module.Name``) run: their modules, and all that these import of the
    same top-level packages and of dfq, inside functions too. What other packages do is left out.

    Says whether what was made by a method may be taken for what the method makes now.
    """
    found = [definition(target) for target in targets]
    reached = _reached(tuple(sorted({where[0] for where in found if where})))
    return hashlib.sha256("\0".join(reached).encode()).hexdigest()


@lru_cache(maxsize=64)  # as it was when first asked for: a file may be edited while a run goes on with the old code
def _reached(modules: tuple[str, ...]) -> list[str]:
    """Name and text of every module, in the order of their names."""
    ours = {"dfq", *(module.partition(".")[0] for module in modules)}
    waiting, seen = list(modules), {}
    while waiting:
        module = waiting.pop()
        source = _source(module) if module not in seen and module.partition(".")[0] in ours else None
        if source is None:
            continue
        seen[module] = source.text
        for node in _import_statements(source.tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif origin := _origin(module, node):
                waiting += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    return [f"{module}\0{text}" for module, text in sorted(seen.items())]


def modules(target: str) -> list[str]:
    """The module of ``target``, and the private modules beside it that it imports: they are part of it."""
    found = definition(target)
    waiting, seen = [found[0]] if found else [], []
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.append(module)
        source = _source(module)
        private = f"{module.rpartition('.')[0]}._"
        waiting += [name for name in (source.imported if source else ()) if name.startswith(private)]
    return [module for module in seen if source_path(module)]


def definition(target: str) -> tuple[str, ast.stmt] | None:
    """(module, statement) that defines ``package.module.Name``."""
    parts = target.replace(":", ".").split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:length])
        if source_path(module):
            return find(module, parts[length:])
    return None


def statement_of(target: str) -> ast.stmt | None:
    found = definition(target)
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


@dataclass
class _Source:
    tree: ast.Module
    text: str

    @cached_property
    def comments(self) -> dict[int, str]:
        """Line number -> comment behind the code of that line."""
        return {
            token.start[0]: token.string.lstrip("# ").rstrip()
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type == tokenize.COMMENT
        }

    @cached_property
    def imported(self) -> set[str]:
        """Dotted names, of modules and of what is taken from them; not those in a ``try``."""
        imported: set[str] = set()
        for node in _import_statements(self.tree, (ast.Try,)):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif not node.level and node.module:
                imported.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        return imported


def _import_statements(node: ast.AST, without: tuple[type, ...] = ()) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those that run, inside functions too."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    elif not isinstance(node, (ast.expr, *without)) and not _is_for_type_checkers(node):
        for child in ast.iter_child_nodes(node):
            yield from _import_statements(child, without)


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _source(module: str) -> _Source | None:
    path = source_path(module)
    try:
        return _read_source(path, path.stat().st_mtime_ns) if path else None
    except (OSError, SyntaxError, ValueError):
        return None


@lru_cache(maxsize=256)
def _read_source(path: Path, _modified: int) -> _Source:
    text = path.read_text(encoding="utf-8")
    return _Source(ast.parse(text), text)


def find(module: str, names: list[str], depth: int = 8) -> tuple[str, ast.stmt] | None:
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
                    found = find(origin, [alias.name], depth - 1) if origin else None
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
            found = find(module, [statement.bases[0].id])
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
        home, parent = (find(module, [base.id]) if isinstance(base, ast.Name) else None) or ("", None)
        if not isinstance(parent, ast.ClassDef):
            return None  # its fields, if it has any, are not to be seen: check nothing rather than refuse good settings
        if any(_name(decorator) == "dataclass" for decorator in parent.decorator_list):
            inherited = _fields(home, parent)
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
            if _default(keywords.get("init")) is False:
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
