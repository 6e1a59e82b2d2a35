"""Bias correction: give a layer's outputs the mean back that rounding has moved.

DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721), section 4.2. With W~ = W + eps a layer makes E[y~] = E[y] + eps E[x] of
an input x, so (eq. 16-18)

    b - eps E[x]                                                                                     ``batch_norm``

    E[x_c] = gamma_c phi(-beta_c / gamma_c) + beta_c (1 - Phi(-beta_c / gamma_c))

for x = ReLU(N(beta, gamma^2)), of the batch norm in front (eq. 19; appendix C clips it from above as well); or, for a
network without them (appendix D), the mean over samples of what the float network's layer makes, less the student's,
layer by layer with all earlier ones corrected                                                      ``samples``

Differences from the paper: samples are synthetic; all layers are corrected in one forward of a batch, while it runs,
and later batches go on from there: the correction is the mean of all batches'. Rounding of activations counts as well
where samples are used. Layers without a bias get one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfq.algorithms._paths import (
    Path,
    find_paths,
    layer_products,
    relu6_of,
)
from dfq.channels import (
    FloatNetwork,
    batch_norm_statistics,
    channel_dim,
    ensure_bias,
    float_network,
    products_with,
    rescaled,
    weight_in_float,
)
from dfq.hooks import forward_hooks, given_choices, kept_choices, op_name
from dfq.modules import PRODUCTS, QuantizedLayer
from dfq.progress import progress_bar
from dfq.student import Student
from dfq.teacher import Teacher

MAXIMA = {"amax"} | {f"{kind}max_pool{dims}d" for kind in ("", "adaptive_") for dims in (1, 2, 3)}  # move means


# ------------------------------------------------------------------------------------------------ samples


@torch.no_grad()
def correct_bias(
    student: Student, teacher: Teacher, images: Tensor, batch_size: int = 64, add_bias: bool = True
) -> list[str]:
    """Correct the biases of a calibrated student in place, from samples; returns the names of the layers.

    Args:
        images: [N, C, H, W], or ids [N, T].
        add_bias: also layers without a bias, which get one.
    """
    network = float_network(student, teacher)
    names = [name for name in layer_products(network, student.layers) if _has_bias(student, name, add_bias)]
    undo_bias_correction(student, names)
    before = {name: student.layers[name].bias.detach().clone() for name in names}  # type: ignore[union-attr]
    wanted: dict[str, Tensor] = {}
    share = 1.0

    def remember(name: str, result: Tensor) -> Tensor:
        record = rescaled(student, name)
        mean = _channel_means(student.layers[name], result)
        wanted[name] = mean / record.scale.to(mean) - record.shift.to(mean)
        return result

    def correct(name: str, result: Tensor) -> Tensor:
        layer = student.layers[name]
        before = _bias_in_use(layer)
        right = before + (wanted[name] - _channel_means(layer, result)).to(before)
        bias = _bias(layer)
        bias += share * (right - bias)
        change = _bias_in_use(layer) - before
        return result + change.view(-1, *[1] * (result.dim() - 1 - channel_dim(layer, result)))

    seen = 0
    with progress_bar("correct biases", len(images), "samples") as advance:
        for batch in student.batches(images, batch_size):
            seen += len(batch)
            share = len(batch) / seen
            with kept_choices(network.module) as chosen, _products_of(network.module, names, remember):
                network.outputs(batch)
            with given_choices(student.module, chosen), _products_of(student.module, names, correct):
                student(batch)
            advance(len(batch))
    _remember(student, before)
    return names


def _channel_means(layer: nn.Module, x: Tensor) -> Tensor:
    return x.float().movedim(channel_dim(layer, x), 0).flatten(1).mean(1)


def _bias(layer: QuantizedLayer) -> Tensor:
    bias = layer._parameters["bias"]  # the attribute is the rounded one while the layer runs
    assert bias is not None
    return bias


def _bias_in_use(layer: QuantizedLayer) -> Tensor:
    """As the layer adds it: of an integer student it is rounded."""
    bias = _bias(layer)
    return bias.clone() if layer.bias_quantizer is None else layer.bias_quantizer(bias, layer)


@contextmanager
def _products_of(network: nn.Module, names: list[str], replace: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Each named layer's product goes through ``replace(name, result)``, ahead of any quantizer of the result."""
    stack: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return replace(stack[-1], result) if stack and op_name(func) in PRODUCTS else result

    with (
        forward_hooks(
            [(name, network.get_submodule(name)) for name in names],
            before=lambda name, _module, _inputs: stack.append(name),
            after=lambda _name, _module, _inputs, _output: stack.pop() and None,
        ),
        Mode(),
    ):
        yield


# ------------------------------------------------------------------------------------------------ batch norms


@torch.no_grad()
def correct_bias_by_batch_norm(student: Student, teacher: Teacher, add_bias: bool = True) -> list[str]:
    """Correct, without data, the biases of layers that read what a batch norm is in front of; returns their names."""
    network = float_network(student, teacher)
    statistics = batch_norm_statistics(student, teacher)
    before = {}
    for path in find_paths(network, student.layers):
        if path.first not in statistics or not path.shifts or not _has_bias(student, path.last, add_bias):
            continue
        means = expected_outputs(path, *statistics[path.first], network)
        if means is None:
            continue
        layer = student.layers[path.last]
        undo_bias_correction(student, [path.last])
        assert layer.bias is not None
        before[path.last] = layer.bias.detach().clone()
        error = layer.weight_quantizer(layer.weight).cpu().double() - weight_in_float(student, network, path.last)
        bias = _bias(layer)
        bias -= products_with(layer, error, path.at_inputs(means, 0.0)).to(bias)
    _remember(student, before)
    return list(before)


def expected_outputs(path: Path, mean: Tensor, std: Tensor, network: FloatNetwork) -> Tensor | None:
    """Mean [O] of what each channel becomes on its way; None if it cannot be told.

    It can where at most one activation comes first, and then what keeps means.
    """
    activations = [op for op in path.ops if op.name in path.activations]
    if any(op.name in MAXIMA for op in path.ops) or activations not in ([], [path.ops[0]] if path.ops else []):
        return None
    if not activations:
        return mean
    if activations[0].name == "relu":
        return rectified_mean(mean, std)
    relu6 = relu6_of(network, activations[0])
    return None if relu6 is None else rectified_mean(mean, std) - rectified_mean(mean - relu6.max_val, std)


def rectified_mean(mean: Tensor, std: Tensor) -> Tensor:
    """E[max(x, 0)] of normal x."""
    ratio = mean / std.clamp(min=torch.finfo(std.dtype).tiny)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return std * density + mean * torch.special.ndtr(ratio)


# ------------------------------------------------------------------------------------------------ records


def has_own_bias(student: Student, name: str) -> bool:
    """Whether the layer has a bias that nobody else has: what makes up for one layer would move the other."""
    bias = student.layers[name]._parameters.get("bias")
    others = student.module.named_parameters(remove_duplicate=False)
    return bias is not None and sum(other is bias for _, other in others) == 1


def undo_bias_correction(student: Student, names: Iterable[str] | None = None) -> None:
    """Take back what bias correction has added: for what rounds weights anew, or compares with the float network.

    Biases that somebody else has changed since stay as they are.

    Args:
        names: layers that are corrected anew; None: all, but for corrections that belong to rounded weights, which stay
            as long as these do.
    """
    for name in list(student.layers) if names is None else names:
        layer = student.layers[name]
        before, after, of_weight = layer.__dict__.get("bias_correction", (None, None, False))
        if before is None or (names is None and of_weight):
            continue
        del layer.__dict__["bias_correction"]
        if layer.bias is not None and torch.equal(layer.bias.detach(), after):
            layer.bias.data.copy_(before)


def remember_bias_correction(layer: QuantizedLayer, before: Tensor, of_weight: bool = False) -> None:
    """That the layer's bias was ``before``; ``of_weight``: it makes up for a weight that was rounded with it."""
    layer.__dict__["bias_correction"] = (before, _bias(layer).detach().clone(), of_weight)


def _remember(student: Student, before: dict[str, Tensor]) -> None:
    for name, bias in before.items():
        layer = student.layers[name]
        remember_bias_correction(layer, bias)
        if layer.bias_quantizer is not None:
            layer.bias_quantizer.make_room(layer)


def _has_bias(student: Student, name: str, add_bias: bool) -> bool:
    return student.layers[name].bias is not None or (add_bias and ensure_bias(student, name))
