"""Decoding: logits behind the last of some ids, step by step, with the keys and values of what was seen before."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfq.hooks import evaluation_mode

CACHE = ("cache", "past_key_values")  # what transformers calls it, and called it before 5.24


class Decoder:
    """One run through a causal network. One of transformers keeps keys and values; others see all ids at every step.

    Args:
        raw_outputs: logits [N, T, V] of ids [N, T], for a network that keeps nothing.
        most: ids that there will be at the end, so that there is room for their keys and values; None: not known.
    """

    def __init__(
        self,
        module: nn.Module,
        raw_outputs: Callable[[Tensor], Tensor],
        device: torch.device,
        most: int | None = None,
    ):
        self.module, self.raw_outputs, self.device, self.most = module, raw_outputs, device, most
        forwards = [kind.__dict__["forward"] for kind in type(module).__mro__ if "forward" in kind.__dict__]
        known = [entry for forward in forwards for entry in inspect.signature(forward).parameters.values()]
        names = {entry.name for entry in known}
        self.name = next((name for name in CACHE if name in names), None)
        self.keeps = self.name is not None and "use_cache" in names
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
        self.cache: Any = None

    @torch.no_grad()
    def __call__(self, ids: Tensor, seen: int = 0) -> Tensor:
        """Logits [N, V] behind ids [N, t], on the network's device; the first ``seen`` of them went in before."""
        if not self.keeps:
            return self.raw_outputs(ids)[:, -1].float()
        with evaluation_mode(self.module):
            new = ids if self.cache is None else ids[:, seen:]
            kept: dict[str, Any] = {str(self.name): self.cache, "use_cache": True}
            outputs = self.module(new.to(self.device), **kept, **self.options)
        if not isinstance(getattr(outputs, "logits", None), Tensor):  # it has these arguments, and answers of its own
            self.keeps = False
            return self(ids)
        self.cache = next((found for name in CACHE if (found := getattr(outputs, name, None)) is not None), None)
        self.keeps = self.cache is not None
        if self.keeps and "transformers" in sys.modules:
            from dfq._growing import make_room  # not above: transformers is an extra, and slow to import

            make_room(self.cache, self.most)
        return outputs.logits[:, -1].float()


def greedy(decoder: Decoder, ids: Tensor, num_tokens: int) -> Tensor:
    """The ``num_tokens`` likeliest ids [N, num_tokens] behind ids [N, t], one after the other."""
    start = ids.shape[1]
    for place in range(start, start + num_tokens):
        logits = decoder(ids, 0 if place == start else place - 1)
        ids = torch.cat([ids, logits.argmax(-1)[:, None].to(ids.device)], 1)
    return ids[:, start:]
