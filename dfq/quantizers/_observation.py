"""What a range is chosen from: a tensor's values, or a histogram of activations seen batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.quantization import check_finite

NUM_BINS = 4096


@dataclass(frozen=True)
class Observation:
    """Values per channel with how often each was seen, and the exact extremes.

    Shapes: ``values`` and ``counts`` [C, M] (``counts`` None: once each), ``minimum`` and ``maximum`` [C]; C is 1 for
    a per-tensor grid, the number of groups of a weight for a per-group one. ``batches`` [B, 2]: the extremes of each
    batch in the order they were seen, of activations.
    """

    values: Tensor
    counts: Tensor | None
    minimum: Tensor
    maximum: Tensor
    batches: Tensor | None = None

    @classmethod
    def of_tensor(cls, x: Tensor, axis: int | None) -> Observation:
        values = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0).flatten(1)
        minimum, maximum = values.amin(1), values.amax(1)
        check_finite(torch.cat([minimum, maximum]))
        return cls(values, None, minimum, maximum)


class Histogram:
    """Counts of activations over -limit..limit; ``limit`` doubles (and pairs of bins merge) when a value exceeds it.

    One pass, bounded memory, and the result does not depend on the order of batches beyond the merging of bins. With
    4,096 bins a final grid of 8 bits has at least 4 bins a step.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.limit = 0.0
        self.num_seen = 0
        self.minimum, self.maximum = float("inf"), float("-inf")
        self.batches: list[tuple[float, float]] = []

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        if not x.numel():
            return
        self.num_seen += x.numel()
        low, high = (float(v) for v in torch.aminmax(x))
        check_finite(x.new_tensor([low, high]))
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.batches.append((low, high))
        largest = max(abs(low), abs(high))
        if self.counts is None:
            self.counts = torch.zeros(NUM_BINS, dtype=torch.float64)
            self.limit = max(largest, 1e-30)
        while largest > self.limit:
            quarter = torch.zeros(NUM_BINS // 4, dtype=torch.float64)
            self.counts = torch.cat([quarter, self.counts.view(-1, 2).sum(1), quarter])
            self.limit *= 2
        # torch.histc has no MPS kernel; there the counting happens on the CPU.
        source = x if x.device.type != "mps" else x.cpu()
        for part in source.reshape(-1).split(2**23):  # histc counts in float32, which stops at 2^24
            self.counts += torch.histc(part, NUM_BINS, -self.limit, self.limit).cpu().double()

    def observation(self) -> Observation:
        assert self.counts is not None, "nothing was observed"
        width = 2 * self.limit / NUM_BINS
        centers = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) * width - self.limit
        seen = self.counts > 0
        values = centers[seen].clamp(self.minimum, self.maximum)
        minimum, maximum = torch.tensor([self.minimum]), torch.tensor([self.maximum])
        counts = self.counts[seen].float()[None]
        return Observation(values.float()[None], counts, minimum, maximum, torch.tensor(self.batches))
