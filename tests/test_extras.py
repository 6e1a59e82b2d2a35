"""What pip is told to install is all that a method needs: its imports, the extras of pyproject.toml, its messages."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dfq
from dfq import checks, source

ROOT = Path(dfq.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
EXTRA = re.compile(r"dfq\[([\w-]+)\]")


def methods() -> dict[str, str]:
    """``exporter=onnx_qdq`` -> ``dfq.exporters.onnx_qdq.OnnxQDQ``, of every yaml of every family."""
    found = {}
    for path in sorted((ROOT / "conf").glob("*/*.yaml")):
        target = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("_target_")
        found |= {f"{path.parent.name}={path.stem}": target} if target else {}
    return found


def messages() -> dict[str, str]:
    """Place -> text of every ``UserError(got, ..., "pip install 'dfq[extra]'")`` of the source."""
    found = {}
    for path in sorted((ROOT / "dfq").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError":
                parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                text = " ".join(part for part in parts if isinstance(part, str))
                found |= {f"{path.relative_to(ROOT)}:{node.lineno}": text} if EXTRA.search(text) else {}
    return found


BY_IMPORT = metadata.packages_distributions()
METHODS = methods()
MESSAGES = messages()


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def distributions(*requirements: str) -> frozenset[str]:
    """What pip installs for them, as far as it is installed here: of others what they require is not known."""
    waiting, seen = [Requirement(text) for text in requirements], set()
    while waiting:
        requirement = waiting.pop()
        name, extras = normalized(requirement.name), sorted(requirement.extras) or [""]
        if (name, *extras) in seen:
            continue
        seen.add((name, *extras))
        try:
            required = [Requirement(text) for text in metadata.distribution(name).requires or []]
        except metadata.PackageNotFoundError:
            continue
        waiting += [one for one in required if not one.marker or any(one.marker.evaluate({"extra": e}) for e in extras)]
    return frozenset(name for name, *_ in seen)


@cache
def importable(*extras: str) -> set[str]:
    """Top-level packages that ``pip install 'dfq[extras]'`` brings."""
    installed = distributions(*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra]))
    named = {name.replace("-", "_") for name in installed}  # those that are not installed here
    return named | {name for name, owners in BY_IMPORT.items() if installed & {normalized(owner) for owner in owners}}


def named_extras(target: str) -> list[str]:
    """Extras in the messages of a method's own modules."""
    texts = [source.source_path(module).read_text(encoding="utf-8") for module in source.modules(target)]
    return sorted(set(EXTRA.findall(" ".join(texts))))


@pytest.fixture
def with_only(monkeypatch):
    """Nothing is installed but what dfq and these extras bring."""
    requirements = [f'{text}; extra == "{extra}"' for extra, texts in EXTRAS.items() for text in texts]
    find_spec = source.find_spec

    def install(*extras):
        here = importable(*extras) | sys.stdlib_module_names | {"dfq"}
        # What is brought and not installed here is there as far as this is about.
        monkeypatch.setattr(
            source,
            "find_spec",
            lambda name: (find_spec(name) or ModuleSpec(name, None)) if name.split(".")[0] in here else None,
        )

    monkeypatch.setattr(checks.metadata, "requires", lambda name: requirements)
    return install


@pytest.mark.parametrize("choice", METHODS)
def test_what_a_method_says_to_install_is_all_that_it_needs(choice, with_only):
    target = METHODS[choice]
    assert source.packages(target) >= {"dfq"}, "its source is read"
    with_only()
    missing, install = checks.missing_packages(target)
    if missing:
        extras = EXTRA.findall(install)
        assert extras, f"{choice} needs {missing}, of no extra"
        with_only(*extras)
        assert checks.missing_packages(target)[0] == [], f"dfq[{extras[0]}] does not bring them"


@pytest.mark.parametrize("choice", [choice for choice, target in METHODS.items() if named_extras(target)])
def test_the_extra_that_a_method_names_itself_brings_what_it_imports(choice):
    extras = named_extras(METHODS[choice])
    assert source.packages(METHODS[choice]) - {"dfq"} <= importable(*extras), f"dfq and {extras}"


@pytest.mark.parametrize("place", MESSAGES)
def test_a_message_names_an_extra_that_brings_what_it_says_is_missing(place):
    for extra in EXTRA.findall(MESSAGES[place]):
        assert extra in EXTRAS
        needed = re.search(r"needs (\w+(?: or \w+)*), not installed", MESSAGES[place])
        if needed:
            assert importable(extra) & set(needed[1].split(" or ")), f"{needed[1]} of {extra}"


def test_these_tests_see_what_is_there():
    """Each finds by itself what it is about: an empty list would pass."""
    assert METHODS["exporter=onnx_qdq"] == "dfq.exporters.onnx_qdq.OnnxQDQ"
    assert {"exporter=onnx_qdq", "teacher=huggingface", "evaluation=lm_eval", "teacher=ultralytics"} <= {
        choice for choice, target in METHODS.items() if named_extras(target)
    }
    assert "dfq.exporters._travelling" in source.modules(METHODS["exporter=onnx_qdq"])
    assert len(MESSAGES) > 5
    assert {"torch", "PIL", "yaml"} <= importable() and not {"onnx", "transformers"} & importable()
    assert {"onnx", "onnxruntime"} <= importable("onnx") and "transformers" not in importable("onnx")
