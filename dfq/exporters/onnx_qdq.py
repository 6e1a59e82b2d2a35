"""ONNX with QuantizeLinear / DequantizeLinear and integer initializers, for ONNX Runtime and whatever else reads QDQ.

::

    x ── (Min) ── QuantizeLinear ── DequantizeLinear ──┐
             int8 codes ─────────── DequantizeLinear ── Conv ── y        bias: float, as in the student

    FILE         the model; its metadata_props say what made it
    FILE.json    the same for people and tools, with parity, latency and the checksum of FILE

What ONNX Runtime 1.32 does with such a graph decides its shape:

- An activation of fewer than 8 bits is cut off by ``Min`` at the grid's largest value. Below, uint8 saturates by
  itself: the smallest code is 0, and a zero point moves signed grids there. Not ``Clip``: ONNX Runtime looks through it
  from QuantizeLinear back to Conv and then rounds the bias to int32 in steps of input scale times weight scale. At 4
  bits that moves one code in fifty (ResNet-20: 5 % of the predictions), and no integer kernel comes of it.
- At 8 bits nothing stands in between: Conv and QuantizeLinear fuse to an integer kernel, int32 bias included.
- Every int8 weight has a zero point of its own and is read by one layer call; a weight that several calls read is
  uint8. ``session.x64quantprecision`` makes ONNX Runtime rewrite int8 weights of integer kernels to uint8, and it
  refuses to load a file in which two of them share a tensor, or in which one has no zero point.
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
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import dfq
from dfq.dataset import write_atomic, write_json
from dfq.errors import UserError
from dfq.hooks import tensors_in
from dfq.modules import Quantizer
from dfq.settings import Bound, to_config
from dfq.student import CODES, Student
from dfq.teacher import InputSpec, Teacher

SCHEMA_VERSION = 1
# Session options of ONNX Runtime. u8 x s8 kernels of CPUs without VNNI add pairs of products in 16 bits and saturate;
# with the first they are exact. The second computes in float, on weights that are made float when the file is loaded.
EXACT_INTEGER_KERNELS = {"session.x64quantprecision": "1"}
FLOAT_KERNELS = {"session.disable_quant_qdq": "1"}
LEAST_AGREEMENT = 0.99  # of the predictions; below, the description carries a warning
BATCH_SIZE = 64
UINT8, INT8 = 2, 3  # onnx.TensorProto.DataType, without an import of onnx


@dataclass(frozen=True)
class OnnxQDQ:
    """One ``.onnx`` file with dynamic batch; input ``images``, output ``logits`` (several: ``output_0``, ...)."""

    opset: Annotated[int, Bound(at_least=18)] = 20  # of ONNX
    latency: bool = True  # time the file against the float network's

    format: ClassVar[str] = "onnx_qdq"
    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self):
        if self.opset < 18:
            raise UserError(f"got exporter.opset={self.opset}", "a whole number >= 18")
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"got exporter=onnx_qdq, which needs {' and '.join(missing)}, not installed here",
                do="pip install 'dfq[onnx]'",
            )

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
            raise UserError(f"got artifact_path={path}, which is a folder", "a file name")
        for name, layer in student.layers.items():
            if not (layer.weight_quantizer.enabled and layer.input_quantizer.enabled):
                raise UserError(f"got a student whose layer {name} has no grid yet", do="run an algorithm on it first")
        spec = student.input_spec
        if images is None:
            images = _noise(spec, 16)
        provenance = _provenance(student)
        model = _to_onnx(_integer_network(student), spec, self.opset)
        content = _serialize(model, provenance)
        float_content = None if teacher is None else export_float(teacher, self.opset)
        options = session_options(student)
        parity = _parity(student, content, images, options) | {
            "num_integer_initializers": sum(
                tensor.data_type in (UINT8, INT8) and len(tensor.dims) > 1 for tensor in model.graph.initializer
            ),
            "float_size_bytes": None if float_content is None else len(float_content),
            "size_ratio": None if float_content is None else len(content) / len(float_content),
        }
        latency = _latency_ms(content, float_content, images[:1], options) if self.latency else None
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
            "session_options": options,
            "num_threads": torch.get_num_threads(),
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


def session_options(student: Student) -> dict[str, str]:
    """The session options that the file of this student runs best with; parity and latency are measured with them.

    ONNX Runtime has integer kernels for activations of 8 bits. Below that, weights had better be made float once than
    in every forward (ResNet-20 at w4a4: 1.2 instead of 1.9 times the time of the float network).
    """
    is_8bit = all(activation.num_bits == 8 for _, activation in student.swap.layers.values())
    return EXACT_INTEGER_KERNELS if is_8bit else FLOAT_KERNELS


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
        # Divided by scale it rounds back to its code, so that x is cut off exactly where the student clamps codes.
        self.register_buffer("largest", (scheme.quant_max - quantizer.zero_point) * quantizer.scale.detach())

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
        limits = torch.iinfo(dtype)
        self.axis, self.grid = quantizer.axis, (limits.min, limits.max, dtype)
        self.register_buffer("codes", codes.to(dtype))
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(dtype))
        if self.axis is None:
            self.qparams = float(self.scale), int(self.zero_point)

    def forward(self, _weight: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        if self.axis is None:
            return ops.dequantize_per_tensor(self.codes, *self.qparams, *self.grid)
        return ops.dequantize_per_channel(self.codes, self.scale, self.zero_point, self.axis, *self.grid)


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


def _noise(spec: InputSpec, num_samples: int) -> Tensor:
    return torch.randn(num_samples, *spec.size, generator=torch.Generator().manual_seed(0))


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
    example = _noise(spec, 2)
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
            model = program.model_proto
    except Exception as error:  # whatever a user's forward, or the exporter on it, raises
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        raise UserError(
            f"got a network that torch.onnx.export can't translate ({lines[0][:300]})",
            do="write that operation differently in the network",
        ) from error
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:
        raise UserError(
            f"got exporter.opset={opset}",
            f"an opset that torch {torch.__version__} writes (it wrote {written} instead)",
            "try exporter.opset=20",
        )
    return model


def _serialize(model: Any, metadata: dict[str, str]) -> bytes:
    """The model as a file: what ONNX Runtime needs, short names, no traces of the machine that made it."""
    _separate_weights(model.graph)
    _shorten(model)
    model.producer_name, model.producer_version = "dfq", dfq.__version__
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    try:
        return model.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf has a different one in each implementation
        raise UserError("got a network of more than 2 GB", "what fits one ONNX file") from error


def _separate_weights(graph: Any) -> None:
    """Give every DequantizeLinear of a weight a zero point of its own; weights that are read twice become uint8.

    The exporter merges equal tensors and equal nodes, so that it is only known here who shares what.
    """
    from onnx import numpy_helper

    graphs = list(_graphs(graph))
    nodes = [node for inner in graphs for node in inner.node]
    reads = Counter(name for node in nodes for name in node.input)
    reads.update(output.name for inner in graphs for output in inner.output)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in nodes:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        codes = tensors[node.input[0]]
        zero_point = numpy_helper.to_array(tensors[node.input[2]])
        if max(reads[codes.name], reads[node.output[0]]) > 1 and zero_point.dtype == np.int8:
            zero_point = _unsigned(zero_point)
            if codes.data_type == INT8:  # not yet done by another reader
                codes.CopyFrom(numpy_helper.from_array(_unsigned(numpy_helper.to_array(codes)), codes.name))
        reads[node.input[2]] -= 1
        node.input[2] = f"{node.output[0]}_zero_point"
        graph.initializer.append(numpy_helper.from_array(zero_point, node.input[2]))
        reads[node.input[2]] = 1
    kept = [tensor for tensor in graph.initializer if reads[tensor.name]]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _unsigned(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.int16) + 128).astype(np.uint8)


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
        if tensor.name.startswith("network."):  # a tensor of the network's state
            name = tensor.name.removeprefix("network.")
            if "." in name:  # no other name has a dot
                short[tensor.name] = name.replace(".weight_quantizer.codes", CODES)

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
    dataset = student.settings.get("dataset")
    read = dataset.get("provenance", {}) if isinstance(dataset, Mapping) else {}
    return {
        "dfq_version": dfq.__version__,
        "teacher": student.teacher["name"],
        "teacher_sha256": student.teacher["sha256"],
        "student_sha256": hashlib.sha256(save_safetensors(student.tensors())).hexdigest(),
        "scheme": json.dumps(student.scheme.to_dict(), separators=(",", ":")),
        **{key: json.dumps(read[key]) for key in ("pixels", "labels") if key in read},  # real data that was read
    }


# -- the file in ONNX Runtime ---------------------------------------------------------------------------------------


def _session(content: bytes, options: Mapping[str, str]) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 4  # what goes wrong comes as an exception
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def _run(session: Any, images: Tensor) -> list[Tensor]:
    return [torch.as_tensor(output) for output in session.run(None, {"images": images.numpy()})]


@torch.no_grad()
def _parity(student: Student, content: bytes, images: Tensor, options: Mapping[str, str]) -> dict[str, Any]:
    """How far ONNX Runtime's outputs are from the student's, at batch size 1 and larger.

    Agreement is that of the first output's argmax over dimension 1; errors are over all outputs. A value on the border
    between two codes falls to either side by the order of a sum, so that an error of a few low-bit codes is no sign of
    a wrong file: a student differs as much from itself at another batch size.
    """
    import onnxruntime

    images = images.cpu().float().contiguous()
    batches = [images[:1], *images[1:].split(BATCH_SIZE)] if len(images) > 1 else [images]
    modes = {"argmax_agreement": options, "argmax_agreement_default_session": {}}
    if options != FLOAT_KERNELS:
        modes["argmax_agreement_float_kernels"] = FLOAT_KERNELS
    same, total = dict.fromkeys(modes, 0), 0
    largest = squared_error = squared = 0.0
    try:
        sessions = {key: _session(content, mode) for key, mode in modes.items()}
        for batch in batches:
            wanted = [output.cpu() for output in tensors_in(student(batch))]
            predictions = _predictions(wanted)
            total += len(predictions)
            for key, session in sessions.items():
                found = _run(session, batch)
                same[key] += int((_predictions(found) == predictions).sum())
                if key != "argmax_agreement":
                    continue
                for want, got in zip(wanted, found, strict=True):
                    error = (got.double() - want.double()).abs()
                    largest = max(largest, float(error.max()))
                    squared_error += float(error.square().sum())
                    squared += float(want.double().square().sum())
    except Exception as error:  # the exceptions of ONNX Runtime share no base class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"got a network whose ONNX file onnxruntime {onnxruntime.__version__} does not run ({lines[-1][-300:]})",
            do="try another exporter.opset or another version of onnxruntime",
        ) from error
    agreement = {key: count / total for key, count in same.items()}
    parity: dict[str, Any] = {
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "num_samples": len(images),
        "batch_sizes": sorted({len(batch) for batch in batches}),
        **agreement,
        "max_abs_error": largest,
        "relative_error": (squared_error / squared) ** 0.5 if squared else largest,
    }
    low = [key for key, value in agreement.items() if value < LEAST_AGREEMENT]
    if low:
        parity["warning"] = f"{' and '.join(low)} below {LEAST_AGREEMENT}"
        if agreement.get("argmax_agreement_float_kernels", 0) >= LEAST_AGREEMENT:
            parity["warning"] += "; integer kernels round biases, session.disable_quant_qdq=1 turns them off"
    return parity


def _predictions(outputs: list[Tensor]) -> Tensor:
    """Argmax of the first output over dimension 1, of a vector over its only one."""
    return outputs[0].argmax(min(1, outputs[0].dim() - 1)).flatten()


def _latency_ms(
    content: bytes, float_content: bytes | None, image: Tensor, options: Mapping[str, str]
) -> dict[str, Any]:
    """Median milliseconds of a forward of one image, in turns, so that a busy machine slows both alike."""
    image = image.cpu().float().contiguous()
    sessions = {"quantized": _session(content, options)}
    if float_content is not None:
        sessions["float"] = _session(float_content, {})
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
