"""Uniformly random token ids: the reference that every generator of text has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dfq.generators._base import Generator
from dfq.progress import Advance
from dfq.teacher import Teacher


@dataclass(frozen=True)
class RandomTokens(Generator):
    """Every id of the vocabulary as likely as any other at every place, special ones among them."""

    kind: ClassVar[str] = "token ids"

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        ids = teacher.input_spec.example(num_samples, rng)
        advance(num_samples)
        return ids
