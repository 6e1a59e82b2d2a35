"""What is said of an ONNX file in its runtimes, on graphs written by hand whose counts are known."""

import importlib.util
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dfq.dataset import file_sha256
from dfq.detectors._base import Boxes
from dfq.errors import UserError
from dfq.inspection import describe
from dfq.report import flat

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from dfq.exporters import _artifact, _openvino, _runtime  # noqa: E402
from dfq.exporters._runtime import integer_report, latency_ms, openvino_parity, parity  # noqa: E402

SIZE = (3, 8, 8)
SHAPES = {"stem": (12, 3, 3, 3), "grouped": (24, 3, 3, 3), "fc": (10, 24)}
# Outputs times weights that each reads: 12 x 8 x 8 of 3 x 3 x 3, 24 x 4 x 4 of 12 / 4 x 3 x 3, 10 of 24.
MACS = {"stem": 768 * 27, "grouped": 384 * 27, "fc": 240}
STEP = 0.05  # of activations


class Graph:
    """An ONNX graph in the making."""

    def __init__(self):
        self.nodes, self.tensors = [], []

    def tensor(self, value, name=None):
        name = name or f"t{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind, *inputs, **attributes):
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def qdq(self, x, zero_point=128):
        grid = self.tensor(np.float32(STEP)), self.tensor(np.uint8(zero_point))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *grid), *grid)

    def serialize(self, *outputs, size=("N", *SIZE), dtype=TensorProto.FLOAT, opset=20):
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("x", dtype, size)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in outputs],
            self.tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        return model.SerializeToString()


def weights(largest=63):
    """Codes and scales; within [-63, 63] no processor's integer kernels saturate."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(-largest, largest + 1, shape).astype(np.int8), rng.uniform(1, 2, shape[0]) * scale)
        for (name, shape), scale in zip(SHAPES.items(), (0.004, 0.004, 0.03), strict=True)
    }


def convnet(quantized=tuple(SHAPES), largest=63):
    """Convolution, grouped strided convolution, pool, linear; a grid on both sides of the layers in ``quantized``."""
    graph = Graph()

    def weight(name):
        codes, scale = weights(largest)[name]
        scale = scale.astype(np.float32)
        if name not in quantized:
            return graph.tensor(codes * scale.reshape(-1, *[1] * (codes.ndim - 1)), f"{name}.weight")
        grid = graph.tensor(scale), graph.tensor(np.zeros(len(scale), np.int8))
        return graph.op("DequantizeLinear", graph.tensor(codes, f"{name}.weight_codes"), *grid, axis=0)

    def rounded(x, *layers, zero_point=128):
        return graph.qdq(x, zero_point) if set(layers) & set(quantized) else x

    x = rounded("x", "stem")
    x = graph.op("Conv", x, weight("stem"), pads=[1] * 4)
    x = rounded(graph.op("Relu", x), "stem", "grouped", zero_point=0)
    x = graph.op("Conv", x, weight("grouped"), pads=[1] * 4, strides=[2, 2], group=4)
    x = rounded(graph.op("Relu", x), "grouped", zero_point=0)
    x = rounded(graph.op("GlobalAveragePool", x), "grouped", "fc", zero_point=0)
    x = rounded(graph.op("Flatten", x), "fc", zero_point=0)
    x = graph.op("Gemm", x, weight("fc"), graph.tensor(np.zeros(10, np.float32)), transB=1)
    return graph.serialize(rounded(x, "fc"))


def network(largest=63, rounding=True):
    """What :func:`convnet` computes with every layer quantized, or with none."""
    values = {
        name: torch.tensor(codes * scale.reshape(-1, *[1] * (codes.ndim - 1))).float()
        for name, (codes, scale) in weights(largest).items()
    }

    def rounded(x, zero_point=0):
        return STEP * (torch.clamp(torch.round(x / STEP) + zero_point, 0, 255) - zero_point) if rounding else x

    def forward(x):
        x = rounded(F.relu(F.conv2d(rounded(x, 128), values["stem"], padding=1)))
        x = rounded(F.relu(F.conv2d(x, values["grouped"], padding=1, stride=2, groups=4)))
        return rounded(F.linear(rounded(x.mean((2, 3))), values["fc"]), 128)

    return forward


@pytest.fixture(scope="module")
def images():
    return torch.randn(9, *SIZE, generator=torch.Generator().manual_seed(0))


def shares(report):
    return {entry["name"]: entry["mac_fraction"] for entry in report["float_layers"]}


# ------------------------------------------------------------------------------------------------ integers


def test_a_float_network_has_no_integers_and_the_counts_are_those_by_hand(images):
    report = integer_report(convnet(()), images[:1], {})
    total = sum(MACS.values())
    assert shares(report) == {name: count / total for name, count in MACS.items()}
    assert list(shares(report)) == ["stem", "grouped", "fc"]  # the largest first
    assert report["integer_mac_fraction"] == report["integer_time_fraction"] == report["integer_nodes"] == 0
    assert report["float_nodes"] == 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_grids_on_both_sides_of_every_layer_give_integer_kernels_alone(images, batch_size):
    report = integer_report(convnet(), images[:batch_size], _runtime.EXACT_INTEGER_KERNELS)
    assert report["integer_mac_fraction"] == 1 and report["float_layers"] == []
    assert (report["integer_nodes"], report["float_nodes"]) == (3, 0)
    nodes = report["nodes"]
    assert (nodes["QLinearConv"], nodes["QLinearGlobalAveragePool"], nodes["QGemm"]) == (2, 1, 1)
    assert not {"Conv", "FusedConv", "Gemm", "Relu"} & nodes.keys()
    assert 0 < report["integer_time_fraction"] < 1  # the image is rounded and the logits are made float


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("alone", [True, False])
def test_layers_count_alike_on_either_side(images, name, alone):
    """Integer convolutions run with channels last, float ones in blocks of channels."""
    quantized = (name,) if alone else tuple(set(SHAPES) - {name})
    report = integer_report(convnet(quantized), images[:1], _runtime.EXACT_INTEGER_KERNELS)
    wanted = sum(MACS[layer] for layer in quantized) / sum(MACS.values())
    assert report["integer_mac_fraction"] == pytest.approx(wanted, rel=1e-12)
    assert set(shares(report)) == set(SHAPES) - set(quantized)
    assert report["integer_nodes"] == len(quantized)


def test_float_kernels_are_float(images):
    report = integer_report(convnet(), images[:1], _runtime.FLOAT_KERNELS)
    assert report["integer_mac_fraction"] == 0 and report["float_nodes"] == 3


def test_time_of_integers_is_that_of_integer_layers_and_of_what_only_moves_integers(images, monkeypatch):
    def event(op, dur, inputs, output, name="of the runtime's own"):
        tensors = {"input_type_shape": [dict([entry]) for entry in inputs], "output_type_shape": [dict([output])]}
        return {"name": name, "dur": dur, "args": {"op_name": op, **tensors}}

    image, weight, scalar = [1, 3, 8, 8], [12, 3, 3, 3], ("float", [])
    codes = ("uint8", image), scalar, ("uint8", [])
    one_run = [
        event("QuantizeLinear", 20, [("float", image), *codes[1:]], codes[0]),
        event("QLinearConcat", 3, [scalar, ("uint8", []), *codes], codes[0]),  # the grid comes first
        event("QLinearConv", 50, [*codes, ("uint8", weight)], codes[0], "node_4_token_1_kernel_time"),
        event("DequantizeLinear", 7, [*codes], ("float", image)),
        event("MatMulIntegerToFloat", 10, [codes[0], ("uint8", [8, 8])], ("float", image), "node_9_kernel_time"),
        event("Conv", 10, [("float", image), ("float", weight)], ("float", image), "node_3_kernel_time"),
        event("If", 1000, [("bool", [])], ("float", image)),
    ]
    calls = iter([[one_run], [[event("Conv", 10**6, [("float", image)], ("float", image))], one_run, one_run]])
    monkeypatch.setattr(_runtime, "_profile", lambda *_: next(calls))
    report = integer_report(convnet(), images[:1], {})
    assert report["integer_time_fraction"] == 63 / 100
    assert (report["integer_nodes"], report["float_nodes"]) == (2, 1)
    assert report["nodes"] == {entry["args"]["op_name"]: 1 for entry in one_run}


def test_transposed_and_batched_products(images):
    graph = Graph()
    squares = graph.op("MatMul", graph.op("Transpose", "x", perm=[0, 1, 3, 2]), "x")
    project = graph.op("MatMul", "x", graph.tensor(np.ones((8, 5), np.float32), "project.weight"))
    up = graph.op("ConvTranspose", "x", graph.tensor(np.ones((3, 4, 2, 2), np.float32), "up.weight"), strides=[2, 2])
    report = integer_report(graph.serialize(squares, project, up), images[:2], {})
    counts = {"FusedMatMul": 3 * 8 * 8 * 8, "project": 3 * 8 * 8 * 5, "up": 3 * 64 * 4 * 4}
    assert shares(report) == {name: count / sum(counts.values()) for name, count in counts.items()}


@pytest.mark.parametrize(
    "op, inputs, output, wanted",
    [
        ("LSTM", [[5, 2, 3], [1, 16, 3], [1, 16, 4]], [5, 1, 2, 4], 5 * 2 * (16 * 3 + 16 * 4)),
        ("Attention", [[2, 5, 8], [2, 7, 8], [2, 7, 8]], [2, 5, 8], 2 * 2 * 5 * 7 * 8),
        ("Attention", [[2, 5, 8], [8, 24], [24]], [2, 5, 8], 2 * 5 * 8 * 24 + 2 * 2 * 5 * 5 * 8),
        ("FusedMatMul", [[2, 3, 7, 5], [7, 4]], [2, 3, 5, 4], 2 * 3 * 5 * 4 * 7),
        ("QGemm", [[2, 5], [], [], [3, 5]], [2, 3], 2 * 3 * 5),
    ],
)
def test_multiply_accumulates(op, inputs, output, wanted):
    assert _runtime._multiply_accumulates(op, inputs, output) == wanted


def test_products_of_few_bit_weights_are_integer_where_activations_are_rounded_inside():
    graph = Graph()
    graph.tensors.append(helper.make_tensor("fc.weight_codes", TensorProto.INT4, (32, 8), np.arange(256) % 15 - 7))
    weight = graph.op("DequantizeLinear", "fc.weight_codes", graph.tensor(np.ones((1, 8), np.float32)), axis=0)
    graph.nodes[-1].attribute.append(helper.make_attribute("block_size", 32))
    content = graph.serialize(graph.op("MatMul", "x", weight), size=("N", 32), opset=21)
    for options, fraction in ({}, 1), (_runtime.EXACT_PRODUCTS, 0):
        report = integer_report(content, torch.randn(1, 32), options)
        assert report["integer_mac_fraction"] == fraction and report["nodes"]["MatMulNBits"] == 1
    assert shares(report) == {"fc": 1}


# ------------------------------------------------------------------------------------------------ parity


def test_the_runtime_s_error_beside_that_of_quantization(images):
    content, options = convnet(), _runtime.EXACT_INTEGER_KERNELS
    alone = parity(network(), content, images, options)
    assert alone["quantization_error"] is alone["error_ratio"] is None
    found = parity(network(), content, images, options, network(rounding=False))
    student, teacher = network()(images), network(rounding=False)(images)
    assert found["quantization_error"] == pytest.approx(float((student - teacher).norm() / teacher.norm()), rel=1e-4)
    assert found["error_ratio"] == found["relative_error"] / found["quantization_error"] < 0.5
    assert {key: found[key] for key in alone.keys() - {"quantization_error", "error_ratio"}}.items() <= alone.items()
    assert found["batch_sizes"] == [1, 8] and found["argmax_agreement"] == 1


def test_token_ids_stay_integers_and_every_token_has_a_prediction():
    rng = np.random.default_rng(0)
    table, head = rng.standard_normal((11, 4)).astype(np.float32), rng.standard_normal((4, 11)).astype(np.float32)
    graph = Graph()
    hidden = graph.op("Gather", graph.tensor(table, "embedding.weight"), "x")
    logits = graph.op("MatMul", hidden, graph.tensor(head, "head.weight"))
    content = graph.serialize(logits, size=("N", "T"), dtype=TensorProto.INT64)
    ids = torch.tensor(rng.integers(0, 11, (5, 6)))

    def student(ids):  # moves all logits of a token alike: other numbers, the same most likely token
        return torch.tensor(table)[ids] @ torch.tensor(head) + torch.arange(6.0)[:, None]

    found = parity(student, content, ids, {})
    assert found["argmax_agreement"] == 1 and found["relative_error"] > 0.1
    wrong = parity(lambda ids: -student(ids), content, ids, {})
    assert wrong["argmax_agreement"] < 0.5 and "below 0.99" in wrong["warning"]
    report = integer_report(content, ids[:1], {})
    assert shares(report) == {"head": 1}
    assert latency_ms(content, content, ids[:1], {}).keys() == {"float", "quantized"}
    opened = openvino_parity(student, content, [ids[:1], ids[1:]])  # None where it is not installed
    assert opened is None or opened["argmax_agreement"] == 1


@pytest.mark.parametrize(
    "wrong, advice",
    [
        ([{}], "session.x64quantprecision=1 makes them exact"),
        ([{}, _runtime.EXACT_INTEGER_KERNELS], "session.disable_quant_qdq=1 turns them off"),
        ([{}, _runtime.EXACT_INTEGER_KERNELS, _runtime.FLOAT_KERNELS], "argmax_agreement_float_kernels below 0.99"),
    ],
)
def test_the_warning_says_what_helps(images, monkeypatch, wrong, advice):
    def answer(options, inputs):
        return [-network()(inputs) if options in wrong else network()(inputs)]

    monkeypatch.setattr(_runtime, "session", lambda content, options: options)
    monkeypatch.setattr(_runtime, "run", answer)
    assert parity(network(), b"", images, _runtime.EXACT_INTEGER_KERNELS)["warning"].endswith(advice)


def test_a_file_that_does_not_run(images):
    with pytest.raises(UserError, match=r"whose ONNX file onnxruntime .* does not run"):
        parity(network(), b"no model", images, {})


def test_latency_is_measured_in_turns_and_at_least_five_times(images, monkeypatch):
    clock, turns = iter(range(0, 10**6, 7)), []
    monkeypatch.setattr(_runtime, "session", lambda content, _: content)
    monkeypatch.setattr(_runtime, "run", lambda opened, inputs: turns.append((opened, len(inputs))))
    monkeypatch.setattr(_runtime.time, "perf_counter", lambda: next(clock))
    found = latency_ms(b"quantized", b"float", images, {})
    assert turns == [(b"quantized", 1), (b"float", 1)] * 6  # the first to warm up
    assert found == {"float": 7000, "quantized": 7000}
    assert latency_ms(b"quantized", None, images, {}) == {"float": None, "quantized": 7000}


# ------------------------------------------------------------------------------------------------ OpenVINO

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@needs_openvino
@pytest.mark.parametrize("quantized, largest_error", [((), 1e-5), (tuple(SHAPES), 1e-2)])
def test_openvino_answers_as_the_student_at_any_batch_size(images, quantized, largest_error):
    student = network(rounding=bool(quantized))
    found = openvino_parity(student, convnet(quantized), [images[:1], images[1:]])
    assert found["runtime"].startswith("openvino 20") and found.keys().isdisjoint({"error", "warning"})
    assert found["argmax_agreement"] == found["argmax_agreement_float_kernels"] == 1
    assert 0 < found["relative_error"] < largest_error


@needs_openvino
def test_float_kernels_of_openvino_saturate_on_no_processor():
    many = torch.randn(400, *SIZE, generator=torch.Generator().manual_seed(0))
    found = openvino_parity(network(largest=127), convnet(largest=127), [many])
    # The order of a float sum moves a code by one now and then, and codes of two classes are often equal here.
    assert found["argmax_agreement_float_kernels"] >= _runtime.LEAST_AGREEMENT
    assert ("warning" in found) == (found["argmax_agreement"] < _runtime.LEAST_AGREEMENT)


@needs_openvino
def test_another_network_disagrees_in_openvino(images):
    found = openvino_parity(lambda x: -network()(x), convnet(), [images])
    assert found["argmax_agreement"] < 0.5 and found["relative_error"] > 1
    assert found["warning"] == "argmax_agreement below 0.99"


@needs_openvino
@pytest.mark.parametrize("content", [b"no model", b"", convnet()[:500]])
def test_a_file_that_openvino_does_not_read_is_an_entry(images, content):
    found = openvino_parity(network(), content, [images])
    assert found.keys() == {"runtime", "error"}
    assert found["error"] and "\n" not in found["error"] and "Exception from" not in found["error"]


def test_without_openvino(images, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert openvino_parity(network(), convnet(), [images]) is None


@needs_openvino
def test_openvino_is_imported_without_its_telemetry():
    _openvino.import_openvino().Core()
    assert not [name for name in sys.modules if name.startswith("openvino_telemetry")]


@needs_openvino
def test_openvino_may_end_its_process(images, monkeypatch):
    """It has: a segmentation fault in its CPU plugin."""
    crash = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **settings: run(crash, **settings))
    assert openvino_parity(network(), convnet(), [images])["error"] == f"its process ended with {-signal.SIGSEGV}"


# ------------------------------------------------------------------------------------------------ shown


def test_nested_figures_have_a_row_each(tmp_path, images):
    content = convnet(("stem", "grouped"))
    (tmp_path / "a.onnx").write_bytes(content)
    figures = {
        "argmax_agreement": 1.0,
        "integer": integer_report(content, images[:1], _runtime.EXACT_INTEGER_KERNELS),
        "openvino": None,
    }
    description = {
        "format": "dfq.artifact",
        "schema_version": 1,
        "exporter": {"_target_": "exporter"},
        "sha256": file_sha256(tmp_path / "a.onnx"),
        "size_bytes": len(content),
        "parity": figures,
        "latency_ms": None,
    }
    (tmp_path / "a.onnx.json").write_text(json.dumps(description))
    names, values = (list(column.cells) for column in describe(tmp_path / "a.onnx").columns)
    shown = dict(zip(names, values, strict=True))
    assert shown["parity: integer: float_nodes"] == "1" and shown["parity: openvino"] == "n/a"
    assert "QLinearConv 2" in shown["parity: integer: nodes"].split(", ")
    assert shown["parity: integer: float_layers"] == "name fc, op Gemm, mac_fraction 0.007657"
    assert flat({"list": figures["integer"]["float_layers"] * 2}) == {
        "list": "name fc, op Gemm, mac_fraction 0.007657; name fc, op Gemm, mac_fraction 0.007657"
    }


# ------------------------------------------------------------------------------------------------ a student by itself


def test_boxes_are_compared_by_the_scores_of_those_that_both_find():
    """Two of each; one is the same object, found with 0.8 and 0.6; the others lie apart: 2 * 0.6 / (1.2 + 0.8)."""

    def boxes_of(outputs):
        return [Boxes(*row) for row in zip(*outputs, strict=True)]

    corners = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9]]])
    elsewhere = torch.tensor([[[0.0, 0.0, 0.5, 0.51], [0.1, 0.6, 0.3, 0.9]]])
    labels = torch.zeros(1, 2, dtype=torch.long)
    mine = [corners, torch.tensor([[0.8, 0.4]]), labels]
    theirs = [elsewhere, torch.tensor([[0.6, 0.2]]), labels]
    compared = _artifact.Comparison(boxes_of)
    compared.add(mine, theirs)
    assert compared.key == "box_agreement" and compared.agreement == pytest.approx(2 * 0.6 / 2.0)
    assert _artifact.Comparison(boxes_of).agreement == 1  # nothing found by either


def test_a_runtime_is_not_blamed_where_the_student_differs_from_itself():
    """Pixels of 1 lie on a border for the first network, and nowhere near one for the second."""
    batches = [torch.ones(4, 3)]
    on_the_border = _artifact.sameness(lambda x: torch.stack([x[:, 0] > 1, x[:, 0] <= 1], 1).float(), batches)
    apart = _artifact.sameness(lambda x: torch.stack([x[:, 0] > 0.5, x[:, 0] <= 0.5], 1).float(), batches)
    assert on_the_border.agreement == 0 and apart.agreement == 1
    assert _artifact.shortfall({"a": 0.5, "b": 0.995}, apart) == ["a"]
    assert _artifact.shortfall({"a": 0.5}, on_the_border) == []
    assert _artifact.sameness(lambda ids: ids.float(), [torch.arange(6).view(2, 3)]).agreement == 1
