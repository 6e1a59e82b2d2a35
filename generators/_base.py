"""What every generator is: a frozen dataclass whose fields are its settings, and one method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from dfq.dataset import SyntheticDataset, samples_of
from dfq.progress import Advance
from dfq.settings import PositiveInt
from dfq.teacher import Teacher


class Sampler(Protocol):
    """What batches are asked of."""

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Any:
        """See :meth:`Generator.sample`."""


class Source(Sampler):
    """A sampler with a trained network: it is stored with the dataset, gives images without end, and can be trained on.

    Attributes:
        network: frozen; all that it does not share with others of the same generator is in its ``state_dict``.
    """

    network: nn.Module

    def fresh(self, teacher: Teacher, num_samples: int, seed: int, step: int, rank: int = 0) -> Tensor:
        """Images [num_samples, C, H, W] for one step of a training, in one of its processes."""
        return self.sample(teacher, num_samples, _hashed(f"{seed}:fresh:{step}:{rank}"), lambda amount, note="": None)

    def step(
        self,
        teacher: Teacher,
        schedule: LRScheduler,
        num_samples: int,
        seed: int,
        step: int,
        penalty: Callable[[Tensor, Any], Tensor],
    ) -> None:
        """A step of the network on ``num_samples`` images, by the loss that it was trained on plus ``penalty``.

        Args:
            schedule: of an optimizer of the network's parameters.
            step: its number, for the random numbers; they are not those of the images of :meth:`fresh`.
            penalty: (images, the teacher's outputs) → what is added to the loss.
        """
        self.descend(teacher, schedule, num_samples, _hashed(f"{seed}:network:{step}"), penalty)

    def descend(
        self,
        teacher: Teacher,
        schedule: LRScheduler,
        num_samples: int,
        rng: torch.Generator,
        penalty: Callable[[Tensor, Any], Tensor],
    ) -> None:
        """See :meth:`step`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Generator:
    """Makes synthetic batches. Batch i depends on (seed, i) only: runs can be resumed, split, repeated bit for bit.

    A sub-class writes :meth:`sample`; everything else (batching, storage, resuming, progress) is done around it.
    """

    batch_size: PositiveInt | Literal["auto"] = 128  # samples made together; auto: as many as memory_bytes allow
    memory_bytes: PositiveInt = 2_000_000_000  # of memory, for batch_size=auto; what the network takes comes on top
    needs_batch_norm: ClassVar[bool] = False
    needs_norm: ClassVar[bool] = False  # of any kind that has statistics or a weight
    needs_attention: ClassVar[bool] = False  # between patches
    needs_boxes: ClassVar[bool] = False  # among the network's outputs
    kind: ClassVar[str] = "images"  # what it makes, as the input spec of the networks that take it calls it
    files: ClassVar[tuple[str, ...]] = ()  # settings that say where something lies; :meth:`recorded` says what it is

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Any:
        """Make one batch.

        Args:
            teacher: the network to make data for; its parameters require no gradient.
            num_samples: images in the batch.
            rng: random numbers on the CPU, seeded with (seed, batch); use no other.
            advance: long work calls it with the number of samples' worth just done, ``num_samples`` in all.

        Returns:
            images [num_samples, C, H, W] as the network takes them (normalized), float32; ids [num_samples, T]; or a
            mapping of ``images`` and of whatever else belongs to them, a tensor with a row a sample or a list with an
            entry each: ``boxes`` [n, 4] xyxy in pixels, ``labels`` and ``scores`` [n].
        """
        raise NotImplementedError

    def prepare(self, teacher: Teacher, rng: torch.Generator) -> Sampler:
        """What all batches of a dataset share, made once before the first of them that is missing.

        Called again where a dataset is resumed or grown, so what it gives depends on its arguments only. A
        :class:`Source` is stored, and :meth:`restored` instead.

        Args:
            rng: random numbers on the CPU, seeded with the seed alone.

        Returns:
            what batches are then asked of.
        """
        return self

    def restored(self, teacher: Teacher, weights: Mapping[str, Tensor]) -> Source:
        """The :class:`Source` that :meth:`prepare` gave, from the weights of its network."""
        raise NotImplementedError

    def recorded(self, teacher: Teacher) -> dict[str, Any]:
        """What decides the samples beside settings and weights: hashes of files that are read."""
        return {}

    def with_known(self, settings: Mapping[str, Any]) -> Generator:
        """The same generator with those of the ``settings`` that it has."""
        known = {field.name for field in fields(self)}
        return replace(self, **{key: value for key, value in settings.items() if key in known})


@dataclass(frozen=True)
class Independent(Generator):
    """Makes each sample by itself: sample i depends on (seed, i) only, whatever the batches and their size are."""

    def make(self, teacher: Teacher, indices: Sequence[int], seed: int, advance: Advance) -> dict[str, Tensor]:
        """The samples of these numbers, as they are stored: ``images`` or ``input_ids`` and what belongs to them."""
        raise NotImplementedError

    def facts(self, dataset: SyntheticDataset) -> dict[str, Any]:
        """What the manifest says of all samples of a dataset beside the settings."""
        return {}

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=rng))
        return samples_of(self.make(teacher, range(num_samples), seed, advance))


def batch_rng(seed: int, index: int) -> torch.Generator:
    """The random numbers of batch ``index``; hashed, so that no (seed, index) shares a stream with another."""
    return _hashed(f"{seed}:{index}")


def sample_rng(seed: int, index: int, attempt: int = 0) -> torch.Generator:
    """The random numbers of one sample of an :class:`Independent` generator."""
    return _hashed(f"{seed}:sample:{index}:{attempt}")


def dataset_rng(seed: int) -> torch.Generator:
    """The random numbers of what all batches share; no batch has them."""
    return _hashed(f"{seed}:all")


def _hashed(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
