"""LQER: a pair of thin matrices beside each linear layer that makes up for the largest part of its rounding error.

LQER: Low-Rank Quantization Error Reconstruction for LLMs (Zhang et al., ICML 2024, arXiv 2402.02446, eq. 7-11). With
E = W - W_hat and the sizes s_i of the layer's input channels (L2QER)::

    E diag(s) = U S V^T  (singular values in falling order),    up = U_k S_k [O, K],    down = V_k^T diag(s)^-1 [K, I]
    y = W_hat x + up (down x)

For uncorrelated inputs with root mean squares s this is the pair of rank K with the least E |(E - up down) x|^2;
``scaled=false`` is the paper's plain LQER, which needs no samples. Weights keep their bits, the pair is stored in
``storage`` (2 K (I + O) bytes in half precision) and runs beside the layer.

Behind whatever has rounded the weights: ``algorithm=sequence algorithm.steps=[gptq,lqer]``; alone it rounds to nearest.
The pair travels with the student, and in files of ``exporter=pt2`` and ``onnx_qdq``; compressed-tensors and GGUF have
no place for it and say so.

Differences from the paper: sizes are root mean squares over all tokens (there: the largest mean magnitude of a batch,
divided by a constant that cancels out), the pair is in half precision (there: 8 bits that share exponents), and W_hat
is what any algorithm has made, on any grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dfq.algorithms._base import Algorithm, Work
from dfq.algorithms._inputs import input_squares
from dfq.channels import (
    float_network,
    weight_in_float,
)
from dfq.errors import UserError
from dfq.modules import LowRankCorrection, product_of
from dfq.precision import double
from dfq.progress import progress_bar
from dfq.settings import PositiveInt

SMALLEST_SIZE = 1e-3  # of an input channel, in units of the largest


@dataclass(frozen=True)
class LQER(Algorithm):
    """Seconds."""

    rank: PositiveInt = 8  # of each pair; at most half of what the layer's smaller side has
    scaled: bool = True  # errors count as much as the inputs they are multiplied with (L2QER)
    storage: Literal["float16", "bfloat16", "float32"] = "float16"  # of the pair
    num_samples: PositiveInt = 128  # synthetic samples that inputs are looked at on
    goes_on: ClassVar[bool] = True

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """Give the student's linear layers their pairs."""
        student, images = work.student, work.images(self.num_samples)
        work.ensure_calibrated(images)
        if student.surgery.rotated:
            raise UserError(
                "got algorithm=lqer behind rotation, after which weights are not the teacher's",
                "lqer behind any other algorithm",
            )
        squares = input_squares(student, images) if self.scaled else {}
        network = float_network(student, work.teacher)
        names = [
            name
            for name, layer in student.layers.items()
            if isinstance(layer, nn.Linear)
            and layer.weight_quantizer.has_qparams
            and product_of(name, network.flow) is not None
            and (name in squares or not self.scaled)
        ]
        with progress_bar("lqer", len(names), "layers") as advance:
            for name in names:
                layer = student.layers[name]
                wanted = weight_in_float(student, network, name)
                error = wanted - double(layer.weight_quantizer(layer.weight))
                size = double(squares[name]).sqrt() if self.scaled else torch.ones(error.shape[1]).double()
                rank = max(1, min(self.rank, min(error.shape) // 2))
                down, up = low_rank(error, size, rank)
                if self.storage == "float16":
                    down, up = within_float16(down, up)
                down, up = (t.to(getattr(torch, self.storage)) for t in (down, up))
                layer.correction = LowRankCorrection(down, up).to(layer.weight.device)
                student.surgery.corrections[name] = rank, self.storage
                advance(1)


def low_rank(error: Tensor, size: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [K, I] and up [O, K] for an error [O, I] and sizes of inputs [I]."""
    size = size.clamp(min=SMALLEST_SIZE * float(size.max()) if float(size.max()) > 0 else 1.0)
    u, s, vh = torch.linalg.svd(error * size, full_matrices=False)
    return (vh[:rank] / size).contiguous(), (u[:, :rank] * s[:rank]).contiguous()  # as they are when loaded


def within_float16(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of down [K, I] and up [O, K] in numbers that float16 holds.

    Inputs that are all small make ``down`` infinite there and ``up`` zero. Of such a component both factors get about
    the same size, by a power of two; others stay as they are.
    """
    limits, sizes = torch.finfo(torch.float16), torch.stack([down.abs().amax(1), up.abs().amax(0)])
    fits = ((sizes <= limits.max) & (sizes >= limits.tiny)).all(0) | (sizes == 0).any(0)
    exponent = torch.where(fits, 0.0, (torch.log2(sizes[0] / sizes[1]) / 2).round())
    return down * torch.exp2(-exponent)[:, None], up * torch.exp2(exponent)
