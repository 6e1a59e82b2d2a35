"""Settings are checked from source text: right types pass, wrong ones say what is allowed, and nothing is imported."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dfq import settings, source
from dfq.errors import UserError
from dfq.settings import code_record, load, resolve

METHOD = '''
raise RuntimeError("this module must be read, never imported")
import torch
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal
from dfq.settings import Bound, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from ._base import Base, helper

Reduction = Literal["mean", "max"]

@dataclass(frozen=True)
class Method(Base):
    """A method."""
    family: ClassVar[str] = "generator"
    iterations: PositiveInt = 500  # steps of Adam
    warmup: NonNegativeInt = 0
    lr: PositiveFloat = 0.1  # step size; "#" is no comment here
    weight: NonNegativeFloat = 1.0
    dropout: Fraction = 0.5
    num_bits: Annotated[int, Bound(at_least=2, at_most=8)] = 4
    reduction: Reduction = "mean"
    mode: Literal["a", 3, None] = "a"
    limit: int | None = None
    name: str = "x"
    size: tuple[int, int] = (8, 8)
    widths: tuple[PositiveInt, ...] = (1,)
    flags: list[bool] = field(default_factory=list)
    anything: Any = None
    mapping: dict[str, int] = field(default_factory=dict)
    network: torch.nn.Module | None = None
    cache: int = field(init=False, default=0)

def function(teacher, batch, *, steps: PositiveInt = 1, name: str):
    return steps

def plain(path: str, scale: float = 1.0):
    return path

def open_ended(path: str, **kwargs):
    return path

class Old:
    def __init__(self, width: PositiveInt, depth: int = 3):
        self.width = width
'''

BASE = """
from dataclasses import dataclass
from dfq.settings import PositiveInt

@dataclass(frozen=True)
class Base:
    batch_size: PositiveInt = 32  # samples at a time

def helper(count: PositiveInt = 1): ...
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "methods_under_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('parents must not be imported')")
    (folder / "method.py").write_text(METHOD)
    (folder / "_base.py").write_text(BASE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "methods_under_test.method"


def test_signature_reads_names_types_defaults_and_comments_of_a_dataclass(package):
    parameters = source.signature(f"{package}.Method")
    assert list(parameters)[:3] == ["batch_size", "iterations", "warmup"]
    assert parameters["batch_size"].doc == "samples at a time"
    assert parameters["iterations"] == source.Parameter("PositiveInt", 500, False, "steps of Adam", package)
    assert parameters["lr"].doc == 'step size; "#" is no comment here'
    assert parameters["flags"].default is ... and not parameters["flags"].required
    assert "cache" not in parameters and "family" not in parameters


def test_signature_of_functions_classes_and_the_unreadable(package):
    assert list(source.signature(f"{package}.function")) == [
        "steps",
        "name",
    ]  # keyword-only arguments are the settings
    assert source.signature(f"{package}.function")["name"].required
    assert list(source.signature(f"{package}.plain")) == ["path", "scale"]
    assert "**" in source.signature(f"{package}.open_ended")
    assert list(source.signature(f"{package}.Old")) == ["width", "depth"]
    assert list(source.signature(f"{package}.helper")) == ["count"]  # through an import
    assert source.signature("math.sqrt") is None
    assert source.signature(f"{package}.nothing") is None
    assert source.signature("no_such_package.module.Name") is None


GOOD = [
    {"iterations": 1},
    {"lr": 1},
    {"dropout": 1.0},
    {"num_bits": 8},
    {"reduction": "max"},
    {"mode": 3},
    {"mode": None},
    {"limit": None},
    {"size": [1, 2]},
    {"widths": (3, 4)},
    {"flags": [True]},
    {"anything": {"a": 1}},
    {"mapping": {"a": 1}},
    {"network": "anything: its type is not of the vocabulary"},
    {"batch_size": 1},
]
BAD = [
    ("iterations", "many", "a whole number >= 1"),
    ("iterations", 0.5, "a whole number >= 1"),
    ("iterations", 0, "a whole number >= 1"),
    ("iterations", True, "a whole number >= 1"),
    ("iterations", None, "a whole number >= 1"),
    ("batch_size", -1, "a whole number >= 1"),
    ("warmup", -1, "a whole number >= 0"),
    ("lr", 0, "a number > 0"),
    ("lr", "0.1", "a number > 0"),
    ("lr", float("nan"), "a number > 0"),
    ("weight", -0.1, "a number >= 0"),
    ("dropout", 1.5, "a number from 0 to 1"),
    ("num_bits", 9, "a whole number from 2 to 8"),
    ("reduction", "sum", "mean | max"),
    ("mode", True, "a | 3 | null"),
    ("limit", "none", "a whole number | null"),
    ("name", 3, "text"),
    ("size", [1], "a list of 2"),
    ("size", "12", "a list of 2"),
    ("widths", [1, 0], "each x a whole number >= 1"),
    ("flags", [1], "each x true | false"),
    ("mapping", [1], "a mapping"),
]


@pytest.mark.parametrize("given", GOOD, ids=str)
def test_check_takes_what_the_annotation_allows(package, given):
    settings.check({"_target_": f"{package}.Method", **given}, "generator")


@pytest.mark.parametrize("key, value, allowed", BAD, ids=str)
def test_check_refuses_in_one_line_that_says_what_is_allowed(package, key, value, allowed):
    with pytest.raises(UserError) as caught:
        settings.check({"_target_": f"{package}.Method", key: value}, "generator")
    assert caught.value.got.startswith(f"got generator.{key}=")
    assert allowed in caught.value.allowed
    assert "\n" not in str(caught.value)


def test_check_names_the_unknown_and_the_missing(package):
    with pytest.raises(
        UserError,
        match=r"got generator.iteration=5; allowed: generator.batch_size, .*; did you mean 'generator.iterations'",
    ):
        settings.check({"_target_": f"{package}.Method", "iteration": 5}, "generator")
    with pytest.raises(UserError, match=r"got no task.name; allowed: text; give task.name=..."):
        settings.check({"_target_": f"{package}.function", "steps": 2}, "task")
    with pytest.raises(UserError, match=r"got no task.name"):
        settings.check({"_target_": f"{package}.function", "name": "???"}, "task")
    settings.check({"_target_": f"{package}.open_ended", "path": "p", "what": "ever"}, "task")
    with pytest.raises(UserError, match=r"got task.inner.depth='x'"):
        inner = {"_target_": f"{package}.Old", "width": 1, "depth": "x"}
        settings.check({"_target_": f"{package}.open_ended", "path": "p", "inner": inner}, "task")


def test_check_imports_nothing(package):
    code = f"""
        import sys
        from dfq import settings, source
        settings.check({{"_target_": "{package}.Method", "lr": 0.1}}, "generator")
        settings.check({{"_target_": "torch.optim.Adam", "params": [], "lr": 0.1}}, "optimizer")
        assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "numpy", "methods_under_test")]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@dataclass(frozen=True)
class Inner:
    scale: float = 1.0


@dataclass(frozen=True)
class Outer:
    size: tuple[int, ...] = (3, 32, 32)
    lr: settings.PositiveFloat = 0.1
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.lr > 10:
            raise UserError(f"got lr={self.lr}", "at most 10")


def add(a, *, b: int = 1):
    return a + b


def test_build_converts_nests_and_hands_over_run_time_arguments():
    here = __name__
    outer = settings.build(
        {"_target_": f"{here}.Outer", "size": [1, 8, 8], "lr": 1, "inner": {"_target_": f"{here}.Inner", "scale": 2}}
    )
    assert outer == Outer(size=(1, 8, 8), lr=1.0, inner=Inner(2.0))
    assert isinstance(outer.lr, float)  # lr=1 and lr=1.0 are one setting and have one hash
    assert settings.build({"_target_": f"{here}.add", "b": 5}, "task", a=1) == 6
    assert settings.build(settings.to_config(outer)) == outer


def test_to_config_is_plain():
    assert settings.to_config(Outer()) == {
        "_target_": f"{__name__}.Outer",
        "size": [3, 32, 32],
        "lr": 0.1,
        "inner": {"_target_": f"{__name__}.Inner", "scale": 1.0},
    }
    assert settings.to_config(add) == {"_target_": f"{__name__}.add"}


@pytest.mark.parametrize(
    "target, message",
    [
        ("os.system", "nothing of Python's standard library"),
        ("builtins.eval", "nothing of Python's standard library"),
        ("no_such_package.Name", "no module named 'no_such_package' was found"),
        ("dfq.scheme.Schema", "did you mean 'Scheme'"),
        ("dfq.no_such_module.Name", "got generator._target_='dfq.no_such_module.Name'"),
        ("Name", "allowed: package.module.Name"),
        ("a b.c", "allowed: package.module.Name"),
        (3, "allowed: package.module.Name"),
    ],
)
def test_build_refuses_targets(target, message):
    with pytest.raises(UserError) as caught:
        settings.build({"_target_": target}, "generator")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_found_by_the_method_itself_stays_a_user_error():
    with pytest.raises(UserError, match="at most 10"):
        settings.build({"_target_": f"{__name__}.Outer", "lr": 11})


def test_choices_load_and_resolve():
    assert "w4a4" in settings.choices("scheme")
    assert settings.load("scheme", "w4a4")["weight"]["num_bits"] == 4
    with pytest.raises(UserError, match=r"got scheme=w4a44; allowed: .* \| w2a4 \| .*; did you mean 'w4a4'"):
        settings.load("scheme", "w4a44")
    method = Outer()
    assert settings.resolve("generator", method) is method
    with pytest.raises(UserError, match="got generator=Outer"):
        settings.resolve("generator", method, lr=1)
    assert settings.resolve("generator", {"_target_": f"{__name__}.Outer"}, lr=2) == Outer(lr=2.0)


def test_yaml_numbers_are_read_as_omegaconf_reads_them(tmp_path, monkeypatch):
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "name.yaml").write_text("defaults: [a]\nlr: 1e-3\nsteps: 10\nname: 1e-3x\n")
    monkeypatch.setattr(settings, "search_path", [*settings.search_path, tmp_path])
    assert settings.load("family", "name") == {"lr": 0.001, "steps": 10, "name": "1e-3x"}


def written(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package of a user with an algorithm, what it imports in several ways, and what it does not."""
    monkeypatch.syspath_prepend(str(tmp_path))
    method = """
        from typing import TYPE_CHECKING
        from dfq.algorithms.yaqa import YAQA
        from . import beside
        if TYPE_CHECKING:
            from coded.types import Kind
        class Mine(YAQA):
            def run(self, work):
                from coded.inside import CONSTANT
    """
    written(tmp_path / "coded", method=textwrap.dedent(method), beside="import coded.further", further="A = 1")
    written(tmp_path / "coded", inside="CONSTANT = 1", types="Kind = int", unrelated="B = 1", __init__="")
    return tmp_path / "coded"


def code_of_mine() -> str:
    source._reached.cache_clear()  # as in another process
    return source.code_of(["coded.method.Mine"])


@pytest.mark.parametrize("name", ["method", "beside", "further", "inside"])
def test_code_that_a_method_runs_decides_its_hash(project, name):
    before = code_of_mine()
    assert code_of_mine() == before
    (project / f"{name}.py").write_text((project / f"{name}.py").read_text() + "\n# edited\n")
    assert code_of_mine() != before


@pytest.mark.parametrize("name", ["types", "unrelated"])
def test_code_that_a_method_does_not_run_does_not(project, name):
    before = code_of_mine()
    (project / f"{name}.py").write_text("C = 2")
    assert code_of_mine() == before


def test_the_code_of_a_method_is_followed_into_dfq_and_no_further():
    reached = {row.split("\0")[0] for row in source._reached(("dfq.algorithms.yaqa",))}
    assert {"dfq.algorithms._likelihood", "dfq.modules", "dfq.student"} <= reached
    assert not {"dfq.report", "dfq.cli", "dfq.pipeline", "dfq.algorithms.brecq", "torch"} & reached


def test_what_a_method_takes_by_name_is_in_its_record(monkeypatch):
    steps = resolve("algorithm", "sequence", steps=["equalization", "e2e_rounding"])
    before = code_record(steps)
    assert before == code_record(resolve("algorithm", "sequence", steps=["equalization", "e2e_rounding"]))
    assert before != code_record(resolve("algorithm", "sequence", steps=["equalization", "yaqa"]))
    changed = load("algorithm", "distillation") | {"dampen": 0.5}  # of the part of a part
    known = {"distillation": changed}
    monkeypatch.setattr(settings, "load", lambda family, name: known.get(name) or load(family, name))
    assert code_record(steps) != before
