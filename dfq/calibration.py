"""Calibration: give every quantizer of a student its grid, from the weights and from samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.hooks import forward_hooks
from dfq.modules import Quantizer
from dfq.progress import progress_bar
from dfq.quantizers._observation import Histogram, Observation
from dfq.student import Student


def calibration_images(dataset: SyntheticDataset, num_samples: int) -> Tensor:
    """Up to ``num_samples`` images [N, C, H, W], or ids [N, T] without padding, that are not held out."""
    indices, _ = dataset.split()
    return dataset.without_padding(indices[:num_samples])


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

    Experts of a mixture that no token chose are listed in ``student.unreached``: their weights' ranges need no data,
    and their inputs get those that all their siblings saw together.

    Args:
        images: [N, C, H, W], or ids [N, T]; all of them are looked at.
        weight_quantizer, activation_quantizer: methods of the quantizers family (``qparams(observation, scheme)``).

    Returns:
        Name of each of the student's activation quantizers → elements that it rounds in one sample.
    """
    ranges = Ranges(student, weight_quantizer, activation_quantizer)
    enable(student, False)
    if ranges.seen or ranges.unreached:  # weights alone need no samples
        with ranges.watching(), progress_bar("calibrate", len(images), "samples") as advance:
            for batch in student.batches(images, batch_size):
                student(batch)
                advance(len(batch))
    ranges.choose()
    return {
        name: ranges.seen[name].num_seen // len(images) if name in ranges.seen else 0
        for name in student.activation_quantizers
    }


class Ranges:
    """Sees what goes into the quantizers of a student until :meth:`choose` gives them their grids.

    Args:
        weight_quantizer, activation_quantizer: methods of the quantizers family (``qparams(observation, scheme)``).
    """

    def __init__(self, student: Student, weight_quantizer: Any, activation_quantizer: Any):
        self.student, self.methods = student, (weight_quantizer, activation_quantizer)
        self.quantizers = student.activation_quantizers
        self.seen = {name: Histogram() for name, quantizer in self.quantizers.items() if quantizer.has_qparams}
        self.unreached = student.expert_layers  # name of each expert's layer that no token came to → its mixture

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every forward inside counts."""

        def look(name: str, _module: nn.Module, inputs: tuple) -> None:
            self.seen[name].add(inputs[0])

        def reach(name: str, _module: nn.Module, inputs: tuple) -> None:
            if inputs[0].numel():
                self.unreached.pop(name, None)

        layers = self.student.layers
        with (
            forward_hooks([(name, self.quantizers[name]) for name in self.seen], before=look),
            forward_hooks([(name, layers[name]) for name in self.unreached], before=reach),
        ):
            yield

    @property
    def unseen(self) -> list[str]:
        """Quantizers that nothing has gone into yet."""
        return [name for name, histogram in self.seen.items() if histogram.counts is None]

    @torch.no_grad()
    def choose(self) -> None:
        """Give every quantizer its grid, and quantize from here on."""
        for_weights, for_activations = self.methods
        layers = self.student.layers.values()
        for quantizer, layer in {layer.weight_quantizer: layer for layer in layers}.items():
            if quantizer.has_qparams:
                observation = Observation.of_tensor(quantizer.rows(layer.weight), 0)
                quantizer.set_qparams(*for_weights.qparams(observation, quantizer.scheme))
        self.student.unreached = [name for name in self.student.layers if name in self.unreached]
        _lend(self.seen, self.unreached, self.student.expert_layers)
        for name, histogram in self.seen.items():
            quantizer = self.quantizers[name]
            quantizer.set_qparams(*for_activations.qparams(histogram.observation(), quantizer.scheme))
        enable(self.student, True)
        for layer in layers:
            if layer.bias_quantizer is not None:
                layer.bias_quantizer.make_room(layer)


def enable(student: Student, enabled: bool) -> None:
    """Have all quantizers round, or none."""
    for part in student.module.modules():
        if isinstance(part, Quantizer):
            part.enabled = enabled


def _lend(seen: dict[str, Histogram], unreached: Mapping[str, str], kin: Mapping[str, str]) -> None:
    """Give inputs that were never seen what their siblings' inputs were, in ``seen``."""
    for name, shared in unreached.items():
        key = f"{name}.input_quantizer"
        if key not in seen:
            continue
        histogram = Histogram()
        for other in [other for other, its in kin.items() if its == shared and other not in unreached]:
            if (theirs := seen[f"{other}.input_quantizer"]).counts is not None:
                histogram.add(theirs.observation().values)
        if histogram.counts is None:
            raise UserError(
                f"got calibration samples of which no token chose any of {shared}",
                do="calibrate with more samples, or leave the layers' inputs float",
            )
        histogram.num_seen = 0
        seen[key] = histogram
