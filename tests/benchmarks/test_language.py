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


def test_figures_of_other_settings_are_not_remembered(monkeypatch):
    asked = ("w4a16_g32", "distillation", "random", 512, 256, 0)
    key = LANGUAGE.key_of(*asked)
    assert key == loaded().key_of(*asked) and key.startswith("w4a16_g32 distillation random 512x256 0 ")
    others = [("w2a16_g32", *asked[1:]), (*asked[:1], "gptq", *asked[2:]), (*asked[:3], 64, 256, 0), (*asked[:5], 1)]
    with monkeypatch.context() as patch:
        patch.setitem(LANGUAGE.METHODS, "distillation", {**LANGUAGE.DISTILL, "weight_lr": 0.03})
        keys = [LANGUAGE.key_of(*asked)]
    with monkeypatch.context() as patch:
        patch.setitem(LANGUAGE.SCHEMES, "w4a16_g32", LANGUAGE.SCHEMES["w2a16_g32"])
        keys.append(LANGUAGE.key_of(*asked))
    keys += [LANGUAGE.key_of(*other) for other in others]
    assert len({key, *keys}) == 7


def test_texts_are_written_before_the_clock(monkeypatch, tmp_path, capsys):
    """Measured once; minutes are those of quantization and evaluation alone."""
    clock, quantized, written = [0.0], [], []

    def texts(*_args):
        clock[0] += 0.0 if written else 3600.0  # there is a dataset from then on
        written.append(_args)
        return dict.fromkeys(LANGUAGE.SOURCES, "texts")

    def quantize(_teacher, dataset, _scheme, **settings):
        clock[0] += 60.0
        quantized.append((dataset, settings["algorithm"]))
        return "student"

    def evaluate(_teacher, student, *_args, **_settings):
        return {"teacher" if student is None else "student": {"perplexity": 3.0}}

    (tmp_path / "data").mkdir()
    (tmp_path / "data/stories_tinystories.json").write_text('{"ids": [[1, 2], [3]]}')
    monkeypatch.setattr(LANGUAGE, "texts", texts)
    monkeypatch.setattr(LANGUAGE.time, "perf_counter", lambda: clock[0])
    fake = type("dfq", (), {"load_teacher": lambda *a, **k: None, "quantize": quantize, "evaluate": evaluate})
    monkeypatch.setattr(LANGUAGE, "dfq", fake)
    asked = (tmp_path, tmp_path / "work", ["w4a16_g32"], ["gptq"], ["its own"], 2, 8, 4, "cpu")
    LANGUAGE.perplexities(*asked)
    assert "1.0 min" in capsys.readouterr().out and quantized == [("texts", "gptq")] * 2
    LANGUAGE.perplexities(*asked)
    assert "1.0 min" in capsys.readouterr().out and len(quantized) == 2
