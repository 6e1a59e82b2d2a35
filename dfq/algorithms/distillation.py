"""Distillation: train weights and steps of the student on the teacher's outputs for synthetic images.

Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531) with learned steps (LSQ, arXiv 1902.08153; LSQ+, arXiv
2004.09576, zero points too; StableQAT's gradient): KL to the
teacher's soft outputs plus the relative error of features where the network changes width or resolution. Nothing but
synthetic samples is read; the run stops when the loss on held-out synthetic samples has stopped falling, and keeps the
student of the best look.
"""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dfq.algorithms._calibration import calibrate, calibration_images
from dfq.dataset import SyntheticDataset
from dfq.modules import stage_ends
from dfq.quantizers.lsq import learn_step
from dfq.settings import NonNegativeFloat, PositiveFloat, PositiveInt, resolve
from dfq.student import Student
from dfq.teacher import Teacher


@dataclass(frozen=True)
class Distillation:
    """Minutes on small networks, hours on large ones."""

    max_steps: PositiveInt = 400  # optimizer steps at most
    batch_size: PositiveInt = 64  # samples a step
    weight_lr: PositiveFloat = 0.01  # Adam on weights, in units of the layer's weight step
    bias_lr: PositiveFloat = 4e-4  # Adam on biases and other float parameters
    step_lr: PositiveFloat = 1e-3  # Adam on the quantizers' steps, relative to each step
    feature_weight: NonNegativeFloat = 1.0  # of the relative feature error beside the KL
    gradient: Literal["lsq", "lsq_plus", "stable", "straight_through"] = "lsq"  # straight_through: ranges stay
    flip: bool = True  # mirror half of the batches
    checks: PositiveInt = 10  # looks at held-out synthetic samples during a run
    patience: PositiveInt = 5  # looks without a better loss before the run stops
    num_calibration_samples: PositiveInt = 512  # samples that set the first ranges

    def quantize(
        self,
        student: Student,
        teacher: Teacher,
        dataset: SyntheticDataset,
        weight_quantizer: Any,
        activation_quantizer: Any,
        seed: int,
        work_dir: Path,
    ) -> None:
        """Train ``student`` in place; ``work_dir`` holds the checkpoint an interrupted run goes on from."""
        # Lightning takes seconds to import; who only rounds does not pay for it.
        import pytorch_lightning as pl
        from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

        from dfq.lightning.data import SyntheticDataModule
        from dfq.lightning.distillation import DistillationModule
        from dfq.lightning.progress import StepProgress

        images = calibration_images(dataset, self.num_calibration_samples)
        elements = calibrate(student, images, weight_quantizer, activation_quantizer)
        student.module.requires_grad_(True)
        offset, stable = self.gradient == "lsq_plus", self.gradient == "stable"
        if self.gradient != "straight_through":
            for name, quantizer in student.activation_quantizers.items():
                learn_step(quantizer, elements[name], offset, stable)
            for quantizer, layer in {layer.weight_quantizer: layer for layer in student.layers.values()}.items():
                if quantizer.has_qparams:
                    learn_step(quantizer, layer.weight.numel() // quantizer.scale.numel(), offset, stable)
        data = SyntheticDataModule(dataset, batch_size=self.batch_size, seed=seed)
        module = DistillationModule(
            student,
            teacher,
            resolve("task", teacher.task),
            stage_ends(teacher.dataflow),
            self.max_steps,
            self.weight_lr,
            self.bias_lr,
            self.step_lr,
            self.feature_weight,
            self.flip,
            seed,
        )
        best = ModelCheckpoint(work_dir, filename="best", monitor="held_out_loss", save_last=True)
        with quiet_lightning():
            trainer = pl.Trainer(
                **trainer_device(teacher.device),
                max_steps=self.max_steps,
                max_epochs=-1,
                check_val_every_n_epoch=None,
                val_check_interval=max(1, self.max_steps // self.checks),
                callbacks=[
                    best,
                    EarlyStopping("held_out_loss", patience=self.patience),
                    StepProgress("distill", self.max_steps, {"loss": "loss", "held_out_loss": "held-out"}),
                ],
                enable_progress_bar=False,
                logger=False,
                enable_model_summary=False,
                default_root_dir=work_dir,
            )
            last = work_dir / "last.ckpt"
            _fit(trainer, module, data, str(last) if last.exists() else None)
        state = torch.load(best.best_model_path, map_location=teacher.device, weights_only=True)["state_dict"]
        module.load_state_dict(state)
        student.module.to(teacher.device)


def trainer_device(device: torch.device) -> dict[str, Any]:
    """What a Lightning Trainer has to be told to run on ``device``."""
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": [device.index or 0]}
    return {"accelerator": device.type, "devices": 1}


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's lines on devices it does not use and products it recommends; warnings of substance stay."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # The data is a memory map or a few tensors: worker processes would only cost.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # The student is in evaluation mode on purpose.
            warnings.filterwarnings("ignore", message=".*module.s. in eval mode.*")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # inside Lightning
            yield
    finally:
        logger.setLevel(level)


def _fit(trainer: Any, module: Any, data: Any, checkpoint: str | None) -> None:
    """``trainer.fit`` that ends in KeyboardInterrupt after Ctrl-C, as everything else here does.

    Lightning ignores SIGINT from then on and leaves by ``sys.exit(1)``.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None
