"""Images drawn anew at every step of a distillation, from a network that may be trained against the student.

A generator network that was trained once gives images without end (GDFQ, Xu et al., ECCV 2020, arXiv 2003.03603, which
trains it and the student in turns): no student sees an image twice, and none learns a set by heart.

With a ``weight`` the network takes a step before each of the student's, to images that the student does not answer as
the teacher does (zero-shot adversarial quantization, Liu et al., CVPR 2021, section 3; a game of both, Qian et al.,
AdaSG, AAAI 2023)::

    network = argmin  loss(images) - weight * distance(student(images), teacher(images))

loss is what the network was trained on before: without the statistics of batch norms, images leave what the teacher
knows, and low-bit students get worse.

Differences from the papers: the student starts as the dataset's images calibrate it, and the network as it was trained
for them; the distance is what the student is trained on, the task's distillation loss (ZAQ's is the mean absolute
difference of outputs plus that of relations between channels); steps of network and student take turns one by one; the
network's norms keep their statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR

from dfq.lightning.distillation import DistillationModule
from dfq.teacher import Teacher


class FreshImages(pl.Callback):
    """Puts new images in the place of the first of each batch.

    Those of step i depend on (seed, i, rank) and the network alone, and the network is trained in all processes alike.

    Args:
        source: a ``dfq.generators._base.Source``.
        share: of a batch.
        seed: of all random numbers.
        num_samples: images that a step of the network is taken on.
        weight: of the distance above; 0: the network stays what it is.
        lr: of Adam on the network.
    """

    def __init__(
        self,
        source: Any,
        teacher: Teacher,
        share: float,
        seed: int,
        num_samples: int,
        weight: float,
        lr: float,
    ):
        self.source, self.teacher, self.share, self.seed = source, teacher, share, seed
        self.num_samples, self.weight = num_samples, weight
        self.optimizer = torch.optim.Adam(source.network.parameters(), lr=lr)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, _index: int) -> None:
        assert isinstance(module, DistillationModule)
        step, images = trainer.global_step, batch["images"]
        if self.weight:
            self._learn(module, step)
        count = round(self.share * len(images))
        drawn = self.source.fresh(self.teacher, count, self.seed, step, trainer.global_rank)
        batch["images"] = torch.cat([drawn.to(images), images[count:]])

    def _learn(self, module: DistillationModule, step: int) -> None:
        """A step of the network."""
        task, student = module.task, module.student_module

        def gain(images: Tensor, outputs: Any) -> Tensor:
            wanted = task.raw_outputs(lambda _: outputs, images)
            return -self.weight * task.distillation_loss(task.raw_outputs(student, images.clone()), wanted)

        constant = ConstantLR(self.optimizer, factor=1.0, total_iters=0)  # here: it does not travel to other processes
        with _held(student):
            self.source.step(self.teacher, constant, self.num_samples, self.seed, step, gain)

    def state_dict(self) -> dict[str, Any]:
        if self.weight == 0:
            return {}
        return {"network": self.source.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.source.network.load_state_dict(state_dict["network"])
        self.optimizer.load_state_dict(state_dict["optimizer"])


@contextmanager
def _held(module: nn.Module) -> Iterator[None]:
    """Parameters of ``module`` get no gradient inside."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
