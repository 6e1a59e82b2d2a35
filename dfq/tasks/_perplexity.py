"""The metric of language models, in a file of its own: torchmetrics takes seconds to import, and not all need it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


class Perplexity(Metric):
    """exp(mean negative log-likelihood of a token, in nats). Updated with logits [N, T, V] and labels [N, T].

    torchmetrics' own takes the logarithm of float32 probabilities: infinite from one token on that a quantized network
    all but rules out.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, causal: bool, padding: int):
        super().__init__(sync_on_compute=False)  # rank 0 alone evaluates
        self.causal, self.padding = causal, padding
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # Summed in float64: a test set has more tokens than float32 can add up.
        nll = F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=self.padding, reduction="none"
        )
        self.total += nll.double().sum()
        self.count += (labels != self.padding).sum()

    def compute(self) -> Tensor:
        return torch.exp(self.total / self.count)
