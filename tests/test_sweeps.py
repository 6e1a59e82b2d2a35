"""The table of all runs of a sweep, and what a sweeper is told; ``dfq.api`` is a stub that leaves a report."""

import csv
import json
import shlex
import sys
import types
from pathlib import Path

import pytest
from launching import environment

import dfq
from dfq.cli import main
from dfq.commands import plugins
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError


@pytest.fixture
def api(monkeypatch, tmp_path):
    stub = types.ModuleType("dfq.api")

    def command(name, config):
        if config["seed"] == 2:
            raise UserError("got seed=2", "another")
        report = {
            "student": {"metrics": {"top1": 0.9 + config["seed"] / 100}, "size_bytes": 1000},
            "fidelity": {"agreement": 0.5, "kl": 0.25, "layers": []},
        }
        (Path(config["output_dir"]) / "report.json").write_text(json.dumps(report))
        return report["student"]["metrics"]["top1"]

    stub.command = command
    monkeypatch.setitem(sys.modules, "dfq.api", stub)
    monkeypatch.setattr(dfq, "api", stub, raising=False)
    monkeypatch.chdir(tmp_path)


def table(folder="outputs/*/multirun_*"):
    [path] = Path().glob(f"{folder}/runs.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_jobs_in_one_launch_do_not_share_training(api, capsys, monkeypatch):
    """The processes of a launcher are there from the start, once for all jobs."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "-m", "seed=0,1", "trainer=ddp", "trainer.devices=2"]) == 2
    said = (
        "got --multirun and trainer.strategy=ddp in one launch of 2 processes for all; allowed: a launch for each job"
    )
    assert said in capsys.readouterr().err


QUICK = ["num_samples=24", "generator=gaussian", "algorithm=round_to_nearest", "device=cpu", "references=[]"]


def test_jobs_that_share_training_have_a_process_each(tmp_path, monkeypatch, capfd):
    """Their errors and figures come back; ``hydra.sweep.dir`` has what a path may have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    words = [*QUICK, "trainer=ddp", "trainer.devices=2", "hydra.sweep.dir='it\\'s, mine'"]
    Path("mine.onnx").write_text("the user's own")
    assert main(["run", "-m", *words, "artifact_path=new.onnx,mine.onnx", "optimized_metric=student.size_bytes"]) == 2
    rows = table("it's, mine")
    assert rows[0]["error"] == "" and float(rows[0]["result"]) > 1000 and rows[0]["result"] == rows[0]["size_bytes"]
    assert "got artifact_path=mine.onnx, a file that dfq did not make" in rows[1]["error"]
    assert capfd.readouterr().err.count("dfq: got artifact_path=mine.onnx") == 1
    report = json.loads(Path("it's, mine/0/report.json").read_text())
    assert str(report["student"]["size_bytes"]) == rows[0]["result"]


def test_a_sweep_ends_with_a_table_of_its_runs(api, capsys):
    assert main(["run", "-m", "seed=0,1", "generator.iterations=5,7"]) == 0
    rows = table()
    assert [(row["job"], row["seed"], row["generator.iterations"]) for row in rows] == [
        ("0", "0", "5"), ("1", "0", "7"), ("2", "1", "5"), ("3", "1", "7"),
    ]  # fmt: skip
    assert [row["top1"] for row in rows] == [row["result"] for row in rows] == ["0.9", "0.9", "0.91", "0.91"]
    assert {row["size_bytes"] for row in rows} == {"1000"} and {row["kl"] for row in rows} == {"0.25"}
    assert "error" not in rows[0]
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 runs, also in" in shown and "runs.csv" in shown


def test_a_run_that_fails_is_in_the_table_too(api, capsys):
    assert main(["run", "-m", "seed=1,2"]) == 2
    rows = table()
    assert [row["error"] for row in rows] == ["", "got seed=2; allowed: another"]
    assert [row["result"] for row in rows] == ["0.91", ""]


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "seed=0,1", "hydra.sweep.dir=mine"],
        ["seed=0,1", "hydra.mode=MULTIRUN", "hydra.sweep.dir=mine"],
        ["-m", "seed=0,1", "hydra.sweep.dir=mine", "hydra.sweep.subdir=part/${seed}"],
        ["-m", "--config-dir", "conf", "experiment=both", "hydra.sweep.dir=mine"],
    ],
)
def test_the_table_lies_where_the_sweep_does(api, capsys, words):
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/both.yaml").write_text("# @package _global_\nhydra: {sweeper: {params: {seed: '0,1'}}}\n")
    assert main(["run", *words]) == 0
    assert [(row["job"], row["seed"], row["top1"]) for row in table("mine")] == [("0", "0", "0.9"), ("1", "1", "0.91")]
    assert "2 runs, also in mine/runs.csv" in capsys.readouterr().out
    assert main(["run", "-m", "seed=3,4", "hydra.sweep.dir=mine", "hydra.sweep.subdir=again/${hydra.job.num}"]) == 0
    assert [row["seed"] for row in table("mine")] == ["3", "4"], "rows of the sweep before"


def test_a_job_can_be_repeated_by_its_own_command(api, monkeypatch):
    """As the processes do that Lightning, or processes=N, start for it."""
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/five.yaml").write_text("# @package _global_\nnum_samples: 5\n")
    stub, seen = sys.modules["dfq.api"], []
    before = stub.command
    monkeypatch.setattr(
        stub, "command", lambda name, config: (seen.append((config, sys.argv[1:])), before(name, config))[1]
    )
    assert main(["run", "-m", "--config-dir", "mine", "experiment=five", "seed=0,1"]) == 0
    for config, words in seen[:2]:
        assert shlex.split(config["command"])[1:] == words
        assert main(words) == 0
        again = seen[-1][0]
        assert (again["num_samples"], again["seed"]) == (config["num_samples"], config["seed"]) == (5, config["seed"])


def test_a_mode_of_the_command_line_has_the_table_too(api):
    assert main(["run", "seed=0,1", "hydra.mode=MULTIRUN"]) == 0
    assert len(table()) == 2


def test_jobs_that_are_killed_or_never_begin_are_in_the_table(api, monkeypatch, tmp_path):
    before = sys.modules["dfq.api"].command

    def command(name, config):
        if config["seed"] == 1:
            raise SystemExit(1)  # the table is shown by what is left: a launcher's own process would be gone
        return before(name, config)

    monkeypatch.setattr(sys.modules["dfq.api"], "command", command)
    with pytest.raises(SystemExit):
        main(["run", "-m", "seed=0,1,3"])
    rows = table()
    assert [(row["seed"], row["top1"]) for row in rows] == [("0", "0.9"), ("1", ""), ("3", "")]
    assert [row["error"] for row in rows] == ["", "still running, or killed", "did not begin, or could not say so"]


def test_one_run_has_no_table(api, capsys):
    assert main(["run", "seed=0"]) == 0
    assert not [*Path("outputs").rglob("job.json"), *Path("outputs").rglob("runs.csv")]
    assert "runs" not in capsys.readouterr().out


def test_a_folder_of_the_users_own_for_a_sweep(api, capsys):
    assert main(["run", "-m", "seed=0,1", "name=mine"]) == 0
    assert len(list(Path("outputs/mine").glob("multirun_*/*/job.json"))) == 2


REPORT = {
    "seed": 3,
    "environment": {"cores": 2},
    "student": {"metrics": {"top1": 0.75}, "size_bytes": 1000},
    "fidelity": {"agreement": 0.5, "kl": 0.25, "layers": []},
}


@pytest.mark.parametrize(
    "name, figure",
    [
        (None, 0.75),
        ("top1", 0.75),
        ("agreement", 0.5),
        ("kl", 0.25),
        ("student.size_bytes", 1000),
        ("fidelity.kl", 0.25),
    ],
)
def test_the_figure_that_a_sweeper_is_told(name, figure):
    from dfq.api import _figure

    assert _figure(REPORT, name) == figure
    assert _figure({**REPORT, "student": {"metrics": {}}}, None) == 0.5


def test_a_figure_that_there_is_not():
    from dfq.api import _figure

    with pytest.raises(UserError) as error:
        _figure(REPORT, "top2")
    assert str(error.value) == (
        "got optimized_metric=top2; allowed: seed | student.metrics.top1 | student.size_bytes | fidelity.agreement | "
        "fidelity.kl | agreement | kl | top1; did you mean 'top1'?"
    )


def test_options_of_a_sweeper_on_the_command_line(api, capsys):
    assert main(["run", "-m", '+hydra.sweeper.params.seed="3,4"', "generator.iterations=5"]) == 0
    assert [(row["job"], row["seed"]) for row in table()] == [("0", "3"), ("1", "4")]


def test_a_sweeper_that_draws_its_values(api, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    trials = ["hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "hydra.sweeper.direction=maximize"]
    words = ["hydra/sweeper=optuna", *trials, "generator.learning_rate=interval(0.1,0.5)"]
    assert main(["run", "-m", *words, "optimized_metric=kl"]) == 0
    assert len({row["generator.learning_rate"] for row in table()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_jobs_that_share_training(launcher, tmp_path, monkeypatch):
    """Two of them in one process of the launcher: each trains with another process, and none waits for the first's."""
    if launcher not in ["basic", *plugins("launcher")]:
        pytest.skip(f"hydra/launcher={launcher} is not installed: pip install 'dfq[launch]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    train = [
        "algorithm.max_steps=4",
        "algorithm.checks=2",
        "algorithm.batch_size=8",
        "trainer=ddp",
        "trainer.devices=2",
    ]
    words = [*QUICK, "algorithm=distillation", *train, f"hydra/launcher={launcher}"]
    words += ["hydra.launcher.n_jobs=1"] if launcher == "joblib" else []
    assert main(["run", "-m", *(word for word in words if word != QUICK[2]), "seed=0,1"]) == 0
    assert [row["seed"] for row in table() if "error" not in row] == ["0", "1"]
    students = [json.loads(path.read_text()) for path in Path("outputs/students").glob("*/student.json")]
    assert [student["settings"]["processes"] for student in students] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_in_processes_of_a_launcher(launcher, tmp_path, monkeypatch, capfd):
    """One that goes well and one that does not; a folder of the user's own yamls is known in their processes too."""
    if launcher not in plugins("launcher"):
        pytest.skip(f"hydra/launcher={launcher} is not installed: pip install 'dfq[launch]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    Path("conf/generator").mkdir(parents=True)
    Path("conf/generator/mine.yaml").write_text("_target_: dfq.generators.gaussian.Gaussian\nbatch_size: 8\n")
    words = ["--config-dir", "conf", "generator=mine", "dataset_dir=data", f"hydra/launcher={launcher}"]
    assert main(["generate", *words[:-1], "num_samples=16"]) == 0
    capfd.readouterr()
    assert main(["generate", "-m", *words, "num_samples=8,24"]) == 2
    rows = table()
    assert [(row["job"], row["num_samples"]) for row in rows] == [("0", "8"), ("1", "24")]
    assert "got num_samples=8 and dataset_dir=data, which holds" in rows[0]["error"] and rows[1]["error"] == ""
    assert capfd.readouterr().err.count("dfq: got num_samples=8 and dataset_dir=data, which holds") == 1
    [job] = Path("outputs").glob("*/multirun_*/1")
    assert (job / "job.json").is_file() and len(SyntheticDataset("data")) == 24


def test_a_sweeper_that_is_not_installed(api, capsys, monkeypatch):
    monkeypatch.setattr("dfq.commands.plugins", lambda kind: [])
    assert main(["run", "-m", "hydra/sweeper=optuna"]) == 2
    assert capsys.readouterr().err == (
        "dfq: got hydra/sweeper=optuna; allowed: basic; pip install 'dfq[sweep]' for optuna\n"
    )
