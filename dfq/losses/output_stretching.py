"""Output distribution stretching: images that drive a network's outputs as far apart as they go.

Sony MCT ("Data Generation for Hardware-Friendly Post-Training Quantization", WACV 2025, arXiv 2410.22110): nothing
holds what lies behind the last batch norm, so outputs on synthetic images are narrower than on real ones, and a range
calibrated on them clips. Maximized is::

    max(outputs) - min(outputs)

Differences from the paper: the range of each sample's outputs rather than of all together, of which but two samples
would feel a gradient; and its logarithm, so that the gradient does not depend on the network's scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_output_range(outputs: Tensor) -> Tensor:
    """log(max - min) of each sample's ``outputs`` [N, ...], mean over samples; of the batch where each has but one."""
    values = outputs.flatten(1) if outputs.dim() > 1 and outputs[0].numel() > 1 else outputs.reshape(1, -1)
    spread = values.amax(1) - values.amin(1)
    return torch.log(spread.clamp(min=1e-12)).mean()  # equal outputs: no gradient rather than an infinite one
