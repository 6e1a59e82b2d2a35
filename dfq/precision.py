"""float64, wherever a network runs: Apple's GPUs have none, and compute it on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # types of devices


def exact_device(device: torch.device) -> torch.device:
    """Where float64 of what lies on ``device`` is computed: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def exact(x: Tensor) -> Tensor:
    """``x`` in float64 on :func:`exact_device`."""
    return x.to(exact_device(x.device)).double()


def double(x: Tensor) -> Tensor:
    """``x`` in float64 on the CPU, without its gradient."""
    return x.detach().cpu().double()
