"""Mixed precision: the frontier against brute force, measured figures against independent ones, what a user meets."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETS, SPEC, as_teacher, settle
from torch import nn
from torch.nn import functional as F

import dfq
from dfq import mixed_precision as mixed
from dfq import pipeline
from dfq.cli import main
from dfq.errors import UserError
from dfq.report import render
from dfq.scheme import FLOAT, Budget, MixedScheme, Scheme, TensorScheme, read_allocation
from dfq.settings import load, resolve
from dfq.student import Student
from dfq.teacher import Teacher, TokenSpec

W4, W8, A8 = TensorScheme(4, True, "per_channel"), TensorScheme(8, True, "per_channel"), TensorScheme(8)
BITS = (2, 3, 4, 5, 6, 8)


def min_max():
    return [resolve("quantizer", "min_max")] * 2


def make(teacher, dataset, scheme, path, algorithm="round_to_nearest"):
    """(student, its folder, its allocation)"""
    student, path = pipeline.quantize(teacher, dataset, scheme, resolve("algorithm", algorithm), *min_max(), 0, path)
    return student, path, read_allocation(path) if (path / "allocation.json").exists() else None


def rounding_of(teacher, dataset, **settings):
    return mixed.prepare(MixedScheme(**{"weight": W4, **settings}), teacher, dataset, *min_max())


def six():
    """Six weight layers of different sizes and numbers of multiply-accumulates, no two alike."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.Conv2d(6, 10, 1, stride=2),
        nn.ReLU(),
        nn.Conv2d(10, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 14),
        nn.ReLU(),
        nn.Linear(14, 10),
    )


# ------------------------------------------------------------------------------------------------ the frontier


def brute_force(costs, harms):
    """All sums, first layer first: (cost, harm) of every combination."""
    total, harm = np.zeros(1), np.zeros(1)
    for c, h in zip(costs, harms, strict=True):
        total, harm = np.add.outer(total, c).ravel(), np.add.outer(harm, h).ravel()
    return total, harm


def non_dominated(total, harm):
    points = sorted(set(zip(total.tolist(), harm.tolist(), strict=True)))
    best, found = math.inf, []
    for cost, value in points:
        if value < best:
            best = value
            found.append((cost, value))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_frontier_is_that_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    num_layers, ties = int(rng.integers(1, 7)), seed % 3 == 0
    sizes = rng.integers(1, 5, num_layers)
    if ties:  # small whole numbers: many allocations are equal in one respect or both
        costs, harms = ([rng.integers(0, 6, n).astype(float) for n in sizes] for _ in range(2))
    else:
        costs = [rng.integers(1, 10**6, n).astype(float) for n in sizes]
        harms = [rng.random(n) * 10.0 ** rng.integers(-6, 1) for n in sizes]
    frontier = mixed.pareto_frontier(costs, harms)
    assert list(zip(frontier.costs, frontier.sensitivities, strict=True)) == non_dominated(*brute_force(costs, harms))
    assert (np.diff(frontier.costs) > 0).all() and (np.diff(frontier.sensitivities) < 0).all()
    for index in range(len(frontier.costs)):  # and each point is what its choices add up to
        choices = frontier.choices(index)
        assert sum(c[i] for c, i in zip(costs, choices, strict=True)) == frontier.costs[index]
        assert sum(h[i] for h, i in zip(harms, choices, strict=True)) == pytest.approx(frontier.sensitivities[index])


@pytest.mark.parametrize("seed", range(10))
def test_the_best_point_within_any_budget(seed):
    rng = np.random.default_rng(100 + seed)
    costs = [rng.integers(1, 30, 3).astype(float) for _ in range(5)]
    harms = [rng.random(3) for _ in range(5)]
    total, harm = brute_force(costs, harms)
    frontier = mixed.pareto_frontier(costs, harms)
    for limit in [*range(int(total.min()) - 2, int(total.max()) + 3), total.min(), total.min() - 1e-9, math.inf]:
        index = frontier.best_within(limit)
        if limit < total.min():
            assert index is None
        else:
            assert index is not None and frontier.sensitivities[index] == harm[total <= limit].min()


def test_a_real_network_of_six_layers_against_brute_force(make_dataset):
    """Three choices for each weight and three for each input: 531,441 allocations under a budget of bit operations."""
    teacher = as_teacher(six())
    budget = Budget(bops=1.0)  # which one does not matter yet
    rounding = rounding_of(
        teacher, make_dataset(teacher), budget=budget, weight_bits=[2, 4, 8], activation_bits=[3, 5, 8]
    )
    mixed.sensitivity(rounding)
    units = rounding.units
    assert [len(unit.choices) for unit in units] == [9] * 6
    costs = [[unit.cost(choice, "bops", {}) for choice in unit.choices] for unit in units]
    harms = [[unit.sensitivity(choice) for choice in unit.choices] for unit in units]
    total, harm = brute_force(costs, harms)
    assert len(total) == 9**6
    for share in (0.1, 0.14, 0.2, 0.35, 0.5, 0.9):
        limit = float(share * total.max())
        frontier, index = mixed.allocate(units, mixed.Costs("bops"), limit)
        assert frontier.sensitivities[index] == harm[total <= limit].min()
        assert frontier.costs[index] <= limit
    best = np.minimum.accumulate(harm[np.lexsort((harm, total))])
    assert len(frontier.costs) == len(np.unique(best))


# ------------------------------------------------------------------------------------------------ what is measured


def plain_kl(output, target):
    p, q = (torch.log_softmax(x.double(), 1).numpy() for x in (target, output))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def test_sensitivity_of_a_weight_is_what_rounding_it_alone_does(make_teacher, make_dataset):
    """By hand, on the float network: one weight rounded per channel, its output's mean put back, KL and noise."""
    teacher = make_teacher("bare")
    dataset = make_dataset(teacher)
    x = dataset.tensors()["images"][dataset.split()[0]]
    found = {}
    for measure in ("kl", "sqnr"):
        rounding = rounding_of(teacher, dataset)
        mixed.sensitivity(rounding, measure)
        found[measure] = rounding.units[1].weight
    assert rounding.units[1].names == ["2"]
    first, _, layer, *rest = teacher.module
    for bits in BITS:
        step = layer.weight.abs().amax((1, 2, 3), keepdim=True) / (2 ** (bits - 1) - 1)
        weight = (layer.weight / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
        inner = first(x).relu()
        output = F.conv2d(inner, weight, layer.bias)
        output = output + (layer(inner) - output).mean((0, 2, 3), keepdim=True)
        output, target = nn.Sequential(*rest)(output), teacher(x)
        scheme = replace(W4, num_bits=bits)
        assert found["kl"][scheme] == pytest.approx(plain_kl(output, target), rel=1e-3, abs=1e-8)
        noise = float((output - target).square().sum() / target.square().sum())
        assert found["sqnr"][scheme] == pytest.approx(noise, rel=1e-3)
    assert list(found["kl"].values()) == sorted(found["kl"].values(), reverse=True)


def test_sensitivity_of_an_input(make_teacher, make_dataset):
    teacher = make_teacher("mlp")
    dataset = make_dataset(teacher)
    x = dataset.tensors()["images"][dataset.split()[0]].flatten(1)
    rounding = rounding_of(teacher, dataset, budget=Budget(bops=1.0), activation_bits=[2, 4])
    mixed.sensitivity(rounding)
    _, linear, norm, _, head = teacher.module
    inner = norm(linear(x)).relu()
    for bits in (2, 4):
        step = inner.max() / (2**bits - 1)
        output = head((inner / step).round() * step)
        output = output + (head(inner) - output).mean(0)
        found = rounding.units[1].activation[TensorScheme(bits)]
        assert found == pytest.approx(plain_kl(output, head(inner)), rel=1e-3)


def test_curvature_is_the_mean_of_the_exact_hessians_diagonal(make_dataset):
    teacher = as_teacher(nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Tanh(), nn.Linear(3, 10)))
    dataset = make_dataset(teacher, num_samples=9)
    rounding = rounding_of(teacher, dataset, budget=Budget(bops=1.0))
    x, (first, last) = rounding.batches[0].flatten(1), (teacher.module[1], teacher.module[3])
    target = teacher(x)

    def loss(logits):
        return F.kl_div(logits.log_softmax(1), target.softmax(1), reduction="batchmean")

    inner = torch.tanh(first(x)).detach()
    exact = {
        "1": torch.autograd.functional.hessian(
            lambda w: loss(last(torch.tanh(F.linear(x, w, first.bias)))), first.weight
        ),
        "3": torch.autograd.functional.hessian(lambda w: loss(F.linear(inner, w, last.bias)), last.weight),
        "3.input_quantizer": torch.autograd.functional.hessian(lambda h: loss(last(h)), inner),
    }
    found = mixed.curvature(rounding, seed=0, num_probes=800)
    for name, hessian in exact.items():
        size = math.prod(hessian.shape[: hessian.dim() // 2])
        trace = hessian.reshape(size, size).diagonal().sum()
        assert found[name] == pytest.approx(float(trace) / size, rel=0.15), name
    few = [mixed.curvature(rounding, seed, num_probes=4) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert not any(p.requires_grad for p in rounding.student.module.parameters())


def test_second_order_sensitivity_is_near_the_measured_one_where_errors_are_small(make_teacher, make_dataset):
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher)
    found = {}
    for measure in ("kl", "hessian"):
        rounding = rounding_of(teacher, dataset, budget=Budget(bops=1.0), weight_bits=[4, 6], activation_bits=[4, 6])
        mixed.sensitivity(rounding, measure)
        found[measure] = [
            v for unit in rounding.units for part in (unit.weight, unit.activation) for v in part.values()
        ]
    kl, hessian = (torch.tensor(found[name]).log() for name in ("kl", "hessian"))
    assert float(torch.corrcoef(torch.stack([kl, hessian]))[0, 1]) > 0.9
    assert float((kl - hessian).abs().median()) < math.log(3)


# ------------------------------------------------------------------------------------------------ what it costs


def test_bit_operations_and_macs_by_hand(make_dataset):
    teacher = as_teacher(six())
    rounding = rounding_of(teacher, make_dataset(teacher), budget=Budget(bops=1.0))
    macs = [64 * 6 * 27, 64 * 6 * 9, 16 * 10 * 6, 4 * 8 * 45, 32 * 14, 14 * 10]
    assert [unit.macs[unit.name] for unit in rounding.units] == macs
    choice = (replace(W4, num_bits=3), TensorScheme(5))
    assert [unit.cost(choice, "bops", {}) for unit in rounding.units] == [15 * count for count in macs]
    assert [unit.cost(choice, "size_bytes", {}) for unit in rounding.units] == [61, 21, 23, 135, 168, 53]
    assert rounding.units[0].cost((FLOAT, FLOAT), "bops", {}) == macs[0] * 32 * 32


def test_macs_of_transposed_convolutions_tokens_and_layers_that_run_twice(make_dataset):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.again = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Conv2d(4, 4, 3, padding=1)
            self.token, self.head = nn.Linear(256, 5), nn.Linear(20, 10)

        def forward(self, x):
            return self.head(self.token(self.again(self.again(self.up(x)).relu()).flatten(2)).flatten(1))

    teacher = as_teacher(Odd())
    units = rounding_of(teacher, make_dataset(teacher), budget=Budget(bops=1.0)).units
    assert [unit.macs[unit.name] for unit in units] == [64 * 3 * 16, 2 * 256 * 16 * 9, 4 * 256 * 5, 200]


@pytest.mark.parametrize("policy", ["all", "edges_8bit", "hardware"])
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_the_size_is_that_of_the_file(kind, policy, make_teacher, make_dataset, tmp_path):
    teacher = make_teacher(kind)
    scheme = MixedScheme(W4, A8, policy)
    _, path, found = make(teacher, make_dataset(teacher), scheme, tmp_path / "s")
    size = (path / "student.safetensors").stat().st_size
    assert found["size_bytes"] == size
    assert size <= found["cost"] <= size * 1.01
    # No budget: as many bytes as without mixing.
    _, uniform, nothing = make(teacher, make_dataset(teacher, name="b"), Scheme(W4, A8, policy), tmp_path / "u")
    assert nothing is None
    size = (uniform / "student.safetensors").stat().st_size
    assert size <= found["limit"] <= size * 1.01


def test_mean_bits_and_budgets_are_kept(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("plain")
    dataset, last = make_dataset(teacher), math.inf
    for bits in (8, 5.5, 4, 3.2, 2):
        student, _, found = make(teacher, dataset, mixed_scheme(mean_weight_bits=bits), tmp_path / str(bits))
        assert student.mean_weight_bits == pytest.approx(found["mean_weight_bits"]) and found["cost"] <= bits
        assert student.mean_weight_bits <= bits and found["cost"] < last
        last = found["cost"]
        costs = [point["cost"] for point in found["frontier"]]
        assert costs == sorted(costs) and (costs[0], costs[-1]) == (2, 8)
        assert found["kl"] == min(candidate["kl"] for candidate in found["candidates"])
    student, _, found = make(teacher, dataset, mixed_scheme(bops=400_000), tmp_path / "bops")
    bits = {name: (w.num_bits, a.num_bits) for name, (w, a) in student.swap.layers.items()}
    macs = {"0": 64 * 8 * 27, "3": 9 * 12 * 72, "8": 120}
    assert found["bops"] == found["cost"] == sum(macs[name] * w * a for name, (w, a) in bits.items()) <= 400_000
    assert len({a for _, a in bits.values()} | {8}) > 1  # a budget of bit operations changes inputs too


def mixed_scheme(policy="all", **budget):
    return MixedScheme(W4, A8, policy, budget=Budget(**budget))


def test_the_scheme_without_mixing_is_taken_where_it_does_better(make_teacher, make_dataset, monkeypatch, tmp_path):
    teacher = make_teacher("plain")
    figures = mixed.Rounding.figures

    def only_uniform_is_good(self):
        bits = {layer.weight_quantizer.scheme.num_bits for layer in self.layers.values()}
        is_joint = all(layer.weight_quantizer.enabled for layer in self.layers.values())
        return (1e-9, 1e-9) if is_joint and bits == {4} else figures(self)

    monkeypatch.setattr(mixed.Rounding, "figures", only_uniform_is_good)
    scheme = MixedScheme(W4, A8, weight_bits=[2, 3, 4, 5, 8], budget=Budget(mean_weight_bits=4.4))
    student, _, found = make(teacher, make_dataset(teacher), scheme, tmp_path / "s")
    assert found["is_uniform"] and student.mean_weight_bits == 4
    assert sum(candidate["is_uniform"] for candidate in found["candidates"]) == 1


# ------------------------------------------------------------------------------------------------ what stays


def test_edges_overrides_and_hardware_stay(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher)
    edges = mixed_scheme("edges_8bit", bops=1_000_000)
    student, *_ = make(teacher, dataset, edges, tmp_path / "edges")
    schemes = list(student.swap.layers.values())
    assert schemes[0] == schemes[-1] == (W8, A8) and min(w.num_bits for w, _ in schemes) < 8
    own = {
        "3.depth*": {"weight": {"num_bits": 7}},
        "6": {"activation": {"num_bits": 6}, "weight": {"symmetric": False}},
    }
    scheme = replace(mixed_scheme(bops=250_000), overrides=own)
    student, _, found = make(teacher, dataset, scheme, tmp_path / "own")
    assert student.swap.layers["3.depthwise"][0].num_bits == 7
    assert "weight" not in found["overrides"]["3.depthwise"]
    weight, activation = student.swap.layers["6"]
    assert activation.num_bits == 6 and not weight.symmetric and weight.num_bits in BITS
    student, _, found = make(teacher, dataset, mixed_scheme("hardware", bops=400_000), tmp_path / "hardware")
    assert {a.num_bits for _, a in student.swap.layers.values()} == {8}
    assert not any("activation" in parts for parts in found["overrides"].values())
    assert len({w.num_bits for w, _ in student.swap.layers.values()} | {8}) > 1


def test_bits_of_the_networks_input_stay(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("residual")
    scheme = replace(mixed_scheme(bops=250_000), input_bits=7)
    student, _, found = make(teacher, make_dataset(teacher), scheme, tmp_path / "s")
    (name, first), *others = student.swap.layers.items()
    assert first[1].num_bits == 7 and 7 not in {activation.num_bits for _, (_, activation) in others}
    assert "activation" not in found["overrides"][name] and student.scheme.input_bits == 7


def test_hardware_says_that_inputs_stay(make_teacher, make_dataset, tmp_path, capsys):
    teacher = make_teacher("bare")
    make(teacher, make_dataset(teacher), mixed_scheme("hardware", bops=300_000), tmp_path / "s")
    assert "layers share the grids of their inputs, which stay at 8 bits" in capsys.readouterr().err


def test_float_inputs_stay_float(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("bare")
    scheme = MixedScheme(W4, FLOAT, budget=Budget(bops=1_500_000))
    student, _, found = make(teacher, make_dataset(teacher), scheme, tmp_path / "s")
    assert all(a.is_float for _, a in student.swap.layers.values())
    assert found["bops"] == sum(layer["macs"] * layer["weight_bits"] * 32 for layer in found["layers"]) <= 1_500_000


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.hidden = nn.Embedding(13, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 13, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        return self.head(x + self.hidden(x).relu())


@pytest.mark.parametrize("budget", [{"mean_weight_bits": 4}, {"bops": 200_000}])
def test_layers_that_share_a_weight_have_its_bits(budget, make_dataset, tmp_path):
    torch.manual_seed(0)
    teacher = Teacher(Tied(), "language_modeling", TokenSpec(13, 6))
    scheme = replace(mixed_scheme(**budget), skip=())
    student, path, found = make(teacher, make_dataset(teacher), scheme, tmp_path / "s")
    layers = student.swap.layers
    assert layers["tokens"][0] == layers["head"][0] and layers["tokens"][1].is_float
    assert sum(layer["num_weights"] for layer in found["layers"]) == 13 * 16 + 256
    assert {layer["name"]: layer["macs"] for layer in found["layers"]} == {
        "tokens": 0,
        "hidden": 6 * 256,
        "head": 6 * 208,
    }
    assert student.mean_weight_bits == pytest.approx(found["mean_weight_bits"])
    assert found["size_bytes"] == (path / "student.safetensors").stat().st_size


def test_a_layer_that_is_never_called_itself(make_dataset, tmp_path):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(192, 12), nn.Linear(12, 10)

        def forward(self, x):
            return F.linear(self.body(x.flatten(1)).relu(), self.head.weight, self.head.bias)

    teacher = as_teacher(Owner())
    _, _, found = make(teacher, make_dataset(teacher), mixed_scheme(bops=60_000), tmp_path / "s")
    assert {layer["name"]: layer["macs"] for layer in found["layers"]} == {"body": 2304, "head": 120}
    assert len(found["layers"][1]["weight_sensitivity"]) == len(found["layers"][1]["activation_sensitivity"]) == 6
    assert found["layers"][1]["weight_sensitivity"]["2"] > found["layers"][1]["weight_sensitivity"]["8"] > 0
    assert found["bops"] <= 60_000


def test_names_that_look_like_patterns(make_dataset, tmp_path):
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    parts = nn.ModuleDict({"conv[0]": first, "conv0": second, "*": nn.Linear(128, 10)})

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = parts

        def forward(self, x):
            return self.parts["*"](self.parts["conv0"](self.parts["conv[0]"](x).relu()).flatten(1))

    teacher = as_teacher(Named())
    student, _, found = make(teacher, make_dataset(teacher), mixed_scheme(mean_weight_bits=4.5), tmp_path / "s")
    assert [w.num_bits for w, _ in student.swap.layers.values()] == [layer["weight_bits"] for layer in found["layers"]]


# ------------------------------------------------------------------------------------------------ mistakes


def message(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


@pytest.mark.parametrize(
    "budget, least",
    [
        ({"mean_weight_bits": 1.9}, "got budget.mean_weight_bits=1.9; allowed: at least 2 bits a weight"),
        ({"bops": 1000}, "got budget.bops=1000; allowed: at least 86880 bit operations"),
        ({"size_bytes": 1000}, "got budget.size_bytes=1000; allowed: at least 1700 bytes"),
    ],
)
def test_a_budget_that_is_too_small_is_told_the_least(budget, least, make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher)
    end = ", the least that this network's choices cost; allow more, or fewer bits in scheme.weight_bits"
    assert message(make, teacher, dataset, mixed_scheme(**budget), tmp_path / "s") == least + end
    assert not (tmp_path / "s").exists()
    [kind], [least] = budget, re.findall(r"at least (\S+)", least)
    _, _, found = make(teacher, dataset, mixed_scheme(**{kind: float(least)}), tmp_path / "t")  # and that is enough
    assert {layer["weight_bits"] for layer in found["layers"]} == {2}
    assert {layer["activation_bits"] for layer in found["layers"]} == ({2} if kind == "bops" else {8})


NUMBERS = "whole numbers that go with scheme.weight"


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"budget": {"size_byte": 5}}, "got budget.size_byte; allowed: budget.size_bytes, budget.mean_weight_bits, "),
        ({"budget": {"size_bytes": 0}}, "got budget.size_bytes=0; allowed: a number > 0"),
        ({"budget": {"size_bytes": "5MB"}}, "got budget.size_bytes='5MB'; allowed: a number > 0"),
        (
            {"budget": {"size_bytes": 5, "bops": 7}},
            "got budget.size_bytes=5 and budget.bops=7; allowed: one of them; leave one away",
        ),
        ({"budget": 5}, "got budget=5; allowed: a mapping with size_bytes, mean_weight_bits, bops, latency_ms"),
        ({"measure": "kll"}, "got scheme.measure='kll'; allowed: kl | sqnr | hessian; did you mean 'kl'?"),
        ({"num_samples": 0}, "got scheme.num_samples=0; allowed: a whole number >= 1"),
        ({"weight_bits": []}, "got scheme.weight_bits=[]; allowed: a list of whole numbers [2,3,4,8]"),
        ({"weight_bits": 4}, "got scheme.weight_bits=4; allowed: a list of whole numbers [2,3,4,8]"),
        (
            {"weight_bits": [2, 9]},
            f"got scheme.weight_bits=[2, 9], of which 9 is not allowed; allowed: {NUMBERS} (1 to 8)",
        ),
        ({"weight_bits": [2.5]}, f"got scheme.weight_bits=[2.5], of which 2.5 is not allowed; allowed: {NUMBERS}"),
        ({"activation_bits": [1]}, "got scheme.activation_bits=[1], of which 1 is not allowed"),
        (
            {"weight": {"grid": "ternary"}, "budget": {}},
            "got scheme.weight.grid=ternary, which has bits of its own, to be mixed; allowed: uniform | seq",
        ),
        ({"meassure": "kl", "budget": {}}, "got scheme.meassure; allowed: scheme.weight, "),
        ({"budget": {"latency_table": {}}}, "got budget.latency_table without budget.latency_ms; allowed: both"),
        (
            {"allocation": "nowhere.json"},
            "got scheme.allocation=nowhere.json, which can't be read; allowed: the allocation",
        ),
        (
            {"allocation": "nowhere.json", "budget": {"bops": 5}},
            "got scheme.allocation and a budget; allowed: one of the two; leave one away",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_mistakes_in_a_mixed_scheme(values, expected):
    assert message(Scheme.from_dict, values).startswith(expected)


def test_an_allocation_that_is_none(tmp_path):
    path = tmp_path / "a.json"
    end = "allowed: the allocation.json of a student made with scheme=mixed"
    for content, what in [("{", "is no json"), ("[]", "holds no json object"), ('{"format": "other"}', "is none")]:
        path.write_text(content)
        text = message(Scheme.from_dict, {"allocation": str(path)})
        assert text.startswith(f"got scheme.allocation={path}, which {what}") and text.endswith(end)


def test_a_scheme_that_leaves_nothing_to_choose(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("mlp")
    text = message(make, teacher, make_dataset(teacher), mixed_scheme("edges_8bit"), tmp_path / "s")
    assert text.startswith("got a mixed scheme that leaves nothing to choose in mlp; allowed: two or more ")


def test_what_makes_a_scheme_a_mixed_one():
    yaml = load("scheme", "mixed")
    scheme = Scheme.from_dict(yaml)
    assert isinstance(scheme, MixedScheme) and scheme == MixedScheme(W4, A8)
    assert Scheme.from_dict(scheme.to_dict()) == scheme and scheme.name == "mixed"
    json.dumps(scheme.to_dict())
    assert yaml.keys() >= {"budget", "weight_bits", "activation_bits", "measure", "num_samples", "num_candidates"}
    other = Scheme.from_dict({**load("scheme", "w3a3"), "budget": {"mean_weight_bits": 3}})
    assert isinstance(other, MixedScheme) and other.weight.num_bits == 3
    for name in ("w4a4", "w4a16_g128"):
        assert type(Scheme.from_dict(load("scheme", name))) is Scheme


# ------------------------------------------------------------------------------------------------ latency


TABLE = {
    "0": {"8x8": 1.0, "4x8": 0.7, "3x3": 0.1, "float": 3.0},
    "2": {"8": 2.0, "4": 1.5, "float": 5.0},
    "6": {"8x8": 0.1, "float": 0.2},
}


@pytest.mark.parametrize(
    "limit, expected",
    [
        (2.3, ["4x8", "4x8", "8x8"]),
        (3.1, ["8x8", "8x8", "8x8"]),
        (3.2, ["8x8", "8x8", "float"]),
        (8.2, ["float", "float", "float"]),
    ],
)
def test_a_latency_table_decides(limit, expected, make_teacher, make_dataset, tmp_path):
    teacher, path = make_teacher("bare"), tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    scheme = MixedScheme(
        W4, A8, weight_bits=[4, 8], activation_bits=[8], budget=Budget(latency_ms=limit, latency_table=str(path))
    )
    plain, found = mixed.resolve(scheme, teacher, make_dataset(teacher), *min_max())
    bits = [plain.for_layer(False, name) for name in TABLE]
    assert ["float" if w.is_float else f"{w.num_bits}x{a.num_bits}" for w, a in bits] == expected
    assert found["cost"] == pytest.approx(limit) and found["limit"] == limit


@pytest.mark.parametrize(
    "limit, change, expected",
    [
        (1.0, {}, "got budget.latency_ms=1; allowed: at least 2.3 ms, the least that this network's choices cost"),
        (
            9.0,
            {"2": None},
            "got budget.latency_table without 2; allowed: 0, 2, 6; give a row for every quantized layer",
        ),
        (
            9.0,
            {"2": {"3x3": 1.0}},
            "got budget.latency_table with 3x3 for 2; allowed: 4x8, 8x8; "
            "these are the bits of weights x inputs that the scheme lets this layer have",
        ),
    ],
)
def test_a_latency_table_that_does_not_go_with_the_network(
    limit, change, expected, make_teacher, make_dataset, tmp_path
):
    teacher = make_teacher("bare")
    table = {name: row for name, row in (TABLE | change).items() if row}
    budget = Budget(latency_ms=limit, latency_table=table)
    scheme = MixedScheme(W4, A8, weight_bits=[4, 8], activation_bits=[8], budget=budget)
    assert message(mixed.resolve, scheme, teacher, make_dataset(teacher), *min_max()).startswith(expected)


@pytest.mark.parametrize("policy", ["all", "hardware"])
def test_latency_that_is_measured(policy, make_teacher, make_dataset):
    """Each layer alone goes to the exporter once, at 8 bits, with what it takes in the network."""

    class Timer:
        suffix = ".timer"
        seen = []

        def export(self, student, path, teacher, images):
            with torch.no_grad():
                assert torch.isfinite(student(images)).all() and student(images).shape == teacher(images).shape
            [(name, schemes)] = student.swap.layers.items()
            self.seen.append((student.layers[name].weight.shape, teacher.module.shape, *schemes))
            return {"latency_ms": {"float": 2.0, "quantized": 1.0}}

    timer = Timer()
    timer.seen.clear()
    teacher = as_teacher(
        nn.Sequential(
            nn.Conv2d(3, 3, 3, padding=1),
            nn.ReLU(),
            *NETS["bare"](),
        ),
        name="timed",
    )
    teacher.module.insert(0, nn.Conv2d(3, 3, 3, padding=1))
    scheme = MixedScheme(W4, A8, policy, budget=Budget(latency_ms=6.5))
    plain, found = mixed.resolve(scheme, teacher, make_dataset(teacher), *min_max(), exporter=timer)
    assert [tuple(shape) for shape, *_ in timer.seen] == [(3, 3, 3, 3), (8, 3, 3, 3), (8, 8, 3, 3), (10, 8)]
    assert [shape for _, shape, *_ in timer.seen] == [(3, 8, 8), (3, 8, 8), (8, 6, 6), (8,)]
    assert {(weight, activation) for _, _, weight, activation in timer.seen} == {(W8, A8)}
    floats = [w.is_float for w, _ in (plain.for_layer(False, layer["name"]) for layer in found["layers"])]
    assert len(floats) == 5 and sum(floats) == 1 and found["cost"] == 6.0


def test_no_table_and_nothing_to_measure_with(make_teacher, make_dataset):
    teacher = make_teacher("bare")
    text = message(mixed.resolve, mixed_scheme(latency_ms=1.0), teacher, make_dataset(teacher), *min_max())
    assert text.startswith("got budget.latency_ms without budget.latency_table, and nothing to measure with; allowed: ")


def test_latency_tables_that_are_none(tmp_path):
    for table in ({"conv": {"8y8": 1.0}}, {"conv": {"8": -1}}, {"conv": 5}, {"conv": {"8": "fast"}}):
        (tmp_path / "t.json").write_text(json.dumps(table))
        for given in (table, str(tmp_path / "t.json")):
            text = message(Budget, latency_ms=1.0, latency_table=given)
            assert text.startswith("got budget.latency_table with conv: ") and "bits of weights" in text


# ------------------------------------------------------------------------------------------------ saved and used again


def test_an_allocation_used_again_gives_the_same_student(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher)
    scheme = mixed_scheme("edges_8bit", bops=1_000_000)
    student, path, found = make(teacher, dataset, scheme, tmp_path / "first")
    assert type(student.scheme) is Scheme and student.scheme.name == "mixed"
    for allocation in (path, path / "allocation.json"):
        config = {**load("scheme", "mixed"), "policy": "edges_8bit", "allocation": str(allocation)}
        other, _, kept = make(teacher, dataset, Scheme.from_dict(config), tmp_path / f"again_{allocation.name}")
        assert other.scheme == student.scheme and other.sha256 == student.sha256
        assert kept == found and other.settings["scheme"] == student.scheme.to_dict()
    # Other bits than those it says: it is no picture of this student, but can be used again.
    own = {"6": {"weight": {"num_bits": 7}}}
    config = {**load("scheme", "mixed"), "policy": "edges_8bit", "allocation": str(path)}
    other, _, kept = make(teacher, dataset, Scheme.from_dict(config | {"overrides": own}), tmp_path / "other")
    assert kept == {"format": "dfq.allocation", "overrides": other.scheme.overrides}
    config["allocation"] = str(tmp_path / "other")
    assert make(teacher, dataset, Scheme.from_dict(config), tmp_path / "third")[0].sha256 == other.sha256
    in_python = MixedScheme(W4, A8, "edges_8bit", allocation=str(path))
    assert mixed.resolve(in_python, teacher, dataset, *min_max()) == (student.scheme, found)
    loaded = Student.load(path, teacher)
    assert loaded.scheme == student.scheme and loaded.sha256 == student.sha256
    x = dataset.tensors()["images"]
    assert torch.equal(loaded(x), student(x))
    # The same run again loads; another seed of nothing that counts gives the same allocation.
    assert make(teacher, dataset, scheme, tmp_path / "first")[0].sha256 == student.sha256
    assert make(teacher, dataset, scheme, tmp_path / "second")[2] == found


def test_an_interrupted_run_keeps_its_allocation(make_teacher, make_dataset, tmp_path, monkeypatch):
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher)
    rtn = resolve("algorithm", "round_to_nearest")

    class Interrupted:
        def quantize(self, *arguments):
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "to_config", lambda method: {"_target_": "a.b"})
    monkeypatch.setattr(pipeline, "code_record", lambda *methods: "the same")
    arguments = (teacher, dataset, mixed_scheme(mean_weight_bits=3.5))
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(*arguments, Interrupted(), *min_max(), 0, tmp_path / "s")
    [kept] = (tmp_path / "s").rglob("allocation.json")
    bits = read_allocation(kept)["overrides"]
    monkeypatch.setattr(mixed, "resolve", None)
    student, path = pipeline.quantize(*arguments, rtn, *min_max(), 0, tmp_path / "s")
    assert read_allocation(path)["overrides"] == bits and student.scheme.overrides == bits
    assert sorted(file.name for file in path.iterdir()) == ["allocation.json", "student.json", "student.safetensors"]


@pytest.mark.parametrize("seed, share", [(0, 1.0), (1, 1.0), (2, 0.5)])
def test_mixed_is_never_worse_than_uniform_at_its_size(seed, share, make_dataset, tmp_path):
    """By KL on samples that no choice was made on, no byte more; where layers differ much it is far better."""
    network = six()
    settle(network, seed=seed)
    with torch.no_grad():
        for small in (network[2], network[4]):  # an outlier in each channel: few weights, and hard to round
            small.weight.flatten(1)[:, 0] *= 6
    teacher = Teacher(network, "classification", SPEC)
    dataset = make_dataset(teacher, num_samples=128, batch_size=128)
    x = settle(NETS["bare"](), seed=9, num_samples=256)
    kl, sizes = {}, {}
    for name, kind in (("uniform", Scheme), ("mixed", MixedScheme)):
        student, path, found = make(teacher, dataset, kind(W4, A8), tmp_path / name)
        kl[name], sizes[name] = plain_kl(student(x), teacher(x)), (path / "student.safetensors").stat().st_size
    assert sizes["mixed"] <= sizes["uniform"] + 8  # the header is padded to 8 bytes
    assert kl["mixed"] <= share * kl["uniform"] and found["is_uniform"] == (share == 1)


def test_in_python(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("plain")
    dataset, quick = make_dataset(teacher), {"algorithm": "round_to_nearest", "weight_quantizer": "min_max"}
    student = dfq.quantize(teacher, dataset, "w4a8", budget={"mean_weight_bits": 3.5}, **quick)
    assert student.mean_weight_bits <= 3.5 and student.scheme.name == "mixed"
    assert message(dfq.quantize, teacher, dataset, "w4a8", budget="10min", **quick).startswith(
        "got algorithm.budget='10min'"
    )


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a dataset of the digits and a student of mixed precision were made by the command line."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["generate", "generator=gaussian", "num_samples=40", "dataset_dir=data"]) == 0
        assert main([*QUANTIZE, "scheme=mixed", "budget.mean_weight_bits=4", *QUICK, "student_dir=mixed"]) == 0
    return folder


QUANTIZE = ["quantize", "dataset_dir=data", "algorithm=round_to_nearest", "weight_quantizer=min_max"]
QUICK = ["scheme.num_samples=16", "scheme.num_candidates=3", "scheme.weight_bits=[2,4,8]"]


def test_quantize_from_the_command_line(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found, manifest = read_allocation("mixed"), json.loads(Path("mixed/student.json").read_text())
    assert found["budget"] == "mean_weight_bits" and found["limit"] == 4 and found["num_samples"] == 16
    assert manifest["mean_weight_bits"] == pytest.approx(found["mean_weight_bits"]) and found["cost"] <= 4
    assert manifest["size_bytes"] == found["size_bytes"]
    assert manifest["settings"]["scheme"]["budget"]["mean_weight_bits"] == 4  # what was asked for
    bits = {name: layer["weight"]["num_bits"] for name, layer in manifest["layers"].items()}
    assert bits == {layer["name"]: layer["weight_bits"] for layer in found["layers"]} and set(bits.values()) <= {
        2,
        4,
        8,
    }


def test_an_allocation_on_the_command_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main([*QUANTIZE, "scheme=mixed", "scheme.allocation=mixed", "student_dir=again"]) == 0
    for file in ("student.safetensors", "allocation.json"):
        assert Path("again", file).read_bytes() == Path("mixed", file).read_bytes()
    assert main(["evaluate", "student_dir=again", "evaluation=none", "hydra.run.dir=report_again"]) == 0
    assert '<svg class="chart allocation"' in Path("report_again/report.html").read_text()
    capsys.readouterr()
    assert main([*QUANTIZE, "scheme=mixed", "scheme.allocation=mixd"]) == 2
    assert capsys.readouterr().err.startswith("dfq: got scheme.allocation=mixd, which can't be read; allowed: ")


def test_the_report_shows_the_allocation(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["evaluate", "student_dir=mixed", "evaluation=none", "hydra.run.dir=report"]) == 0
    details = json.loads(Path("report/details.json").read_text())
    assert details["allocation"] == read_allocation("mixed")
    page = Path("report/report.html").read_text()
    for wanted in ("Mixed precision", "bits of weights", "Frontier", "<polyline", "bits a weight"):
        assert wanted in page
    [chart] = re.findall(r'<svg class="chart allocation".*?</svg>', page, re.DOTALL)
    layers = details["allocation"]["layers"]
    assert chart.count('<rect class="bar"') == len(layers) and all(
        f"{layer['name']}: weights" in chart for layer in layers
    )
    [chart] = re.findall(r'<svg class="chart frontier".*?</svg>', page, re.DOTALL)
    [line] = re.findall('<polyline points="([^"]*)"', chart)
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert len(points) == len(details["allocation"]["frontier"])
    assert [x for x, _ in points] == sorted(x for x, _ in points)  # more cost to the right, less harm (lower) below
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert "<title>chosen: " in chart
    assert render("report").read_text() == page


@pytest.mark.parametrize(
    "words, expected",
    [
        ("scheme=mixed budget.size_byte=5", "got budget.size_byte; allowed: budget.size_bytes, "),
        ("scheme=mixed budget.size_bytes=0", "got budget.size_bytes=0; allowed: a number > 0"),
        ("scheme=mixed scheme.mesure=kl", "got scheme.mesure; allowed: scheme.weight, "),
        ("scheme=mixed budget.size_bytes=10", "got budget.size_bytes=10; allowed: at least "),
        (
            "scheme=w4a4 budget=10min",
            "got algorithm.budget; allowed: algorithm.num_calibration_samples; algorithm=auto ",
        ),
        (
            "budget.latency_ms=5 budget.latency_table=none.json",
            "got budget.latency_table=none.json, which can't be read",
        ),
    ],
)
def test_mistakes_on_the_command_line(words, expected, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main([*QUANTIZE, *words.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"dfq: {expected}")


def test_a_sweep_over_budgets(folder, monkeypatch):
    """Hydra hands each job its own budget, which the short spelling reaches too."""
    monkeypatch.chdir(folder)
    seen = []
    monkeypatch.setattr("dfq.api.command", lambda name, config: seen.append(config["scheme"]["budget"]))
    assert main([*QUANTIZE, "scheme=mixed", "-m", "budget.mean_weight_bits=3,5"]) == 0
    assert [budget["mean_weight_bits"] for budget in seen] == [3, 5]
