"""Cross-layer equalization and high-bias absorption.

DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721), section 4.1. Batch norms are folded. A function f with f(s x) = s f(x)
for s > 0 lets a scale pass from one layer to the next (eq. 5-7): with r1_i the largest magnitude of the weights that
make channel i, r2_i of those that read it,

    s_i = sqrt(r1_i r2_i) / r2_i,    W1_i / s_i,    b1_i / s_i,    W2_i s_i                              (eq. 9-11)

makes both ranges sqrt(r1_i r2_i); pairs (:mod:`dfq.algorithms._paths`) in turn until nothing changes. High biases,
which this can make, are absorbed by the next layer (eq. 12-15): through a ReLU, a value that is almost never below c_i
= max(0, beta_i - 3 gamma_i) (of the batch norm, its scale and shift equalized along) may lose c_i, b1 - c, b2 + W2 c.

Weights alone are balanced at the expense of the activations between them, which then need a wider range; and a weight
with a step of its own for each output channel, or a depthwise one, does not mind being scaled at all. So by default the
scales are those with the least noise (:mod:`dfq.algorithms._least_noise`), and not only of pairs: channels that several
layers read, or that are added to others, have one scale together (:mod:`dfq.algorithms._ties`), which reaches residual
streams, concatenations and necks. ``balance_activations=False`` is the paper's rule, for pairs.

Differences from the paper, beside that: ranges are largest magnitudes, not widths, as weight grids here contain zero.
A ReLU6 is replaced by ReLU only where channels with a scale go through it, and only where that hardly changes what the
network makes of synthetic samples. Biases are absorbed only where the next layer does not pad with zeros, which would
not stand for c, and no further than samples go, since the tails of a real batch norm's input are not normal. Weights
are changed once, by the product of all scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dfq.algorithms._least_noise import (
    least_noise_scales,
)
from dfq.algorithms._paths import (
    Path,
    find_paths,
    limits_of,
    relu6_between,
    replace_relu6_by_relu,
    replaceable,
    without_limit,
    without_surprises,
)
from dfq.algorithms._ties import Ties, UnknownTies, find_ties, limits_between
from dfq.channels import (
    FloatNetwork,
    batch_norm_statistics,
    channel_dim,
    double,
    ensure_bias,
    float_network,
    num_outputs,
    pads_with_zeros,
    products_with,
    reduced,
    rescaled,
    shaped,
)
from dfq.hooks import forward_hooks
from dfq.progress import say
from dfq.student import Student
from dfq.teacher import Teacher

CONVERGED = 1e-3  # largest |log s| of a round that ends the iteration


# ------------------------------------------------------------------------------------------------ equalization


@torch.no_grad()
def equalize(
    student: Student,
    teacher: Teacher,
    iterations: int = 200,
    replace_relu6: bool = True,
    images: Tensor | None = None,
    balance_activations: bool = True,
) -> list[Path]:
    """Equalize a student in place: it computes what it did, and its grids are to be made anew.

    Args:
        iterations: steps, or rounds over all pairs at most.
        replace_relu6: also channels that go through a ReLU6, which becomes a ReLU where that is safe.
        images: [N, C, H, W], on which that is judged and activations are looked at; noise if there are none.
        balance_activations: least noise of weights and activations; false: ranges of weights, as in the paper.

    Returns:
        The pairs of layers with nothing else in between, along which biases may be absorbed.
    """
    network = float_network(student, teacher)
    images = network.example if images is None else images
    paths = [path for path in find_paths(network, student.layers) if path.is_private]
    paths = without_surprises(network, paths)
    if balance_activations:
        limits = limits_of(network)
        between = set(limits) if replace_relu6 else set()
        ties = _ties_or_pairs(student, network, paths, {name: limits[name] for name in between})
        between &= limits_between(network, ties, limits)
        chosen = replaceable(network, {name: limits[name] for name in between}, images)
        if chosen != between:  # what goes through the others stays
            ties = _ties_or_pairs(student, network, paths, {name: limits[name] for name in chosen})
            chosen &= limits_between(network, ties, limits)
        paths = [path for path in paths if not any(op.module in limits.keys() - chosen for op in path.ops)]
        with without_limit(limits[name] for name in chosen):
            scale = least_noise_scales(student, network, ties, images, iterations)
    else:
        limits = relu6_between(network, paths)
        chosen = replaceable(network, limits, images) if replace_relu6 else set()
        paths = [path for path in paths if not any(op.module in limits.keys() - chosen for op in path.ops)]
        chosen &= {op.module for path in paths for op in path.ops}
        ties = Ties.of_paths(paths, student.layers)
        scale = equalizing_scales(student.layers, paths, iterations)
    replace_relu6_by_relu(student, network, sorted(chosen))
    ties.pass_on(student.layers, scale)
    ties.record(student, scale)
    return paths


def _ties_or_pairs(
    student: Student, network: FloatNetwork, paths: list[Path], unlimited: dict[str, nn.Hardtanh]
) -> Ties:
    """Of all channels; of pairs alone, which need no gradient, where a network does not show more."""
    try:
        return find_ties(network, student.layers, unlimited.values())
    except UnknownTies as unknown:
        say(f"equalization: of pairs of layers alone, since {unknown}")
        kept = limits_of(network).keys() - unlimited.keys()
        return Ties.of_paths([path for path in paths if not any(op.module in kept for op in path.ops)], student.layers)


def equalizing_scales(layers: Mapping[str, nn.Module], paths: list[Path], iterations: int) -> Tensor:
    """What the first layers' output channels are to be divided by, by the paper's rule: [K], those of all ``paths`` in
    a row; float64."""
    largest = {}  # magnitude of each kernel: all that a scale has to do with
    for name in {name for path in paths for name in (path.first, path.last)}:
        weight = double(layers[name].weight)
        largest[name] = weight.abs().view(*weight.shape[:2], -1).amax(-1)
    scales = [torch.ones(num_outputs(layers[path.first]), dtype=torch.float64) for path in paths]
    for _ in range(iterations):
        change = 0.0
        for path, total in zip(paths, scales, strict=True):
            first, last = layers[path.first], layers[path.last]
            made = reduced(first, largest[path.first], inputs=False)
            read = path.at_outputs(reduced(last, largest[path.last], inputs=True), len(made))
            scale = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)
            largest[path.first] /= shaped(first, scale, inputs=False)
            largest[path.last] *= shaped(last, path.at_inputs(scale, 1.0), inputs=True)
            total *= scale
            change = max(change, float(scale.log().abs().max()))
        if change < CONVERGED:
            break
    return torch.cat(scales) if scales else torch.ones(0, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ absorption


@torch.no_grad()
def absorb_biases(
    student: Student, teacher: Teacher, paths: list[Path], images: Tensor | None = None, num_stds: float = 3.0
) -> list[Path]:
    """Let second layers of ``paths`` add what is always there in their inputs, in place; returns where that was done.

    c = max(0, mean - num_stds * std) of the folded batch norm, only through ReLUs; no more than the smallest value in
    ``images`` [N, C, H, W], if there are some.
    """
    statistics = batch_norm_statistics(student, teacher)
    least = {} if images is None else _smallest_outputs(student, teacher, {path.first for path in paths}, images)
    done = []
    for path in paths:
        last = student.layers[path.last]
        if path.activations != {"relu"} or not path.shifts or path.first not in statistics or pads_with_zeros(last):
            continue
        mean, std = statistics[path.first]
        constant = (mean - num_stds * std).clamp(min=0)
        if path.first in least:
            constant = torch.minimum(constant, least[path.first].clamp(min=0))
        if not constant.any() or not ensure_bias(student, path.last):
            continue
        first, record = student.layers[path.first], rescaled(student, path.first)
        _add(first.bias, -constant)
        _add(last.bias, products_with(last, double(last.weight), path.at_inputs(constant, 0.0)))
        student.surgery.rescaled[path.first] = replace(record, shift=record.shift + constant)
        done.append(path)
    return done


def _smallest_outputs(student: Student, teacher: Teacher, names: set[str], images: Tensor) -> dict[str, Tensor]:
    """Layer → smallest value of each output channel [O], in the student's units."""
    network = float_network(student, teacher)
    found: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, _inputs: tuple, output: Tensor) -> None:
        least = double(output.movedim(channel_dim(layer, output), 0).flatten(1).amin(1))
        found[name] = torch.minimum(least, found.get(name, least))

    with forward_hooks([(name, network.module.get_submodule(name)) for name in names], after=look):
        for batch in images.split(64):
            network.outputs(batch)
    records = {name: rescaled(student, name) for name in found}
    return {name: least / records[name].scale - records[name].shift for name, least in found.items()}


def _add(x: Tensor | None, change: Tensor) -> None:
    assert x is not None
    x.copy_(double(x) + change)
