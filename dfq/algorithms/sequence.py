"""A sequence of algorithms on one student, each going on from what the one before left.

``algorithm=sequence algorithm.steps=[equalization,gptq]``: an algorithm that needs grids keeps those it
finds, and calibrates a student that has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfq.dataset import SyntheticDataset
from dfq.settings import resolve
from dfq.student import Student
from dfq.teacher import Teacher


@dataclass(frozen=True)
class Sequence:
    """Several algorithms, one after the other."""

    steps: tuple[Any, ...] = ("equalization", "bias_correction")  # names, or mappings with _target_ and settings

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
        """Run the steps on ``student``, in place."""
        for index, algorithm in enumerate([resolve("algorithm", step) for step in self.steps]):
            folder = work_dir / f"step_{index}"
            folder.mkdir(parents=True, exist_ok=True)
            algorithm.quantize(student, teacher, dataset, weight_quantizer, activation_quantizer, seed, folder)
