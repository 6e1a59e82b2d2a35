"""ONNX with QuantizeLinear / DequantizeLinear and integer initializers, for ONNX Runtime and whatever else reads QDQ.

::

    images ── (Min) ── QuantizeLinear ── DequantizeLinear ──┐
    FILE's int8 codes ─────────────── DequantizeLinear ── Conv ── ...       bias: float, as in the student

    FILE         the model; metadata_props say what made it
    FILE.json    the same for people and tools, with parity, latency and the checksum of FILE

What ONNX Runtime 1.32 does with such a graph decides its shape (every point below is held by a test):

- An activation of fewer than 8 bits is cut off by ``Min`` at its largest value; its smallest code is 0, where uint8
  saturates by itself (a signed grid is moved up by a zero point). Not ``Clip``, for between Conv and QuantizeLinear
  ONNX Runtime looks through Clip and then rounds the bias to int32 in steps of input scale times weight scale: at 4
  bits that moves one code in fifty, and no kernel gets faster by it.
- At 8 bits nothing stands in between, so that Conv and QuantizeLinear fuse to an integer kernel, int32 bias included.
- Every weight has a zero point of its own. With ``session.x64quantprecision``, ONNX Runtime rewrites int8 weights to
  uint8 and fails to load a file where two weights share a zero point or where one has none.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import dfq
from dfq.dataset import write_atomic, write_json
from dfq.errors import UserError
from dfq.hooks import tensors_in
from dfq.modules import Quantizer
from dfq.settings import PositiveInt, to_config
from dfq.student import CODES, Student
from dfq.teacher import InputSpec, Teacher

SCHEMA_VERSION = 1
# u8 x s8 kernels of CPUs without VNNI add pairs of products in 16 bits and saturate; with this they are exact.
SESSION_OPTIONS = {"session.x64quantprecision": "1"}
LEAST_AGREEMENT = 0.99
BATCH_SIZE = 64


@dataclass(frozen=True)
class OnnxQDQ:
    """One ``.onnx`` file with dynamic batch; input ``images``, output ``logits`` (several: ``output_0``, ...)."""

    opset: PositiveInt = 20  # 18 or newer
    latency: bool = True  # time the file against the float network's

    format: ClassVar[str] = "onnx_qdq"
    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self):
        if self.opset < 18:
            raise UserError(f"got exporter.opset={self.opset}", "a whole number >= 18")
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"got exporter=onnx_qdq without {', '.join(missing)}", do="pip install 'dfq[onnx]'")

    def export(
        self, student: Student, path: Path, teacher: Teacher | None = None, images: Tensor | None = None
    ) -> dict:
        """Write ``path`` and ``path``.json; nothing is written unless ONNX Runtime runs the file.

        Args:
            path: the file, usually ``*.onnx``.
            teacher: what size and latency are compared to; without it both stay None.
            images: [N, C, H, W] to compare student and file on (synthetic samples); default: a little noise.

        Returns:
            what ``path``.json holds.
        """
        path = Path(path)
        if path.is_dir():
            raise UserError(
                f"got artifact_path={path}, which is a folder", "a file", f"try {path / ('student' + self.suffix)}"
            )
        for name, layer in student.layers.items():
            if not (layer.weight_quantizer.enabled and layer.input_quantizer.enabled):
                raise UserError(
                    f"got a student whose layer {name} has no grid yet", do="run an algorithm on it before exporting"
                )
        spec = student.input_spec
        if images is None:
            images = torch.randn(16, *spec.size, generator=torch.Generator().manual_seed(0))
        provenance = _provenance(student)
        content = _serialize(_to_onnx(_integer_network(student), spec, self.opset), provenance)
        float_content = None if teacher is None else export_float(teacher, self.opset)
        parity = _parity(student, content, images) | {
            "num_integer_initializers": len(student.layers),
            "float_size_bytes": None if float_content is None else len(float_content),
            "size_ratio": None if float_content is None else len(content) / len(float_content),
        }
        latency = (
            _latency_ms(content, float_content, images[:1]) if self.latency else {"float": None, "quantized": None}
        )
        description = {
            "format": "dfq.artifact",
            "schema_version": SCHEMA_VERSION,
            "dfq_version": dfq.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "exporter": to_config(self),
            "student": {"sha256": provenance["student_sha256"], "settings": student.settings},
            "teacher": {"name": student.teacher["name"], "sha256": student.teacher["sha256"]},
            "scheme": student.scheme.to_dict(),
            "input": spec.to_dict(),
            "path": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
            "parity": parity,
            "latency_ms": latency,
        }
        sidecar = path.with_name(path.name + ".json")
        try:
            sidecar.unlink(missing_ok=True)
            write_atomic(path, content)
            write_json(sidecar, description)
        except OSError as error:
            raise UserError(f"got artifact_path={path}, which can't be written ({error.strerror})") from error
        return description


def export_float(teacher: Teacher, opset: int = 20) -> bytes:
    """The float network as ONNX by the same route: what a quantized file is compared to."""
    return _serialize(_to_onnx(copy.deepcopy(teacher.module), teacher.input_spec, opset), {})


# -- the integer network --------------------------------------------------------------------------------------------


class _IntegerInput(nn.Module):
    """Takes the place of a layer's input quantizer: x → codes (uint8, smallest code 0) → x_hat."""

    largest: Tensor

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        scheme = quantizer.scheme
        self.scale = float(quantizer.scale)
        self.zero_point = int(quantizer.zero_point) - scheme.quant_min
        self.saturates = scheme.num_bits == 8
        # The largest value of the grid divided by scale rounds back to its code: a product of an integer and a float.
        self.register_buffer("largest", (scheme.quant_max - quantizer.zero_point) * quantizer.scale)

    def forward(self, x: Tensor) -> Tensor:
        if not self.saturates:
            x = torch.minimum(x, self.largest)
        grid = (self.scale, self.zero_point, 0, 255, torch.uint8)
        codes = torch.ops.quantized_decomposed.quantize_per_tensor(x, *grid)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *grid)


class _IntegerWeight(nn.Module):
    """Takes the place of a layer's weight quantizer: holds the codes and gives w_hat, whatever the float weight is."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, codes: Tensor, quantizer: Quantizer):
        super().__init__()
        dtype = torch.int8 if quantizer.scheme.quant_min < 0 else torch.uint8
        self.axis = quantizer.axis
        self.register_buffer("codes", codes.to(dtype))
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(dtype))

    def forward(self, weight: Tensor) -> Tensor:
        limits = torch.iinfo(self.codes.dtype)
        span = (limits.min, limits.max, self.codes.dtype)
        ops = torch.ops.quantized_decomposed
        if self.axis is None:
            return ops.dequantize_per_tensor.tensor(self.codes, self.scale, self.zero_point, *span)
        return ops.dequantize_per_channel(self.codes, self.scale, self.zero_point, self.axis, *span)


class _Flat(nn.Module):
    """A network whose outputs, however nested, come as a tuple."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.network(images)))


def _integer_network(student: Student) -> nn.Module:
    """A copy of the student on the CPU whose weight layers read integer buffers.

    Only the quantizers are replaced: a float weight that something else reads as well stays where it is.
    """
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (registers torch.ops.quantized_decomposed)

    network = copy.deepcopy(student.module).cpu().requires_grad_(False)
    for name in student.layers:
        layer = network.get_submodule(name)
        layer.input_quantizer = _IntegerInput(layer.input_quantizer)
        layer.weight_quantizer = _IntegerWeight(student.integer_weight(name).cpu(), layer.weight_quantizer)
    return network


# -- torch to ONNX --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No prints, warnings or log lines of the torch exporter inside."""
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _to_onnx(network: nn.Module, spec: InputSpec, opset: int) -> Any:
    """``network`` as onnx.ModelProto with dynamic batch ``N``."""
    flat = _Flat(network).cpu().eval()
    example = torch.randn(2, *spec.size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), _silence():
            outputs = len(flat(example))
            program = torch.onnx.export(
                flat,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
                dynamic_shapes=({0: "N"},),
            )
            assert program is not None
            return program.model_proto
    except Exception as error:  # whatever a user's forward, or the exporter on it, raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise UserError(
            f"got a network that torch.onnx.export can't translate ({lines[0][:300]})",
            do="write that operation differently in the network",
        ) from error


def _serialize(model: Any, metadata: dict[str, str]) -> bytes:
    """The model as a file: integer weights with a zero point of their own each, short names, no traces of its making."""
    _own_weight_qparams(model.graph)
    _shorten(model)
    model.producer_name, model.producer_version = "dfq", dfq.__version__
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    try:
        return model.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf has a different one in each implementation
        raise UserError("got a network of more than 2 GB", "what fits one ONNX file") from error


def _own_weight_qparams(graph: Any) -> None:
    """Name the codes of every weight after its layer, and give it scale and zero point of its own.

    The exporter merges equal initializers; here they are taken apart again. Two calls of one layer share one
    DequantizeLinear.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made: dict[tuple[str, ...], str] = {}  # inputs of a DequantizeLinear → its output
    merged: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            inputs = tuple(node.input)
            if inputs in made:
                merged[node.output[0]] = made[inputs]
                continue
            layer = inputs[0].removesuffix(".weight_quantizer.codes").removeprefix("network.")
            while any(tensor.name == layer + CODES for tensor in graph.initializer):
                layer += "_"  # two layers with the same codes and different scales
            made[inputs] = node.output[0]
            for position, suffix in enumerate((CODES, ".weight_scale", ".weight_zero_point")):
                graph.initializer.append(numpy_helper.from_array(tensors[inputs[position]], layer + suffix))
                node.input[position] = layer + suffix
        nodes.append(node)
    for node in nodes:
        for position, name in enumerate(node.input):
            node.input[position] = merged.get(name, name)
    read = {name for inner in _graphs(graph) for node in inner.node for name in node.input}
    read |= {output.name for output in graph.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)


def _graphs(graph: Any) -> Iterator[Any]:
    """``graph`` and the graphs inside its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _graphs(inner)


def _shorten(model: Any) -> None:
    """Drop stack traces, paths and intermediate shapes, and count values through; weights keep their names."""
    graph = model.graph
    short = {"": ""}  # an optional input that is not there
    for value in [*graph.input, *graph.output]:
        short[value.name] = value.name
    for tensor in graph.initializer:
        if "." in tensor.name:
            short[tensor.name] = tensor.name.removeprefix("network.")

    def rename(name: str) -> str:
        return short.setdefault(name, f"v{len(short)}")

    for inner in _graphs(graph):
        inner.name = rename(inner.name)
        del inner.value_info[:], inner.metadata_props[:]
        for node in inner.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
            node.ClearField("name")
            node.input[:] = [rename(name) for name in node.input]
            node.output[:] = [rename(name) for name in node.output]
        for value in [*inner.input, *inner.output, *inner.initializer]:
            value.name = rename(value.name)
            value.ClearField("doc_string")
            del value.metadata_props[:]


def _provenance(student: Student) -> dict[str, str]:
    """What the file says of itself. No date: the same student gives the same bytes."""
    provenance = student.settings.get("provenance")
    entries = {f"provenance.{key}": json.dumps(value) for key, value in provenance.items()} if provenance else {}
    return {
        "dfq_version": dfq.__version__,
        "teacher": student.teacher["name"],
        "teacher_sha256": student.teacher["sha256"],
        "student_sha256": hashlib.sha256(save_safetensors(student.tensors())).hexdigest(),
        "scheme": json.dumps(student.scheme.to_dict(), separators=(",", ":")),
        **entries,
    }


# -- the file in ONNX Runtime ---------------------------------------------------------------------------------------


def _session(content: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong comes as an exception
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _run(session: Any, images: Tensor) -> list[Tensor]:
    return [torch.as_tensor(output) for output in session.run(None, {"images": images.numpy()})]


@torch.no_grad()
def _parity(student: Student, content: bytes, images: Tensor) -> dict[str, Any]:
    """How far ONNX Runtime's outputs are from the student's, at batch size 1 and larger.

    ``argmax_agreement`` is that of the first output, over dimension 1; errors are over all outputs.
    """
    import onnxruntime

    images = images.cpu().float().contiguous()
    batches = [images[:1], *images[1:].split(BATCH_SIZE)] if len(images) > 1 else [images]
    same = total = 0
    largest_error = squared_error = squared = 0.0
    try:
        session = _session(content)
        for batch in batches:
            expected = [output.cpu() for output in tensors_in(student(batch))]
            found = _run(session, batch)
            for want, got in zip(expected, found, strict=True):
                error = (got.double() - want.double()).abs()
                largest_error = max(largest_error, float(error.max()))
                squared_error += float(error.square().sum())
                squared += float(want.double().square().sum())
            if expected[0].dim() > 1:
                agrees = found[0].argmax(1) == expected[0].argmax(1)
                same, total = same + int(agrees.sum()), total + agrees.numel()
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise UserError(
            f"got a network whose ONNX file onnxruntime {onnxruntime.__version__} does not run ({_last_line(error)})",
            do="try another exporter.opset, or another version of onnxruntime",
        ) from error
    agreement = same / total if total else None
    parity = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "session_options": SESSION_OPTIONS,
        "num_threads": torch.get_num_threads(),
        "num_samples": len(images),
        "batch_sizes": sorted({len(batch) for batch in batches}),
        "argmax_agreement": agreement,
        "max_abs_error": largest_error,
        "relative_error": (squared_error / squared) ** 0.5 if squared else largest_error,
    }
    if agreement is not None and agreement < LEAST_AGREEMENT:
        parity["warning"] = f"file and student disagree on {1 - agreement:.1%} of {total} predictions"
    return parity


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][-300:] if lines else type(error).__name__


def _latency_ms(content: bytes, float_content: bytes | None, image: Tensor) -> dict[str, float | None]:
    """Median milliseconds a forward of one image, in turns, so that a busy machine slows both alike."""
    image = image.cpu().float().contiguous()
    sessions = {"quantized": _session(content)} | ({"float": _session(float_content)} if float_content else {})
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        _run(session, image)
    start = time.perf_counter()
    while len(times["quantized"]) < 5 or (len(times["quantized"]) < 50 and time.perf_counter() - start < 1):
        for name, session in sessions.items():
            began = time.perf_counter()
            _run(session, image)
            times[name].append(1000 * (time.perf_counter() - began))
    return {
        name: round(statistics.median(times[name]), 4) if name in times else None for name in ("float", "quantized")
    }
