"""Weights on their way to a code: AdaRound's rectified sigmoid in the place of rounding (arXiv 2004.10568, 3.2).

What is trained of a weight is how far it is between the two codes around it, h(V) in [0, 1], and a regularizer whose
exponent falls drives each to one of the two (eq. 21-24 there). The step may be trained with V (Genie-M, arXiv
2212.04780, eq. 7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfq.modules import QuantizedLayer, Quantizer
from dfq.quantization import (
    broadcast,
    from_groups,
    round_scale,
    round_zero_point,
    scale_through,
    soft_quantize,
    soft_rounding,
    soft_rounding_logits,
    to_groups,
)

FIRST_BETA, LAST_BETA = 20.0, 2.0


class SoftQuantizer(nn.Module):
    """In the place of a weight quantizer while roundings are trained: a weight between two codes, and its step.

    Args:
        quantizer: whose grid it is; it stays what would be stored of it.
        weight: where each value lies between its two codes at first.
        learn_step: whether the step is trained too.
        rounding_weight, warm_up: of :meth:`penalty`.
    """

    has_qparams = False  # of its own: nobody else is to make its step trainable
    is_decided = False  # inside :func:`decided`: what the weight will be, not what it is on its way

    def __init__(
        self,
        quantizer: Quantizer,
        weight: Tensor,
        learn_step: bool,
        rounding_weight: float = 0.0,
        warm_up: float = 0.0,
    ):
        super().__init__()
        quantizer.freeze()
        self.rounding_weight, self.warm_up = rounding_weight, warm_up
        self.scheme, self.axis, self.enabled = quantizer.scheme, quantizer.axis, True
        self.shape = weight.shape
        scale, zero_point = self._shaped(quantizer.scale.detach()), self._shaped(quantizer.zero_point)
        if self.scheme.grid == "seq":  # its levels, (q + 1/2) s, are those of a zero point between two codes
            zero_point = torch.full_like(scale, -0.5)
        fraction = zero_point - torch.floor(zero_point)  # 0 of whole zero points
        steps = (
            self._grouped(weight.detach()) / scale + fraction
        )  # once: a weight on a level must not be seen on both sides
        self.base: Tensor
        self.zero_point: Tensor
        self.smallest: Tensor
        self._follows("base", torch.floor(steps) - fraction)
        self.logits = nn.Parameter(soft_rounding_logits(steps, torch.ones_like(scale)))
        # A power of two stays: with B fixed its next one would double all weights.
        if learn_step and self.scheme.scale_format != "e8m0":
            self.step = nn.Parameter(scale.clone())
        else:
            self.register_buffer("step", scale.clone())
        self._follows("zero_point", zero_point)
        self._follows("smallest", round_scale(scale * 1e-2, self.scheme))

    def _follows(self, name: str, values: Tensor) -> None:
        """Where the network goes it goes too, but it is what it was made from: no checkpoint holds it."""
        self.register_buffer(name, values, persistent=False)

    def _grouped(self, weight: Tensor) -> Tensor:
        size = self.scheme.group_size
        return weight if size is None else to_groups(weight, self.axis or 0, size)

    def _shaped(self, values: Tensor) -> Tensor:
        """A grid's scale, to broadcast against the weight (in groups)."""
        if self.scheme.group_size is not None:
            return values[..., None]
        return broadcast(values, torch.empty(self.shape, device="meta"), self.axis)

    @property
    def scale(self) -> Tensor:
        """As :class:`~dfq.modules.Quantizer` has it: a layer's integer bias asks for it."""
        scale = self._rounded_step
        return scale[..., 0] if self.scheme.group_size is not None else scale.flatten() if scale.dim() else scale

    @property
    def _rounded_step(self) -> Tensor:
        """As it is stored in the end."""
        return torch.maximum(scale_through(self.step, self.scheme), self.smallest)

    def _weight(self, logits: Tensor) -> Tensor:
        base, scale, zero_point = self.base, self._rounded_step, self.zero_point
        if self.scheme.has_float_zero_point:  # stored as its product with the step, which moves it
            zero_point = round_zero_point(zero_point, scale.detach(), self.scheme)
            base = base + (self.zero_point - zero_point)
        found = soft_quantize(base, scale, zero_point, self.scheme, logits)
        return found if self.scheme.group_size is None else from_groups(found, self.axis or 0, self.shape)

    def forward(self, _weight: Tensor) -> Tensor:
        return self.hardened() if self.is_decided else self._weight(self.logits)

    def regularizer(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h(V) - 1|^beta: zero where every rounding is decided."""
        return (1 - (2 * soft_rounding(self.logits) - 1).abs().pow(beta)).sum()

    def penalty(self, done: float) -> Tensor | None:
        """``rounding_weight`` times the regularizer, its beta falling with the share of the run that is ``done``.

        None in the warm-up, in which roundings follow the loss alone.
        """
        if done < self.warm_up or self.rounding_weight == 0:
            return None
        beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * (done - self.warm_up) / (1 - self.warm_up)
        return self.rounding_weight * self.regularizer(beta)

    def decide(self) -> None:
        """Round every weight to the nearer code, for good."""
        self.logits = nn.Parameter(torch.where(self.logits >= 0, torch.inf, -torch.inf), requires_grad=False)

    @torch.no_grad()
    def hardened(self) -> Tensor:
        """The weight with every rounding decided."""
        return self._weight(torch.where(self.logits >= 0, torch.inf, -torch.inf))


def soft_quantizers(module: nn.Module) -> list[SoftQuantizer]:
    """All of a network, each once."""
    return [part for part in module.modules() if isinstance(part, SoftQuantizer)]


@contextmanager
def decided(quantizers: Iterable[SoftQuantizer]) -> Iterator[None]:
    """Every weight is at the nearer of its two codes inside, and where it was afterwards."""
    quantizers = list(quantizers)
    try:
        for quantizer in quantizers:
            quantizer.is_decided = True
        yield
    finally:
        for quantizer in quantizers:
            quantizer.is_decided = False


def total(terms: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of those that are there; None where none is."""
    found = [term for term in terms if term is not None]
    return torch.stack(found).sum() if found else None


def is_off_grid(layer: QuantizedLayer) -> bool:
    """Whether rounding the weight would change it: what is on its grid (an embedding tied to a head) stays.

    Levels beside float zero points are exact to rounding errors alone, which do not count.
    """
    quantizer = layer.weight_quantizer
    if not quantizer.has_qparams:
        return False
    with torch.no_grad():
        level = quantizer(layer.weight)
        return bool(((level - layer.weight).abs() > 1e-3 * quantizer.steps_of(level)).any())
