"""A package of somebody else's, installed beside: its methods by ``_target_`` alone, and the contract tests on it."""

import json
import subprocess
import sys

import pytest
import torch

import dfq
from dfq import cli, testing
from dfq.errors import UserError

FILES = {
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "their-quant"
        version = "1.0"
        [tool.setuptools]
        packages = ["their_quant"]
    """,
    "their_quant/__init__.py": "",
    "their_quant/generators.py": '''
        """Checkerboards of random contrast."""
        from dataclasses import dataclass

        import torch

        from dfq.generators._base import Generator


        @dataclass(frozen=True)
        class Checkerboards(Generator):
            side: int = 2  # pixels

            def sample(self, teacher, num_samples, rng, advance):
                channels, height, width = teacher.input_spec.size
                y, x = torch.arange(height)[:, None] // self.side, torch.arange(width) // self.side
                board = ((x + y) % 2 * 2 - 1).float()
                contrast = torch.randn(num_samples, channels, 1, 1, generator=rng)
                advance(num_samples)
                return board * contrast + torch.randn(num_samples, channels, height, width, generator=rng)
    ''',
    "their_quant/losses.py": '''
        """Losses between two outputs."""
        from dataclasses import dataclass

        from torch.nn import functional as F


        @dataclass(frozen=True)
        class HuberLoss:
            delta: float = 1.0  # where it becomes linear

            def __call__(self, output, target):
                return F.huber_loss(output, target, delta=self.delta)


        def cosine_loss(output, target):
            return (1 - F.cosine_similarity(output, target)).mean()
    ''',
    "their_quant/quantizers.py": '''
        """A range of so many times the mean magnitude."""
        from dataclasses import dataclass

        import torch

        from dfq.quantization import choose_qparams


        @dataclass(frozen=True)
        class Shrunk:
            share: float = 0.9  # of the extremes

            def qparams(self, observation, scheme):
                return choose_qparams(observation.minimum * self.share, observation.maximum * self.share, scheme)
    ''',
    "their_quant/exporters.py": '''
        """Integer codes as json."""
        import json
        from dataclasses import dataclass
        from pathlib import Path
        from typing import ClassVar

        from dfq.exporters import _artifact as artifact


        @dataclass(frozen=True)
        class Codes:
            format: ClassVar[str] = "codes"
            suffix: ClassVar[str] = ".codes"

            def export(self, student, path, teacher=None, images=None):
                artifact.check(student, Path(path))
                codes = {name: student.integer_weight(name).tolist() for name in student.layers}
                found = {"parity": None, "latency_ms": None}
                return artifact.write(Path(path), json.dumps(codes).encode(), self, student, found)
    ''',
    "their_quant/broken.py": '''
        """Each breaks a promise."""
        from dataclasses import dataclass

        import torch

        from dfq.generators._base import Generator


        @dataclass(frozen=True)
        class Forgetful(Generator):
            def sample(self, teacher, num_samples, rng, advance):
                return torch.randn(num_samples, *teacher.input_spec.size)


        def negative_loss(output, target):
            return -(output - target).square().mean()


        @dataclass(frozen=True)
        class Unfinished(Generator):
            pass
    ''',
}


def lines(text):
    rows = text.strip("\n").splitlines()
    indent = min((len(row) - len(row.lstrip()) for row in rows if row.strip()), default=0)
    return "\n".join(row[indent:] for row in rows) + "\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package as pip installs it, in a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(lines(text))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    found = subprocess.run([*pip, "--target", str(target), str(source)], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"pip can't build a package here: {found.stderr.strip().splitlines()[-1]}")
    return target


@pytest.fixture
def installed(site, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_quant"]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
def test_every_arrow_takes_its_methods(installed, tmp_path, capsys):
    command = [
        "run",
        "generator._target_=their_quant.generators.Checkerboards",
        "+generator.side=4",
        "weight_quantizer._target_=their_quant.quantizers.Shrunk",
        "activation_quantizer._target_=their_quant.quantizers.Shrunk",
        "exporter._target_=their_quant.exporters.Codes",
        "algorithm=distillation",
        "algorithm.loss={_target_:their_quant.losses.HuberLoss,delta:0.5}",
        "algorithm.optimizer={name:torch.optim.SGD,lr:0.001}",
        "algorithm.max_steps=3",
        "algorithm.checks=1",
        "num_samples=40",
        "scheme=w8a8",
        "references=[]",
        "hydra.run.dir=out",
        "dataset_dir=data",
        "student_dir=student",
        "artifact_path=net.codes",
    ]
    assert cli.main(command) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["artifact"]["path"].endswith("net.codes") and report["dataset"]["num_samples"] == 40
    codes = json.loads((tmp_path / "net.codes").read_text())
    student = dfq.load_student(tmp_path / "student", device="cpu")
    assert codes.keys() == student.layers.keys()
    assert all(torch.equal(torch.tensor(codes[name]), student.integer_weight(name)) for name in codes)
    settings = student.settings
    assert settings["algorithm"]["loss"] == {"_target_": "their_quant.losses.HuberLoss", "delta": 0.5}
    assert settings["weight_quantizer"] == {"_target_": "their_quant.quantizers.Shrunk", "share": 0.9}
    recorded = dfq.SyntheticDataset(tmp_path / "data").manifest["settings"]["generator"]
    assert recorded["_target_"] == "their_quant.generators.Checkerboards" and recorded["side"] == 4


def test_mistakes_in_its_settings_are_one_line(installed, capsys):
    line = ["run", "generator._target_=their_quant.generators.Checkerboards", "+generator.sdie=4"]
    assert cli.main(line) == 2
    assert "did you mean 'generator.side'?" in capsys.readouterr().err
    assert cli.main(["run", "generator._target_=their_quant.generators.Chequers"]) == 2
    assert "their_quant.generators" in capsys.readouterr().err


def test_the_contract_tests_run_on_it_by_one_command(installed, capsys):
    names = ["generators", "losses", "quantizers", "exporters"]
    assert testing.main([f"their_quant.{name}" for name in names]) == 0
    out = capsys.readouterr().out
    for family, name in [
        ("generator", "generators.Checkerboards"),
        ("loss", "losses.HuberLoss"),
        ("loss", "losses.cosine_loss"),
        ("quantizer", "quantizers.Shrunk"),
        ("exporter", "exporters.Codes"),
    ]:
        assert f"passed   {family:9} their_quant.{name}" in out
    assert "5 of 5 methods keep their contracts" in out


def test_broken_promises_are_found(installed, capsys):
    assert testing.main(["their_quant"]) == 1
    out = capsys.readouterr().out
    assert "FAILED   generator their_quant.broken.Forgetful: promised: random numbers come from rng" in out
    assert "FAILED   loss      their_quant.broken.negative_loss: promised: equal outputs cost no more" in out
    assert "FAILED   generator their_quant.broken.Unfinished: NotImplementedError" in out
    assert "5 of 8 methods keep their contracts" in out


def test_what_is_no_package(installed, capsys):
    assert testing.main(["their_quant.losses.HuberLoss"]) == 0
    assert testing.main(["no_such_package_at_all"]) == 2
    assert testing.main(["their_quant.losses.dataclass"]) == 2
    assert "which is no method; allowed: generator | quantizer" in capsys.readouterr().err
    assert testing.main([]) == 2
    with pytest.raises(UserError, match="did you mean 'HuberLoss'"):
        list(testing.methods_of("their_quant.losses.HuberLos"))


def test_dfqs_own_methods_keep_these_contracts():
    from dfq.algorithms.round_to_nearest import RoundToNearest
    from dfq.generators.gaussian import Gaussian
    from dfq.generators.random_tokens import RandomTokens
    from dfq.losses.distillation import kl_divergence
    from dfq.quantizers.percentile import Percentile

    for generator in (Gaussian(), RandomTokens()):
        testing.check_generator(generator)
    testing.check_quantizer(Percentile())
    testing.check_loss(kl_divergence)
    testing.check_algorithm(RoundToNearest())
