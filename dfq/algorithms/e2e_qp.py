"""E2E-QP: train the quantization parameters of the whole network, end to end, while all codes stay.

EfficientQAT (Chen et al., ACL 2025, arXiv 2407.11062, section 3.3): behind :mod:`dfq.algorithms.block_ap`, or any other
algorithm, with codes q and zero points z fixed, in w_hat = (q - z) s the steps s alone are trained::

    d w_hat / d s = q - z

which is not LSQ's gradient: no weight can change its code, and a step moves all the weights that share it. Gradients
and Adam's moments are kept for one number a channel or group.

Differences from the paper: no labels, the loss is the divergence to the teacher on synthetic samples
(:mod:`dfq.algorithms.distillation` runs it and chooses by held-out ones); the shift of a ternary grid is trained too,
and steps of inputs where they are calibrated; ``bias_lr`` above 0 trains biases, gains of norms and what else is float.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dfq.algorithms._base import Algorithm, Work
from dfq.algorithms._held import held
from dfq.losses.token_divergence import Divergence
from dfq.modules import QuantizedLayer, Quantizer
from dfq.quantization import dequantize, from_groups, scale_through, to_groups, zero_point_through
from dfq.settings import NonNegativeFloat, PositiveFloat, PositiveInt, resolve
from dfq.student import Student


@dataclass(frozen=True)
class E2EQP(Algorithm):
    """Minutes on small networks; behind Block-AP: ``algorithm=sequence algorithm.steps=[block_ap,e2e_qp]``."""

    max_steps: PositiveInt = 400  # optimizer steps at most
    time_limit_s: PositiveFloat | None = None  # seconds until training ends; null: steps alone say when
    step_lr: PositiveFloat = 1e-3  # Adam on the quantizers' steps, relative to each step
    bias_lr: NonNegativeFloat = 0.0  # Adam on biases and other float parameters; 0: they stay
    batch_size: PositiveInt = 16  # samples a step
    kl_weight: NonNegativeFloat = 1.0  # of the task's distillation loss
    feature_weight: NonNegativeFloat | None = None  # of features where width or resolution change; as distillation's
    divergence: Divergence = "forward"  # of text, weighted by kl_weight
    temperature: PositiveFloat = 1.0  # of both distributions
    top_k: PositiveInt = 64  # tokens that are told apart with top_k, all others being one
    chunk_tokens: PositiveInt = 1024  # of text: tokens whose logits are in memory at a time
    checks: PositiveInt = 10  # looks at held-out synthetic samples during a run
    patience: PositiveInt | None = 5  # looks without a better loss before the second half of a run stops; null: never
    num_calibration_samples: PositiveInt = 512  # samples that set the first ranges
    goes_on: ClassVar[bool] = True

    def run(self, work: Work) -> None:
        work.ensure_calibrated(work.images(self.num_calibration_samples))
        with fixed_codes(work.student), held(work.student, all_but_grids=self.bias_lr == 0):
            work.hand_to(self.parts()[0], work.student, "distillation")

    def parts(self) -> list[Any]:
        """The distillation that trains the steps."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.bias_lr == 0:
            del settings["bias_lr"]
        return [resolve("algorithm", "distillation", **settings)]


class FixedCodes(Quantizer):
    """In the place of a weight quantizer: the value of the codes that it found, whatever the weight is by now."""

    codes: Tensor  # shaped like the weight, in groups where the grid has them

    def forward(self, x: Tensor) -> Tensor:
        scale = scale_through(self.scale, self.scheme)
        zero_point = zero_point_through(self.zero_point, scale, self.scheme)
        if self.scheme.group_size is None:
            return dequantize(self.codes, scale, zero_point, self.scheme, self.axis)
        values = dequantize(self.codes, scale[..., None], zero_point[..., None], self.scheme)
        return from_groups(values, self.axis or 0, x.shape)


@contextmanager
def fixed_codes(student: Student) -> Iterator[None]:
    """Weights keep their codes inside, and are what these stand for afterwards."""
    owners: dict[Quantizer, QuantizedLayer] = {}
    for name, layer in student.layers.items():
        quantizer = layer.weight_quantizer
        if not quantizer.has_qparams or quantizer in owners:
            continue
        owners[quantizer] = layer
        quantizer.freeze()  # what was trained before is another grid until it is one that can be stored
        codes = student.integer_weight(name)
        size = quantizer.scheme.group_size
        codes = codes if size is None else to_groups(codes, quantizer.axis or 0, size)
        kept = codes.to(torch.int16 if quantizer.scheme.num_bits >= 8 else torch.int8)
        quantizer.__class__ = FixedCodes  # in place: tied layers share it
        quantizer.register_buffer("codes", kept, persistent=False)
    try:
        yield
    finally:
        with torch.no_grad():
            for quantizer, layer in owners.items():
                quantizer.freeze()
                layer.weight.copy_(quantizer(layer.weight))
                del quantizer.codes
                quantizer.__class__ = Quantizer
                layer.weight.requires_grad_(False)
