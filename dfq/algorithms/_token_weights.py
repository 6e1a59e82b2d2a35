"""What tokens count in the moments of layers' inputs: RSQ's importance.

RSQ: Learning from Important Tokens Leads to Better Quantized LLMs (Sung et al., 2025, arXiv 2503.01820, section 3).
With r_t in [r_min, 1] the importance of a token of a sample, a solver's Hessian is H = 2 sum r_t^2 x_t x_t^T.

``attention``: how much attention a token gets in the block, sum over heads and queries (AttnCon, the paper's best).
``norm``: the size of what goes into the block (ActNorm). Both are min-max scaled in each sample.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dfq.blocks import Captured, run_block
from dfq.hooks import op_name

Kind = Literal["none", "attention", "norm"]


class _Attention(TorchFunctionMode):
    """Adds up the probabilities [N, T] with which tokens are attended to while it is open."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.received: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if op_name(func) == "scaled_dot_product_attention":
            self._add(_probabilities(*args, **kwargs))
        elif op_name(func) == "softmax" and isinstance(result, Tensor):
            self._add(result)
        return result

    def _add(self, probabilities: Tensor) -> None:
        """[N, heads, queries, T]; other softmaxes are not those of attention."""
        if probabilities.dim() == 4 and probabilities.shape[-1] == self.num_tokens:
            found = probabilities.float().sum((1, 2))
            self.received = found if self.received is None else self.received + found


def _probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` multiplies values with [N, heads, queries, T]."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(unseen, -torch.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    return scores.softmax(-1)


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
            with _Attention(x.shape[1]) as seen:
                run_block(reference, captured.block, batch.to(device), captured.arguments)
            if seen.received is None:
                return None
            parts.append(seen.received.cpu())
        size = torch.cat(parts)
    low, high = size.amin(1, keepdim=True), size.amax(1, keepdim=True)
    share = torch.where(high > low, (size - low) / (high - low).clamp(min=1e-30), 1.0)
    return (smallest + (1 - smallest) * share).square()
