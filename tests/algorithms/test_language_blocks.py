"""Block by block on a language model of transformers: every layer is in a block, and rounding gets better."""

import pytest
import torch
from tiny_language import kl, own_text, tiny_llama

import dfq
from dfq.blocks import find_blocks
from dfq.hooks import record_dataflow
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student

W2 = Scheme(TensorScheme(3, False, "per_group", 16), FLOAT)
PER_TOKEN = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8, True, "per_token"))


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama()


@pytest.fixture(scope="module")
def dataset(teacher, tmp_path_factory):
    return own_text(teacher, tmp_path_factory.mktemp("text") / "d")


def test_blocks_cover_all_layers(teacher):
    student = Student.from_teacher(teacher, W2)
    flow = record_dataflow(student.module, teacher.example())
    blocks = find_blocks(student.module, flow, student.layers)
    assert sorted(layer for block in blocks for layer in block.layers) == sorted(student.layers)
    assert len(blocks) >= 2 and all(len(block.layers) <= 7 for block in blocks)


@pytest.mark.parametrize("scheme", [W2, PER_TOKEN], ids=["groups", "per_token"])
@pytest.mark.parametrize("algorithm", ["gptq", "quantease", "yaqa", "reconstruction"])
def test_rounding_gets_better(algorithm, scheme, teacher, dataset):
    settings = {"iterations": 40, "finish_iterations": 0} if algorithm == "reconstruction" else {}
    nearest = dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest")
    student = dfq.quantize(teacher, dataset, scheme, algorithm=algorithm, **settings)
    assert kl(teacher, student) < (0.8 if algorithm != "reconstruction" else 1.0) * kl(teacher, nearest)


def test_what_does_not_fit_into_memory_goes_to_files(teacher, dataset):
    students = [dfq.quantize(teacher, dataset, W2, algorithm="gptq", memory_bytes=size) for size in (1, 2**31)]
    weights = [[layer.weight for layer in student.layers.values()] for student in students]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
