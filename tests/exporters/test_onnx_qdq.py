"""The ONNX file in ONNX Runtime against the student in memory. An export takes seconds: few files, many questions."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dfq.calibration import calibrate
from dfq.dataset import file_sha256
from dfq.errors import UserError
from dfq.quantization import quantize
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.student import Student, read_manifest
from dfq.teacher import InputSpec, Teacher

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import numpy_helper  # noqa: E402

from dfq.exporters import _artifact, _runtime, onnx_qdq  # noqa: E402
from dfq.exporters.onnx_qdq import OnnxQDQ  # noqa: E402

SPEC = InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
SCHEMES = {
    "w8a8": Scheme(),
    "w4a4": Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4)),
    "w3a2, signed activations, one scale": Scheme(TensorScheme(3, True), TensorScheme(2, True)),
    "w2a3, unsigned weights": Scheme(TensorScheme(2, False, "per_channel"), TensorScheme(3)),
}


class Network(nn.Module):
    """Folded batch norm, depthwise, residual, concatenation, padding, a functional pool, an asymmetric input."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.reflect = nn.Conv2d(16, 24, 3, stride=2, padding=1, padding_mode="reflect")
        self.hidden, self.fc = nn.Linear(24, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = x + self.pointwise(F.relu(self.depthwise(x)))
        y = F.relu(self.reflect(torch.cat([x, y], 1)))
        return self.fc(F.relu(self.hidden(F.adaptive_avg_pool2d(y, 1).flatten(1))))


class Reused(nn.Module):
    """One layer called twice, two layers with equal weights, a weight that a function reads too, nested outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 10)
        self.copy = nn.Linear(8, 10)
        self.copy.load_state_dict(self.fc.state_dict())
        self.output_0 = nn.Parameter(torch.rand(10))  # a name that an output of the file has as well

    def forward(self, x):
        x = F.relu(self.twice(F.relu(self.twice(F.relu(self.stem(x))))))
        x = x.mean((2, 3))
        return {"scores": self.fc(x) + self.output_0, "more": [self.copy(2 * x + 1), F.linear(x, self.fc.weight)]}


class Untranslatable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.linalg.eigvals(self.conv(x)).real.flatten(1)


def quantized(network, scheme=SCHEMES["w4a4"], seed=0):
    """A teacher of random weights, its student with min-max ranges, and images that exceed these ranges far."""
    torch.manual_seed(seed)
    network = network()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    if isinstance(network, Reused):
        network.copy.load_state_dict(network.fc.state_dict())
    teacher = Teacher(network, "classification", SPEC, name="tiny")
    student = Student.from_teacher(teacher, scheme)
    images = torch.randn(64, *SPEC.size) + 0.3
    calibrate(student, images, MinMax(), MinMax())
    for layer in student.layers.values():
        layer.input_quantizer.enabled = True
    student.settings = {"dataset": {"provenance": {"pixels": False, "labels": False, "teacher": "tiny"}}}
    return teacher, student.freeze(), images * 3


def run(content, images, options):
    return _runtime.run(_runtime.session(content, options), images)


@pytest.fixture(scope="module", params=list(SCHEMES))
def exported(request, tmp_path_factory):
    scheme = SCHEMES[request.param]
    teacher, student, images = quantized(Network, scheme)
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    description = OnnxQDQ(latency=False).export(student, path, images=images)
    content = path.read_bytes()
    return SimpleNamespace(
        scheme=scheme,
        teacher=teacher,
        student=student,
        images=images,
        path=path,
        content=content,
        graph=onnx.load_from_string(content).graph,
        description=description,
    )


def initializers(graph):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_onnx_runtime_computes_what_the_student_computes_at_any_batch_size(exported, num_samples):
    for images in exported.images[: 7 * num_samples].split(num_samples):
        (found,) = run(exported.content, images, _runtime.FLOAT_KERNELS)
        wanted = exported.student(images)
        assert found.shape == wanted.shape == (num_samples, 10)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_integer_kernels_differ_by_rounded_biases_alone(exported):
    is_8bit = exported.scheme.activation.num_bits == 8
    # No integer kernel runs below 8 bits; at 8 bits, those of a default session saturate on some processors.
    (found,) = run(exported.content, exported.images, _runtime.EXACT_INTEGER_KERNELS if is_8bit else {})
    wanted = exported.student(exported.images)
    assert (found - wanted).norm() / wanted.norm() < (1e-2 if is_8bit else 1e-4)


def test_the_file_holds_the_integer_weights_and_no_float_ones(exported):
    tensors = initializers(exported.graph)
    for name, layer in exported.student.layers.items():
        codes = tensors[f"{name}.weight_codes"]
        assert codes.dtype == ("int8" if exported.scheme.weight.symmetric else "uint8")
        assert torch.equal(torch.tensor(codes).int(), exported.student.integer_weight(name)), name
        assert torch.equal(torch.tensor(tensors[f"{name}.bias"]), layer.bias)
    assert not [name for name, tensor in tensors.items() if tensor.ndim > 1 and not name.endswith(".weight_codes")]
    assert exported.description["parity"]["num_integer_initializers"] == len(exported.student.layers) == 6


def test_activations_saturate_where_the_student_clamps(exported):
    model = onnx.load_from_string(exported.content)
    tensors, quantizing = initializers(model.graph), [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    for node in quantizing:
        model.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.UINT8, None))
    outputs = _runtime.session(model.SerializeToString(), {}).run(None, {"images": exported.images.numpy()})
    codes = [torch.tensor(output).int() for output in outputs[1:]]
    scheme = exported.scheme.activation
    assert len(codes) == len(exported.student.layers) and all(
        tensors[node.input[2]].dtype == "uint8" for node in quantizing
    )
    # The first layer reads the images themselves: not one code differs.
    quantizer = exported.student.layers["stem"].input_quantizer
    wanted = quantize(exported.images, quantizer.scale, quantizer.zero_point, scheme) - scheme.quant_min
    assert torch.equal(codes[0], wanted)
    assert (wanted == 0).any() and (wanted == 2**scheme.num_bits - 1).any()
    assert max(int(c.max()) for c in codes) == 2**scheme.num_bits - 1
    # Min right before QuantizeLinear, and only where uint8 does not saturate by itself. Clip would round biases.
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    assert all((producers.get(node.input[0]) == "Min") == (scheme.num_bits < 8) for node in quantizing)
    assert "Clip" not in producers.values()


def test_no_two_weights_share_a_tensor_that_onnx_runtime_rewrites(exported):
    initial = initializers(exported.graph)
    weights = [n for n in exported.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in initial]
    assert len(weights) == len({n.input[0] for n in weights}) == len({n.input[2] for n in weights}) == 6


def test_the_file_is_valid_and_says_what_made_it(exported):
    model = onnx.load_from_string(exported.content)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [20]
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim] == ["N", 3, 8, 8]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["N", 10]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["teacher_sha256"] == exported.teacher.sha256 and metadata["teacher"] == "tiny"
    assert metadata["pixels"] == metadata["labels"] == "false"
    assert Scheme.from_dict(json.loads(metadata["scheme"])) == exported.scheme


def test_the_file_tells_nothing_of_the_machine_that_made_it(exported):
    assert b".py" not in exported.content and b"torch" not in exported.content
    model = onnx.load_from_string(exported.content)
    assert not any(node.metadata_props or node.doc_string or node.name for node in model.graph.node)
    assert not model.graph.value_info


def test_description(exported):
    description = exported.description
    assert json.loads((exported.path.parent / "student.onnx.json").read_text()) == description
    assert sorted(p.name for p in exported.path.parent.iterdir()) == ["student.onnx", "student.onnx.json"]
    assert description["format"] == "dfq.artifact" and description["schema_version"] == 1
    assert description["exporter"] == {
        "_target_": "dfq.exporters.onnx_qdq.OnnxQDQ",
        "opset": None,
        "latency": False,
        "matmul_nbits": False,
        "decode": False,
    }
    assert description["sha256"] == file_sha256(exported.path)
    assert description["size_bytes"] == len(exported.content)
    assert description["input"] == SPEC.to_dict() and description["scheme"] == exported.scheme.to_dict()
    assert description["teacher"] == {"name": "tiny", "sha256": exported.teacher.sha256}
    parity = description["parity"]
    assert parity["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert (parity["num_samples"], parity["batch_sizes"]) == (64, [1, 63])
    assert parity["argmax_agreement"] >= 0.98 and 0 < parity["relative_error"] < 1e-2
    assert parity["size_ratio"] is parity["float_size_bytes"] is description["latency_ms"] is None
    integer_kernels = exported.scheme.activation.num_bits == 8
    key = "session.x64quantprecision" if integer_kernels else "session.disable_quant_qdq"
    assert description["session_options"] == {key: "1"}
    assert ("argmax_agreement_float_kernels" in parity) == integer_kernels


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """With everything that is measured against a teacher, and without images."""
    teacher, student, _ = quantized(Network)
    folder = tmp_path_factory.mktemp("compared")
    student.save(folder / "student")
    description = OnnxQDQ().export(student, folder / "new" / "student.onnx", teacher)
    return SimpleNamespace(teacher=teacher, student=student, folder=folder, description=description)


def test_size_and_latency_are_compared_to_the_float_network(compared):
    parity, latency = compared.description["parity"], compared.description["latency_ms"]
    assert parity["size_ratio"] == compared.description["size_bytes"] / parity["float_size_bytes"] < 1
    assert parity["float_size_bytes"] > 4 * compared.teacher.num_parameters
    assert latency.keys() == {"float", "quantized"} and min(latency.values()) > 0
    assert parity["num_samples"] == 16 and parity["batch_sizes"] == [1, 15]


def test_the_description_names_the_student_it_was_made_from(compared):
    assert compared.description["student"]["sha256"] == read_manifest(compared.folder / "student")["sha256"]


@pytest.mark.parametrize("exported", ["w4a4"], indirect=True)
def test_the_same_student_gives_the_same_bytes(compared, exported):
    assert compared.description["sha256"] == exported.description["sha256"]


def test_low_agreement_is_said(exported):
    other = quantized(Network, exported.scheme, seed=1)[1]
    parity = _runtime.parity(other, exported.content, exported.images, onnx_qdq.session_options(other))
    assert parity["argmax_agreement"] < 0.9
    assert parity["warning"].startswith("argmax_agreement and argmax_agreement_default_session")
    # Of a default session's integer kernels there may be one: they saturate on processors without VNNI.
    warning = exported.description["parity"].get("warning", "argmax_agreement_default_session")
    assert warning.startswith("argmax_agreement_default_session")


def test_export_float_is_the_teacher(compared):
    images = compared.teacher.example(5)
    (found,) = run(onnx_qdq.export_float(compared.teacher), images, {})
    torch.testing.assert_close(found, compared.teacher(images), rtol=1e-4, atol=1e-5)


def test_shared_layers_and_weights_that_a_function_reads(tmp_path):
    _, student, images = quantized(Reused, SCHEMES["w8a8"])
    path = tmp_path / "reused.onnx"
    description = OnnxQDQ(latency=False).export(student, path, images=images)
    graph = onnx.load(path).graph
    assert [output.name for output in graph.output] == ["output_0", "output_1", "output_2"]
    wanted = student(images)
    wanted = [wanted["scores"], *wanted["more"]]
    for options in (_runtime.FLOAT_KERNELS, _runtime.EXACT_INTEGER_KERNELS):
        for found, want in zip(run(path.read_bytes(), images, options), wanted, strict=True):
            assert (found - want).norm() / want.norm() < 1e-2
    # The layer that is called twice is stored once, moved to uint8; the float weight stays for the function.
    tensors = initializers(graph)
    assert (tensors["twice.weight_codes"].astype(int) - 128 == student.integer_weight("twice").numpy()).all()
    assert tensors["stem.weight_codes"].dtype == "int8"
    assert sum(tensor.shape == (10, 8) and tensor.dtype == "float32" for tensor in tensors.values()) <= 1
    assert description["parity"]["argmax_agreement"] > 0.98


def test_an_operation_without_onnx_is_named_and_nothing_is_written(tmp_path, capfd):
    _, student, images = quantized(Untranslatable)
    with pytest.raises(UserError, match=r"torch\.onnx\.export can't translate \(.*linalg_eig.*\); write") as error:
        OnnxQDQ(latency=False).export(student, tmp_path / "a.onnx", images=images)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    out, err = capfd.readouterr()
    assert out == "" and "eig" not in err


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    _, student, images = quantized(Network)
    with pytest.raises(UserError, match="which is a folder"):
        OnnxQDQ().export(student, tmp_path)
    # What comes before takes seconds and is tested above.
    model = onnx.helper.make_model(onnx.helper.make_graph([], "", [], []))
    monkeypatch.setattr(onnx_qdq, "_to_onnx", lambda *_: model)
    monkeypatch.setattr(onnx_qdq, "parity", lambda *_: {})
    monkeypatch.setattr(onnx_qdq, "integer_report", lambda *_: {})
    monkeypatch.setattr(onnx_qdq, "openvino_parity", lambda *_: None)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"got artifact_path=.*a\.onnx, which can't be written"):
        OnnxQDQ(latency=False).export(student, tmp_path / "file" / "a.onnx", images=images)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_artifact, "write_atomic", full)
    with pytest.raises(UserError, match="No space left"):
        OnnxQDQ(latency=False).export(student, tmp_path / "b.onnx", images=images)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_student_without_grids():
    teacher, student, _ = quantized(Network)
    student.layers["fc"].input_quantizer.enabled = False
    with pytest.raises(UserError, match="layer fc has no grid yet"):
        OnnxQDQ().export(student, "a.onnx", teacher)


def test_a_file_that_onnx_runtime_refuses_is_not_written(tmp_path, monkeypatch):
    _, student, images = quantized(Network)
    monkeypatch.setattr(onnx_qdq, "_to_onnx", lambda *_: onnx.helper.make_model(onnx.helper.make_graph([], "", [], [])))
    monkeypatch.setattr(onnx_qdq, "serialize", lambda *_: b"no model")
    with pytest.raises(UserError, match=f"onnxruntime {onnxruntime.__version__} does not run"):
        OnnxQDQ(latency=False).export(student, tmp_path / "a.onnx", images=images)
    assert not list(tmp_path.iterdir())


def test_settings(monkeypatch):
    with pytest.raises(UserError, match=r"got exporter\.opset=17; allowed: a whole number >= 18"):
        OnnxQDQ(opset=17)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else object())
    with pytest.raises(UserError, match=r"needs onnx and onnxruntime and onnxscript, .*; pip install 'dfq\[onnx\]'"):
        OnnxQDQ()
