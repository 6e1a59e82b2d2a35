"""PSAQ: the entropy against NumPy, where tokens are found, and what it comes to."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import SPEC, as_teacher
from torch import nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer, VisionTransformer

from dfq.errors import UserError
from dfq.generators._attention import PatchTokens, has_attention
from dfq.generators._base import batch_rng
from dfq.generators.psaq import PSAQ
from dfq.losses.patch_similarity import gaussian_entropy, kernel_entropy, patch_similarities
from dfq.settings import resolve
from dfq.teacher import InputSpec, Teacher
from dfq.testing import TinyTransformer

QUICK = PSAQ(iterations=4, shift=1)
STILL = replace(QUICK, flip=False, shift=0)
BIG = InputSpec((3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(generator, teacher, seed=0, index=0, num_samples=4):
    return generator.sample(teacher, num_samples, batch_rng(seed, index), lambda amount: None)


# ------------------------------------------------------------------------------------------------ the entropy


def pairs(tokens):
    """Cosines of all pairs of different tokens [L, C], one by one."""
    rows = tokens.numpy().astype(np.float64)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    return np.array(cosines)


def test_similarities_are_those_of_all_pairs():
    tokens = noise(3, 7, 5)
    for found, row in zip(patch_similarities(tokens), tokens, strict=True):
        np.testing.assert_allclose(np.sort(found.numpy()), np.sort(np.repeat(pairs(row), 2)), atol=1e-6)


def test_gaussian_entropy_is_that_of_numpy():
    tokens = noise(4, 9, 6)
    wanted = [0.5 * np.log(2 * np.pi * np.e * pairs(row).var()) for row in tokens]
    np.testing.assert_allclose(gaussian_entropy(patch_similarities(tokens)).numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bandwidth", [0.01, 0.05, 0.3])
def test_kernel_entropy_is_that_of_numpy(bandwidth):
    """The integral on a grid thirty times as fine and three times as wide."""
    tokens = noise(4, 9, 6)
    x = np.linspace(-1 - 12 * bandwidth, 1 + 12 * bandwidth, 30 * int(2 / bandwidth + 24) + 1)
    wanted = []
    for row in tokens:
        kernels = np.exp(-0.5 * ((x[:, None] - pairs(row)) / bandwidth) ** 2) / (bandwidth * np.sqrt(2 * np.pi))
        f = kernels.mean(1)
        wanted.append(-np.trapezoid(f * np.log(np.maximum(f, 1e-300)), x))
    found = kernel_entropy(patch_similarities(tokens), bandwidth)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-3)


def test_the_gaussian_estimate_is_an_upper_bound():
    """Of the same density: a kernel adds its own variance."""
    values = torch.rand(5, 400, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spread = 0.5 * torch.log(2 * torch.pi * torch.e * (values.var(1, correction=0) + 0.02**2))
    assert (kernel_entropy(values, 0.02) < spread).all()
    assert float(kernel_entropy(values, 0.02).mean()) == pytest.approx(np.log(2), abs=0.05)  # uniform from -1 to 1


@pytest.mark.parametrize("entropy", [gaussian_entropy, lambda values: kernel_entropy(values, 0.1)])
def test_gradients_against_finite_differences(entropy):
    tokens = noise(2, 5, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entropy(patch_similarities(x)), tokens)


def test_equal_tokens_have_a_finite_gradient():
    tokens = torch.ones(2, 5, 4, requires_grad=True)
    (gaussian_entropy(patch_similarities(tokens)) + kernel_entropy(patch_similarities(tokens), 0.1)).sum().backward()
    assert torch.isfinite(tokens.grad).all()


# ------------------------------------------------------------------------------------------------ finding tokens


def vit(name="vit_tiny_patch16_224", **options):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **options}
    return timm.create_model(name, pretrained=False, num_classes=5, **options)


def swin():
    options = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, img_size=32, num_classes=5, **options)


NETS = {  # → number of rows and tokens of each product of attention and values, for 2 images
    "vit": (vit, [(2, 16, 32)] * 2),
    "registers": (lambda: vit(reg_tokens=3), [(2, 16, 32)] * 2),
    "no class token": (lambda: vit(class_token=False, global_pool="avg"), [(2, 16, 32)] * 2),
    "deit": (lambda: vit("deit_tiny_distilled_patch16_224"), [(2, 16, 32)] * 2),
    "swin": (swin, [(32, 16, 16)] * 2 + [(8, 16, 32)] * 2),
    "torchvision vit": (lambda: VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5), [(2, 16, 32)] * 2),
    "torchvision swin": (
        lambda: SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=5),
        [(32, 16, 16)] * 2 + [(8, 16, 32)] * 2,
    ),
    "talking heads": (
        lambda: timm.create_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        [(2, 16, 32)] * 2,  # attention to the class alone has one token
    ),
}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETS)
def test_tokens_of_patches_are_found(name):
    make, wanted = NETS[name]
    net, found = seeded(make), []
    x = noise(2, 3, 32, 32).requires_grad_()
    before = net(x)
    with PatchTokens(lambda tokens: found.append(tuple(tokens.shape))):
        torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert found == wanted


@pytest.mark.parametrize("name", ["vit", "deit", "swin", "torchvision vit"])
@pytest.mark.parametrize("entropy", ["gaussian", "kernel"])
def test_entropy_rises(name, entropy):
    teacher = as_teacher(seeded(NETS[name][0]), BIG)
    for norm in teacher.module.modules():  # fresh weights attend to all patches alike, and all tokens come out equal
        if isinstance(norm, nn.LayerNorm):
            norm.weight.fill_(2.0)
    generator = replace(STILL, iterations=20, entropy=entropy, class_weight=0.0, variation_weight=0.0, bandwidth=0.05)
    reached = []
    for images in (noise(4, 3, 32, 32).clamp(*BIG.limits(teacher.device)), sample(generator, teacher)):
        with generator.negative_entropies(4) as losses:
            teacher(images.requires_grad_())
        assert len(losses) == len(NETS[name][1])
        reached.append(float(torch.stack(losses).mean().detach()))
    assert reached[1] < reached[0] - 0.25, reached


class ByHand(nn.Module):
    """Attention as different people write it; tokens that are not patches stand at the end."""

    def __init__(self, product):
        super().__init__()
        self.qkv, self.product = nn.Conv2d(3, 24, 2, stride=2), product
        self.other = nn.Parameter(torch.ones(1, 2, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).mT.chunk(3, -1)
        others = self.other.expand(len(x), -1, -1)
        q, k, v = (torch.cat([part, others], dim=1) for part in (q, k, v))
        return self.head(self.product((q @ k.mT).softmax(-1), v).mean(1))


PRODUCTS = {
    "matmul": lambda a, v: a @ v,
    "bmm": lambda a, v: torch.bmm(F.dropout(a, 0.1, False), v),
    "einsum": lambda a, v: torch.einsum("nlm,nmc->nlc", a.clone(), v),
    "columns": lambda a, v: (v.mT @ a.mT).mT,
    "halves": lambda a, v: torch.cat([part @ v for part in a.chunk(2, 1)], 1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_are_not_fused(name):
    net, found = seeded(lambda: ByHand(PRODUCTS[name])), []
    x = noise(3, 3, 8, 8).requires_grad_()
    q, k, v = net.qkv(x.detach()).flatten(2).mT.chunk(3, -1)
    q, k, v = (torch.cat([part, net.other.expand(3, -1, -1)], 1) for part in (q, k, v))
    wanted = (q @ k.mT).softmax(-1) @ v
    with PatchTokens(found.append):
        net(x)
    if name == "halves":
        assert [len(tokens[0]) for tokens in found] == [9, 9]
        return
    torch.testing.assert_close(found[0].detach(), wanted[:, :16])
    assert len(found) == 1


def test_multi_head_attention_is_taken_before_its_projection():
    net, found = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True)), []
    x = noise(2, 5, 8).requires_grad_()
    with PatchTokens(found.append):
        out, weights = net(x, x, x)
    torch.testing.assert_close(F.linear(found[0], net.out_proj.weight, net.out_proj.bias), out)
    assert weights.shape == (2, 5, 5) and len(found) == 1


class Gate(nn.Module):
    """A softmax that is no attention between patches: weights of two branches, and a mean over bins."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 10)
        self.register_buffer("bins", torch.arange(8.0))

    def forward(self, x):
        x = self.conv(x)
        share = self.gate(x.mean((2, 3))).softmax(1)
        return self.head(share * x.mean((2, 3)) + (share @ self.bins)[:, None])


@pytest.mark.parametrize("kind", ["plain", "residual", "mlp", "bare"])
def test_networks_without_attention(kind, make_teacher):
    assert not has_attention(make_teacher(kind))


def test_a_softmax_alone_is_no_attention():
    assert not has_attention(as_teacher(Gate())) and has_attention(as_teacher(TinyTransformer()))


# ------------------------------------------------------------------------------------------------ what it makes


@pytest.mark.parametrize("generator", [QUICK, replace(QUICK, prior="task_independent", entropy="kernel")])
def test_same_bits_whatever_was_drawn_before(generator):
    teacher = as_teacher(TinyTransformer())
    torch.manual_seed(0)
    first = sample(generator, teacher)
    torch.manual_seed(1)
    other = sample(generator, teacher, index=1)
    assert torch.equal(sample(generator, teacher), first) and not torch.equal(other, first)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.module.modules())


def test_pixels_stay_between_black_and_white():
    teacher = as_teacher(TinyTransformer())
    mean, std = torch.tensor(SPEC.mean).view(3, 1, 1), torch.tensor(SPEC.std).view(3, 1, 1)
    inside = []
    for clip in (True, False):
        pixels = sample(replace(QUICK, learning_rate=3.0, clip=clip, low_pass=0.4), teacher) * std + mean
        inside.append(bool((pixels > -1e-5).all() and (pixels < 1 + 1e-5).all()))
    assert inside == [True, False]


def test_class_targets_are_reached():
    teacher, losses = as_teacher(TinyTransformer()), []
    rng = batch_rng(0, 0)
    torch.randn(20, 3, 8, 8, generator=rng)
    targets = resolve("task", "classification").synthesis_targets(20, 10, rng, 0.0)  # the numbers that sample draws
    for weight in (0.0, 10.0):
        generator = replace(STILL, iterations=40, class_weight=weight, label_smoothing=0.0)
        images = sample(generator, teacher, num_samples=20)
        with torch.no_grad():
            losses.append(float(F.cross_entropy(teacher(images), targets)))
    assert losses[1] < losses[0] - 0.2


def test_without_classes_outputs_need_not_be_logits():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = TinyTransformer()

        def forward(self, x):
            return [{"boxes": self.net(x)}]

    net = Maps()
    teacher = as_teacher(net.net)
    teacher = Teacher(net, "classification", SPEC)
    images = sample(replace(QUICK, prior="task_independent"), teacher)
    assert images.shape == (4, 3, 8, 8) and images.isfinite().all()
    with pytest.raises(UserError, match="allowed: logits"):
        sample(QUICK, teacher)


def test_variation_weight_makes_images_smooth():
    teacher = as_teacher(TinyTransformer())
    rough, smooth = (
        float(sample(replace(QUICK, iterations=20, variation_weight=weight), teacher).diff(dim=-1).abs().mean())
        for weight in (0.0, 20.0)
    )
    assert smooth < 0.7 * rough


# ------------------------------------------------------------------------------------------------ mistakes


def test_a_network_that_does_not_take_its_input():
    teacher = Teacher(seeded(vit), "classification", SPEC)
    with pytest.raises(UserError, match=r"got an error from VisionTransformer on an input of \[2, 3, 8, 8\]"):
        sample(QUICK, teacher)


def test_a_shift_that_no_reflection_can_fill():
    with pytest.raises(UserError) as error:
        sample(PSAQ(shift=8), as_teacher(TinyTransformer()))
    assert str(error.value) == "got generator.shift=8 and images of 8x8 pixels; allowed: a whole number from 0 to 7"
