"""Rewrites of float modules: the function stays, the weights come to lie in plain torch layers, and it repeats."""

import copy
import itertools
import time

import pytest
import timm.layers
import torch
import torchvision
from conftest import NETS
from timm.layers.conv2d_same import Conv2dSameExport
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from dfq.surgery import OPERATIONS, Attention, apply, prepare


def rng(seed=5):
    return torch.Generator().manual_seed(seed)


def noise(*shape):
    return torch.randn(*shape, generator=rng())


def randomize(module, seed=0):
    """Weights without zeros and ones among them: a bias that gets lost is seen."""
    generator = rng(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def assert_same(after, before):
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def rewrite(module, run, expected, fresh=None):
    """Prepare ``module``, whose ``run(module)`` must not change, in evaluation mode; returns the rewritten module.

    A fresh network with other weights (``fresh``, else a copy with zeros) has to come to the same by ``apply``.
    """
    module.eval()
    before = run(module)
    again = copy.deepcopy(module) if fresh is None else fresh
    random_state = torch.get_rng_state()
    assert prepare(module) == expected
    assert torch.equal(random_state, torch.get_rng_state())
    assert_same(run(module), before)
    assert prepare(module) == []
    assert not any(m.training for m in module.modules())

    with torch.no_grad():
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.zero_()
    apply(again.eval(), [[name, kind] for name, kind in expected])  # as it comes out of a json file
    assert {n: (t.shape, t.dtype) for n, t in again.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in module.state_dict().items()
    }
    assert [type(m) for m in again.modules()] == [type(m) for m in module.modules()]
    again.load_state_dict(module.state_dict(), strict=True)
    assert_same(run(again), before)
    return module


# ------------------------------------------------------------------------------------------------ attention


def attention(**settings):
    return randomize(nn.MultiheadAttention(8, 2, **settings))


def both(run):
    """The result with gradients and without: torch takes other kernels without."""

    def twice(module):
        with torch.no_grad():
            without = run(module)
        return run(module), without

    return twice


def attend(module, is_self=False, is_batched=True, **settings):
    """One forward, three samples, five queries, seven keys."""
    query, key, value = noise(3, 5, 8), noise(3, 7, module.kdim), noise(3, 7, module.vdim)
    if not is_batched:
        query, key, value = query[0], key[0], value[0]
    elif not module.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return module(query, query, query, **settings) if is_self else module(query, key, value, **settings)


BOOLEAN = torch.tensor([[False, False, True, False, True, False, False]]).expand(5, 7)
PADDING = torch.arange(7)[None] >= torch.tensor([7, 5, 4])[:, None]


@pytest.mark.parametrize("is_batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"kdim": 6, "vdim": 4},
        {"kdim": 6, "vdim": 4, "bias": False, "batch_first": True},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
    ],
    ids=str,
)
def test_attention_keeps_its_function_however_it_was_made(settings, need_weights, is_batched):
    padding = PADDING if is_batched else PADDING[1]

    def run(module):
        return [
            attend(module, is_batched=is_batched, need_weights=need_weights),
            attend(
                module,
                is_batched=is_batched,
                need_weights=need_weights,
                attn_mask=BOOLEAN,
                key_padding_mask=padding,
                average_attn_weights=False,
            ),
        ]

    module = rewrite(attention(**settings), both(run), [("", "attention")], fresh=attention(**settings))
    assert type(module) is Attention and isinstance(module, nn.MultiheadAttention)
    layers = {name: layer for name, layer in module.named_modules() if name}
    assert list(layers) == ["out_proj", "q_proj", "k_proj", "v_proj"]
    assert all(type(layer) is nn.Linear for layer in layers.values())
    extra = {"bias_k", "bias_v"} if settings.get("add_bias_kv") else set()
    assert set(module.state_dict()) - extra == {
        f"{name}.{kind}" for name in layers for kind in ("weight", "bias")[: 1 + settings.get("bias", True)]
    }
    assert (module.k_proj.in_features, module.v_proj.in_features) == (settings.get("kdim", 8), settings.get("vdim", 8))


@pytest.mark.parametrize("mask", ["none", "boolean", "float", "boolean_3d", "float_3d", "causal"])
@pytest.mark.parametrize("padding", [None, "boolean", "float"])
@pytest.mark.parametrize("is_batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_attention_masks(is_batched, mask, padding):
    is_causal = mask == "causal"
    num_keys, num_samples = (5 if is_causal else 7), (3 if is_batched else 1)
    masks = {
        "none": None,
        "boolean": BOOLEAN,
        "float": noise(5, 7),
        "boolean_3d": (noise(num_samples * 2, 5, 7) > 0) & (torch.arange(7) > 0),
        "float_3d": noise(7, num_samples * 2, 5).permute(1, 2, 0),  # strided as no view likes it
        "causal": nn.Transformer.generate_square_subsequent_mask(5),
    }
    settings = {"attn_mask": masks[mask], "is_causal": is_causal}
    if padding is not None:
        padded = PADDING[:, :num_keys]
        padded = torch.zeros(padded.shape).masked_fill(padded, -1.5) if padding == "float" else padded
        settings["key_padding_mask"] = padded if is_batched else padded[1]
    for batch_first, need_weights, average in itertools.product([True, False], repeat=3):
        original = attention(batch_first=batch_first).eval()
        module = copy.deepcopy(original)
        prepare(module)
        settings |= {"need_weights": need_weights, "average_attn_weights": average}
        for with_gradients in (True, False):  # torch takes other kernels without
            with torch.set_grad_enabled(with_gradients):
                after, weights = attend(module, is_causal, is_batched, **settings)
                before, weights_before = attend(original, is_causal, is_batched, **settings)
            assert_same(after, before)
            assert after.is_contiguous()
            assert (weights is None) == (weights_before is None) == (not need_weights)
            if need_weights:
                assert_same(weights, weights_before)


def test_a_causal_hint_without_a_mask_is_an_error_as_in_torch():
    module = attention()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="attn_mask"):
            attend(module, is_self=True, is_causal=True)
        prepare(module)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
def test_attention_trains_as_before(need_weights):
    module = attention(dropout=0.5, batch_first=True)
    original = copy.deepcopy(module)
    prepare(module)
    assert module.q_proj.training
    module.dropout = original.dropout = 0.0
    for part in (module, original):
        attend(part, need_weights=need_weights)[0].square().sum().backward()
    gradients = [getattr(module, f"{name}_proj") for name in "qkv"]
    assert_same(torch.cat([layer.weight.grad for layer in gradients]), original.in_proj_weight.grad)
    assert_same(torch.cat([layer.bias.grad for layer in gradients]), original.in_proj_bias.grad)
    assert_same(module.out_proj.weight.grad, original.out_proj.weight.grad)

    module.dropout = original.dropout = 0.5
    outs = []
    for part in (module, original):
        torch.manual_seed(0)  # the same random numbers, as often and in the same order
        outs.append(attend(part, need_weights=need_weights))
    assert_same(outs[0], outs[1])
    if need_weights:
        assert (outs[0][1] == 0).any()
    assert (outs[0][0] - attend(module.eval())[0]).abs().max() > 1e-2


def test_what_need_not_change_stays_the_same_object():
    module = attention(kdim=6).requires_grad_(False)
    weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight, module.out_proj.weight
    prepare(module)
    layers = module.q_proj, module.k_proj, module.v_proj, module.out_proj
    assert all(layer.weight is weight for layer, weight in zip(layers, weights, strict=True))
    assert not any(p.requires_grad for p in module.parameters())
    module = attention()
    module.out_proj.requires_grad_(False)
    prepare(module)
    assert [p.requires_grad for p in module.out_proj.parameters()] == [False, False]
    assert all(p.requires_grad for p in module.q_proj.parameters())
    calls = []
    module = attention()
    module.register_forward_hook(lambda *args: calls.append(1))
    prepare(module)
    attend(module)
    assert calls == [1]


def test_sub_classes_of_attention():
    class Named(nn.MultiheadAttention):
        pass

    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    assert type(rewrite(randomize(Named(8, 2)), both(attend), [("", "attention")])) is Attention
    module = randomize(Doubled(8, 2))
    assert prepare(module) == [("out_proj", "base_class")] and type(module) is Doubled


def test_attention_can_be_made():
    module = Attention(8, 2, batch_first=True)
    assert prepare(module) == [] and attend(module)[0].shape == (3, 5, 8)


class Twice(nn.Module):
    """One attention at two places, and in a list besides."""

    def __init__(self):
        super().__init__()
        self.first = self.second = attention(batch_first=True)
        self.parts = nn.ModuleList([self.first])
        self.remembered = [self.first]

    def forward(self, x):
        x = x + self.first(x, x, x)[0]
        return x + self.second(x, x, x, need_weights=False)[0] + self.remembered[0](x, x, x)[0]


def test_a_shared_module_is_rewritten_once():
    module = rewrite(Twice(), lambda m: m(noise(3, 5, 8)), [("first", "attention")], fresh=Twice())
    assert module.first is module.second is module.parts[0] is module.remembered[0]


def test_shared_parameters_are_left_alone():
    module = nn.ModuleList([attention(), attention(), attention()])
    module[1].in_proj_weight = module[0].in_proj_weight
    assert prepare(module) == [
        ("0.out_proj", "base_class"),
        ("1.out_proj", "base_class"),
        ("2", "attention"),
    ]
    module = nn.ModuleList([attention(), attention()])
    module[1].out_proj.weight = module[0].out_proj.weight
    assert prepare(module) == [("0", "attention"), ("1", "attention")]
    assert module[1].out_proj.weight is module[0].out_proj.weight  # this one can stay


# ------------------------------------------------------------------------------------------------ transformers


def encoder_layer(**settings):
    return randomize(nn.TransformerEncoderLayer(8, 2, 16, **settings))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_transformer_encoder_layer(norm_first, batch_first, bias):
    settings = {"norm_first": norm_first, "batch_first": batch_first, "bias": bias, "dropout": 0.0}
    x = noise(3, 5, 8) if batch_first else noise(5, 3, 8)

    def run(module):
        return module(x), module(x, src_mask=BOOLEAN[:, :5]), module(x, src_key_padding_mask=PADDING[:, :5])

    original = encoder_layer(**settings)
    expected = [("self_attn", "attention")]
    module = rewrite(copy.deepcopy(original), both(run), expected, fresh=encoder_layer(**settings))
    calls = []
    module.self_attn.register_forward_hook(lambda *args: calls.append(1))
    module.self_attn.q_proj.forward = lambda x: calls.append(2) or F.linear(x, module.self_attn.q_proj.weight)
    with torch.no_grad():
        module(x)
    assert calls == [2, 1]  # the layers run, nobody goes round them
    del module.self_attn.q_proj.forward

    for part in (module.train(), original.train()):
        part(x).square().sum().backward()
    gradients = dict(original.named_parameters())
    for name, parameter in module.named_parameters():
        if name in gradients:
            assert_same(
                parameter.grad / gradients[name].grad.abs().max(),
                gradients[name].grad / gradients[name].grad.abs().max(),
            )
    assert module.self_attn.k_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*nested tensors")
def test_transformer_encoder(norm_first, batch_first, padded):
    settings = {"norm_first": norm_first, "batch_first": batch_first}

    def make():
        return randomize(nn.TransformerEncoder(encoder_layer(**settings), 2, norm=nn.LayerNorm(8)))

    x = noise(3, 7, 8)

    def run(module):
        out = module(x if batch_first else x.transpose(0, 1), src_key_padding_mask=PADDING if padded else None)
        out = out if batch_first else out.transpose(0, 1)
        return out[~PADDING]  # in its nested tensors torch has nothing but zeros at the padded places

    expected = [("layers.0.self_attn", "attention"), ("layers.1.self_attn", "attention")]
    rewrite(make(), both(run), expected, fresh=make())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_with_decoder():
    def make():
        return randomize(nn.Transformer(8, 2, 1, 2, 16, batch_first=True, norm_first=True))

    mask = nn.Transformer.generate_square_subsequent_mask(5)

    def run(module):
        return module(noise(3, 7, 8), noise(3, 5, 8), tgt_mask=mask, tgt_is_causal=True), module(
            noise(7, 8), noise(5, 8)
        )

    expected = [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn",
        "decoder.layers.1.multihead_attn",
    ]
    with torch.no_grad():
        rewrite(make(), run, [(name, "attention") for name in expected], fresh=make())


def vision_transformer():
    return torchvision.models.VisionTransformer(
        16, 8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    )


def test_vision_transformer_of_torchvision_and_its_export():
    expected = [(f"encoder.layers.encoder_layer_{i}.self_attention", "attention") for i in range(2)]
    x = noise(2, 3, 16, 16)
    module = rewrite(randomize(vision_transformer()), both(lambda m: m(x)), expected, fresh=vision_transformer())
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(module, (x,), dynamic_shapes=dynamic)
    x = noise(3, 3, 16, 16)
    assert_same(program.module()(x), module(x))
    assert_same(copy.deepcopy(module)(x), module(x))


# ------------------------------------------------------------------------------------------------ linear layers


class Transposed(nn.Module):
    """As in GPT-2: weight [I, O]."""

    def __init__(self, num_inputs, num_outputs):
        super().__init__()
        self.nf = num_outputs
        self.weight, self.bias = nn.Parameter(noise(num_inputs, num_outputs)), nn.Parameter(noise(num_outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Handmade(nn.Module):
    """weight [O, I], no bias; ``then`` is done to the product."""

    def __init__(self, num_inputs, num_outputs, then=lambda x: x):
        super().__init__()
        self.weight, self.then = nn.Parameter(noise(num_outputs, num_inputs)), then

    def forward(self, x):
        return self.then(x @ self.weight.t())


@pytest.mark.parametrize("num_outputs", [6, 4], ids=["oblong", "square"])
@pytest.mark.parametrize("make", [Transposed, Handmade])
def test_modules_that_are_linear_layers(make, num_outputs):
    kind = "transposed_linear" if make is Transposed else "linear"
    net = nn.Sequential(nn.Linear(3, 4), make(4, num_outputs), nn.ReLU())
    parameter = net[1].weight
    layer = rewrite(net, lambda m: m(noise(2, 5, 3)), [("1", kind)])[1]
    assert type(layer) is nn.Linear and (layer.in_features, layer.out_features) == (4, num_outputs)
    assert layer.weight.shape == (num_outputs, 4) and layer.weight.is_contiguous() and layer.weight.requires_grad
    assert (layer.weight is parameter) == (make is Handmade)
    assert repr(layer) == f"Linear(in_features=4, out_features={num_outputs}, bias={make is Transposed})"


def test_a_tied_transposed_weight_is_left_alone():
    net = nn.Sequential(Transposed(4, 4), Transposed(4, 4))
    net[1].weight = net[0].weight
    assert prepare(net) == []
    net[1].weight = nn.Parameter(noise(4, 4))
    net[1].bias = net[0].bias  # this one stays what it is
    assert [kind for _, kind in prepare(net)] == ["transposed_linear"] * 2 and net[1].bias is net[0].bias


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4, 4))

    def forward(self, x):
        return self.weight[x]


class Scaled(Handmade):
    def __init__(self):
        super().__init__(4, 4)
        self.gain = nn.Parameter(torch.tensor(2.0))


class Coded(nn.Module):
    """Its weight is held in another type than it is used in."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)

    def forward(self, x):
        return x.float() @ self.weight.float().t()


class OwnStride(nn.Conv2d):
    """Sets what torch made a pair of to a number."""

    def __init__(self, *args):
        super().__init__(*args)
        self.stride, self.dilation, self.kernel_size = 1, 1, 3

    def forward(self, x):
        return super().forward(x).relu()


class OwnBias(nn.Linear):
    """A bias the base class knows nothing of."""

    def forward(self, x):
        return F.linear(x, self.weight, torch.ones(self.out_features))


class OwnCall(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


THEN = {
    "relu": F.relu,
    "bounded": lambda x: x.clamp(-500, 500),
    "tuple": lambda x: (x, x),
    "normalized": lambda x: F.layer_norm(x, x.shape[-1:]),
    "shape": lambda x: x.flatten(1),
    "type": lambda x: x.double(),
    "by_dimension": lambda x: x if x.dim() < 4 else x * 2,
}


@pytest.mark.parametrize("then", THEN)
def test_modules_that_do_more_are_left_alone(then):
    class Layer(nn.Linear):
        def forward(self, x):
            return THEN[then](super().forward(x))

    net = nn.ModuleList([Handmade(4, 6, THEN[then]), Layer(4, 6)])
    assert prepare(net) == []


def test_modules_that_are_something_else_are_left_alone():
    net = nn.ModuleList([Lookup(), Scaled(), OwnBias(4, 6, bias=False), OwnCall(4, 6), OwnStride(4, 6, 3)])
    net.extend([Coded(torch.int32), Coded(torch.float8_e4m3fn)])
    net.extend([nn.Bilinear(3, 3, 3), nn.Embedding(4, 4), nn.LSTM(3, 3), nn.LazyLinear(3)])
    patched = nn.ModuleList([attention(), Transposed(3, 3), timm.layers.Linear(3, 3)])
    for part in patched:
        part.forward = part.forward  # accelerate's hooks and the like
    scripted = torch.jit.script(nn.Linear(3, 4))
    assert prepare(nn.ModuleList([net, scripted])) == []
    assert [name for name, kind in prepare(patched)] == ["0.out_proj"]


# ------------------------------------------------------------------------------------------------ sub-classes


class OwnConvForward(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias)


class Masked(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, input):
        return F.linear(input=input, weight=self.weight * self.mask, bias=self.bias)


SUBCLASSES = {
    "non_dynamic": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(4, 6), "base_class"),
    "timm_linear": (lambda: timm.layers.Linear(4, 6), "base_class"),
    "no_bias": (lambda: timm.layers.Linear(4, 6, bias=False), "base_class"),
    "masked": (lambda: Masked(4, 6), "effective_weight"),
    "conv1d": (lambda: OwnConvForward(4, 6, 3, padding=1, padding_mode="circular"), "base_class"),
    "conv3d": (
        lambda: torchvision.models.video.resnet.Conv3DSimple(4, 6, stride=2, padding=1),
        "base_class",
    ),
    "standardized": (lambda: timm.layers.StdConv2d(4, 6, 3, stride=2), "effective_weight"),
    "standardized_bias": (lambda: timm.layers.StdConv2d(4, 6, (3, 1), dilation=2, bias=True), "effective_weight"),
    "scaled": (lambda: timm.layers.ScaledStdConv2d(4, 6, 3, groups=2, gamma=1.7), "effective_weight"),
    "static_same": (lambda: timm.layers.ScaledStdConv2dSame(4, 6, 3), "effective_weight"),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_sub_classes_become_the_class_they_compute_as(name):
    make, kind = SUBCLASSES[name]
    layer = randomize(make())
    base = next(base for base in OPERATIONS if isinstance(layer, base))
    num_dims = layer._parameters["weight"].dim() - 2
    x = noise(3, 4, *[11, 8, 9][:num_dims])
    net = nn.Sequential(layer, nn.ReLU())
    original, parameter = layer._parameters["weight"], layer._parameters["weight"].detach().clone()
    rewrite(net, lambda m: m(x), [("0", kind)], fresh=nn.Sequential(make(), nn.ReLU()))
    assert net[0] is layer and type(layer) is base
    assert (layer.weight is original) == (kind == "base_class")
    assert torch.equal(original, parameter)
    assert set(layer.state_dict()) <= {"weight", "bias"}
    net(x).sum().backward()
    assert layer.weight.grad.abs().max() > 0
    frozen = nn.Sequential(make()).requires_grad_(False)
    prepare(frozen)
    assert not any(p.requires_grad for p in frozen.parameters())


class MaxNorm(nn.Conv2d):
    """As in EEGNet: writes into its weight."""

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


def test_a_layer_that_writes_into_its_weight():
    net = randomize(nn.Sequential(MaxNorm(4, 6, 3)))
    other = copy.deepcopy(net)
    assert prepare(net) == [("0", "effective_weight")]
    assert_same(net(noise(2, 4, 5, 5)), other(noise(2, 4, 5, 5)))
    assert prepare(other) == [("0", "base_class")]  # the forward has done it
    assert_same(net(noise(2, 4, 5, 5)), other(noise(2, 4, 5, 5)))


class Conditional(nn.Conv2d):
    """Its weight follows its input."""

    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean().sigmoid(), self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2),
        lambda: timm.layers.Conv2dSame(4, 6, 2, stride=2),
        lambda: timm.layers.Conv2dSame(4, 6, 3, stride=8),
        lambda: Conv2dSameExport(4, 6, 3, stride=2),
        lambda: timm.layers.StdConv2dSame(4, 6, 3, stride=2),
        lambda: Conditional(4, 6, 3),
    ],
    ids=["same", "same_even", "same_far", "same_remembered", "standardized_same", "conditional"],
)
def test_layers_whose_padding_or_weight_follows_the_input_are_left_alone(make):
    net, other = randomize(nn.Sequential(make())), randomize(nn.Sequential(make()))
    assert prepare(net) == []
    assert [name for name, _ in net.named_modules()] == ["", "0"]
    assert_same(net(noise(2, 4, 9, 9)), other(noise(2, 4, 9, 9)))  # nothing remembers the probes


def test_a_weight_that_others_use_is_not_replaced():
    net = nn.Sequential(timm.layers.StdConv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1))
    net[0].weight = net[1].weight
    assert prepare(net) == []
    net = nn.Sequential(timm.layers.Linear(4, 4), nn.Embedding(4, 4))
    net[0].weight = net[1].weight
    assert prepare(net) == [("0", "base_class")] and net[0].weight is net[1].weight


# ------------------------------------------------------------------------------------------------ computed weights


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).t()


def parametrized(layer, name="weight"):
    parametrize.register_parametrization(layer, name, Symmetric())
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


COMPUTED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "own": lambda: parametrized(nn.Linear(4, 4, bias=False)),
    "twice": lambda: parametrized(parametrizations.weight_norm(nn.Linear(4, 4))),
    "old_weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "old_spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "pruned": lambda: pruned(nn.Linear(4, 4)),
}
LINEAR = [("0", "constant")]


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("name", COMPUTED)
def test_computed_weights_become_parameters(name, frozen):
    def make():
        torch.manual_seed(1)
        return nn.Sequential(COMPUTED[name](), nn.ReLU()).requires_grad_(not frozen)

    x = noise(5, 4)
    net = make()
    net.train()(x)  # a spectral norm moves
    layer = rewrite(net, lambda m: m(x), LINEAR, fresh=make())[0]
    assert type(layer) is nn.Linear and not layer._buffers and not layer._modules
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad is not frozen
    assert not layer._forward_pre_hooks


def test_computed_weights_of_a_copy_and_of_its_original():
    """Torch's copies of a parametrized module share its class: what is done to one must not reach the other."""
    original = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)))
    x = noise(2, 4)
    before = original(x)
    module = copy.deepcopy(original)
    for net in (module, original):
        assert prepare(net) == LINEAR
        assert_same(module(x), before)
        assert_same(original(x), before)


def test_computed_weights_in_training_mode_are_those_of_evaluation_mode():
    net = randomize(nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))))  # its vectors are far off
    before = copy.deepcopy(net).eval()(noise(2, 4))
    assert prepare(net.train()) == LINEAR and net[0].training
    assert_same(net(noise(2, 4)), before)


def test_a_computed_weight_that_others_use_is_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), parametrized(nn.Linear(4, 4)))
    net[1].parametrizations.weight.original = net[0].weight
    assert prepare(net) == []
    net = nn.ModuleList([parametrized(nn.MultiheadAttention(8, 2, kdim=6), "q_proj_weight"), nn.Linear(8, 8)])
    net[0].parametrizations.q_proj_weight.original = net[1].weight
    assert prepare(net) == [("0.out_proj", "base_class")]


def test_computed_weights_of_other_modules():
    def make():
        torch.manual_seed(2)
        return nn.ModuleDict(
            {
                "attention": parametrizations.spectral_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
                "inner": nn.MultiheadAttention(8, 2),
                "standardized": parametrizations.weight_norm(timm.layers.StdConv2d(4, 4, 3)),
            }
        )

    def run(module):
        x = noise(2, 5, 8)
        return module["attention"](x, x, x)[0], module["inner"](x, x, x)[0], module["standardized"](noise(1, 4, 6, 6))

    net, fresh = make(), make()
    parametrizations.weight_norm(net["inner"].out_proj)
    parametrizations.weight_norm(fresh["inner"].out_proj)
    expected = [
        ("attention", "constant"),
        ("inner.out_proj", "constant"),
        ("standardized", "constant"),
        ("attention", "attention"),
        ("inner", "attention"),
        ("standardized", "effective_weight"),
    ]
    rewrite(net, run, expected, fresh=fresh)


# ------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("name", NETS)
def test_ordinary_networks_stay_as_they_are(name):
    net = NETS[name]()
    kinds, tensors = [type(m) for m in net.modules()], dict(net.named_parameters())
    assert prepare(net) == []
    assert kinds == [type(m) for m in net.modules()]
    assert all(tensors[n] is p for n, p in net.named_parameters())


def test_it_takes_no_time_where_there_is_nothing_to_do():
    net = torchvision.models.resnet18()
    start = time.perf_counter()
    assert prepare(net) == []
    assert time.perf_counter() - start < 0.2  # two milliseconds


def test_weights_without_values():
    """The structure alone is enough to repeat the rewrites."""
    with torch.device("meta"):
        net = nn.Sequential(encoder_layer(), Transposed(8, 4), timm.layers.StdConv2d(4, 4, 3))
    apply(net, [("0.self_attn", "attention"), ("1", "transposed_linear"), ("2", "effective_weight")])
    assert net[1].weight.shape == (4, 8) and net[1].weight.is_meta


# ------------------------------------------------------------------------------------------------ asked for


@pytest.mark.parametrize("part", [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 1)], ids=str)
def test_an_upper_limit_is_taken_away(part):
    """In the object itself, so that whoever holds it has the ReLU, with its hooks."""
    calls, x = [], 10 * noise(3, 4)
    part.register_forward_hook(lambda *args: calls.append(1))
    net = nn.Sequential(nn.Identity(), part)
    apply(net, [("1", "relu")])
    assert net[1] is part and type(part) is nn.ReLU
    assert torch.equal(net(x.clone()), F.relu(x)) and calls == [1]
    assert repr(part) == repr(nn.ReLU(inplace=part.inplace))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 6, bias=False),
        lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    ],
)
def test_a_bias_is_added(make):
    """Zeros at first; a network without values takes those of a saved one."""
    layer = make()
    x = noise(2, 4) if isinstance(layer, nn.Linear) else noise(2, 4, 5, 5)
    before = layer(x)
    layer.weight.requires_grad_(False)
    apply(layer, [("", "bias")])
    assert torch.equal(layer(x), before) and not layer.bias.requires_grad
    layer.bias.data += torch.arange(6.0)
    again = make()
    apply(again, [("", "bias")])
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and not torch.equal(layer(x), before)
