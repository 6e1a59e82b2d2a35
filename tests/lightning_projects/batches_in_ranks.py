"""What each rank of test_lightning_modules.py runs: ``python batches_in_ranks.py DATASET NAME BATCH_SIZE STEPS...``.

Training goes on from a checkpoint behind each number of STEPS; NAME_RANK.json lists the samples of all steps.
"""

import json
import os
import sys

import pytorch_lightning as pl
import torch

from dfq.lightning import SyntheticDataModule


class Sums(pl.LightningModule):
    """Notes a number of each sample."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, _index):
        self.seen.append(batch["images"].double().sum((1, 2, 3)).tolist())
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    dataset, name, batch_size, *steps = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen, checkpoint = [], None
    for number in map(int, steps):
        module = Sums()
        trainer = pl.Trainer(
            max_steps=number,
            accelerator="cpu",
            devices=world_size,
            strategy="ddp" if world_size > 1 else "auto",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, SyntheticDataModule(dataset, batch_size=int(batch_size), seed=3), ckpt_path=checkpoint)
        seen += module.seen
        checkpoint = f"{name}.ckpt"
        trainer.save_checkpoint(checkpoint)
    with open(f"{name}_{rank}.json", "w") as file:
        json.dump(seen, file)
