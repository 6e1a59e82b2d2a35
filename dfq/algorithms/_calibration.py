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


def calibration_images(dataset: SyntheticDataset, num_samples: int) -> Tensor:
    """Up to ``num_samples`` images [N, C, H, W] that are not held out."""
    indices, _ = dataset.split()
    return dataset.tensors(indices[:num_samples][-1] + 1)["images"][indices[:num_samples]]


@torch.no_grad()
def calibrate(
    student: Student, images: Tensor, weight_quantizer: Any, activation_quantizer: Any, batch_size: int = 64
) -> dict[str, int]:
    """Set all grids. Activations are those of the float network: no layer's range depends on another's rounding.

    Args:
        images: [N, C, H, W]; all of them are looked at.
        weight_quantizer, activation_quantizer: methods of the quantizers family (``qparams(observation, scheme)``).

    Returns:
        Name → elements of the layer's input in one sample.
    """
    layers = student.layers
    for layer in layers.values():
        observation = Observation.of_tensor(layer.weight, layer.weight_quantizer.axis)
        layer.weight_quantizer.set_qparams(*weight_quantizer.qparams(observation, layer.weight_quantizer.scheme))
        layer.weight_quantizer.enabled = layer.input_quantizer.enabled = False
    seen = {name: Histogram() for name in layers}

    def look(name: str, _module: nn.Module, inputs: tuple) -> None:
        seen[name].add(inputs[0])

    with forward_hooks(layers.items(), before=look), progress_bar("calibrate", len(images), "samples") as advance:
        for batch in images.split(batch_size):
            student(batch)
            advance(len(batch))
    for name, layer in layers.items():
        qparams = activation_quantizer.qparams(seen[name].observation(), layer.input_quantizer.scheme)
        layer.input_quantizer.set_qparams(*qparams)
        layer.weight_quantizer.enabled = True
    return {name: histogram.num_seen // len(images) for name, histogram in seen.items()}
