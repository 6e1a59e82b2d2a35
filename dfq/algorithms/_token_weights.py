"""What tokens count in the moments of layers' inputs: RSQ's importance.

RSQ: Learning from Important Tokens Leads to Better Quantized LLMs (Sung et al., 2025, arXiv 2503.01820, section 3).
With r_t in [r_min, 1] the importance of a token of a sample, a solver's Hessian is H = 2 sum r_t^2 x_t x_t^T.

``attention``: how much attention a token gets in the block, sum over heads and queries (AttnCon, the paper's best).
``norm``: the size of what goes into the block (ActNorm). Both are min-max scaled in each sample.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dfq.attention import AttentionRecord
from dfq.blocks import Captured, run_block

Kind = Literal["none", "attention", "norm"]


@torch.no_grad()
def token_weights(
    reference: nn.Module, captured: Captured, kind: Kind, smallest: float, batch_size: int
) -> Tensor | None:
    """r_t^2 of all samples of a block [N, T]; None where all tokens count the same, or there are none."""
    x = captured.float_inputs
    if kind == "none" or x.dim() != 3:
        return None
    if kind == "norm":
        size = x.float().norm(dim=-1)
    else:
        device, parts = next(reference.parameters()).device, []
        for batch in x.split(batch_size):
            with AttentionRecord() as seen:
                run_block(reference, captured.block, batch.to(device), captured.arguments)
            maps = [probabilities for probabilities in seen.maps if probabilities.shape[-1] == x.shape[1]]
            if not maps:  # other softmaxes are not those of attention
                return None
            parts.append(torch.stack([probabilities.float().sum((1, 2)) for probabilities in maps]).sum(0).cpu())
        size = torch.cat(parts)
    low, high = size.amin(1, keepdim=True), size.amax(1, keepdim=True)
    share = torch.where(high > low, (size - low) / (high - low).clamp(min=1e-30), 1.0)
    return (smallest + (1 - smallest) * share).square()
