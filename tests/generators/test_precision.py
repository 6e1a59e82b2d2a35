"""Mixed precision of the teacher while images are made, and which precision is the faster one."""

from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from conftest import as_teacher
from torch import nn

from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators import _precision
from dfq.generators._base import batch_rng
from dfq.generators._precision import arithmetic, as_float, faster_precision
from dfq.generators._statistics import batch_norm_distances
from dfq.generators.deep_inversion import DeepInversion
from dfq.generators.gdfq import GDFQ
from dfq.generators.genie import Genie
from dfq.generators.mixture import Mixture
from dfq.generators.spectrum import Spectrum
from dfq.generators.zeroq import ZeroQ
from dfq.hooks import forward_hooks
from dfq.pipeline import generate
from dfq.settings import choices, load, resolve

CPU = torch.device("cpu")
QUICK = ZeroQ(batch_size=8, iterations=20)


def sample(generator, teacher, num_samples=8):
    return generator.sample(teacher, num_samples, batch_rng(0, 0), lambda amount, note="": None)


class Float32Only(nn.Module):
    """A forward that mixes kinds of numbers where its weights do not have those of its maps."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.norm(self.conv(x))
        if x.dtype != torch.float32:
            raise RuntimeError("expected Float\nand more")
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "kind, generator",
    [
        ("plain", ZeroQ(iterations=8, class_weight=0.1, stretch_weight=0.1)),
        ("plain", Genie(iterations=8, num_channels=8)),
        ("plain", GDFQ(iterations=8, num_channels=8, train_batch_size=8)),
        ("plain", DeepInversion(iterations=8)),
        ("bare", Spectrum(iterations=8)),
    ],
)
def test_the_network_runs_in_it_and_images_do_not(kind, generator, make_teacher):
    teacher, seen = make_teacher(kind), set()
    layer = next(module for module in teacher.module.modules() if isinstance(module, nn.Conv2d))

    def note(_name, _module, inputs, output):
        seen.add((inputs[0].dtype, output.dtype))

    plain = sample(generator, teacher)
    with forward_hooks([("", layer)], after=note):
        images = sample(replace(generator, precision="bfloat16"), teacher)
        assert (torch.float32, torch.bfloat16) in seen
        seen.clear()
        assert torch.equal(sample(generator, teacher), plain) and seen == {(torch.float32, torch.float32)}
    assert images.dtype == torch.float32 and torch.isfinite(images).all() and not torch.equal(images, plain)


def test_images_are_as_close_as_with_whole_precision(make_teacher):
    teacher = make_teacher("residual")
    start, plain, mixed = (
        sum(batch_norm_match(teacher, sample(replace(QUICK, **settings), teacher, 32)).values())
        for settings in ({"iterations": 1, "learning_rate": 1e-9}, {}, {"precision": "bfloat16"})
    )
    assert plain < start / 3 and mixed == pytest.approx(plain, rel=0.3)


def test_statistics_are_float32_of_what_the_norm_is_given(make_teacher):
    teacher, images = make_teacher("plain"), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), batch_norm_distances(teacher) as plain:
        teacher.module(images)
    with torch.no_grad(), batch_norm_distances(teacher) as mixed, arithmetic(CPU, "bfloat16"):
        teacher.module(images)
    assert all(distance.dtype == torch.float32 for distance in mixed)
    torch.testing.assert_close(torch.stack(mixed), torch.stack(plain), rtol=0.05, atol=1e-3)
    assert not torch.equal(torch.stack(mixed), torch.stack(plain))


def test_outputs_are_float32():
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.int64)
    found = as_float({"a": [half, whole], "b": (half, None)})
    assert found["a"][0].dtype == found["b"][0].dtype == torch.float32 and found["a"][1] is whole

    class Output(OrderedDict):
        """As transformers' are."""

        def to_tuple(self):
            return tuple(self.values())

    assert as_float(Output(logits=half))["logits"].dtype == torch.float32


def test_a_network_that_does_not_run_in_it(capsys):
    teacher = as_teacher(Float32Only())
    with pytest.raises(UserError) as error:
        sample(replace(QUICK, precision="bfloat16"), teacher)
    assert str(error.value) == (
        "got generator.precision=bfloat16 and a network that does not run in it on cpu (RuntimeError: expected Float); "
        "allowed: generator.precision=float32"
    )
    assert faster_precision(QUICK, teacher) == "float32"
    assert "in float32 (got generator.precision=bfloat16 and a network" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_the_faster_one_is_taken_said_recorded_and_kept(faster, make_teacher, tmp_path, monkeypatch, capsys):
    teacher, asked = make_teacher("plain"), []

    def seconds(_generator, _teacher, precision):
        asked.append(precision)
        return 0.25 if precision == faster else 0.5

    monkeypatch.setattr(_precision, "_seconds", seconds)
    auto = replace(QUICK, iterations=2, precision="auto")
    part = generate(teacher, auto, 8, 0, tmp_path / "auto")
    assert asked == ["float32", "bfloat16"]
    assert f"in {faster}; some steps took" in capsys.readouterr().err
    assert part.manifest["settings"]["generator"]["precision"] == faster
    monkeypatch.setattr(_precision, "_seconds", lambda *_: pytest.fail("measured again"))
    grown = generate(teacher, auto, 16, 0, tmp_path / "auto")
    stated = generate(teacher, replace(auto, precision=faster), 16, 0, tmp_path / "stated")
    assert grown.sha256 == stated.sha256
    assert SyntheticDataset(tmp_path / "stated").manifest["settings"] == grown.manifest["settings"]


def test_it_is_measured(make_teacher, monkeypatch):
    teacher, ran = make_teacher("plain"), []
    measure = ZeroQ.sample
    monkeypatch.setattr(
        ZeroQ, "sample", lambda self, *given: (ran.append((self.precision, given[1])), measure(self, *given))[1]
    )
    assert faster_precision(replace(QUICK, batch_size=6, precision="auto"), teacher) in ("float32", "bfloat16")
    assert ran == [("float32", 6)] * 2 + [("bfloat16", 6)] * 2


def test_parts_of_a_mixture_name_theirs():
    part = {**load("generator", "zeroq"), "precision": "auto"}
    with pytest.raises(UserError, match=r"got precision=auto for ZeroQ in generator.parts; allowed: precision=float32"):
        Mixture(parts=(part, "genie"))


def test_whole_precision_is_the_default():
    found = {name: load("generator", name).get("precision") for name in choices("generator")}
    assert {name for name, precision in found.items() if precision} == {
        "box_sampling",
        "deep_inversion",
        "gdfq",
        "genie",
        "psaq",
        "spectrum",
        "zeroq",
    }
    assert set(found.values()) == {"float32", None}
    with pytest.raises(UserError, match=r"got generator.precision='half'; allowed: float32 \| bfloat16 \| auto"):
        resolve("generator", "zeroq", precision="half")
