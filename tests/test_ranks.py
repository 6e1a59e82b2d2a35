"""Arrow 1 split over ranks: whatever was killed, restarted or merged, the bits are those of a single run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import training_in_ranks
from conftest import language
from launching import environment, launch

import dfq
from dfq.cli import main
from dfq.dataset import HOST, QUALITY, SyntheticDataset
from dfq.errors import UserError
from dfq.generators.gaussian import Gaussian
from dfq.generators.gdfq import GDFQ
from dfq.generators.mixture import Mixture
from dfq.generators.self_generation import SelfGeneration
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import _generate, generate
from dfq.ranks import from_environment, resolve

ZEROQ = ZeroQ(batch_size=4, iterations=2)
GDFQ_ = GDFQ(batch_size=4, iterations=2, train_batch_size=4, num_channels=8)
TEXT = SelfGeneration(batch_size=4, cache_teacher=3, at_end="pad", max_repetition=0.3)
SAMPLES = 22  # five whole batches and a shorter one


def content(path):
    return {file.name: file.read_bytes() for file in (path / "shards").glob("*.safetensors")}


@pytest.fixture
def teacher(make_teacher):
    return make_teacher("plain")


def no_more(*_):
    raise AssertionError("a batch was made again")


@pytest.mark.parametrize(
    "generator",
    [ZEROQ, GDFQ_, Mixture(batch_size=4, parts=(ZEROQ, GDFQ_)), TEXT],
    ids=lambda generator: type(generator).__name__,
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_in_a_folder_each_merged(generator, world_size, teacher, tmp_path, monkeypatch):
    teacher = language() if generator is TEXT else teacher
    whole = generate(teacher, generator, SAMPLES, 3, tmp_path / "whole")
    parts = [tmp_path / f"rank{rank}" for rank in range(world_size)]
    for rank in reversed(range(world_size)):
        part = generate(teacher, generator, SAMPLES, 3, parts[rank], rank, world_size)
        assert [shard["index"] for shard in part.shards] == list(range(rank, 6, world_size))
        assert (parts[rank] / QUALITY).exists() == (world_size == 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "make" if generator is TEXT else "sample", no_more)
        merged = generate(teacher, generator, SAMPLES, 3, tmp_path / "merged", parts=parts)
    assert [shard["sha256"] for shard in merged.shards] == [shard["sha256"] for shard in whole.shards]
    assert merged.sha256 == whole.sha256 and merged.manifest["settings"] == whole.manifest["settings"]
    assert content(merged.path) == content(whole.path) and (merged.path / QUALITY).exists()
    assert merged.seconds == pytest.approx(sum(SyntheticDataset(part).seconds for part in parts))
    merged.verify()


def test_ranks_in_one_folder_one_of_them_killed_and_restarted(teacher, tmp_path, monkeypatch, capsys):
    whole = generate(teacher, ZEROQ, SAMPLES, 3, tmp_path / "whole")
    make, made = ZeroQ.sample, []

    def killed(self, *arguments):
        made.append(make(self, *arguments))
        if len(made) == 2:
            raise KeyboardInterrupt
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(ZeroQ, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(teacher, ZEROQ, SAMPLES, 3, tmp_path / "all", 1, 3)
    assert [shard["index"] for shard in SyntheticDataset(tmp_path / "all").shards] == [1]
    for rank, there in ((0, 12), (2, 18)):  # batches 0, 3 and 1; then 2 and 5, which is the shorter one
        assert len(generate(teacher, ZEROQ, SAMPLES, 3, tmp_path / "all", rank, 3)) == there
        assert f"generate: {there} of 22 samples are there" in capsys.readouterr().err.replace("\n", " ")
        assert not (tmp_path / "all" / QUALITY).exists()
    assert generate(teacher, ZEROQ, SAMPLES, 3, tmp_path / "all", 1, 3).sha256 == whole.sha256
    assert content(tmp_path / "all") == content(whole.path) and (tmp_path / "all" / QUALITY).exists()


def test_a_rank_for_which_no_batch_is_left(teacher, tmp_path, monkeypatch):
    """It trains nothing either, and leaves what others have made."""
    generate(teacher, GDFQ_, 8, 0, tmp_path / "all", 0, 3)
    monkeypatch.setattr(GDFQ, "prepare", no_more)
    assert len(generate(teacher, GDFQ_, 8, 0, tmp_path / "all", 2, 3)) == 4


def test_what_the_parts_lack_is_made(teacher, tmp_path):
    whole = generate(teacher, ZEROQ, SAMPLES, 3, tmp_path / "whole")
    generate(teacher, ZEROQ, SAMPLES, 3, tmp_path / "part", 1, 2)
    (tmp_path / "part" / "shards" / "000003.json").unlink()
    shutil.copytree(tmp_path / "part", tmp_path / "again")
    merged = dfq.generate(teacher, ZEROQ, SAMPLES, tmp_path / "new", 3, parts=[tmp_path / "part", tmp_path / "again"])
    assert merged.sha256 == whole.sha256


def test_a_shorter_last_batch_gives_way_to_a_whole_one(teacher, tmp_path):
    for name, samples in (("short", 6), ("long", 8)):
        generate(teacher, ZEROQ, samples, 3, tmp_path / name)
    for first, second in (("short", "long"), ("long", "short")):
        parts = [tmp_path / first, tmp_path / second]
        merged = generate(teacher, ZEROQ, 8, 3, tmp_path / first / "merged", parts=parts)
        assert merged.sha256 == SyntheticDataset(tmp_path / "long").sha256


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_text_of_ranks_in_one_folder(world_size, tmp_path):
    teacher, generator = language(), SelfGeneration(batch_size=4)
    whole = generate(teacher, generator, SAMPLES, 3, tmp_path / "whole")
    for rank in reversed(range(world_size)):
        found = generate(teacher, generator, SAMPLES, 3, tmp_path / "all", rank, world_size)
    assert found.sha256 == whole.sha256 and content(found.path) == content(whole.path)
    assert found.manifest["settings"] == whole.manifest["settings"] and (found.path / QUALITY).exists()


# ------------------------------------------------------------------------------------------------ launchers


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (0, 1)),  # a batch script, which runs once
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 2)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, (0, 1)),
        ({"RANK": "x", "WORLD_SIZE": "4"}, (0, 1)),
    ],
)
def test_who_this_process_is(variables, expected):
    assert from_environment(variables) == expected


def test_ranks_as_options_and_from_the_environment(monkeypatch):
    assert resolve("auto", "auto") == (0, 1) and resolve(1, 3) == (1, 3) and resolve(0, "auto") == (0, 1)
    with pytest.raises(UserError, match=r"got rank=auto and world_size=2, and a launcher of 1; allowed: rank=auto"):
        resolve("auto", 2)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert resolve("auto", "auto") == resolve("auto", 3) == (2, 3) and resolve(0, 2) == (0, 2)


WORDS = ["-m", "dfq", "generate", "num_samples=20", "generator.batch_size=4", "generator.iterations=2", "device=cpu"]


@pytest.mark.slow
def test_processes_of_a_launcher_and_those_that_it_starts_itself(tmp_path, capfd):
    """Two ranks by their environment, and ``processes=2``: the bytes of one process."""
    teacher = dfq.load_teacher("digits", device="cpu")
    whole = generate(teacher, replace(ZEROQ, iterations=2), 20, 0, tmp_path / "whole")
    launch([*WORDS, "dataset_dir=launched"], 2, tmp_path)
    again = subprocess.run(
        [sys.executable, *WORDS, "processes=2", "dataset_dir=started"], cwd=tmp_path, env=environment()
    )
    assert again.returncode == 0, capfd.readouterr().err
    for name in ("launched", "started"):
        assert content(tmp_path / name) == content(whole.path)
        assert SyntheticDataset(tmp_path / name).sha256 == whole.sha256 and (tmp_path / name / QUALITY).exists()


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_processes_of_a_launcher_write_the_text_of_one(cached, tmp_path):
    """Processes with a folder each, merged, and two in one folder: the bytes of one."""
    pytest.importorskip("transformers")
    training_in_ranks.llama().module.save_pretrained(tmp_path / "llama")
    words = ["-m", "dfq", "generate", "teacher=huggingface", "teacher.name=llama", "teacher.length=12", "device=cpu"]
    words += ["generator=self_generation", "generator.batch_size=4", f"num_samples={SAMPLES}", "seed=3"]
    words += ["generator.cache_teacher=3"] if cached else []
    teacher = dfq.load_teacher("huggingface", name=str(tmp_path / "llama"), length=12, device="cpu")
    generator = SelfGeneration(batch_size=4, **({"cache_teacher": 3} if cached else {}))
    whole = generate(teacher, generator, SAMPLES, 3, tmp_path / "whole")
    launch([*words, "dataset_dir=all"], 2, tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, *words, f"rank={rank}", "world_size=2", f"dataset_dir=part{rank}"],
            cwd=tmp_path,
            env=environment(),
        )
        for rank in (0, 1)
    ]
    assert [rank.wait(timeout=900) for rank in ranks] == [0, 0]
    parts = [tmp_path / f"part{rank}" for rank in (0, 1)]
    assert [[shard["index"] for shard in SyntheticDataset(part).shards] for part in parts] == [[0, 2, 4], [1, 3, 5]]
    generate(teacher, generator, SAMPLES, 3, tmp_path / "merged", parts=parts)
    for name in ("all", "merged"):
        found = SyntheticDataset(tmp_path / name)
        assert content(found.path) == content(whole.path) and found.sha256 == whole.sha256
        assert found.manifest["settings"] == whole.manifest["settings"] and (found.path / QUALITY).exists()


def test_a_rank_that_is_killed_and_started_again(tmp_path):
    """SIGKILL in the middle of a batch: the others lose nothing, and the restarted one makes what is missing, once."""
    words = [*WORDS, "generator.iterations=120", "dataset_dir=all", "world_size=2"]
    killed = subprocess.Popen([sys.executable, *words, "rank=1"], cwd=tmp_path, env=environment())
    first = tmp_path / "all" / "shards" / "000001.json"
    deadline = time.monotonic() + 600
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    made = first.stat().st_mtime_ns
    teacher = dfq.load_teacher("digits", device="cpu")
    generator = ZeroQ(batch_size=4, iterations=120)
    there = len(generate(teacher, generator, 20, 0, tmp_path / "all", 0, 2))
    assert there < 20, "the rank was not killed in the middle"
    found = generate(teacher, generator, 20, 0, tmp_path / "all", 1, 2)
    assert len(found) == 20 and first.stat().st_mtime_ns == made, "a batch was made twice"
    whole = generate(teacher, generator, 20, 0, tmp_path / "whole")
    assert content(found.path) == content(whole.path) and found.sha256 == whole.sha256


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_rank_ends_with_the_one_that_started_it(is_ours):
    """Whatever it waits for. One that a shell or a script has started goes on when that ends."""
    end, rest_s = "from dfq.ranks import end_with_parent as end; import time; end()", 60 if is_ours else 4
    rank = f"{end}; print('here', flush=True); time.sleep({rest_s}); print('still here')"
    start = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {rank!r}]); time.sleep(60)"
    start = f"{end}; {start}" if is_ours else start
    with subprocess.Popen([sys.executable, "-c", start], env=environment(), stdout=-1, stderr=-2, text=True) as parent:
        assert parent.stdout.readline() == "here\n"
        began = time.monotonic()
        parent.kill()
        said = parent.stdout.read()  # until the rank has closed its end too
    ended = "dfq: the process that has started this rank has ended, and so does this one\n"
    assert said == (ended if is_ours else "still here\n")
    assert time.monotonic() - began < 30


def test_ranks_that_add_nothing_any_more_are_not_waited_for(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("dfq.pipeline.QUIET_S", 0.5)
    waiting = SimpleNamespace(teacher=teacher, num_samples=SAMPLES, seed=3)
    with pytest.raises(UserError, match=r"got 12 of 22 samples in .*, and no more for \d+ s; allowed: ranks that all"):
        _generate(waiting, ZEROQ, tmp_path / "data", 0, 2)


def test_half_written_files_of_other_computers_stay(teacher, tmp_path):
    """Ranks on several computers share a folder: what the process of that number does here says nothing of theirs."""
    generate(teacher, ZEROQ, 8, 3, tmp_path / "all")
    shards = tmp_path / "all" / "shards"
    names = {"elsewhere": ".000005.json.elsewhere-4194305.tmp", "old": ".000006.json.elsewhere-4194305.tmp"}
    names |= {"here": f".000007.json.{HOST}-4194305.tmp"}
    for name in names.values():
        (shards / name).write_bytes(b"half")
    os.utime(shards / names["old"], (time.time() - 100_000,) * 2)
    generate(teacher, ZEROQ, 12, 3, tmp_path / "all")
    assert [name for name, file in names.items() if (shards / file).exists()] == ["elsewhere"]


# ------------------------------------------------------------------------------------------------ mistakes


def test_parts_of_something_else(teacher, tmp_path):
    generate(teacher, ZEROQ, 8, 3, tmp_path / "part")
    for generator, seed, difference in (
        (ZEROQ, 4, "seed: there 3, here 4"),
        (replace(ZEROQ, iterations=3), 3, "generator.iterations: there 2, here 3"),
        (replace(ZEROQ, batch_size=2), 3, "batch_size: there 4, here 2"),
    ):
        with pytest.raises(UserError, match=f"got .*part, made with other settings than .*new.*{difference}"):
            generate(teacher, generator, 8, seed, tmp_path / f"new{seed}{difference[:3]}", parts=[tmp_path / "part"])


def test_a_damaged_part_is_not_taken(teacher, tmp_path):
    generate(teacher, ZEROQ, 8, 3, tmp_path / "part")
    file = tmp_path / "part" / "shards" / "000001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"got .*part.*000001.safetensors, whose content does not match its checksum"):
        generate(teacher, ZEROQ, 8, 3, tmp_path / "new", parts=[tmp_path / "part"])


def test_the_same_batch_with_other_bits(teacher, tmp_path):
    mine, other = (generate(teacher, ZEROQ, 8, 3, tmp_path / name) for name in ("mine", "other"))
    tensors = {name: values[:4] + 1 for name, values in other.tensors().items()}
    other.write_shard(0, tensors, 0.0)
    with pytest.raises(UserError, match=r"got .*other, whose batch 0 has other bits than that in .*mine"):
        mine.adopt(other)


@pytest.mark.parametrize("rank, world_size, allowed", [(2, 2, "0 to 1"), (-1, 2, "0 to 1"), (1, 1, "0 to 0")])
def test_a_rank_that_there_is_not(rank, world_size, allowed, teacher, tmp_path):
    with pytest.raises(UserError) as error:
        generate(teacher, Gaussian(), 8, 0, tmp_path / "new", rank, world_size)
    assert str(error.value) == f"got rank={rank} and world_size={world_size}; allowed: rank from {allowed}"
    assert not (tmp_path / "new").exists()


def test_the_command_line(tmp_path, monkeypatch, capfd):
    """Two ranks with a folder each, merged; only who has all of it describes it."""
    monkeypatch.chdir(tmp_path)
    words = ["generate", "generator=gaussian", "num_samples=20", "generator.batch_size=8"]
    for rank in (0, 1):
        assert main([*words, f"rank={rank}", "world_size=2", f"dataset_dir=part{rank}"]) == 0
        assert "checksums" not in capfd.readouterr().out
    assert main([*words, "parts=[part0,part1]", "dataset_dir=all"]) == 0
    assert "20 in 3 shards" in capfd.readouterr().out
    assert main([*words, "rank=2", "world_size=2"]) == 2
    assert "dfq: got rank=2 and world_size=2; allowed: rank from 0 to 1" in capfd.readouterr().err
