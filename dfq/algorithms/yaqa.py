"""YAQA: rounding that keeps what the whole network says, not what each layer does.

YAQA ("Model-Preserving Adaptive Rounding", Tseng et al., 2025, arXiv 2505.22988). The second derivative of
KL(teacher || student) with respect to a layer's weight is approximated by a Kronecker product of a moment of its inputs
and one of its outputs' gradients, so that errors of different outputs make up for each other too::

    minimize    tr(G (Q - W) H (Q - W)^T)
    H = E[x x^T] [I, I],    G = E[g g^T] [O, O],    g the gradient of log p(label) at the layer's output,

labels drawn from the teacher's own distribution, which makes G its Fisher information: no label is needed, and tokens
count by themselves (the paper's sketch A). With G = L_G D_G L_G^T and H = L_H D_H L_H^T, L unit lower triangular, the
objective is sum_ij D_G,i D_H,j (L_G^T (Q - W) L_H)_ij^2, and an entry's term holds itself and entries behind it alone.
Rounded from the last to the first, each at the nearest level to what leaves its term least (the paper's eq. 9)::

    Q_ij = nearest level to  W_ij - sum_(i', j') != (i, j)  L_G,i'i (Q - W)_i'j' L_H,j'j

Entries with the same i + j do not depend on each other: O + I - 1 steps. Then ``sweeps`` of coordinate descent, as
QuantEase has it for one side (:mod:`dfq.algorithms.quantease`), min(O, I) entries at a time, no two of one row or
column. Where a move of all would not be an improvement, those that gain most by themselves are moved.

Differences from the paper: H is that of the student's inputs, with the shared pieces of
:mod:`dfq.algorithms._hessian` (QEP, biases, convolutions), and not iterated; coordinate descent behind the rounding; no
incoherence processing (``algorithm=rotation`` goes in front); rows and columns in order of their diagonals; layers on
which no label depends have G = 1.

It takes one backward pass of the whole float network for each sample, and another one whenever moments of the layers
ahead would not fit into ``memory_bytes``; that changes time, not results.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dfq.algorithms._base import Work
from dfq.algorithms._hessian import LayerwiseRounding, Problem, Solution
from dfq.algorithms._likelihood import output_moments
from dfq.algorithms._linear_algebra import cholesky, damped
from dfq.settings import NonNegativeFloat, NonNegativeInt


@dataclass(frozen=True)
class YAQA(LayerwiseRounding):
    """A minute on small networks."""

    sweeps: NonNegativeInt = 8  # of coordinate descent behind the rounding
    output_damping: NonNegativeFloat = 0.01  # added to the diagonal of G, in units of its mean

    def output_moments(self, work: Work, reference: nn.Module, images: Tensor, layers: list[str]) -> dict[str, Tensor]:
        groups = {name: getattr(work.student.layers[name], "groups", 1) for name in layers}
        size = max(1, self.batch_size // 4)  # a backward pass holds all activations
        rng = torch.Generator().manual_seed(work.seed)
        return output_moments(reference, work.teacher, images, groups, size, rng)

    def solve(self, problem: Problem) -> Solution:
        num_problems, num_rows = problem.weight.shape[:2]
        if problem.output is None:
            unit = torch.eye(num_rows, dtype=problem.weight.dtype, device=problem.weight.device)
            output = unit.expand(num_problems, -1, -1)
        else:
            output = damped(problem.output, self.output_damping)
        problem = replace(problem, output=output)
        values = feed_back(problem)
        rng = torch.Generator().manual_seed(0)
        for _ in range(self.sweeps):
            descend(problem, values, rng)
        return Solution(values)


def feed_back(problem: Problem) -> Tensor:
    """Each entry rounded to what makes up for the errors of those before it, the largest diagonals first: [P, O, I]."""
    assert problem.output is not None
    by_row = problem.output.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, stable=True)
    by_column = problem.diagonal.argsort(dim=-1, stable=True)
    left, right = (_unit_factor(m, order) for m, order in ((problem.output, by_row), (problem.hessian, by_column)))
    num_problems, num_rows, num_columns = problem.weight.shape
    every = torch.arange(num_problems, device=problem.weight.device)[:, None]
    values = problem.weight.clone()
    behind = torch.zeros_like(values)  # (Q - W) L_H in the order of rows and columns
    for diagonal in range(num_rows + num_columns - 2, -1, -1):
        i = torch.arange(max(0, diagonal - num_columns + 1), min(num_rows - 1, diagonal) + 1, device=values.device)
        j = diagonal - i
        row, column = by_row[:, i], by_column[:, j]  # [P, K]
        weight = problem.weight[every, row, column]
        wanted = weight - (left[:, :, i] * behind[:, :, j]).sum(1)
        level = problem.grid.nearest_at(wanted, row, column)
        values[every, row, column] = level
        behind[:, i] += (level - weight)[..., None] * right[:, j]
    return values


def descend(problem: Problem, values: Tensor, rng: torch.Generator) -> None:
    """One sweep over all entries of Q = ``values`` [P, O, I], in place; the objective does not rise."""
    assert problem.output is not None
    left, right = problem.output, problem.hessian
    num_rows, num_columns = values.shape[1:]
    rows = torch.randperm(num_rows, generator=rng).to(values.device)
    columns = torch.randperm(num_columns, generator=rng).to(values.device)
    size, wide = min(num_rows, num_columns), num_rows <= num_columns
    after = (values - problem.weight) @ right  # (Q - W) H
    for turn in range(max(num_rows, num_columns)):
        row = rows if wide else rows.roll(-turn)[:size]
        column = columns.roll(-turn)[:size] if wide else columns
        slope = (left[:, row] * after[:, :, column].mT).sum(-1)  # of half the objective [P, K]
        couplings = left[:, row[:, None], row] * right[:, column[:, None], column]
        curvature = couplings.diagonal(dim1=-2, dim2=-1)
        level = values[:, row, column]
        vertex = level - slope / curvature
        new = problem.grid.nearest_at(vertex, row.expand_as(slope), column.expand_as(slope))
        moves = _improving(new - level, slope, couplings, curvature)
        values[:, row, column] = torch.where(moves, new, level)
        after[:, row] += torch.where(moves, new - level, 0.0)[..., None] * right[:, column]


def _improving(step: Tensor, slope: Tensor, couplings: Tensor, curvature: Tensor) -> Tensor:
    """Which entries [P, K] to move by ``step``: all, or as many of the best ones as lower the objective together."""
    own = curvature * step.square() + 2 * slope * step  # what each move alone would add
    rank = own.argsort(dim=-1, stable=True).argsort(dim=-1)
    count = torch.full_like(rank[:, :1], step.shape[-1])
    while True:
        taken = torch.where(rank < count, step, 0.0)
        added = ((taken[:, None] @ couplings)[:, 0] * taken + 2 * slope * taken).sum(-1, keepdim=True)
        worse = (added > 0) & (count > 0)
        if not worse.any():
            return rank < count
        count = torch.where(worse, count // 2, count)


def _unit_factor(moment: Tensor, order: Tensor) -> Tensor:
    """L [P, N, N], unit lower triangular, of ``moment`` = L D L^T with rows and columns in ``order`` [P, N]."""
    taken = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None].expand_as(moment))
    factor = cholesky(taken)
    return factor / factor.diagonal(dim1=-2, dim2=-1)[:, None]
