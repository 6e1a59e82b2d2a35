"""QuantEase against plain loops that try every level."""

import itertools

import numpy as np
import pytest
import torch
from layer_problems import FP4, GROUPS, SCHEMES, SIGNED3, UNSIGNED3, all_levels, ids, is_on_grid, loss, problem

from dfq.algorithms.quantease import QuantEase, descend


def by_trying(given, sweeps):
    """Each entry in turn at the level that makes the whole objective smallest."""
    values = given.weight.numpy().copy()
    weight, hessian = given.weight.numpy(), given.hessian.numpy()
    every = all_levels(given.grid, values.shape)
    for _ in range(sweeps):
        for p, i, o in itertools.product(range(values.shape[0]), range(values.shape[2]), range(values.shape[1])):
            error = np.tile(values[p, o] - weight[p, o], (every.shape[-1], 1))
            error[:, i] = every[p, o, i] - weight[p, o, i]
            values[p, o, i] = every[p, o, i, ((error @ hessian[p]) * error).sum(1).argmin()]
    return values


@pytest.mark.parametrize("scheme", [SIGNED3, UNSIGNED3, GROUPS, FP4], ids=ids)
@pytest.mark.parametrize("sweeps", [1, 3])
def test_it_finds_what_trying_every_level_finds(scheme, sweeps):
    given = problem(scheme)
    values = given.weight.clone()
    for _ in range(sweeps):
        descend(given, values)
    np.testing.assert_allclose(values.numpy(), by_trying(given, sweeps), atol=1e-9)


def test_batches_of_columns_change_nothing(monkeypatch):
    given, found = problem(num_inputs=30), []
    for batch in (128, 7):
        monkeypatch.setattr("dfq.algorithms.quantease.BATCH", batch)
        found.append(QuantEase(sweeps=4).solve(given).values)
    assert torch.allclose(*found, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_the_objective_never_rises_over_sweeps(scheme):
    given = problem(scheme, num_inputs=24, seed=3)
    values = given.grid.nearest(given.weight)
    before = losses = [loss(given.weight, values, given.hessian)]
    for _ in range(8):
        descend(given, values)
        losses.append(loss(given.weight, values, given.hessian))
        assert is_on_grid(values, given.grid)
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses)) and losses[-1] < 0.9 * before[0]
    # From the weight itself: the first sweep makes the error, the others do not add to it.
    values, losses = given.weight.clone(), []
    for _ in range(8):
        descend(given, values)
        losses.append(loss(given.weight, values, given.hessian))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("relax_every", [0, 1, 3])
@pytest.mark.parametrize("act_order", [False, True])
def test_never_worse_than_nearest_rounding_in_any_row(relax_every, act_order):
    for seed, scheme in enumerate(SCHEMES[::2]):
        given = problem(scheme, seed=seed, num_outputs=8, dtype=torch.float32)
        before = given.weight.clone()
        solution = QuantEase(sweeps=4, relax_every=relax_every, act_order=act_order).solve(given)
        assert solution.scale is None and is_on_grid(solution.values, given.grid)
        assert torch.equal(given.weight, before), "the problem is not the solver's to change"
        nearest = given.grid.nearest(given.weight)
        assert (given.objective(solution.values) <= given.objective(nearest) * (1 + 1e-5)).all()
        assert loss(given.weight, solution.values, given.hessian) < 0.95 * loss(given.weight, nearest, given.hessian)


def test_a_relaxed_sweep_is_a_step_of_gauss_seidel():
    given = problem()
    values = given.grid.nearest(given.weight)
    wanted = values.numpy().copy()
    descend(given, values, relaxed=True)
    for p, o, i in itertools.product(*map(range, wanted.shape)):  # rows are independent: any order of rows
        gradient = (wanted[p, o] - given.weight[p, o].numpy()) @ given.hessian[p, :, i].numpy()
        wanted[p, o, i] -= gradient / float(given.hessian[p, i, i])
    np.testing.assert_allclose(values.numpy(), wanted, atol=1e-9)


def test_relaxed_sweeps_help_on_average():
    given = problem(num_problems=10, num_outputs=16, num_inputs=16)
    plain, relaxed = (QuantEase(sweeps=12, relax_every=n).solve(given).values for n in (0, 3))
    assert loss(given.weight, relaxed, given.hessian) < 0.98 * loss(given.weight, plain, given.hessian)
