"""Who is told of losses and looks while a distillation runs: ``logger=csv | tensorboard | wandb | mlflow``.

Each fit has a log of its own, which ends with it: ``distillation`` is the student's, ``distillation/gaussian`` that of
a reference row, ``distillation/step_1`` that of a step of a sequence, ``distillation/4_distillation_4`` that of a rung
of auto.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from dfq.errors import UserError

PACKAGES = {
    "none": (),
    "csv": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


@dataclass(frozen=True)
class Logger:
    """Makes one of Lightning's loggers for each fit."""

    kind: Literal["none", "csv", "tensorboard", "wandb", "mlflow"] = "none"
    name: str = "distillation"  # of the log; mlflow: of the experiment too
    project: str = "dfq"  # of wandb
    offline: bool = True  # wandb: keep it here; false: send it
    tracking_uri: str | None = None  # of mlflow's server; null: files in the run's folder
    folder: str | None = None  # null: the run's; from Python the current one

    def check(self) -> None:
        """A :class:`UserError` where its package is not installed."""
        names = PACKAGES[self.kind]
        if names and not any(importlib.util.find_spec(name) for name in names):
            raise UserError(
                f"got logger={self.kind}, which needs {names[0]}, not installed here",
                do="pip install 'dfq[loggers]', or take logger=csv",
            )

    @contextmanager
    def opened(self) -> Iterator[Any]:
        """For one fit: what a Lightning Trainer takes, False for none."""
        self.check()
        folder = self.folder or "."
        if self.kind == "none":
            yield False
            return
        from pytorch_lightning import loggers

        if self.kind == "csv":
            yield loggers.CSVLogger(folder, name=self.name)
        elif self.kind == "tensorboard":
            yield loggers.TensorBoardLogger(folder, name=self.name)
        elif self.kind == "mlflow":
            if self.tracking_uri is None:
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files without a database: from 3 on, if told
            experiment = self.name.partition("/")[0]
            yield loggers.MLFlowLogger(experiment, self.name, self.tracking_uri, save_dir=f"{folder}/mlruns")
        else:
            wandb = importlib.import_module("wandb")  # what a file imports by name, each of its choices needs
            try:
                yield loggers.WandbLogger(name=self.name, save_dir=folder, project=self.project, offline=self.offline)
            finally:
                wandb.finish()  # Lightning leaves the run open, and the next logger would go on with it
