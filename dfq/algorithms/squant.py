"""SQuant: rounding whose errors cancel inside each kernel and each output channel, found without any data.

SQuant (Guo et al., ICLR 2022, arXiv 2202.07471). With the Hessian of a layer taken as a sum of an element's, a kernel's
and an output channel's constant, the loss that rounding errors delta (in steps) cause is

    sum_i delta_i^2  +  sum_kernels |sum_i delta_i|^2  +  sum_channels |sum_i delta_i|^2,              (eq. 8-10)

relaxed to a constrained absolute sum of errors, level after level:

    element    round to nearest: every |delta_i| <= 1/2
    kernel     round(|sum|) elements of the sum's sign go to their other neighbor, those with the largest |delta| first:
               every |sum of a kernel| <= 1/2, every |delta_i| <= 1
    channel    the same with kernels: one element more in each of the round(|sum|) kernels of the channel's sign with
               the largest sums: every |sum of a channel| <= 1/2, every |sum of a kernel| <= 1

Differences from the paper: any equidistant grid with any ranges, where an element never goes past the end of its grid
(so the bounds hold as far as there are elements left to move); the values of a group take the place of a channel where
scales are per group. Layers on other grids, those that share their weight and embeddings keep nearest rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfq.algorithms._base import Algorithm, Work
from dfq.algorithms._bias_correction import undo_bias_correction
from dfq.modules import QuantizedLayer
from dfq.quantization import dequantize, quantize
from dfq.scheme import FLOAT_FORMATS, TensorScheme
from dfq.settings import PositiveInt


@dataclass(frozen=True)
class SQuant(Algorithm):
    """Milliseconds a layer."""

    rounds_weights: ClassVar[bool] = True
    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at; weights need none

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """Put the student's weights on their grids; one without grids gets them first."""
        student = work.student
        undo_bias_correction(student)
        work.ensure_calibrated(work.images(self.num_calibration_samples))
        owners = [id(p) for part in student.module.modules() for p in part._parameters.values() if p is not None]
        for layer in student.layers.values():
            quantizer = layer.weight_quantizer
            fits = quantizer.has_qparams and quantizer.scheme.grid not in FLOAT_FORMATS
            if fits and owners.count(id(layer.weight)) == 1 and not isinstance(layer, nn.Embedding):
                layer.weight.copy_(rounded(layer))


def rounded(layer: QuantizedLayer) -> Tensor:
    """The layer's weight on its grid."""
    quantizer = layer.weight_quantizer
    moved = layer.weight.detach().movedim(layer.channel_axis, 0)
    num_rows, kernel_size = moved.shape[0], moved[0, 0].numel()
    if layer.channel_axis == 1:  # transposed: one channel of every group
        num_rows *= layer.groups
    if quantizer.scheme.group_size is not None:
        num_rows = moved.numel() // quantizer.scheme.group_size
    if moved.numel() // num_rows % kernel_size:
        kernel_size = 1  # groups cut through kernels
    kernels = moved.reshape(num_rows, -1, kernel_size)

    def of_rows(values: Tensor) -> Tensor:
        return values.detach().reshape(-1).repeat_interleave(num_rows // values.numel())

    scale, zero_point = of_rows(quantizer.scale), of_rows(quantizer.zero_point)
    codes = squant(kernels, scale, zero_point, quantizer.scheme)
    values = dequantize(codes, scale, zero_point, quantizer.scheme, 0)
    return values.reshape(moved.shape).movedim(0, layer.channel_axis)


def squant(kernels: Tensor, scale: Tensor, zero_point: Tensor, scheme: TensorScheme) -> Tensor:
    """Codes [R, N, K] of R rows of N kernels of K elements; ``scale`` and ``zero_point`` [R]."""
    codes = quantize(kernels, scale, zero_point, scheme, 0)
    errors = (kernels - dequantize(codes, scale, zero_point, scheme, 0)) / scale[:, None, None]

    def gains(direction: Tensor) -> Tensor:
        """How far each element lies from its level in that direction; -inf if it has no other level there."""
        other = codes + direction.int()
        possible = (errors * direction > 0) & (other >= scheme.quant_min) & (other <= scheme.quant_max)
        return torch.where(possible, errors * direction, -torch.inf)

    sums = errors.sum(2, keepdim=True)
    flips = _largest(gains(sums.sign()), sums.abs().round()) * sums.sign()
    codes, errors = codes + flips.int(), errors - flips

    sums = errors.sum(2)
    totals = sums.sum(1, keepdim=True)
    direction = totals.sign()
    gain, element = gains(direction[..., None]).max(2)
    possible = (sums * direction > 0) & (gain > 0)
    chosen = _largest(torch.where(possible, sums * direction, -torch.inf), totals.abs().round())
    flips = torch.zeros_like(errors).scatter_(2, element[..., None], (chosen * direction)[..., None])
    return codes + flips.int()


def _largest(values: Tensor, count: Tensor) -> Tensor:
    """Ones where ``values`` [..., M] are among the ``count`` [..., 1] largest along the last dimension and finite."""
    rank = values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ((rank < count) & (values > -torch.inf)).to(values.dtype)
