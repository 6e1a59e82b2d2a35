"""ONNX Runtime's own operator for weights of 4 bits: packed as its specification has it, run against the student."""

import numpy as np
import pytest
import torch

import dfq
from dfq.errors import UserError
from dfq.pipeline import export
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def student_of(teacher, dataset, size, bits, symmetric):
    last = [name for name, part in teacher.module.named_modules() if isinstance(part, torch.nn.Linear)][-1]
    scheme = Scheme(
        TensorScheme(bits, symmetric, "per_group", size), FLOAT,
        overrides={last: {"weight": {"granularity": "per_channel"}}},
    )  # fmt: skip
    return dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest")


@pytest.mark.parametrize("size, bits, symmetric", [(32, 4, True), (64, 3, False)])
def test_the_file_answers_as_the_student(size, bits, symmetric, make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("mlp")
    dataset = make_dataset(teacher)
    student = student_of(teacher, dataset, size, bits, symmetric)
    path = tmp_path / "net.onnx"
    exporter = resolve("exporter", "onnx_qdq", matmul_nbits=True, latency=False)
    found = export(student, exporter, path, teacher, dataset)
    assert found["parity"]["max_abs_error"] < 1e-5 and found["integer"]["nodes"]["MatMulNBits"] == 1
    model = onnx.load(path)
    assert {entry.domain: entry.version for entry in model.opset_import}["com.microsoft"] == 1
    (node,) = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    settings = {a.name: a.i for a in node.attribute}
    assert settings == {"K": 192, "N": 24, "bits": 4, "block_size": size, "accuracy_level": 1}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    packed, scales = (tensors[name] for name in node.input[1:3])
    assert (
        packed.shape == (24, 192 // size, size // 2)
        and packed.dtype == np.uint8
        and scales.shape == (24 * 192 // size,)
    )
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(24, 192 // size, size).astype(np.float32)
    zeros = np.full((24, 192 // size), 8.0, np.float32)
    if len(node.input) > 3:
        pairs = tensors[node.input[3]]
        zeros = np.stack([pairs & 15, pairs >> 4], -1).reshape(24, -1)[:, : 192 // size].astype(np.float32)
    assert symmetric == (len(node.input) == 3)
    weight = ((codes - zeros[..., None]) * scales.reshape(24, -1, 1)).reshape(24, 192)
    name = next(name for name in student.layers if student.layers[name].weight.shape == (24, 192))
    assert (weight == student.layers[name].weight.numpy()).all()


def test_a_student_without_few_bits_is_told(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("mlp")
    dataset = make_dataset(teacher)
    student = dfq.quantize(teacher, dataset, Scheme(TensorScheme(8, True, "per_channel"), FLOAT),
                           algorithm="round_to_nearest")  # fmt: skip
    with pytest.raises(UserError) as error:
        export(student, resolve("exporter", "onnx_qdq", matmul_nbits=True), tmp_path / "net.onnx", teacher, dataset)
    assert str(error.value) == (
        "got exporter.matmul_nbits=true and a student without weights of at most 4 bits; allowed: 4 bits or fewer, in "
        "groups of 16, 32, 64, 128, ... or per channel; use scheme=w4a16_g32"
    )
    assert not (tmp_path / "net.onnx").exists()
    with pytest.raises(UserError, match=r"got exporter\.opset=20 and matmul_nbits=true; allowed: a whole number >= 21"):
        resolve("exporter", "onnx_qdq", matmul_nbits=True, opset=20)


def test_a_language_model(make_dataset, tmp_path):
    """A tiny Llama: each of its products with packed weights, on a text of another length than it was exported with."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config)
    teacher = dfq.load_teacher(module, task="language_modeling", vocab_size=48, length=12, device="cpu")
    dataset = make_dataset(teacher, 8)
    student = dfq.quantize(teacher, dataset, "w4a16_g32", algorithm="round_to_nearest")
    exporter = resolve("exporter", "onnx_qdq", matmul_nbits=True, latency=False)
    found = export(student, exporter, tmp_path / "net.onnx", teacher, dataset)
    assert found["integer"]["nodes"]["MatMulNBits"] == 7 and found["parity"]["max_abs_error"] < 1e-4
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("MatMulNBits") == 7 and "DequantizeLinear" not in kinds
    session = ort.InferenceSession(tmp_path / "net.onnx")  # without options: inputs are not rounded all the same
    ids = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(0))
    (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), student(ids).logits, rtol=1e-4, atol=1e-4)
