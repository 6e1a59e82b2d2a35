"""One progress bar over all optimizer steps of a run, with rate and time left."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl

from dfq.progress import Advance, progress_bar


class StepProgress(pl.Callback):
    """Lightning's own bars start anew each epoch, which says nothing of a run that is measured in steps."""

    def __init__(self, description: str, total: int, shown: dict[str, str], every: int = 10):
        """``shown``: logged metric → the word for it beside the bar."""
        self.description, self.total, self.shown, self.every = description, total, shown, every
        self.stack = ExitStack()
        self.advance: Advance | None = None
        self.done = 0
        self.note = ""

    def on_train_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        self.done = trainer.global_step
        if trainer.is_global_zero:
            self.advance = self.stack.enter_context(
                progress_bar(self.description, self.total, "steps", completed=self.done)
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.advance is None or (trainer.global_step % self.every and trainer.global_step < self.total):
            return  # reading a loss waits for the device: not at every step
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name in self.shown}
        self.note = " ".join(f"{self.shown[n]} {v:.3f}" for n, v in figures.items())
        self.advance(trainer.global_step - self.done, self.note)
        self.done = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
        if self.advance is not None and trainer.global_step < self.total:
            # As long as the note it takes the place of: a longer one would squeeze the bar on 80 columns.
            last = list(self.shown)[-1]
            figure = f", {self.shown[last]} {float(trainer.callback_metrics[last]):.3f}" if self.note else ""
            self.advance(trainer.global_step - self.done, f"early stop{figure}")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # Lightning tears nothing down then: the bar would stay over the error's message

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        self.advance = None
        self.stack.close()
