"""batch_size=auto: what is counted, what is chosen, and that a dataset keeps to it."""

from dataclasses import replace

import pytest
import torch

from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.generators import _memory
from dfq.generators._memory import LARGEST_BATCH, TENSORS, batch_bytes, fitting_batch_size, peak_bytes
from dfq.generators.gaussian import Gaussian
from dfq.generators.genie import Genie
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import generate
from dfq.settings import resolve


def test_the_most_that_is_alive_at_once_counts():
    outside = torch.zeros(1000)

    def work():
        a = torch.ones(100)  # 400 bytes
        b = a + outside[:100]  # and 400
        view = b.view(10, 10)
        view.add_(1)
        del a  # 400 are left
        c = torch.cat([b, b])  # and 800: the most is 1200
        del b, view, c
        return torch.zeros(50)

    assert peak_bytes(work) == 1200


def test_what_the_backward_pass_makes_and_keeps_counts():
    x = torch.ones(100, requires_grad=True)

    def work():
        x.grad = None
        y = x.exp()  # kept for the gradient: 400 bytes
        z = y.sum()
        return torch.autograd.grad(z, x)

    assert peak_bytes(lambda: x.detach().exp().sum()) == 404
    assert 800 <= peak_bytes(work) <= 1300


@pytest.mark.parametrize("generator", [ZeroQ(), ZeroQ(statistics="image", keep_best=True), Genie(num_channels=8)])
def test_the_largest_batch_within_the_bound(generator, make_teacher):
    """What is chosen fits, and 8 more would not (up to one in fifty: not everything grows with the batch)."""
    teacher = make_teacher("plain")
    bound = batch_bytes(generator, teacher, 50)
    found = fitting_batch_size(replace(generator, batch_size="auto", memory_bytes=round(bound / TENSORS)), teacher)
    assert found == 48
    assert batch_bytes(generator, teacher, found) <= bound < 1.02 * batch_bytes(generator, teacher, found + 8)


def test_steps_do_not_count_and_small_batches_are_taken_as_they_are(make_teacher):
    teacher = make_teacher("plain")
    few, many = (batch_bytes(ZeroQ(iterations=n), teacher, 4) for n in (5, 500))
    assert few == many
    auto = ZeroQ(batch_size="auto", memory_bytes=round(batch_bytes(ZeroQ(), teacher, 5) / TENSORS) + 1)
    assert fitting_batch_size(auto, teacher) == 5
    assert fitting_batch_size(replace(auto, memory_bytes=10**12), teacher) == LARGEST_BATCH
    assert fitting_batch_size(Gaussian(batch_size="auto"), teacher) == LARGEST_BATCH


def test_few_samples_are_counted_where_they_tell_all(make_teacher, monkeypatch):
    """What is counted on many samples leaves memory in pieces that the batches cannot use."""
    counted, count = [], _memory.batch_bytes
    monkeypatch.setattr(_memory, "batch_bytes", lambda *given: (counted.append(given[2]), count(*given))[1])
    auto = ZeroQ(batch_size="auto", memory_bytes=round(count(ZeroQ(), make_teacher("plain"), 250) / TENSORS))
    assert fitting_batch_size(auto, make_teacher("plain")) in (240, 248) and max(counted) <= 32


def test_too_little_memory_for_one_sample_is_said(make_teacher):
    teacher = make_teacher("plain")
    with pytest.raises(UserError) as error:
        fitting_batch_size(ZeroQ(batch_size="auto", memory_bytes=1000), teacher)
    got, _, rest = str(error.value).partition("; allowed: ")
    assert got == "got generator.memory_bytes=1000 for batches of plain"
    least = int(rest.split()[0])
    assert fitting_batch_size(ZeroQ(batch_size="auto", memory_bytes=least), teacher) == 1


def test_a_dataset_records_the_size_and_keeps_it(make_teacher, tmp_path):
    """Same bits as with the size written out; a resumed run takes what is recorded, whatever would fit now."""
    teacher = make_teacher("plain")
    zeroq = ZeroQ(iterations=2)
    auto = replace(zeroq, batch_size="auto", memory_bytes=round(batch_bytes(zeroq, teacher, 9) / TENSORS) + 1)
    part = generate(teacher, auto, 16, 0, tmp_path / "auto")
    assert part.manifest["settings"]["batch_size"] == 8
    assert "memory_bytes" not in part.manifest["settings"]["generator"]
    grown = generate(teacher, replace(auto, memory_bytes=10**9), 30, 0, tmp_path / "auto")
    assert [shard["num_samples"] for shard in grown.shards] == [8, 8, 8, 6]
    stated = generate(teacher, replace(zeroq, batch_size=8), 30, 0, tmp_path / "stated")
    assert grown.sha256 == stated.sha256
    assert SyntheticDataset(tmp_path / "stated").manifest["settings"] == grown.manifest["settings"]


def test_words():
    assert resolve("generator", "zeroq", batch_size="auto").batch_size == "auto"
    with pytest.raises(UserError) as error:
        resolve("generator", "zeroq", batch_size="all")
    assert str(error.value) == "got generator.batch_size='all'; allowed: a whole number >= 1 | auto"
