"""What every algorithm is: a frozen dataclass whose fields are its settings, and one method."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from dfq.calibration import calibrate, calibration_images, ensure_calibrated
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.lightning.augmentation import Views
from dfq.lightning.trainer import SINGLE, Training
from dfq.progress import say
from dfq.settings import choices, resolve
from dfq.student import Student
from dfq.teacher import Teacher

ONE_VIEW = Views()
MOST_NAMES = 12  # of layers in a line
STEPS = ("iterations", "finish_iterations", "max_steps")  # settings that say how long an algorithm trains


@dataclass(frozen=True)
class Work:
    """What an algorithm is given to do.

    Attributes:
        student: changed in place; fresh, or what another algorithm has made of it.
        weight_quantizer, activation_quantizer: methods of the quantizers family, for grids that are not there yet.
        seed: of all random numbers.
        work_dir: holds what an interrupted run goes on from; the caller removes it.
        training: where what is trained with Lightning runs. With several processes each does all of this.
        shared_dir: that of rank 0, for what it writes for all; ``work_dir`` where there is one process.
        views: how often, and how, each sample of :meth:`images` is seen.
    """

    student: Student
    teacher: Teacher
    dataset: SyntheticDataset
    weight_quantizer: Any
    activation_quantizer: Any
    seed: int
    work_dir: Path
    training: Training = SINGLE
    shared_dir: Path | None = None
    views: Views = ONE_VIEW

    def images(self, num_samples: int) -> Tensor:
        """Up to ``num_samples`` samples that are not held out, and their other views behind them."""
        return self.views.of(calibration_images(self.dataset, num_samples), self.seed)

    def calibrate(self, images: Tensor) -> dict[str, int]:
        """:func:`~dfq.calibration.calibrate` the student."""
        return calibrate(self.student, images, self.weight_quantizer, self.activation_quantizer)

    def ensure_calibrated(self, images: Tensor) -> dict[str, int]:
        """The same, unless the student has its grids."""
        return ensure_calibrated(self.student, images, self.weight_quantizer, self.activation_quantizer)

    def hand_to(self, algorithm: Any, student: Student, folder: str) -> None:
        """Have another algorithm do it, on ``student`` and in a folder of its own, with the same views of samples."""
        work_dir = self.work_dir / folder
        work_dir.mkdir(parents=True, exist_ok=True)
        quantizers = self.weight_quantizer, self.activation_quantizer
        several: dict[str, Any] = {}
        if not self.training.is_default:
            shared_dir = (self.shared_dir or self.work_dir) / folder
            several = {"training": self.training.within(folder), "shared_dir": shared_dir}
        if self.views != ONE_VIEW:
            several["views"] = self.views
        algorithm.quantize(student, self.teacher, self.dataset, *quantizers, self.seed, work_dir, **several)


@dataclass(frozen=True)
class Algorithm:
    """Makes the quantized student. A sub-class writes :meth:`run`.

    ``weights_stay_float``: they are rounded when the student is frozen, so another algorithm may round them better.
    ``rounds_weights``: behind it each one is on its level.
    ``goes_on``: from what another algorithm has made of the student.
    """

    weights_stay_float: ClassVar[bool] = False
    rounds_weights: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False

    def quantize(
        self,
        student: Student,
        teacher: Teacher,
        dataset: SyntheticDataset,
        weight_quantizer: Any,
        activation_quantizer: Any,
        seed: int,
        work_dir: Path,
        training: Training = SINGLE,
        shared_dir: Path | None = None,
        views: Views = ONE_VIEW,
    ) -> None:
        """Give ``student`` its grids and, if there is more to do, its weights, in place."""
        if student.network is not None:  # layers are compared with the teacher's of the same name
            raise UserError(
                f"got algorithm.student_network={student.network} and an algorithm behind it, {type(self).__name__}",
                "the distillation as the last one",
            )
        quantizers = weight_quantizer, activation_quantizer
        self.run(Work(student, teacher, dataset, *quantizers, seed, work_dir, training, shared_dir, views))

    def run(self, work: Work) -> None:
        raise NotImplementedError

    def parts(self) -> list[Any]:
        """Algorithms that it hands the student to: their settings and their code make the student too."""
        return []


def resolved(given: tuple[Any, ...], setting: str) -> list[Any]:
    """The algorithms that a setting lists: names, mappings with _target_, or objects."""
    if not given:
        raise UserError(f"got algorithm.{setting}=[]", "one or more algorithms")
    found = [resolve("algorithm", one) for one in given]
    for one in found:
        if not hasattr(one, "quantize"):
            allowed = f"{' | '.join(choices('algorithm'))}, or mappings with _target_ and settings"
            raise UserError(f"got {one!r} in algorithm.{setting}", allowed)
    return found


def is_timed(algorithm: Any) -> bool:
    """Whether an algorithm stops by the clock if it is told to."""
    return any(field.name == "time_limit_s" for field in fields(algorithm))


def trains(algorithm: Any) -> bool:
    """Whether it takes steps: what stops by the clock without them rounds."""
    return is_timed(algorithm) and any(hasattr(algorithm, name) for name in STEPS)


def within(algorithm: Any, limit_s: float) -> Any:
    """The algorithm with at most ``limit_s`` seconds; as it is where it has no clock."""
    if not is_timed(algorithm):
        return algorithm
    return replace(algorithm, time_limit_s=min(max(limit_s, 1e-3), algorithm.time_limit_s or math.inf))


class Clock:
    """Says whether there is time for another piece of work, one as long as the longest before it."""

    def __init__(self, limit_s: float | None):
        self.end = time.perf_counter() + (limit_s or math.inf)
        self.began: float | None = None
        self.longest = 0.0

    @property
    def left_s(self) -> float:
        return self.end - time.perf_counter()

    def allows_another(self) -> bool:
        """To be asked before each piece; what lies between two calls is one."""
        now = time.perf_counter()
        if self.began is not None:
            self.longest = max(self.longest, now - self.began)
        self.began = now
        return self.longest < self.left_s


def tell_left(algorithm: Algorithm, student: Student, done: Collection[str]) -> None:
    """Say which layers an algorithm does not look at: their weights are rounded to nearest, or as another has done."""
    alike = student.expert_layers
    left = [name for name, layer in student.layers.items() if layer.weight_quantizer.has_qparams and name not in done]
    names = list(dict.fromkeys(alike.get(name, name) for name in left))
    if names:
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        say(f"{type(algorithm).__name__} leaves as they are: {', '.join(names[:MOST_NAMES])}{more}")
