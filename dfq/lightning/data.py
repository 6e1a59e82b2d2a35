"""SyntheticDataModule: a synthetic dataset as a LightningDataModule like any other."""

from __future__ import annotations

import os

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Subset

from dfq.dataset import SyntheticDataset


class SyntheticDataModule(pl.LightningDataModule):
    """Training batches from a synthetic dataset, validation batches from its held-out part.

    Batches are dicts: ``images`` [N, C, H, W] and ``logits`` [N, num_classes] for a classifier.

    Args:
        dataset: a folder or an opened :class:`~dfq.dataset.SyntheticDataset`.
        batch_size: samples per batch; the last incomplete training batch of an epoch is dropped if there is another.
        held_out: share of samples kept for validation.
        seed: of the order of training samples; two modules with the same seed give the same batches.
        num_workers: processes that read; 0 reads in this one.
    """

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

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        subset = Subset(self.dataset, self.train_indices)
        return DataLoader(
            subset,
            batch_size=self.batch_size,
            sampler=RandomSampler(subset, generator=torch.Generator().manual_seed(self.seed)),
            num_workers=self.num_workers,
            drop_last=len(subset) > self.batch_size,
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(
            Subset(self.dataset, self.held_out_indices), batch_size=self.batch_size, num_workers=self.num_workers
        )
