"""What all exporters of files share: checks before, the json description beside the file, both written or neither."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import log2, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

import dfq
from dfq.dataset import write_atomic, write_json
from dfq.detectors._base import Boxes, Detector
from dfq.errors import UserError
from dfq.hooks import tensors_in
from dfq.modules import Quantizer
from dfq.settings import to_config
from dfq.student import Student
from dfq.tasks.detection import shared_score
from dfq.teacher import AnyInputSpec

SCHEMA_VERSION = 1
BATCH_SIZE = 64
LEAST_AGREEMENT = 0.99  # of the answers; below, the description carries a warning
SLACK = 0.03  # by which a file may agree less with a student than that does with itself
SLIGHTLY = 1 + 1e-6  # some units in the last place of a float
SCALE_BITS = {"float32": 32, "float16": 16, "e8m0": 8, "e4m3": 8}


def check(student: Student, path: Path) -> None:
    """A UserError for a path that can't be a file, and for a student that no algorithm ran on."""
    if path.is_dir():
        raise UserError(f"got artifact_path={path}, which is a folder", "a file name")
    for name, layer in student.layers.items():
        if not (layer.weight_quantizer.enabled and layer.input_quantizer.enabled):
            raise UserError(f"got a student whose layer {name} has no grid yet", do="run an algorithm on it first")


def noise(spec: AnyInputSpec, num_samples: int) -> Tensor:
    return spec.example(num_samples, torch.Generator().manual_seed(0))


def provenance(student: Student) -> dict[str, str]:
    """What the file says of itself. No date: the same student gives the same bytes."""
    dataset = student.settings.get("dataset")
    read = dataset.get("provenance", {}) if isinstance(dataset, Mapping) else {}
    return {
        "dfq_version": dfq.__version__,
        "teacher": student.teacher["name"],
        "teacher_sha256": student.teacher["sha256"],
        "student_sha256": hashlib.sha256(save_safetensors(student.tensors())).hexdigest(),  # of its file
        "scheme": json.dumps(student.scheme.to_dict(), separators=(",", ":")),
        **{key: json.dumps(read[key]) for key in ("pixels", "labels") if key in read},  # real data that was read
    }


def write(path: Path, content: bytes, exporter: Any, student: Student, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``path`` and ``path``.json, and return what the latter holds: ``found`` and where the file comes from."""
    description = {
        "format": "dfq.artifact",
        "schema_version": SCHEMA_VERSION,
        "dfq_version": dfq.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "exporter": to_config(exporter),
        "student": {"sha256": provenance(student)["student_sha256"], "settings": student.settings},
        "teacher": {"name": student.teacher["name"], "sha256": student.teacher["sha256"]},
        "scheme": student.scheme.to_dict(),
        "input": student.input_spec.to_dict(),
        "num_threads": torch.get_num_threads(),
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "exact_bits": exact_bits(student),
        **found,
    }
    sidecar = path.with_name(path.name + ".json")
    try:
        sidecar.unlink(missing_ok=True)
        write_atomic(path, content)
        write_json(sidecar, description)
    except OSError as error:
        raise UserError(f"got artifact_path={path}, which can't be written ({error.strerror})") from error
    return description


def exact_bits(student: Student) -> dict[str, float]:
    """What a student is made of, to the bit: what a file's size has to be compared with.

    codes: of the bits of their grids (ternary ones log2 of 3). scales, zero_points: of quantized weights. float: all
    parameters and buffers that no grid stands for, in the width that they have.
    """
    bits = dict.fromkeys(("codes", "scales", "zero_points", "float"), 0.0)
    quantized: set[int] = set()
    for layer in student.layers.values():
        quantizer, scheme = layer.weight_quantizer, layer.weight_quantizer.scheme
        if scheme.is_float or id(layer.weight) in quantized:
            continue
        quantized.add(id(layer.weight))
        width = log2(3) if scheme.grid == "ternary" else scheme.num_bits
        bits["codes"] += layer.weight.numel() * width
        bits["scales"] += quantizer.scale.numel() * SCALE_BITS[scheme.scale_format]
        bits["scales"] += 32 * (scheme.scale_format == "e4m3")  # which are small beside one of the tensor's
        if not scheme.symmetric:
            of_float = 16 if scheme.scale_format == "float16" else 32  # times the scale, it is one of such too
            width = of_float if scheme.has_float_zero_point else scheme.num_bits
            bits["zero_points"] += quantizer.scale.numel() * width
    own = {id(part): part for part in student.module.modules() if isinstance(part, Quantizer)}
    theirs = {id(tensor) for part in own.values() for tensor in part.state_dict(keep_vars=True).values()}
    rest = {id(tensor): tensor for tensor in student.module.state_dict(keep_vars=True).values()}
    for key, tensor in rest.items():
        if key not in theirs and key not in quantized:
            bits["float"] += 8 * tensor.numel() * tensor.element_size()
    return {**bits, "bytes": sum(bits.values()) / 8}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No prints, warnings or log lines of torch's exporters inside."""
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


def untranslatable(error: Exception, translator: str) -> UserError:
    """What to say when ``translator`` stumbles over a network: the first line of what went wrong first."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UserError):
        return cause
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return UserError(
        f"got a network that {translator} can't translate ({lines[0][:300]})",
        do="write that operation differently in the network",
    )


# -- against the student in memory ----------------------------------------------------------------------------------


def batches_of(inputs: Tensor) -> list[Tensor]:
    """As a runtime takes them, the first of size 1: images in float32, token ids as they are."""
    inputs = inputs.cpu()
    inputs = (inputs.float() if inputs.is_floating_point() else inputs).contiguous()
    return [inputs[:1], *inputs[1:].split(BATCH_SIZE)] if len(inputs) > 1 else [inputs]


def _predictions(outputs: list[Tensor]) -> Tensor:
    """Argmax of the first output: over dimension 1, of [N, T, V] over the last, of a vector over its only one.

    Of one logit [N, 1] whether it is above 0, as :mod:`dfq.tasks.classification` has it.
    """
    dim = outputs[0].dim()
    if outputs[0].shape[1:] == (1,):
        return (outputs[0] > 0).flatten().long()
    return outputs[0].argmax(1 if dim == 2 or dim > 3 else -1).flatten()


BoxesOf = Callable[[list[Tensor]], list[Boxes]]


@dataclass
class Comparison:
    """Outputs of one network against another's, summed over batches: predictions of the first, errors of all.

    Args:
        boxes_of: decodes a detector's outputs; what it finds is compared in place of predictions.
    """

    boxes_of: BoxesOf | None = None
    same: float = 0
    total: float = 0
    largest: float = 0.0
    squared_error: float = 0.0
    squared: float = 0.0

    def add(self, wanted: list[Tensor], found: list[Tensor]) -> None:
        if self.boxes_of is None:
            predictions = _predictions(wanted)
            self.total += len(predictions)
            self.same += int((_predictions(found) == predictions).sum())
        else:
            for mine, theirs in zip(self.boxes_of(found), self.boxes_of(wanted), strict=True):
                self.add_boxes(mine, theirs)
        for want, got in zip(wanted, found, strict=True):
            error = (got.double() - want.double()).abs()
            self.largest = max(self.largest, float(error.max()))
            self.squared_error += float(error.square().sum())
            self.squared += float(want.double().square().sum())

    def add_boxes(self, mine: Boxes, theirs: Boxes) -> None:
        """Those of one image, weighted by their scores as in Detection.agreement."""
        self.same += 2 * float(shared_score(mine, theirs))
        self.total += float(mine.scores.sum() + theirs.scores.sum())

    @property
    def key(self) -> str:
        """What :attr:`agreement` is called."""
        return "argmax_agreement" if self.boxes_of is None else "box_agreement"

    @property
    def agreement(self) -> float:
        return self.same / self.total if self.total else 1.0

    @property
    def relative_error(self) -> float:
        return sqrt(self.squared_error / self.squared) if self.squared else self.largest


@torch.no_grad()
def sameness(student: Callable[[Tensor], Any], batches: list[Tensor], boxes_of: BoxesOf | None = None) -> Comparison:
    """How far a student answers as it does itself when every pixel differs by a millionth of its value.

    Values on the border between two codes then fall to the other side, as they do by the order of a sum, and in a deep
    network each moves others: a file in a runtime that adds up in its own order may be as far from the student and
    right nevertheless. Token ids have no neighbors: a student is the same there.
    """
    compared = Comparison(boxes_of)
    for batch in batches:
        wanted = outputs_of(student, batch)
        compared.add(wanted, outputs_of(student, batch * SLIGHTLY) if batch.is_floating_point() else wanted)
    return compared


def shortfall(found: Mapping[str, float], own: Comparison) -> list[str]:
    """The agreements below :data:`LEAST_AGREEMENT` that are not those of the student with itself either."""
    return [key for key, value in found.items() if value < min(LEAST_AGREEMENT, own.agreement - SLACK)]


def outputs_of(network: Callable[[Tensor], Any], batch: Tensor) -> list[Tensor]:
    return [output.cpu() for output in tensors_in(network(batch))]


@torch.no_grad()
def boxes_of(student: Student, example: Tensor) -> BoxesOf | None:
    """What a detector finds in its outputs when they come as :func:`outputs_of` gives them; None for other networks.

    Args:
        example: [1, C, H, W], to learn the names of the outputs from.
    """
    detector = student.module
    if not isinstance(detector, Detector):
        return None
    raw = student(example)
    names = list(raw) if isinstance(raw, Mapping) else None
    height, width = example.shape[-2:]

    def found(outputs: list[Tensor]) -> list[Boxes]:
        there = [output.to(student.device) for output in outputs]
        again = there[0] if names is None else dict(zip(names, there, strict=True))
        rows = detector.detect(again, [(height, width)] * len(outputs[0]))
        return [Boxes(*(part.cpu() for part in row)) for row in rows]

    return found
