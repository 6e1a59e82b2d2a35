"""Quantizers between layers: which tensors are on a grid, on tiny networks of every shape a forward can have."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dfq.algorithms._calibration import calibrate
from dfq.errors import UserError
from dfq.hooks import forward_hooks, tensors_in
from dfq.modules import BiasQuantizer, QuantizedLayer, Quantizer
from dfq.quantizers.lsq import learn_step
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.sites import attention
from dfq.student import Student
from dfq.teacher import InputSpec, Teacher

SPEC = InputSpec((3, 8, 8), (0.0,) * 3, (1.0,) * 3)
WEIGHT, ACTIVATION = TensorScheme(8, True, "per_channel"), TensorScheme(8)
HARDWARE = Scheme(WEIGHT, ACTIVATION, policy="hardware")


# ------------------------------------------------------------------------------------------------ networks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)  # the same module again: a grid of its own


class Net(nn.Module):
    """A stem of 6 channels, whatever ``body`` makes of them, a mean, a linear layer."""

    def __init__(self, channels=6):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(channels, 5)

    def forward(self, x):
        return self.fc(self.body(F.relu(self.stem(x))).mean((2, 3)))


class Residual(Net):
    def __init__(self):
        super().__init__()
        self.block1, self.block2 = Block(), Block()

    def body(self, x):
        return self.block2(self.block1(x))


class Concat(Net):
    def __init__(self):
        super().__init__(14)
        self.conv = nn.Conv2d(6, 8, 1)

    def body(self, x):
        return torch.cat([x, F.relu(self.conv(x))], 1)


class Pools(Net):
    def __init__(self):
        super().__init__()
        self.max, self.avg, self.adaptive = nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(2)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def body(self, x):
        return self.adaptive(self.conv(self.avg(self.max(x))))


class PadShortcut(Net):
    """ResNet-20's shortcut without weights."""

    def __init__(self):
        super().__init__(10)
        self.conv = nn.Conv2d(6, 10, 3, stride=2, padding=1)

    def body(self, x):
        return F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


class Shuffle(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def body(self, x):
        a, b = x.chunk(2, 1)
        x = torch.cat([a, F.relu(self.conv(b))], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Excite(Net):
    """MobileNet's parts: relu6, hardswish, squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.act, self.gate = nn.Hardswish(), nn.Hardsigmoid()

    def body(self, x):
        x = self.act(self.depthwise(F.relu6(x)))
        return x * self.gate(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class Preactivated(Net):
    """One tensor goes into a ReLU and past it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def body(self, x):
        x = self.a(x)
        return x + self.b(F.relu(x))


class InPlace(Net):
    """What operations give back is thrown away."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True)

    def body(self, x):
        y = self.a(x)
        y.add_(x)
        self.act(y)
        return self.b(y)


class TwoReaders(Net):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)

    def body(self, x):
        return self.left(x) + self.right(x)


class ReluTwice(Net):
    def __init__(self):
        super().__init__()
        self.act, self.a, self.b = nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def body(self, x):
        return self.act(self.b(self.act(self.a(x))))


class LayerTwice(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def body(self, x):
        return F.relu(self.conv(F.relu(self.conv(x))))


class Functional(Net):
    """The owner multiplies with a layer's weight itself, as torchvision's Swin does."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 6)

    def body(self, x):
        return F.linear(x.permute(0, 2, 3, 1), self.qkv.weight, self.qkv.bias).permute(0, 3, 1, 2)


class Constants(Net):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.rand(1, 6, 8, 8) - 0.5)
        self.layer_scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.conv = nn.Conv2d(6, 6, 1)

    def body(self, x):
        x = x + self.position
        return x + self.layer_scale * self.conv(x)


class Dense(nn.ModuleDict):
    """torchvision's DenseNet: the forward goes through the module's own children."""

    def __init__(self):
        super().__init__({"a": nn.Conv2d(6, 4, 1), "b": nn.Conv2d(10, 4, 1)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(F.relu(layer(torch.cat(features, 1))))
        return torch.cat(features, 1)


class AddSequential(nn.Sequential):
    def forward(self, x):
        for part in self:
            x = x + part(x)
        return x


class Children(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        for child in self.children():
            x = F.relu(child(x)) + 1.0
        return x * 2.0


class Containers(Net):
    def __init__(self):
        super().__init__(14)
        self.rest = nn.Sequential(AddSequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)), Children(), Dense())

    def body(self, x):
        return self.rest(x)


class SequentialRoot(nn.Sequential):
    """The network itself goes through its children and adds between them."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))

    def forward(self, x):
        first, *rest = self
        x = first(x)
        for layer in rest:
            x = x + layer(x)
        return x


class DictOutputs(Net):
    def __init__(self):
        super().__init__()
        self.box = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x)).mean((2, 3))
        return {"scores": self.fc(x), "more": (self.box(x).sigmoid(), [x + 1])}


class Masked(Net):
    """Attention over rows with a mask of minus infinity."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))

    def body(self, x):
        x = x.mean(2).transpose(1, 2)
        mask = torch.full((8, 8), float("-inf")).triu(1)
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 6**0.5 + mask
        return (scores.softmax(-1) @ self.v(x)).transpose(1, 2)[..., None]


class Fused(Masked):
    def body(self, x):
        x = x.mean(2).transpose(1, 2)
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True).transpose(1, 2)[..., None]


class Unet(Net):
    """Transposed convolution, interpolation, batch norm that cannot be folded, norm over channels."""

    def __init__(self):
        super().__init__(12)
        self.pre, self.down = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 2, 1)
        self.up, self.norm = nn.ConvTranspose2d(6, 6, 2, 2), nn.GroupNorm(2, 6)

    def body(self, x):
        y = self.down(F.relu(self.pre(x)))
        y = self.norm(self.up(y)) + F.interpolate(y, scale_factor=2)
        return torch.cat((x, y), dim=1)


NETWORKS = {
    **{kind.__name__: kind for kind in (Residual, Concat, Pools, PadShortcut, Shuffle, Excite, TwoReaders, ReluTwice)},
    **{kind.__name__: kind for kind in (LayerTwice, Functional, Constants, Containers, SequentialRoot, DictOutputs)},
    **{kind.__name__: kind for kind in (Masked, Fused, Unet, Preactivated, InPlace)},
    "linear": lambda: nn.Linear(8, 5),
}


def images(num_samples=16, seed=1):
    return torch.randn(num_samples, *SPEC.size, generator=torch.Generator().manual_seed(seed))


def teacher_of(kind, seed=0):
    torch.manual_seed(seed)
    network = NETWORKS[kind]() if isinstance(kind, str) else kind()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
            nn.init.normal_(part.running_mean, std=0.3)
    return Teacher(network, "classification", SPEC, name="tiny")


def quantized(kind, scheme=HARDWARE):
    teacher = teacher_of(kind)
    student = Student.from_teacher(teacher, scheme)
    calibrate(student, images(), MinMax(), MinMax())
    return teacher, student


def flat(outputs):
    return torch.cat([output.flatten() for output in tensors_in(outputs)])


# ------------------------------------------------------------------------------------------------ what is on a grid

PRODUCTS = {"conv2d", "conv_transpose2d", "linear"}  # of which the second argument is a weight
HELD = {"add", "iadd", "sub", "mul", "cat", "mean", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "matmul"} | {
    *("interpolate", "scaled_dot_product_attention", "sigmoid", "hardswish", "hardsigmoid", "softmax")
}
FIRST_ALONE = PRODUCTS | {"group_norm", "batch_norm"}  # their other tensors belong to the operation


class Watch(TorchFunctionMode):
    """Every operation of a forward with its inputs, but for those inside quantizers."""

    def __init__(self, module):
        super().__init__()
        self.module, self.depth, self.ops = module, 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.depth:
            name = func.__name__.strip("_")
            floats = [t for t in tensors_in([args, kwargs]) if t.is_floating_point()]
            self.ops.append((name, [t.detach().clone() for t in floats[: 1 if name in FIRST_ALONE else None]]))
        return func(*args, **kwargs)

    def run(self, student, x):
        quantizers = [m for m in self.module.modules() if isinstance(m, Quantizer | BiasQuantizer)]

        def enter(*_):
            self.depth += 1

        def leave(*_):
            self.depth -= 1

        with torch.no_grad(), forward_hooks([("", q) for q in quantizers], enter, leave), self:
            student(x)
        return self.ops


def is_on(grid, x):
    codes = x / grid.scale
    low, high = grid.scheme.quant_min - int(grid.zero_point), grid.scheme.quant_max - int(grid.zero_point)
    whole = (codes - codes.round()).abs().max() < 1e-3
    return bool(whole and codes.min() > low - 0.5 and codes.max() < high + 0.5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_tensor_between_operations_is_on_a_grid(kind):
    _, student = quantized(kind)
    grids = list(student.activation_quantizers.values())
    seen = 0
    for name, tensors in Watch(student.module).run(student, images(4, seed=2)):
        if name in FIRST_ALONE | HELD:
            for x in tensors:
                if torch.isfinite(x).all():  # a mask has no code
                    assert any(is_on(grid, x) for grid in grids), (name, tuple(x.shape))
                    seen += 1
    assert seen >= len(student.layers)
    assert all(any(is_on(grid, x) for grid in grids) for x in tensors_in(student(images(4, seed=2))))


def test_the_check_above_can_fail():
    _, student = quantized("Residual", Scheme(WEIGHT, ACTIVATION))  # policy=all: sums stay float
    grids = list(student.activation_quantizers.values())
    ops = Watch(student.module).run(student, images(4, seed=2))
    assert not all(any(is_on(g, x) for g in grids) for name, tensors in ops if name == "add" for x in tensors)


@pytest.mark.parametrize("kind", NETWORKS)
def test_fresh_student_is_the_teacher_and_then_close_to_it(kind):
    teacher = teacher_of(kind)
    before = teacher.sha256, [type(m) for m in teacher.module.modules()]
    student = Student.from_teacher(teacher, HARDWARE)
    x = images()
    with torch.no_grad():
        wanted = flat(teacher(x))
        torch.testing.assert_close(flat(student(x)), wanted, rtol=1e-4, atol=1e-5)
        calibrate(student, x, MinMax(), MinMax())
        found = flat(student(x))
        assert 0 < (found - wanted).norm() / wanted.norm() < 0.1
        assert torch.equal(flat(teacher(x)), wanted)
    del vars(teacher)["sha256"]  # cached
    assert before == (teacher.sha256, [type(m) for m in teacher.module.modules()])


@pytest.mark.parametrize("kind", NETWORKS)
def test_biases_are_whole_steps_and_weights_whole_codes_once_frozen(kind):
    _, student = quantized(kind)
    x = images(4, seed=2)
    with torch.no_grad():
        before = flat(student(x))
        assert torch.equal(flat(student.freeze()(x)), before)
    for name, layer in student.layers.items():
        assert layer.bias is not None and isinstance(layer.bias_quantizer, BiasQuantizer), name
        codes = layer.bias.double() / (layer.input_quantizer.scale.double() * layer.weight_quantizer.scale.double())
        assert (codes - codes.round()).abs().max() < 1e-2 and 0 < codes.abs().max() < 2**31, name
        scale = layer.weight_quantizer.scale.view([-1 if d == layer.channel_axis else 1 for d in range(layer.weight.dim())])
        weights = layer.weight / scale
        assert (weights - weights.round()).abs().max() < 1e-3, name


@pytest.mark.parametrize("kind", NETWORKS)
def test_saved_loaded_and_copied(kind, tmp_path):
    teacher, student = quantized(kind)
    x = images(4, seed=2)
    with torch.no_grad():
        wanted = flat(student.freeze()(x))
        student.save(tmp_path)
        again = Student.load(tmp_path, teacher)
        assert torch.equal(flat(again(x)), wanted)
        assert again.surgery == student.surgery and again.sha256 == student.sha256
        twin = copy.deepcopy(student)
        assert torch.equal(flat(twin(x)), wanted)
        for quantizer in twin.activation_quantizers.values():
            quantizer.scale.mul_(3.0)
        assert not torch.equal(flat(twin(x)), wanted)
        assert torch.equal(flat(student(x)), wanted) and torch.equal(flat(again(x)), wanted)


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_and_steps_train_through_every_site(kind):
    _, student = quantized(kind)
    student.module.requires_grad_(True)
    steps = {n: learn_step(q, 10)[0] for n, q in student.activation_quantizers.items()}
    x = images(8, seed=2) * 1.5  # beyond the ranges that were seen
    loss = flat(student(x)).square().mean()
    loss.backward()
    for name, layer in student.layers.items():
        assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0, name
        assert layer.bias.grad is not None, name
    assert [name for name, step in steps.items() if step.grad is None] == []
    moved = torch.optim.SGD(steps.values(), lr=1e-3 / max(float(s.grad.abs()) for s in steps.values()))
    moved.step()
    with torch.no_grad():
        trained = flat(student(x))
        assert trained.square().mean() < loss
        assert torch.equal(flat(student.freeze()(x)), trained)
