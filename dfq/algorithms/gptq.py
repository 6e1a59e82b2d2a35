"""GPTQ: round column by column, and let the columns that are left make up for each one's error.

GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323). With H the layer's Hessian and U the upper Cholesky factor of its
inverse, H^-1 = U^T U, for every column j in turn (eq. 2 and 3, algorithm 1):

    q_j = nearest level to w_j
    e   = (w_j - q_j) / U_jj
    w_k = w_k - e U_jk          for all k > j

in batches of ``block_size`` columns: updates go to the batch at once, to the columns behind it when it is done.

Differences from the paper: convolutions too (:mod:`dfq.algorithms._hessian`), inputs' errors are propagated and biases
corrected there; grids are those of calibration, also per group, so ``act_order`` (columns in falling order of H_jj)
goes with every granularity; inputs that are always zero keep nearest rounding instead of weight zero; U comes from one
factorization of H with its order turned, H = R R^T with R = U^-1 upper triangular.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.algorithms._hessian import LayerwiseRounding, Problem, Solution
from dfq.algorithms._linear_algebra import cholesky
from dfq.settings import PositiveInt


@dataclass(frozen=True)
class GPTQ(LayerwiseRounding):
    """Seconds to a minute on small networks."""

    act_order: bool = True  # columns with large inputs first
    block_size: PositiveInt = 128  # columns whose updates of the rest are done together; changes time, not results

    def solve(self, problem: Problem) -> Solution:
        undo = None
        if self.act_order:
            problem, undo = problem.by_activation()
        weight, grid = problem.weight.clone(), problem.grid
        factor = inverse_factor(problem.hessian)
        num_columns = weight.shape[-1]
        values = torch.empty_like(weight)
        for start in range(0, num_columns, self.block_size):
            end = min(start + self.block_size, num_columns)
            errors = torch.empty_like(weight[..., start:end])
            for j in range(start, end):
                column = weight[..., j : j + 1]
                values[..., j : j + 1] = level = grid.nearest(column, j)
                errors[..., j - start : j - start + 1] = error = (column - level) / factor[:, j, j, None, None]
                weight[..., j + 1 : end] -= error * factor[:, None, j, j + 1 : end]
            weight[..., end:] -= errors @ factor[:, start:end, end:]
        return Solution(values if undo is None else values.gather(-1, undo.expand_as(values)))


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U [P, I, I] with U^T U = H^-1."""
    reversed_factor = cholesky(hessian.flip(-2, -1)).flip(-2, -1)  # R, upper triangular, R R^T = H
    unit = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    return torch.linalg.solve_triangular(reversed_factor, unit, upper=True)
