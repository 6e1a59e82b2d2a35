"""QuantEase: cyclic coordinate descent, one column of the weight at a time, each at its best level.

QuantEase (Behdin et al., 2023, arXiv 2309.01885). With everything but column j fixed, tr((W - Q) H (W - Q)^T) is a
parabola in each entry of that column, so its best level is the one nearest to the parabola's vertex (lemma 1,
eq. 6-8):

    q_j = nearest level to  q_j - ((Q - W) H)_j / H_jj

Sweeps over all columns start from Q = W; every ``relax_every``'th leaves the vertex unrounded (section 3.3), which
lets the descent out of where no single entry can move alone. The best rounding that was met is kept, row by row,
nearest rounding among them. Without such sweeps the objective never rises from the first to the last.

Differences from the paper: convolutions too (:mod:`dfq.algorithms._hessian`), inputs' errors are propagated and biases
corrected there; no outlier weights in float; (Q - W) H is kept up to date in batches of columns, as in GPTQ; columns
go in falling order of H_jj (``act_order``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.algorithms._hessian import LayerwiseRounding, Problem, Solution
from dfq.settings import NonNegativeInt, PositiveInt

BATCH = 128  # columns whose effect on the rest is computed together


@dataclass(frozen=True)
class QuantEase(LayerwiseRounding):
    """A minute on small networks."""

    sweeps: PositiveInt = 20  # times that every column is looked at
    relax_every: NonNegativeInt = 3  # every how many'th sweep leaves values unrounded, not the last two; 0: none
    act_order: bool = True  # columns with large inputs first

    def solve(self, problem: Problem) -> Solution:
        undo = None
        if self.act_order:
            problem, undo = problem.by_activation()
        best = problem.grid.nearest(problem.weight)
        least = problem.objective(best)
        values = problem.weight.clone()
        for sweep in range(1, self.sweeps + 1):
            relaxed = self.relax_every > 0 and sweep % self.relax_every == 0 and sweep < self.sweeps - 1
            descend(problem, values, relaxed)
            if relaxed:
                continue
            objective = problem.objective(values)
            best = torch.where((objective < least)[..., None], values, best)
            least = torch.minimum(objective, least)
        return Solution(best if undo is None else best.gather(-1, undo.expand_as(best)))


def descend(problem: Problem, values: Tensor, relaxed: bool = False) -> None:
    """One sweep over all columns of Q = ``values`` [P, O, I], in place; ``relaxed``: without rounding."""
    hessian, diagonal = problem.hessian, problem.diagonal
    gradient = (values - problem.weight) @ hessian
    num_columns = values.shape[-1]
    for start in range(0, num_columns, BATCH):
        end = min(start + BATCH, num_columns)
        before = values[..., start:end].clone()
        for j in range(start, end):
            column = values[..., j : j + 1]
            vertex = column - gradient[..., j : j + 1] / diagonal[:, None, j : j + 1]
            level = vertex if relaxed else problem.grid.nearest(vertex, j)
            gradient[..., j:end] += (level - column) * hessian[:, None, j, j:end]
            values[..., j : j + 1] = level
        gradient[..., end:] += (values[..., start:end] - before) @ hessian[:, start:end, end:]
