"""benchmarks/language.py: settings of every method go together, and what is remembered is what was asked for."""

import importlib.util
from pathlib import Path

import pytest
from conftest import language

from dfq.settings import resolve

PATH = Path(__file__).parents[2] / "benchmarks" / "language.py"


def loaded():
    spec = importlib.util.spec_from_file_location("benchmarks_language", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LANGUAGE = loaded()


@pytest.mark.parametrize("name", LANGUAGE.METHODS)
def test_settings_of_each_method_go_together(name):
    settings = dict(LANGUAGE.METHODS[name])
    resolve("quantizer", settings.pop("weight_quantizer", "mse"))
    algorithm = resolve("algorithm", settings.pop("algorithm"), **settings)
    teacher = language()
    for step in (algorithm, *(resolve("algorithm", step) for step in getattr(algorithm, "steps", ()))):
        if hasattr(step, "_check"):
            step._check(teacher)
