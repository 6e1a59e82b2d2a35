"""A generative adversarial network with manual optimization, of which the generator alone is quantized (``dfq`` lines).

    python examples/lightning_projects/gan.py --folder outputs/gan

The generator is trained in float for ``START`` optimizer steps; the ranges come from the batches that follow. Nothing
but ``example_input_array``, which Lightning projects have for model summaries, says what it takes.
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

START = 4  # optimizer steps, of both networks


def rings(num_samples: int = 128, seed: int = 0) -> DataLoader:
    """Points on a ring as small images [N, 1, 8, 8]."""
    rng = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    radius = 0.4 + 0.4 * torch.rand(num_samples, 1, 1, generator=rng)
    images = torch.exp(-20 * ((x**2 + y**2).sqrt() - radius) ** 2) * 2 - 1
    return DataLoader(TensorDataset(images[:, None]), batch_size=16)


class GAN(QuantizedModuleMixin, pl.LightningModule):  # dfq: load_from_checkpoint reads quantized checkpoints too
    def __init__(self, latent: int = 12, width: int = 32):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(latent, width),
            nn.ReLU(),
            nn.Linear(width, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 64),
            nn.Tanh(),
            nn.Unflatten(1, (1, 8, 8)),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(9 * width, 1)
        )
        self.example_input_array = torch.zeros(2, latent)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.generator(z)

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(like), self.hparams.latent, device=like.device)

    def training_step(self, batch: list, _index: int) -> None:
        (real,) = batch
        for_generator, for_discriminator = self.optimizers()

        self.toggle_optimizer(for_generator)
        verdict = self.discriminator(self(self.noise(real)))
        loss = F.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict))
        self.manual_backward(loss)
        for_generator.step()
        for_generator.zero_grad()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_discriminator)
        on_real, on_fake = self.discriminator(real), self.discriminator(self(self.noise(real)).detach())
        loss_d = F.binary_cross_entropy_with_logits(on_real, torch.ones_like(on_real))
        loss_d = loss_d + F.binary_cross_entropy_with_logits(on_fake, torch.zeros_like(on_fake))
        self.manual_backward(loss_d)
        for_discriminator.step()
        for_discriminator.zero_grad()
        self.untoggle_optimizer(for_discriminator)
        self.log_dict({"generator_loss": loss, "discriminator_loss": loss_d})

    def distance(self, batch: list) -> torch.Tensor:
        """Between the mean image of the batch and that of as many made from fixed noise."""
        (real,) = batch
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(len(real), self.hparams.latent, generator=rng).to(real.device)
        return (self(z).mean(0) - real.mean(0)).square().mean()

    def validation_step(self, batch: list, _index: int) -> None:
        self.log("val_distance", self.distance(batch), sync_dist=True)

    def test_step(self, batch: list, _index: int) -> None:
        self.log("test_distance", self.distance(batch), sync_dist=True)

    def predict_step(self, batch: list, _index: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(0)
        return self(torch.randn(len(batch[0]), self.hparams.latent, generator=rng))

    def configure_optimizers(self) -> list:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), 1e-3, betas=(0.5, 0.99)) for part in parts]


def make_trainer(folder: Path, epochs: int, devices: int = 1, **options) -> pl.Trainer:
    callbacks = [ModelCheckpoint(folder, "best", monitor="val_distance", save_last=True)]
    callbacks.append(QuantizationCallback("w8a8", attribute="generator", start_step=START))  # dfq
    # Each of the two losses leaves the other network without gradients.
    strategy = "ddp_find_unused_parameters_true" if devices > 1 else "auto"
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | options
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=devices, strategy=strategy, callbacks=callbacks, **options
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/gan"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()
    pl.seed_everything(0, verbose=False)
    module = GAN()
    trainer = make_trainer(arguments.folder, arguments.epochs, arguments.devices)
    trainer.fit(module, rings(), rings(seed=1))
    trainer.test(module, rings(seed=1), ckpt_path="best")


if __name__ == "__main__":
    main()
