"""Checkpoints that go to their file as they are made.

Lightning's own put a whole one together in memory first: weights and Adam's moments once more, three times the network.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from dfq.dataset import atomic


class FileCheckpointIO(TorchCheckpointIO):
    """``torch.save`` to a temporary name beside the file; then that is the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError(f"got storage_options={storage_options}; allowed: None, checkpoints are files here")
        with atomic(Path(path)) as temporary:
            torch.save(checkpoint, temporary)
