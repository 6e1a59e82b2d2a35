"""The substrate of GPTQ, COMQ and QuantEase: what a layer's input is, its moments, QEP, and what is done to a layer."""

import copy
import itertools
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NETS, as_teacher, settle
from layer_problems import MXFP4, NVFP4, SCHEMES, ids, inputs
from torch import nn
from torch.nn import functional as F

import dfq
from dfq.algorithms._hessian import (
    Grid,
    LayerwiseRounding,
    Moments,
    Problem,
    Solution,
    cholesky,
    damped,
    products_in,
    propagated,
    solvable,
)
from dfq.algorithms.round_to_nearest import RoundToNearest
from dfq.calibration import calibration_images
from dfq.hooks import forward_hooks, record_dataflow
from dfq.pipeline import quantize
from dfq.quantization import choose_qparams
from dfq.quantizers.min_max import MinMax
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student

W3A4 = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(4))
W3 = Scheme(TensorScheme(3, True, "per_channel"), FLOAT)
PLAIN = {"num_positions": None, "propagate": 0.0, "correct_bias": False}


@dataclass(frozen=True)
class Nearest(LayerwiseRounding):
    """Rounds to nearest and remembers the problems it was given."""

    problems: list = field(default_factory=list)

    def solve(self, problem: Problem) -> Solution:
        self.problems.append(copy.deepcopy(problem))
        return Solution(problem.grid.nearest(problem.weight))


def run(algorithm, teacher, dataset, tmp_path, scheme=W3A4, seed=0, name="work", student=None):
    student = student or Student.from_teacher(teacher, scheme)
    (tmp_path / name).mkdir(exist_ok=True)
    algorithm.quantize(student, teacher, dataset, MinMax(), MinMax(), seed, tmp_path / name)
    return student


# ------------------------------------------------------------------------------------------------ columns


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 2), "kernel_size": (3, 2)},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"groups": 6, "padding": 1, "stride": 2},
    {"groups": 3, "dilation": (1, 2), "kernel_size": (2, 3)},
    {"kernel_size": 1},
    {"padding": "same", "kernel_size": (3, 4), "dilation": (2, 1)},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": (1, 2), "padding_mode": "reflect", "groups": 2},
    {"padding": "same", "kernel_size": 4, "padding_mode": "replicate"},
]


def numpy_columns(x, weight_shape, stride, padding, dilation, groups):
    """im2col in loops: x [C, H, W] padded already → [P, I, L]."""
    _, per_group, kh, kw = weight_shape
    _, h, w = x.shape
    rows = range(0, h - dilation[0] * (kh - 1), stride[0])
    cols = range(0, w - dilation[1] * (kw - 1), stride[1])
    out = np.empty((groups, per_group * kh * kw, len(rows) * len(cols)), x.dtype)
    for p, (place, (top, left)) in itertools.product(range(groups), enumerate(itertools.product(rows, cols))):
        part = x[p * per_group : (p + 1) * per_group]
        patch = part[:, top : top + dilation[0] * kh : dilation[0], left : left + dilation[1] * kw : dilation[1]]
        out[p, :, place] = patch[:, :kh, :kw].ravel()
    return out


def product_of_layer(layer, x):
    """The product of a network that is this layer alone."""
    network = nn.Sequential(layer)
    return products_in(network, "0", 1, lambda: network(x))[0]


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_columns_of_a_convolution_are_im2cols(settings):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, **{"kernel_size": 3, **settings})
    x = torch.randn(3, 6, 9, 7).to(memory_format=torch.channels_last)
    product = product_of_layer(layer, x)
    given = product.arguments["input"]
    positions = torch.arange(int(np.prod(product.places(given))))
    columns = product.columns(given, positions)
    weight = layer.weight.view(layer.groups, -1, columns.shape[2])
    outputs = (weight[None] @ columns).flatten(1, 2) + layer.bias[:, None]
    with torch.no_grad():
        wanted = layer(x)
    assert product.places(given) == wanted.shape[2:]
    torch.testing.assert_close(outputs, wanted.flatten(2), rtol=1e-4, atol=1e-5)
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        padded = np.pad(x.numpy(), [(0, 0), (0, 0), *((n, n) for n in layer.padding)])
        for sample in range(3):
            by_loops = numpy_columns(
                padded[sample], layer.weight.shape, layer.stride, layer.padding, layer.dilation, layer.groups
            )
            assert np.array_equal(columns[sample].numpy(), by_loops)
    some = torch.tensor([0, 3, len(positions) - 1])
    assert torch.equal(product.columns(given, some), columns[..., some])


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 15)),
        (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 15)),
        (nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=1, groups=2), (2, 4, 4, 5, 6)),
        (nn.Linear(5, 3), (4, 5)),
        (nn.Linear(5, 3), (2, 7, 5)),
        (nn.Linear(5, 3), (2, 3, 4, 5)),
    ],
    ids=str,
)
def test_columns_of_other_layers(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    product = product_of_layer(layer, x)
    positions = torch.arange(int(np.prod(product.places(x))))
    columns = product.columns(x, positions)
    weight = layer.weight.view(product.num_problems, -1, columns.shape[2])
    outputs = (weight[None] @ columns).flatten(1, 2) + layer.bias[:, None]
    with torch.no_grad():
        wanted = layer(x)
    wanted = wanted.flatten(2) if "Conv" in type(layer).__name__ else wanted.reshape(len(x), -1, 3).mT
    torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-5)


def test_a_sub_class_that_pads_itself_is_seen_as_it_computes():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(input=F.pad(x, (2, 0, 1, 0)), weight=self.weight, stride=self.stride)

    layer, x = Padded(3, 4, 2, stride=2, bias=False), torch.randn(2, 3, 8, 8)
    product = product_of_layer(layer, x)
    columns = product.columns(product.arguments["input"], torch.arange(20))
    with torch.no_grad():
        torch.testing.assert_close((layer.weight.flatten(1) @ columns[:, 0]).view(2, 4, 4, 5), layer(x))


# ------------------------------------------------------------------------------------------------ moments


def test_moments_are_those_of_all_columns_at_once():
    x, float_x = inputs(num_columns=90), inputs(num_columns=90, seed=5)
    moments = Moments()
    for part, float_part in zip(x.split([50, 1, 39], -1), float_x.split([50, 1, 39], -1), strict=True):
        moments.add(part, float_part)
    for p in range(2):
        a, b = x[p].numpy(), float_x[p].numpy()
        np.testing.assert_allclose(moments.hessian()[p].numpy(), 2 / 90 * a @ a.T, rtol=1e-9)
        np.testing.assert_allclose(moments.cross_hessian()[p].numpy(), 2 / 90 * b @ a.T, rtol=1e-9)
        np.testing.assert_allclose(moments.float_mean[p].numpy(), b.mean(1), rtol=1e-9)
        np.testing.assert_allclose(moments.hessian(True)[p].numpy(), 2 * np.cov(a, bias=True), rtol=1e-8, atol=1e-9)
        crossed = 2 * np.cov(b, a, bias=True)[:12, 12:]
        np.testing.assert_allclose(moments.cross_hessian(True)[p].numpy(), crossed, rtol=1e-8, atol=1e-9)
    alone = Moments()
    alone.add(x, with_cross=False)
    assert alone.cross is None and alone.float_mean is None and torch.allclose(alone.hessian(), moments.hessian())


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_qep_is_least_squares(alpha):
    """For alpha = 1 the W* that makes |W X_f - W* X_q| least; in between on the line from W to it."""
    x, weight = inputs(num_columns=90), torch.randn(2, 5, 12, dtype=torch.float64)
    float_x = x + 0.3 * inputs(num_columns=90, seed=5)
    moments = Moments()
    moments.add(x, float_x)
    found = propagated(weight, moments.hessian(), moments.cross_hessian(), alpha, 0.0)
    for p in range(2):
        w = weight[p].numpy()
        best = np.linalg.lstsq(x[p].T.numpy(), (w @ float_x[p].numpy()).T, rcond=None)[0].T
        np.testing.assert_allclose(found[p].numpy(), w + alpha * (best - w), atol=1e-8)


def test_qep_leaves_weights_whose_inputs_are_right():
    x, weight = inputs(), torch.randn(2, 5, 12, dtype=torch.float64)
    moments = Moments()
    moments.add(x, x)
    found = propagated(weight, moments.hessian(), moments.cross_hessian(), 1.0, 0.01)
    np.testing.assert_allclose(found.numpy(), weight.numpy(), atol=1e-10)


def test_centered_qep_with_a_bias_is_least_squares_with_a_constant():
    x, weight = inputs(num_columns=90), torch.randn(2, 5, 12, dtype=torch.float64)
    float_x = x + 0.3 * inputs(num_columns=90, seed=5)
    moments = Moments()
    moments.add(x, float_x)
    found = propagated(weight, moments.hessian(True), moments.cross_hessian(True), 1.0, 0.0)
    for p in range(2):
        with_one = np.vstack([x[p].numpy(), np.ones(90)])
        best = np.linalg.lstsq(with_one.T, (weight[p].numpy() @ float_x[p].numpy()).T, rcond=None)[0].T
        np.testing.assert_allclose(found[p].numpy(), best[:, :-1], atol=1e-8)
        shift = weight[p] @ moments.float_mean[p] - found[p] @ moments.mean[p]
        np.testing.assert_allclose(shift.numpy(), best[:, -1], atol=1e-8)


def test_damping_and_inputs_that_are_always_zero():
    x = inputs()
    x[0, 3] = 0
    x[1] = 0  # a problem that sees nothing
    hessian = 2 / 80 * x @ x.mT
    found = damped(hessian, 0.1)
    mean = float(hessian[0].diagonal().mean())
    np.testing.assert_allclose((found - hessian)[0].diagonal().numpy()[[0, 5]], 0.1 * mean)
    off_diagonal = ~np.eye(12, dtype=bool)
    assert np.array_equal(found.numpy()[:, off_diagonal], hessian.numpy()[:, off_diagonal])
    for damping in (0.0, 0.1):
        assert (np.linalg.eigvalsh(damped(hessian, damping).numpy()) > 0).all()
    assert torch.equal(damped(hessian, 0.0)[1], torch.eye(12, dtype=torch.float64))


def test_more_damping_where_rounding_errors_leave_no_factor():
    x = torch.randn(1, 40, 6, generator=torch.Generator().manual_seed(0))  # rank 6
    hessian = x @ x.mT - 1e-4 * torch.eye(40)
    assert torch.linalg.cholesky_ex(hessian)[1].any()
    factor = cholesky(hessian)
    torch.testing.assert_close(factor @ factor.mT, hessian, rtol=0, atol=0.01)
    with pytest.raises(RuntimeError, match="not finite"):
        cholesky(torch.full((1, 3, 3), float("nan")))


# ------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("scheme", SCHEMES, ids=ids)
@pytest.mark.parametrize("groups", [1, 2])
def test_nearest_levels_are_those_of_the_layers_own_quantizer(scheme, groups):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 6, 3, groups=groups), nn.Flatten(), nn.Linear(216, 10))
    teacher = as_teacher(nn.Sequential(nn.Conv2d(3, 8, 1), network))
    first = {"0": {"weight": {"granularity": "per_channel"}}}  # groups do not divide its three inputs
    student = Student.from_teacher(teacher, Scheme(scheme, FLOAT, overrides=first))
    layer = student.layers["1.0"]
    quantizer = layer.weight_quantizer
    rows = quantizer.rows(layer.weight.detach())
    quantizer.set_qparams(*choose_qparams(rows.amin(1) * 0.7, rows.amax(1) * 0.7, quantizer.scheme))
    grid = Grid.of(layer, groups)
    weight = layer.weight.detach().view(groups, 6 // groups, -1)
    wanted = quantizer(layer.weight.detach()).view_as(weight)
    assert torch.equal(grid.nearest(weight), wanted) and not torch.equal(weight, wanted)
    for j in (0, 5, weight.shape[-1] - 1):
        assert torch.equal(grid.nearest(weight[..., j : j + 1], j), wanted[..., j : j + 1])
    order = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)
    assert torch.equal(grid.nearest(weight.gather(-1, order), order), wanted.gather(-1, order))
    problem = Problem(weight, torch.diag_embed(torch.rand(groups, weight.shape[-1])), grid)
    sorted_problem, undo = problem.by_activation()
    assert (sorted_problem.diagonal.diff() <= 0).all()
    assert torch.equal(sorted_problem.grid.nearest(sorted_problem.weight).gather(-1, undo.expand_as(weight)), wanted)
    torch.testing.assert_close(
        sorted_problem.objective(sorted_problem.weight + 1), problem.objective(problem.weight + 1)
    )


# ------------------------------------------------------------------------------------------------ the algorithm


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("policy", ["all", "hardware"])
def test_nearest_levels_alone_are_round_to_nearest(kind, policy, make_teacher, make_dataset, tmp_path):
    teacher = make_teacher(kind)
    dataset, scheme = make_dataset(teacher), Scheme(W3A4.weight, W3A4.activation, policy)
    mine = run(Nearest(num_samples=40, **PLAIN), teacher, dataset, tmp_path, scheme).freeze()
    theirs = run(RoundToNearest(40), teacher, dataset, tmp_path, scheme, name="other").freeze()
    assert mine.sha256 == theirs.sha256
    assert list((tmp_path / "work").iterdir()) == []


def test_each_hessian_is_of_quantized_inputs_behind_layers_that_are_rounded_already(
    make_teacher, make_dataset, tmp_path
):
    """By hand: forwards of a student rounded to nearest, hooks on its convolutions, im2col in loops."""
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher)
    algorithm = Nearest(num_samples=20, batch_size=7, damping=0.0, **PLAIN)
    student = run(algorithm, teacher, dataset, tmp_path)
    names = list(student.layers)
    assert len(algorithm.problems) == len(names) == 4
    images = calibration_images(dataset, 20)
    for name, problem in zip(names, algorithm.problems, strict=True):
        layer, seen = student.layers[name], []
        handle = layer.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(m.input_quantizer(args[0])))
        with torch.no_grad():
            student(images)
        handle.remove()
        (x,) = seen
        assert len(x.unique()) <= 16, "inputs are rounded to 4 bits"
        if x.dim() == 2:
            columns = x.numpy().T[None]
        else:
            padded = np.pad(x.numpy(), [(0, 0), (0, 0), *((n, n) for n in layer.padding)])
            geometry = layer.weight.shape, layer.stride, layer.padding, layer.dilation, layer.groups
            columns = np.concatenate([numpy_columns(sample, *geometry) for sample in padded], -1)
        wanted = 2 / columns.shape[-1] * columns @ columns.transpose(0, 2, 1)
        assert (np.diagonal(wanted, axis1=1, axis2=2) > 0).all(), "an input is always zero, H is not the plain one"
        np.testing.assert_allclose(problem.hessian.numpy(), wanted, rtol=1e-3, atol=1e-4 * wanted.max())
        assert torch.equal(problem.weight, student_weight(teacher, name).view_as(problem.weight))


def student_weight(teacher, name):
    """The folded float weight."""
    return Student.from_teacher(teacher, W3A4).layers[name].weight.detach()


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("propagate", [0.0, 0.5])
def test_the_bias_brings_the_mean_of_the_output_back(kind, propagate, make_teacher, make_dataset, tmp_path):
    teacher = make_teacher(kind)
    dataset = make_dataset(teacher)
    images = calibration_images(dataset, 40)
    off = {}
    for correct in (False, True):
        algorithm = Nearest(num_samples=40, num_positions=None, propagate=propagate, correct_bias=correct)
        student = run(algorithm, teacher, dataset, tmp_path)
        with torch.no_grad():
            off[correct] = (student(images).mean(0) - teacher(images).mean(0)).abs().max()
    assert off[True] < 1e-4 < 1e-2 < off[False]


def test_a_bias_of_two_layers_stays(make_dataset, tmp_path):
    """What brings one layer's mean back would move the other's."""
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)), *pooled)
    network[1].bias = network[0].bias
    teacher = as_teacher(network)
    student = run(Nearest(), teacher, make_dataset(teacher), tmp_path)
    moved = {name: not torch.equal(layer.bias, network[int(name)].bias) for name, layer in student.layers.items()}
    assert moved == {"0": False, "1": False, "2": True, "5": True}
    assert student.layers["1"].bias is student.layers["0"].bias


def test_qep_asks_for_weights_that_are_closer_to_the_float_network(make_teacher, make_dataset, tmp_path):
    """With weights that need no rounding, the propagated student's outputs are nearer to the teacher's."""

    @dataclass(frozen=True)
    class Unrounded(LayerwiseRounding):
        def solve(self, problem: Problem) -> Solution:
            return Solution(problem.weight)

    teacher = make_teacher("bare")
    dataset = make_dataset(teacher, 160)
    scheme = Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(2))  # what is off are the inputs
    images, errors = calibration_images(dataset, 100), []
    for propagate in (0.0, 0.5, 1.0):
        student = run(Unrounded(100, propagate=propagate), teacher, dataset, tmp_path, scheme)
        with torch.no_grad():
            errors.append(float((student(images) - teacher(images)).square().mean()))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize(("limit_s", "rounded"), [(None, 4), (3.5, 3), (1.5, 1)])
def test_behind_the_time_limit_layers_keep_nearest_rounding(
    limit_s, rounded, make_teacher, make_dataset, tmp_path, monkeypatch
):
    """A second a layer."""
    now, problems = [0.0], []

    def solve(self, problem):
        problems.append(problem)
        now[0] += 1.0
        return Solution(torch.zeros_like(problem.weight))

    monkeypatch.setattr("dfq.algorithms._base.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Nearest, "solve", solve)
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher, 32)
    student = run(Nearest(correct_bias=False, time_limit_s=limit_s), teacher, dataset, tmp_path)
    assert len(problems) == rounded
    left = run(RoundToNearest(), teacher, dataset, tmp_path).freeze()
    for position, (mine, its) in enumerate(zip(student.freeze().layers.values(), left.layers.values(), strict=True)):
        assert not mine.weight.any() if position < rounded else torch.equal(mine.weight, its.weight)


def test_chosen_positions_depend_on_the_seed_alone(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("plain")
    dataset = make_dataset(teacher)
    hashes = []
    for i, (seed, positions) in enumerate([(0, 5), (0, 5), (1, 5), (0, None), (0, 64)]):
        torch.manual_seed(i)
        student = run(Nearest(num_positions=positions), teacher, dataset, tmp_path, seed=seed)
        hashes.append(student.freeze().sha256)
    assert hashes[0] == hashes[1] and hashes[3] == hashes[4]  # there are 64 positions at most
    assert len({hashes[0], hashes[2], hashes[3]}) == 3


def test_files_instead_of_memory_and_chunks_change_nothing(make_teacher, make_dataset, tmp_path, monkeypatch):
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher)
    whole = Nearest()
    run(whole, teacher, dataset, tmp_path)
    monkeypatch.setattr("dfq.algorithms._hessian.LARGEST_COLUMNS", 1)
    parts = Nearest(memory_bytes=1)
    run(parts, teacher, dataset, tmp_path)
    assert list((tmp_path / "work").iterdir()) == []
    for a, b in zip(whole.problems, parts.problems, strict=True):
        torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-4, atol=1e-5 * float(a.hessian.max()))


class Awkward(nn.Module):
    """A layer called twice, two that share a weight, one whose owner reads it, a transposed one, and plain ones."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.tied, self.other = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.other.weight = self.tied.weight
        self.read = nn.Linear(6, 6)
        self.last = nn.Linear(6, 10)

    def forward(self, x):
        x = self.twice(F.relu(self.twice(F.relu(self.first(x)))))
        x = self.other(F.relu(self.tied(F.relu(self.up(x))))).mean((2, 3))
        return self.last(F.relu(F.linear(x, self.read.weight, self.read.bias)))


class Levels(nn.Module):
    """A head that runs once a level, as those of detectors."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 1)

    def forward(self, x):
        fine = F.relu(self.first(x))
        return self.head(fine).mean((2, 3)) + self.head(F.avg_pool2d(fine, 2)).mean((2, 3))


def test_moments_of_a_layer_that_runs_twice_are_those_of_all_its_calls(make_dataset, tmp_path):
    torch.manual_seed(0)
    teacher = as_teacher(Levels())
    dataset, algorithm = make_dataset(teacher), Nearest(damping=0.0, batch_size=16, **PLAIN)
    student = run(algorithm, teacher, dataset, tmp_path)
    images, quantizer, calls = calibration_images(dataset, 40), student.layers["head"].input_quantizer, []
    head = ("head", student.module.get_submodule("head"))
    with forward_hooks([head], before=lambda _n, _m, given: calls.append(given[0])), torch.no_grad():
        student(images)
        columns = torch.cat([quantizer(x).movedim(1, 0).flatten(1).double() for x in calls], 1)
    assert columns.shape[1] == len(images) * (64 + 16) and len(algorithm.problems) == 2
    wanted = (2 * columns @ columns.T / columns.shape[1]).float()
    torch.testing.assert_close(algorithm.problems[1].hessian[0], wanted)


def test_layers_without_a_problem_of_their_own_are_rounded_to_nearest_and_named(make_dataset, tmp_path, capfd):
    torch.manual_seed(0)
    teacher = as_teacher(Awkward())
    dataset = make_dataset(teacher)
    algorithm = resolve("algorithm", "gptq", num_samples=40)
    student = run(algorithm, teacher, dataset, tmp_path)
    assert solvable(student, record_dataflow(student.module, teacher.example())) == {}  # quantizers are in between
    float_student = Student.from_teacher(teacher, W3A4)
    assert solvable(float_student, record_dataflow(float_student.module, teacher.example())) == {
        "first": 1,
        "twice": 2,
        "last": 1,
    }
    changed = {
        name
        for name, layer in student.layers.items()
        if not torch.equal(layer.weight, float_student.layers[name].weight)
    }
    assert changed == {"first", "twice", "last"}
    assert "GPTQ leaves as they are: up, tied, other, read\n" in capfd.readouterr().err
    saved = student.freeze().save(tmp_path / "student")
    x = settle(NETS["bare"](), seed=8, num_samples=16)
    with torch.no_grad():
        assert torch.equal(Student.load(saved, teacher)(x), student(x))


def test_float_weights_stay_and_their_neighbors_are_rounded(make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("bare")
    scheme = Scheme(W3A4.weight, W3A4.activation, overrides={"2": {"weight": {"grid": "float"}}})
    student = run(resolve("algorithm", "gptq"), teacher, make_dataset(teacher), tmp_path, scheme)
    assert torch.equal(student.layers["2"].weight, teacher.module[2].weight)
    assert not torch.equal(student.layers["0"].weight, teacher.module[0].weight)


def test_a_network_of_tokens(make_dataset, tmp_path):
    """Linear layers on [N, T, I], attention among them."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, stride=4)
            self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.block(self.patch(x).flatten(2).mT).mean(1))

    torch.manual_seed(0)
    teacher = as_teacher(Tokens())
    dataset = make_dataset(teacher, 64)
    x, errors = calibration_images(dataset, 50), {}
    for name in ("round_to_nearest", "gptq"):
        student = run(resolve("algorithm", name), teacher, dataset, tmp_path, W3, name=name)
        with torch.no_grad():
            errors[name] = float((student(x) - teacher(x)).square().mean())
    assert errors["gptq"] < 0.3 * errors["round_to_nearest"]


class Language(nn.Module):
    """Token ids in, logits of the next one out; ``tied``: the head has the embedding's weight."""

    def __init__(self, tied: bool):
        super().__init__()
        self.tokens, self.hidden = nn.Embedding(13, 16), nn.Linear(16, 32)
        self.out, self.head = nn.Linear(32, 16), nn.Linear(16, 13, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        return self.head(x + self.out(self.hidden(x).relu()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model(tied, make_dataset, tmp_path):
    """An embedding, and a head that shares its weight, keep nearest rounding."""
    torch.manual_seed(0)
    teacher = dfq.load_teacher(Language(tied), task="language_modeling", vocab_size=13, length=6, device="cpu")
    algorithm = Nearest(num_samples=40, **PLAIN)
    student = run(algorithm, teacher, make_dataset(teacher), tmp_path, replace(W3, skip=()))
    assert len(algorithm.problems) == (2 if tied else 3)
    assert torch.equal(student.layers["tokens"].weight, teacher.module.tokens.weight)
    x = teacher.input_spec.example(8, torch.Generator().manual_seed(0))
    outputs = student.freeze()(x)
    assert torch.equal(Student.load(student.save(tmp_path / "student"), teacher)(x), outputs)


SAVED = [
    Scheme(W3A4.weight, W3A4.activation),
    Scheme(W3A4.weight, W3A4.activation, "hardware"),
    Scheme(TensorScheme(4, True, "per_tensor"), TensorScheme(8)),
    Scheme(TensorScheme(3, False, "per_group", 3), FLOAT),
    Scheme(TensorScheme(grid="ternary", symmetric=True, granularity="per_channel"), FLOAT),
    Scheme(TensorScheme(grid="ternary", granularity="per_channel"), FLOAT),
    Scheme(TensorScheme(2, True, "per_channel", grid="seq"), FLOAT),
    Scheme(TensorScheme(4, True, "per_channel", scale_format="e8m0"), FLOAT),
    Scheme(replace(MXFP4, group_size=3), FLOAT),
    Scheme(replace(NVFP4, group_size=3), FLOAT),
]


@pytest.mark.parametrize("name", ["gptq", "comq", "quantease", "yaqa"])
@pytest.mark.parametrize("scheme", SAVED, ids=lambda s: f"{ids(s.weight)}-{s.weight.scale_format}-{s.policy}")
def test_weights_lie_on_the_grid_before_and_after_saving(name, scheme, make_teacher, make_dataset, tmp_path):
    teacher = as_teacher(Divisible())
    dataset = make_dataset(teacher)
    settings = {"num_samples": 20, **({"sweeps": 2} if name != "gptq" else {})}
    student = run(resolve("algorithm", name, **settings), teacher, dataset, tmp_path, scheme)
    before = {key: layer.weight.detach().clone() for key, layer in student.layers.items()}
    scales = {key: layer.weight_quantizer.scale.clone() for key, layer in student.layers.items()}
    student.freeze()
    for key, layer in student.layers.items():
        assert torch.equal(layer.weight, before[key]) and torch.equal(layer.weight_quantizer.scale, scales[key])
    x = settle(NETS["bare"](), seed=8, num_samples=16)
    with torch.no_grad():
        outputs = student(x)
        assert torch.equal(Student.load(student.save(tmp_path / "student"), teacher)(x), outputs)
    nearest = run(RoundToNearest(20), teacher, dataset, tmp_path, scheme, name="other").freeze()
    images = calibration_images(dataset, 20)
    with torch.no_grad():
        found, wanted = [s(images) for s in (student, nearest)], teacher(images)
    if name == "yaqa":  # looks at what the outputs say: a shift of all logits says nothing
        found, wanted = [outputs.softmax(-1) for outputs in found], wanted.softmax(-1)
    mine, theirs = (float((outputs - wanted).square().mean()) for outputs in found)
    assert mine < 0.8 * theirs


class Divisible(nn.Module):
    """Layers that groups of three divide, one of them depthwise."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 9, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(9, 9, 3, padding=1, groups=9)
        self.grouped = nn.Conv2d(9, 18, 1, groups=3, bias=False)
        self.head = nn.Linear(18, 10)

    def forward(self, x):
        return self.head(F.relu(self.grouped(F.relu(self.depthwise(F.relu(self.stem(x)))))).mean((2, 3)))


@pytest.mark.parametrize("name", ["gptq", "comq", "quantease", "yaqa"])
def test_through_the_pipeline_it_is_better_than_rounding(name, make_teacher, make_dataset, tmp_path):
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher, 160)
    x, errors = settle(NETS["bare"](), seed=8, num_samples=64), {}  # pictures that were not looked at
    for method in ("round_to_nearest", name):
        student, _ = quantize(
            teacher, dataset, W3A4, resolve("algorithm", method), MinMax(), MinMax(), 0, tmp_path / method
        )
        with torch.no_grad():
            errors[method] = float((student(x) - teacher(x)).square().mean())
    assert errors[name] < 0.5 * errors["round_to_nearest"]


# ------------------------------------------------------------------------------------------------ unusual networks


@pytest.mark.parametrize("name", ["gptq", "comq", "quantease", "yaqa"])
def test_weights_may_lie_in_memory_as_convolutions_like_it(name, make_teacher, make_dataset):
    teacher = make_teacher("bare")
    dataset, found = make_dataset(teacher), []
    for layout in (torch.contiguous_format, torch.channels_last):
        teacher.module.to(memory_format=layout)
        found.append(dfq.quantize(teacher, dataset, W3, algorithm=name, num_samples=20))
    for mine, its in zip(*(student.layers.values() for student in found), strict=True):
        torch.testing.assert_close(mine.weight, its.weight)


class OneByOne(nn.Module):
    """Layers that see one sample at a time, or a vector of its own, with no dimension of samples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.query, self.gain, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 8), nn.Linear(8, 10)

    def forward(self, x):
        rows = [self.second(self.first(image).relu()).mean((1, 2)) for image in x]
        return torch.stack([self.head((row * self.gain(self.query)).relu()) for row in rows])


@pytest.mark.parametrize("name", ["gptq", "yaqa"])
def test_layers_without_a_dimension_of_samples(name, make_dataset):
    torch.manual_seed(0)
    teacher = as_teacher(OneByOne())
    dataset, errors = make_dataset(teacher), {}
    x = settle(NETS["bare"](), seed=8, num_samples=32)
    for method in ("round_to_nearest", name):
        student = dfq.quantize(teacher, dataset, W3, algorithm=method)
        with torch.no_grad():
            errors[method] = float((student(x).softmax(-1) - teacher(x).softmax(-1)).square().mean())
    assert errors[name] < 0.5 * errors["round_to_nearest"]


class OwnMixture(nn.Module):
    """Experts as a user writes them: each runs on the tokens that chose it, and not at all without any."""

    def __init__(self, num_experts: int = 4):
        super().__init__()
        self.patch, self.router = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, num_experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(num_experts))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        tokens = x.reshape(-1, 8)
        shares, out = self.router(tokens).softmax(-1), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = (shares.argmax(-1) == number).nonzero()[:, 0]
            if len(chosen):
                out[chosen] = expert(tokens[chosen]) * shares[chosen, number, None]
        return self.head((tokens + out).view_as(x).mean(1))


class OnOccasion(nn.Module):
    """A layer that noise reaches, which shows how data flows, and smooth samples do not."""

    def __init__(self):
        super().__init__()
        self.patch, self.seldom, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        is_noise = bool(x.detach().diff(dim=-1).abs().mean() > 0.9)
        x = self.patch(x).mean((2, 3))
        return self.head(x + self.seldom(x).relu() if is_noise else x)


@pytest.mark.parametrize("name", ["gptq", "yaqa"])
@pytest.mark.parametrize("scheme", [W3, W3A4], ids=["w3", "w3a4"])
def test_experts_of_a_users_own_mixture(name, scheme, make_dataset):
    """In the float network other tokens may come to an expert, which shows where they are not as many."""
    torch.manual_seed(0)
    teacher = as_teacher(OwnMixture())
    dataset = make_dataset(teacher, 64)
    student = dfq.quantize(teacher, dataset, scheme, algorithm=name, batch_size=4)
    for key, layer in student.layers.items():
        nearest = layer.weight_quantizer(teacher.module.get_submodule(key).weight)
        assert not torch.equal(layer.weight, nearest), key
        if "experts" in key:
            assert torch.equal(layer.bias, teacher.module.get_submodule(key).bias)


@pytest.mark.parametrize("name", ["gptq", "yaqa", "reconstruction"])
def test_a_layer_that_no_sample_reaches_keeps_nearest_rounding(name, make_dataset):
    torch.manual_seed(0)
    teacher = as_teacher(OnOccasion())
    dataset = make_dataset(teacher)
    assert "seldom" in {op.module for op in teacher.dataflow.ops}
    settings = {"iterations": 3, "finish_iterations": 0} if name == "reconstruction" else {}
    student = dfq.quantize(teacher, dataset, W3, algorithm=name, **settings)
    layer = student.layers["seldom"]
    assert torch.equal(layer.weight, layer.weight_quantizer(teacher.module.seldom.weight))
