"""YAQA against plain loops, brute force, GPTQ, and gradients taken one by one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from layer_problems import FP4, GROUPS, SCHEMES, SIGNED3, UNSIGNED3, all_levels, ids, is_on_grid, problem
from tiny_detectors import DecodeOnly, cell_teacher
from torch import nn
from torch.nn import functional as F

import dfq
from dfq.algorithms._likelihood import output_moments
from dfq.algorithms.gptq import GPTQ
from dfq.algorithms.yaqa import YAQA, descend, feed_back
from dfq.errors import UserError
from dfq.scheme import FLOAT, Scheme, TensorScheme


def two_sided(scheme=SIGNED3, num_problems=2, num_outputs=5, num_inputs=12, seed=0, dtype=torch.float64):
    """A layer problem with outputs whose errors can make up for each other."""
    given = problem(scheme, num_problems, num_outputs, num_inputs, seed, dtype=dtype)
    rng = torch.Generator().manual_seed(seed + 2)
    mix = torch.randn(num_problems, num_outputs, num_outputs, generator=rng, dtype=dtype)
    unit = torch.eye(num_outputs, dtype=dtype)
    return replace(given, output=mix @ mix.mT + 0.1 * unit)


def cost(given, values):
    """tr(G E H E^T) of each problem, by the Kronecker product itself."""
    found = []
    for g, h, error in zip(given.output, given.hessian, values - given.weight, strict=True):
        flat = error.double().numpy().flatten()
        found.append(flat @ np.kron(g.double().numpy(), h.double().numpy()) @ flat)
    return np.array(found)


def one_by_one(given):
    """Entries in turn, each at the level that its term asks for, from factors of the whole Kronecker product."""
    values = given.weight.numpy().copy()
    every = all_levels(given.grid, values.shape)
    for p, (g, h, weight) in enumerate(zip(given.output, given.hessian, given.weight.numpy(), strict=True)):
        rows, columns = g.diagonal().argsort(stable=True).numpy(), h.diagonal().argsort(stable=True).numpy()
        order = [(i, j) for i in rows for j in columns]
        flat = np.array([i * h.shape[0] + j for i, j in order])
        whole = np.kron(g.numpy(), h.numpy())[np.ix_(flat, flat)]
        lower = np.linalg.cholesky(whole)
        lower = lower / lower.diagonal()
        error = np.zeros(len(order))
        for k in reversed(range(len(order))):
            i, j = order[k]
            wanted = weight[i, j] - lower[k + 1 :, k] @ error[k + 1 :]
            values[p, i, j] = every[p, i, j, np.abs(every[p, i, j] - wanted).argmin()]
            error[k] = values[p, i, j] - weight[i, j]
    return values


@pytest.mark.parametrize("scheme", [SIGNED3, UNSIGNED3, GROUPS, FP4], ids=ids)
@pytest.mark.parametrize("shape", [(5, 12), (7, 4), (1, 8)], ids=str)
def test_errors_are_fed_back_as_the_whole_product_says(scheme, shape):
    given = two_sided(scheme, num_outputs=shape[0], num_inputs=shape[1])
    np.testing.assert_allclose(feed_back(given).numpy(), one_by_one(given), atol=1e-9)


@pytest.mark.parametrize("scheme", [SIGNED3, GROUPS], ids=ids)
def test_without_output_moments_it_is_gptq(scheme):
    """With G = 1 the factors of one side are left, and what GPTQ feeds back."""
    given = problem(scheme)
    mine, theirs = YAQA(sweeps=0).solve(given).values, GPTQ().solve(given).values
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("shape", [(6, 24), (24, 8), (12, 12)], ids=str)
def test_the_objective_never_rises_over_sweeps(scheme, shape):
    given = two_sided(scheme, num_outputs=shape[0], num_inputs=shape[1], seed=3)
    values, rng = feed_back(given), torch.Generator().manual_seed(0)
    costs = [cost(given, values)]
    for _ in range(6):
        descend(given, values, rng)
        assert is_on_grid(values, given.grid)
        costs.append(cost(given, values))
    assert all((after <= before * (1 + 1e-9)).all() for before, after in itertools.pairwise(costs))
    assert costs[-1].sum() < costs[0].sum()
    nearest = given.grid.nearest(given.weight)
    assert costs[-1].sum() < 0.8 * cost(given, nearest).sum()


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (3, 3)], ids=str)
def test_a_sweep_ends_where_no_entry_alone_can_gain(shape):
    given = two_sided(TensorScheme(2, True, "per_channel"), num_outputs=shape[0], num_inputs=shape[1], seed=5)
    values, rng = feed_back(given), torch.Generator().manual_seed(0)
    for _ in range(20):
        descend(given, values, rng)
    least = cost(given, values)
    every = all_levels(given.grid, values.shape)
    for p, i, j in itertools.product(*map(range, values.shape)):
        for level in every[p, i, j]:
            other = values.clone()
            other[p, i, j] = float(level)
            assert cost(given, other)[p] >= least[p] * (1 - 1e-9)


def test_it_is_near_the_best_of_all_roundings():
    scheme = TensorScheme(2, True, "per_channel")
    ratios = []
    for seed in range(10):
        given = two_sided(scheme, num_problems=1, num_outputs=2, num_inputs=3, seed=seed)
        every = all_levels(given.grid, given.weight.shape)[0].reshape(6, -1)
        best = min(
            cost(given, torch.tensor(levels, dtype=torch.float64).view(1, 2, 3))[0]
            for levels in itertools.product(*every)
        )
        # Damping is part of what is minimized.
        given_cost = cost(given, YAQA(output_damping=0.0).solve(given).values)[0]
        assert given_cost >= best * (1 - 1e-9)
        ratios.append(given_cost / best)
    assert np.median(ratios) < 1.05


def test_the_problem_is_not_the_solvers_to_change():
    given = two_sided(dtype=torch.float32)
    before = given.weight.clone(), given.hessian.clone(), given.output.clone()
    solution = YAQA().solve(given)
    assert solution.scale is None and is_on_grid(solution.values, given.grid)
    assert all(map(torch.equal, before, (given.weight, given.hessian, given.output)))
    assert torch.equal(solution.values, YAQA().solve(given).values)


class Grouped(nn.Module):
    """A grouped convolution, a layer that runs twice, one that is written into, and one that nothing depends on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
        self.twice = nn.Conv2d(6, 6, 1)
        self.idle = nn.Linear(6, 4)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = F.relu_(self.conv(x))
        x = self.twice(torch.tanh(self.twice(x))).mean((2, 3))
        return self.head(x) + 0 * self.idle(x).detach().sum()


def test_output_moments_are_those_of_gradients_taken_one_by_one():
    torch.manual_seed(0)
    net = Grouped().eval().requires_grad_(False)
    teacher = dfq.load_teacher(
        net, task="classification", input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, device="cpu"
    )
    x = torch.randn(5, 3, 8, 8)
    groups = {"conv": 3, "twice": 1, "idle": 1, "head": 1}
    found = output_moments(net, teacher, x, groups, 2, torch.Generator().manual_seed(1))
    assert found.keys() == {"conv", "twice", "head"}, "idle has no gradient"

    labels = []  # those that the same generator draws in batches of two
    rng = torch.Generator().manual_seed(1)
    for batch in x.split(2):
        labels += torch.multinomial(net(batch).softmax(-1), 1, generator=rng)[:, 0].tolist()
    wanted = {"conv": torch.zeros(3, 2, 2), "twice": torch.zeros(1, 6, 6), "head": torch.zeros(1, 10, 10)}
    for image, label in zip(x, labels, strict=True):
        first = net.conv(image[None]).requires_grad_()
        second = net.twice(F.relu(first))
        third = net.twice(torch.tanh(second))
        logits = net.head(third.mean((2, 3)))
        parts = torch.autograd.grad(logits.log_softmax(-1)[0, label], [first, second, third, logits])
        for place in parts[0][0].flatten(1).T:
            for group in range(3):
                g = place[2 * group : 2 * group + 2]
                wanted["conv"][group] += torch.outer(g, g)
        for part in parts[1:3]:
            for place in part[0].flatten(1).T:
                wanted["twice"][0] += torch.outer(place, place)
        wanted["head"][0] += torch.outer(parts[3][0], parts[3][0])
    for name, moment in wanted.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-8)


def test_it_keeps_what_a_network_says_better_than_one_sided_rounding(tmp_path):
    teacher = dfq.load_teacher("digits", device="cpu")
    dataset = dfq.generate(teacher, "gaussian", 160, tmp_path / "data")
    x = torch.randn(256, *teacher.input_spec.size, generator=torch.Generator().manual_seed(9))
    scheme, kl = Scheme(TensorScheme(3, False, "per_channel"), FLOAT), {}
    for name in ("gptq", "yaqa"):
        student = dfq.quantize(teacher, dataset, scheme, algorithm=name, num_samples=64)
        with torch.no_grad():
            wanted, mine = teacher(x).log_softmax(-1), student(x).log_softmax(-1)
        kl[name] = float(F.kl_div(mine, wanted, reduction="batchmean", log_target=True))
    assert kl["yaqa"] < 0.9 * kl["gptq"], kl


def test_memory_changes_passes_and_no_bit(tmp_path, monkeypatch):
    teacher, calls = dfq.load_teacher("digits", device="cpu"), []
    dataset = dfq.generate(teacher, "gaussian", 32, tmp_path / "data")

    def watched(reference, teacher, images, groups, *others):
        calls.append(list(groups))
        return output_moments(reference, teacher, images, groups, *others)

    monkeypatch.setattr("dfq.algorithms.yaqa.output_moments", watched)
    found = []
    for memory_bytes in (1, 2**31):
        calls.clear()
        student = dfq.quantize(teacher, dataset, "w4a4", algorithm="yaqa", sweeps=0, memory_bytes=memory_bytes)
        found.append([layer.weight for layer in student.layers.values()])
        assert sorted(name for part in calls for name in part) == sorted(student.layers)
        assert len(calls) == (len(student.layers) if memory_bytes == 1 else 1)
    assert all(map(torch.equal, *found))


def test_a_detector_without_class_logits_is_refused(tmp_path):
    teacher = cell_teacher(DecodeOnly)
    dataset = dfq.generate(teacher, "gaussian", 8, tmp_path / "data")
    with pytest.raises(UserError, match=r"without class logits.*yaqa.*\n?.*another algorithm"):
        dfq.quantize(teacher, dataset, "w4a8", algorithm="yaqa")


def test_branches_of_boxes_alone_are_rounded_too(tmp_path):
    """No label depends on the last layer's boxes; with class logits beside them the layer has a moment."""
    teacher = cell_teacher()
    dataset = dfq.generate(teacher, "gaussian", 16, tmp_path / "data")
    student = dfq.quantize(teacher, dataset, "w4a8", algorithm="yaqa")
    for layer in student.layers.values():
        torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight, rtol=0, atol=1e-6)


class InPlace(nn.Module):
    """Writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 10)

    def forward(self, x):
        return self.head(F.relu(self.conv(x.sub_(0.5).mul_(2))).mean((2, 3)))


def test_samples_are_not_the_networks_to_write_into():
    torch.manual_seed(0)
    net, x = InPlace().eval().requires_grad_(False), torch.randn(5, 3, 8, 8)
    teacher = dfq.load_teacher(
        net, task="classification", input_size=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, device="cpu"
    )
    before, found = x.clone(), []
    for _ in range(2):
        found.append(output_moments(net, teacher, x, {"conv": 1, "head": 1}, 2, torch.Generator().manual_seed(1)))
        assert torch.equal(x, before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("conv", "head"))


@pytest.mark.parametrize("dead", [slice(0, 2), slice(0, 4)], ids=["one_group", "all"])
@pytest.mark.parametrize("settings", [{}, {"output_damping": 0.0}], ids=str)
def test_gradients_too_small_for_a_square_are_none(dead, settings):
    """What is sure of its labels has gradients whose products leave the range of float32."""
    given = two_sided(num_problems=4, dtype=torch.float32)
    output = given.output.clone()
    output[dead] *= 1e-41
    assert 0 < float(output[0].diagonal().max()) < torch.finfo(torch.float32).tiny
    values = YAQA(**settings).solve(replace(given, output=output)).values
    alone = YAQA(**settings).solve(replace(given, output=None)).values
    assert is_on_grid(values, given.grid)
    assert (cost(given, values) < cost(given, given.grid.nearest(given.weight))).all() or len(output[dead]) == 4
    rows = [given.objective(found)[dead].sum() for found in (values, alone)]
    assert float(rows[0]) < 1.5 * float(rows[1])


def test_outputs_that_are_no_numbers_are_told(tmp_path):
    teacher = dfq.load_teacher("digits", device="cpu")
    dataset = dfq.generate(teacher, "gaussian", 16, tmp_path / "data")
    list(teacher.module.parameters())[-1].data[0] = float("nan")
    scheme = Scheme(TensorScheme(4, True, "per_channel"), FLOAT)
    with pytest.raises(UserError, match=r"got outputs with NaN.*allowed: numbers; look for"):
        dfq.quantize(teacher, dataset, scheme, algorithm="yaqa")
