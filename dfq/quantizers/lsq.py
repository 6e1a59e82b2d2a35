"""LSQ: learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153), with LSQ+'s offset.

The step (``scale``) is trained with the network. Equations: initial step 2 <|x|> / sqrt(Q_P) (section 2.1), gradient
of the step (eq. 3, in :func:`dfq.quantization.fake_quantize`), gradient scale g = 1 / sqrt(N * Q_P) (section 2.2) with
N the number of elements that share the step: of the tensor, of one output channel, or of one sample of an activation.
LSQ+ (Bhalgat et al., 2020, arXiv 2004.09576) trains the offset of an asymmetric grid too (eq. 3-5): here the zero
point, rounded in the forward, so that what is trained is what an integer runtime has.

Differences from the papers: weights may have one step per output channel or group; steps that start from another
quantizer's range keep it (:func:`learn_step`); LSQ+'s offset is -scale * zero_point instead of a free number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfq.modules import Quantizer
from dfq.quantization import choose_qparams, shifted_scale
from dfq.quantizers._observation import Observation
from dfq.scheme import FLOAT_FORMATS, TensorScheme
from dfq.student import Student


@dataclass(frozen=True)
class LSQ:
    """LSQ's own initial step."""

    def qparams(self, observation: Observation, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
        """Scale and zero point, one a channel."""
        widest, zero_point = choose_qparams(observation.minimum, observation.maximum, scheme)
        if scheme.grid not in ("uniform", "ternary", "seq") or scheme.zero_point == "float":
            return widest, zero_point  # the step of a small float or of powers of two is not its scale
        shift = -zero_point * widest if scheme.has_float_zero_point else torch.zeros_like(widest)
        magnitude = (observation.values.float() - shift[:, None]).abs()
        if observation.counts is None:
            mean = magnitude.mean(1)
        else:
            mean = (magnitude * observation.counts).sum(1) / observation.counts.sum(1)
        scale = 2 * mean / _positive_levels(scheme) ** 0.5
        # A step wider than the whole range would leave codes unused, and a zero step divides by zero.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, torch.minimum(scale, widest), widest)
        if scheme.has_float_zero_point:
            scale = shifted_scale(scale, shift, scheme)
            zero_point = -shift / scale
        return scale, zero_point


def learn_step(
    quantizer: Quantizer, num_elements: int, offset: bool = False, stable: bool = False
) -> list[nn.Parameter]:
    """Make the step of a calibrated quantizer trainable; ``num_elements`` share one step (N above).

    Args:
        offset: the zero point of an asymmetric grid too (LSQ+); a ternary grid's shift always is (TernaryLLM).
        stable: StableQAT's surrogate instead of the straight-through gradient.

    Returns:
        the parameters; none for a quantizer without a grid of its own (float, dynamic).
    """
    if not quantizer.has_qparams:
        return []
    quantizer.freeze()  # what was trained before goes on from what would be stored
    names = ["scale"]
    if quantizer.scheme.has_float_zero_point or (offset and not quantizer.scheme.symmetric):
        names.append("zero_point")
    for name in names:
        start = getattr(quantizer, name).detach().float().clone()
        if name == "scale" and quantizer.scheme.scale_format == "e8m0" and quantizer.scheme.grid not in FLOAT_FORMATS:
            start *= 0.5**0.5  # the middle of what is rounded up to this power of two, not its end
        delattr(quantizer, name)
        quantizer.register_parameter(name, nn.Parameter(start))
    quantizer.gradient_scale = (max(num_elements, 1) * _positive_levels(quantizer.scheme)) ** -0.5
    quantizer.stable = stable
    return [getattr(quantizer, name) for name in names]


def learn_steps(student: Student, gradient: str, elements: Mapping[str, int] | None = None) -> None:
    """Make all steps of a student trainable; ``gradient``: lsq, lsq_plus or stable.

    Args:
        elements: name of an activation quantizer → elements that it rounds in a sample; None: where it does not matter.
    """
    offset, stable = gradient == "lsq_plus", gradient == "stable"
    for name, quantizer in student.activation_quantizers.items():
        learn_step(quantizer, 1 if elements is None else elements[name], offset, stable)
    for quantizer, layer in {layer.weight_quantizer: layer for layer in student.layers.values()}.items():
        if quantizer.has_qparams:
            learn_step(quantizer, layer.weight.numel() // quantizer.scale.numel(), offset, stable)


def _positive_levels(scheme: TensorScheme) -> float:
    """Q_P: the largest level of a grid with scale 1; of a small float or a grid of one positive level, 1 step."""
    return float(scheme.quant_max) if scheme.grid == "uniform" else 1.0
