"""Where a distillation runs: one process, or several of Lightning's, on one computer or more; and who is told of it.

``trainer=ddp trainer.devices=2`` starts a second process with the same command line at the first step of training;
under torchrun, srun or mpirun all processes are there from the start. Either way each of them runs the whole command:
what comes before training is the same in all of them (the same seed, the same bits), and rank 0 alone writes results.
``ddp_spawn`` starts processes for training alone, which know nothing of the command line: for notebooks and sweeps.

A step takes ``algorithm.batch_size`` samples *in each process*, consecutive ones of one order of all samples, so that N
processes do what one does with N times the batch. All look at all held-out samples, and what decides (figures of a
look, the clock) is that of all or of rank 0: every process stops, and keeps, the same.

``fsdp`` shards the student's weights, gradients and moments, and the teacher's weights, over processes (FSDP2,
``fully_shard``): each repeated block, and what is large beside them; small tensors stay whole in every process.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ClassVar, Literal

from dfq.errors import UserError
from dfq.lightning.loggers import Logger
from dfq.settings import PositiveInt

WAIT_S = 86_400  # of one rank for another that still generates, exports or evaluates


@dataclass(frozen=True)
class Training:
    """The preset ``trainer``. What it says changes results only where there are several processes."""

    strategy: Literal["single", "ddp", "ddp_spawn", "fsdp"] = "single"
    devices: PositiveInt = 1  # processes on each computer, with a GPU each on those that have some
    num_nodes: PositiveInt = 1  # computers; several need a launcher: torchrun, srun, mpirun
    logger: ClassVar[Logger] = Logger()  # see with_logger

    def __post_init__(self) -> None:
        if self.strategy == "single" and self.world_size > 1:
            raise UserError(
                f"got trainer.strategy=single with {self.world_size} processes", "trainer=ddp | trainer=fsdp"
            )

    def with_logger(self, logger: Logger) -> Training:
        """The same, telling ``logger`` of losses and looks: no setting, it decides nothing."""
        logger.check()
        told = copy.copy(self)
        object.__setattr__(told, "logger", logger)
        return told

    def within(self, part: str) -> Training:
        """The same for ``part`` of the work, whose log is another than that of the whole."""
        return self.with_logger(replace(self.logger, name=f"{self.logger.name}/{part}"))

    @property
    def is_default(self) -> bool:
        return self == SINGLE and self.logger.kind == "none"

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    def recorded(self) -> dict[str, Any]:
        """What decides a student: how many processes share a step. Nothing for one."""
        return {"processes": self.world_size} if self.world_size > 1 else {}

    def arguments(self, device: Any) -> dict[str, Any]:
        """Of a Lightning Trainer on devices of the kind of ``device``."""
        if self.strategy == "single":
            return trainer_device(device)
        from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

        wait = timedelta(seconds=WAIT_S)
        strategy: Any
        more: dict[str, Any] = {}
        if self.strategy == "fsdp":
            strategy = ModelParallelStrategy(self.world_size, 1, save_distributed_checkpoint=False, timeout=wait)
            more["inference_mode"] = False  # its tensors can't be gathered for a look and trained after it
        else:
            start: Literal["popen", "spawn"] = "popen" if self.strategy == "ddp" else "spawn"
            # A layer that the network calls for some inputs only has no gradient from the others.
            strategy = DDPStrategy(start_method=start, find_unused_parameters=True, timeout=wait)
        return {
            "accelerator": "gpu" if device.type == "cuda" else device.type,
            "devices": self.devices,
            "num_nodes": self.num_nodes,
            "strategy": strategy,
            "use_distributed_sampler": False,  # SyntheticDataModule shards
            **more,
        }


def trainer_device(device: Any) -> dict[str, Any]:
    """What a Lightning Trainer has to be told to run on ``device`` alone."""
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": [device.index or 0]}
    return {"accelerator": device.type, "devices": 1}


SINGLE = Training()
