"""mixture: whose image is where, in batches of which size, and what a dataset records of the parts."""

from dataclasses import dataclass

import pytest
import torch
from conftest import as_teacher

from dfq import costs
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.generators._base import Generator, batch_rng, dataset_rng
from dfq.generators._memory import batch_bytes
from dfq.generators.mixture import Mixture
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import generate
from dfq.testing import TinyTransformer


@dataclass(frozen=True)
class Constant(Generator):
    """Images of one value; notes in :data:`CALLS` how many it is asked for."""

    value: float = 0.0

    def sample(self, teacher, num_samples, rng, advance):
        CALLS.append((self.value, num_samples))
        advance(num_samples)
        return torch.full((num_samples, *teacher.input_spec.size), self.value)


@dataclass(frozen=True)
class Shared(Constant):
    """What all batches share is drawn once."""

    def prepare(self, teacher, rng):
        return Shared(value=float(torch.rand((), generator=rng)))

    def recorded(self, teacher):
        return {"read": "abc"}


CALLS: list = []


@pytest.fixture(autouse=True)
def calls():
    CALLS.clear()
    return CALLS


@pytest.fixture
def teacher(make_teacher):
    return make_teacher("plain")


def values(images):
    return images.flatten(1)[:, 0].tolist()


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 8])
def test_images_take_turns_and_parts_keep_to_their_own_batches(num_samples, teacher, calls):
    parts = (Constant(1, value=0.0), Constant("auto", value=1.0), Constant(2, value=2.0))
    done = []
    images = Mixture(parts=parts).sample(teacher, num_samples, batch_rng(0, 0), done.append)
    assert values(images) == [float(i % 3) for i in range(num_samples)] and sum(done) == num_samples
    shares = [len(range(k, num_samples, 3)) for k in range(3)]
    expected = [(0.0, 1)] * shares[0] + [(1.0, shares[1])] * (shares[1] > 0)
    expected += [(2.0, min(2, shares[2] - start)) for start in range(0, shares[2], 2)]
    assert calls == expected


def test_each_part_makes_what_it_makes_alone(teacher):
    """The first of the parts draws the same random numbers as without the other."""
    mixed = Mixture(parts=(ZeroQ(iterations=2), Constant())).sample(teacher, 7, batch_rng(3, 1), lambda amount: None)
    alone = ZeroQ(iterations=2).sample(teacher, 4, batch_rng(3, 1), lambda amount: None)
    assert torch.equal(mixed[::2], alone) and not mixed[1::2].any()


def test_what_parts_share_is_prepared_once(teacher):
    sampler = Mixture(parts=(Constant(), Shared())).prepare(teacher, dataset_rng(5))
    wanted = float(torch.rand((), generator=dataset_rng(5)))
    for batch in range(2):
        images = sampler.sample(teacher, 4, batch_rng(5, batch), lambda amount: None)
        assert values(images) == pytest.approx([0, wanted, 0, wanted])


def test_settings_of_parts_are_settings_of_the_dataset(teacher, tmp_path):
    parts = ({"_target_": "dfq.generators.zeroq.ZeroQ", "iterations": 2}, Shared())
    generate(teacher, Mixture(batch_size=4, parts=parts), 6, 0, tmp_path / "d")
    settings = SyntheticDataset(tmp_path / "d").manifest["settings"]
    assert (
        settings["parts"][0]["iterations"] == 2 and settings["parts"][0]["blur"] is None and settings["read"] == "abc"
    )
    other = ({"_target_": "dfq.generators.zeroq.ZeroQ", "iterations": 3}, Shared())
    with pytest.raises(UserError, match=r"made with other settings .*iterations"):
        generate(teacher, Mixture(batch_size=4, parts=other), 6, 0, tmp_path / "d")


def test_networks_without_batch_norm_take_parts_that_need_none():
    vit = as_teacher(TinyTransformer())
    images = Mixture(parts=("psaq", "gaussian")).with_known({"iterations": 2}).sample(
        vit, 3, batch_rng(0, 0), lambda amount: None
    )  # fmt: skip
    assert torch.isfinite(images).all()
    with pytest.raises(UserError, match=r"without batch norm .*mixture has parts that need it; allowed: .*psaq"):
        Mixture().sample(vit, 3, batch_rng(0, 0), lambda amount: None)


@pytest.mark.parametrize(
    "parts, message",
    [
        (("zeroq",), r"got generator\.parts=\['zeroq'\]; allowed: two generators or more"),
        (
            ("zeroq", "box_sampling"),
            r"got BoxSampling in generator\.parts; allowed: generators of images",
        ),
        (("random_tokens", "zeroq"), r"got RandomTokens in generator\.parts"),
        (("zeroq", "geni"), r"got generator=geni; allowed: .*did you mean 'genie'"),
        (({"_target_": "dfq.generators.zeroq.ZeroQ", "iterations": 0}, "genie"), "iterations=0"),
    ],
)
def test_wrong_parts_are_told(parts, message):
    with pytest.raises(UserError, match=message):
        Mixture(parts=parts)


def test_memory_is_counted_over_two_steps_of_each_part(teacher):
    few, many = (batch_bytes(Mixture(parts=(ZeroQ(iterations=n), "gaussian")), teacher, 8) for n in (5, 400))
    alone = batch_bytes(ZeroQ(), teacher, 4)
    assert few == many and alone <= few <= 1.2 * alone


def test_the_cost_is_that_of_the_parts(teacher, tmp_path, monkeypatch):
    """Their times and files add up, and the larger memory counts."""
    seen = []

    def of_part(teacher, generator, num_samples, batch_size, folder, world_size=1):
        if hasattr(generator, "generators"):
            return real(teacher, generator, num_samples, batch_size, folder, world_size)
        seen.append((generator.value, num_samples, batch_size))
        return costs.Cost(1 + generator.value, 2.0, 10 * generator.value, 5.0), folder

    real = costs.of_generation
    monkeypatch.setattr(costs, "of_generation", of_part)
    mixture = Mixture(parts=(Constant(3, value=1.0), Constant("auto", value=2.0)))
    cost, dataset = costs.of_generation(teacher, mixture, 15, 8, tmp_path)
    assert seen == [(1.0, 8, 3), (2.0, 8, 4)] and dataset == tmp_path / "part_0"
    assert cost == costs.Cost(5.0, 4.0, 20.0, 10.0)
