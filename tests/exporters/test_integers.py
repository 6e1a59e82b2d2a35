"""Files of integers: policy=hardware, int4 and blocks, grids that are no integers, torch.export, a language model.

An export takes seconds: few files, many questions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfq
from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.exporters._integer import integer_network
from dfq.quantizers.min_max import MinMax
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student
from dfq.teacher import InputSpec, Teacher, TokenSpec

SPEC = InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3)


class Residual(nn.Module):
    """Batch norm, ResNet-20's strided block and shortcut, a layer called twice, one tensor into a ReLU and past it."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.pre, self.twice = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        x = self.pre(F.relu(self.twice(F.relu(self.twice(x)))))
        x = x + F.relu(x)
        return self.fc(torch.flatten(self.pool(x), 1))


class Shuffle(nn.Module):
    """ShuffleNet's block and a concatenation of three; depthwise and max pool."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        a, b = x.chunk(2, 1)
        y = torch.cat([a, F.relu(self.conv(self.depthwise(b)))], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(torch.flatten(self.pool(torch.cat([y, x], 1)), 1))


class Mixed(nn.Module):
    """Convolutions and linear layers on two and three dimensions, with and without a bias."""

    def __init__(self):
        super().__init__()
        self.conv, self.mid = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1)
        self.wide, self.plain = nn.Linear(2048, 64), nn.Linear(64, 32, bias=False)
        self.tokens = nn.Linear(32, 16)

    def forward(self, x):
        x = F.relu(self.mid(F.relu(self.conv(x))))
        x = F.relu(self.plain(F.relu(self.wide(x.flatten(1)))))
        return self.tokens(torch.stack([x, -x, 2 * x], 1)).flatten(1)


def images(num_samples=16, seed=1):
    return torch.randn(num_samples, *SPEC.size, generator=torch.Generator().manual_seed(seed))


def quantized(network, scheme, spec=SPEC):
    torch.manual_seed(0)
    module = network()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias)
    teacher = Teacher(module, "classification", spec, name="tiny")
    student = Student.from_teacher(teacher, scheme)
    calibrate(student, images() if spec is SPEC else teacher.example(16), MinMax(), MinMax())
    return teacher, student.freeze()


def weights(num_bits, **settings):
    return TensorScheme(num_bits, **{"symmetric": True, "granularity": "per_channel"} | settings)


def groups(num_bits, group_size=16, symmetric=True, activation=FLOAT, **settings):
    """A scheme with groups but for the first layer, whose 27 values they do not divide."""
    grid = weights(num_bits, granularity="per_group", group_size=group_size, symmetric=symmetric, **settings)
    return Scheme(grid, activation, overrides={"conv": {"weight": {"granularity": "per_channel"}}})


# ------------------------------------------------------------------------------------------------ ONNX

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, numpy_helper  # noqa: E402

from dfq.exporters import _runtime, onnx_qdq  # noqa: E402
from dfq.exporters.onnx_qdq import OnnxQDQ, session_options  # noqa: E402
from dfq.exporters.pt2 import PT2  # noqa: E402


def onnx_of(student, opset=None):
    """The file's bytes, without the comparisons that an export makes of them."""
    opset = OnnxQDQ(opset=opset)._opset(student)
    model = onnx_qdq._to_onnx(integer_network(student), student.input_spec, opset)
    low_bits = onnx_qdq._low_bits(student) if opset >= 21 else None
    return onnx_qdq.serialize(model, {}, low_bits)


def largest_error(student, content, options, batch_sizes=(1, 5, 32)):
    """Relative to the largest output; on images beyond the ranges that were seen."""
    session = _runtime.session(content, options)
    errors = []
    for size in batch_sizes:
        wanted = student(1.5 * images(size, seed=size))
        (found,) = _runtime.run(session, 1.5 * images(size, seed=size))
        errors.append(float((found - wanted).abs().max() / wanted.abs().max()))
    return max(errors)


def hardware(**settings):
    activation = TensorScheme(8, scale_format="e8m0")
    return Scheme(weights(8, scale_format="e8m0", **settings), activation, policy="hardware")


@pytest.fixture(scope="module", params=[Residual, Shuffle])
def integers(request):
    _, student = quantized(request.param, hardware(range="7bit"))
    return SimpleNamespace(student=student, content=onnx_of(student))


def test_integer_kernels_compute_exactly_what_the_student_computes(integers):
    """Scales are powers of two: every product and every sum is exact, and so is where it is rounded to."""
    student, content = integers.student, integers.content
    assert session_options(student) == {}
    for options in ({}, _runtime.EXACT_INTEGER_KERNELS, _runtime.FLOAT_KERNELS):
        assert largest_error(student, content, options) == 0.0, options
    outputs = student(1.5 * images(32, seed=32))
    assert len(outputs.unique()) > 20  # equal because it says something


def test_all_products_run_on_integers(integers):
    report = _runtime.integer_report(integers.content, images(1), session_options(integers.student))
    assert report["integer_mac_fraction"] == 1.0 and report["float_layers"] == []
    assert not {"Conv", "FusedConv", "Gemm", "Add", "Concat"} & report["nodes"].keys()
    assert report["nodes"]["QuantizeLinear"] <= 4  # of the image, and around what only moves values


def test_biases_are_int32_in_steps_of_input_times_weight(integers):
    tensors = {tensor.name: tensor for tensor in onnx.load_from_string(integers.content).graph.initializer}
    for name, layer in integers.student.layers.items():
        bias = [t for t in tensors.values() if t.data_type == TensorProto.INT32 and name in t.name]
        assert len(bias) == 1, name
        step = layer.input_quantizer.scale * layer.weight_quantizer.scale
        codes = torch.tensor(numpy_helper.to_array(bias[0]))
        assert codes.abs().max() > 100 and torch.equal(codes * step, layer.bias), name
    assert not [t.name for t in tensors.values() if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]


def test_eight_bit_weights_are_exact_where_kernels_are_told_to_be():
    _, student = quantized(Residual, hardware())
    assert session_options(student) == _runtime.EXACT_INTEGER_KERNELS
    assert largest_error(student, onnx_of(student), session_options(student)) == 0.0


GROUPED = {
    # scheme, data type of the codes, dims and block size of each layer in blocks, largest code that may be there
    "int4": (groups(4), TensorProto.INT4, 16),
    "uint4": (groups(4, symmetric=False), TensorProto.UINT4, 16),
    "2 bits": (groups(2), TensorProto.INT4, 16),
    "half steps": (groups(2, grid="seq"), TensorProto.INT4, 16),
}


@pytest.fixture(scope="module", params=GROUPED)
def blocks(request):
    scheme, kind, size = GROUPED[request.param]
    _, student = quantized(Mixed, scheme)
    content = onnx_of(student)
    return SimpleNamespace(
        student=student, content=content, kind=kind, size=size, graph=onnx.load_from_string(content).graph
    )


def test_groups_are_blocks_next_to_a_product(blocks):
    tensors = {tensor.name: tensor for tensor in blocks.graph.initializer}
    nodes = [node for node in blocks.graph.node if node.op_type == "DequantizeLinear"]
    found = {}
    for node in nodes:
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        codes, scale, zero_point = (tensors[name] for name in node.input)
        assert codes.data_type == zero_point.data_type == blocks.kind
        assert list(zero_point.dims) == list(scale.dims)
        if "block_size" in settings:
            found[tuple(codes.dims)] = settings["axis"], settings["block_size"], tuple(scale.dims)
    size = blocks.size
    assert found.keys() == {(2048, 64), (64, 32), (32, 16)}  # the convolution's and the last layer's look alike
    for name in ("wide", "plain", "tokens"):
        out, inside = blocks.student.layers[name].weight.shape
        assert found[inside, out] == (0, size, (inside // size, out))


def test_blocks_hold_the_student_s_weights_at_half_a_byte_each(blocks):
    """Packed and unpacked by hand: the file's own codes, scales and zero points give the weight."""
    tensors = {tensor.name: tensor for tensor in blocks.graph.initializer}
    weight = blocks.student.layers["wide"].weight
    dims = {name: list(tensor.dims) for name, tensor in tensors.items()}
    (node,) = [node for node in blocks.graph.node if node.input and dims.get(node.input[0]) == [2048, 64]]

    def unpacked(tensor):
        raw = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8).int()
        assert len(raw) == -(-torch.Size(tensor.dims).numel() // 2)
        codes = torch.stack([raw & 15, raw >> 4], 1).flatten()[: torch.Size(tensor.dims).numel()]
        codes = torch.where(codes > 7, codes - 16, codes) if tensor.data_type == TensorProto.INT4 else codes
        return codes.view(*tensor.dims)

    codes, zero_point = unpacked(tensors[node.input[0]]), unpacked(tensors[node.input[2]])
    scale = torch.tensor(numpy_helper.to_array(tensors[node.input[1]]))
    repeat = [x.repeat_interleave(blocks.size, 0) for x in (scale, zero_point)]
    assert torch.equal(((codes - repeat[1]) * repeat[0]).T, weight)
    # All weights at half a byte; a scale and half a zero point for each group.
    count = sum(layer.weight.numel() for layer in blocks.student.layers.values())
    ideal = count / 2 + count / blocks.size * 4.5
    assert ideal < len(blocks.content) < ideal + 8000


def test_onnx_runtime_multiplies_with_four_bits(blocks):
    options = session_options(blocks.student)
    assert options == {"session.qdq_matmulnbits_accuracy_level": "1"}
    assert largest_error(blocks.student, blocks.content, options) < 1e-5
    report = _runtime.integer_report(blocks.content, images(1), options)
    assert report["nodes"]["MatMulNBits"] == 3


def test_groups_alone_choose_opset_21():
    teacher = Teacher(Mixed(), "classification", SPEC)
    for scheme, opset in ((groups(4), 21), (Scheme(weights(4), FLOAT), 20), (Scheme(), 20)):
        assert OnnxQDQ()._opset(Student.from_teacher(teacher, scheme)) == opset
        assert OnnxQDQ(opset=23)._opset(Student.from_teacher(teacher, scheme)) == 23


def test_channels_of_four_bits_and_groups_that_are_channels():
    """Asymmetric, in groups of 32: the last layer's are whole rows."""
    _, student = quantized(
        Mixed,
        Scheme(
            weights(4, symmetric=False, granularity="per_group", group_size=32),
            FLOAT,
            overrides={name: {"weight": {"granularity": "per_channel"}} for name in ("conv", "mid")},
        ),
    )
    content = onnx_of(student)
    tensors = {tensor.name: tensor for tensor in onnx.load_from_string(content).graph.initializer}
    for name in ("conv", "mid", "tokens"):
        codes = tensors[f"{name}.weight_codes"]
        assert codes.data_type == TensorProto.UINT4 and len(codes.raw_data) == student.layers[name].weight.numel() // 2
    assert largest_error(student, content, session_options(student)) < 1e-5


FLOATS = {
    "fp8": Scheme(weights(8, grid="fp8_e4m3"), TensorScheme(8)),
    "nvfp4": groups(4, grid="fp4_e2m1", scale_format="e4m3"),
    "ternary with a shift": Scheme(weights(2, grid="ternary", symmetric=False), TensorScheme(8)),
}


@pytest.mark.parametrize("kind", FLOATS)
def test_weights_without_integers_are_exact_floats(kind):
    _, student = quantized(Mixed, FLOATS[kind])
    content = onnx_of(student)
    values = [torch.tensor(numpy_helper.to_array(t)) for t in onnx.load_from_string(content).graph.initializer]
    for name, layer in student.layers.items():
        weight = layer.weight
        assert any(v.shape == w.shape and torch.equal(v, w) for v in values for w in (weight, weight.mT)), name
    # ONNX Runtime would round them to int8 between activations of 8 bits.
    options = session_options(student)
    assert options == (_runtime.EXACT_PRODUCTS if kind == "nvfp4" else _runtime.FLOAT_KERNELS)
    # With 8-bit activations a sum on the border between two codes may fall to either side.
    assert largest_error(student, content, options) < (1e-5 if kind == "nvfp4" else 1e-2)


ACTIVATIONS = {
    "dynamic": TensorScheme(8, dynamic=True),
    "per token": TensorScheme(8, True, "per_token"),
    "12 bits": TensorScheme(12),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_that_no_quantize_linear_rounds(kind):
    _, student = quantized(Mixed, Scheme(weights(8), ACTIVATIONS[kind]))
    assert session_options(student) == _runtime.FLOAT_KERNELS
    content = onnx_of(student)
    # A sum on the border between two codes may fall to either side: one step of 1/255 or 1/4095 at the most.
    assert largest_error(student, content, _runtime.FLOAT_KERNELS) < (1e-3 if kind == "12 bits" else 1e-2)
    assert largest_error(student, content, _runtime.FLOAT_KERNELS, [1]) < 1e-5
    graph = onnx.load_from_string(content).graph
    assert not [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {t.data_type for t in graph.initializer if t.name.endswith("weight_codes")} == {TensorProto.INT8}


@pytest.mark.parametrize("exporter", [OnnxQDQ(latency=False), PT2()])
def test_activations_of_small_floats(tmp_path, exporter):
    fp8 = TensorScheme(8, True, grid="fp8_e4m3")
    _, student = quantized(Mixed, Scheme(weights(8, grid="fp8_e4m3"), fp8))
    with pytest.raises(UserError) as error:
        exporter.export(student, tmp_path / "file")
    assert str(error.value) == (
        "got activations on a grid of fp8_e4m3; allowed: grid=uniform | log2 | float; "
        "graphs of integers compute with no other; weights may have any grid"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "weight, activation, options",
    [
        (weights(8), TensorScheme(8), _runtime.EXACT_INTEGER_KERNELS),
        (weights(8, range="7bit"), TensorScheme(8), {}),
        (weights(4), TensorScheme(8), {}),
        (weights(6, symmetric=False), TensorScheme(8), {}),
        (weights(7, symmetric=False), TensorScheme(8), _runtime.EXACT_INTEGER_KERNELS),  # 0..127
        (weights(6, grid="seq"), TensorScheme(8), {}),
        (weights(7, grid="seq"), TensorScheme(8), _runtime.EXACT_INTEGER_KERNELS),  # half steps: -127..127
        (weights(8, grid="seq"), TensorScheme(8), _runtime.FLOAT_KERNELS),
        (FLOAT, TensorScheme(8), _runtime.FLOAT_KERNELS),
        (weights(8), TensorScheme(7), _runtime.FLOAT_KERNELS),
        (weights(8), TensorScheme(8, dynamic=True), _runtime.FLOAT_KERNELS),
        (weights(4), FLOAT, _runtime.EXACT_PRODUCTS),
    ],
)
def test_session_options(weight, activation, options):
    student = Student.from_teacher(Teacher(Shuffle(), "classification", SPEC), Scheme(weight, activation))
    assert session_options(student) == options


# ------------------------------------------------------------------------------------------------ torch.export

ALONE = """
import json, sys, torch
import torch.ao.quantization.fx._decomposed
for line in sys.stdin:
    path, inputs, outputs = json.loads(line)
    extra = {"dfq.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    torch.save([program(x) for x in torch.load(inputs)], outputs)
    assert not [name for name in sys.modules if name.split(".")[0] == "dfq"]
    print(json.dumps(extra["dfq.json"]), flush=True)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that has a program run in a process without dfq, one for all: what the program says of itself."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    folder, command = tmp_path_factory.mktemp("alone"), [sys.executable, "-c", ALONE]
    errors, pipes = folder / "errors", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        errors.open("w") as file,
        subprocess.Popen(command, cwd=folder, env=environment, stderr=file, **pipes) as process,
    ):

        def run(*paths):
            process.stdin.write(json.dumps([str(path) for path in paths]) + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
            assert said, errors.read_text()
            return json.loads(said)

        yield run


ALONE_CASES = {
    "hardware": (Residual, hardware()),
    "groups": (Mixed, groups(4)),
    # Codes from 0 on, below their zero points: torch subtracts one from the other before it makes them float.
    "zero points": (Residual, Scheme(weights(8, symmetric=False), TensorScheme(8))),
    "zero points of groups": (Mixed, groups(4, symmetric=False)),
}


@pytest.mark.parametrize("kind", ALONE_CASES)
def test_the_program_runs_without_dfq_and_is_the_student(tmp_path, kind, alone):
    network, scheme = ALONE_CASES[kind]
    teacher, student = quantized(network, scheme)
    path = tmp_path / "student.pt2"
    description = PT2().export(student, path, teacher)
    assert json.loads((tmp_path / "student.pt2.json").read_text()) == description
    assert description["parity"]["max_abs_error"] == 0.0 and description["parity"]["batch_sizes"] == [1, 15]
    assert description["parity"]["quantization_error"] > 0 and description["format"] == "dfq.artifact"
    batches = [1.5 * images(size, seed=size) for size in (1, 3, 8)]
    torch.save(batches, tmp_path / "inputs")
    said = alone(path, tmp_path / "inputs", tmp_path / "outputs")
    for batch, (found,) in zip(batches, torch.load(tmp_path / "outputs"), strict=True):
        assert torch.equal(found, student(batch))
    metadata = json.loads(said)
    assert metadata["teacher_sha256"] == teacher.sha256
    assert Scheme.from_dict(json.loads(metadata["scheme"])) == scheme
    # A byte a weight, no floats beside it, and nothing of the machine that made it.
    content = path.read_bytes()
    count = sum(layer.weight.numel() for layer in student.layers.values())
    assert count < len(content) < (count * 2 if kind == "groups" else count + 150_000)
    home = str(Path(dfq.__file__).parents[1]).encode()
    assert home not in content and str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content and str(tmp_path).encode() not in content


class Untranslatable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.conv(x)
        return x if float(x.sum()) > 1e9 else x * 2


def test_a_program_that_cannot_be_made_is_not_written(tmp_path, capfd):
    _, student = quantized(Untranslatable, Scheme())
    with pytest.raises(
        UserError, match=r"^got a network that torch\.export can't translate \(.*\); write that"
    ) as error:
        PT2().export(student, tmp_path / "a.pt2")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    assert "Traceback" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ language


def test_a_language_model_of_any_batch_size_and_length(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    spec = TokenSpec(64, 12)
    _, student = quantized(lambda: Logits(transformers.LlamaForCausalLM(config)), Scheme(skip=()), spec)
    content = onnx_of(student)
    model = onnx.load_from_string(content)
    (ids,) = model.graph.input
    assert ids.name == "input_ids" and [d.dim_param for d in ids.type.tensor_type.shape.dim] == ["N", "T"]
    codes = [t for t in model.graph.initializer if t.name.endswith("weight_codes")]
    assert len(codes) == 7 + 2  # projections of a layer, the embedding and the head
    session = _runtime.session(content, _runtime.FLOAT_KERNELS)
    for shape in ((1, 12), (3, 5), (2, 20), (1, 1)):
        ids = torch.randint(64, shape, generator=torch.Generator().manual_seed(0))
        wanted, (found,) = student(ids), _runtime.run(session, ids)
        assert found.shape == wanted.shape == (*shape, 64)
        # One code that falls to the other side is one of 255.
        assert (found - wanted).norm() / wanted.norm() < 5e-3
        assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9


class Logits(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def forward(self, ids):
        return self.network(ids, use_cache=False).logits
