"""Distillation in several processes: the student of one process with the batch of all, saved once, by rank 0."""

import csv
import importlib.machinery
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import training_in_ranks as ranks
from launching import environment, launch
from torch.utils.data import Subset

from dfq.algorithms.distillation import Distillation
from dfq.algorithms.sequence import Sequence
from dfq.errors import UserError
from dfq.lightning.data import ShuffledOrder
from dfq.lightning.sharding import local_part, units
from dfq.lightning.trainer import SINGLE, Training
from dfq.pipeline import quantize
from dfq.quantizers.min_max import MinMax
from dfq.settings import choices, resolve
from dfq.student import Student

SCRIPT = str(Path(ranks.__file__))


def difference(mine, theirs, start):
    """Root mean square of what two students differ by, in units of how far training has moved them."""
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in mine)
    moved = sum(float((mine[name] - start[name]).square().sum()) for name in mine)
    return (apart / moved) ** 0.5


def test_presets():
    assert choices("trainer") == ["ddp", "ddp_spawn", "fsdp", "single"]
    assert resolve("trainer", "single") == SINGLE and SINGLE.recorded() == {} and SINGLE.is_default
    assert resolve("trainer", "ddp").recorded() == {"processes": 2}
    assert resolve("trainer", "fsdp", num_nodes=3).world_size == 6
    with pytest.raises(UserError, match=r"got trainer\.strategy=single with 2 processes; allowed: trainer=ddp"):
        Training(devices=2)


@pytest.mark.parametrize("total, world_size, batch", [(39, 2, 8), (40, 4, 3), (7, 2, 8), (64, 2, 16)])
def test_ranks_share_each_step_of_one_process_with_a_larger_batch(total, world_size, batch):
    samples = Subset(range(total), range(total))
    one = list(ShuffledOrder(samples, 5))
    orders = [ShuffledOrder(samples, 5, rank, world_size, batch) for rank in range(world_size)]
    parts = [list(order) for order in orders]
    assert [len(order) for order in orders] == [len(part) for part in parts]
    step = world_size * batch
    whole = total - total % step if total > step else total
    assert sorted(i for part in parts for i in part) == sorted(one[:whole]), "a sample is missing or comes twice"
    for start in range(0, whole, step):  # step by step the same samples
        taken = [i for part in parts for i in part[start // world_size : start // world_size + batch]]
        assert sorted(taken) == sorted(one[start : start + step][: len(taken)])


def test_fewer_samples_than_processes():
    with pytest.raises(UserError, match="got 2 samples to train on and 3 processes; allowed: 3 samples or more"):
        ShuffledOrder(Subset(range(2), range(2)), 0, 0, 3)


def test_units_of_a_language_model_and_parts_of_a_size():
    pytest.importorskip("transformers")
    module = ranks.llama().module
    assert units(module) == [module.model.embed_tokens, *module.model.layers, module.lm_head]
    weight, steps = torch.zeros(5, 3), torch.arange(5.0)[:, None]
    assert [local_part(steps, weight, rank, 2).flatten().tolist() for rank in (0, 1)] == [[0, 1, 2], [3, 4]]
    assert local_part(torch.ones(()), weight, 1, 2).shape == () and len(local_part(steps[:3], weight[:3], 3, 4)) == 0


@pytest.mark.parametrize(
    "strategy, kind",
    [
        ("ddp", "plain"),
        ("ddp_spawn", "plain"),
        pytest.param("ddp", "llama", marks=pytest.mark.slow),
        pytest.param("fsdp", "llama", marks=pytest.mark.slow),  # "cached" has the same network, and no teacher beside
        ("fsdp", "cached"),
    ],
)
def test_two_processes_train_as_one_with_twice_the_batch(strategy, kind, tmp_path):
    """Up to rounding: sums are taken in another order, and Adam makes much of a gradient that is nearly zero."""
    if kind != "plain":
        pytest.importorskip("transformers")
    still = {"max_steps": 1, "weight_lr": 1e-12, "step_lr": 1e-12, "bias_lr": 1e-12}
    alone, mine = ranks.train(tmp_path, "single", kind, 16)
    before, start = ranks.train(tmp_path / "start", "single", kind, 16, **still)
    path = tmp_path / f"{kind}_{strategy}"
    if strategy == "ddp_spawn":  # starts its processes itself, and they leave no files
        theirs = [ranks.train(tmp_path, strategy, kind, 8)[1]] * 2
    else:
        launch([SCRIPT, str(tmp_path), strategy, kind], 2, tmp_path)
        theirs = [torch.load(f"{path}_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert sorted(file.name for file in path.iterdir()) == ["student.json", "student.safetensors"]
    assert all(torch.equal(value, theirs[1][name]) for name, value in theirs[0].items()), "ranks differ"
    assert difference(mine, theirs[0], start) < (0.02 if strategy == "fsdp" else 1e-3)
    both = Student.load(path, ranks.teacher_of(kind))
    assert both.settings["processes"] == 2 and "processes" not in alone.settings
    data, teacher = ranks.dataset_of(tmp_path, kind), ranks.teacher_of(kind)
    held_out = data.samples()[data.split()[1]]
    with torch.no_grad():
        losses = [float(task_loss(teacher, student, held_out)) for student in (alone, both, before)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] < losses[2]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_and_started_again(killed, tmp_path):
    """In the middle of a distillation, behind a look: it goes on from there to the bits of an undisturbed one."""
    ranks.dataset_of(tmp_path, "plain")
    launch([SCRIPT, str(tmp_path), "ddp", "plain", "-1", "0"], 2, tmp_path)
    path = tmp_path / "plain_ddp"
    path.rename(tmp_path / "undisturbed")
    launch([SCRIPT, str(tmp_path), "ddp", "plain", str(killed), "4"], 2, tmp_path, all_succeed=False)
    [last] = path.glob("work_*/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3 and not (path / "student.json").exists()
    launch([SCRIPT, str(tmp_path), "ddp", "plain", "-1", "0"], 2, tmp_path)
    found = [Student.load(folder, ranks.teacher_of("plain")) for folder in (path, tmp_path / "undisturbed")]
    assert found[0].sha256 == found[1].sha256


@pytest.mark.slow
def test_the_command_line_starts_its_other_processes_and_none_is_left(tmp_path):
    """Once with an export that fails on rank 0; then to the end."""
    pytest.importorskip("onnxruntime")
    quick = ["num_samples=40", "generator.iterations=2", "generator.batch_size=20", "device=cpu"]
    train = ["algorithm.max_steps=4", "algorithm.checks=2", "algorithm.batch_size=8"]
    words = ["run", "trainer=ddp", "trainer.devices=2", *quick, *train, "references=[gaussian]"]
    mine = tmp_path / "mine.onnx"
    mine.write_text("the user's own")

    def run():
        """Its status and all that its processes have said: until the last of them has closed its end."""
        line = [sys.executable, "-m", "dfq", *words, "artifact_path=mine.onnx"]
        with subprocess.Popen(line, cwd=tmp_path, env=environment(), stdout=-1, stderr=-2, text=True) as process:
            try:
                said = process.communicate(timeout=900)[0]
            finally:
                process.kill()
        return process.returncode, said

    status, said = run()
    assert status == 2 and "got artifact_path=mine.onnx, a file that dfq did not make" in said, said
    mine.unlink()
    status, said = run()
    assert status == 0, said
    found = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/*/details.json")]
    assert len(found) == 2, "a run whose export fails has a report too"
    for details in found:
        assert [row["role"] for row in details["references"]] == ["teacher", "student", "reference"]
    students = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/students/*/student.json")]
    assert [student["settings"]["processes"] for student in students] == [2, 2]


def task_loss(teacher, student, samples):
    task = resolve("task", teacher.task)
    return task.distillation_loss(task.raw_outputs(student, samples), task.raw_outputs(teacher, samples))


# ------------------------------------------------------------------------------------------------ loggers


def test_a_logger_is_told_of_losses_and_looks(tmp_path):
    training = SINGLE.with_logger(resolve("logger", "csv", folder=str(tmp_path / "run")))
    assert training == SINGLE and not training.is_default and SINGLE.is_default
    assert SINGLE.with_logger(resolve("logger", "none")).is_default
    teacher, data = ranks.teacher_of("plain"), ranks.dataset_of(tmp_path, "plain")
    algorithm = Distillation(**{**ranks.SETTINGS, "max_steps": 20, "batch_size": 16})
    quantizers = MinMax(), MinMax()
    told, _ = quantize(teacher, data, ranks.W3A8, algorithm, *quantizers, 0, tmp_path / "told", training)
    rows = (tmp_path / "run" / "distillation" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"loss", "held_out_loss", "held_out_agreement"} <= set(rows[0].split(",")) and len(rows) > 2
    again, _ = quantize(teacher, data, ranks.W3A8, algorithm, *quantizers, 0, tmp_path / "again")
    assert told.sha256 == again.sha256 and told.settings == again.settings, "a logger has changed the student"


def steps_of(path):
    with open(path, newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_each_fit_has_a_log_of_its_own(tmp_path):
    """Two distillations in a sequence, and the same once more for a row of reference: four logs, none with two fits."""
    training = SINGLE.with_logger(resolve("logger", "csv", folder=str(tmp_path / "run")))
    teacher, data = ranks.teacher_of("plain"), ranks.dataset_of(tmp_path, "plain")
    step = {"_target_": "dfq.algorithms.distillation.Distillation", **ranks.SETTINGS, "max_steps": 20, "batch_size": 16}
    for name, part in (("mine", training), ("reference", training.within("gaussian"))):
        quantize(teacher, data, ranks.W3A8, Sequence((step, step)), MinMax(), MinMax(), 0, tmp_path / name, part)
    found = {str(path.relative_to(tmp_path / "run")): path for path in (tmp_path / "run").rglob("metrics.csv")}
    assert set(found) == {
        f"distillation/{part}step_{index}/version_0/metrics.csv" for part in ("", "gaussian/") for index in (0, 1)
    }
    for path in found.values():
        steps = steps_of(path)
        assert steps == sorted(steps) and max(steps) < 20, "a log of two fits"


def test_a_run_of_wandb_ends_with_its_fit(monkeypatch, tmp_path):
    """Lightning's logger goes on with the run that it finds open, whosever it is, and leaves it open."""
    wandb, runs = types.ModuleType("wandb"), []
    wandb.run, wandb.__spec__ = None, importlib.machinery.ModuleSpec("wandb", None)

    def begin(**options):
        wandb.run = wandb.run or options["name"]
        runs.append(wandb.run)
        return options

    wandb.finish = lambda: setattr(wandb, "run", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", begin)
    training = SINGLE.with_logger(resolve("logger", "wandb", folder=str(tmp_path)))
    for part in (training, training.within("gaussian")):
        with pytest.raises(ZeroDivisionError), part.logger.opened() as logger:
            assert logger["project"] == "dfq" and logger["offline"] and logger["save_dir"] == str(tmp_path)
            raise ZeroDivisionError
    assert runs == ["distillation", "distillation/gaussian"] and wandb.run is None


def test_loggers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(UserError, match=f"got logger={name}, which needs {name}, not installed here; pip install"):
            SINGLE.with_logger(resolve("logger", name))
    with SINGLE.logger.opened() as logger:
        assert logger is False
