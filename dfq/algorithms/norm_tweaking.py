"""Norm Tweaking: train the norms of a rounded network alone, block by block, so that outputs are distributed as before.

Norm Tweaking: High-performance Low-bit Quantization of Large Language Models (Li et al., AAAI 2024, arXiv 2309.02784).
Weights are rounded already (``algorithm=sequence algorithm.steps=[gptq,norm_tweaking]``). In every block, with mean
mu_c and variance sigma_c^2 of channel c of its output over all tokens of a batch (eq. 2)::

    minimize  1/C sum_c |mu_c(float) - mu_c| + |sigma_c^2(float) - sigma_c^2|        over gains and biases of norms
    learning rate of block i of L:  lr (1 + growth i / L)                                                     (eq. 3)

Differences from the paper: a rate is relative to the mean magnitude of what it trains and falls to zero over a block;
networks of images too, if their blocks have norms that were not folded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dfq.algorithms._reconstruction import BlockFitting, Trainable, magnitude
from dfq.blocks import Block
from dfq.modules import QuantizedLayer, Quantizer
from dfq.settings import NonNegativeFloat, PositiveFloat, PositiveInt
from dfq.student import Student


@dataclass(frozen=True)
class NormTweaking(BlockFitting):
    """Seconds to minutes."""

    iterations: PositiveInt = 50  # steps a block
    batch_size: PositiveInt = 16  # samples a step
    num_samples: PositiveInt = 256  # synthetic samples that blocks are fitted on
    norm_lr: PositiveFloat = 1e-3  # Adam on gains and biases of norms, in units of their mean magnitude
    growth: NonNegativeFloat = 1.0  # of the rate, from the first block to the last
    goes_on: ClassVar[bool] = True

    def trainable(
        self, student: Student, block: Block, activations: list[Quantizer], elements: dict[Quantizer, int]
    ) -> Trainable:
        names = list(student.layers)
        depth = names.index(block.layers[0]) / len(names)
        inside = tuple(f"{name}." for name in block.modules)
        found = {
            id(p): p
            for name, part in student.module.named_modules()
            if f"{name}.".startswith(inside) and _is_norm(part)
            for p in part.parameters()
        }
        return _Norms(self, list(found.values()), self.norm_lr * (1 + self.growth * depth))

    def error(self, output: Tensor, wanted: Tensor) -> Tensor:
        """[C], of outputs [N, T, C] or [N, C, H, W]."""
        axis = 1 if output.dim() == 4 else -1
        rows, targets = (x.float().movedim(axis, 0).flatten(1) for x in (output, wanted))
        means, variances = rows.mean(1) - targets.mean(1), rows.var(1, correction=0) - targets.var(1, correction=0)
        return means.abs() + variances.abs()


class _Norms(Trainable):
    settings: NormTweaking

    def __init__(self, settings: NormTweaking, parameters: Iterable[Tensor], lr: float):
        super().__init__(settings, [], [], {})
        self.parameters, self.lr = list(parameters), lr

    def __enter__(self) -> list[dict[str, Any]]:
        groups = super().__enter__()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
            groups.append(self.group(parameter, self.lr, magnitude(parameter)))
        return groups

    def __exit__(self, *error: Any) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        super().__exit__(*error)


def _is_norm(part: nn.Module) -> bool:
    """Nothing but a gain, and perhaps a bias, of one dimension."""
    own = dict(part.named_parameters())
    return (
        not isinstance(part, QuantizedLayer)
        and not list(part.children())
        and "weight" in own
        and all(p.dim() == 1 for p in own.values())
    )
