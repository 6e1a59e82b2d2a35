"""COMQ against the paper's loops on the inputs themselves, one row at a time."""

import itertools

import numpy as np
import pytest
import torch
from layer_problems import GROUPS, SCHEMES, SIGNED3, TENSOR, UNSIGNED3, grid_of, ids, inputs, is_on_grid, loss, problem

from dfq.algorithms._hessian import Problem
from dfq.algorithms.comq import COMQ, choose_codes, fit_scale, greedy_order


def paper(x, weight, scale, zero_point, scheme, sweeps):
    """2403.07134, algorithm 2, for one row: x [I, n], weight [I]; codes and scale."""
    low, high = scheme.quant_min - zero_point, scheme.quant_max - zero_point
    codes = weight / scale
    order = np.argsort(-np.linalg.norm(x, axis=1) * np.abs(weight), kind="stable")
    for _ in range(sweeps):
        for i in order:
            rest = weight @ x - scale * (codes @ x - codes[i] * x[i])
            codes[i] = np.clip(np.round(rest @ x[i] / (scale * x[i] @ x[i])), low, high)
        made = codes @ x
        scale = made @ (weight @ x) / (made @ made)
    return codes, scale


@pytest.mark.parametrize("scheme", [SIGNED3, UNSIGNED3], ids=ids)
@pytest.mark.parametrize("sweeps", [1, 4])
def test_it_is_the_papers(scheme, sweeps):
    x = inputs()
    weight = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given = Problem(weight, 2 / x.shape[-1] * x @ x.mT, grid_of(weight, scheme))
    solution = COMQ(sweeps=sweeps).solve(given)
    scales = solution.scale.view(2, 5)
    for p, o in itertools.product(range(2), range(5)):
        codes, scale = paper(
            x[p].numpy(),
            weight[p, o].numpy().copy(),
            float(given.grid.scale[p, o]),
            int(given.grid.zero_point[p, o]),
            scheme,
            sweeps,
        )
        assert float(scales[p, o]) == pytest.approx(scale, rel=1e-9)
        np.testing.assert_allclose(solution.values[p, o].numpy(), codes * scale, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_better_than_nearest_rounding_and_on_the_grid_of_its_scale(scheme):
    for seed in range(2):
        given = problem(scheme, seed=seed, num_outputs=8, num_inputs=16, dtype=torch.float32)
        before = given.weight.clone(), given.grid.scale.clone()
        nearest = loss(given.weight, given.grid.nearest(given.weight), given.hessian)
        solution = COMQ().solve(given)
        assert torch.equal(given.weight, before[0]) and torch.equal(given.grid.scale, before[1])
        assert loss(given.weight, solution.values, given.hessian) < 0.95 * nearest
        assert (solution.scale is None) == (scheme.scale_format != "float32")
        grid = given.grid
        if solution.scale is not None:
            per_row = solution.scale.view(*grid.scale.shape[:2], -1)
            scale = per_row.repeat_interleave(grid.scale.shape[-1] // per_row.shape[-1], -1)
            assert not torch.equal(scale, grid.scale) and (scale > 0).all()
            grid = type(grid)(grid.scheme, scale, grid.zero_point)
        assert is_on_grid(solution.values, grid)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
def test_neither_codes_nor_scales_make_it_worse(scheme):
    given = problem(scheme, num_inputs=24)
    values, order = given.grid.nearest(given.weight), greedy_order(given)
    losses = [loss(given.weight, values, given.hessian)]
    for _ in range(4):
        choose_codes(given, values, order)
        losses.append(loss(given.weight, values, given.hessian))
        given = fit_scale(given, values)
        losses.append(loss(given.weight, values, given.hessian))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses)) and losses[-1] < losses[0]


def test_a_scale_of_the_whole_tensor_is_the_least_squares_one():
    given = problem(TENSOR)
    values = given.grid.nearest(given.weight)
    codes = (values / given.grid.scale).numpy()
    weight, hessian = given.weight.numpy(), given.hessian.numpy()
    wanted = np.einsum("poi,pij,poj->", codes, hessian, weight) / np.einsum("poi,pij,poj->", codes, hessian, codes)
    after = fit_scale(given, values)
    assert float(after.grid.scale) == pytest.approx(wanted, rel=1e-9)
    np.testing.assert_allclose(values.numpy(), codes * wanted, rtol=1e-9)


def test_a_groups_scale_is_the_least_squares_one_beside_the_others():
    given = problem(GROUPS)
    values = given.grid.nearest(given.weight)
    codes = (values / given.grid.scale).numpy()
    scales = given.grid.scale.numpy()[..., ::4].copy()
    after = fit_scale(given, values)
    for p, o in itertools.product(range(2), range(5)):
        factor = np.linalg.cholesky(given.hessian[p].numpy())  # |e L| is the objective's root
        for g in range(3):
            rest = given.weight[p, o].numpy() - codes[p, o] * scales[p, o].repeat(4)
            mine = np.zeros(12)
            mine[4 * g : 4 * g + 4] = codes[p, o, 4 * g : 4 * g + 4]
            (scales[p, o, g],), *_ = np.linalg.lstsq(
                (mine @ factor)[:, None], (rest + mine * scales[p, o, g]) @ factor, rcond=None
            )
    np.testing.assert_allclose(after.grid.scale.numpy(), scales.repeat(4, -1), rtol=1e-9)
    np.testing.assert_allclose(values.numpy(), codes * scales.repeat(4, -1), rtol=1e-9)


def test_rows_without_a_scale_to_find_keep_theirs():
    given = problem()
    given.weight[0, 1] = 0  # all codes zero: 0 / 0
    wrong = -given.grid.nearest(given.weight)  # least squares would turn the sign
    after = fit_scale(given, wrong)
    assert torch.equal(after.grid.scale, given.grid.scale)
    solution = COMQ().solve(given)
    assert torch.isfinite(solution.values).all() and not solution.values[0, 1].any()
    assert float(solution.scale.view(2, 5)[0, 1]) == float(given.grid.scale[0, 1])


def test_scales_stay_if_they_are_told_to():
    given = problem()
    solution = COMQ(learn_scale=False).solve(given)
    assert solution.scale is None and is_on_grid(solution.values, given.grid)
