"""Block-AP: train all parameters of one block after the other, so that its rounded output is the float network's.

EfficientQAT (Chen et al., ACL 2025, arXiv 2407.11062, section 3.2): blocks in the order they run; a block's input x_q
is what the quantized ones before it make, its target the float block's output on the float network's activations::

    minimize  |f_q(x_q) - f(x)|^2        over weights W, steps s and zero points z of all layers in the block

with W_hat = s (clamp(round(W / s) + round(z), quant_min, quant_max) - round(z)) and straight-through roundings. Beside
the weights of teacher and student, training holds one block's gradients and moments and its activations; on a CPU the
weights of a large network lie in files (:mod:`dfq.weights`). The end-to-end half of the paper is
:mod:`dfq.algorithms.e2e_qp`.

What is trained are codes, in the end: weights stay latent, so that an algorithm behind this one (distillation) goes on
from them, and are rounded when the student is frozen.

Differences from the paper: any network and grid (a ternary one's shift is trained as its zero point, a symmetric grid
has none), inputs' steps too where they are calibrated; the error is relative and learning rates are in units of each
weight's step, which the paper's absolute ones are not; no loss scaling, no clipping of gradients (Adam's step does not
grow with them); gains of norms and biases have a rate of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dfq.algorithms._reconstruction import BlockFitting, Trainable, magnitude
from dfq.blocks import Block
from dfq.modules import QuantizedLayer, Quantizer
from dfq.quantizers.lsq import learn_step
from dfq.settings import NonNegativeFloat, PositiveFloat, PositiveInt
from dfq.student import Student


@dataclass(frozen=True)
class BlockAP(BlockFitting):
    """Minutes on small networks."""

    iterations: PositiveInt = 1000  # steps a block
    batch_size: PositiveInt = 16  # samples a step
    weight_lr: PositiveFloat = 0.03  # Adam on weights, in units of each weight's step
    weight_step_lr: NonNegativeFloat = 2e-3  # Adam on weight steps, relative to each; 0: they stay
    zero_point_lr: NonNegativeFloat = 0.01  # Adam on zero points of weights, in codes; 0: they stay
    activation_step_lr: NonNegativeFloat = 1e-3  # Adam on activation steps, relative to each; 0: they stay
    bias_lr: NonNegativeFloat = (
        1e-3  # Adam on biases and gains of norms, in units of their mean magnitude; 0: they stay
    )

    def trainable(
        self, student: Student, block: Block, activations: list[Quantizer], elements: dict[Quantizer, int]
    ) -> Trainable:
        inside = tuple(f"{name}." for name in block.modules)
        parameters = list(student.module.named_parameters(remove_duplicate=False))
        outside = {id(p) for name, p in parameters if not name.startswith(inside)}
        layers = [layer for name, layer in student.layers.items() if name in block.layers]
        own = {id(parameter) for layer in layers for parameter in (layer.weight, layer.bias)} | outside
        others = {id(p): p for name, p in parameters if name.startswith(inside) and id(p) not in own}
        rounded = {layer.weight_quantizer: layer for layer in layers if id(layer.weight) not in outside}
        return _Parameters(self, layers, activations, elements, rounded, list(others.values()))


class _Parameters(Trainable):
    """Weights and what their grids are made of (``rounded``), and what stays float (``others``).

    What another block reads too (the weight of an embedding and a head) is in neither: it would change that one.
    """

    settings: BlockAP

    def __init__(
        self,
        settings: BlockAP,
        layers: Iterable[QuantizedLayer],
        activations: list[Quantizer],
        elements: dict[Quantizer, int],
        rounded: dict[Quantizer, QuantizedLayer],
        others: list[Tensor],
    ):
        super().__init__(settings, layers, activations, elements, settings.activation_step_lr, settings.bias_lr)
        self.rounded = {quantizer: layer for quantizer, layer in rounded.items() if quantizer.has_qparams}
        self.others = others

    def __enter__(self) -> list[dict[str, Any]]:
        s, groups = self.settings, super().__enter__()
        for quantizer, layer in self.rounded.items():
            layer.weight.requires_grad_(True)
            groups.append(self.group(layer.weight, s.weight_lr, quantizer.steps_of(layer.weight)))
            count = layer.weight.numel() // quantizer.scale.numel()
            step, *zero_point = learn_step(quantizer, count, offset=s.zero_point_lr > 0)
            step.requires_grad_(s.weight_step_lr > 0)
            groups.append(self.group(step, s.weight_step_lr, step.detach().abs()))
            self.smallest[quantizer] = step.detach() * 1e-2
            groups += [{"params": [z], "lr": s.zero_point_lr, "decays": True} for z in zero_point]
        if s.bias_lr > 0:
            for parameter in self.others:
                parameter.requires_grad_(True)
                groups.append(self.group(parameter, s.bias_lr, magnitude(parameter)))
        return groups

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for quantizer, layer in self.rounded.items():
            quantizer.freeze()
            layer.weight.requires_grad_(False)
        for parameter in self.others:
            parameter.requires_grad_(False)
