"""Bias correction: means are the float network's again, by samples and by batch norms, and students survive it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NETS as TINY
from conftest import NUM_CLASSES, SPEC, as_teacher, settle
from torch import nn

from dfq.algorithms._bias_correction import (
    correct_bias,
    correct_bias_by_batch_norm,
    rectified_mean,
    undo_bias_correction,
)
from dfq.algorithms._equalization import (
    equalize,
)
from dfq.algorithms.bias_correction import BiasCorrection
from dfq.algorithms.comq import COMQ
from dfq.algorithms.gptq import GPTQ
from dfq.algorithms.quantease import QuantEase
from dfq.algorithms.squant import SQuant
from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.quantizers.min_max import MinMax
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student
from dfq.teacher import InputSpec, Teacher

W4A8 = Scheme(TensorScheme(4, True, "per_tensor"), TensorScheme(8))
W3 = Scheme(TensorScheme(3, True, "per_tensor"), FLOAT)


def images(num_samples=48, seed=3):
    return settle(TINY["bare"](), seed=seed, num_samples=num_samples)


def calibrated(teacher, scheme=W4A8):
    student = Student.from_teacher(teacher, scheme)
    calibrate(student, images(), MinMax(), MinMax())
    return student


def means(network, names, x):
    """Mean of each named layer's output over all but the channels."""
    found = {}

    def keep(name):
        def hook(_module, _inputs, output):
            dims = tuple(d for d in range(output.dim()) if d != 1)
            found[name] = output.mean(dims).clone()

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return found


def biasless():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(8, 6, 2, groups=2, bias=False),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, NUM_CLASSES, bias=False),
    )


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("make", [*TINY.values(), biasless])
def test_means_are_those_of_the_float_network_afterwards(make):
    """Of every layer, with all layers before it corrected: what a walk from layer to layer comes to, in one forward."""
    teacher, x = as_teacher(make()), images()
    student = calibrated(teacher)
    names = correct_bias(student, teacher, x, batch_size=len(x))
    assert names == list(student.layers)
    reference = Student.from_teacher(teacher, W4A8)  # without grids: folded, in float
    wanted, got = means(reference.module, names, x), means(student.module, names, x)
    for name in names:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=2e-5)
    plain = means(calibrated(teacher).module, names, x)
    assert all(not torch.allclose(plain[name], wanted[name], rtol=1e-2, atol=1e-3) for name in names[1:])


def test_layer_by_layer_comes_to_the_same():
    """The paper's way, written down: one forward of the network for each layer."""
    teacher, x = as_teacher(TINY["bare"]()), images()
    one, all_at_once = calibrated(teacher), calibrated(teacher)
    wanted = means(teacher.module, one.layers, x)
    for name, layer in one.layers.items():
        layer.bias.data += wanted[name] - means(one.module, [name], x)[name]
    correct_bias(all_at_once, teacher, x)
    for name, layer in all_at_once.layers.items():
        torch.testing.assert_close(layer.bias, one.layers[name].bias, rtol=1e-4, atol=1e-5)


def test_batches_come_close_to_all_samples_at_once():
    teacher, x = as_teacher(TINY["plain"]()), images(60)
    whole, parts = calibrated(teacher), calibrated(teacher)
    before = {name: layer.bias.clone() for name, layer in whole.layers.items()}
    correct_bias(whole, teacher, x, batch_size=60)
    correct_bias(parts, teacher, x, batch_size=16)  # the last one is smaller
    for name, layer in whole.layers.items():
        change = (layer.bias - before[name]).abs().max()
        assert (parts.layers[name].bias - layer.bias).abs().max() < 0.15 * change


@pytest.mark.parametrize("source", ["samples", "batch_norm"])
def test_it_helps(source, make_dataset):
    teacher, x = as_teacher(TINY["plain"]()), images(200, seed=9)
    plain, student = calibrated(teacher), Student.from_teacher(teacher, W4A8)
    BiasCorrection(source).quantize(student, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, None)
    with torch.no_grad():
        errors = [float((s(x) - teacher(x)).square().sum()) for s in (student, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_a_layer_that_runs_twice_and_a_tied_one_are_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.fc = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)), None, None, None
            self.a, self.b, self.c = self.a
            self.c.weight, self.fc = self.b.weight, nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(self.c(self.b(self.a(self.a(x).relu()).relu()).relu()).mean((2, 3)))

    teacher = as_teacher(Net())
    assert correct_bias(calibrated(teacher), teacher, images()) == ["fc"]


# ------------------------------------------------------------------------------------------------ batch norms


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1.5, 0.3), (-2.0, 1.0), (-0.5, 4.0), (3.0, 0.0), (-3.0, 0.0)])
def test_mean_of_a_rectified_normal_against_integration(mean, std):
    if std == 0:
        expected = max(mean, 0)
    else:
        x = np.linspace(mean - 12 * std, mean + 12 * std, 2_000_001)
        density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
        expected = (np.maximum(x, 0) * density).sum() * (x[1] - x[0])
    found = rectified_mean(torch.tensor(mean).double(), torch.tensor(std).double())
    assert float(found) == pytest.approx(expected, abs=1e-6)


def normal(between):
    """A first layer whose outputs are normal for normal images: 1x1, with a batch norm that knows them."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), *between, nn.Conv2d(6, 5, 1), nn.Flatten(), nn.LazyLinear(10)
    )
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, 8, 8, generator=rng)
    net(x[:2])
    settle(net, seed=1)
    net[1].momentum = 1.0
    with torch.no_grad():
        net.train()(x)
    return Teacher(net.eval(), "classification", SPEC), x


@pytest.mark.parametrize(
    "between, factor",
    [
        ([nn.ReLU()], 1.0),
        ([], 1.0),
        ([nn.ReLU6()], 3.0),
        ([nn.Hardtanh(0, 1)], 1.0),
        ([nn.ReLU(), nn.AvgPool2d(2), nn.Dropout()], 1.0),
        ([nn.ReLU(), nn.AdaptiveAvgPool2d(1)], 1.0),
    ],
    ids=["relu", "none", "relu6", "hardtanh", "pool", "global pool"],
)
def test_batch_norms_say_what_samples_say(between, factor):
    """On normal data both sources agree."""
    teacher, x = normal(between)
    teacher.module[1].weight.data *= factor  # so that six is reached
    last = str(2 + len(between))
    students = [Student.from_teacher(teacher, W3) for _ in range(2)]
    for student in students:
        calibrate(student, x[:8], MinMax(), MinMax())
        student.layers["0"].weight_quantizer.enabled = False  # its own error would move what the second one reads
    before = students[0].layers[last].bias.clone()
    correct_bias(students[0], teacher, x, batch_size=len(x))
    assert correct_bias_by_batch_norm(students[1], teacher) == [last]
    sampled, told = (student.layers[last].bias - before for student in students)
    assert told.abs().max() > 0.01
    torch.testing.assert_close(told, sampled, rtol=0.02, atol=0.01 * float(sampled.abs().max()))


@pytest.mark.parametrize(
    "between",
    [
        [nn.ReLU(), nn.MaxPool2d(2)],
        [nn.AvgPool2d(2), nn.ReLU()],
        [nn.LeakyReLU()],
        [nn.ReLU(), nn.ZeroPad2d(1)],
        [nn.GELU()],
        [nn.Hardtanh()],
    ],
)
def test_means_that_cannot_be_told(between):
    teacher, x = normal(between)
    student = Student.from_teacher(teacher, W3)
    calibrate(student, x[:8], MinMax(), MinMax())
    before = {name: layer.bias.clone() for name, layer in student.layers.items()}
    assert correct_bias_by_batch_norm(student, teacher) == []
    assert all(torch.equal(layer.bias, before[name]) for name, layer in student.layers.items())


@pytest.mark.parametrize("rounding", ["nearest", "rounded before"])
def test_batch_norms_against_numpy(rounding, make_dataset):
    """Depthwise, after equalization, and for weights that somebody has put on their grid already."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, NUM_CLASSES)),
    )
    teacher = as_teacher(net)
    student = Student.from_teacher(teacher, W4A8)
    equalize(student, teacher, images=images())
    floats = {name: layer.weight.numpy().copy() for name, layer in student.layers.items()}
    biases = {name: layer.bias.detach().numpy().copy() for name, layer in student.layers.items()}
    if rounding == "rounded before":
        SQuant(16).quantize(student, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, None)
    else:
        calibrate(student, images(), MinMax(), MinMax())
    with torch.no_grad():
        error = {n: (s.weight_quantizer(s.weight)).numpy() - floats[n] for n, s in student.layers.items()}
    assert correct_bias_by_batch_norm(student, teacher) == ["3", "8"]
    for name, first, norm in (("3", "0", net[1]), ("8", "3", net[4])):
        scale = np.abs(teacher_weight(teacher, first)) / np.abs(floats[first]).reshape(6, -1).max(1)
        if first == "3":  # what it reads has been divided too
            scale = scale * (np.abs(teacher_weight(teacher, "0")) / np.abs(floats["0"]).reshape(6, -1).max(1))
        beta, gamma = norm.bias.numpy() / scale, norm.weight.abs().numpy() / scale
        rng = np.random.default_rng(0)
        expected = np.maximum(beta + gamma * rng.standard_normal((400_000, 6)), 0).mean(0)
        if name == "3":
            change = error[name].sum((1, 2, 3)) * expected
        else:
            change = error[name] @ expected
        after = student.layers[name].bias.detach().numpy()
        np.testing.assert_allclose(after - biases[name], -change, rtol=0.02, atol=0.02 * np.abs(change).max())


def teacher_weight(teacher, name):
    """Largest magnitude of each output channel of the folded weight."""
    layer, norm = teacher.module[int(name)], teacher.module[int(name) + 1]
    gain = norm.weight.numpy() / np.sqrt(norm.running_var.numpy() + norm.eps)
    return (np.abs(layer.weight.numpy()) * np.abs(gain)[:, None, None, None]).reshape(6, -1).max(1)


# ------------------------------------------------------------------------------------------------ students


def check_saved(student, teacher, tmp_path):
    x = images(8)
    student.freeze().save(tmp_path / "student")
    again = Student.load(tmp_path / "student", teacher)
    with torch.no_grad():
        assert torch.equal(again(x), student(x))
    assert again.surgery == student.surgery
    return again


@pytest.mark.parametrize("policy", ["all", "hardware"])
@pytest.mark.parametrize("source", ["samples", "batch_norm"])
@pytest.mark.parametrize("kind", [*TINY, "biasless"])
def test_saved_and_loaded_bit_for_bit(kind, source, policy, make_dataset, tmp_path):
    teacher = as_teacher({**TINY, "biasless": biasless}[kind]())
    scheme = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8), policy=policy)
    student = Student.from_teacher(teacher, scheme)
    BiasCorrection(source).quantize(student, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, None)
    again = check_saved(student, teacher, tmp_path)
    if kind == "biasless" and source == "samples":
        assert student.surgery.rewrites == [("0", "bias"), ("4", "bias"), ("8", "bias")]
        assert all(layer.bias is not None and layer.bias.abs().max() > 0 for layer in again.layers.values())
    if policy == "hardware":
        for layer in again.layers.values():
            if layer.bias is not None:
                steps = layer.bias / layer.bias_quantizer.step(layer)
                torch.testing.assert_close(steps, steps.round(), rtol=1e-5, atol=1e-2)


def test_rounded_biases_count():
    """With integer biases in coarse steps: the means are as good as whole steps allow."""
    teacher, x = as_teacher(TINY["bare"]()), images()
    student = Student.from_teacher(teacher, Scheme(TensorScheme(3, True), TensorScheme(2), policy="hardware"))
    calibrate(student, x, MinMax(), MinMax())
    names = correct_bias(student, teacher, x, batch_size=len(x))
    wanted, products = means(teacher.module, names, x), {}
    for name in names[:2]:
        layer = student.layers[name]
        layer.register_forward_pre_hook(lambda _m, args, name=name: products.update({name: args[0].clone()}))
    with torch.no_grad():
        student(x)
        for name in names[:2]:
            layer = student.layers[name]
            bias, weight = layer.bias_quantizer(layer.bias, layer), layer.weight_quantizer(layer.weight)
            y = nn.functional.conv2d(products[name], weight, bias).mean((0, 2, 3))
            assert ((y - wanted[name]).abs() <= 0.51 * layer.bias_quantizer.step(layer)).all()


def test_layers_without_a_bias_may_stay_so(make_dataset):
    teacher = as_teacher(biasless())
    student = Student.from_teacher(teacher, W4A8)
    BiasCorrection(add_bias=False).quantize(student, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, None)
    assert [name for name, layer in student.layers.items() if layer.bias is not None] == ["2"]
    assert student.surgery.rewrites == []


@pytest.mark.parametrize("correct", [lambda s, t: correct_bias(s, t, images()), correct_bias_by_batch_norm])
def test_it_is_taken_back_and_not_done_twice(correct):
    teacher = as_teacher(TINY["plain"]())
    student = calibrated(teacher)
    before = {name: layer.bias.clone() for name, layer in student.layers.items()}
    names = correct(student, teacher)
    after = {name: layer.bias.clone() for name, layer in student.layers.items()}
    assert all(not torch.equal(before[name], after[name]) for name in names) and names
    correct(student, teacher)
    assert all(torch.equal(layer.bias, after[name]) for name, layer in student.layers.items())
    student = copy.deepcopy(student)  # as algorithm=auto does
    student.layers[names[-1]].bias.data[0] += 1  # somebody goes on with this one
    undo_bias_correction(student)
    for name, layer in student.layers.items():
        assert torch.equal(layer.bias, before[name]) is (name != names[-1])
    undo_bias_correction(student)


@pytest.mark.parametrize("solver", [GPTQ(24), COMQ(24), QuantEase(24, sweeps=2)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("policy", ["all", "hardware"])
def test_it_takes_the_place_of_a_solver_s_own_correction(solver, policy, make_dataset, tmp_path):
    """And of that alone: layers that batch norms say nothing of keep the solver's."""
    teacher = as_teacher(TINY["plain"]())
    student = Student.from_teacher(teacher, replace(W4A8, policy=policy))
    floats = {name: layer.bias.detach().clone() for name, layer in student.layers.items()}
    solver.quantize(student, teacher, make_dataset(teacher), MinMax(), MinMax(), 0, tmp_path)
    solved = {name: layer.bias.detach().clone() for name, layer in student.layers.items()}
    assert not any(torch.equal(solved[name], floats[name]) for name in floats)
    undo_bias_correction(student)  # as what rounds weights does, or compares: these are rounded with their biases
    assert all(torch.equal(layer.bias, solved[name]) for name, layer in student.layers.items())
    alone = copy.deepcopy(student)
    for name, layer in alone.layers.items():
        layer.bias.data.copy_(floats[name])
    names = correct_bias_by_batch_norm(student, teacher)
    assert correct_bias_by_batch_norm(alone, teacher) == names and set(names) < set(floats) and names
    for name, layer in student.layers.items():
        assert torch.equal(layer.bias, alone.layers[name].bias if name in names else solved[name])


def test_grids_that_are_there_are_kept(make_dataset):
    teacher = as_teacher(TINY["plain"]())
    dataset, student = make_dataset(teacher), calibrated(teacher)
    student.layers["3"].weight_quantizer.scale.mul_(0.5)
    scale = student.layers["3"].weight_quantizer.scale.clone()
    BiasCorrection().quantize(student, teacher, dataset, MinMax(), MinMax(), 0, None)
    assert torch.equal(student.layers["3"].weight_quantizer.scale, scale)


def test_wrong_settings():
    with pytest.raises(UserError, match=r"got algorithm\.source='data'; allowed: samples | batch_norm"):
        resolve("algorithm", "bias_correction", source="data")


def test_other_inputs():
    """Linear layers on sequences: channels lie along the last dimension."""
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 6), nn.Flatten(), nn.Linear(18, 10))
    settle(net)
    teacher, x = Teacher(net, "classification", InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3)), images()
    student = calibrated(teacher)
    assert correct_bias(student, teacher, x, batch_size=len(x)) == ["1", "3", "5"]
    with torch.no_grad():
        torch.testing.assert_close(student(x).mean(0), teacher(x).mean(0), rtol=1e-4, atol=1e-4)
