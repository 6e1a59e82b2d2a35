"""Equalization: pairs found in networks of every shape, functions that stay, ranges that fit, students that survive."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NETS as TINY
from conftest import NUM_CLASSES, SPEC, as_teacher, settle
from networks_by_layers import Forward, concatenated, conv, pooled, shuffled, split
from torch import nn
from torch.nn import functional as F

from dfq.algorithms._equalization import (
    absorb_biases,
    equalize,
    equalizing_scales,
)
from dfq.algorithms._least_noise import (
    NORM_ORDER,
    ROUNDING_SHARE,
    SMALLEST_RANGE,
    _LayerNoise,
    _RangeErrors,
    _Seen,
)
from dfq.algorithms._paths import (
    RELU6_TOLERANCE,
    pass_on,
)
from dfq.algorithms.equalization import Equalization
from dfq.algorithms.round_to_nearest import RoundToNearest
from dfq.channels import (
    batch_norm_statistics,
    ensure_bias,
    float_network,
    rescaled,
    weight_in_float,
)
from dfq.errors import UserError
from dfq.evaluation import fidelity
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student
from dfq.teacher import Teacher, hash_tensors

PER_TENSOR = Scheme(TensorScheme(8, True, "per_tensor"), TensorScheme(8))


def images(num_samples=32):
    return settle(TINY["bare"](), seed=3, num_samples=num_samples)


def block(layer, channels, activation=nn.ReLU):
    return [layer, nn.BatchNorm2d(channels), activation()]


def head(channels):
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES)]


def depthwise(activation=nn.ReLU):
    return nn.Sequential(
        *block(conv(3, 8, bias=False), 8, activation),
        *block(conv(8, 8, groups=8, bias=False), 8, activation),
        *block(conv(8, 12, 1, bias=False), 12, activation),
        *head(12),
    )


NETWORKS = {
    "depthwise": (depthwise, [("0", "3"), ("3", "6"), ("6", "11")]),
    "six": (lambda: depthwise(nn.ReLU6), [("0", "3"), ("3", "6"), ("6", "11")]),
    "residual": (TINY["residual"], [("3.depthwise", "3.pointwise")]),
    "mlp": (TINY["mlp"], [("1", "4")]),
    "grouped": (
        lambda: nn.Sequential(*block(conv(3, 8), 8), *block(conv(8, 12, groups=4), 12), *head(12)),
        [("0", "3"), ("3", "8")],
    ),
    "flattened": (
        lambda: nn.Sequential(conv(3, 6), nn.LeakyReLU(0.2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
        [("0", "4")],
    ),
    "transposed": (
        lambda: nn.Sequential(
            conv(3, 8), nn.PReLU(8), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Dropout(), conv(6, 4), *head(4)
        ),
        [("0", "2"), ("2", "4"), ("4", "7")],
    ),
    "shuffled": (
        lambda: Forward(
            lambda m, x: pooled(m, m.b(shuffled(m.a(x).relu()))),
            a=conv(3, 8),
            b=conv(8, 8, groups=2),
            fc=nn.Linear(8, 10),
        ),
        [("a", "b"), ("b", "fc")],
    ),
    "functional": (
        lambda: Forward(
            lambda m, x: pooled(m, m.b(F.avg_pool2d(F.relu(m.a(x)), 2) * 0.5)),
            a=conv(3, 8),
            b=conv(8, 8),
            fc=nn.Linear(8, 10),
        ),
        [("a", "b"), ("b", "fc")],
    ),
    "concatenated": (
        lambda: Forward(concatenated, a=conv(3, 4), b=conv(4, 4), fc=nn.Linear(8, 10)),
        [],
    ),
    "split": (
        lambda: Forward(split, a=conv(3, 8), b=conv(4, 4), c=conv(4, 4), fc=nn.Linear(8, 10)),
        [],
    ),
}
TIED = {
    "residual": ("0", "6"),
    "concatenated": ("a", "b", "fc"),
    "split": ("a", "b", "c", "fc"),
}  # layers that are no pair and equalized
# Each with one thing in the way of the pair (a, b).
NO_PAIRS = {
    "gelu": lambda m, x: m.b(F.gelu(m.a(x))),
    "functional relu6": lambda m, x: m.b(F.relu6(m.a(x))),
    "clamp": lambda m, x: m.b(m.a(x).clamp(min=0.1)),
    "constant": lambda m, x: m.b(m.a(x) + 1),
    "padding with ones": lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)),
    "mixed channels": lambda m, x: m.b(m.a(x).softmax(1)),
    "channels and places": lambda m, x: m.b(m.a(x).reshape(len(x), 8, 8, 8).transpose(1, 2)),
    "read twice": lambda m, x: m.b(y := m.a(x)) + y.mean(1, keepdim=True),
    "also an output": lambda m, x: (m.b(y := m.a(x)), y),
    "runs twice": lambda m, x: m.b(m.b(m.a(x))),
    "uses the weight": lambda m, x: m.b(m.a(x)) + m.a.weight.norm(),
    "times itself": lambda m, x: m.b((y := m.a(x)) * y),
}


def make(name, seed=0):
    """A teacher whose channels have ranges of several orders of magnitude, its batch norms the statistics they see."""
    module = NETWORKS[name][0]()
    x = settle(module, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.weight is not None:
            norm.weight.data *= 10 ** (1.5 * torch.rand(norm.weight.shape, generator=rng) - 1)
    with torch.no_grad():
        module.train()(x)
    return Teacher(module.eval(), "classification", SPEC, name=name)


def unbalanced():
    """A depthwise network whose channels were scaled, up to a factor of 30, and scaled back by the next layer."""
    module = depthwise()
    settle(module)
    rng = torch.Generator().manual_seed(0)
    for norm, layer in ((module[1], module[3]), (module[4], module[6]), (module[7], module[11])):
        scale = 10 ** (1.5 * torch.rand(norm.weight.shape, generator=rng) - 0.75)
        norm.weight.data *= scale
        norm.bias.data *= scale
        shape = (-1, 1, 1, 1) if getattr(layer, "groups", 1) > 1 else (1, -1, *[1] * (layer.weight.dim() - 2))
        layer.weight.data /= scale.view(shape)
    return Teacher(module, "classification", SPEC)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


def ends(paths):
    return [(path.first, path.last) for path in paths]


def channel_ranges(layer, inputs):
    """Largest magnitude of the weights of each output channel, or of each input channel, one by one in NumPy."""
    weight = np.abs(layer.weight.detach().numpy())
    weight = weight.reshape(*weight.shape[:2], -1)
    groups = getattr(layer, "groups", 1)
    if not inputs:
        return weight.max((1, 2))
    size, per_group = weight.shape[1], weight.shape[0] // groups
    return np.array(
        [weight[i // size * per_group : (i // size + 1) * per_group, i % size].max() for i in range(groups * size)]
    )


# ------------------------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize("balance", [True, False], ids=["balanced", "weights"])
@pytest.mark.parametrize("name", NETWORKS)
def test_pairs_are_found_and_the_function_stays(name, balance):
    teacher, x = make(name), images()
    student = Student.from_teacher(teacher, PER_TENSOR)
    before = {key: layer.weight.clone() for key, layer in student.layers.items()}
    with torch.no_grad():
        paths = equalize(
            student, teacher, images=x, iterations=20, balance_activations=balance, replace_relu6=name != "six"
        )
        expected = [] if name == "six" else NETWORKS[name][1]
        assert ends(paths) == expected or (name == "six" and ends(paths) == [])
        assert difference(student(x), teacher(x)) < 1e-5
    changed = {key for key, layer in student.layers.items() if not torch.equal(layer.weight, before[key])}
    tied = TIED.get(name, ()) if balance else ()
    assert changed == {key for path in paths for key in (path.first, path.last)} | set(tied)


@pytest.mark.parametrize("name", NO_PAIRS)
def test_what_is_no_pair_is_left_alone(name):
    teacher = as_teacher(Forward(NO_PAIRS[name], a=conv(3, 8), b=conv(8, 8, padding=1)))
    student = Student.from_teacher(teacher, PER_TENSOR)
    before = student.module.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    assert equalize(student, teacher, images=images(8)) == []
    if name == "channels and places":  # each feature reads all channels: they have one scale together
        assert len(student.surgery.rescaled["a"].scale.unique()) == 1
        return
    assert all(torch.equal(value, before[key]) for key, value in student.module.state_dict().items())


def test_the_same_pair_without_anything_in_the_way_is_found():
    teacher = as_teacher(Forward(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=conv(8, 8)))
    assert ends(equalize(Student.from_teacher(teacher, PER_TENSOR), teacher)) == [("a", "b")]


def test_shared_weights_are_left_alone():
    net = Forward(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8))
    net.c.weight = net.b.weight
    teacher = as_teacher(net)
    assert equalize(Student.from_teacher(teacher, PER_TENSOR), teacher) == []


def test_a_sub_class_with_an_activation_of_its_own():
    class Clipped(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, self.bias, padding=1).clamp(-0.5, 0.5)

    teacher = as_teacher(Forward(lambda m, x: m.b(m.a(x)), a=Clipped(3, 8, 3), b=conv(8, 8)))
    student = Student.from_teacher(teacher, PER_TENSOR)
    assert equalize(student, teacher) == []


@pytest.mark.parametrize("name", ["flattened", "shuffled", "grouped"])
def test_channels_are_followed(name):
    """Written down by hand: which feature stems from which channel."""
    teacher = make(name)
    path = equalize(Student.from_teacher(teacher, PER_TENSOR), teacher)[0]
    expected = {
        "flattened": [channel for channel in range(6) for _ in range(16)],
        "shuffled": [0, 4, 1, 5, 2, 6, 3, 7],
        "grouped": list(range(8)),
    }
    assert path.channels.tolist() == expected[name]


# ------------------------------------------------------------------------------------------------ scales


def test_two_layers_against_the_papers_equations():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 5), nn.Flatten(), nn.Linear(320, 10))
    teacher = as_teacher(net)
    w1, b1, w2 = (p.detach().numpy().astype(np.float64) for p in (net[0].weight, net[0].bias, net[2].weight))
    r1, r2 = np.abs(w1).max((1, 2, 3)), np.abs(w2).max((0, 2, 3))
    student = Student.from_teacher(teacher, PER_TENSOR)
    paths = [path for path in equalize(copy.deepcopy(student), teacher) if path.last == "2"]
    scale = equalizing_scales(student.layers, paths, 1)
    s = np.sqrt(r1 * r2) / r2
    np.testing.assert_allclose(scale.numpy(), s, rtol=1e-12)
    equalize(student, teacher, iterations=1, balance_activations=False)
    layers = student.layers
    np.testing.assert_allclose(layers["0"].weight.numpy(), w1 / s[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(layers["0"].bias.numpy(), b1 / s, rtol=1e-6)
    # The second layer has then been the first of the next pair.
    record = rescaled(student, "2")
    expected = w2 * s[:, None, None] / record.scale.numpy()[:, None, None, None]
    np.testing.assert_allclose(layers["2"].weight.numpy(), expected, rtol=1e-6)
    assert record.input_scale.numpy() == pytest.approx(s)


@pytest.mark.parametrize("name", ["depthwise", "grouped", "residual", "mlp"])
def test_ranges_are_equal_in_the_end(name):
    teacher = make(name)
    student = Student.from_teacher(teacher, PER_TENSOR)
    for path in equalize(student, teacher, balance_activations=False):
        made, read = (channel_ranges(student.layers[n], i) for n, i in ((path.first, False), (path.last, True)))
        np.testing.assert_allclose(made, read, rtol=5e-3)
    again = copy.deepcopy(student)
    equalize(again, teacher, balance_activations=False)
    for key, layer in again.layers.items():
        torch.testing.assert_close(layer.weight, student.layers[key].weight, rtol=5e-3, atol=0)


PER_CHANNEL = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4))
FOUR_BITS = {"per_tensor": Scheme(TensorScheme(4, True, "per_tensor"), TensorScheme(4)), "per_channel": PER_CHANNEL}


def observed(student, x):
    """Layer → what it reads [I, M] and makes [O, M], by hooks on the student itself."""
    found = {}

    def look(key):
        def hook(_module, args, output):
            found[key] = tuple(np.moveaxis(y.double().numpy(), 1, 0).reshape(y.shape[1], -1) for y in (args[0], output))

        return hook

    handles = [layer.register_forward_hook(look(key)) for key, layer in student.layers.items()]
    with torch.no_grad():
        student(x)
    for handle in handles:
        handle.remove()
    return found


def rounded_error(x, top):
    """Squared error of values above zero on 16 levels up to ``top``, each channel's."""
    return ((np.clip(np.round(x / top * 15), 0, 15) * top / 15 - x) ** 2).mean(1)


def noise(student, paths, x):
    """What is minimized, in NumPy: each layer's noise over what its outputs vary by; the best range of each tensor."""
    total = 0.0
    found = observed(student, x)
    for key in {name for path in paths for name in (path.first, path.last)}:
        layer, (read, made) = student.layers[key], found[key]
        weight = layer.weight.detach().double().numpy()
        weight = weight.reshape(*weight.shape[:2], -1)
        size, per_group = weight.shape[1], len(weight) // getattr(layer, "groups", 1)
        inputs = np.arange(len(weight))[:, None] // per_group * size + np.arange(size)  # of each kernel
        variance = np.maximum(made.var(1), 0.01 * made.var(1).mean())
        best = 0.0
        if key in {path.last for path in paths}:
            kernels, tops = (weight**2).sum(2) / variance[:, None], read.max() * np.geomspace(0.02, 1, 200)
            best = min((kernels * rounded_error(read, top)[inputs]).sum() for top in tops)
        largest = np.abs(weight).max((1, 2))
        if layer.weight_quantizer.axis is None:
            largest[:] = largest.max()
        power = (read**2).mean(1)[inputs].sum(1) * weight.shape[2]
        total += (best + ROUNDING_SHARE * ((2 * largest / 15) ** 2 / 12 * power / variance).sum()) / len(weight)
    return total


@pytest.mark.parametrize("granularity", FOUR_BITS)
@pytest.mark.parametrize("name", ["depthwise", "grouped"])
def test_scales_with_the_least_noise(name, granularity):
    teacher, x = make(name), images()
    student = Student.from_teacher(teacher, FOUR_BITS[granularity])
    before, papers = copy.deepcopy(student), copy.deepcopy(student)
    equalize(papers, teacher, balance_activations=False)
    paths = equalize(student, teacher, images=x)
    least = noise(student, paths, x)
    assert least < 0.8 * noise(before, paths, x)
    assert least < 0.8 * noise(papers, paths, x)
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):  # no other scales near by are better
        other = copy.deepcopy(student)
        for path in paths:
            scale = torch.exp(
                0.3 * torch.randn(len(other.layers[path.first].weight), generator=rng, dtype=torch.float64)
            )
            pass_on(other.layers, path, scale)
        assert noise(other, paths, x) > least


ONE_LAYER = {
    "conv": lambda: conv(4, 6),
    "grouped": lambda: conv(8, 6, groups=2),
    "depthwise": lambda: conv(6, 6, groups=6),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, padding=1),
    "transposed, grouped": lambda: nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2),
    "grouped, 1x1": lambda: conv(8, 6, 1, groups=2),
    "linear": lambda: nn.Linear(8, 12),
}


@pytest.mark.parametrize("granularity", [*FOUR_BITS, "per_group"])
@pytest.mark.parametrize("kind", ONE_LAYER)
def test_the_noise_of_a_layer(kind, granularity):
    """Weight by weight in NumPy, with scales on both sides."""
    layer, grouped = ONE_LAYER[kind](), granularity == "per_group"
    if grouped and kind not in ("linear", "grouped, 1x1"):
        pytest.skip("there groups lie along places of a kernel too")
    is_linear, transposed = isinstance(layer, nn.Linear), isinstance(layer, nn.ConvTranspose2d)
    num_inputs, num_outputs = (8, 12) if is_linear else (layer.in_channels, layer.out_channels)
    front = [nn.Flatten(), nn.Linear(192, 8)] if is_linear else [conv(3, num_inputs)]
    net = nn.Sequential(*front, nn.ReLU(), layer, nn.ReLU(), *([nn.Linear(12, 10)] if is_linear else head(6)))
    settle(net)
    name, scheme = str(len(front) + 1), PER_CHANNEL if grouped else FOUR_BITS[granularity]
    if grouped:
        scheme = replace(scheme, overrides={name: {"weight": {"granularity": "per_group", "group_size": 4}}})
    student = Student.from_teacher(Teacher(net, "classification", SPEC), scheme)
    layer, rng = student.layers[name], torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64) + 0.1

    power, variance = drawn(num_inputs), drawn(num_outputs)
    into_log, out_log, log_range = drawn(num_inputs).log(), drawn(num_outputs).log(), torch.tensor(0.3).double()
    errors = _RangeErrors(drawn(num_inputs, 50).float(), torch.ones(50), scheme.activation)
    seen = _Seen(torch.empty(0), torch.empty(0), power, variance)
    found = float(_LayerNoise(layer, seen, errors, True)(into_log, out_log, log_range))

    weight = layer.weight.detach().double().numpy().reshape(*layer.weight.shape[:2], -1)
    groups, error = getattr(layer, "groups", 1), errors(log_range + into_log).numpy()
    kernels = []  # output, input, largest weight, sum of squares
    for row, column in np.ndindex(*weight.shape[:2]):
        rest = column + row // (len(weight) // groups) * weight.shape[1]
        o, i = (rest, row) if transposed else (row, rest)
        scaled = np.abs(weight[row, column]).max() * float(torch.exp(into_log[i] - out_log[o]))
        kernels.append((o, i, scaled, (weight[row, column] ** 2).sum()))

    def shares(one, other):
        same_output, same_group = one[0] == other[0], one[1] // 4 == other[1] // 4
        return granularity == "per_tensor" or (same_output and (same_group or not grouped))

    expected = 0.0
    for o, i, _, squares in kernels:
        top = sum(other[2] ** NORM_ORDER for other in kernels if shares((o, i), other)) ** (1 / NORM_ORDER)
        rounding = (
            (2 * top / 15) ** 2 / 12 * weight.shape[2] * float(power[i] * torch.exp(2 * (out_log[o] - into_log[i])))
        )
        expected += (squares * error[i] + ROUNDING_SHARE * rounding) / float(variance[o])
    assert found == pytest.approx(expected / num_outputs, rel=1e-9)


def test_between_per_channel_weights_a_tensor_is_rounded_channel_by_channel():
    """A depthwise layer and a per-channel one do not mind scales: each channel has the range that is best for it."""
    teacher, x = make("depthwise"), images()
    student = Student.from_teacher(teacher, PER_CHANNEL)
    before = observed(student, x)["3"][0]
    assert equalize(student, teacher, images=x)[0].last == "3"
    scale = rescaled(student, "0").scale.numpy()[:, None]
    tops = before.max() * np.geomspace(1e-4, 1, 800)
    own = np.min([rounded_error(before, top) for top in tops], 0)

    def worst(scale):
        """How much larger errors are than with a range for each channel, with one range that is best for all."""
        found = [rounded_error(before / scale, top / scale.max()) * scale[:, 0] ** 2 / own for top in tops]
        return min(found, key=np.sum)

    alive = before.max(1) > 1.1 * SMALLEST_RANGE * before.max(1).mean()
    assert alive.sum() >= 6 and worst(np.ones_like(scale))[alive].max() > 5
    assert worst(scale)[alive].max() < 1.5


@pytest.mark.parametrize("granularity", FOUR_BITS)
def test_channels_without_a_range_are_left_alone(granularity):
    net = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4), nn.ReLU(), *head(4))
    settle(net)
    with torch.no_grad():
        net[0].weight[1], net[2].weight[:, 2], net[2].weight[1] = 0, 0, 0
    teacher = Teacher(net, "classification", SPEC)
    student = Student.from_teacher(teacher, FOUR_BITS[granularity])
    equalize(student, teacher, images=images(), iterations=20)
    scale = rescaled(student, "0").scale
    assert scale[1] == scale[2] == 1 and (scale[[0, 3, 4, 5]] != 1).all()
    with torch.no_grad():
        assert torch.isfinite(student(images())).all() and difference(student(images()), teacher(images())) < 1e-5


def test_a_channel_that_never_fires_does_not_ruin_the_others():
    net = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4), nn.ReLU(), *head(4))
    settle(net)
    net[0].bias.data[0] = -1e3
    teacher = Teacher(net, "classification", SPEC)
    student = Student.from_teacher(teacher, PER_TENSOR)
    equalize(student, teacher, images=images())
    ranges = channel_ranges(student.layers["0"], False)
    assert ranges[0] < 5 * np.median(ranges)


@pytest.mark.parametrize("name", ["depthwise", "residual"])
def test_records_say_what_was_done(name):
    """Statistics of batch norms follow their layers; a float weight can be made again from the teacher's."""
    module = NETWORKS[name][0]()
    x = settle(module)
    teacher = Teacher(module, "classification", SPEC)
    student = Student.from_teacher(teacher, PER_TENSOR)
    paths = equalize(student, teacher, images=x, iterations=20)
    absorb_biases(student, teacher, paths, num_stds=1.0)
    statistics, network = batch_norm_statistics(student, teacher), float_network(student, teacher)
    outputs = {}
    for key in statistics:
        student.layers[key].register_forward_hook(lambda _m, _i, out, key=key: outputs.update({key: out.clone()}))
    with torch.no_grad():
        student(x)
    done = {path.last for path in paths}
    for key, (mean, std) in statistics.items():
        if key not in done:  # behind an absorbed bias means are not exact
            torch.testing.assert_close(outputs[key].mean((0, 2, 3)).double(), mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(outputs[key].std((0, 2, 3)).double(), std, rtol=0.05, atol=1e-4)
        torch.testing.assert_close(weight_in_float(student, network, key), student.layers[key].weight.double())


# ------------------------------------------------------------------------------------------------ high biases


def test_absorption_against_numpy():
    net = nn.Sequential(*block(conv(3, 6), 6), conv(6, 5, 1), nn.ReLU(), *head(5))
    settle(net)
    net[1].bias.data = torch.tensor([9.0, 0.0, 5.0, -3.0, 1.0, 20.0])
    teacher = Teacher(net, "classification", SPEC)
    student = Student.from_teacher(teacher, PER_TENSOR)
    paths = equalize(student, teacher, iterations=1)
    scale = rescaled(student, "0").scale.numpy()
    b1, b2 = (student.layers[key].bias.detach().numpy().copy() for key in ("0", "3"))
    w2 = student.layers["3"].weight.detach().numpy()[:, :, 0, 0]
    beta, gamma = net[1].bias.numpy(), np.abs(net[1].weight.numpy())
    c = np.maximum(0, beta / scale - 3 * gamma / scale)
    assert [path.last for path in absorb_biases(student, teacher, paths)] == ["3"]
    np.testing.assert_allclose(student.layers["0"].bias.numpy(), b1 - c, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(student.layers["3"].bias.numpy(), b2 + w2 @ c, rtol=1e-4, atol=1e-4)
    assert (c > 0).sum() == 3
    assert rescaled(student, "0").shift.numpy() == pytest.approx(c)


def test_absorption_goes_no_further_than_samples():
    """With the smallest value of the samples as a limit nothing changes on them, however heavy the tails."""
    teacher, x = make("depthwise"), images(200)
    teacher.module[7].bias.data += 3
    for limited in (True, False):
        student = Student.from_teacher(teacher, PER_TENSOR)
        paths = equalize(student, teacher, images=x, iterations=20)
        done = absorb_biases(student, teacher, paths, x if limited else None, num_stds=0.5)
        assert done
        with torch.no_grad():
            assert (difference(student(x), teacher(x)) < 1e-5) is limited


@pytest.mark.parametrize(
    "between, last",
    [
        (nn.ReLU(), conv(6, 5)),  # pads with zeros, which do not stand for c
        (nn.LeakyReLU(), conv(6, 5, 1)),
        (nn.Identity(), conv(6, 5, 1)),
        (nn.Sequential(nn.ReLU(), nn.ZeroPad2d(1)), conv(6, 5, 1)),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1)), conv(6, 5, 1)),
    ],
)
def test_where_a_bias_cannot_be_absorbed(between, last):
    net = nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), between, last, *head(5))
    settle(net)
    net[1].bias.data += 10
    teacher = Teacher(net, "classification", SPEC)
    student = Student.from_teacher(teacher, PER_TENSOR)
    assert [path for path in absorb_biases(student, teacher, equalize(student, teacher)) if path.first == "0"] == []


# ------------------------------------------------------------------------------------------------ ReLU6


def small(name="six", gain=0.2):
    """ReLU6 that hardly clips."""
    teacher = make(name)
    for norm in (m for m in teacher.module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data *= gain
        norm.bias.data *= gain
    return teacher


def test_relu6_is_replaced_where_it_hardly_clips():
    teacher, x = small(), images()
    student = Student.from_teacher(teacher, PER_TENSOR)
    assert ends(equalize(student, teacher, images=x, iterations=20)) == NETWORKS["six"][1]
    assert not any(isinstance(m, nn.ReLU6) for m in student.module.modules())
    assert [kind for _, kind in student.surgery.rewrites] == ["relu"] * 3
    with torch.no_grad():
        assert difference(student(x), teacher(x)) < 0.1
    assert any(isinstance(m, nn.ReLU6) for m in teacher.module.modules())


def test_relu6_stays_where_it_clips():
    """All batch norms a hundred times as large: without its limit the network would be another one."""
    teacher, x = small(gain=100.0), images()
    student = Student.from_teacher(teacher, PER_TENSOR)
    paths = equalize(student, teacher, images=x)
    assert len(paths) < 3
    with torch.no_grad():
        error = (student(x) - teacher(x)).square().sum() / teacher(x).square().sum()
    assert float(error) < 1.01 * RELU6_TOLERANCE


def test_one_relu6_that_clips_does_not_keep_the_others():
    teacher, x = small(), images()
    teacher.module[4].weight.data *= 1e3
    student = Student.from_teacher(teacher, PER_TENSOR)
    assert ("0", "3") in ends(equalize(student, teacher, images=x, iterations=20))
    assert isinstance(student.module[5], nn.ReLU6) and type(student.module[2]) is nn.ReLU


class Inside(nn.BatchNorm2d):
    """As timm's: a batch norm that carries its activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("policy", ["all", "hardware"])
@pytest.mark.parametrize("kind", ["module", "inside a batch norm", "one for all"])
def test_a_replaced_relu6_survives(policy, kind, make_dataset, tmp_path):
    shared = nn.ReLU6()
    activation = {"module": nn.ReLU6, "one for all": lambda: shared}.get(kind)
    if activation is None:
        net = nn.Sequential(conv(3, 8), Inside(8), conv(8, 8, groups=8), Inside(8), conv(8, 6, 1), nn.ReLU6(), *head(6))
    else:
        net = depthwise(activation)
    settle(net)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data *= 0.2
    teacher = Teacher(net, "classification", SPEC)
    scheme = Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(8), policy=policy)
    student, x = run(teacher, make_dataset(teacher), scheme), images()
    assert {kind for _, kind in student.surgery.rewrites} == {"relu"}
    check_saved(student, teacher, tmp_path)
    with torch.no_grad():
        assert difference(student(x), teacher(x)) < 0.1
    if policy == "hardware":
        assert any(".relu_0_output" in path for path in student.surgery.sites.quantizers)
        assert not any("hardtanh" in path for path in student.surgery.sites.quantizers)


# ------------------------------------------------------------------------------------------------ the algorithm


def run(teacher, dataset, scheme=PER_TENSOR, freeze=True, algorithm=None, **settings):
    student = Student.from_teacher(teacher, scheme)
    settings = {"iterations": 50, **settings}  # a quarter of the steps, for the time
    algorithm = algorithm or Equalization(num_calibration_samples=64, **settings)
    algorithm.quantize(student, teacher, dataset, MinMax(), MinMax(), 0, None)
    return student.freeze() if freeze else student


def check_saved(student, teacher, tmp_path):
    x = images()
    student.save(tmp_path / "student")
    again = Student.load(tmp_path / "student", teacher)
    with torch.no_grad():
        assert torch.equal(again(x), student(x))
    assert again.surgery == student.surgery


@pytest.mark.parametrize("policy", ["all", "hardware"])
@pytest.mark.parametrize("name", ["depthwise", "six", "residual", "shuffled"])
def test_saved_and_loaded_bit_for_bit(name, policy, make_dataset, tmp_path):
    teacher = small(name) if name == "six" else make(name)
    before = hash_tensors(teacher.module.state_dict())
    scheme = Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(8), policy=policy)
    student = run(teacher, make_dataset(teacher), scheme)
    check_saved(student, teacher, tmp_path)
    assert hash_tensors(teacher.module.state_dict()) == before


@pytest.mark.parametrize("correction", ["none", "samples", "batch_norm"])
@pytest.mark.parametrize("bits", [8, 5])
def test_it_helps_one_range_for_all_weights(correction, bits, make_dataset):
    """Relative squared error of the outputs: less than half of what plain rounding leaves."""
    teacher, x = unbalanced(), images(128)
    dataset, scheme = make_dataset(teacher), Scheme(TensorScheme(bits, True, "per_tensor"), TensorScheme(8))
    with torch.no_grad():
        errors = [
            float((run(teacher, dataset, scheme, algorithm=a, **s)(x) - teacher(x)).square().sum())
            for a, s in ((RoundToNearest(64), {}), (None, {"bias_correction": correction}))
        ]
    assert errors[1] < 0.5 * errors[0]


def test_the_same_bits_twice(make_dataset):
    teacher = make("depthwise")
    dataset = make_dataset(teacher)
    first, second = (run(teacher, dataset) for _ in range(2))
    assert first.sha256 == second.sha256


def test_grids_are_made_anew(make_dataset):
    """A student that was calibrated before its weights changed."""
    teacher = make("depthwise")
    dataset = make_dataset(teacher)
    student = Student.from_teacher(teacher, PER_TENSOR)
    for algorithm in (RoundToNearest(64), Equalization(num_calibration_samples=64, iterations=50)):
        algorithm.quantize(student, teacher, dataset, MinMax(), MinMax(), 0, None)
    assert student.freeze().sha256 == run(teacher, dataset).sha256


def test_wrong_settings():
    with pytest.raises(
        UserError, match=r"got algorithm.bias_correction='batchnorm'; allowed: none | samples | batch_norm"
    ):
        resolve("algorithm", "equalization", bias_correction="batchnorm")
    with pytest.raises(UserError, match=r"got algorithm\.iterations=0"):
        resolve("algorithm", "equalization", iterations=0)


def test_a_bias_is_added_where_a_layer_reads_one():
    class Ignores(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, None, padding=1)

    class Plain(nn.Conv2d):
        pass

    net = Forward(
        lambda m, x: m.c(m.b(m.a(x))).mean((2, 3)),
        a=conv(3, 4, bias=False),
        b=Ignores(4, 4, 3, bias=False),
        c=conv(4, 10, bias=True),
    )
    teacher = as_teacher(net)
    student = Student.from_teacher(teacher, PER_TENSOR)
    assert [ensure_bias(student, name) for name in ("a", "b", "c")] == [True, False, True]
    assert student.surgery.rewrites[-1] == ("a", "bias") and student.layers["b"].bias is None


def test_errors_of_equalized_layers_are_told_in_the_teachers_units(make_dataset, tmp_path):
    """Also of a student that was saved: what was done to its layers is in its folder."""
    teacher = as_teacher(depthwise())
    student = Student.from_teacher(teacher, Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(8)))
    quantizer = MinMax()
    Equalization(bias_correction="none").quantize(
        student, teacher, make_dataset(teacher), quantizer, quantizer, 0, None
    )
    scales = [record.scale for record in student.surgery.rescaled.values()]
    assert any((scale - 1).abs().max() > 0.1 for scale in scales)
    task = resolve("task", "classification")
    found = fidelity(teacher, student.freeze(), task, images())
    assert all(layer["sqnr_db"] > 20 for layer in found["layers"])
    student.settings = {"algorithm": {}}
    again = Student.load(student.save(tmp_path / "s"), teacher)
    assert fidelity(teacher, again, task, images()) == found
