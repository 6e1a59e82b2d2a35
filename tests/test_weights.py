"""Copies that take no memory: what lies in a file, what is shared, and that students come out the same to the bit."""

import gc
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import tiny_llama
from torch import nn

import dfq
from dfq import student as student_file
from dfq import weights
from dfq.algorithms import hqq
from dfq.algorithms._reconstruction import float_copy
from dfq.blocks import Captures
from dfq.generators.random_tokens import RandomTokens
from dfq.pipeline import generate
from dfq.quantization import pack
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student

transformers = pytest.importorskip("transformers")
if not sys.platform.startswith("linux"):
    pytest.skip("looks into /proc for what is mapped", allow_module_level=True)

W3 = Scheme(TensorScheme(3, False, "per_group", 16), FLOAT)
ALGORITHMS = {
    "round_to_nearest": {},
    "hqq": {},
    "awq": {},
    "gptq": {},
    "block_ap": {"iterations": 3, "batch_size": 4},
    "distillation": {"max_steps": 2, "batch_size": 4},
}


@pytest.fixture
def files(monkeypatch):
    """Every copy has its weights in a file."""
    monkeypatch.setattr(weights, "LARGEST_IN_MEMORY", 0)


def mapped_addresses():
    """Of all files, first and last byte."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [[int(end, 16) for end in line[0].split("-")] for line in lines if line[4] != "0"]


def in_memory(module):
    """Names of parameters that lie in no file."""
    ranges = mapped_addresses()
    return [name for name, p in module.named_parameters() if not any(a <= p.data_ptr() < b for a, b in ranges)]


def test_tensors_in_a_file_are_the_same_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = [torch.randn(7, 5), torch.randn(3).bfloat16(), torch.arange(11), torch.randn(4, 6).t(), torch.tensor(2.5)]
    found = weights.in_file(iter(given))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(given, found, strict=True))
    assert len({x.untyped_storage().data_ptr() for x in found}) == 5, "each is saved on its own"
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in found)
    assert not list(tmp_path.iterdir())
    found[0].add_(1)
    assert torch.equal(found[0], given[0] + 1) and torch.equal(found[2], given[2])


def test_a_copy_is_changed_alone_and_ties_stay(files):
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    module[1].weight = module[0].weight
    before = module[0].weight.detach().clone()
    copied = weights.copy_network(module)
    assert copied[1].weight is copied[0].weight and not in_memory(copied)
    copied[0].weight.data.zero_()
    assert torch.equal(module[0].weight, before)


def test_a_copy_shares_what_its_twin_has_and_nothing_else(files):
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    other = weights.copy_network(module)
    other[1].weight.data[0, 0] += 1
    copied = weights.copy_network(other, module)
    assert copied[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert copied[1].weight.data_ptr() not in (module[1].weight.data_ptr(), other[1].weight.data_ptr())
    assert torch.equal(copied[1].weight, other[1].weight) and copied[0].weight is not module[0].weight


def test_no_room_for_a_file_is_no_error(files, monkeypatch):
    def full(_tensors):
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "in_file", full)
    module = nn.Linear(4, 4)
    assert torch.equal(weights.copy_network(module).weight, module.weight)
    assert not weights.to_file(module, torch.float32)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    teacher = tiny_llama()
    return teacher, generate(teacher, RandomTokens(), 24, 0, tmp_path_factory.mktemp("text") / "d")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_student_in_files_is_the_same_to_the_bit(algorithm, parts, tmp_path, monkeypatch):
    teacher, dataset = parts
    before = teacher.sha256
    found = []
    for place in ("memory", "files"):
        monkeypatch.setattr(weights, "LARGEST_IN_MEMORY", 0 if place == "files" else 2**60)
        path = tmp_path / place
        settings = ALGORITHMS[algorithm] | {"weight_quantizer": "min_max"}
        student = dfq.quantize(teacher, dataset, W3, algorithm=algorithm, student_dir=path, **settings)
        assert bool(in_memory(student.module)) == (place == "memory" or algorithm == "distillation")
        found += [student.sha256, dfq.load_student(path, teacher).sha256]
    assert len(set(found)) == 1
    del teacher.__dict__["sha256"]
    assert teacher.sha256 == before, "the teacher is as it was"


def test_large_layers_are_fitted_in_parts_to_the_same_bits(parts, monkeypatch):
    teacher, dataset = parts
    sizes, real = [], hqq.HQQ.fit
    monkeypatch.setattr(hqq.HQQ, "fit", lambda self, rows, *rest: sizes.append(len(rows)) or real(self, rows, *rest))
    found = []
    for largest in (2**22, 500):
        monkeypatch.setattr(hqq, "LARGEST_ROWS", largest)
        found.append((dfq.quantize(teacher, dataset, W3, algorithm="hqq").sha256, max(sizes)))
        sizes.clear()
    assert found[0][0] == found[1][0] and found[0][1] > 500 / 16 >= found[1][1]


def test_a_student_is_written_without_a_copy_and_others_may_read_it(parts, tmp_path, monkeypatch):
    teacher, dataset = parts
    student = dfq.quantize(teacher, dataset, W3, algorithm="round_to_nearest")
    written, real = [], student_file.save_file

    def look(tensors, path):
        written.append({name: x.data_ptr() for name, x in tensors.items()})
        real(tensors, path)

    monkeypatch.setattr(student_file, "save_file", look)
    monkeypatch.setattr(student_file, "pack", lambda *args: packed.append(pack(*args)) or packed[-1])
    packed = []
    (tmp_path / "plain").touch()
    student.save(tmp_path / "s")
    assert {x.data_ptr() for x in packed} <= set(written[0].values())
    assert (tmp_path / "s" / "student.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_float_reference_is_the_teacher_where_nothing_changed(parts):
    teacher, _ = parts
    student = Student.from_teacher(teacher, W3)
    name = "model.layers.0.mlp.up_proj"
    student.layers[name].weight.data.mul_(2)
    reference = dict(float_copy(student, teacher).named_parameters())
    shared = {key for key, p in teacher.module.named_parameters() if p.data_ptr() == reference[key].data_ptr()}
    assert set(reference) - shared == {f"{name}.weight"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network with 3 MB of weights; in bfloat16 in the second folder."""
    path = tmp_path_factory.mktemp("network")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.LlamaForCausalLM(config)
    module.save_pretrained(path / "float32")
    module.bfloat16().save_pretrained(path / "bfloat16")
    return path


@pytest.fixture
def from_now_on():
    """What there is already is not looked at: in a process of thousands of tests that takes seconds each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def allocated_bytes():
    """Of all tensors that there are, or that came after ``from_now_on``, and that take memory."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and x.device.type == "cpu"]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors if x.layout == torch.strided}
    ranges = mapped_addresses()
    return sum(s.nbytes() for address, s in storages.items() if not any(a <= address < b for a, b in ranges))


def test_no_copy_of_the_weights_takes_memory(folder, files, from_now_on, tmp_path, monkeypatch):
    before, seen, real = allocated_bytes(), [], Captures.of
    teacher = dfq.load_teacher("huggingface", name=str(folder / "bfloat16"), length=16, device="cpu")
    dataset = generate(teacher, RandomTokens(), 8, 0, tmp_path / "d")

    def look(self, block):
        found = real(self, block)
        seen.append(allocated_bytes() - before)
        return found

    monkeypatch.setattr(Captures, "of", look)
    per_channel = Scheme(TensorScheme(4, True, "per_channel"), FLOAT)
    student = dfq.quantize(teacher, dataset, per_channel, algorithm="gptq", weight_quantizer="min_max")
    seen.append(allocated_bytes() - before)
    assert len(seen) == 5 and max(seen) < teacher.size_bytes / 4, "one block's is a quarter"
    assert student.sha256 != teacher.sha256


def test_a_checkpoint_in_float32_is_read_where_it_lies(folder, monkeypatch):
    monkeypatch.setattr(weights, "in_file", lambda _tensors: pytest.fail("a copy for nothing"))
    monkeypatch.setattr(weights, "LARGEST_IN_MEMORY", 0)
    teacher = dfq.load_teacher("huggingface", name=str(folder / "float32"), length=16, device="cpu")
    assert not in_memory(teacher.module)


def test_weights_in_half_precision_are_cast_to_the_same_network(folder, monkeypatch):
    found = []
    for limit in (0, 2**60):
        monkeypatch.setattr(weights, "LARGEST_IN_MEMORY", limit)
        found.append(dfq.load_teacher("huggingface", name=str(folder / "bfloat16"), length=16, device="cpu"))
    ids = found[0].example()
    assert found[0].sha256 == found[1].sha256 and torch.equal(found[0](ids).logits, found[1](ids).logits)
    assert found[0].module.config.to_dict() == found[1].module.config.to_dict()
    assert not in_memory(found[0].module) and in_memory(found[1].module)


def test_a_weight_in_more_digits_than_the_others_keeps_them(folder, files, tmp_path):
    path = Path(shutil.copytree(folder / "bfloat16", tmp_path / "mixed"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.linspace(0.5, 1.5, 128)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    teacher = dfq.load_teacher("huggingface", name=str(path), length=16, device="cpu")
    assert torch.equal(teacher.module.model.norm.weight, tensors["model.norm.weight"])
