"""ONNX Runtime's own operator for weights of 4 bits: packed as its specification has it, run against the student."""

import numpy as np
import pytest
import torch
from conftest import as_teacher
from torch import nn

import dfq
from dfq.errors import UserError
from dfq.pipeline import export
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def student_of(teacher, dataset, size, bits, symmetric, **settings):
    last = [name for name, part in teacher.module.named_modules() if isinstance(part, torch.nn.Linear)][-1]
    scheme = Scheme(
        TensorScheme(bits, symmetric, "per_group", size, **settings), FLOAT,
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


@pytest.mark.parametrize("settings", [{}, {"scale_format": "float16"}, {"grid": "ternary", "zero_point": "integer"}])
def test_float_zero_points(settings, make_teacher, make_dataset, tmp_path):
    """They are as many float32 as there are scales; a ternary grid's shift is one. Nothing is left of the offsets."""
    teacher = make_teacher("mlp")
    dataset = make_dataset(teacher)
    student = student_of(teacher, dataset, 32, 4, False, **({"zero_point": "float"} | settings))
    path = tmp_path / "net.onnx"
    found = export(student, resolve("exporter", "onnx_qdq", matmul_nbits=True, latency=False), path, teacher, dataset)
    assert found["parity"]["max_abs_error"] < 1e-5 < found["parity"]["quantization_error"]
    model = onnx.load(path)
    (node,) = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    packed, scales, zeros = (tensors[name] for name in node.input[1:])
    assert zeros.dtype == np.float32 and zeros.size == scales.size == 24 * 6 and (zeros != zeros.round()).mean() > 0.9
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(24, 6, 32).astype(np.float32)
    weight = ((codes - zeros.reshape(24, 6, 1)) * scales.reshape(24, 6, 1)).reshape(24, 192)
    layer = next(layer for layer in student.layers.values() if layer.weight.shape == (24, 192))
    np.testing.assert_allclose(weight, layer.weight.numpy(), rtol=0, atol=1e-5 * float(scales.max()))
    assert not any(tensor.shape in ((24, 192), (192, 24)) for tensor in tensors.values())
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") == 1, "the last layer, whose rows have one scale each"


def test_float_zero_points_of_convolutions_stay_beside_codes(make_dataset, tmp_path):
    """MatMulNBits is for products of matrices; of other layers the offset is subtracted from what codes stand for."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                            nn.Linear(288, 32), nn.Linear(32, 10))  # fmt: skip
    teacher = as_teacher(network)
    dataset = make_dataset(teacher)
    weight = TensorScheme(4, False, "per_group", 9, zero_point="float")
    others = {"1": {"granularity": "per_channel"}, "4": {"group_size": 32}, "5": {"granularity": "per_tensor"}}
    scheme = Scheme(weight, FLOAT, overrides={name: {"weight": changes} for name, changes in others.items()})
    student = dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest")
    path = tmp_path / "net.onnx"
    found = export(student, resolve("exporter", "onnx_qdq", matmul_nbits=True, latency=False), path, teacher, dataset)
    assert found["parity"]["max_abs_error"] < 1e-5
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert [kinds.count(kind) for kind in ("MatMulNBits", "DequantizeLinear", "Conv")] == [1, 3, 2]


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


@pytest.mark.parametrize(
    "weight",
    [
        TensorScheme(4, True, "per_group", 32),
        TensorScheme(4, False, "per_group", 32),
        TensorScheme(4, False, "per_group", 32, zero_point="float"),
        TensorScheme(4, False, "per_channel", zero_point="float"),
    ],
)
def test_a_language_model(weight, make_dataset, tmp_path):
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
    student = dfq.quantize(teacher, dataset, Scheme(weight, FLOAT), algorithm="round_to_nearest")
    exporter = resolve("exporter", "onnx_qdq", matmul_nbits=True, latency=False)
    found = export(student, exporter, tmp_path / "net.onnx", None, dataset)
    assert found["integer"]["nodes"]["MatMulNBits"] == 7 and found["parity"]["max_abs_error"] < 1e-4
    kinds = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds.count("MatMulNBits") == 7 and "DequantizeLinear" not in kinds
    session = ort.InferenceSession(tmp_path / "net.onnx")  # without options: inputs are not rounded all the same
    ids = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(0))
    (logits,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), student(ids).logits, rtol=1e-4, atol=1e-4)
