"""Mixed precision: the bits of every layer, chosen so that a budget is kept with as little harm as possible.

ZeroQ (Cai et al., CVPR 2020, arXiv 2001.00281) and HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852), without data:
everything is measured on synthetic samples.

**Sensitivity.** Omega_i(k) says what rounding tensor i alone to k bits does to the network's outputs (``measure``)::

    kl        mean over samples of KL(teacher || network with tensor i rounded), nats (ZeroQ)
    sqnr      sum |y - y_hat|^2 / sum |y|^2 of the outputs: -10 log10 of it is their SQNR in dB
    hessian   1/2 tr(H_i) / n_i * |Q(x_i) - x_i|^2, H_i the Hessian of kl in tensor i (HAWQ-V2)

The trace is Hutchinson's, E[v^T H v] over random signs v; one product with the whole Hessian serves all tensors.
A weight's error is measured without the part of it that shifts the mean of the layer's output, where the layer has a
bias to take it over: whatever rounds better than to nearest corrects that.

**Allocation.** Harm is taken as additive, and minimized exactly: layer after layer, the list of non-dominated pairs
(cost, harm) of the layers so far (a multiple-choice knapsack). The last few of that list within the budget, and the
scheme without mixing, are then compared with everything rounded at once, by KL, and the best of them is taken.

Costs: ``size_bytes`` of the student's file, ``mean_weight_bits``, ``bops`` = multiply-accumulates x weight bits x input
bits of the quantized layers (float: 32), ``latency_ms`` = the sum of a table's entries. Layers that share their weight
have the same bits.

Differences from the papers: ZeroQ bins sizes and keeps the best of each bin, here the frontier is exact. HAWQ-V2 takes
the loss of the training labels, here the teacher's outputs; it needs one product with the Hessian a layer and probe.
"""

from __future__ import annotations

import copy
import glob
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dfq
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.hooks import forward_hooks, tensors_in
from dfq.modules import QuantizedLayer, Quantizer, Swap, base_of
from dfq.progress import progress_bar, say
from dfq.quantization import choose_qparams
from dfq.quantizers._observation import Histogram, Observation
from dfq.scheme import FLOAT, MixedScheme, Scheme, TensorScheme, read_allocation
from dfq.sites import HOLDER
from dfq.student import Student
from dfq.tasks._task import task_of
from dfq.teacher import InputSpec, Teacher

BATCH_SIZE = 64
NUM_PROBES = 32  # random vectors of Hutchinson's estimate, for each batch
MOST_POINTS = 200  # of a frontier that are kept for the plot
UNITS = {"size_bytes": "bytes", "mean_weight_bits": "bits a weight", "bops": "bit operations", "latency_ms": "ms"}
Choice = tuple[TensorScheme, TensorScheme]  # of weight and input
Measured = dict[TensorScheme, float]  # scheme of one tensor → sensitivity


# ------------------------------------------------------------------------------------------------ the frontier


@dataclass(frozen=True)
class Frontier:
    """All allocations that no other one beats in both respects, by rising cost and falling sensitivity.

    Shapes: ``costs`` and ``sensitivities`` [P], float64.
    """

    costs: np.ndarray
    sensitivities: np.ndarray
    steps: list[tuple[np.ndarray, np.ndarray]]  # of each layer: (index into the step before, choice), [P_layer] each

    def choices(self, index: int) -> list[int]:
        """The choice of each layer at a point of the frontier."""
        found = []
        for before, chosen in reversed(self.steps):
            found.append(int(chosen[index]))
            index = int(before[index])
        return found[::-1]

    def best_within(self, limit: float) -> int | None:
        """The point of least sensitivity that costs at most ``limit``; None: nothing is that cheap."""
        return int(np.searchsorted(self.costs, limit, side="right")) - 1 if limit >= self.costs[0] else None


def pareto_frontier(costs: Sequence[Sequence[float]], sensitivities: Sequence[Sequence[float]]) -> Frontier:
    """The exact frontier of sums over layers, one choice each.

    Of two allocations that are equal in both respects one is kept. Sums run from the first layer to the last.

    Args:
        costs, sensitivities: of each layer, of each of its choices; whole numbers stay exact up to 2^53.
    """
    total, harm = np.zeros(1), np.zeros(1)
    steps = []
    for layer_costs, layer_harms in zip(costs, sensitivities, strict=True):
        all_costs = np.add.outer(total, np.asarray(layer_costs, dtype=float)).ravel()
        all_harms = np.add.outer(harm, np.asarray(layer_harms, dtype=float)).ravel()
        order = np.lexsort((all_harms, all_costs))
        lowest = np.minimum.accumulate(all_harms[order])
        order = order[all_harms[order] < np.concatenate([[np.inf], lowest[:-1]])]
        total, harm = all_costs[order], all_harms[order]
        steps.append((order // len(layer_costs), order % len(layer_costs)))
    return Frontier(total, harm, steps)


# ------------------------------------------------------------------------------------------------ what is chosen


@dataclass
class Unit:
    """Layers that share one weight, nearly always a single one, and what their tensors can have."""

    names: list[str]
    given: Choice  # without mixing
    choices: list[Choice]
    num_weights: int
    macs: dict[str, int] = field(default_factory=dict)  # layer → multiply-accumulates of one sample
    inputs: dict[str, TensorScheme] = field(default_factory=dict)  # layers whose input has a grid of its own, given
    weight: Measured = field(default_factory=dict)
    activation: Measured = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    def schemes(self, position: int) -> list[TensorScheme]:
        """Of weight (0) or input (1), each once; one alone is not measured, as nothing is chosen."""
        found = list(dict.fromkeys(choice[position] for choice in self.choices))
        return found if len(found) > 1 else []

    def free_inputs(self) -> list[str]:
        """Layers whose input takes the choice's bits."""
        return [name for name in self.names if name not in self.inputs]

    def sensitivity(self, choice: Choice) -> float:
        return self.weight.get(choice[0], 0.0) + self.activation.get(choice[1], 0.0)

    def cost(self, choice: Choice, kind: str, table: Mapping[str, Mapping[str, float]]) -> float:
        weight, activation = choice
        if kind == "size_bytes":
            return -(-self.num_weights * bits_of(weight) // 8)
        if kind == "mean_weight_bits":
            return self.num_weights * bits_of(weight)
        if kind == "bops":
            own = {name: bits_of(self.inputs.get(name, activation)) for name in self.names}
            return sum(self.macs[name] * bits_of(weight) * own[name] for name in self.names)
        return sum(table[name][_label(choice, table[name])] for name in self.names if name in table)


def bits_of(scheme: TensorScheme) -> float:
    """Bits of a value, 32 if it is float."""
    return 32 if scheme.is_float else scheme.bits_per_value


def _label(choice: Choice, row: Mapping[str, float]) -> str:
    """The key of a latency table that speaks of ``choice``; empty: none does."""
    weight, activation = choice
    if weight.is_float:
        return "float" if "float" in row else ""
    both, alone = f"{weight.num_bits}x{activation.num_bits}", str(weight.num_bits)
    return both if both in row else alone if alone in row else ""


def find_units(student: Student, scheme: MixedScheme) -> list[Unit]:
    """The decisions to be made about a student of ``scheme``, in call order.

    What the scheme's overrides say of bits and grids stays, and so do the 8 bits of edges and ``input_bits``.
    """
    groups: dict[int, list[str]] = {}
    for name, layer in student.layers.items():
        groups.setdefault(id(layer.weight), []).append(name)
    return [_unit(names, student, scheme) for names in groups.values()]


def _unit(names: list[str], student: Student, scheme: MixedScheme) -> Unit:
    layers = student.swap.layers
    mixes_inputs = scheme.budget.kind in ("bops", "latency_ms") and scheme.policy != "hardware"

    def is_stated(name: str, part: str) -> bool:
        edge, inner = (scheme.for_layer(is_edge, name)[0] for is_edge in (True, False))
        if part == "activation" and scheme.input_bits is not None and name in student.swap.read_input:
            return True
        stated = [parts for pattern, parts in scheme.overrides.items() if fnmatchcase(name, pattern)]
        return layers[name][0] == edge != inner or any({"num_bits", "grid"} & set(p.get(part, ())) for p in stated)

    weight, first_input = layers[names[0]]
    inputs = {
        name: layers[name][1]
        for name in names
        if not mixes_inputs or layers[name][1].is_float or is_stated(name, "activation")
    }
    free = next((layers[name][1] for name in names if name not in inputs), None)
    given, weights = weight, [weight]
    if not any(is_stated(name, "weight") for name in names):
        given = replace(weight, num_bits=scheme.weight.num_bits)
        weights = [replace(weight, num_bits=bits) for bits in scheme.weight_bits]
    activations = [first_input if free is None else replace(free, num_bits=bits) for bits in scheme.activation_bits]
    return Unit(
        names,
        (given, free or first_input),
        list(itertools.product(weights, dict.fromkeys(activations))),
        student.layers[names[0]].weight.numel(),
        inputs=inputs,
    )


def use_table(units: list[Unit], table: Mapping[str, Mapping[str, float]], where: str) -> None:
    """Leave of the choices of each unit, and of float, those that its rows of a latency table have, in place."""
    for unit in units:
        rows = [table[name] for name in unit.names if name in table]
        if not rows:
            raise UserError(
                f"got {where} without {unit.name}",
                ", ".join(f"{unit.name}" for unit in units[:8]) + (", ..." if len(units) > 8 else ""),
                "give a row for every quantized layer",
            )
        pinned = len(unit.schemes(0)) == 0
        possible = unit.choices if pinned else [*unit.choices, (FLOAT, FLOAT)]
        unit.choices = [choice for choice in possible if all(_label(choice, row) for row in rows)]
        if not unit.choices:
            raise UserError(
                f"got {where} with {', '.join(rows[0]) or 'nothing'} for {unit.name}",
                ", ".join(dict.fromkeys(f"{w.num_bits}x{a.num_bits}" for w, a in possible if not w.is_float)),
                "these are the bits of weights x inputs that the scheme lets this layer have",
            )


# ------------------------------------------------------------------------------------------------ rounding


class Rounding:
    """A student whose tensors are rounded one at a time, or all at once, to any of their choices.

    Args:
        student: freshly made; its quantizers are this object's to turn on and off.
        images: [N, C, H, W], or ids [N, T].
        weight_quantizer, activation_quantizer: methods of the quantizers family.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        units: list[Unit],
        images: Tensor,
        weight_quantizer: Any,
        activation_quantizer: Any,
    ):
        self.student, self.units, self.weight_quantizer = student, units, weight_quantizer
        self.task = task_of(teacher)
        self.batches = list(images.split(BATCH_SIZE))
        self.layers = student.layers
        self.quantizers = student.activation_quantizers
        self.input_names = {id(quantizer): name for name, quantizer in self.quantizers.items()}
        self.weight_grids: dict[tuple[int, TensorScheme], tuple[Tensor, Tensor]] = {}
        self.turn_off()
        with torch.no_grad():
            self.targets = [self.task.raw_outputs(teacher, batch) for batch in self.batches]
            histograms = self._look()
        self.input_grids = {
            (name, scheme): activation_quantizer.qparams(histograms[name].observation(), scheme)
            for name, schemes in self._input_schemes().items()
            for scheme in schemes
            if name in histograms
        }

    def input_of(self, layer: str) -> str:
        """Name of the activation quantizer of a layer's input."""
        return self.input_names[id(self.layers[layer].input_quantizer)]

    def _input_schemes(self) -> dict[str, list[TensorScheme]]:
        """Name of each activation quantizer → schemes that it can have."""
        found = {name: [quantizer.scheme] for name, quantizer in self.quantizers.items()}
        for unit in self.units:
            for name in unit.free_inputs():
                found[self.input_of(name)] += [choice[1] for choice in (unit.given, *unit.choices)]
        return {name: [s for s in dict.fromkeys(schemes) if not s.is_float] for name, schemes in found.items()}

    def _look(self) -> dict[str, Histogram]:
        """One forward with nothing rounded: activations, means of outputs, multiply-accumulates, shapes of inputs."""
        histograms = {name: Histogram() for name, quantizer in self.quantizers.items() if quantizer.has_qparams}
        self.means: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.shapes: dict[str, tuple[int, ...]] = {}
        uses, reads = (dict.fromkeys(self.layers, 0) for _ in range(2))

        def observe(name: str, _module: nn.Module, inputs: tuple) -> None:
            histograms[name].add(inputs[0])

        def count_reads(name: str, _module: nn.Module, inputs: tuple) -> None:
            reads[name] += inputs[0].numel() // inputs[0].shape[self.layers[name].feature_axis]

        def after(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            assert isinstance(layer, QuantizedLayer)
            self.means[name].append(_channel_means(layer, output))
            self.shapes[name] = tuple(inputs[0].shape[1:])
            if inputs[0].is_floating_point():  # an embedding multiplies nothing
                is_transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
                reference = inputs[0] if is_transposed else output  # each weight is used once for each of its positions
                uses[name] += reference.numel() // reference.shape[layer.feature_axis]

        inputs = [(name, layer.input_quantizer) for name, layer in self.layers.items()]
        with (
            forward_hooks([(name, self.quantizers[name]) for name in histograms], before=observe),
            forward_hooks(inputs, before=count_reads),
            forward_hooks(self.layers.items(), after=after),
        ):
            for batch in self.batches:
                self.student(batch)
        num_samples = sum(map(len, self.batches))
        for unit in self.units:
            # Layers whose owner multiplies with their weight are never called: their input says how often it does.
            count = {name: uses[name] if name in self.shapes else reads[name] for name in unit.names}
            unit.macs = {name: unit.num_weights * count[name] // num_samples for name in unit.names}
        return histograms

    def turn_off(self) -> None:
        """Nothing is rounded."""
        for part in self.student.module.modules():
            if isinstance(part, Quantizer):
                part.enabled = False

    def set_weight(self, unit: Unit, scheme: TensorScheme) -> None:
        for name in unit.names:  # which share a quantizer, unless their channels lie along different dimensions
            quantizer, weight = self.layers[name].weight_quantizer, self.layers[name].weight
            quantizer.scheme, quantizer.enabled = scheme, True
            if scheme.is_float:
                continue
            key = (id(quantizer), scheme)
            if key not in self.weight_grids:
                observation = Observation.of_tensor(quantizer.rows(weight), 0)
                self.weight_grids[key] = self.weight_quantizer.qparams(observation, scheme)
            quantizer.set_qparams(*self.weight_grids[key])

    def set_input(self, name: str, scheme: TensorScheme) -> None:
        """Of the activation quantizer ``name``."""
        quantizer = self.quantizers[name]
        quantizer.scheme, quantizer.enabled = scheme, True
        if (name, scheme) in self.input_grids:
            quantizer.set_qparams(*self.input_grids[name, scheme])

    def set_choice(self, unit: Unit, choice: Choice) -> None:
        self.set_weight(unit, choice[0])
        for name in unit.free_inputs():
            self.set_input(self.input_of(name), choice[1])

    def set_all(self, choices: Sequence[Choice]) -> None:
        """Everything is rounded, tensors about which nothing is chosen as the scheme says."""
        for name, quantizer in self.quantizers.items():
            self.set_input(name, quantizer.scheme)
        for unit, choice in zip(self.units, choices, strict=True):
            self.set_choice(unit, choice)
        for layer in self.layers.values():
            if layer.bias_quantizer is not None and layer.weight_quantizer.enabled:
                layer.bias_quantizer.make_room(layer)

    @contextmanager
    def _means_kept(self, position: int) -> Iterator[None]:
        """Outputs of layers that have a bias keep their means over batch ``position``, as a corrected bias would do."""

        def shift(name: str, layer: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
            assert isinstance(layer, QuantizedLayer)
            is_rounded = layer.weight_quantizer.enabled or layer.input_quantizer.enabled
            if not is_rounded or getattr(layer, "bias", None) is None or len(self.means[name]) != len(self.batches):
                return None  # one that is called several times has no one mean
            difference = self.means[name][position] - _channel_means(layer, output)
            return output + _to_channels(layer, difference, output)

        with forward_hooks(self.layers.items(), after=shift):
            yield

    @torch.no_grad()
    def figures(self) -> tuple[float, float]:
        """(KL in nats, noise to signal) of the outputs with what is rounded now."""
        kl = noise = signal = 0.0
        for position, (batch, target) in enumerate(zip(self.batches, self.targets, strict=True)):
            with self._means_kept(position):
                output = self.task.raw_outputs(self.student, batch)
            kl += float(self.task.distillation_loss(output, target)) * len(batch)
            for got, wanted in zip(tensors_in(output), tensors_in(target), strict=True):
                noise += float((got - wanted).square().sum())
                signal += float(wanted.square().sum())
        kl /= sum(map(len, self.batches))
        return (max(kl, 0.0), noise / max(signal, 1e-30)) if math.isfinite(kl) else (math.inf, math.inf)


def _channel_means(layer: QuantizedLayer, output: Tensor) -> Tensor:
    return output.detach().movedim(layer.feature_axis, 0).flatten(1).mean(1)


def _to_channels(layer: QuantizedLayer, values: Tensor, output: Tensor) -> Tensor:
    shape = [1] * output.dim()
    shape[layer.feature_axis] = -1
    return values.view(shape)


# ------------------------------------------------------------------------------------------------ sensitivity


def sensitivity(rounding: Rounding, measure: str = "kl", seed: int = 0) -> None:
    """Measure every tensor about which there is a choice, in place: ``unit.weight`` and ``unit.activation``."""
    rounding.turn_off()
    if measure == "hessian":
        _second_order(rounding, seed)
        return
    passes = [(unit, part, scheme) for unit in rounding.units for part in (0, 1) for scheme in unit.schemes(part)]
    with progress_bar(f"sensitivity ({measure})", len(passes), "passes") as advance:
        for unit, part, scheme in passes:
            if part == 0:
                rounding.set_weight(unit, scheme)
            else:
                for name in unit.free_inputs():
                    rounding.set_input(rounding.input_of(name), scheme)
            kl, noise = (0.0, 0.0) if scheme.is_float else rounding.figures()
            (unit.weight, unit.activation)[part][scheme] = kl if measure == "kl" else noise
            rounding.turn_off()
            advance(1)


def _second_order(rounding: Rounding, seed: int) -> None:
    """HAWQ-V2's: half the mean of the Hessian's diagonal times the squared error of rounding."""
    curvatures = curvature(rounding, seed)
    for unit in rounding.units:
        for scheme in unit.schemes(0):
            rounding.set_weight(unit, scheme)
            layer = rounding.layers[unit.name]
            error = float((layer.weight_quantizer(layer.weight) - layer.weight).square().sum())
            unit.weight[scheme] = 0.5 * curvatures[unit.name] * error
        unit.activation = dict.fromkeys(unit.schemes(1), 0.0)
    rounding.turn_off()
    unit_of = {rounding.input_of(name): unit for unit in rounding.units for name in unit.free_inputs()}

    def add_errors(name: str, quantizer: nn.Module, inputs: tuple) -> None:
        unit, x = unit_of[name], inputs[0]
        for scheme in unit.schemes(1):
            rounding.set_input(name, scheme)
            error = float((quantizer.forward(x) - x).square().sum())
            unit.activation[scheme] += 0.5 * curvatures[name] * error
        quantizer.enabled = False

    watched = [(name, rounding.quantizers[name]) for name in unit_of]
    with torch.no_grad(), forward_hooks(watched, before=add_errors):
        for batch in rounding.batches if watched else []:
            rounding.student(batch)


def curvature(rounding: Rounding, seed: int = 0, num_probes: int = NUM_PROBES) -> dict[str, float]:
    """Mean of the diagonal of the Hessian of KL(teacher || network), averaged over samples, at the float network.

    Returns:
        unit → that with respect to its weight; name of an activation quantizer → with respect to all its values over
        all samples. Of those about which there is a choice. Not below 0, where the Hessian of a minimum is not either.
    """
    rng = torch.Generator().manual_seed(seed)
    weights = {unit.name: rounding.layers[unit.name].weight for unit in rounding.units if unit.schemes(0)}
    inputs = [rounding.input_of(name) for unit in rounding.units for name in unit.free_inputs()]
    traces: dict[str, float] = dict.fromkeys([*weights, *inputs], 0.0)
    counts = {name: weight.numel() for name, weight in weights.items()} | dict.fromkeys(inputs, 0)
    total = sum(map(len, rounding.batches))
    required = {name: weight.requires_grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with progress_bar("sensitivity (hessian)", total * num_probes, "products") as advance:
            for batch, target in zip(rounding.batches, rounding.targets, strict=True):
                seen: list[tuple[str, Tensor]] = []

                def keep(name: str, _module: nn.Module, given: tuple, seen: list = seen) -> None:
                    if given[0].requires_grad:
                        seen.append((name, given[0]))

                if batch.is_floating_point():
                    batch = batch.clone().requires_grad_()
                # Attention's fused kernels have no second derivative.
                with (
                    torch.enable_grad(),
                    sdpa_kernel(SDPBackend.MATH),
                    forward_hooks([(name, rounding.quantizers[name]) for name in inputs], before=keep),
                ):
                    output = rounding.task.raw_outputs(rounding.student, batch)
                    loss = rounding.task.distillation_loss(output, target) * (len(batch) / total)
                    tensors = [*weights.items(), *seen]
                    values = [tensor for _, tensor in tensors]
                    slopes = torch.autograd.grad(loss, values, create_graph=True, allow_unused=True)
                used = [i for i, slope in enumerate(slopes) if slope is not None and slope.requires_grad]
                for name, tensor in seen:
                    counts[name] += tensor.numel()
                for _ in range(num_probes if used else 0):
                    signs = [
                        torch.randint(0, 2, values[i].shape, generator=rng).mul_(2).sub_(1).to(values[i]) for i in used
                    ]
                    products = torch.autograd.grad(
                        [slopes[i] for i in used],
                        [values[i] for i in used],
                        signs,
                        retain_graph=True,
                        allow_unused=True,
                    )
                    for i, sign, product in zip(used, signs, products, strict=True):
                        if product is not None:
                            traces[tensors[i][0]] += float((sign * product).sum()) / num_probes
                    advance(len(batch))
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(required[name])
    return {name: max(trace, 0.0) / max(counts[name], 1) for name, trace in traces.items()}


# ------------------------------------------------------------------------------------------------ allocation


@dataclass(frozen=True)
class Costs:
    """What choices cost in the units of a budget."""

    kind: str  # one of dfq.scheme.BUDGETS
    fixed: float = 0.0  # what does not depend on them
    per: float = 1.0  # divides the sum: of mean_weight_bits the number of weights
    table: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def of(self, units: Sequence[Unit], choices: Sequence[Choice]) -> float:
        return self.shown(sum(unit.cost(c, self.kind, self.table) for unit, c in zip(units, choices, strict=True)))

    def shown(self, total: Any) -> Any:
        return (total + self.fixed) / self.per

    def raw(self, limit: float) -> float:
        return limit * self.per - self.fixed


def allocate(units: Sequence[Unit], costs: Costs, limit: float) -> tuple[Frontier, int]:
    """The whole frontier, and the point of least sensitivity that costs at most ``limit``."""
    frontier = pareto_frontier(
        [[unit.cost(choice, costs.kind, costs.table) for choice in unit.choices] for unit in units],
        [[unit.sensitivity(choice) for choice in unit.choices] for unit in units],
    )
    # A limit that was written down rounded is kept as well as one that was computed.
    index = frontier.best_within(costs.raw(limit) * (1 + 1e-9))
    if index is None:
        least = f"{_rounded_up(costs.shown(frontier.costs[0]), costs.kind)} {UNITS[costs.kind]}"
        raise UserError(
            f"got budget.{costs.kind}={limit:g}",
            f"at least {least}, the least that this network's choices cost",
            "allow more, or fewer bits in scheme.weight_bits",
        )
    return frontier, index


def _rounded_up(value: float, kind: str) -> str:
    if kind in ("size_bytes", "bops"):
        return str(math.ceil(value))
    return f"{math.ceil(value * 1e4 - 1e-6) / 1e4:g}"  # sums of floats are a hair above what was meant


def prepare(
    scheme: MixedScheme, teacher: Teacher, dataset: SyntheticDataset, weight_quantizer: Any, activation_quantizer: Any
) -> Rounding:
    """A student of ``scheme`` to be rounded in all ways that it leaves open, on samples that are not held out."""
    # With few bits, so that those of an edge differ from them.
    probe = replace(scheme.weight, num_bits=min(scheme.weight_bits))
    student = Student.from_teacher(teacher, replace(scheme, weight=probe))
    kept = dataset.split()[0][: scheme.num_samples]
    images = dataset.without_padding(kept)
    return Rounding(student, teacher, find_units(student, scheme), images, weight_quantizer, activation_quantizer)


def resolve(
    scheme: MixedScheme,
    teacher: Teacher,
    dataset: SyntheticDataset,
    weight_quantizer: Any,
    activation_quantizer: Any,
    seed: int = 0,
    exporter: Any = None,
) -> tuple[Scheme, dict[str, Any]]:
    """The plain scheme with the bits of every layer, and what is written down of how they were found.

    Args:
        exporter: measures layers where there is a budget of ``latency_ms`` and no table: a method of the exporters
            family whose ``export`` returns ``latency_ms``.

    Returns:
        the scheme; the content of ``allocation.json``, see :func:`describe`.
    """
    if scheme.allocation is not None:
        found = read_allocation(scheme.allocation)
        return scheme.with_bits(found["overrides"]), found
    rounding = prepare(scheme, teacher, dataset, weight_quantizer, activation_quantizer)
    units = rounding.units
    if not any(len(unit.choices) > 1 for unit in units):
        raise UserError(
            f"got a mixed scheme that leaves nothing to choose in {teacher.name}",
            "two or more scheme.weight_bits, and layers whose bits neither overrides nor edges_8bit say",
        )
    if scheme.policy == "hardware" and scheme.budget.kind in ("bops", "latency_ms"):
        bits = scheme.activation.num_bits
        say(f"mixed: with policy=hardware layers share the grids of their inputs, which stay at {bits} bits")
    table = scheme.budget.latency_table or {}
    if scheme.budget.kind == "latency_ms":
        where = "budget.latency_table"
        if not table:
            table, where = measure_latency(rounding, scheme, exporter), "measured latencies (of 8 bits and float)"
        use_table(units, table, where)
    costs = _costs(rounding, scheme.budget.kind, table)
    limit = scheme.budget.limit or costs.of(units, [unit.given for unit in units])
    sensitivity(rounding, scheme.measure, seed)
    frontier, index = allocate(units, costs, limit)
    candidates = compare(rounding, costs, frontier, index, limit, scheme.num_candidates)
    chosen = min(candidates, key=lambda candidate: candidate.kl)
    overrides = {name: parts for unit, c in zip(units, chosen.choices, strict=True) for name, parts in _bits(unit, c)}
    plain = scheme.with_bits(overrides)
    found = describe(rounding, scheme, costs, limit, frontier, candidates, chosen) | {"overrides": overrides}
    say(f"mixed: {summary(found)}")
    return plain, found


def _costs(rounding: Rounding, kind: str, table: Mapping[str, Mapping[str, float]]) -> Costs:
    units = rounding.units
    if kind == "mean_weight_bits":
        return Costs(kind, per=sum(unit.num_weights for unit in units))
    if kind != "size_bytes":
        return Costs(kind, table=table)
    # The longest header there can be: it lists where each tensor begins.
    largest = [max(unit.choices, key=lambda choice: bits_of(choice[0])) for unit in units]
    return Costs(kind, size_bytes(rounding, largest) - Costs(kind).of(units, largest))


def size_bytes(rounding: Rounding, choices: Sequence[Choice]) -> int:
    """What a student with these bits takes as a file."""
    rounding.set_all(choices)
    student, swap = rounding.student, rounding.student.swap
    layers = {n: (la.weight_quantizer.scheme, la.input_quantizer.scheme) for n, la in rounding.layers.items()}
    student.surgery.swap = Swap(layers, swap.kept_float)
    tensors = student.tensors()
    student.surgery.swap = swap
    rounding.turn_off()
    floats = [f"{name}.weight_quantizer." for name, (weight, _) in layers.items() if weight.is_float]
    return len(save_safetensors({n: t for n, t in tensors.items() if not n.startswith(tuple(floats))}))


@dataclass(frozen=True)
class Candidate:
    """An allocation with what everything rounded at once does to the outputs."""

    choices: list[Choice]
    cost: float
    sensitivity: float
    kl: float
    is_uniform: bool = False  # the scheme without mixing


def compare(
    rounding: Rounding, costs: Costs, frontier: Frontier, index: int, limit: float, num_candidates: int
) -> list[Candidate]:
    """The last points of the frontier up to ``index``, and the scheme without mixing if it is within ``limit``."""
    units, found = rounding.units, []
    points = [frontier.choices(i) for i in range(index, max(index - num_candidates, -1), -1)]
    allocations = [[unit.choices[c] for unit, c in zip(units, point, strict=True)] for point in points]
    uniform = [unit.given for unit in units]
    is_possible = all(unit.given in unit.choices for unit in units)
    if is_possible and uniform not in allocations and costs.of(units, uniform) <= limit * (1 + 1e-9):
        allocations.append(uniform)
    for choices in allocations:
        rounding.set_all(choices)
        harm = sum(unit.sensitivity(choice) for unit, choice in zip(units, choices, strict=True))
        kl, _ = rounding.figures()
        found.append(Candidate(choices, costs.of(units, choices), harm, kl, choices == uniform))
    rounding.turn_off()
    return found


def _bits(unit: Unit, choice: Choice) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Overrides of a unit's layers, by their exact names; what is stated elsewhere is not stated again."""
    weight, activation = choice
    for name in unit.names:
        parts: dict[str, dict[str, Any]] = {}
        if unit.schemes(0) or weight != unit.given[0]:
            parts["weight"] = {"grid": "float"} if weight.is_float else {"num_bits": weight.num_bits}
        if name in unit.free_inputs() and unit.schemes(1):
            parts["activation"] = {"grid": "float"} if activation.is_float else {"num_bits": activation.num_bits}
        if parts:
            yield glob.escape(name), parts


# ------------------------------------------------------------------------------------------------ latency


class _Alone(nn.Module):
    """A layer, fed with samples [N, 1, 1, P] that are reshaped to what it takes."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, *self.shape))


def measure_latency(rounding: Rounding, scheme: MixedScheme, exporter: Any) -> dict[str, dict[str, float]]:
    """Milliseconds of each layer alone, at 8 bits and float, in the exporter's runtime; equal layers once.

    Fewer bits have no kernels there. Alone a layer pays for its own quantize and dequantize, and what happens between
    layers is not in the sum: a table of one's own, of the target, says more.
    """
    if exporter is None:
        raise UserError(
            "got budget.latency_ms without budget.latency_table, and nothing to measure with",
            'budget.latency_table=FILE.json, {layer: {"4": ms, "8x8": ms, "float": ms}}',
        )
    eight = replace(scheme.weight, num_bits=8), replace(scheme.activation, num_bits=8)
    policy = "hardware" if scheme.policy == "hardware" else "all"
    known: dict[str, dict[str, float]] = {}
    table: dict[str, dict[str, float]] = {}
    with progress_bar("latency", len(rounding.layers), "layers") as advance:
        for name, layer in rounding.layers.items():
            if name not in rounding.shapes or layer.input_quantizer.scheme.is_float:
                table[name] = {"8": 0.0, "float": 0.0}  # a look-up, or part of what its owner does
            else:
                network = _Alone(_float_layer(layer), rounding.shapes[name])
                if repr((network, network.shape)) not in known:
                    known[repr((network, network.shape))] = _layer_latency(network, Scheme(*eight, policy), exporter)
                table[name] = known[repr((network, network.shape))]
            advance(1)
    return table


def _float_layer(layer: QuantizedLayer) -> nn.Module:
    """The torch layer that a quantized one was."""
    plain: nn.Module = copy.deepcopy(layer)
    for name in ("input_quantizer", "weight_quantizer", "bias_quantizer", HOLDER):
        plain._modules.pop(name, None)
    base = base_of(type(layer))
    assert base is not None
    plain.__class__ = base
    return plain.cpu()


def _layer_latency(network: _Alone, scheme: Scheme, exporter: Any) -> dict[str, float]:
    spec = InputSpec((1, 1, math.prod(network.shape)), (0.0,), (1.0,))
    teacher = Teacher(network, "classification", spec, name="layer")
    student = Student.from_teacher(teacher, scheme)
    low, high = torch.tensor(-4.0), torch.tensor(4.0)
    for part in student.module.modules():
        if isinstance(part, Quantizer):
            scale, zero_point = choose_qparams(low, high, part.scheme)
            part.set_qparams(scale.expand(part.scale.shape), zero_point.expand(part.scale.shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"layer{exporter.suffix}"
        found = exporter.export(student.freeze(), path, teacher, teacher.example(2))["latency_ms"]
    if not found or found.get("quantized") is None:
        raise UserError("got budget.latency_ms and an exporter that measures none", "budget.latency_table=FILE.json")
    return {"8x8": found["quantized"], "float": found["float"]}


# ------------------------------------------------------------------------------------------------ what is written down


def describe(
    rounding: Rounding,
    scheme: MixedScheme,
    costs: Costs,
    limit: float,
    frontier: Frontier,
    candidates: Sequence[Candidate],
    chosen: Candidate,
) -> dict[str, Any]:
    """``allocation.json`` but for ``overrides``, the part that is read again."""
    units = rounding.units
    layers = []
    for unit, (weight, activation) in zip(units, chosen.choices, strict=True):
        for name in unit.names:
            own = unit.inputs.get(name, activation)
            layers.append(
                {
                    "name": name,
                    "weight_bits": None if weight.is_float else weight.num_bits,
                    "activation_bits": None if own.is_float else own.num_bits,
                    "num_weights": unit.num_weights if name == unit.name else 0,  # a shared weight counts once
                    "macs": unit.macs[name],
                    "weight_sensitivity": _by_bits(unit.weight),
                    "activation_sensitivity": _by_bits(unit.activation),
                }
            )
    wanted = np.unique(np.linspace(0, len(frontier.costs) - 1, MOST_POINTS).round().astype(int))
    points = [(costs.shown(frontier.costs[i]), frontier.sensitivities[i]) for i in wanted]
    everything = {kind: _costs(rounding, kind, {}).of(units, chosen.choices) for kind in ("mean_weight_bits", "bops")}
    return {
        "format": "dfq.allocation",
        "schema_version": 1,
        "dfq_version": dfq.__version__,
        "measure": scheme.measure,
        "num_samples": sum(map(len, rounding.batches)),
        "budget": costs.kind,
        "unit": UNITS[costs.kind],
        "limit": limit,
        "cost": chosen.cost,
        "sensitivity": chosen.sensitivity,
        "kl": chosen.kl,
        "is_uniform": chosen.is_uniform,
        "size_bytes": size_bytes(rounding, chosen.choices),
        **everything,
        "layers": layers,
        "frontier": [{"cost": float(cost), "sensitivity": float(harm)} for cost, harm in points],
        "num_points": len(frontier.costs),
        "candidates": [
            {"cost": c.cost, "sensitivity": c.sensitivity, "kl": c.kl, "is_uniform": c.is_uniform} for c in candidates
        ],
    }


def _by_bits(measured: Measured) -> dict[str, float]:
    return {"float" if scheme.is_float else str(scheme.num_bits): value for scheme, value in measured.items()}


def summary(allocation: Mapping[str, Any]) -> str:
    """An allocation in one line."""
    counts: dict[str, int] = {}
    for layer in allocation["layers"]:
        label = "float" if layer["weight_bits"] is None else f"{layer['weight_bits']} bits"
        counts[label] = counts.get(label, 0) + 1
    parts = [f"{label} {count}" for label, count in sorted(counts.items())]
    cost, limit = (f"{allocation[key]:.6g}" for key in ("cost", "limit"))
    text = f"{cost} of {limit} {allocation['unit']}; layers with weights of {', '.join(parts)}"
    return f"{text}; KL with everything rounded {allocation['kl']:.4f}"
