"""Who is told of losses and looks while a distillation runs: ``logger=csv | tensorboard | wandb | mlflow``."""

from __future__ import annotations

import importlib.util
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
    """One of Lightning's loggers."""

    kind: Literal["none", "csv", "tensorboard", "wandb", "mlflow"] = "none"
    name: str = "distillation"  # of the run, or of the experiment (mlflow)
    project: str = "dfq"  # of wandb
    offline: bool = True  # wandb: keep it here; false: send it
    tracking_uri: str | None = None  # of mlflow's server; null: files in the run's folder
    folder: str | None = None  # null: the run's

    def check(self) -> None:
        """A :class:`UserError` where its package is not installed."""
        names = PACKAGES[self.kind]
        if names and not any(importlib.util.find_spec(name) for name in names):
            raise UserError(
                f"got logger={self.kind}, which needs {names[0]}, not installed here",
                do="pip install 'dfq[loggers]', or take logger=csv",
            )

    def make(self, default_folder: str) -> Any:
        """What a Lightning Trainer takes; False for none."""
        self.check()
        folder = self.folder or default_folder
        if self.kind == "none":
            return False
        from pytorch_lightning import loggers

        if self.kind == "csv":
            return loggers.CSVLogger(folder, name=self.name)
        if self.kind == "tensorboard":
            return loggers.TensorBoardLogger(folder, name=self.name)
        if self.kind == "wandb":
            return loggers.WandbLogger(name=self.name, save_dir=folder, project=self.project, offline=self.offline)
        return loggers.MLFlowLogger(self.name, tracking_uri=self.tracking_uri, save_dir=f"{folder}/mlruns")
