"""Rotation: turn the residual stream of a language model, so that no channel holds all the large values.

QuaRot (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456, section 4, stage 1a). The network's function stays what it is,
whatever the orthogonal matrix Q, if what writes into the residual stream is multiplied by Q, what reads from it by Q^T,
and norms in between only divide by the root of the mean square::

    read      W <- W diag(g) Q,      norm's gain g <- 1
    write     W <- Q^T W,  b <- Q^T b,      embedding E <- E Q

Q = D H / sqrt(H), D random signs, H Hadamard of the largest power of two, times a random orthogonal matrix for what is
left of the width. Nothing runs at inference that did not before: exporters see other weights and nothing else.

Which layers read and which write is found by running the network once: a layer reads if its input comes out of a norm,
and writes if its output is as wide as the stream. Afterwards the logits are compared with those of before, and a
network in which they differ (norms that subtract a mean) is refused. A head with the embedding's weight gets one of its
own: the norm's gain goes into it and not into the embedding. The student is larger by that.

Differences from the paper: of its rotations the one of the residual stream alone, the one that costs nothing at
inference for any network (not those of heads, and none online).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfq.algorithms._base import Algorithm, Work
from dfq.errors import UserError
from dfq.hooks import evaluation_mode, record_dataflow
from dfq.modules import product_of
from dfq.settings import PositiveInt
from dfq.sites import MOVING
from dfq.surgery import REWRITES
from dfq.teacher import Teacher

TOLERANCE = 1e-3  # relative, of logits in float32


@dataclass(frozen=True)
class Rotation(Algorithm):
    """Seconds; before an algorithm that rounds: ``algorithm=sequence algorithm.steps=[rotation,gptq]``."""

    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at
    weights_stay_float: ClassVar[bool] = True
    kind: ClassVar[str] = "token ids"  # what its networks take

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """Turn the student's float weights, then give it its grids."""
        if work.student.has_grids:
            raise UserError(
                "got algorithm=rotation behind an algorithm that has given the student its grids",
                "rotation as the first step",
            )
        untied = rotate(work.student.module, work.teacher, torch.Generator().manual_seed(work.seed))
        work.student.surgery.rewrites += [(name, "untied") for name in untied]
        work.student.surgery.rotated = True
        for name in untied:  # its weight is another one now, and so are its values' ends
            if (layer := work.student.layers.get(name)) is not None:
                layer.weight_quantizer = copy.deepcopy(layer.weight_quantizer)
        work.calibrate(work.images(self.num_calibration_samples))


def rotate(module: nn.Module, teacher: Teacher, rng: torch.Generator) -> list[str]:
    """Turn the residual stream of ``module``, in place: the teacher's module tree, its weights still float.

    Returns:
        names of layers that had an embedding's weight and have one of their own now: only theirs has the norm's gain.
    """
    example = teacher.example()
    parts = dict(module.named_modules())
    flow = record_dataflow(module, example)
    norms = {name for name, part in parts.items() if _is_gain(part)}
    made: dict[int, str] = {}  # number of a value → the norm that it comes out of
    for op in flow.ops:
        if op.module in norms:
            made.update(dict.fromkeys(op.outputs, op.module))
        elif op.name in MOVING and op.inputs and op.inputs[0] in made:
            made.update(dict.fromkeys(op.outputs, made[op.inputs[0]]))
    matrices = [name for name, part in parts.items() if getattr(part, "weight", None) is not None]
    matrices = [name for name in matrices if parts[name].weight.dim() == 2]  # routers too, which are no nn.Linear
    products = {name: product_of(name, flow) for name in matrices}
    linears = {name: op for name, op in products.items() if op is not None and op.name == "linear"}
    readers = {name: made[op.inputs[0]] for name, op in linears.items() if op.inputs[0] in made}
    tables = [part for part in parts.values() if isinstance(part, nn.Embedding)]
    if not readers or not tables:
        raise _refused(teacher, "in which no layer reads from a norm")
    width = tables[0].embedding_dim
    readers = {name: norm for name, norm in readers.items() if parts[name].weight.shape[1] == width}
    writers = [name for name in linears if name not in readers and parts[name].weight.shape[0] == width]
    owners: dict[int, str] = {}
    untied = [name for name in readers if any(parts[name].weight is table.weight for table in tables)]
    for name in [*readers, *writers]:
        is_tables = name not in untied and any(parts[name].weight is table.weight for table in tables)
        if id(parts[name].weight) in owners or is_tables:
            raise _refused(teacher, f"whose {name} shares its weight with another layer")
        owners[id(parts[name].weight)] = name
    before = _logits(module, example)
    for name in untied:
        REWRITES["untied"](parts[name])
    turn = orthogonal(width, rng).to(example.device)
    for norm in dict.fromkeys(readers.values()):
        gain = _take_gain(parts[norm])
        if gain is None:
            raise _refused(teacher, f"whose {norm} does more than divide by a root mean square and multiply")
        for name, of in readers.items():
            if of == norm:
                parts[name].weight.copy_(parts[name].weight.double() * gain)
    for name in readers:
        parts[name].weight.copy_(parts[name].weight.double() @ turn)
    for name in writers:
        parts[name].weight.copy_(turn.mT @ parts[name].weight.double())
        if getattr(parts[name], "bias", None) is not None:
            parts[name].bias.copy_(turn.mT @ parts[name].bias.double())
    for table in tables:
        table.weight.copy_(table.weight.double() @ turn)
    after = _logits(module, example)
    if float((after - before).norm()) > TOLERANCE * float(before.norm()):
        raise _refused(teacher, "whose function changes when its residual stream is turned")
    return untied


def orthogonal(width: int, rng: torch.Generator) -> Tensor:
    """Q [H, H], float64: random signs, Hadamard of the largest power of two, random orthogonal for what is left."""
    power = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    rest, triangular = torch.linalg.qr(torch.randn(width // power, width // power, generator=rng, dtype=torch.float64))
    rest = (rest * torch.sign(torch.diagonal(triangular))).contiguous()
    signs = torch.randint(0, 2, (width, 1), generator=rng).double() * 2 - 1
    return signs * torch.kron(hadamard / math.sqrt(power), rest)


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    with evaluation_mode(module):
        outputs = module(ids)
    return getattr(outputs, "logits", outputs if isinstance(outputs, Tensor) else None)  # type: ignore[return-value]


def _is_gain(part: nn.Module) -> bool:
    """Whether a module has one vector and nothing else: what a norm without a mean has."""
    own = [p for p in part.parameters()]
    return not list(part.children()) and len(own) == 1 and own[0].dim() == 1


def _take_gain(norm: nn.Module) -> Tensor | None:
    """The gain of a norm, which is 1 from now on; None if it is no such norm."""
    (weight,) = norm.parameters()
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)

    def gains(forward: Callable[[Tensor], Tensor]) -> Tensor:
        return forward(x).double() / (x.double() * x.double().square().mean(-1, keepdim=True).rsqrt())

    found = gains(norm)
    if not torch.allclose(found, found[:1].expand_as(found), rtol=1e-3, atol=1e-5):
        return None
    for neutral in (1.0, 0.0):  # some add one to what they hold
        weight.fill_(neutral)
        if torch.allclose(gains(norm), torch.ones_like(found), rtol=1e-3):
            held = found[0]
            return held
    return None


def _refused(teacher: Teacher, why: str) -> UserError:
    return UserError(
        f"got algorithm=rotation and {teacher.name}, {why}",
        "decoders with root-mean-square norms (Llama, Mistral, Qwen, Gemma)",
        "leave rotation away for such a network",
    )
