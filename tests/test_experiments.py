"""Every yaml of conf/experiment: it composes, names only what exists, and says what it cost and what came of it."""

import re
import sys
import types
import zipfile
from pathlib import Path

import pytest

import dfq
from dfq import settings
from dfq.cli import main

ROOT = Path(dfq.__file__).parents[1]
NAMES = settings.choices("experiment")
FACTS = ("command", "device", "minutes", "measured", "published")


def content(name):
    return (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The configurations that ``dfq.api`` would be called with, in a folder with what the experiments ask for."""
    stub = types.ModuleType("dfq.api")
    found = []
    stub.command = lambda name, config: found.append(config)
    monkeypatch.setitem(sys.modules, "dfq.api", stub)
    monkeypatch.setattr(dfq, "api", stub, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def load(): ...\n")
    Path("labels.json").write_text("{}")
    Path("network").mkdir()
    Path("network/config.json").write_text("{}")
    Path("network/model.safetensors").write_bytes(b"")
    with zipfile.ZipFile("test.npz", "w") as archive:
        for key in ("images", "labels", "input_ids"):
            archive.writestr(f"{key}.npy", b"")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_composes_and_names_only_what_exists(name, calls, capsys):
    chosen = settings.read_yaml(settings.yaml_path("experiment", name))["defaults"]
    teacher = next(entry["override /teacher"] for entry in chosen if "override /teacher" in entry)
    if teacher == "huggingface":
        pytest.importorskip("transformers")
    network = {"factory": "teacher.factory=mine:load", "huggingface": "teacher.name=network"}[teacher]
    pictures = {"override /evaluation": "coco"} in chosen
    labelled = (
        ["evaluation.images=.", "evaluation.annotations=labels.json"] if pictures else ["evaluation.path=test.npz"]
    )
    status = main(["run", f"experiment={name}", network, *labelled])
    assert (status, capsys.readouterr().err) == (0, "")
    [config] = calls
    for step in config["algorithm"].get("steps", []):
        if isinstance(step, str):
            settings.yaml_path("algorithm", step)
        else:
            settings.check(step, "algorithm.steps")
    for entry in chosen:
        for key, choice in entry.items():
            family = key.removeprefix("override /").partition("@")[0]
            assert config[key.rpartition("@")[2].removeprefix("override /")]
            settings.yaml_path(family, choice)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_of_an_experiment(name):
    lines = [line for line in content(name).splitlines() if line.startswith("#")]
    facts = dict(re.fullmatch(r"#   (\w+) +(.*)", line).groups() for line in lines[2:])
    assert tuple(facts) == FACTS and all(facts.values())
    assert facts["command"].startswith(f"dfq run experiment={name} ")
    if page := re.search(r"docs/\w+\.md", facts["measured"]):
        row = (ROOT / page[0]).read_text()
        for figure in re.findall(r"\d\.\d{3,4}", facts["measured"]):
            assert figure in row, "a figure that its page does not have"
