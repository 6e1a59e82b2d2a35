"""A small detector whose LightningModule calls its backbone and its head itself, brought to 8 bits (``dfq`` lines).

    python examples/lightning_projects/detector.py --folder outputs/detector

One square an image; the head says for each cell whether the square's centre is there, and the square's size. Ranges
come from the training images; backbone and outputs follow those of the float network.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dfq.lightning import QuantizationCallback, QuantizedModuleMixin  # dfq

CELL = 4  # pixels of a cell's side


class Squares(Dataset):
    def __init__(self, num_samples: int = 96, seed: int = 0):
        self.num_samples, self.seed = num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple:
        rng = torch.Generator().manual_seed(self.seed * 10_000 + index)
        size, (x, y) = int(torch.randint(4, 10, (), generator=rng)), torch.randint(0, 23, (2,), generator=rng).tolist()
        image = torch.randn(3, 32, 32, generator=rng) * 0.3
        image[:, y : y + size, x : x + size] += 1.5
        return image, {"boxes": torch.tensor([[x, y, min(x + size, 32), min(y + size, 32)]], dtype=torch.float32)}


def together(samples: list) -> tuple:
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def loader(seed: int = 0) -> DataLoader:
    return DataLoader(Squares(seed=seed), batch_size=16, collate_fn=together)


class Detector(QuantizedModuleMixin, pl.LightningModule):  # dfq: load_from_checkpoint reads quantized checkpoints too
    def __init__(self, width: int = 12):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.ModuleDict({"centre": nn.Conv2d(2 * width, 1, 1), "size": nn.Conv2d(2 * width, 2, 1)})

    def forward(self, images: torch.Tensor) -> dict:
        features = self.backbone(images)
        return {name: part(features) for name, part in self.head.items()}

    def loss(self, outputs: dict, targets: list) -> torch.Tensor:
        boxes = torch.cat([target["boxes"] for target in targets])
        cells = ((boxes[:, :2] + boxes[:, 2:]) / 2 / CELL).long().clamp(max=outputs["centre"].shape[-1] - 1)
        rows = torch.arange(len(boxes), device=boxes.device)
        wanted = torch.zeros_like(outputs["centre"])
        wanted[rows, 0, cells[:, 1], cells[:, 0]] = 1
        centre = F.binary_cross_entropy_with_logits(outputs["centre"], wanted, pos_weight=wanted.new_tensor(16.0))
        sizes = outputs["size"][rows, :, cells[:, 1], cells[:, 0]]
        return centre + F.l1_loss(sizes, (boxes[:, 2:] - boxes[:, :2]) / CELL)

    def training_step(self, batch: tuple, _index: int) -> dict:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: tuple, _index: int) -> None:
        self.log("val_loss", self.loss(self(batch[0]), batch[1]), batch_size=len(batch[0]), sync_dist=True)

    def test_step(self, batch: tuple, _index: int) -> None:
        self.log("test_loss", self.loss(self(batch[0]), batch[1]), batch_size=len(batch[0]), sync_dist=True)

    def predict_step(self, batch: tuple, _index: int) -> torch.Tensor:
        return self(batch[0])["centre"].flatten(1).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def make_trainer(folder: Path, epochs: int, devices: int = 1, quantized: bool = True, **options) -> pl.Trainer:
    callbacks = [ModelCheckpoint(folder, "best", monitor="val_loss", save_last=True)]
    if quantized:
        callbacks.append(QuantizationCallback("w8a8", loader(), distill="mse", features=["backbone"]))  # dfq
    strategy = "ddp" if devices > 1 else "auto"
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | options
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=devices, strategy=strategy, callbacks=callbacks, **options
    )


def float_module(folder: Path, epochs: int = 5) -> Detector:
    path = folder / "float.ckpt"
    if not path.exists():
        pl.seed_everything(0, verbose=False)
        trainer = make_trainer(folder / "float", epochs, quantized=False)
        trainer.fit(Detector(), loader(), loader(1))
        trainer.save_checkpoint(path)
    return Detector.load_from_checkpoint(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/detector"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()
    module = float_module(arguments.folder)
    trainer = make_trainer(arguments.folder, arguments.epochs, arguments.devices)
    trainer.fit(module, loader(), loader(1))
    trainer.test(module, loader(1), ckpt_path="best")


if __name__ == "__main__":
    main()
