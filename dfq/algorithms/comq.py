"""COMQ: coordinate descent on codes and scales, without gradients.

COMQ (Zhang et al., 2024, arXiv 2403.07134). A weight is s c, a level c of the grid times its scale. Starting from the
weight itself, in turn until nothing changes much (algorithms 1 and 2):

    codes   each entry of a row at its best level, the others fixed:
            c_i = nearest level to  (s c_i - ((s c - w) H)_i / H_ii) / s,
            in the greedy order of falling sqrt(H_ii) |w_i|: what weighs most is decided first
    scale   the least-squares one of the row:   s = (c H w^T) / (c H c^T)

Differences from the paper: convolutions too (:mod:`dfq.algorithms._hessian`), inputs' errors are propagated and biases
corrected there; grids start as calibration made them, with their zero points; a scale may be one group's (groups in
turn) or the whole tensor's; scales of a format of their own (powers of two, e4m3) stay, and so does one that least
squares would make negative.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfq.algorithms._hessian import LayerwiseRounding, Problem, Solution
from dfq.settings import PositiveInt


@dataclass(frozen=True)
class COMQ(LayerwiseRounding):
    """A minute on small networks."""

    sweeps: PositiveInt = 4  # times that every code and every scale is looked at
    learn_scale: bool = True  # scales too; false: codes alone

    def solve(self, problem: Problem) -> Solution:
        scheme = problem.grid.scheme
        values = problem.weight.clone()
        order = greedy_order(problem)
        learn = self.learn_scale and scheme.scale_format == "float32"
        for _ in range(self.sweeps):
            choose_codes(problem, values, order)
            if learn:
                problem = fit_scale(problem, values)
        if not learn:
            return Solution(values)
        return Solution(values, problem.grid.scale[..., :: scheme.group_size or 1].flatten())


def greedy_order(problem: Problem) -> Tensor:
    """Columns of each row [P, O, I], those with the largest share in the output first."""
    share = problem.diagonal.sqrt()[:, None] * problem.weight.abs()
    return share.argsort(dim=-1, descending=True, stable=True)


def choose_codes(problem: Problem, values: Tensor, order: Tensor) -> None:
    """One sweep over all entries of ``values`` [P, O, I], in place; each row in an order of its own."""
    hessian, diagonal = problem.hessian, problem.diagonal[:, None].expand_as(values)
    gradient = (values - problem.weight) @ hessian
    problems = torch.arange(len(values), device=values.device)[:, None]
    for position in range(values.shape[-1]):
        i = order[..., position : position + 1]
        entry = values.gather(-1, i)
        level = problem.grid.nearest(entry - gradient.gather(-1, i) / diagonal.gather(-1, i), i)
        gradient += (level - entry) * hessian[problems, i[..., 0]]
        values.scatter_(-1, i, level)


def fit_scale(problem: Problem, values: Tensor) -> Problem:
    """The problem with least-squares scales for the levels of ``values`` [P, O, I], which follow, in place."""
    grid = problem.grid
    size = grid.scheme.group_size or values.shape[-1]
    gradient = (values - problem.weight) @ problem.hessian
    scales = []
    for start in range(0, values.shape[-1], size):
        group = slice(start, start + size)
        scale = grid.scale[..., start : start + 1] if grid.scheme.group_size else grid.scale
        levels = values[..., group] / scale
        slope = (levels * gradient[..., group]).sum(-1, keepdim=True)
        curvature = ((levels @ problem.hessian[:, group, group]) * levels).sum(-1, keepdim=True)
        slope, curvature = slope.sum_to_size(scale.shape), curvature.sum_to_size(scale.shape)
        new = scale - slope / curvature
        new = torch.where((curvature > 0) & (new > 0), new, scale)
        change = levels * (new - scale)
        values[..., group] += change
        gradient += change @ problem.hessian[:, group]
        scales.append(new.expand(*new.shape[:2], size if grid.scheme.group_size else 1))
    return replace(problem, grid=replace(grid, scale=torch.cat(scales, -1)))
