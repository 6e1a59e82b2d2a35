"""A torch.export program with integer buffers: for PyTorch without dfq, and for what compiles such programs.

``torch.export.load(FILE).module()(images)`` runs it, once ``import torch.ao.quantization.fx._decomposed`` has
registered the operations of ``torch.ops.quantized_decomposed`` that it is made of: weights are int8 codes, activations
go through uint8 ones. What torch.compile makes integer kernels of is such a program.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.exporters import _artifact as artifact
from dfq.exporters._artifact import Comparison, batches_of, outputs_of
from dfq.exporters._integer import Flat, integer_network
from dfq.hooks import record_dataflow
from dfq.student import Student
from dfq.teacher import Teacher, TokenSpec


@dataclass(frozen=True)
class PT2:
    """One ``.pt2`` file with dynamic batch; its outputs come as a tuple."""

    format: ClassVar[str] = "pt2"
    suffix: ClassVar[str] = ".pt2"

    def export(
        self, student: Student, path: Path, teacher: Teacher | None = None, images: Tensor | None = None
    ) -> dict[str, Any]:
        """Write ``path`` and ``path``.json; nothing is written unless the program can be loaded and run.

        Args:
            path: the file, usually ``*.pt2``.
            teacher: the float network; what the error of quantization is measured against.
            images: [N, C, H, W] or ids [N, T] to compare student and file on; default: a little noise.

        Returns:
            what ``path``.json holds.
        """
        path = Path(path)
        artifact.check(student, path)
        spec = student.input_spec
        network = integer_network(student, wide_zero_points=True).eval()
        example = artifact.noise(spec, 2)
        _drop_float_weights(network, example)
        is_text = isinstance(spec, TokenSpec)
        dynamic = {0: torch.export.Dim.DYNAMIC, **({1: torch.export.Dim.DYNAMIC} if is_text else {})}
        content = io.BytesIO()
        try:
            with torch.no_grad(), artifact.silence():
                program = torch.export.export(Flat(network), (example,), dynamic_shapes=(dynamic,))
                _check_operations(program)
                for node in program.graph.nodes:
                    node.meta.pop("stack_trace", None)  # paths of the machine that made it
                provenance = json.dumps(artifact.provenance(student))
                torch.export.save(program, content, extra_files={"dfq.json": provenance})
        except Exception as error:  # whatever a user's forward, or the exporter on it, raises
            raise artifact.untranslatable(error, "torch.export") from error
        images = artifact.noise(spec, 16) if images is None else images
        found = {"parity": _parity(student, content, images, teacher), "latency_ms": None}
        return artifact.write(path, content.getvalue(), self, student, found)


def _check_operations(program: torch.export.ExportedProgram) -> None:
    """A UserError if PyTorch alone could not run it."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "dfq":
            raise UserError(
                f"got a network with {node.target._opname}, an operation of dfq by which detectors of two stages "
                "choose proposals, and a file that is to be read without dfq",
                "exporter=onnx_qdq, which has nodes for it",
            )


def _drop_float_weights(network: nn.Module, example: Tensor) -> None:
    """Float weights that nothing reads any more take no room in the file."""
    flow = record_dataflow(network, example)
    read = {number for op in flow.ops for number in op.inputs}
    for number, names in flow.parameters.items():
        if number in read:
            continue
        for name in names:
            owner, _, attribute = name.rpartition(".")
            parameters = network.get_submodule(owner)._parameters
            if attribute in parameters:
                parameters[attribute] = nn.Parameter(torch.empty(0), requires_grad=False)


@torch.no_grad()
def _parity(student: Student, content: io.BytesIO, images: Tensor, teacher: Teacher | None) -> dict[str, Any]:
    """The loaded program's outputs against the student's, at batch size 1 and larger."""
    content.seek(0)
    try:
        with artifact.silence():
            program = torch.export.load(content).module()
    except Exception as error:
        raise UserError(
            f"got a program that torch {torch.__version__} does not load again ({str(error).splitlines()[0]})"
        ) from error
    batches, boxes_of = batches_of(images), artifact.boxes_of(student, images[:1])
    compared, quantization = Comparison(boxes_of), Comparison()
    for batch in batches:
        wanted = outputs_of(student, batch)
        compared.add(wanted, outputs_of(program, batch))
        if teacher is not None:
            quantization.add(outputs_of(teacher, batch), wanted)
    reference = quantization.relative_error if teacher is not None else None
    own = artifact.sameness(student, batches, boxes_of)
    low = artifact.shortfall({compared.key: compared.agreement}, own)
    return {
        "runtime": f"torch {torch.__version__}",
        "num_samples": len(images),
        "batch_sizes": sorted({len(batch) for batch in batches}),
        compared.key: compared.agreement,
        "max_abs_error": compared.largest,
        "relative_error": compared.relative_error,
        "quantization_error": reference,
        "error_ratio": compared.relative_error / reference if reference else None,
        "self_agreement": own.agreement,
        "self_relative_error": own.relative_error,
        **({"warning": f"{low[0]} below {artifact.LEAST_AGREEMENT}"} if low else {}),
    }
