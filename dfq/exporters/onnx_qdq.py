"""ONNX with QuantizeLinear / DequantizeLinear and integer initializers, for ONNX Runtime and whatever else reads QDQ.

::

    x ── (Min) ── QuantizeLinear ── DequantizeLinear ──┐
             int8 codes ─────────── DequantizeLinear ── Conv ── y ── QuantizeLinear ...      policy=hardware
             int32 bias ─────────── DequantizeLinear ──┘

    FILE         the model; its metadata_props say what made it
    FILE.json    the same for people and tools, with parity, what runs on integers, latency and the checksum of FILE
    tokenizer.json, ...   of networks of transformers that take text: tokenizer, chat template, generation settings

With ``policy=hardware`` every tensor between operations is quantized, and ONNX Runtime turns the graph into integer
kernels: QLinearConv, QLinearAdd, QGemm, ... With the other policies only inputs of weight layers are, biases are float
as in the student, and what is gained is the size. What ONNX Runtime 1.32 does with a graph decides its shape:

- An activation of fewer than 8 bits is cut off by ``Min`` at the grid's largest value. Below, uint8 saturates by
  itself: the smallest code is 0, and a zero point moves signed grids there. Not ``Clip``: ONNX Runtime looks through it
  from QuantizeLinear back to Conv and then rounds the bias to int32 in steps of input scale times weight scale. At 4
  bits that moves one code in fifty (ResNet-20: 5 % of the predictions), and no integer kernel comes of it.
- At 8 bits nothing stands in between: Conv and QuantizeLinear fuse to an integer kernel, int32 bias included.
- Every int8 weight has a zero point of its own and is read by one layer call; a weight that several calls read is
  uint8. ``session.x64quantprecision`` makes ONNX Runtime rewrite int8 weights of integer kernels to uint8, and it
  refuses to load a file in which two of them share a tensor, or in which one has no zero point.
- From opset 21 on weights of at most 4 bits are int4 or uint4, and groups are blocks of one DequantizeLinear. ONNX
  Runtime makes its own MatMulNBits of it while it loads; with ``matmul_nbits`` the file has that operator already, for
  runtimes that know it and no such blocks. Nothing but ONNX Runtime's kin reads such a file. It takes float zero points
  too; without it, weights that have them are float32 in the file.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.exporters import _artifact as artifact
from dfq.exporters import _detections as detections
from dfq.exporters._graph import INTEGERS, serialize
from dfq.exporters._integer import Flat, has_integer_form, integer_form, integer_network
from dfq.exporters._operators import translations
from dfq.exporters._runtime import (
    EXACT_INTEGER_KERNELS,
    EXACT_PRODUCTS,
    FLOAT_KERNELS,
    batches_of,
    integer_report,
    latency_ms,
    openvino_parity,
    parity,
)
from dfq.exporters._travelling import NO_TOKENIZER, has_tokenizer, source_folder, travelling, write_beside
from dfq.hooks import tensors_in
from dfq.settings import Bound
from dfq.student import Student
from dfq.teacher import AnyInputSpec, Teacher, TokenSpec

FOUR_BITS = 21  # the first opset with int4 and with blocks


@dataclass(frozen=True)
class OnnxQDQ:
    """One ``.onnx`` file with dynamic batch; input ``images``, output ``logits``.

    Several outputs are called ``output_0``, ..., those of a detector as its adapter calls them; with ``decode`` there
    are ``boxes`` [M, 4] xyxy in pixels of the input, ``scores``, ``labels`` and ``image`` (its number in the batch)
    [M] of all that is found in a batch.
    """

    opset: Annotated[int, Bound(at_least=18)] | None = None  # of ONNX; null: 20, or 21 for weights in groups
    latency: bool = True  # time the file against the float network's
    matmul_nbits: bool = False  # products with weights of 4 bits or fewer: ONNX Runtime's own operator
    decode: bool = False  # of a detector: boxes, with suppression of doubles, in place of raw outputs

    format: ClassVar[str] = "onnx_qdq"
    suffix: ClassVar[str] = ".onnx"

    def __post_init__(self):
        if self.opset is not None and self.opset < (least := FOUR_BITS if self.matmul_nbits else 18):
            why = " and matmul_nbits=true" if self.matmul_nbits else ""
            raise UserError(f"got exporter.opset={self.opset}{why}", f"a whole number >= {least}")
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

        Tokenizer and generation settings of a language model go into the same folder.

        Args:
            path: the file, usually ``*.onnx``.
            teacher: what size and latency are compared to; without it both stay None.
            images: [N, C, H, W] to compare student and file on (synthetic samples); default: a little noise.

        Returns:
            what ``path``.json holds.
        """
        path = Path(path)
        artifact.check(student, path)
        spec = student.input_spec
        detector = detections.decodable(student) if self.decode else None
        is_text = isinstance(spec, TokenSpec) and hasattr(getattr(student.module, "config", None), "to_dict")
        files = travelling(student, source_folder(student)) if is_text else None
        _check_own(path, files or {})
        if images is None:
            images = artifact.noise(spec, 16)
        options, opset = session_options(student), self._opset(student)
        # In the file itself too: it may travel alone.
        provenance = artifact.provenance(student) | {"session_options": json.dumps(options)}
        network = integer_network(student, float_zero_points=self.matmul_nbits)
        model = _to_onnx(network, spec, opset, self.decode)
        low_bits = _low_bits(student, self.matmul_nbits) if opset >= FOUR_BITS else {}
        if self.matmul_nbits and not low_bits:
            raise UserError(
                "got exporter.matmul_nbits=true and a student without weights of at most 4 bits",
                "4 bits or fewer, in groups of 16, 32, 64, 128, ... or per channel",
                "use scheme=w4a16_g32",
            )
        float_content = None if teacher is None else export_float(teacher, opset, self.decode)
        wanted: Callable[[Tensor], Any] = student
        reference: Callable[[Tensor], Any] | None = teacher
        if detector is None:
            content = serialize(model, provenance, low_bits, self.matmul_nbits)
            compared, boxes_of = content, artifact.boxes_of(student, images[:1])
        else:  # how many boxes there are decides the shapes, so that what they are chosen from is compared
            whole = copy.deepcopy(model)
            detections.append_suppression(whole, detector, spec)
            content = serialize(whole, provenance, low_bits, self.matmul_nbits)
            compared = serialize(model, provenance, low_bits, self.matmul_nbits)
            wanted, boxes_of = detections.places_of(student), partial(detections.kept, detector)
            reference = None if teacher is None else detections.places_of(teacher)
        measured = parity(wanted, compared, images, options, reference, boxes_of)
        integer = integer_report(content, images[:1], options)
        if detector is not None:
            measured["box_agreement"] = detections.box_agreement(student, content, images, options)
        measured |= {
            "integer": integer,
            "openvino": openvino_parity(wanted, compared, batches_of(images), boxes_of),
            "num_integer_initializers": sum(
                tensor.data_type in INTEGERS and len(tensor.dims) > 1 for tensor in model.graph.initializer
            ),
            "float_size_bytes": None if float_content is None else len(float_content),
            "size_ratio": None if float_content is None else len(content) / len(float_content),
        }
        latency = latency_ms(content, float_content, images[:1], options) if self.latency else None
        found: dict[str, Any] = {"session_options": options, "parity": measured, "integer": integer}
        found["latency_ms"] = latency
        if files is not None:
            write_beside(path, files)
            found |= {} if has_tokenizer(files) else {"tokenizer": NO_TOKENIZER}
        return artifact.write(path, content, self, student, found)

    def _opset(self, student: Student) -> int:
        groups = any(weight.group_size is not None for weight, _ in student.swap.layers.values())
        return self.opset or (FOUR_BITS if groups or self.matmul_nbits else 20)


def _check_own(path: Path, files: Mapping[str, bytes]) -> None:
    """A UserError for files beside ``path`` that belong to another network, unless they came with an earlier export."""
    others = [name for name, content in files.items() if _other(path.parent / name, content)]
    if others and not path.with_name(path.name + ".json").exists():
        raise UserError(
            f"got artifact_path={path}, beside which {others[0]} of another network lies",
            "a folder of its own, since the tokenizer is written beside the file",
            "choose another folder",
        )


def _other(file: Path, content: bytes) -> bool:
    return file.exists() and file.read_bytes() != content


def _low_bits(student: Student, float_zero_points: bool = False) -> dict[str, int | None]:
    """Layers whose codes fit 4 bits → their group size; those with float zero points only if they are codes too."""
    found = {}
    for name, (scheme, _) in student.swap.layers.items():
        form = integer_form(student, name, float_zero_points)
        if form is not None and int(form[0].max()) <= (7 if scheme.symmetric else 15) and int(form[0].min()) >= -8:
            # A group that is a whole channel leaves no trace of groups in the graph.
            is_channel = student.layers[name].weight_quantizer.scale.shape[-1:] == (1,)
            found[name] = None if is_channel else scheme.group_size
    return found


def session_options(student: Student) -> dict[str, str]:
    """The session options that the file of this student runs best with; parity and latency are measured with them.

    ONNX Runtime has integer kernels for activations of 8 bits; they need an option to be exact, unless weights stay
    within 7 bits, whose pairs of products fit 16 bits. Below 8 bits, weights had better be made float once than in
    every forward (ResNet-20 at w4a4: 1.2 instead of 1.9 times the time of the float network). Float activations it
    would round to int8 in products with 4-bit weights, unless it is told not to. And float weights, those of small
    floats too, it would round to int8 between two activations of 8 bits.
    """
    grids = [q.scheme for q in student.activation_quantizers.values() if not q.scheme.is_float]
    if not grids:
        return EXACT_PRODUCTS
    weights = [weight for weight, _ in student.swap.layers.values()]
    if any(grid.num_bits != 8 or grid.dynamic for grid in grids) or not all(map(has_integer_form, weights)):
        return FLOAT_KERNELS
    largest = [(2 if weight.grid == "seq" else 1) * max(-weight.quant_min, weight.quant_max) for weight in weights]
    return {} if max(largest) <= 64 else EXACT_INTEGER_KERNELS


def export_float(teacher: Teacher, opset: int = 20, decode: bool = False) -> bytes:
    """The float network as ONNX by the same route: what a quantized file is compared to."""
    model = _to_onnx(copy.deepcopy(teacher.module), teacher.input_spec, opset, decode)
    if decode:
        detections.append_suppression(model, teacher.module, teacher.input_spec)
    return serialize(model, {})


# -- torch to ONNX --------------------------------------------------------------------------------------------------


def _to_onnx(network: nn.Module, spec: AnyInputSpec, opset: int, decode: bool = False) -> Any:
    """``network`` as onnx.ModelProto with dynamic batch ``N`` (and number of tokens ``T``).

    Args:
        decode: of a detector, with what :class:`~dfq.exporters._detections.Places` gives in place of raw outputs.
    """
    flat = (detections.Places(network) if decode else Flat(network)).cpu().eval()
    example = artifact.noise(spec, 2)
    is_text = isinstance(spec, TokenSpec)
    try:
        with torch.no_grad(), artifact.silence():
            names = list(detections.PLACES) if decode else _output_names(network(example.clone()))
            program = torch.onnx.export(
                flat,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["input_ids" if is_text else "images"],
                output_names=names,
                dynamic_shapes=({0: "N", 1: "T"} if is_text else {0: "N"},),
                custom_translation_table=translations(),
            )
            assert program is not None
            model = program.model_proto
    except Exception as error:  # whatever a user's forward, or the exporter on it, raises
        raise artifact.untranslatable(error, "torch.onnx.export") from error
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:
        raise UserError(
            f"got exporter.opset={opset}",
            f"an opset that torch {torch.__version__} writes (it wrote {written} instead)",
            "try exporter.opset=20",
        )
    return model


def _output_names(outputs: Any) -> list[str]:
    count = len(list(tensors_in(outputs)))
    if count == 1:
        return ["logits"]
    if isinstance(outputs, dict) and all(isinstance(value, Tensor) for value in outputs.values()):
        return [re.sub(r"\W", "_", str(name)) for name in outputs]
    return [f"output_{i}" for i in range(count)]
