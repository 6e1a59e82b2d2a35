"""When a run looks at held-out samples, and when it stops for what it sees there."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping

from dfq.lightning.distillation import DistillationModule

NEVER = 2**62  # batches


class Looks(pl.Callback):
    """A number of looks at equal shares of the run, of its steps or of its time. Lightning can count steps only."""

    def __init__(self, number: int):
        self.number, self.taken = number, 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(module, DistillationModule)
        due = int(module.done(trainer.global_step) * self.number + 1e-9)
        trainer.val_check_batch = 1 if due > self.taken else NEVER
        self.taken = max(self.taken, due)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken = state_dict["taken"]


class Patience(EarlyStopping):
    """Stops once some looks in a row have not been better, not before half of the run is over.

    A cosine schedule gains most at its end: a plateau at high learning rates says little.
    """

    def __init__(self, looks: int):
        super().__init__("held_out_loss", patience=looks)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, DistillationModule)
        before = trainer.should_stop
        super().on_validation_end(trainer, module)
        if module.done(trainer.global_step) < 0.5 and math.isfinite(float(trainer.callback_metrics["held_out_loss"])):
            trainer.should_stop = before
