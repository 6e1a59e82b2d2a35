"""Calibration: give every quantizer of a student its grid, from the weights and from samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfq.dataset import SyntheticDataset
from dfq.hooks import forward_hooks
from dfq.progress import progress_bar
from dfq.quantizers._observation import Histogram, Observation
from dfq.student import Student

MOST_TOKENS = 4096  # in a forward


def calibration_images(dataset: SyntheticDataset, num_samples: int) -> Tensor:
    """Up to ``num_samples`` images [N, C, H, W], or ids [N, T], that are not held out."""
    indices, _ = dataset.split()
    return dataset.samples(indices[:num_samples][-1] + 1)[indices[:num_samples]]


def ensure_calibrated(
    student: Student, images: Tensor, weight_quantizer: Any, activation_quantizer: Any
) -> dict[str, int]:
    """:func:`calibrate`, unless an algorithm before this one has given the student its grids; the same result."""
    if not student.has_grids:
        return calibrate(student, images, weight_quantizer, activation_quantizer)
    elements: dict[str, int] = {}
    quantizers = student.activation_quantizers

    def look(name: str, _module: nn.Module, inputs: tuple) -> None:
        elements[name] = elements.get(name, 0) + (inputs[0].numel() if quantizers[name].has_qparams else 0)

    with torch.no_grad(), forward_hooks(quantizers.items(), before=look):
        student(images[:1])
    return {name: elements.get(name, 0) for name in quantizers}


@torch.no_grad()
def calibrate(
    student: Student, images: Tensor, weight_quantizer: Any, activation_quantizer: Any, batch_size: int = 64
) -> dict[str, int]:
    """Set all grids. Activations are those of the float network: no layer's range depends on another's rounding.

    Args:
        images: [N, C, H, W], or ids [N, T]; all of them are looked at.
        weight_quantizer, activation_quantizer: methods of the quantizers family (``qparams(observation, scheme)``).

    Returns:
        Name of each of the student's activation quantizers → elements that it rounds in one sample.
    """
    quantizers, layers = student.activation_quantizers, student.layers
    for layer in layers.values():
        quantizer = layer.weight_quantizer
        if quantizer.has_qparams:
            observation = Observation.of_tensor(quantizer.rows(layer.weight), 0)
            quantizer.set_qparams(*weight_quantizer.qparams(observation, quantizer.scheme))
        quantizer.enabled = False
    for quantizer in quantizers.values():
        quantizer.enabled = False
    seen = {name: Histogram() for name, quantizer in quantizers.items() if quantizer.has_qparams}

    def look(name: str, _module: nn.Module, inputs: tuple) -> None:
        seen[name].add(inputs[0])

    if not images.is_floating_point():  # a token has as many logits as there are ids
        batch_size = max(1, min(batch_size, MOST_TOKENS // images[0].numel()))
    observed = [(name, quantizers[name]) for name in seen]
    with forward_hooks(observed, before=look), progress_bar("calibrate", len(images), "samples") as advance:
        for batch in images.split(batch_size):
            student(batch)
            advance(len(batch))
    for name, quantizer in observed:
        quantizer.set_qparams(*activation_quantizer.qparams(seen[name].observation(), quantizer.scheme))
    for quantizer in quantizers.values():
        quantizer.enabled = True
    for layer in layers.values():
        layer.weight_quantizer.enabled = True
        if layer.bias_quantizer is not None:
            layer.bias_quantizer.make_room(layer)
    return {name: seen[name].num_seen // len(images) if name in seen else 0 for name in quantizers}
