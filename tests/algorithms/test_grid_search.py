"""Searched grids: NeUQI's sweep against trying out, clip search against loops, inputs' moments against NumPy."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dfq
from dfq.algorithms._inputs import group_moments, importance, in_float, input_squares
from dfq.algorithms.clip_search import ClipSearch
from dfq.algorithms.hqq import HQQ
from dfq.algorithms.neuqi import NeUQI, real_zero_point
from dfq.quantization import choose_qparams, fake_quantize, round_scale
from dfq.quantizers.min_max import MinMax
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student

GROUPS = Scheme(TensorScheme(2, False, "per_group", 4), FLOAT)


def weights(rows=10, columns=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=rng) + torch.linspace(-1, 1, rows)[:, None]
    return w, torch.rand(rows, columns, generator=rng).square() * 4


def weighted(w, h, scale, zero_point, scheme):
    return (h * (fake_quantize(w, scale, zero_point, scheme, 0) - w).square()).sum(1)


@pytest.mark.parametrize("levels", [1, 3, 7])
def test_the_real_zero_point_is_the_best_of_all(levels):
    v, h = (t.double() for t in weights())
    v = v * 1.5
    found = real_zero_point(v, h, levels)

    def loss(z):
        codes = np.clip(np.round(v.numpy() + z), 0, levels)
        return (h.numpy() * (v.numpy() - (codes - z)) ** 2).sum(1)

    tried = np.min([loss(z) for z in np.linspace(-6, 12, 20_001)], axis=0)
    mine = loss(found.numpy()[:, None])
    assert (mine <= tried + 1e-12).all() and (mine > tried - 1e-3 * tried.max()).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_neuqi_is_as_good_as_a_plain_search(bits, symmetric):
    scheme, (w, h) = TensorScheme(bits, symmetric, "per_channel"), weights()
    widest, start = choose_qparams(w.amin(1), w.amax(1), scheme)
    mine = weighted(w, h, *NeUQI().fit(w, h, scheme), scheme)
    assert (mine <= weighted(w, h, widest, start, scheme) * (1 + 1e-5)).all()
    if bits > 4:
        return
    tried = torch.full_like(widest, torch.inf)
    for share in torch.linspace(0.3, 1, 24).tolist():
        zeros = [start] if symmetric else [torch.full_like(start, z) for z in range(2**bits)]
        for zero_point in zeros:
            tried = torch.minimum(tried, weighted(w, h, widest * share, zero_point, scheme))
    assert (mine <= tried * (1 + 1e-5)).all() and mine.sum() < 0.97 * weighted(w, h, widest, start, scheme).sum()


OTHERS = {
    "seq": TensorScheme(2, True, "per_channel", grid="seq"),
    "ternary": TensorScheme(2, True, "per_channel", grid="ternary"),
    "shifted_ternary": TensorScheme(2, False, "per_channel", grid="ternary"),
    "fp4": TensorScheme(4, True, grid="fp4_e2m1", granularity="per_channel"),
    "powers_of_two": TensorScheme(3, False, "per_channel", scale_format="e8m0"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_neuqi_finds_the_scale_of_other_grids_as_it_is_stored(name):
    """Against 200 shares of the widest, each with 33 zero points where the grid has one."""
    scheme, (w, h) = OTHERS[name], weights()
    widest, start = choose_qparams(w.amin(1), w.amax(1), scheme)
    scale, zero_point = NeUQI().fit(w, h, scheme)
    assert torch.equal(round_scale(scale, scheme), scale)
    if scheme.scale_format == "e8m0":
        assert (zero_point % 2 == 0).all()
    tried = torch.full_like(widest, torch.inf)
    for share in torch.linspace(0.3, 1, 200).tolist():
        trial = round_scale(widest * share, scheme)
        if scheme.symmetric:
            zeros = [start]
        elif scheme.has_float_zero_point:
            zeros = [torch.full_like(widest, z) for z in torch.linspace(-1.5, 1.5, 33).tolist()]
        else:
            zeros = [torch.full_like(start, z) for z in range(0, 8, 2)]
        for zeros_of_rows in zeros:
            tried = torch.minimum(tried, weighted(w, h, trial, zeros_of_rows, scheme))
    mine = weighted(w, h, scale, zero_point, scheme)
    assert (mine <= tried * 1.01).all() and mine.sum() < weighted(w, h, widest, start, scheme).sum()


def test_columns_that_nothing_is_multiplied_with_do_not_count():
    scheme, (w, h) = TensorScheme(2, False, "per_channel"), weights()
    w[:, 0], h[:, 0] = 40.0, 0.0
    without = NeUQI().fit(w[:, 1:], h[:, 1:], scheme)
    error = weighted(w, h, *NeUQI(num_scales=80, smallest_share=0.01).fit(w, h, scheme), scheme)
    assert error.sum() < 1.3 * weighted(w[:, 1:], h[:, 1:], *without, scheme).sum()
    found = NeUQI().fit(w, torch.zeros_like(h), scheme)
    assert all(torch.isfinite(t.float()).all() for t in found)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 2), nn.Conv2d(8, 8, 1, groups=2)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.conv(x))))
        return self.head(F.relu(self.first(x.mean((2, 3)))))


@pytest.fixture
def teacher():
    from conftest import as_teacher

    return as_teacher(Network())


def test_moments_of_inputs(teacher, make_dataset):
    student = Student.from_teacher(teacher, GROUPS)
    images = make_dataset(teacher).samples()
    squares, moments = input_squares(student, images), group_moments(student, images)
    with torch.no_grad():
        x = F.relu(teacher.module.grouped(F.relu(teacher.module.conv(images)))).mean((2, 3)).numpy()
    np.testing.assert_allclose(squares["first"].numpy(), (x**2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(squares["conv"].numpy(), (images.numpy() ** 2).mean((0, 2, 3)), rtol=1e-4)
    assert moments.keys() == {"first", "head"} and moments["first"].shape == (2, 4, 4)
    np.testing.assert_allclose(moments["first"][1].numpy(), x[:, 4:].T @ x[:, 4:] / len(x), rtol=1e-4)
    layer = student.layers["grouped"]
    rows = importance(layer, squares["grouped"])
    assert torch.equal(rows[0], squares["grouped"][:4]) and torch.equal(rows[7], squares["grouped"][4:])
    rows = importance(student.layers["conv"], squares["conv"]).flatten()
    assert torch.equal(rows[:12], squares["conv"].repeat_interleave(4))
    assert (importance(layer, None) == 1).all()


def test_nothing_is_rounded_in_float(teacher, make_dataset, tmp_path):
    student = Student.from_teacher(teacher, GROUPS)
    HQQ().quantize(student, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, tmp_path)  # weights are latent
    images = make_dataset(teacher, 20, name="other").samples()
    with torch.no_grad():
        rounded = student(images)
        with in_float(student):
            assert not student.has_grids and not torch.equal(student(images), rounded)
        assert student.has_grids and torch.equal(student(images), rounded)


@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
def test_clip_search_against_loops(granularity, teacher, make_dataset):
    size = {"per_group": 4, "per_channel": 8, "per_tensor": 96}[granularity]
    scheme = Scheme(TensorScheme(2, False, granularity, 4 if granularity == "per_group" else None), FLOAT)
    dataset = make_dataset(teacher)
    student = dfq.quantize(teacher, dataset, scheme, algorithm="clip_search", num_steps=4)
    plain = Student.from_teacher(teacher, scheme)
    x = np.asarray(group_inputs(plain, dataset), dtype=np.float64)
    layer, w = student.layers["head"], teacher.module.head.weight.detach()
    rows = w.reshape(-1, size)
    for row in range(len(rows)):
        best = None
        for a, b in itertools.product(torch.linspace(1, 0.5, 4).tolist(), repeat=2):
            grid = choose_qparams(rows[row].min() * a, rows[row].max() * b, scheme.weight)
            error = (
                (fake_quantize(rows[row], *grid, scheme.weight) - rows[row]).reshape(-1, min(size, 8)).double().numpy()
            )
            part = x[:, (row % (8 // min(size, 8))) * min(size, 8) :][:, : min(size, 8)]
            loss = ((error @ part.T) ** 2).sum()
            if best is None or loss < best[0] * (1 - 1e-6):
                best = loss, *grid
        assert torch.allclose(layer.weight_quantizer.scale.reshape(-1)[row], best[1], rtol=1e-5)
        assert int(layer.weight_quantizer.zero_point.reshape(-1)[row]) == int(best[2])


def group_inputs(student, dataset):
    """What the head is multiplied with, for the samples that the algorithm looks at."""
    from dfq.calibration import calibration_images

    found = []
    handle = student.module.head.register_forward_pre_hook(lambda _m, args: found.append(args[0].detach()))
    with torch.no_grad():
        student(calibration_images(dataset, ClipSearch().num_samples))
    handle.remove()
    return found[0]


@pytest.mark.parametrize("algorithm", ["neuqi", "clip_search"])
def test_outputs_are_nearer_than_with_min_max(algorithm, teacher, make_dataset):
    dataset, errors = make_dataset(teacher), {}
    images = make_dataset(teacher, 64).samples()
    for name in ("round_to_nearest", algorithm):
        student = dfq.quantize(teacher, dataset, GROUPS, algorithm=name, weight_quantizer="min_max")
        with torch.no_grad():
            errors[name] = float((student(images) - teacher(images)).square().mean())
    assert errors[algorithm] < 0.9 * errors["round_to_nearest"]


@pytest.mark.parametrize("algorithm", [NeUQI(), ClipSearch(), HQQ()])
def test_a_grid_that_is_not_searched_is_named(algorithm, teacher, make_dataset, tmp_path, capsys):
    """Rows whose scales share one depend on each other; HQQ's steps are those of uniform grids."""
    for name in ("nvfp4", "seq"):
        weight = TensorScheme(4, True, grid="fp4_e2m1", granularity="per_group", group_size=4, scale_format="e4m3")
        scheme = Scheme(weight if name == "nvfp4" else TensorScheme(2, True, "per_group", 4, grid="seq"), FLOAT)
        student = Student.from_teacher(teacher, scheme)
        algorithm.quantize(student, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, tmp_path)
        named = f"{type(algorithm).__name__} leaves as they are: conv, grouped, first, head" in capsys.readouterr().err
        assert named == (name == "nvfp4" or isinstance(algorithm, HQQ))
        before = Student.from_teacher(teacher, scheme)
        resolve("algorithm", "round_to_nearest").quantize(
            before, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, tmp_path
        )
        moved = any(
            not torch.equal(layer.weight_quantizer.scale, before.layers[key].weight_quantizer.scale)
            for key, layer in student.layers.items()
        )
        assert moved != named
