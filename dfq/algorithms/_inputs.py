"""What weights are multiplied with: second moments of layers' inputs in the float network, and grids chosen by them.

For a layer y = W x with x of mean square h_i in column i, the error of rounding is, up to correlations of inputs,

    E |(W - W_hat) x|^2  =  sum over rows of  sum_i h_i (w_i - w_hat_i)^2                    (h: the Hessian's diagonal)

One pass over the samples sees all layers; what is kept are I numbers of a layer, or I K where correlations inside a
group of K columns count (:func:`group_moments`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dfq.algorithms._base import Algorithm, Work, tell_left
from dfq.channels import (
    channel_dim,
    shaped,
)
from dfq.hooks import forward_hooks
from dfq.modules import QuantizedLayer, Quantizer
from dfq.progress import progress_bar
from dfq.scheme import TensorScheme
from dfq.settings import PositiveInt
from dfq.student import Student

LARGEST_ROWS = 2**22  # entries of rows that are searched at a time


@contextmanager
def in_float(student: Student) -> Iterator[None]:
    """Nothing is rounded inside."""
    parts = [part for part in student.module.modules() if isinstance(part, Quantizer) and part.enabled]
    try:
        for part in parts:
            part.enabled = False
        yield
    finally:
        for part in parts:
            part.enabled = True


@torch.no_grad()
def look_at_inputs(
    student: Student, images: Tensor, look: Callable[[str, nn.Module, tuple], None], batch_size: int = 64
) -> None:
    """``look(name, layer, inputs)`` before every call of a layer, for all ``images`` [N, ...], in float."""
    layers = [(name, layer) for name, layer in student.layers.items() if not isinstance(layer, nn.Embedding)]
    with in_float(student), forward_hooks(layers, before=look), progress_bar("look", len(images), "samples") as advance:
        for batch in student.batches(images, batch_size):
            student(batch)
            advance(len(batch))


def input_squares(student: Student, images: Tensor) -> dict[str, Tensor]:
    """Layer → mean square of each channel of its input [I]. Layers that nobody calls and embeddings have none."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def look(name: str, layer: nn.Module, inputs: tuple) -> None:
        x = inputs[0].float().movedim(channel_dim(layer, inputs[0]), 0).flatten(1)
        total[name] = total.get(name, 0) + x.square().sum(1)
        count[name] = count.get(name, 0) + x.shape[1]

    look_at_inputs(student, images, look)
    return {name: squares / count[name] for name, squares in total.items() if count[name]}


def group_moments(student: Student, images: Tensor) -> dict[str, Tensor]:
    """Linear layer → second moments [G, K, K] of its input inside each group of K columns that share a grid.

    A grid per channel or tensor has one group of all columns.
    """
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def look(name: str, layer: nn.Module, inputs: tuple) -> None:
        assert isinstance(layer, QuantizedLayer)
        if not isinstance(layer, nn.Linear):
            return
        x = inputs[0].float().flatten(0, -2)
        groups = x.view(len(x), -1, layer.weight_quantizer.scheme.group_size or x.shape[1]).transpose(0, 1)
        total[name] = total.get(name, 0) + groups.mT @ groups
        count[name] = count.get(name, 0) + len(x)

    look_at_inputs(student, images, look)
    return {name: moments / count[name] for name, moments in total.items() if count[name]}


def importance(layer: QuantizedLayer, squares: Tensor | None) -> Tensor:
    """Mean squares [I] of a layer's input, or ones, as weights of the rows of its weight [R, M]."""
    if squares is None:
        return torch.ones_like(layer.weight_quantizer.rows(layer.weight))
    values = shaped(layer, squares, inputs=True)
    whole = values.view(*values.shape, *[1] * (layer.weight.dim() - 2)).expand_as(layer.weight)
    return layer.weight_quantizer.rows(whole).to(layer.weight)


@dataclass(frozen=True)
class GridSearch(Algorithm):
    """Gives grids of weights a scale and a zero point, row by row; a sub-class says how.

    Not those whose rows depend on each other (e4m3 scales): they keep what calibration chose.
    """

    num_samples: PositiveInt = 128  # synthetic samples that inputs are looked at on
    weights_stay_float: ClassVar[bool] = True

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """Give the student its grids, those of weights searched."""
        student, images = work.student, work.images(self.num_samples)
        known = self.look(student, images)
        work.ensure_calibrated(images)
        layers = {layer.weight_quantizer: (name, layer) for name, layer in reversed(student.layers.items())}
        tell_left(self, student, {n for n, la in student.layers.items() if self.takes(la.weight_quantizer.scheme)})
        with progress_bar(type(self).__name__, len(layers), "layers") as advance:
            for quantizer, (name, layer) in layers.items():
                if quantizer.has_qparams and self.takes(quantizer.scheme):
                    quantizer.set_qparams(*self.search(layer, known.get(name)))
                    if layer.bias_quantizer is not None and layer.bias is not None:
                        layer.bias_quantizer.make_room(layer)
                advance(1)

    @staticmethod
    def takes(scheme: TensorScheme) -> bool:
        return scheme.scale_format != "e4m3"

    def look(self, student: Student, images: Tensor) -> dict[str, Tensor]:
        """What is to be known of each layer's input."""
        raise NotImplementedError

    def search(self, layer: QuantizedLayer, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each row of the layer's weight."""
        raise NotImplementedError
