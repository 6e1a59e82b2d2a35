"""The three projects of examples/lightning_projects, as their users run them: with both of Lightning's names."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfq
from dfq.lightning import student_of
from dfq.lightning.quantized import KEY, records

FOLDER = Path(__file__).parents[2] / "examples" / "lightning_projects"
EXAMPLES = {"classifier": "network", "gan": "generator", "detector": "."}
PACKAGES = ["pytorch_lightning", "lightning.pytorch"]

every_package = pytest.mark.parametrize("package", PACKAGES)
every_example = pytest.mark.parametrize("name", EXAMPLES)


def written(name, package, folder):
    """The example as somebody with ``package`` writes it; the module's name."""
    pytest.importorskip(package, reason=f"{package} is not installed: pip install lightning")
    text = (FOLDER / f"{name}.py").read_text()
    text = text.replace("import pytorch_lightning as pl", f"import {package} as pl")
    text = text.replace("from pytorch_lightning.", f"from {package}.")
    module = f"{name}_{package.replace('.', '_')}"
    (folder / f"{module}.py").write_text(text)
    return module


@pytest.fixture
def project(tmp_path, monkeypatch):
    def load(name, package):
        module = written(name, package, tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop(module, None)
        return importlib.import_module(module)

    return load


def data(project, name):
    if name == "classifier":
        return {"datamodule": project.Stripes(num_samples=64, batch_size=16)}
    loader = project.rings if name == "gan" else project.loader
    return {"train_dataloaders": loader(), "val_dataloaders": loader(seed=1)}


def evaluation_data(project, name):
    return {"dataloaders": data(project, name)["val_dataloaders"]} if name != "classifier" else data(project, name)


def fresh(project, name, folder):
    if name == "gan":
        project.pl.seed_everything(0, verbose=False)
        return project.GAN()
    return project.float_module(folder, epochs=1)


def same(one, other):
    return all(map(torch.equal, one, other))


@every_example
def test_at_most_three_lines_are_added(name):
    lines = [line for line in (FOLDER / f"{name}.py").read_text().splitlines() if re.search(r"# dfq\b", line)]
    text = (FOLDER / f"{name}.py").read_text()
    assert len(lines) == 3
    without = "\n".join(line for line in text.splitlines() if not re.search(r"# dfq\b", line))
    assert not re.search(r"Quantiz\w+\(|import dfq.lightning|from dfq", without)


@every_example
@every_package
@pytest.mark.filterwarnings("ignore")
def test_what_a_project_does_with_its_module(name, package, project, tmp_path):
    p, attribute = project(name, package), EXAMPLES[name]
    module = fresh(p, name, tmp_path)
    kind, num_parameters = type(module), sum(1 for _ in module.parameters())
    trainer = p.make_trainer(tmp_path, 2)
    trainer.fit(module, **data(p, name))
    assert isinstance(module, kind) and list(records(module)) == [attribute]
    student = records(module)[attribute]
    assert student.has_grids and len(student.layers) == {"classifier": 3, "gan": 3, "detector": 4}[name]
    assert sum(1 for _ in module.parameters()) <= num_parameters, "the teacher is no part of the module"
    assert "training_step" not in vars(module) and not any(m._forward_pre_hooks for m in module.modules())

    # fit again, with the same trainer and with another one
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, **data(p, name))
    assert trainer.current_epoch == 3
    p.make_trainer(tmp_path / "again", 1).fit(module, **data(p, name))

    # the best checkpoint
    best = trainer.checkpoint_callback.best_model_path
    options = evaluation_data(p, name)
    (tested,) = trainer.test(module, ckpt_path="best", verbose=False, **options)
    (validated,) = trainer.validate(module, ckpt_path="best", verbose=False, **options)
    predicted = trainer.predict(module, ckpt_path="best", **options)
    assert all(torch.isfinite(torch.tensor(list(found.values()))).all() for found in (tested, validated))

    # a fresh module takes up the last one
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] and last[KEY]["networks"].keys() == {attribute}
    assert last["state_dict"].keys() == module.state_dict().keys()
    resumed, other = fresh(p, name, tmp_path), p.make_trainer(tmp_path / "resumed", 4)
    other.fit(resumed, ckpt_path=tmp_path / "last.ckpt", **data(p, name))
    assert other.current_epoch == 4 and other.global_step == trainer.global_step // 3 * 4
    assert other.callback_metrics.keys() >= validated.keys()

    # checkpoints read elsewhere: a fresh module, load_from_checkpoint, dfq.load
    assert p.make_trainer(tmp_path / "x", 1).test(
        fresh(p, name, tmp_path), ckpt_path=best, verbose=False, **options
    ) == [tested]
    loaded = kind.load_from_checkpoint(best, weights_only=True)
    assert p.make_trainer(tmp_path / "y", 1).test(loaded, verbose=False, **options) == [tested]
    assert same(p.make_trainer(tmp_path / "z", 1).predict(loaded, **options), predicted)
    read = dfq.load(best)  # its class by the name in the checkpoint
    assert type(read).__name__ == "Student" and read.scheme == student.scheme
    assert read.sha256 == student_of(loaded).sha256 == dfq.load(best, module=kind).sha256
    kept = dfq.load(best, as_module=True, device="cpu")
    assert kept.state_dict().keys() == loaded.state_dict().keys()
    assert same(kept.state_dict().values(), loaded.state_dict().values())


@pytest.mark.slow
@every_example
@every_package
def test_two_processes(name, package, tmp_path):
    module = written(name, package, tmp_path)
    command = [sys.executable, f"{module}.py", "--devices", "2", "--epochs", "1", "--folder", str(tmp_path / "out")]
    found = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    checkpoint = torch.load(tmp_path / "out" / "best.ckpt", weights_only=True)
    (values,) = checkpoint[KEY]["networks"].values()
    scales = [tensor for key, tensor in checkpoint["state_dict"].items() if key.endswith("_quantizer.scale")]
    assert values["enabled"] and scales and all((scale != 1).any() for scale in scales)
