"""The store: killed, truncated, flipped, appended to, read by workers."""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from dfq.dataset import SyntheticDataset, first_difference, write_atomic
from dfq.errors import UserError
from dfq.generators.gaussian import Gaussian
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import generate

GENERATOR = Gaussian(batch_size=8)


def shards(path):
    return {p.name: p.read_bytes() for p in sorted((path / "shards").glob("*.safetensors"))}


def nothing_left(path):
    return not [p for p in path.rglob("*") if p.name.endswith(".tmp")]


@pytest.fixture
def teacher(make_teacher):
    return make_teacher("plain")


@pytest.fixture
def whole(teacher, tmp_path):
    """30 samples in shards of 8, made in one go."""
    return generate(teacher, GENERATOR, 30, 0, tmp_path / "whole")


def copied(dataset, tmp_path):
    shutil.copytree(dataset.path, tmp_path / "damaged")
    return tmp_path / "damaged"


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "temporary shard": lambda p: (p / "shards" / ".000004.safetensors.4194305.tmp").write_bytes(b"half"),
    "shard without json": lambda p: (p / "shards" / "000002.json").unlink(),
    "json without shard": lambda p: (p / "shards" / "000001.safetensors").unlink(),
    "no third shard at all": lambda p: [(p / "shards" / f"000002.{s}").unlink() for s in ("json", "safetensors")],
    "truncated shard": lambda p: (p / "shards" / "000003.safetensors").write_bytes(
        (p / "shards" / "000003.safetensors").read_bytes()[:-9]
    ),
    "flipped byte": lambda p: flip(p / "shards" / "000000.safetensors"),
    "truncated json": lambda p: (p / "shards" / "000002.json").write_text('{"num_samples": 8, "sha'),
    "empty json": lambda p: (p / "shards" / "000002.json").write_text(""),
    "killed after the first": lambda p: [
        f.unlink() for f in (p / "shards").iterdir() if not f.name.startswith("000000")
    ],
    "no last shard": lambda p: [(p / "shards" / f"000003.{s}").unlink() for s in ("json", "safetensors")],
    "killed before the first": lambda p: shutil.rmtree(p / "shards"),
    "killed while the manifest was written": lambda p: (
        shutil.rmtree(p / "shards"),
        (p / "manifest.json").rename(p / ".manifest.json.4194305.tmp"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_same_command_again_gives_the_bits_of_an_uninterrupted_run(teacher, whole, tmp_path, damage):
    path = copied(whole, tmp_path)
    DAMAGE[damage](path)
    again = generate(teacher, GENERATOR, 30, 0, path)
    assert len(again) == 30 and shards(path) == shards(whole.path) and again.sha256 == whole.sha256
    assert nothing_left(path)
    again.verify()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_in_the_middle_keeps_what_was_finished(teacher, whole, tmp_path, at, monkeypatch):
    calls = []
    sample = Gaussian.sample

    def dies(self, *args):
        calls.append(1)
        if len(calls) > at:
            raise KeyboardInterrupt
        return sample(self, *args)

    monkeypatch.setattr(Gaussian, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(teacher, GENERATOR, 30, 0, tmp_path / "d")
    assert len(SyntheticDataset(tmp_path / "d")) == 8 * at and nothing_left(tmp_path / "d")
    monkeypatch.setattr(Gaussian, "sample", sample)
    generate(teacher, GENERATOR, 30, 0, tmp_path / "d")
    assert shards(tmp_path / "d") == shards(whole.path)


def test_what_is_there_is_not_made_again(teacher, whole, monkeypatch):
    monkeypatch.setattr(Gaussian, "sample", lambda *a: pytest.fail("made again"))
    times = {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")}
    assert len(generate(teacher, GENERATOR, 30, 0, whole.path)) == 30
    assert {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")} == times


def test_append(teacher, whole, tmp_path):
    generate(teacher, GENERATOR, 11, 0, tmp_path / "d")
    assert len(generate(teacher, GENERATOR, 30, 0, tmp_path / "d")) == 30
    assert shards(tmp_path / "d") == shards(whole.path)


def test_fewer_than_there(teacher, whole):
    with pytest.raises(UserError, match=r"got num_samples=29 and dataset_dir=.*, which holds 30; allowed: 30 or more"):
        generate(teacher, GENERATOR, 29, 0, whole.path)
    assert len(SyntheticDataset(whole.path)) == 30


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, r"\(seed: there 0, here 1\)"),
        ({"generator": Gaussian(batch_size=4)}, r"\(batch_size: there 8, here 4\)"),
        (
            {"generator": ZeroQ(batch_size=8, iterations=1)},
            r"\(generator\._target_: there 'dfq\.generators\.gaussian\.Gaussian'",
        ),
    ],
    ids=["seed", "batch_size", "generator"],
)
def test_other_settings_are_the_users_mistake(teacher, whole, change, message):
    before = shards(whole.path)
    options = {"generator": GENERATOR, "seed": 0, **change}
    with pytest.raises(UserError, match=message):
        generate(teacher, options["generator"], 30, options["seed"], whole.path)
    assert shards(whole.path) == before


def test_another_teacher_is_the_users_mistake(make_teacher, whole):
    with pytest.raises(UserError, match=r"made with other settings \(teacher_sha256: there"):
        generate(make_teacher("plain", seed=1), GENERATOR, 30, 0, whole.path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: (p.mkdir(), (p / "thesis.tex").write_text("years")), "which is not empty and no dataset"),
        (lambda p: p.write_text("a file"), "which is a file and no dataset"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(teacher, tmp_path, make, message):
    make(tmp_path / "d")
    with pytest.raises(UserError, match=message):
        generate(teacher, GENERATOR, 8, 0, tmp_path / "d")
    assert (tmp_path / "d").is_file() or [p.name for p in (tmp_path / "d").iterdir()] == ["thesis.tex"]


# ------------------------------------------------------------------------------------------------ reading


def test_items_are_the_rows_of_tensors(whole, teacher):
    tensors = whole.tensors()
    assert tensors["images"].shape == (30, 3, 8, 8) and tensors["logits"].shape == (30, 10)
    for i in (0, 7, 8, 29, -1, -30):
        assert all(torch.equal(whole[i][name], tensors[name][i]) for name in tensors)
    assert len(list(whole)) == 30
    for bad in (30, -31):
        with pytest.raises(IndexError, match=f"sample {bad} of 30"):
            whole[bad]
    for n in (1, 8, 9, 30, 99):
        assert torch.equal(whole.tensors(n)["images"], tensors["images"][:n])
    with torch.no_grad():
        torch.testing.assert_close(teacher(tensors["images"]), tensors["logits"], rtol=1e-4, atol=1e-5)


def test_images_are_stored_exactly(tmp_path):
    images = torch.tensor([1.0, 1e-45, -0.0, 3.4e38, 0.1]).view(5, 1, 1, 1)
    dataset = SyntheticDataset.create(tmp_path / "d", {}, {})
    dataset.write_shard(0, {"images": images, "halves": images.clamp(max=9).half(), "labels": torch.arange(5)}, 0.5)
    found = SyntheticDataset(tmp_path / "d").tensors()
    assert torch.equal(found["images"].view(torch.int32), images.view(torch.int32))
    assert found["halves"].dtype == torch.float16 and found["labels"].dtype == torch.int64
    assert SyntheticDataset(tmp_path / "d")[2]["labels"].shape == ()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader(whole, num_workers):
    whole[0]  # an opened file must not travel
    batches = list(DataLoader(whole, batch_size=7, num_workers=num_workers))
    assert torch.equal(torch.cat([b["images"] for b in batches]), whole.tensors()["images"])


def test_pickling(whole):
    whole[0]
    again = pickle.loads(pickle.dumps(whole))
    assert torch.equal(again[29]["images"], whole[29]["images"])


def test_an_object_sees_what_it_wrote(tmp_path):
    dataset = SyntheticDataset.create(tmp_path / "d", {}, {})
    with pytest.raises(UserError, match="a dataset without samples"):
        dataset.tensors()
    dataset.write_shard(0, {"images": torch.zeros(2, 1)}, 0.25)
    assert len(dataset) == 2 and dataset[1]["images"].item() == 0
    dataset.write_shard(0, {"images": torch.ones(3, 1)}, 0.25)
    assert len(dataset) == 3 and dataset[1]["images"].item() == 1 and dataset.seconds == 0.25
    with pytest.raises(ValueError, match="agree in their first dimension"):
        dataset.write_shard(1, {"a": torch.zeros(2), "b": torch.zeros(3)}, 0.0)
    assert len(SyntheticDataset(tmp_path / "d")) == 3


@pytest.mark.parametrize(
    "damage, message",
    [
        ("shard without json", r"without 000002\.json; run the same generate command again"),
        ("json without shard", r"without 000001\.safetensors"),
        ("no third shard at all", r"without 000002"),
        ("truncated shard", r"000003\.safetensors, whose content does not match its checksum"),
        ("flipped byte", r"000000\.safetensors, whose content does not match its checksum"),
        ("truncated json", r"without 000002\.json"),
        ("no last shard", r"without 000003\.safetensors: 24 of the 30 samples that were finished; run the same"),
        ("killed after the first", r"without 000001\.safetensors: 8 of the 30 samples that were finished"),
        ("killed before the first", r"without 000000\.safetensors: 0 of the 30 samples that were finished"),
    ],
)
def test_verify_names_what_is_broken(whole, tmp_path, damage, message):
    whole.verify()
    path = copied(whole, tmp_path)
    DAMAGE[damage](path)
    with pytest.raises(UserError, match=message) as error:
        SyntheticDataset(path).verify()
    assert "\n" not in str(error.value)


def test_a_dataset_that_is_being_grown_is_whole_up_to_what_was_finished(teacher, whole, tmp_path, monkeypatch):
    def dies(self, *args):
        raise KeyboardInterrupt

    path = copied(whole, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gaussian, "sample", dies)
        generate(teacher, GENERATOR, 60, 0, path)
    SyntheticDataset(path).verify()
    generate(teacher, GENERATOR, 60, 0, path)
    (path / "shards" / "000007.json").unlink()
    (path / "shards" / "000007.safetensors").unlink()
    with pytest.raises(UserError, match="56 of the 60 samples"):
        SyntheticDataset(path).verify()


def test_a_truncated_shard_is_the_users_mistake_when_read(whole, tmp_path):
    path = copied(whole, tmp_path)
    DAMAGE["truncated shard"](path)
    with pytest.raises(UserError, match=r"000003\.safetensors, which is no whole safetensors file"):
        SyntheticDataset(path).tensors()


@pytest.mark.parametrize("stray", ["000001 (copy).json", "000001 2.safetensors", "0notes.json", ".DS_Store"])
def test_a_stray_file_among_the_shards_does_no_harm(whole, tmp_path, stray):
    path = copied(whole, tmp_path)
    (path / "shards" / stray).write_text("{}")
    dataset = SyntheticDataset(path)
    dataset.verify()
    assert len(dataset) == 30 and dataset.sha256 == whole.sha256


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"which has no manifest\.json; allowed: a synthetic dataset folder"),
        ("", "can't be read as json"),
        ("[1]", "which holds no json object"),
        ('{"format": "dfq.student"}', r"which is a dfq\.student folder; allowed: a synthetic dataset folder"),
        (
            '{"format": "dfq.synthetic_dataset", "schema_version": 99}',
            "got a synthetic dataset of schema version 99; allowed: at most 1; install a newer dfq",
        ),
        ('{"format": "dfq.synthetic_dataset"}', "manifest.json"),
    ],
)
def test_folders_that_are_no_dataset(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        SyntheticDataset(tmp_path)


def test_manifest_says_what_made_it(whole):
    manifest = json.loads((whole.path / "manifest.json").read_text())
    assert manifest["provenance"]["pixels"] is False and manifest["provenance"]["labels"] is False
    assert manifest["settings"]["seed"] == 0 and manifest["settings"]["generator"]["_target_"].endswith("Gaussian")


@pytest.mark.parametrize("fraction, every", [(0.1, 10), (0.25, 4), (0.5, 2)])
def test_split_is_disjoint_complete_and_stable_under_appending(teacher, tmp_path, fraction, every):
    small = generate(teacher, GENERATOR, 20, 0, tmp_path / "d")
    kept, held_out = small.split(fraction)
    assert sorted(kept + held_out) == list(range(20)) and len(held_out) == 20 // every
    more_kept, more_held_out = generate(teacher, GENERATOR, 40, 0, tmp_path / "d").split(fraction)
    assert more_kept[: len(kept)] == kept and more_held_out[: len(held_out)] == held_out


@pytest.mark.parametrize("num_samples", [1, 2, 5])
def test_split_of_very_few(teacher, tmp_path, num_samples):
    kept, held_out = generate(teacher, GENERATOR, num_samples, 0, tmp_path / "d").split()
    assert kept and len(held_out) == 1 and (num_samples == 1 or not set(kept) & set(held_out))


# ------------------------------------------------------------------------------------------------ helpers


def test_write_atomic_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and nothing_left(tmp_path)


@pytest.mark.parametrize(
    "have, want, text",
    [
        ({"a": 1}, {"a": 1}, ""),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a.b: there 1, here 2"),
        ({"a": 1}, {"a": 1, "b": 0}, "b: there None, here 0"),
        ({"a": [1]}, {"a": [1, 2]}, "a: there [1], here [1, 2]"),
    ],
)
def test_first_difference(have, want, text):
    assert first_difference(have, want) == text


@pytest.mark.parametrize("fraction", [0, -0.1, 0.6])
def test_a_held_out_share_that_makes_no_sense(whole, fraction):
    with pytest.raises(UserError, match=f"got a held-out share of {fraction}; allowed: above 0, at most 0.5"):
        whole.split(fraction)


@pytest.mark.parametrize("most", [2**29, 0])
def test_samples_of_any_numbers_in_memory_or_mapped(whole, most, monkeypatch):
    monkeypatch.setattr("dfq.dataset.MOST_IN_MEMORY", most)
    monkeypatch.setattr("dfq.dataset.AT_ONCE", 3)
    everything = torch.stack([sample["images"] for sample in whole])
    before = set(Path(tempfile.gettempdir()).glob("dfq_*"))
    assert torch.equal(whole.samples(), everything) and torch.equal(whole.samples(13), everything[:13])
    assert torch.equal(whole.samples(99), everything)
    for numbers in ([29, 0, 8, 7, 7], list(range(3, 28, 5)), [11]):
        assert torch.equal(whole.samples(numbers), everything[numbers])
    assert whole.samples([]).shape == (0, *everything.shape[1:])
    assert set(Path(tempfile.gettempdir()).glob("dfq_*")) == before, "a mapped file has no name"
