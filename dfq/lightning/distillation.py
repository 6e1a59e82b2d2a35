"""DistillationModule: a LightningModule that trains a quantized student on its teacher's outputs."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dfq.hooks import capture_outputs
from dfq.losses.distillation import relative_mse
from dfq.modules import Quantizer
from dfq.student import Student
from dfq.teacher import Teacher


class DistillationModule(pl.LightningModule):
    """Loss: the task's distillation loss plus ``feature_weight`` times the relative error of features.

    Features are compared where the network changes resolution or width. The student stays in evaluation mode: its batch
    norms are folded or frozen, since synthetic images must not move statistics. The teacher is no part of the module's
    state, so it is neither trained nor saved in checkpoints.

    Args:
        student: a calibrated student; its weights and, where they are parameters, its quantizers' steps are trained.
        teacher: the float network, on the same device as the data.
        task: gives ``raw_outputs``, ``distillation_loss`` and ``agreement``.
        features: names of sub-modules, the same in student and teacher, whose outputs are compared.
        max_steps: optimizer steps until the learning rates have decayed to zero (cosine).
        weight_lr, bias_lr, step_lr: learning rates of Adam, in units of each layer's own weight step, of one, and of
            each step itself: layers whose weights differ by orders of magnitude move alike.
        flip: mirror each training batch horizontally with probability one half (the teacher sees the same batch).
        seed: of the flips.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        task: Any,
        features: list[str],
        max_steps: int,
        weight_lr: float,
        bias_lr: float,
        step_lr: float,
        feature_weight: float,
        flip: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self.student_module = student.module
        self._student, self._teacher = [student], [teacher]  # lists: not registered as sub-modules
        self.task, self.features, self.max_steps = task, features, max_steps
        self.weight_lr, self.bias_lr, self.step_lr = weight_lr, bias_lr, step_lr
        self.feature_weight, self.flip = feature_weight, flip
        self.rng = torch.Generator().manual_seed(seed)
        # A step that crossed zero would flip the sign of its whole tensor.
        self.smallest_steps = {
            name: p.detach().abs().clone() * 1e-2
            for name, p in student.module.named_parameters()
            if _is_step(student.module, name)
        }

    def configure_optimizers(self) -> Any:
        groups = []
        own = {id(layer.weight): layer for layer in self._student[0].layers.values()}
        for name, parameter in self.student_module.named_parameters():
            if not parameter.requires_grad:
                continue
            owner = self.student_module.get_submodule(name.rpartition(".")[0])
            layer = own.get(id(parameter))
            if _is_step(self.student_module, name):
                lr = self.step_lr * float(parameter.detach().abs().mean())
            elif isinstance(owner, Quantizer):  # a zero point, in units of codes
                lr = self.step_lr * owner.scheme.quant_max
            elif layer is not None and layer.weight_quantizer.has_qparams:
                lr = self.weight_lr * float(layer.weight_quantizer.scale.detach().mean())
            else:
                lr = self.bias_lr
            groups.append({"params": [parameter], "lr": lr})
        optimizer = torch.optim.Adam(groups, fused=True)  # one kernel a tensor: small networks are all overhead
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / self.max_steps, 1)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.student_module.eval()

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        images = batch["images"]
        # Token ids have an order.
        if self.flip and images.is_floating_point() and torch.rand((), generator=self.rng) < 0.5:
            images = images.flip(-1)
        with torch.no_grad(), capture_outputs(self._teacher[0].module, self.features) as wanted:
            target = self.task.raw_outputs(self._teacher[0], images)  # on its own copy of the images
        with capture_outputs(self.student_module, self.features) as got:
            output = self.task.raw_outputs(self.student_module, images)
        loss = self.task.distillation_loss(output, target)
        if self.features:
            errors = [relative_mse(got[name], wanted[name]) for name in self.features]
            loss = loss + self.feature_weight * torch.stack(errors).mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for name, smallest in self.smallest_steps.items():
                parameter = self.student_module.get_parameter(name)
                parameter.copy_(torch.maximum(parameter, smallest.to(parameter.device)))

    def validation_step(self, batch: dict[str, Tensor], _index: int) -> None:
        output = self.task.raw_outputs(self.student_module, batch["images"])
        size = len(batch["images"])
        self.log("held_out_loss", self.task.distillation_loss(output, batch["logits"]), batch_size=size)
        self.log("held_out_agreement", self.task.agreement(output, batch["logits"]), batch_size=size)


def _is_step(module: nn.Module, name: str) -> bool:
    owner, _, attribute = name.rpartition(".")
    return attribute == "scale" and isinstance(module.get_submodule(owner), Quantizer)
