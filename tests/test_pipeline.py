"""The five arrows together: through the command line in this process, and as functions."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dfq
from dfq.cli import main
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.report import validate

QUICK = ["num_samples=48", "generator.batch_size=16", "generator.iterations=3"]
TRAIN = ["algorithm.max_steps=4", "algorithm.checks=2", "algorithm.batch_size=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which one whole run took place."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("run")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["run", *QUICK, *TRAIN, "name=first"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(finished, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def only(pattern: str) -> Path:
    found = sorted(Path().glob(pattern))
    assert len(found) == 1, found
    return found[0]


def report_of(name: str) -> tuple[dict, dict]:
    folder = sorted(Path("outputs", name).glob("*"))[-1]
    return json.loads((folder / "report.json").read_text()), json.loads((folder / "details.json").read_text())


def test_a_run_leaves_a_report_with_three_yardsticks(here):
    report, details = report_of("first")
    validate(report)
    assert report["teacher"]["metrics"]["top1"] >= 0.98
    assert report["dataset"]["provenance"] == {"pixels": False, "labels": False}
    assert report["artifact"]["format"] == "onnx_qdq" and report["artifact"]["parity"]["argmax_agreement"] == 1
    assert [layer["weight_bits"] for layer in report["fidelity"]["layers"]] == [4] * 10
    assert [row["row"] for row in details["references"]] == [
        "float teacher",
        "synthetic (zeroq)",
        "Gaussian noise",
        "real data",
    ]
    assert all(set(layer) == {"name", "synthetic", "gaussian", "real"} for layer in details["batch_norm_match"])
    assert (sorted(Path("outputs/first").glob("*"))[-1] / "report.html").stat().st_size > 10_000


def test_the_real_images_are_marked_as_what_they_are(here):
    real = SyntheticDataset(only("outputs/datasets/digits_real_*"))
    assert real.provenance["pixels"] is True


def test_the_same_command_again_makes_nothing_anew(here, capfd):
    before = {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*") if path.is_file()}
    assert main(["run", *QUICK, *TRAIN, "name=second"]) == 0
    said = capfd.readouterr().err
    assert said.count("are there already") == 2 and said.count("the student is there already") == 3
    assert "the artifact is there already" in said and not re.search("^(distill|calibrate|evaluate)", said, re.M)
    after = {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*") if path.is_file()}
    new = {path for path in after if path not in before and not path.is_relative_to("outputs/second")}
    assert not new and all(after[path] == time for path, time in before.items())
    first, second = report_of("first")[0], report_of("second")[0]
    for part in ("teacher", "dataset", "student", "fidelity", "artifact"):
        assert first[part] == second[part]


@pytest.mark.parametrize(
    "change", ["seed=1", "scheme=w8a8", "algorithm=round_to_nearest", "weight_quantizer=min_max", "generator=gaussian"]
)
def test_other_settings_make_another_student(here, change, monkeypatch):
    monkeypatch.setattr("dfq.pipeline.export", lambda *_: None)  # three quarters of the time of a run
    students = set(Path("outputs/students").iterdir())
    changed = [*QUICK, *([] if "algorithm" in change else TRAIN), change, "references=[]"]
    if change == "generator=gaussian":
        changed.remove("generator.iterations=3")
        changed.append("seed=5")  # the Gaussian reference row of seed 0 is the same student
    assert main(["run", *changed]) == 0
    assert len(set(Path("outputs/students").iterdir()) - students) == 1


def test_each_arrow_alone_gives_what_the_run_gave(here, capfd):
    dataset, student = only("outputs/datasets/digits_zeroq_*"), only_student_of("zeroq")
    assert main(["generate", *QUICK, "dataset_dir=made/data"]) == 0
    assert SyntheticDataset("made/data").sha256 == SyntheticDataset(dataset).sha256
    assert main(["quantize", "dataset_dir=made/data", "student_dir=made/student", *TRAIN]) == 0
    assert (Path("made/student/student.safetensors")).read_bytes() == (student / "student.safetensors").read_bytes()
    assert not list(Path("made/student").glob("work_*"))
    assert main(["export", "student_dir=made/student", "artifact_path=made/student.onnx"]) == 0
    assert main(["evaluate", "student_dir=made/student", "name=alone"]) == 0
    assert report_of("alone")[0]["student"]["metrics"] == report_of("first")[0]["student"]["metrics"]
    assert report_of("alone")[0]["artifact"] is None
    for path in ("made/data", "made/student", "made/student.onnx", "made"):
        assert main(["inspect", path]) == 0
    page = sorted(Path("outputs/alone").glob("*"))[-1]
    (page / "report.html").unlink()
    assert main(["report", f"output_dir={page}"]) == 0 and (page / "report.html").exists()
    assert "nothing: no pixels, no labels" in capfd.readouterr().out


def test_a_student_of_other_code_is_made_anew_or_kept_where_its_folder_was_asked_for(here, monkeypatch, capfd):
    student = only_student_of("zeroq")
    data = only("outputs/datasets/digits_zeroq_*")
    monkeypatch.setattr("dfq.pipeline.code_record", lambda *_: "edited since then")
    students = set(Path("outputs/students").iterdir())
    assert main(["quantize", f"dataset_dir={data}", *TRAIN]) == 0
    assert len(set(Path("outputs/students").iterdir()) - students) == 1
    assert "already" not in capfd.readouterr().err
    before = (student / "student.safetensors").stat().st_mtime_ns
    assert main(["quantize", f"dataset_dir={data}", f"student_dir={student}", *TRAIN]) == 0
    said = capfd.readouterr().err
    assert f"in {student}, made by other code of dfq or of its algorithm: remove the folder to have it" in said
    assert (student / "student.safetensors").stat().st_mtime_ns == before


def only_student_of(generator: str) -> Path:
    found = []
    for folder in Path("outputs/students").iterdir():
        made_from = json.loads((folder / "student.json").read_text())["settings"]["dataset"]["path"]
        found += [folder] if f"_{generator}_" in made_from else []
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["generate", *QUICK, "dataset_dir={data}", "generator.iterations=4"],
            "dfq: got dataset_dir={data}, a dataset made with other settings (generator.iterations: there 3, here 4); "
            "allowed: an empty or new folder, or the same settings; choose another dataset_dir",
        ),
        (
            ["generate", "generator.batch_size=16", "generator.iterations=3", "num_samples=20", "dataset_dir={data}"],
            "dfq: got num_samples=20 and dataset_dir={data}, which holds 48; allowed: 48 or more; "
            "choose another dataset_dir for fewer",
        ),
        (
            ["quantize", "dataset_dir={data}", "student_dir={student}", "scheme=w3a3", *TRAIN],
            "dfq: got student_dir={student}, a student made with other settings (scheme.activation.num_bits: there 4, "
            "here 3); allowed: an empty or new folder, or the same settings; choose another student_dir",
        ),
        (
            ["export", "student_dir={student}", "artifact_path=mine.onnx"],
            "dfq: got artifact_path=mine.onnx, a file that dfq did not make; allowed: a new file; "
            "choose another artifact_path",
        ),
        (
            ["quantize", "dataset_dir={broken}", *TRAIN],
            "dfq: got {broken}/shards/000001.safetensors, whose content does not match its checksum; "
            "run the same generate command again to repair it",
        ),
    ],
    ids=["other dataset settings", "fewer samples", "other student settings", "a file of the user's", "broken shard"],
)
def test_what_is_there_is_never_overwritten_by_something_else(here, arguments, line, capfd):
    data, student, broken = only("outputs/datasets/digits_zeroq_*"), only_student_of("zeroq"), Path("broken")
    Path("mine.onnx").write_bytes(b"mine")
    shutil.copytree(data, broken)
    shard = broken / "shards" / "000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"\0\0\0\1")
    names = {"data": data, "student": student, "broken": broken}
    before = sorted(
        (path, path.stat().st_mtime_ns) for path in [*data.rglob("*"), *student.rglob("*"), Path("mine.onnx")]
    )
    assert main([argument.format(**names) for argument in arguments]) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1] == line.format(**names)
    assert before == sorted(
        (p, p.stat().st_mtime_ns) for p in [*data.rglob("*"), *student.rglob("*"), Path("mine.onnx")]
    )


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_killed_generation_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch):
    """kill -9 in the middle, the same command again: the same samples as without the kill."""
    command = [sys.executable, "-m", "dfq", "generate", "num_samples=90", "generator.batch_size=16"]
    command += ["generator.iterations=30"] if kind == "images" else writing(tmp_path / "network")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    process = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/outputs/datasets/*/shards/000001.json")):
        assert time.monotonic() < deadline and process.poll() is None, "it was done before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [data] = tmp_path.glob("killed/outputs/datasets/*")
    assert 2 <= len(list((data / "shards").glob("*.json"))) < 6
    for name in ("killed", "whole"):  # here: torch is there already
        monkeypatch.chdir(tmp_path / name)
        assert main(command[3:]) == 0
    [whole] = tmp_path.glob("whole/outputs/datasets/*")
    assert len(SyntheticDataset(data)) == len(SyntheticDataset(whole)) == 90
    for shard in sorted((whole / "shards").glob("*.safetensors")):
        assert shard.read_bytes() == (data / "shards" / shard.name).read_bytes()


def writing(folder):
    """What is told of a language model in ``folder``, which is made there, and of text with gates and a cache."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text = ["at_end=pad", "min_tokens=20", "max_repetition=0.3", "cache_teacher=8"]
    teacher = ["teacher=huggingface", f"teacher.name={folder}", "teacher.length=128", "device=cpu"]
    return [*teacher, "generator=self_generation", *(f"generator.{setting}" for setting in text)]


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4)
    )
    teacher = dfq.load_teacher(network, input_size=(3, 8, 8), mean=[0.5] * 3, std=[0.5] * 3)
    dataset = dfq.generate(teacher, generator="zeroq", num_samples=24, dataset_dir="data", iterations=3)
    student = dfq.quantize(teacher, dataset, scheme="w4a4", policy="edges_8bit", algorithm="distillation", max_steps=4)
    assert [w.num_bits for w, _ in student.swap.layers.values()] == [8, 8] and student.scheme.policy == "edges_8bit"
    student.save("student")
    loaded = dfq.load_student("student", teacher=teacher)
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(loaded(images), student(images))
    labels = teacher(images).argmax(1)
    found = dfq.evaluate(teacher, loaded, evaluation=[(images, labels)], dataset=dataset)
    assert found["teacher"]["top1"] == 1
    assert found["student"]["top1"] == pytest.approx(float((student(images).argmax(1) == labels).float().mean()))
    assert dfq.export(student, "student.onnx", teacher=teacher, dataset="data")["parity"]["argmax_agreement"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "student", "student.onnx", "student.onnx.json"]
    with pytest.raises(UserError, match="a network handed over in Python that can't be rebuilt from here"):
        dfq.load_student("student")


def test_a_user_s_own_network_and_images(tmp_path, monkeypatch):
    """teacher=factory with a checkpoint, evaluation=arrays, and the student's folder alone afterwards."""
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    Path("mynet.py").write_text(
        "from torch import nn\n"
        "def build(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(width * 36, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import mynet

    network = mynet.build(6)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}}, "w.pt")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8), dtype=np.uint8)
    normalized = (torch.from_numpy(images)[:, None].float() / 255 - 0.4) / 0.2
    np.savez("test.npz", images=images, labels=network.eval()(normalized).argmax(1).numpy())
    mine = ["teacher=factory", "teacher.factory=mynet:build", "teacher.kwargs.width=6", "teacher.checkpoint=w.pt"]
    mine += ["teacher.input_size=[1,8,8]", "teacher.mean=[0.4]", "teacher.std=[0.2]"]
    test_images = ["evaluation=arrays", "evaluation.path=test.npz"]
    assert main(["run", *mine, *test_images, *QUICK, *TRAIN, "scheme=w8a8", "student_dir=student", "name=mine"]) == 0
    report, details = report_of("mine")
    assert report["teacher"]["metrics"]["top1"] == 1
    assert [row["row"] for row in details["references"]] == ["float teacher", "synthetic (zeroq)", "Gaussian noise"]
    assert any("evaluation.reference_path" in note for note in details["notes"])
    assert main(["evaluate", "student_dir=student", *test_images, "name=later"]) == 0
    assert report_of("later")[0]["student"]["metrics"] == report["student"]["metrics"]


def test_a_student_with_a_network_of_its_own(tmp_path, monkeypatch, capsys):
    """algorithm.student_network through every command."""
    monkeypatch.chdir(tmp_path)
    Path("narrow.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU(),\n"
        "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    narrow = ["algorithm.student_network=narrow:build", *TRAIN, "algorithm.num_calibration_samples=16"]
    data = ["generator=gaussian", "num_samples=32", "dataset_dir=data"]
    places = ["student_dir=student", "exporter=pt2", "artifact_path=a.pt2", "references=[gaussian]", "name=mine"]
    assert main(["run", *data, *narrow, *places]) == 0
    report, details = report_of("mine")
    assert details["network"] == "narrow:build"
    assert report["student"]["size_bytes"] < report["teacher"]["size_bytes"] / 20
    assert [layer["sqnr_db"] for layer in report["fidelity"]["layers"]] == [None, None]
    assert 0 <= report["fidelity"]["agreement"] <= 1 and report["fidelity"]["kl"] > 0
    assert "narrow:build" in only("outputs/mine/*/report.html").read_text()
    assert "network  narrow:build, not the teacher's" in capsys.readouterr().out
    manifest = json.loads(Path("student/student.json").read_text())
    assert manifest["teacher"]["name"] == "digits" and manifest["network"] == "narrow:build"
    assert main(["evaluate", "student_dir=student", "evaluation=none", "name=later"]) == 0
    assert report_of("later")[0]["fidelity"] == report["fidelity"]
    assert main(["export", "student_dir=student", "exporter=pt2", "artifact_path=b.pt2"]) == 0
    assert Path("b.pt2.json").exists()
    capsys.readouterr()
    assert main(["inspect", "student"]) == 0
    assert "narrow:build" in capsys.readouterr().out
    assert main(["run", *data, "algorithm.student_network=narrow:built"]) == 2
    assert capsys.readouterr().err.startswith(
        "dfq: got algorithm.student_network=narrow:built, and narrow has no built; allowed: a function of that module"
    )
    Path("narrow.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(4, 2)\n")
    sys.modules.pop("narrow")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="the network that narrow:build builds, whose layers differ"):
        dfq.load_student("student")


def test_an_export_that_fails_costs_neither_student_nor_report(tmp_path, monkeypatch, capsys):
    """Hours of work, and a network that no file format takes."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_):
        raise UserError("got a network that can't be exported", "another one")

    monkeypatch.setattr("dfq.exporters.pt2.PT2.export", refuse)
    quick = [
        "generator=gaussian",
        "num_samples=32",
        "algorithm=round_to_nearest",
        "device=cpu",
        "references=[gaussian]",
    ]
    assert main(["run", *quick, "exporter=pt2", "name=mine"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("dfq: got a network that can't be exported; allowed: another one\n")
    report, details = report_of("mine")
    assert report["artifact"] is None and "top1" in report["student"]["metrics"]
    assert [row["role"] for row in details["references"]] == ["teacher", "student", "reference"]
    assert "nothing was exported: got a network" in only("outputs/mine/*/report.html").read_text().replace("&#39;", "'")
    assert not list(Path("outputs").glob("artifacts/*/*.pt2"))


def test_a_mistake_found_late_leaves_nothing_behind(tmp_path, monkeypatch):
    """A network that a generator or a scheme can do nothing with is only known once it is there."""
    monkeypatch.chdir(tmp_path)
    spec = {"input_size": (1, 8, 8), "mean": [0.5], "std": [0.5]}
    bare = dfq.load_teacher(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)), **spec)
    with pytest.raises(UserError, match="without batch norm"):
        dfq.generate(bare, "zeroq", num_samples=8, dataset_dir="data")
    assert not list(tmp_path.iterdir())
    dataset = dfq.generate(bare, "gaussian", num_samples=8, dataset_dir="data")  # the same folder serves
    nothing = dfq.load_teacher(torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten()), **spec)
    with pytest.raises(UserError, match="without a layer to quantize"):
        dfq.quantize(nothing, dataset, algorithm="round_to_nearest", student_dir="student")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_never_got_a_sample_serves_other_settings(tmp_path):
    teacher = dfq.load_teacher("digits", device="cpu")
    SyntheticDataset.create(tmp_path / "data", {"generator": "killed before its first sample"}, {"pixels": False})
    assert len(dfq.generate(teacher, "gaussian", num_samples=8, dataset_dir=tmp_path / "data")) == 8


def test_a_launcher_of_others_than_train_is_refused(monkeypatch, capsys):
    """Each would train on its own, all in one folder, and the first would wait for the others' noise."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", *QUICK]) == 2
    assert "got a launcher of 2 processes and a trainer of 1; allowed: trainer=ddp trainer.devices=N" in (
        capsys.readouterr().err
    )


def test_convolutions_add_up_in_a_fixed_order_while_something_is_made(tmp_path, monkeypatch):
    """A GPU needs it for the same bits (tests/test_gpu.py). The process's own choice is put back, after errors too."""
    from dfq.algorithms.round_to_nearest import RoundToNearest
    from dfq.generators.gaussian import Gaussian

    seen = []

    def watched(kind, name, fails=False):
        whole = getattr(kind, name)

        def method(*args, **kwargs):
            seen.append(torch.backends.cudnn.deterministic)
            if fails:
                raise UserError("stopped")
            return whole(*args, **kwargs)

        monkeypatch.setattr(kind, name, method)

    teacher = dfq.load_teacher("digits", device="cpu")
    assert not torch.backends.cudnn.deterministic
    watched(Gaussian, "sample")
    data = dfq.generate(teacher, "gaussian", 8, tmp_path / "data")
    assert seen == [True] and not torch.backends.cudnn.deterministic
    watched(RoundToNearest, "quantize", fails=True)
    with pytest.raises(UserError, match="stopped"):
        dfq.quantize(teacher, data, algorithm="round_to_nearest")
    assert seen == [True, True] and not torch.backends.cudnn.deterministic
