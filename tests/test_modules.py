"""Surgery on module trees: hooks, folding, swapping. Before there are grids the network's function must not change."""

import copy

import numpy as np
import pytest
import torch
from conftest import NETS, SPEC, Residual, as_teacher, settle
from torch import nn
from torch.nn import functional as F

from dfq.errors import UserError
from dfq.hooks import capture_outputs, evaluation_mode, forward_hooks, record_dataflow
from dfq.modules import (
    QuantizedConv2d,
    QuantizedLayer,
    Quantizer,
    can_quantize,
    find_foldable,
    fold_batch_norm,
    quantized_layers,
    stage_ends,
    swap_layers,
    weight_layers,
)
from dfq.quantization import choose_qparams
from dfq.quantizers.lsq import learn_step
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student
from dfq.teacher import InputSpec, Teacher

W4A4 = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4))
EDGES = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4), policy="edges_8bit")


def images(num_samples=4, size=SPEC.size):
    return torch.randn(num_samples, *size, generator=torch.Generator().manual_seed(5))


def fold(module, x):
    """Pairs that were folded; asserts that the function stayed the same on the very kind of data it works on."""
    with torch.no_grad():
        before = module(x.clone())
        pairs = find_foldable(module, record_dataflow(module, x[:2].clone()))
        fold_batch_norm(module, pairs)
        after = module(x.clone())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * max(1.0, float(before.abs().max())))
    return pairs


class Net(nn.Module):
    """Two convolutions and two batch norms, wired by ``wiring(net, x)``."""

    def __init__(self, wiring, **parts):
        super().__init__()
        self.wiring = wiring
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.wiring(self, x)


# ------------------------------------------------------------------------------------------------ hooks


def num_hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize(
    "use",
    [
        lambda net, x: record_dataflow(net, x),
        lambda net, x: as_context(
            forward_hooks(net.named_modules(), before=lambda *a: None, after=lambda *a: None), net, x
        ),
        lambda net, x: as_context(capture_outputs(net, ["0"]), net, x),
        lambda net, x: as_context(evaluation_mode(net), net, x),
    ],
    ids=["record_dataflow", "forward_hooks", "capture_outputs", "evaluation_mode"],
)
@pytest.mark.parametrize("fails", [False, True])
def test_hooks_and_modes_leave_even_after_an_exception(use, fails):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout())
    net[1].eval()
    net[0].register_forward_hook(lambda *a: None)  # the user's own stays
    modes = [m.training for m in net.modules()]
    x = torch.zeros(2, 4 if fails else 3, 4, 4)
    if fails:
        with pytest.raises(RuntimeError):
            use(net, x)
    else:
        use(net, x)
    assert num_hooks(net) == 1 and [m.training for m in net.modules()] == modes


def as_context(context, net, x):
    with context:
        net(x)


def test_hooks_leave_when_one_cannot_be_registered():
    net = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(AttributeError), forward_hooks([("0", net[0]), ("1", None)], before=lambda *a: None):
        pass
    assert num_hooks(net) == 0


def test_capture_outputs_takes_the_first_tensor_of_a_nested_output():
    class Two(nn.Module):
        def forward(self, x):
            return {"a": [x + 1], "b": x + 2}

    net = nn.Sequential(Two())
    with capture_outputs(net, ["0"]) as found:
        net(torch.zeros(1))
    assert found["0"].item() == 1


# ------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize(
    "layer, norm, size",
    [
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (3, 9)),
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), (3, 8, 8)),
        (nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4), (3, 8, 8)),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), (3, 8, 8)),
        (nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8, eps=1e-3), (4, 8, 8)),
        (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 5, 5, 5)),
        (nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), (6,)),
        (nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), (6,)),
    ],
    ids=["conv1d", "conv", "bias", "no_affine", "depthwise", "conv3d", "linear", "linear_no_affine"],
)
def test_folding_keeps_the_function(layer, norm, size):
    net = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm), nn.ReLU())
    settle_any(net, size)
    kind = type(norm)
    assert fold(net, images(4, size)) == [("0", "1")]
    assert not any(isinstance(m, kind) for m in net.modules()) and isinstance(net[0].bias, nn.Parameter)


def settle_any(net, size):
    """Batch norms with statistics of their own, whatever the shape."""
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(), m.running_var.uniform_(0.2, 3)
            if m.affine:
                nn.init.normal_(m.weight), nn.init.normal_(m.bias)  # negative gains too
    net.eval().requires_grad_(False)


def test_folding_with_a_dead_channel():
    """running_var 0: eps alone scales it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    settle_any(net, SPEC.size)
    net[1].running_var[1] = 0.0
    net[0].weight[1] = 0.0
    net[0].bias[1] = net[1].running_mean[1]
    fold(net, images())


@pytest.mark.parametrize("kind, count", [("plain", 2), ("residual", 3), ("mlp", 1), ("bare", 0)])
def test_folding_of_the_tiny_teachers(kind, count):
    net = NETS[kind]()
    x = settle(net)
    assert len(fold(net, x)) == count


def output_read_twice(net, x):
    y = net.conv(x)
    return net.bn(y) + y


def output_returned(net, x):
    y = net.conv(x)
    return net.bn(y).mean((2, 3)), y


def pre_activation(net, x):
    return net.conv(F.relu(net.bn(x)))


def relu_between(net, x):
    return net.bn(F.relu(net.conv(x)))


def relu_between_in_place(net, x):
    return net.bn(F.relu_(net.conv(x)))


def shared_convolution(net, x):
    return net.bn(net.conv(x)) + net.bn2(net.conv(x + 1))


def shared_norm(net, x):
    return net.bn(net.conv(x)) + net.bn(net.conv2(x))


def written_in_between(net, x):
    y = net.conv(x)
    y[:, 0] = 0
    return net.bn(y)


def reshaped_in_between(net, x):
    return net.bn(net.conv(x).flatten(2).unflatten(2, (4, 16)))


@pytest.mark.parametrize(
    "wiring",
    [
        output_read_twice,
        output_returned,
        pre_activation,
        relu_between,
        relu_between_in_place,
        shared_convolution,
        shared_norm,
        written_in_between,
        reshaped_in_between,
    ],
)
def test_what_must_not_be_folded(wiring):
    net = Net(wiring)
    settle_any(net, SPEC.size)
    with torch.no_grad():
        before = net(images())
    pairs = find_foldable(net, record_dataflow(net, images(2)))
    fold_batch_norm(net, pairs)
    with torch.no_grad():
        torch.testing.assert_close(net(images()), before, rtol=1e-4, atol=1e-4)
    assert pairs == []


def test_linear_with_a_batch_norm_over_another_dimension_is_not_folded():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    settle_any(net, (5, 6))
    assert fold(net, images(4, (5, 6))) == []


def test_a_norm_without_running_statistics_is_not_folded():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold(net, images()) == []


def test_a_tied_weight_is_not_folded():
    """Two convolutions with one parameter: folding the first would change the second."""
    net = Net(lambda net, x: net.conv2(net.bn(net.conv(x))))
    net.conv2.weight = net.conv.weight
    settle_any(net, SPEC.size)
    fold(net, images())


def test_a_weight_that_is_computed_on_every_forward_stays():
    """Old-style weight norm: ``weight`` is no parameter but rewritten before each forward."""
    net = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    settle_any(net, SPEC.size)
    assert fold(net, images()) == []
    swap = swap_layers(net, W4A4, record_dataflow(net, images(2)))
    assert list(swap.layers) == ["2"] and "0" in swap.kept_float


class ScaledNorm(nn.BatchNorm2d):
    """A user's norm that does more than its base class (in-place ABN and the like)."""

    def forward(self, x):
        return F.leaky_relu(super().forward(x), 0.1)


def test_a_norm_that_computes_something_else_keeps_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ScaledNorm(4))
    settle_any(net, SPEC.size)
    fold(net, images())


def test_a_norm_that_is_reached_past_the_module_tree():
    """Users keep plain lists of their layers; folding must not leave the old norm in them."""
    net = Net(lambda net, x: net.order[1](net.order[0](x)))
    net.order = [net.conv, net.bn]
    settle_any(net, SPEC.size)
    fold(net, images())


def test_keyword_calls():
    net = Net(lambda net, x: net.bn(input=net.conv(input=x)))
    settle_any(net, SPEC.size)
    fold(net, images())
    swap_layers(net, W4A4, record_dataflow(net, images(2)))
    assert net(images()).shape == (4, 3, 8, 8)


def test_a_norm_at_two_places_of_the_tree_is_replaced_at_both():
    net = Net(lambda net, x: net.same(net.conv(x)))
    net.same = net.bn
    settle_any(net, SPEC.size)
    assert fold(net, images()) == [("conv", "bn")]
    assert net.same is net.bn


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("inplace", [True, False])
def test_timms_norm_with_activation_keeps_it(activation, inplace):
    from timm.layers import BatchNormAct2d

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), BatchNormAct2d(4, act_layer=activation, inplace=inplace), nn.Conv2d(4, 2, 1)
    )
    settle_any(net, SPEC.size)
    assert fold(net, images()) == [("0", "1")]


@pytest.mark.parametrize("name, num_norms", [("resnet10t", 14), ("efficientnet_lite0", 49)])
def test_timm_networks_fold_and_stay_the_same(name, num_norms):
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=5)
    settle_any(net, (3, 32, 32))
    for m in net.modules():  # a network of 49 norms with random gains explodes
        if isinstance(m, nn.BatchNorm2d):
            m.weight.uniform_(0.5, 1.5)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == num_norms
    assert len(fold(net, images(2, (3, 32, 32)))) == num_norms
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


# ------------------------------------------------------------------------------------------------ swapping


def swapped(net, scheme=W4A4, size=SPEC.size):
    net.eval()
    return swap_layers(net, scheme, record_dataflow(net, images(2, size)))


@pytest.mark.parametrize("kind", NETS)
def test_swapping_in_place_keeps_references_classes_and_the_function(kind):
    net = NETS[kind]()
    x = settle(net)
    layers = weight_layers(net)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        before = net(x)
        swap = swapped(net)
        assert torch.equal(net(x), before)
    assert swap.kept_float == {} and list(swap.layers) == list(layers) == list(quantized_layers(net))
    for name, layer in layers.items():
        assert net.get_submodule(name) is layer
        assert isinstance(layer, nn.Conv2d | nn.Linear) and isinstance(layer, QuantizedLayer)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_a_quantized_layer_is_the_composition_of_its_parts(mode):
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode=mode)
    net = nn.Sequential(conv)
    reference = copy.deepcopy(conv)
    swap_layers(net, W4A4, record_dataflow(net, images(2, (4, 9, 9))))
    conv.weight_quantizer.set_qparams(torch.linspace(0.05, 0.1, 6), torch.zeros(6, dtype=torch.int32))
    conv.input_quantizer.set_qparams(torch.tensor([0.3]), torch.tensor([7]))
    x = images(3, (4, 9, 9))
    with torch.no_grad():
        weight = torch.stack(
            [
                (w / s).round().clamp(-8, 7) * s
                for w, s in zip(reference.weight, torch.linspace(0.05, 0.1, 6), strict=True)
            ]
        )
        reference.weight.copy_(weight)
        want = reference(((x / 0.3).round() + 7).clamp(0, 15).sub(7) * torch.tensor(0.3))
    torch.testing.assert_close(conv(x), want)
    assert type(conv) is QuantizedConv2d and "4 bits, per_channel, axis=0" in repr(conv)


def test_edges_are_first_and_last_in_call_order_not_in_definition_order():
    class Reordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.last(self.middle(self.middle(self.first(x))))

    swap = swapped(Reordered(), EDGES)
    bits = {name: (w.num_bits, a.num_bits) for name, (w, a) in swap.layers.items()}
    assert list(bits.items()) == [("first", (8, 8)), ("middle", (4, 4)), ("last", (8, 8))]


def test_all_means_all():
    assert {(w.num_bits, a.num_bits) for w, a in swapped(NETS["residual"]()).layers.values()} == {(4, 4)}


class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class StandardizedConv2d(nn.Conv2d):
    """What it multiplies with is computed from its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)


@pytest.mark.parametrize("odd", [nn.ConvTranspose2d(3, 3, 3, padding=1), Conv2dSame(3, 3, 3, padding=1)], ids=type)
def test_other_layers_that_read_their_own_weight_are_quantized(odd):
    """Sub-classes too: with their own forward around the rounded weight and input."""
    reference, x = copy.deepcopy(odd), images(3)
    swap = swapped(Net(lambda net, x: net.conv2(net.odd(net.conv(x))[..., :8, :8]), odd=odd))
    assert list(swap.layers) == ["conv", "odd", "conv2"] and not swap.kept_float
    axis = 1 if isinstance(odd, nn.ConvTranspose2d) else 0
    scale = torch.tensor([0.02, 0.03, 0.05])
    odd.weight_quantizer.set_qparams(scale, torch.zeros(3, dtype=torch.int32))
    odd.input_quantizer.set_qparams(torch.tensor(0.3), torch.tensor(7))
    with torch.no_grad():
        s = scale.view([-1 if d == axis else 1 for d in range(4)])
        reference.weight.copy_((reference.weight / s).round().clamp(-8, 7) * s)
        want = reference(((x / 0.3).round() + 7).clamp(0, 15).sub(7) * torch.tensor(0.3))
    torch.testing.assert_close(odd(x), want)
    assert isinstance(odd, type(reference)) and isinstance(odd, QuantizedLayer)


def test_an_embedding_has_a_rounded_table_and_indices_as_they_are():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 5)

        def forward(self, ids):
            return self.head(self.table(ids))

    net, ids = Words().eval(), torch.tensor([[0, 3, 10], [7, 7, 1]])
    table = net.table.weight.detach().clone()
    swap = swap_layers(net, W4A4, record_dataflow(net, ids))
    assert swap.layers["table"] == (W4A4.weight, FLOAT)
    scale = net.table.weight.detach().abs().amax(1).clamp(min=1e-3) / 7
    net.table.weight_quantizer.set_qparams(scale, torch.zeros(11, dtype=torch.int32))
    want = ((table / scale[:, None]).round().clamp(-8, 7) * scale[:, None])[ids]
    assert torch.equal(net.table(ids), want)


@pytest.mark.parametrize(
    "odd",
    [
        StandardizedConv2d(3, 3, 3, padding=1),
        nn.Bilinear(8, 8, 8),
        nn.LSTM(8, 8, batch_first=True),
        nn.MultiheadAttention(8, 2, batch_first=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_weight_layers_that_stay_float_are_named(odd):
    """Nothing is dropped silently: whoever reads 4 bits in the report has to be told what is not."""

    def wiring(net, x):
        y = net.conv(x)
        if isinstance(net.odd, nn.LSTM):
            return net.conv2(net.odd(y.flatten(1, 2))[0].view_as(y))
        if isinstance(net.odd, nn.Bilinear):
            return net.conv2(net.odd(y, y))
        if isinstance(net.odd, nn.MultiheadAttention):
            y = y.flatten(1, 2)
            return net.conv2(net.odd(y, y, y, need_weights=False)[0].view_as(x))
        return net.conv2(net.odd(y)[..., :8, :8])

    swap = swapped(Net(wiring, odd=odd))
    assert list(swap.layers) == ["conv", "conv2"]
    named = [reason for name, reason in swap.kept_float.items() if name.split(".")[0] == "odd"]
    assert named, swap.kept_float
    matrices = [name for name, p in odd.named_parameters() if p.dim() >= 2]
    assert len(named) == (len(matrices) if isinstance(odd, nn.LSTM) else 1) + isinstance(odd, nn.MultiheadAttention)
    kind = type(odd).__name__.lower()
    assert all(kind in reason.replace("_", "").lower() or "did not run" in reason for reason in named), named


def test_layers_that_do_not_run_are_named():
    net = Net(lambda net, x: net.conv(x), embedding=nn.Embedding(4, 4))
    reason = "did not run in a forward of the network"
    assert swapped(net).kept_float == {"conv2": reason, "embedding": reason}


def test_a_network_without_weight_layers_is_the_users_mistake():
    with pytest.raises(
        UserError,
        match=r"^got a network without a layer to quantize \(ReLU\); allowed: Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
        r"ConvTranspose2d, ConvTranspose3d, Linear, Embedding$",
    ):
        swapped(nn.ReLU())


def test_a_sub_class_can_be_quantized_once_its_forward_is_known():
    assert can_quantize(nn.Conv2d(1, 1, 1)) and not can_quantize(nn.BatchNorm2d(1))
    for kind, possible in ((Conv2dSame, True), (StandardizedConv2d, False)):
        layer = kind(3, 3, 3).eval()
        assert not can_quantize(layer)
        assert can_quantize(layer, "", record_dataflow(layer, images(2))) == possible


def test_torchs_fast_path_does_not_go_around_the_quantizers():
    """In evaluation nn.TransformerEncoderLayer may hand its layers' weights to one fused kernel."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(24, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.encoder(self.embed(x.flatten(2).transpose(1, 2).reshape(len(x), 8, 24))).mean(1))

    torch.manual_seed(0)
    teacher = Teacher(Encoder(), "classification", SPEC)
    student = Student.from_teacher(teacher, W4A4)
    for layer in student.layers.values():
        layer.input_quantizer.set_qparams(torch.tensor(0.5), torch.tensor(8))
        layer.weight_quantizer.set_qparams(
            torch.full_like(layer.weight_quantizer.scale, 0.1), torch.zeros(len(layer.weight), dtype=torch.int32)
        )
    student.freeze()
    with torch.no_grad():
        free = student(images())
        with forward_hooks(student.module.named_modules(), before=lambda *a: None):  # hooks switch the fast path off
            slow = student(images())
    torch.testing.assert_close(free, slow)


# ------------------------------------------------------------------------------------------------ quantizers


def rounded(x, scheme):
    """The affine grid over the extremes of ``x``, in NumPy."""
    x = np.asarray(x, dtype=np.float32)
    low, high = min(x.min(), 0), max(x.max(), 0)
    if scheme.symmetric:
        scale, zero = np.float32(max(-low, high)) / np.float32(scheme.quant_max), 0
    else:
        levels = np.float32(2**scheme.num_bits - 1)
        scale = np.float32(high) / levels - np.float32(low) / levels
        zero = np.clip(np.rint(-low / scale), 0, 2**scheme.num_bits - 1)
    return (np.clip(np.rint(x / scale) + zero, scheme.quant_min, scheme.quant_max) - zero) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis, shape", [(0, (4, 6, 2, 2)), (1, (6, 4, 2, 2)), (0, (4, 24)), (1, (24, 4))])
def test_each_group_of_a_weight_has_a_grid_of_its_own(axis, shape, symmetric):
    """Groups lie along the values of an output channel, in the order in which they are stored."""
    scheme = TensorScheme(3, symmetric, "per_group", 8)
    quantizer, weight = Quantizer(scheme, (4, 3), axis), images(1, shape)[0] * 2 + 0.3
    rows = quantizer.rows(weight)
    quantizer.set_qparams(*choose_qparams(rows.amin(1), rows.amax(1), scheme))
    found = np.moveaxis(quantizer(weight).numpy(), axis, 0).reshape(4, 24)
    values = np.moveaxis(weight.numpy(), axis, 0).reshape(4, 24)
    for channel in range(4):
        for group in range(3):
            part = slice(8 * group, 8 * group + 8)
            np.testing.assert_allclose(found[channel, part], rounded(values[channel, part], scheme), rtol=1e-5)
    assert quantizer.scale.shape == quantizer.zero_point.shape == (4, 3)


DYNAMIC = [TensorScheme(8, dynamic=True), TensorScheme(4, True, dynamic=True)]
DYNAMIC += [TensorScheme(8, granularity="per_token"), TensorScheme(4, True, granularity="per_token")]
DYNAMIC += [TensorScheme(4, symmetric, "per_group", 4, dynamic=True) for symmetric in (True, False)]


@pytest.mark.parametrize("scheme", DYNAMIC, ids=lambda scheme: f"{scheme.granularity}-{scheme.symmetric}")
@pytest.mark.parametrize("layer", ["linear", "conv", "conv1d"])
def test_dynamic_grids_of_each_slice(scheme, layer):
    """Of the batch; of a token, which to a convolution is a sample; of a group of the values a layer sums over."""
    shape, feature_axis = {"linear": ((3, 5, 8), -1), "conv": ((3, 8, 4, 5), 1), "conv1d": ((3, 8, 6), 1)}[layer]
    x = images(1, shape)[0] * torch.tensor([0.1, 1.0, 20.0]).view(3, *[1] * (len(shape) - 1)) + 0.2
    quantizer = Quantizer(scheme, feature_axis=feature_axis)
    assert torch.equal(quantizer(x), x) and quantizer.scale is None  # until it is enabled; nothing to calibrate
    quantizer.enabled = True
    values = np.moveaxis(x.numpy(), feature_axis, -1)
    want = np.empty_like(values)
    if scheme.granularity == "per_tensor":
        want = rounded(values, scheme)
    for index in np.ndindex(values.shape[:-1]):
        if scheme.granularity == "per_token" and layer == "linear":
            want[index] = rounded(values[index], scheme)
        elif scheme.granularity == "per_token":
            want[index[0]] = rounded(values[index[0]], scheme)
        elif scheme.granularity == "per_group":
            for start in (0, 4):
                want[index][start : start + 4] = rounded(values[index][start : start + 4], scheme)
    found = np.moveaxis(quantizer(x).numpy(), feature_axis, -1)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    if scheme.granularity != "per_tensor":  # one sample is rounded alike in any batch
        assert torch.equal(quantizer(x[:1]), quantizer(x)[:1])


def test_a_dynamic_quantizer_hands_gradients_through_and_has_nothing_to_freeze():
    quantizer = Quantizer(TensorScheme(4, granularity="per_token"))
    quantizer.enabled = True
    x = images(2, (3, 8)).requires_grad_()
    quantizer(x).sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad != 0).float().mean() > 0.7
    quantizer.freeze()
    assert not quantizer.state_dict() and torch.equal(quantizer(x), quantizer(x.detach()))


TRAINED = [
    (TensorScheme(4), ()),
    (TensorScheme(3), (4,)),
    (TensorScheme(4, True), (4,)),
    (TensorScheme(4, scale_format="e8m0"), (4,)),
    (TensorScheme(4, False, "per_group", 6), (4, 2)),
    (TensorScheme(grid="ternary"), (4,)),
    (TensorScheme(grid="ternary", scale_format="e8m0"), (4,)),
    (TensorScheme(4, True, "per_group", 6, "fp4_e2m1", scale_format="e4m3"), (4, 2)),
    (TensorScheme(4, True, "per_group", 6, "fp4_e2m1", scale_format="e8m0"), (4, 2)),
]


@pytest.mark.parametrize("scheme, shape", TRAINED, ids=str)
def test_freezing_a_trained_grid_changes_no_output(scheme, shape):
    """What was trained is what is stored: whole zero points inside the grid, scales in their format."""
    quantizer = Quantizer(scheme, shape, 0 if shape else None)
    x = images(1, (4, 12))[0] + 0.4
    rows = quantizer.rows(x)
    quantizer.set_qparams(*choose_qparams(rows.amin(1), rows.amax(1), scheme))
    start = quantizer.scale.clone()
    parameters = learn_step(quantizer, 12, offset=True)
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        (quantizer(x) - x * (1.4 if step % 2 else 1)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        quantizer.scale.abs_().add_(1e-3)
        if len(parameters) == 2 and not scheme.has_float_zero_point:
            quantizer.zero_point.add_(0.3)
            quantizer.zero_point.view(-1)[0] = -2.6  # left of the grid: stored as its end
    ties = (torch.arange(12) + 0.5) * quantizer.scale.detach().view(-1)[0]
    with torch.no_grad():
        before, trained = (quantizer(x), quantizer(ties.expand(4, 12))), quantizer.scale.clone()
        quantizer.freeze()
        assert torch.equal(quantizer(x), before[0]) and torch.equal(quantizer(ties.expand(4, 12)), before[1])
        assert not torch.equal(trained, start)
        assert torch.equal(quantizer.scale, trained) == (scheme.scale_format == "float32")
        frozen = {name: value.clone() for name, value in quantizer.state_dict().items()}
        quantizer.freeze()
    assert all(torch.equal(value, frozen[name]) for name, value in quantizer.state_dict().items())
    assert not list(quantizer.parameters()) and quantizer.gradient_scale == 1.0
    if scheme.has_float_zero_point:
        assert quantizer.zero_point.dtype == torch.float32
    else:
        assert quantizer.zero_point.dtype == torch.int32
        assert scheme.quant_min <= int(quantizer.zero_point.min())
        assert int(quantizer.zero_point.max()) <= scheme.quant_max


@pytest.mark.parametrize("scale_format, grid", [("e8m0", "uniform"), ("e8m0", "fp4_e2m1"), ("e4m3", "fp4_e2m1")])
def test_a_scale_is_held_in_its_format(scale_format, grid):
    quantizer = Quantizer(TensorScheme(4, True, "per_group", 4, grid, scale_format=scale_format), (5, 3), 0)
    given = torch.rand(15, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 0, 15)
    quantizer.set_qparams(given, torch.zeros(15, dtype=torch.int32))
    held = quantizer.scale.clone()
    assert not torch.equal(held.view(-1), given)
    ratio = (held.view(-1) / given).log2().abs()
    assert float(ratio[-5:].max()) < (1.01 if scale_format == "e8m0" else 0.1)
    for _ in range(2):
        quantizer.freeze()
        assert torch.equal(quantizer.scale, held)


# ------------------------------------------------------------------------------------------------ stages


def test_stage_ends_are_found_by_shape():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        Residual(4),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 10),
    )
    settle(net)
    assert stage_ends(record_dataflow(net, images(2))) == ["2", "4"]


@pytest.mark.parametrize("kind", NETS)
def test_stage_ends_exist_in_the_student(kind, make_teacher):
    teacher = make_teacher(kind)
    names = stage_ends(teacher.dataflow)
    student = Student.from_teacher(teacher, W4A4)
    with (
        torch.no_grad(),
        capture_outputs(teacher.module, names) as wanted,
        capture_outputs(student.module, names) as got,
    ):
        teacher(images()), student(images())
    for name in names:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------- the teacher stays


@pytest.mark.parametrize("kind", NETS)
def test_from_teacher_leaves_the_teacher_alone(kind, make_teacher):
    teacher = make_teacher(kind)
    before, classes = teacher.sha256, [type(m) for m in teacher.module.modules()]
    student = Student.from_teacher(teacher, EDGES)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x), rtol=1e-4, atol=1e-4)
    assert Teacher(teacher.module, "classification", teacher.input_spec).sha256 == before
    assert [type(m) for m in teacher.module.modules()] == classes and num_hooks(teacher.module) == 0
    own = {p.data_ptr() for p in teacher.module.parameters()}
    assert not own & {p.data_ptr() for p in student.module.parameters()}


def test_conv1d_and_linear_teachers_of_other_ranks():
    """Nothing assumes images: a Conv3d network is quantized as well."""
    net = nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.Linear(144, 10)
    )
    settle_any(net, SPEC.size)
    student = Student.from_teacher(Teacher(net, "classification", InputSpec((3, 8, 8), (0, 0, 0), (1, 1, 1))), W4A4)
    assert list(student.layers) == ["1", "4"] and student.surgery.folded == [("1", "2")]


def test_as_teacher_is_deterministic():
    assert as_teacher(NETS["plain"]()).sha256 == as_teacher(NETS["plain"]()).sha256


def test_a_synchronized_batch_norm_is_a_batch_norm():
    """Networks trained on several devices keep theirs; in evaluation mode it computes what the plain one does."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    net[1].running_mean.uniform_(-1, 1), net[1].running_var.uniform_(0.5, 2)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = synchronized(x)
    pairs = find_foldable(synchronized, record_dataflow(synchronized, x))
    assert pairs == [("0", "1")]
    fold_batch_norm(synchronized, pairs)
    torch.testing.assert_close(synchronized(x), expected, rtol=1e-5, atol=1e-5)
