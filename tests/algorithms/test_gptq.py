"""GPTQ against the textbook: one column at a time, an inverse of what is left at every step."""

import numpy as np
import pytest
import torch
from layer_problems import GROUPS, SCHEMES, ids, is_on_grid, loss, problem

from dfq.algorithms._hessian import Problem
from dfq.algorithms.gptq import GPTQ, inverse_factor


def textbook(weight, hessian, nearest, order):
    """Optimal brain quantization in a fixed order (2210.17323, eq. 2 and 3): W [O, I], no Cholesky, no batches."""
    weight, quantized, left = weight.copy(), np.zeros_like(weight), list(order)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        j = left[0]
        quantized[:, j] = nearest(weight[:, j], j)
        error = (weight[:, j] - quantized[:, j]) / inverse[0, 0]
        weight[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return quantized


def nearest_in(grid, p):
    """Nearest level of column j of problem p, as NumPy wants it."""

    def nearest(column, j):
        scale, zero_point = (
            t[p if t.shape[0] > 1 else 0, :, j if t.shape[2] > 1 else 0].numpy() for t in (grid.scale, grid.zero_point)
        )
        scheme = grid.scheme
        return (np.clip(np.round(column / scale) + zero_point, scheme.quant_min, scheme.quant_max) - zero_point) * scale

    return nearest


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.grid == "uniform"], ids=ids)
@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_the_textbooks(scheme, act_order):
    given = problem(scheme)
    found = GPTQ(act_order=act_order, block_size=5).solve(given).values
    for p in range(len(found)):
        hessian = given.hessian[p].numpy()
        order = np.argsort(-np.diag(hessian), kind="stable") if act_order else range(len(hessian))
        wanted = textbook(given.weight[p].numpy(), hessian, nearest_in(given.grid, p), order)
        np.testing.assert_allclose(found[p].numpy(), wanted, atol=1e-9)
    assert not torch.equal(found, given.grid.nearest(given.weight))


def test_the_factor_is_that_of_the_inverse():
    hessian = problem().hessian
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu()) and (factor.diagonal(dim1=1, dim2=2) > 0).all()
    np.testing.assert_allclose((factor.mT @ factor).numpy(), np.linalg.inv(hessian.numpy()), rtol=1e-8, atol=1e-10)


def test_batches_change_nothing():
    given = problem(GROUPS, num_inputs=32)
    found = [GPTQ(block_size=size).solve(given).values for size in (1, 7, 32, 128)]
    assert all(torch.allclose(found[0], other, atol=1e-9) for other in found[1:])


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("act_order", [False, True])
def test_better_than_nearest_rounding_and_on_the_grid(scheme, act_order):
    gains = []
    for seed in range(2):
        given = problem(scheme, seed=seed, num_outputs=8, num_inputs=24, dtype=torch.float32)
        before = given.weight.clone()
        solution = GPTQ(act_order=act_order).solve(given)
        assert solution.scale is None and is_on_grid(solution.values, given.grid)
        assert torch.equal(given.weight, before), "the problem is not the solver's to change"
        nearest = given.grid.nearest(given.weight)
        gains.append(loss(given.weight, solution.values, given.hessian) / loss(given.weight, nearest, given.hessian))
    assert max(gains) < 0.9, gains


def test_without_correlation_it_is_nearest_rounding():
    given = problem()
    given = Problem(given.weight, torch.diag_embed(given.diagonal), given.grid)
    assert torch.equal(GPTQ().solve(given).values, given.grid.nearest(given.weight))


def test_one_input():
    given = problem(num_inputs=1)
    assert torch.equal(GPTQ().solve(given).values, given.grid.nearest(given.weight))
