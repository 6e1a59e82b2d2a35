"""AWQ: make the weights larger that large activations meet, and what they are multiplied with smaller.

AWQ (Lin et al., MLSys 2024, arXiv 2306.00978, section 3.2). Rounding costs a weight half a step whatever its size, and
the step of a group hardly changes if some of its columns grow: those that meet large activations should. With x_i the
size of input channel i (root mean square)::

    W x = (W diag(s)) (diag(s)^-1 x),    s_i = x_i^alpha / sqrt(max_j x_j^alpha  min_j x_j^alpha)          (eq. 4, 5)
    alpha* = argmin over a grid in [0, 1] of  sum_i x_i^2 |w_i - round(w_i s_i) / s_i|^2

over all layers that read the same input. 1 / s is folded into what makes that input, so that nothing runs at inference
that did not before: into a norm's gain (queries, keys and values; gate and up of an MLP), or into the layer before,
where every operation between passes a factor on (up to down of a gated MLP).

Which layers read a norm, and which pairs pass factors on, is found by running the network
(:mod:`dfq.algorithms._equalization`), never by name. Afterwards the outputs are compared with those of before.

Differences from the paper: the error counts the diagonal of the inputs' second moments, from one pass for all layers,
where the paper computes outputs of a block for every alpha; the size of a channel is its root mean square (there: the
mean magnitude); inputs that come out of attention are left alone; clipping is an algorithm of its own
(``algorithm=sequence algorithm.steps=[awq,clip_search]``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dfq.algorithms._base import Algorithm, Work
from dfq.algorithms._inputs import importance, in_float, input_squares
from dfq.algorithms._paths import (
    Path,
    find_paths,
    layer_products,
    without_surprises,
)
from dfq.algorithms._ties import Ties
from dfq.channels import (
    FloatNetwork,
    num_inputs,
    num_outputs,
    rescaled,
)
from dfq.errors import UserError
from dfq.hooks import Dataflow, record_dataflow
from dfq.modules import QuantizedLayer, product_of
from dfq.precision import exact
from dfq.progress import progress_bar
from dfq.quantization import round_to_grid
from dfq.quantizers._observation import Observation
from dfq.settings import PositiveInt
from dfq.sites import MOVING
from dfq.student import Student

TOLERANCE = 1e-3  # relative, of outputs in float32


@dataclass(frozen=True)
class AWQ(Algorithm):
    """Seconds; before what chooses grids or rounds: ``algorithm=sequence algorithm.steps=[awq,gptq]``."""

    num_alphas: PositiveInt = 20  # exponents that are tried, beside 0
    num_samples: PositiveInt = 128  # synthetic samples that inputs are looked at on
    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at
    weights_stay_float: ClassVar[bool] = True

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """Scale the student's float weights, then give it its grids."""
        student, images = work.student, work.images(self.num_samples)
        if student.has_grids:
            raise UserError(
                "got algorithm=awq behind an algorithm that has given the student its grids", "awq as an earlier step"
            )
        scale_inputs(student, work.teacher.example(), images, work.weight_quantizer, self.num_alphas)
        work.calibrate(work.images(self.num_calibration_samples))


def scale_inputs(student: Student, example: Tensor, images: Tensor, weight_quantizer: Any, num_alphas: int) -> int:
    """Scale all inputs for which that helps, in place; returns how many."""
    network = FloatNetwork(student.module, record_dataflow(student.module, example), example, {})
    layers, squares = student.layers, input_squares(student, images)
    before = network.outputs(example)
    found = 0
    norms = readers_of_norms(student.module, network.flow)
    paths = [path for path in find_paths(network, layers) if path.is_private] + gated(network, layers)
    paths = without_surprises(network, [path for path in paths if path.last in squares])
    with progress_bar("awq", len(norms) + len(paths), "inputs") as advance:
        for norm, names in norms.items():
            known = [name for name in names if name in squares]
            scale = _best_scale(student, known, squares, weight_quantizer, num_alphas) if known else None
            if scale is not None and _divide_gain(student.module.get_submodule(norm), scale):
                found += 1
                for name in names:
                    weight = student.module.get_submodule(name).weight
                    assert isinstance(weight, Tensor)
                    weight.data.copy_(exact(weight) * scale)
                    if name in layers:
                        record = rescaled(student, name)
                        student.surgery.rescaled[name] = replace(record, input_scale=record.input_scale * scale.cpu())
            advance(1)
        for path in paths:
            scale = _best_scale(student, [path.last], squares, weight_quantizer, num_alphas)
            if scale is not None:
                found += 1
                made = path.at_outputs(scale.cpu(), len(rescaled(student, path.first).scale))
                made = torch.where(made > 0, made, 1.0)
                ties = Ties.of_paths([path], layers)
                ties.pass_on(layers, made)
                ties.record(student, made)
            advance(1)
    with in_float(student):
        after = network.outputs(example)
    if float((after - before).norm()) > TOLERANCE * float(before.norm()):
        raise UserError("got algorithm=awq and a network whose function changes when inputs of its layers are scaled")
    return found


def readers_of_norms(module: nn.Module, flow: Dataflow) -> dict[str, list[str]]:
    """Norms with a gain whose output goes into linear layers and nowhere else → these layers."""
    parts = dict(module.named_modules())
    norms = {name for name, part in parts.items() if _has_gain(part)}
    gains = {number: name.rpartition(".")[0] for number, names in flow.parameters.items() for name in names}
    made: dict[int, str] = {}  # number of a value → the norm that it comes out of
    lost: set[str] = set()
    found: dict[str, list[str]] = {}
    for op in flow.ops:
        if op.module in norms:
            lost |= {made[number] for number in op.inputs if made.get(number, op.module) != op.module}
            # Not all that is computed there: a cast that changes nothing makes no other value than its input.
            if any(gains.get(number) == op.module or number in made for number in op.inputs):
                made.update(dict.fromkeys(op.outputs, op.module))
            continue
        of = {made[number] for number in op.inputs if number in made}
        if not of:
            continue
        reader = parts.get(op.module)
        if isinstance(reader, nn.Linear) and product_of(op.module, flow) is op and op.inputs[0] in made:
            found.setdefault(made[op.inputs[0]], []).append(op.module)
        elif op.name in MOVING and op.inputs[0] in made:
            made.update(dict.fromkeys(op.outputs, made[op.inputs[0]]))
        else:
            lost |= of
    lost |= {made[number] for number in flow.outputs if number in made}
    shared: dict[int, int] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name.endswith("weight"):
            shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    for norm, names in found.items():
        twice = len(flow.calls_of(norm)) != 1 or any(len(flow.calls_of(name)) != 1 for name in names)
        if twice or any(shared[id(parts[name].weight)] > 1 for name in [norm, *names]):
            lost.add(norm)
    return {norm: names for norm, names in found.items() if norm not in lost}


def gated(network: FloatNetwork, layers: Mapping[str, nn.Module]) -> list[Path]:
    """Pairs of linear layers with a product of the first one's outputs and something else between them."""
    products, flow = layer_products(network, layers), network.flow
    makers = {op.outputs[0]: name for name, op in products.items()}
    producers = {number: op for op in flow.ops for number in op.outputs}
    reads = Counter(number for op in flow.ops for number in op.inputs) + Counter(flow.outputs)
    found = []
    for last, product in products.items():
        op, width = producers.get(product.inputs[0]), num_inputs(layers[last])
        if op is None or op.name not in ("mul", "imul", "rmul") or reads[product.inputs[0]] != 1:
            continue
        for number in op.inputs:
            first = makers.get(number)
            if first is not None and reads[number] == 1 and num_outputs(layers[first]) == width:
                found.append(Path(first, last, (op,), True, torch.arange(width), False))
                break
    return found


def _has_gain(part: nn.Module) -> bool:
    own = {name: p for name, p in part.named_parameters(recurse=False) if p is not None}
    return (
        not list(part.children()) and "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].dim() == 1
    )


def _divide_gain(norm: nn.Module, scale: Tensor) -> bool:
    """Divide a norm's outputs by ``scale`` [H], in place; false if it is no norm that this can be done to."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    if len(weight) != len(scale):  # heads are divided one by one
        return False
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        wanted = exact(norm(x)) / scale
    except TypeError:  # it takes more than what it divides: a gate, as behind linear attention
        return False
    kept, kept_bias = weight.detach().clone(), None if bias is None else bias.detach().clone()
    if bias is not None:
        bias.data.copy_(exact(bias) / scale)
    for offset in (0.0, 1.0):  # some add one to what they hold
        weight.data.copy_((exact(kept) + offset) / scale - offset)
        if torch.allclose(exact(norm(x)), wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())):
            return True
    weight.data.copy_(kept)
    if bias is not None and kept_bias is not None:
        bias.data.copy_(kept_bias)
    return False


def _best_scale(
    student: Student, names: list[str], squares: dict[str, Tensor], weight_quantizer: Any, num_alphas: int
) -> Tensor | None:
    """What the weights [O, I] of layers with the same input are best multiplied with [I], float64; None: with 1."""
    size = exact(squares[names[0]]).sqrt()
    size = size.clamp(min=1e-4 * float(size.max()))
    if not float(size.max()) > 0:
        return None
    best: Tensor | None = None
    least = float("inf")
    for step in range(num_alphas + 1):
        powered = size ** (step / num_alphas)
        scale = (powered / (powered.max() * powered.min()).sqrt()).clamp(min=1e-4)
        error = sum(_error(student.layers[name], squares[name], scale, weight_quantizer) for name in names)
        if error < least:
            best, least = scale if step else None, error
    return best


def _error(layer: QuantizedLayer, squares: Tensor, scale: Tensor, weight_quantizer: Any) -> float:
    """sum_i x_i^2 |w_i - round(w_i s_i) / s_i|^2 with ranges that are chosen anew."""
    quantizer = layer.weight_quantizer
    shape = [1, -1, *[1] * (layer.weight.dim() - 2)]
    if not quantizer.has_qparams or layer.weight.shape[1] != len(scale):
        return 0.0
    factor = scale.to(layer.weight).view(shape).expand_as(layer.weight)
    weight = layer.weight.detach() * factor
    rows = quantizer.rows(weight)
    scale_of_rows, zero_point = weight_quantizer.qparams(Observation.of_tensor(rows, 0), quantizer.scheme)
    error = (round_to_grid(rows, scale_of_rows, zero_point, quantizer.scheme, 0) - rows) / quantizer.rows(factor)
    return float((importance(layer, squares) * error.square()).sum())
