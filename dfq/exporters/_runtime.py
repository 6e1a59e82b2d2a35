"""An ONNX file in the runtimes that read it: does it answer as the student does, on integers, and how fast?

ONNX Runtime has to run a file for it to be written. OpenVINO is asked as well where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.exporters._artifact import (
    LEAST_AGREEMENT,
    BoxesOf,
    Comparison,
    batches_of,
    outputs_of,
    sameness,
    shortfall,
)

# Session options of ONNX Runtime. u8 x s8 kernels of CPUs without VNNI add pairs of products in 16 bits and saturate;
# with the first they are exact. The second computes in float, on weights that are made float when the file is loaded.
# The third keeps float activations float where they meet weights of few bits.
EXACT_INTEGER_KERNELS = {"session.x64quantprecision": "1"}
FLOAT_KERNELS = {"session.disable_quant_qdq": "1"}
ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
EXACT_PRODUCTS = {ACCURACY_LEVEL: "1"}
# Properties of OpenVINO's CPU plugin. The hints rule out bfloat16 and int8 activations that the file does not ask for.
# Its u8 x s8 kernels saturate without VNNI as those of ONNX Runtime do, and no public property makes them exact: only
# weights within [-64, 63] do, or computing in float, which the second asks for.
ACCURATE = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
OPENVINO_FLOAT_KERNELS = ACCURATE | {"LP_TRANSFORMS_MODE": "NO"}
OPENVINO_SECONDS = 600


def session(
    content: bytes, options: Mapping[str, str], disabled_optimizers: Sequence[str] = (), **settings: Any
) -> Any:
    """``settings``: attributes of onnxruntime.SessionOptions."""
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = torch.get_num_threads()
    session_options.log_severity_level = 4  # what goes wrong comes as an exception
    for key, value in settings.items():
        setattr(session_options, key, value)
    for key, value in options.items():
        session_options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(
        content,
        session_options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(disabled_optimizers),
    )


def run(session: Any, inputs: Tensor) -> list[Tensor]:
    return [torch.as_tensor(output) for output in session.run(None, {session.get_inputs()[0].name: inputs.numpy()})]


@torch.no_grad()
def parity(
    student: Callable[[Tensor], Any],
    content: bytes,
    inputs: Tensor,
    options: Mapping[str, str],
    teacher: Callable[[Tensor], Any] | None = None,
    boxes_of: BoxesOf | None = None,
) -> dict[str, Any]:
    """How far ONNX Runtime's outputs are from the student's, at batch size 1 and larger.

    Of a detector, boxes are compared where others are compared by argmax: ``boxes_of`` finds them in its outputs.

    A value on the border between two codes falls to either side by the order of a sum, so that an error of a few
    low-bit codes is no sign of a wrong file: a student differs as much from itself at another batch size. Hence
    ``error_ratio``: the runtime's error as a share of the error that quantization made, that of student to teacher; and
    ``self_agreement``, the student's with itself on images that hardly differ (:func:`sameness`), below which a runtime
    is not blamed.
    """
    import onnxruntime

    batches, key, quantization = batches_of(inputs), Comparison(boxes_of).key, Comparison()
    in_default_session, on_float_kernels = f"{key}_default_session", f"{key}_float_kernels"
    modes = {key: options, in_default_session: {}}
    if options != FLOAT_KERNELS:
        modes[on_float_kernels] = FLOAT_KERNELS
    compared = {mode: Comparison(boxes_of) for mode in modes}
    try:
        sessions = {mode: session(content, chosen) for mode, chosen in modes.items()}
        for batch in batches:
            wanted = outputs_of(student, batch)
            for mode, opened in sessions.items():
                compared[mode].add(wanted, run(opened, batch))
            if teacher is not None:
                quantization.add(outputs_of(teacher, batch), wanted)
    except Exception as error:  # the exceptions of ONNX Runtime share no base class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"got a network whose ONNX file onnxruntime {onnxruntime.__version__} does not run ({lines[-1][-300:]})",
            do="try another exporter.opset or another version of onnxruntime",
        ) from error
    agreement = {mode: comparison.agreement for mode, comparison in compared.items()}
    runtime_error, reference = compared[key].relative_error, quantization.relative_error
    found: dict[str, Any] = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "num_samples": len(inputs),
        "batch_sizes": sorted({len(batch) for batch in batches}),
        **agreement,
        "max_abs_error": compared[key].largest,
        "relative_error": runtime_error,
        "quantization_error": None if teacher is None else reference,
        "error_ratio": runtime_error / reference if reference else None,
    }
    own = sameness(student, batches, boxes_of)
    found |= {"self_agreement": own.agreement, "self_relative_error": own.relative_error}
    low = shortfall(agreement, own)
    if low:
        found["warning"] = f"{' and '.join(low)} below {LEAST_AGREEMENT}"
        if low == [in_default_session] and options == EXACT_INTEGER_KERNELS:
            found["warning"] += "; u8 x s8 kernels saturate without VNNI, session.x64quantprecision=1 makes them exact"
        elif agreement.get(on_float_kernels, 0) >= LEAST_AGREEMENT:
            found["warning"] += "; integer kernels round biases, session.disable_quant_qdq=1 turns them off"
    return found


def latency_ms(
    content: bytes, float_content: bytes | None, inputs: Tensor, options: Mapping[str, str]
) -> dict[str, float | None]:
    """Median milliseconds of a forward of ``inputs``, in turns, so that a busy machine slows both alike."""
    inputs = batches_of(inputs)[0]
    sessions = {"quantized": session(content, options)}
    if float_content is not None:
        sessions["float"] = session(float_content, {})
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for opened in sessions.values():
        run(opened, inputs)
    start = time.perf_counter()
    while len(times["quantized"]) < 5 or (len(times["quantized"]) < 200 and time.perf_counter() - start < 1):
        for name, opened in sessions.items():
            began = time.perf_counter()
            run(opened, inputs)
            times[name].append(1000 * (time.perf_counter() - began))
    return {
        name: round(statistics.median(times[name]), 4) if name in times else None for name in ("float", "quantized")
    }


# -- what runs on integers ------------------------------------------------------------------------------------------

CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv", "ConvInteger", "QLinearConv"}
GEMMS = {"Gemm", "FusedGemm", "QGemm"}
PRODUCTS = {
    *("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul"),
    *("MatMulNBits", "MatMulBnb4"),
}
ATTENTION = {"Attention", "MultiHeadAttention", "QAttention"}
RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
COMPUTE = {*CONVOLUTIONS, "ConvTranspose", *GEMMS, *PRODUCTS, *ATTENTION, *RECURRENT}
SECOND = {"QLinearConv": 3, "QGemm": 3, "QLinearMatMul": 3}  # position of the other factor; elsewhere 1
CONTROL_FLOW = {"If", "Loop", "Scan"}  # their time is that of the nodes inside
INTEGERS = {"int8", "uint8"}
FROM_WEIGHT = {"DequantizeLinear", "Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity"}
MARK = re.compile(r"node_(\d+)")  # the runtime's own names of nodes begin otherwise, or with the node they were made of


def integer_report(content: bytes, inputs: Tensor, options: Mapping[str, str]) -> dict[str, Any]:
    """What runs on integers once ONNX Runtime has optimized the file: by multiply-accumulates, nodes and time.

    Args:
        inputs: a batch; one sample is enough.

    Returns:
        integer_mac_fraction: share of the multiply-accumulates of all compute nodes.
        integer_time_fraction: share of the time of all nodes, those included that only move integers.
        nodes: type of node → how many, in the optimized graph.
        integer_nodes, float_nodes: how many compute nodes.
        float_layers: ``{"name", "op", "mac_fraction"}`` of compute nodes that stayed float, largest first, at most 10.
    """
    import onnx

    inputs = inputs.cpu()
    model = onnx.load_from_string(content)
    nodes = list(model.graph.node)
    for index, node in enumerate(nodes):
        node.name = f"node_{index}"
    content = model.SerializeToString()
    # One run in which weights keep the shapes of the file: packed for a kernel they have none, blocked ones are padded.
    plain = {**options, "session.disable_prepacking": "1"}
    (events,) = _profile(content, inputs, plain, 1, ["NchwcTransformer"])
    macs: Counter[str] = Counter()
    kinds: dict[str, str] = {}
    integers: set[str] = set()
    for event in events:
        op, mark = event["args"]["op_name"], _mark(event)
        if op not in COMPUTE:
            continue
        (types, shapes), (_, results) = _types_and_shapes(event, "input"), _types_and_shapes(event, "output")
        macs[mark] += _multiply_accumulates(op, shapes, results[0])
        kinds[mark] = op
        if _is_integer(op, types, nodes, mark, options):
            integers.add(mark)
    total = sum(macs.values())
    left = [(mark, count) for mark, count in macs.most_common() if mark not in integers]
    names = _layer_names(model.graph)
    # And a few as a user runs it, for nodes and time.
    _, *runs = _profile(content, inputs, options, 6)
    spent = [0, 0]  # microseconds of float and of integer nodes
    for event in (event for events in runs for event in events):
        op = event["args"]["op_name"]
        if op not in CONTROL_FLOW:
            is_integer = _mark(event) in integers if op in COMPUTE else _moves_integers(event)
            spent[is_integer] += event["dur"]
    return {
        "integer_mac_fraction": sum(macs[mark] for mark in integers) / total if total else 0.0,
        "integer_time_fraction": spent[True] / sum(spent) if any(spent) else 0.0,
        "integer_nodes": len(integers),
        "float_nodes": len(left),
        "nodes": dict(Counter(event["args"]["op_name"] for event in runs[-1]).most_common()),
        "float_layers": [
            {"name": names.get(mark, kinds[mark]), "op": kinds[mark], "mac_fraction": count / total}
            for mark, count in left[:10]
        ],
    }


def _profile(
    content: bytes, inputs: Tensor, options: Mapping[str, str], most_runs: int, disabled_optimizers: Sequence[str] = ()
) -> list[list[dict[str, Any]]]:
    """For each run the events of its nodes; two runs at the least if more than one is asked for, within a second."""
    with tempfile.TemporaryDirectory() as folder:
        opened = session(
            content,
            options,
            disabled_optimizers,
            enable_profiling=True,
            profile_file_prefix=str(Path(folder) / "profile"),
        )
        start = time.perf_counter()
        for index in range(most_runs):
            if index < 2 or time.perf_counter() - start < 1:
                run(opened, inputs)
        events = json.loads(Path(opened.end_profiling()).read_text())
    runs: list[list[dict[str, Any]]] = [[]]
    for event in events:
        if event["cat"] == "Node":
            runs[-1].append(event)
        elif event["name"] == "model_run":  # written when it has ended
            runs.append([])
    return runs[:-1]


def _mark(event: Mapping[str, Any]) -> str:
    """The name that was given to the node this one was made of, or its own."""
    found = MARK.match(event["name"])
    return found[0] if found else event["name"]


def _types_and_shapes(event: Mapping[str, Any], side: str) -> tuple[list[str], list[list[int]]]:
    pairs = [pair for tensor in event["args"][f"{side}_type_shape"] for pair in tensor.items()]
    return [kind for kind, _ in pairs], [shape for _, shape in pairs]


def _is_integer(op: str, types: list[str], nodes: list[Any], mark: str, options: Mapping[str, str]) -> bool:
    if op == "MatMulNBits":  # activations come in float; at level 4 they are rounded to int8 inside
        level = options.get(ACCURACY_LEVEL, "4")
        found = MARK.fullmatch(mark)
        if found and nodes[int(found[1])].op_type == op:  # the file's own, not made by ONNX Runtime
            level = str(next((a.i for a in nodes[int(found[1])].attribute if a.name == "accuracy_level"), 0))
        return level == "4"
    if op.startswith("DynamicQuantize"):
        return True
    return types[0] in INTEGERS and types[SECOND.get(op, 1)] in INTEGERS


def _moves_integers(event: Mapping[str, Any]) -> bool:
    """Whether the largest input and the output are integers: a sum or a transpose, not QuantizeLinear."""
    (types, shapes), (results, _) = _types_and_shapes(event, "input"), _types_and_shapes(event, "output")
    if not types or not results:
        return False
    return types[max(range(len(types)), key=lambda index: prod(shapes[index]))] in INTEGERS and results[0] in INTEGERS


def _multiply_accumulates(op: str, inputs: list[list[int]], output: list[int]) -> int:
    """From the shapes alone, whichever way the layout of images is."""
    first, second = inputs[0], inputs[SECOND.get(op, 1)]
    if op in CONVOLUTIONS:  # weight [O, I / groups, ...]
        return prod(output) * prod(second[1:])
    if op == "ConvTranspose":  # weight [I, O / groups, ...]
        return prod(first) * prod(second[1:])
    if op in GEMMS:
        return prod(output) * prod(second) // output[-1]
    if op in RECURRENT:  # input [T, N, I]; weights of input and state
        return first[0] * first[1] * (prod(second) + prod(inputs[2]))
    if op in ATTENTION and len(second) == 2:  # input [N, T, I], one weight for query, key and value
        return prod(first[:2]) * (prod(second) + first[1] * (second[1] + output[-1]) // 2)
    if op in ATTENTION:  # query, key, value [N, (heads,) T, E]
        return (prod(first) + prod(output)) * second[-2]
    if op == "FusedMatMul":  # either factor may be transposed: [b, M, K] x [b, K, N] or [b, M, K] x [K, N]
        batch = prod(output[:-2]) if len(first) > 2 and len(second) > 2 else 1
        return round(prod(output) * sqrt(prod(first) * prod(second) / prod(output) / batch))
    return prod(output) * first[-1]


def _layer_names(graph: Any) -> dict[str, str]:
    """Name of a node → name of the layer whose weight it reads."""
    producers = {output: node for node in graph.node for output in node.output}
    tensors = {tensor.name for tensor in graph.initializer}
    names = {}
    for node in graph.node:
        source = node.input[1] if len(node.input) > 1 else ""
        while source in producers and producers[source].op_type in FROM_WEIGHT:
            source = producers[source].input[0]
        layer = source.rpartition(".")[0]
        if source in tensors and layer:
            names[node.name] = layer
    return names


# -- OpenVINO -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def openvino_parity(
    student: Callable[[Tensor], Any],
    content: bytes,
    batches: Sequence[Tensor],
    boxes_of: BoxesOf | None = None,
) -> dict[str, Any] | None:
    """How far OpenVINO's outputs on the CPU are from the student's, as in :func:`parity`; None if it is not installed.

    What goes wrong in it comes as ``error``: the file was made for, and runs in, ONNX Runtime. It has a process of its
    own, because it can end the one it runs in.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    found: dict[str, Any] = {"runtime": f"openvino {importlib.metadata.version('openvino')}"}
    key = Comparison(boxes_of).key
    on_float_kernels = f"{key}_float_kernels"
    modes = {key: ACCURATE, on_float_kernels: OPENVINO_FLOAT_KERNELS}
    compared: dict[str, Comparison] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "network.onnx").write_bytes(content)
        (folder / "settings.json").write_text(json.dumps({"threads": torch.get_num_threads(), "modes": modes}))
        inputs: dict[str, Any] = {str(i): batch.numpy() for i, batch in enumerate(batches)}
        np.savez(folder / "inputs.npz", **inputs)
        command = [sys.executable, "-m", "dfq.exporters._openvino", name]
        try:
            finished = subprocess.run(command, capture_output=True, text=True, timeout=OPENVINO_SECONDS)
        except subprocess.TimeoutExpired:
            return found | {"error": f"no answer within {OPENVINO_SECONDS} s"}
        for mode in modes:
            if (folder / f"{mode}.npz").exists():
                compared[mode] = _compare_with(folder / f"{mode}.npz", student, batches, boxes_of)
    if key not in compared:
        lines = [line.strip() for line in finished.stderr.splitlines()]
        # The last line that says something; around it stand file and line of OpenVINO's source.
        said = [line for line in lines if line and not line.startswith(("Exception from", "[", "File"))]
        ended = f"its process ended with {finished.returncode}"
        return found | {"error": (said[-1] if said and finished.returncode == 1 else ended)[:300]}
    found |= {mode: comparison.agreement for mode, comparison in compared.items()}
    found["relative_error"] = compared[key].relative_error
    if shortfall({key: found[key]}, sameness(student, list(batches), boxes_of)):
        found["warning"] = f"{key} below {LEAST_AGREEMENT}"
        if found.get(on_float_kernels, 0) >= LEAST_AGREEMENT:
            found["warning"] += "; its u8 x s8 kernels saturate on processors without VNNI"
    return found


def _compare_with(
    path: Path,
    student: Callable[[Tensor], Any],
    batches: Sequence[Tensor],
    boxes_of: BoxesOf | None,
) -> Comparison:
    """Outputs that were written for each batch, against the student's."""
    compared = Comparison(boxes_of)
    with np.load(path) as outputs:
        for i, batch in enumerate(batches):
            wanted = outputs_of(student, batch)
            compared.add(wanted, [torch.as_tensor(outputs[f"{i}_{k}"]) for k in range(len(wanted))])
    return compared
