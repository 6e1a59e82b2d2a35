"""A classifier as Lightning projects have it, brought to 4 bits by three lines (marked ``dfq``).

    python examples/lightning_projects/classifier.py --folder outputs/classifier

trains in float unless ``float.ckpt`` is there, then with quantized weights and activations, distilled from the float
network; tests the best checkpoint and writes ``classifier.onnx`` (needs the extra ``onnx``).
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dfq.lightning import QuantizationCallback, QuantizedModuleMixin  # dfq


class Stripes(pl.LightningDataModule):
    """Noisy images of stripes in four directions."""

    def __init__(self, num_samples: int = 256, batch_size: int = 32):
        super().__init__()
        self.num_samples, self.batch_size = num_samples, batch_size

    def images(self, seed: int) -> TensorDataset:
        rng = torch.Generator().manual_seed(seed)
        labels = torch.arange(self.num_samples) % 4
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        directions = torch.stack([x, y, (x + y) / 2**0.5, (x - y) / 2**0.5])
        shift = torch.rand(self.num_samples, 1, 1, generator=rng) * 6
        waves = torch.sin(directions[labels] + shift)[:, None].expand(-1, 3, -1, -1)
        return TensorDataset(waves + torch.randn(waves.shape, generator=rng) * 0.7, labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.images(0), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.images(1), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Classifier(QuantizedModuleMixin, pl.LightningModule):  # dfq: load_from_checkpoint reads quantized checkpoints too
    def __init__(self, width: int = 8, lr: float = 2e-3):
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 4),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def step(self, batch: tuple, name: str) -> torch.Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict({f"{name}_loss": loss, f"{name}_accuracy": accuracy}, sync_dist=name != "train")
        return loss

    def training_step(self, batch: tuple, _index: int) -> torch.Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: tuple, _index: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: tuple, _index: int) -> None:
        self.step(batch, "test")

    def predict_step(self, batch: tuple, _index: int) -> torch.Tensor:
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def make_trainer(folder: Path, epochs: int, devices: int = 1, quantized: bool = True, **options) -> pl.Trainer:
    checkpoints = ModelCheckpoint(folder, "best", monitor="val_loss", save_last=True)
    callbacks = [checkpoints]
    if quantized:
        callbacks.append(QuantizationCallback("w4a4", num_calibration_batches=4, distill=True))  # dfq
    strategy = "ddp" if devices > 1 else "auto"
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | options
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=devices, strategy=strategy, callbacks=callbacks, **options
    )


def float_module(folder: Path, epochs: int = 5) -> Classifier:
    """The network that was trained before anybody thought of quantization."""
    path = folder / "float.ckpt"
    if not path.exists():
        pl.seed_everything(0, verbose=False)
        trainer = make_trainer(folder / "float", epochs, quantized=False)
        trainer.fit(Classifier(), Stripes())
        trainer.save_checkpoint(path)
    return Classifier.load_from_checkpoint(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/classifier"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--onnx", action="store_true", help="write classifier.onnx")
    arguments = parser.parse_args()
    module = float_module(arguments.folder)
    trainer = make_trainer(arguments.folder, arguments.epochs, arguments.devices)
    trainer.fit(module, Stripes())
    trainer.test(module, Stripes(), ckpt_path="best")
    if arguments.onnx and trainer.is_global_zero:
        import dfq

        student = dfq.load(trainer.checkpoint_callback.best_model_path, Classifier)
        dfq.export(student, arguments.folder / "classifier.onnx")


if __name__ == "__main__":
    main()
