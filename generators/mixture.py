"""Images of several generators in one dataset, for networks of which nobody knows yet what suits them.

Every generator leaves marks of its own in all of its images: pixels moved one by one end smoother than photographs are,
what comes out of a generator network shares its shapes; and students fit whatever their images have in common. Which
marks matter depends on the network: ``zeroq`` is better for ResNet-20, ``genie`` for FD-MobileNet at 4 bits. Half of
each is as good as ``zeroq`` for the one, and a little behind ``genie`` for the other (docs/generation.md).

Not from a paper that we know of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.generators._base import Generator, Independent, Sampler
from dfq.generators._needs import NEEDS, check_needs
from dfq.progress import Advance
from dfq.settings import PositiveInt, resolve, to_config
from dfq.teacher import Teacher


@dataclass(frozen=True)
class Mixture(Generator):
    """Each batch is shared by the parts as evenly as it can be; image i of a batch is that of part i mod K."""

    batch_size: PositiveInt | Literal["auto"] = 256  # of all parts together; each makes its share in batches of its own
    parts: tuple[Any, ...] = ("zeroq", "genie")  # generators of images: names, or mappings with _target_ and settings
    needs_batch_norm: ClassVar[bool] = True  # those parts

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise UserError(f"got generator.parts={list(self.parts)}", "two generators or more")
        for part in self.generators:
            if part.kind != "images" or part.needs_boxes or isinstance(part, Independent):
                raise UserError(
                    f"got {type(part).__name__} in generator.parts",
                    "generators of images without boxes, such as zeroq, genie, deep_inversion or psaq",
                )
            if getattr(part, "precision", None) == "auto":
                raise UserError(
                    f"got precision=auto for {type(part).__name__} in generator.parts", "precision=float32 | bfloat16"
                )
        for need in NEEDS:
            object.__setattr__(self, need, any(getattr(part, need) for part in self.generators))

    @cached_property
    def generators(self) -> tuple[Generator, ...]:
        """The parts themselves."""
        return tuple(resolve("generator", part) for part in self.parts)

    def prepare(self, teacher: Teacher, rng: torch.Generator) -> Sampler:
        return _Prepared(self, tuple(part.prepare(teacher, rng) for part in self.generators))

    def recorded(self, teacher: Teacher) -> dict[str, Any]:
        """All settings of the parts, which a name does not tell."""
        read = {key: value for part in self.generators for key, value in part.recorded(teacher).items()}
        return {"parts": [to_config(part) for part in self.generators], **read}

    def with_known(self, settings: Mapping[str, Any]) -> Mixture:
        return replace(self, parts=tuple(part.with_known(settings) for part in self.generators))

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        return _Prepared(self, self.generators).sample(teacher, num_samples, rng, advance)


@dataclass(frozen=True)
class _Prepared:
    settings: Mixture
    samplers: tuple[Sampler, ...]

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        check_needs(teacher, self.settings, "mixture", "has parts that need it")
        count = len(self.samplers)
        images = torch.empty(0)
        for index, (part, sampler) in enumerate(zip(self.settings.generators, self.samplers, strict=True)):
            share = len(range(index, num_samples, count))
            for start, size in _batches(share, part.batch_size):
                made = sampler.sample(teacher, size, rng, advance)
                if not len(images):
                    images = made.new_empty(num_samples, *made.shape[1:])
                images[index + start * count :: count][:size] = made
        return images


def _batches(share: int, size: int | str) -> Iterator[tuple[int, int]]:
    """Where each batch of a part begins in its share, and how many images it has."""
    most = share if size == "auto" else int(size)
    for start in range(0, share, max(most, 1)):
        yield start, min(most, share - start)
