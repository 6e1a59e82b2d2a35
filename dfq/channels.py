"""Channels of a network's layers: their weights by channel, in float, and scales between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfq.hooks import Dataflow, capture_outputs, evaluation_mode, record_dataflow, tensors_in
from dfq.modules import QUANTIZED, BiasQuantizer, fold_batch_norm
from dfq.precision import double
from dfq.student import Rescaled, Student
from dfq.surgery import REWRITES, apply
from dfq.teacher import Teacher
from dfq.weights import copy_network

NUM_INPUTS, LOUD = 4, 3.0  # batches of noise that show how channels are scaled, and how large it is
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# ------------------------------------------------------------------------------------------------ the float network


@dataclass(frozen=True)
class FloatNetwork:
    """The teacher's network as the student's was before its layers were swapped: rewritten, batch norms folded.

    ``before_folding``: the name that each module had then, under which a rewrite is repeated.
    """

    module: nn.Module
    flow: Dataflow
    example: Tensor
    before_folding: dict[str, str]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> Tensor:
        """All that the network returns, in a row."""
        with evaluation_mode(self.module):
            found = self.module(images.to(self.example.device, copy=True))
        return torch.cat([x.float().flatten() for x in tensors_in(found)])


def float_network(student: Student, teacher: Teacher, with_limits: bool = True) -> FloatNetwork:
    """A copy in the teacher's own units, whatever equalization has done to the student.

    Args:
        with_limits: a ReLU6 that equalization has replaced is one; else the ReLU that it is in the student.
    """
    module = copy_network(teacher.module)
    apply(module, [(name, kind) for name, kind in student.surgery.rewrites if kind != "relu" or not with_limits])
    names = {id(part): name for name, part in module.named_modules()}
    fold_batch_norm(module, student.surgery.folded)
    after = {name: names[id(part)] for name, part in module.named_modules() if id(part) in names}
    example = teacher.example()
    return FloatNetwork(module, record_dataflow(module, example), example, after)


def rescaled(student: Student, name: str) -> Rescaled:
    """Of one layer."""
    layer = student.layers[name]
    found = student.surgery.rescaled.get(name)
    if found is None:
        ones = torch.ones(num_outputs(layer), dtype=torch.float64)
        found = Rescaled(ones, torch.zeros_like(ones), torch.ones(num_inputs(layer), dtype=torch.float64))
    return found


def weight_in_float(student: Student, network: FloatNetwork, name: str) -> Tensor:
    """What a layer's weight would be had nobody rounded it; float64, on the CPU."""
    layer, record = network.module.get_submodule(name), rescaled(student, name)
    factor = shaped(layer, record.input_scale, inputs=True) / shaped(layer, record.scale, inputs=False)
    return double(layer.weight) * factor.view(*factor.shape, *[1] * (layer.weight.dim() - 2))


@torch.no_grad()
def scaled_float_network(student: Student, teacher: Teacher) -> FloatNetwork:
    """The float network with the student's scales (without shifts) between layers, which computes what it did.

    Where more than layers took part in a scale (norms whose gain AWQ has divided) it is in the teacher's own units.
    """
    # A limit would clip at other values.
    network = float_network(student, teacher, with_limits=not student.surgery.rescaled)
    if student.surgery.rescaled:
        before = network.outputs(network.example)
        for name, record in student.surgery.rescaled.items():
            layer, weight = network.module.get_submodule(name), weight_in_float(student, network, name)
            layer.weight.copy_(weight)
            if layer.bias is not None:
                multiply(layer.bias, 1 / record.scale)
        if not _are_alike(network.outputs(network.example), before):
            return float_network(student, teacher)
    return network


@torch.no_grad()
def output_scales(student: Student, teacher: Teacher, names: Iterable[str]) -> dict[str, Tensor]:
    """Sub-module that is no layer → what the student has divided each channel of its output by: [C], or [C, 1, 1] of a
    map. Those that make what the teacher's make are left out."""
    names = [name for name in names if name not in student.layers]
    if not names or not student.surgery.rescaled:
        return {}
    inputs, rng = [teacher.example()], torch.Generator().manual_seed(0)
    if inputs[0].is_floating_point():  # a channel that a ReLU cuts off in one input is seen in another
        shape = inputs[0].shape
        even = (*shape[:2], *[1] * (len(shape) - 2))
        inputs += [
            LOUD * (torch.randn(shape, generator=rng) + torch.randn(even, generator=rng)) for _ in range(NUM_INPUTS)
        ]
    seen, found = [], {}
    for network in (float_network(student, teacher, with_limits=False), scaled_float_network(student, teacher)):
        values: dict[str, list[Tensor]] = {name: [] for name in names}
        for x in inputs:
            with capture_outputs(network.module, names) as captured:
                network.outputs(x)
            for name, value in captured.items():
                values[name].append(double(value))
        seen.append({name: torch.cat(parts) for name, parts in values.items()})
    for name in names:
        for dim in (1, -1):  # of maps; of tokens
            before, after = (values[name].movedim(dim, 0).flatten(1) for values in seen)
            scale = torch.where((before != 0).any(1), before.norm(dim=1) / after.norm(dim=1), 1.0)
            if _are_alike(after * scale[:, None], before):
                if not _are_alike(scale, torch.ones_like(scale)):
                    found[name] = scale.view(-1, *[1] * (seen[0][name].dim() - 2 if dim == 1 else 0))
                break
    return found


def _are_alike(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).abs().max() <= 1e-3 * y.abs().max())


def batch_norm_statistics(student: Student, teacher: Teacher) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → mean and standard deviation [O] of its output as the folded batch norm knows them, in its own units."""
    found = {}
    for name, norm_name in student.surgery.folded:
        if name not in student.layers:
            continue
        norm, record = teacher.module.get_submodule(norm_name), rescaled(student, name)
        mean = torch.zeros_like(record.scale) if norm.bias is None else double(norm.bias)
        std = torch.ones_like(record.scale) if norm.weight is None else double(norm.weight).abs()
        found[name] = (mean / record.scale - record.shift, std / record.scale)
    return found


# ------------------------------------------------------------------------------------------------ layers


def num_outputs(layer: nn.Module) -> int:
    return layer.out_channels if hasattr(layer, "out_channels") else layer.weight.shape[0]


def num_inputs(layer: nn.Module) -> int:
    return layer.in_channels if hasattr(layer, "in_channels") else layer.weight.shape[1]


def channel_dim(layer: nn.Module, x: Tensor) -> int:
    """The dimension of an input or output that its channels lie along."""
    return x.dim() - 1 - (layer.weight.dim() - 2)


def shaped(layer: nn.Module, values: Tensor, inputs: bool) -> Tensor:
    """Values of output channels [O], or of input features [I], for the kernels of the layer's weight: [.., ..]."""
    if inputs == isinstance(layer, TRANSPOSED):  # the weight's first dimension
        return values.view(-1, 1)
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    return values.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[:2])


def reduced(layer: nn.Module, kernels: Tensor, inputs: bool) -> Tensor:
    """The inverse: of one value a kernel [.., ..] the largest of each output channel [O], or of each input [I]."""
    if inputs == isinstance(layer, TRANSPOSED):
        return kernels.amax(1)
    return kernels.view(getattr(layer, "groups", 1), -1, kernels.shape[1]).amax(1).flatten()


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether some of the layer's outputs read zeros beside its input."""
    if isinstance(layer, TRANSPOSED):
        return True
    padding = getattr(layer, "padding", 0)
    if getattr(layer, "padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(padding) if isinstance(padding, tuple) else bool(padding)


def ensure_bias(student: Student, name: str) -> bool:
    """Whether the layer has a bias now: one is added (of zeros, which a saved student has too) where that is safe."""
    layer = student.layers[name]
    if layer.bias is not None:
        return True
    if type(layer) not in QUANTIZED.values() or isinstance(layer, nn.Embedding):
        return False  # a sub-class may not read it
    REWRITES["bias"](layer)
    student.surgery.rewrites.append((name, "bias"))
    floats = layer.input_quantizer.scheme.is_float or layer.weight_quantizer.scheme.is_float
    if student.surgery.sites.has_integer_bias and not floats:
        layer.bias_quantizer = BiasQuantizer()
    return True


def multiply(x: Tensor, factor: Tensor) -> None:
    x.data.copy_(double(x) * factor.view(*factor.shape, *[1] * (x.dim() - factor.dim())))


def products_with(layer: nn.Module, weight: Tensor, values: Tensor) -> Tensor:
    """What ``layer`` makes of constant input features [I] with ``weight``, where it does not pad: [O]."""
    factor = shaped(layer, values, inputs=True)
    kernels = weight.view(*weight.shape[:2], -1).sum(-1) * factor
    if not isinstance(layer, TRANSPOSED):
        return kernels.sum(1)
    return kernels.view(layer.groups, -1, kernels.shape[1]).sum(1).flatten()
