"""SyntheticDataModule: a synthetic dataset as a LightningDataModule like any other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Subset

from dfq.dataset import SyntheticDataset, collate
from dfq.errors import UserError
from dfq.lightning.packages import for_all_packages


class ShuffledOrder(RandomSampler):
    """A new order of all samples in each epoch; which one, and where it begins, can be set.

    Of ``world_size`` processes this one takes, of each ``world_size * batch_size`` samples in a row, every
    ``world_size``-th. What does not fill such a step waits for the next epoch, as in one process.
    """

    def __init__(self, samples: Subset, seed: int, rank: int = 0, world_size: int = 1, batch_size: int = 1):
        super().__init__(samples)
        self.seed, self.epoch, self.first, self.num_drawn = seed, 0, 0, 0
        step, total = world_size * batch_size, len(samples)
        used = total if world_size == 1 else total - total % step if total > step else total
        self.share = slice(rank, used, world_size)
        if total < world_size:
            raise UserError(
                f"got {total} samples to train on and {world_size} processes", f"{world_size} samples or more"
            )

    def __len__(self) -> int:
        return len(range(*self.share.indices(self.num_samples)))

    def __iter__(self) -> Iterator[int]:
        if self.num_drawn > self.epoch or self.num_drawn == 0:
            self.rng, self.num_drawn = torch.Generator().manual_seed(self.seed), 0
        while self.num_drawn <= self.epoch:
            order = torch.randperm(self.num_samples, generator=self.rng)[self.share]
            self.num_drawn += 1
        yield from order[self.first :].tolist()


class SharedOrder(ShuffledOrder, DistributedSampler):  # type: ignore[override]  # num_samples: an attribute
    """One that has been told its share. Lightning puts a DistributedSampler in the place of any other RandomSampler
    where there are several processes, and with it an order of its own."""


class ResumableLoader(DataLoader):
    """Goes on behind the batches it has given. Lightning saves how many these are, and where it resumes, sets it."""

    num_given = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names a class of its own
        epoch, position = divmod(self.num_given, len(self))
        if isinstance(self.sampler, ShuffledOrder):
            assert self.batch_size is not None
            self.sampler.epoch, self.sampler.first, position = epoch, position * self.batch_size, 0
        for batch in islice(super().__iter__(), position, None):
            self.num_given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"num_given": self.num_given}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_given = state_dict["num_given"]


class SyntheticDataModule(pl.LightningDataModule):
    """Training batches from a synthetic dataset, validation batches from its held-out part.

    Batches are dicts: ``images`` [N, C, H, W] and ``logits`` [N, num_classes] for a classifier; for a detector lists of
    ``boxes`` [n, 4] in pixels, ``labels`` and ``scores`` [n], and the raw outputs where they were stored.

    Args:
        dataset: a folder or an opened :class:`~dfq.dataset.SyntheticDataset`.
        batch_size: samples per batch; the last incomplete training batch of an epoch is dropped if there is another.
        held_out: share of samples kept for validation.
        seed: of the order of training samples; two modules with the same seed give the same batches, and a run that is
            resumed gets those that it has not had.
        num_workers: processes that read; 0 reads in this one.

    Where the Trainer that it is given to has several processes, each takes ``batch_size`` training samples a step from
    the one order of ``seed``. Held-out samples Lightning shares out; with ``use_distributed_sampler=False`` each
    process sees all of them. A loader that is given to such a Trainer by itself gets Lightning's order.
    """

    def __new__(cls, *_: Any, **__: Any) -> SyntheticDataModule:
        return object.__new__(for_all_packages(cls, "LightningDataModule"))

    def __init__(
        self,
        dataset: SyntheticDataset | str | os.PathLike,
        batch_size: int = 64,
        held_out: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__()
        self.dataset = dataset if isinstance(dataset, SyntheticDataset) else SyntheticDataset(dataset)
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.train_indices, self.held_out_indices = self.dataset.split(held_out)
        self.collate = partial(collate, lists=self.dataset.lists)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        subset = Subset(self.dataset, self.train_indices)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        order = SharedOrder if world_size > 1 else ShuffledOrder
        return ResumableLoader(
            subset,
            batch_size=self.batch_size,
            sampler=order(subset, self.seed, rank, world_size, self.batch_size),
            num_workers=self.num_workers,
            drop_last=world_size == 1 and len(subset) > self.batch_size,
            collate_fn=self.collate,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            Subset(self.dataset, self.held_out_indices),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self.collate,
        )
