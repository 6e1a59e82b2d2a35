"""The package as a whole: what ``import dfq`` gives and costs, and that nothing lies outside the wheel."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dfq

ROOT = Path(dfq.__file__).parents[1]
WITHOUT_TORCH = ["dfq", "dfq.errors", "dfq.scheme", "dfq.settings", "dfq.cli"]
PACKAGES = ["dfq", *(module.name for module in pkgutil.walk_packages(dfq.__path__, "dfq.") if module.ispkg)]


@pytest.mark.parametrize("name", dfq.__all__)
def test_every_public_name_is_there(name):
    assert getattr(dfq, name) is not None
    assert name in dir(dfq)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dfq' has no attribute 'genrate'"):
        dfq.genrate  # noqa: B018


def test_packages_and_the_command_line_import_no_torch():
    code = f"""
import importlib, sys
for name in {WITHOUT_TORCH + PACKAGES}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_python_file_lies_in_a_package():
    """A folder without ``__init__.py`` works in a checkout and is missing from the wheel."""
    folders = {path.parent for path in (ROOT / "dfq").rglob("*.py")}
    folders |= {ROOT / "dfq" / path.relative_to(ROOT).parent for path in (ROOT / "generators").rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= set(PACKAGES)


def test_the_folders_at_the_top_are_the_packages():
    for name in ("generators", "conf"):
        assert Path(importlib.import_module(f"dfq.{name}").__file__).resolve().parent == ROOT / name
