"""Roundings trained end to end: which of its two codes each weight takes, by what the whole network says.

AdaRound's rectified sigmoid (Nagel et al., ICML 2020, arXiv 2004.10568, eq. 21-24) on all layers at once, behind an
algorithm that has rounded them one after the other, and the network's outputs in the place of each layer's::

    minimize    D(teacher, student) + D_0 lambda mean_i (1 - |2 h(V_i) - 1|^beta)
    weights     s (clamp(B + h(V) + z, quant_min, quant_max) - z)
    start       |h(V) - code| = ``looseness`` of each weight at its code, toward its float value: B and B + 1 lie on
                both sides of it

D is the task's distillation loss, D_0 what it is of the student as it came. In its units, and with a mean over all
weights of the network, lambda means the same for every network; beta falls from 20 to 2 after a warm-up. Steps of
weights and inputs are trained with V (Genie-M's joint step), and with ``bias_lr`` what is float. A weight moves
smoothly between two codes and ends at one of them; trained with straight-through gradients
(:mod:`dfq.algorithms.distillation`) it jumps from code to code until the last step.

:mod:`dfq.algorithms.distillation` runs it: held-out samples, several processes, the teacher's cache, logits in chunks,
and a run that is killed goes on. What it looks at are weights at the nearer of their codes, and where no look is
better than the student that it was given, that one stays. PD-Quant (Liu et al., CVPR 2023, arXiv 2212.07048) has the
network's outputs in each block's loss, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from dfq.algorithms._base import Algorithm, Work, tell_left
from dfq.algorithms._held import held
from dfq.algorithms._reconstruction import BlockReconstruction
from dfq.channels import float_network, weight_in_float
from dfq.errors import UserError
from dfq.losses.token_divergence import Divergence
from dfq.modules import QuantizedLayer, Quantizer
from dfq.quantizers._soft import SoftQuantizer, is_off_grid
from dfq.settings import Bound, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, resolve
from dfq.student import Student
from dfq.teacher import Teacher

OWN = ("rounding_lr", "rounding_weight", "warm_up", "looseness", "bias_lr")  # settings that distillation has not


@dataclass(frozen=True)
class E2ERounding(Algorithm):
    """Minutes on small networks; behind a rounding: ``algorithm=sequence algorithm.steps=[yaqa,e2e_rounding]``."""

    max_steps: PositiveInt = 600  # optimizer steps at most
    time_limit_s: PositiveFloat | None = None  # seconds until training ends; null: steps alone say when
    rounding_lr: PositiveFloat = 0.1  # Adam on the rounding logits V
    step_lr: PositiveFloat = 1e-3  # Adam on the quantizers' steps, relative to each step
    bias_lr: NonNegativeFloat = 4e-4  # Adam on biases and other float parameters; 0: they stay
    batch_size: PositiveInt = 16  # samples a step
    rounding_weight: NonNegativeFloat = 1e4  # lambda: of the regularizer's mean, in units of the divergence before
    warm_up: Fraction = 0.2  # share of the steps before lambda sets in
    looseness: Annotated[float, Bound(0, 0.49)] = 0.1  # of a step: how far from its code a weight begins
    kl_weight: NonNegativeFloat = 1.0  # of the task's distillation loss
    feature_weight: NonNegativeFloat | None = None  # of features where width or resolution change; as distillation's
    box_weight: NonNegativeFloat | None = None  # of the distance of boxes where the teacher is sure; null: the task's
    divergence: Divergence = "forward"  # of text, weighted by kl_weight
    temperature: PositiveFloat = 1.0  # of both distributions
    top_k: PositiveInt = 64  # tokens that are told apart with top_k, all others being one
    chunk_tokens: PositiveInt = 1024  # of text: tokens whose logits are in memory at a time
    flip: bool = True  # mirror half of the images
    shift: NonNegativeInt = 0  # pixels that images are moved by at most, edges reflected
    checks: PositiveInt = 4  # looks at held-out synthetic samples during a run
    num_calibration_samples: PositiveInt = 512  # samples that set the first ranges
    rounds_weights: ClassVar[bool] = True
    goes_on: ClassVar[bool] = True

    def run(self, work: Work) -> None:
        work.ensure_calibrated(work.images(self.num_calibration_samples))
        with self._soft(work.student, work.teacher), held(work.student, all_but_grids=self.bias_lr == 0):
            work.hand_to(self.parts()[0], work.student, "distillation")

    def parts(self) -> list[Any]:
        """The distillation that trains the roundings."""
        settings = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in OWN}
        settings |= {"weight_lr": self.rounding_lr, "patience": None}
        if self.bias_lr > 0:
            settings["bias_lr"] = self.bias_lr
        return [resolve("algorithm", "distillation", **settings)]

    @contextmanager
    def _soft(self, student: Student, teacher: Teacher) -> Iterator[None]:
        """Weights are between two codes inside, and at the nearer one of them afterwards."""
        taken = [name for name, layer in student.layers.items() if _has_codes(layer)]
        tell_left(self, student, taken)
        hard = {layer: layer.weight_quantizer for layer in map(student.layers.get, taken) if layer is not None}
        share = self.rounding_weight / max(1, sum(layer.weight.numel() for layer in hard))  # tied weights count twice
        soft: dict[Quantizer, SoftQuantizer] = {}
        owners: dict[Quantizer, QuantizedLayer] = {}  # of a grid: tied layers share theirs
        for name, wanted in _float_weights(student, teacher, taken):
            layer = student.layers[name]
            quantizer = layer.weight_quantizer
            if quantizer in soft:
                continue
            with torch.no_grad():
                level = quantizer(layer.weight)
                start = level + self.looseness * quantizer.steps_of(level) * torch.sign(wanted - level)
            soft[quantizer] = SoftQuantizer(quantizer, start, True, share, self.warm_up)
            owners[quantizer] = layer
        for layer, quantizer in hard.items():
            layer.weight_quantizer = soft[quantizer]  # type: ignore[assignment]  # quacks like one
        try:
            yield
        finally:
            for layer, quantizer in hard.items():
                layer.weight_quantizer = quantizer
            for quantizer, layer in owners.items():
                layer.weight.data.copy_(soft[quantizer].hardened())
                layer.weight.requires_grad_(False)
                quantizer.set_qparams(soft[quantizer].scale.detach(), quantizer.zero_point)


def _has_codes(layer: QuantizedLayer) -> bool:
    return layer.weight_quantizer.has_qparams and BlockReconstruction.takes(layer)


def _float_weights(student: Student, teacher: Teacher, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Layer → its weight had nobody rounded it: its own, or the teacher's in the student's units."""
    network = None
    for name in names:
        layer = student.layers[name]
        if is_off_grid(layer):
            yield name, layer.weight
            continue
        if student.surgery.rotated:
            raise UserError(
                "got a student that was rotated and rounded: what its weights were is not known any more",
                "rotation and then one algorithm that rounds",
            )
        if network is None:
            network = float_network(student, teacher)
        yield name, weight_in_float(student, network, name).to(layer.weight)
