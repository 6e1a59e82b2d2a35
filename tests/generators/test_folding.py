"""Norms folded while images are made: the same function, distances and gradient, and nothing left behind."""

from contextlib import nullcontext

import pytest
import timm
import torch
from conftest import NETS, SPEC, as_teacher, settle
from torch import nn

from dfq.generators import _statistics
from dfq.generators._folding import folded_batch_norms
from dfq.generators._statistics import batch_norm_distances
from dfq.hooks import evaluation_mode
from dfq.teacher import Teacher


def teacher_of(kind):
    if kind != "timm":
        return as_teacher(NETS[kind]())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("resnet18", pretrained=False, num_classes=10)
    settle(net, (3, 32, 32), num_samples=16)
    return Teacher(net, "classification", type(SPEC)((3, 32, 32), SPEC.mean, SPEC.std))


def measured(teacher, images, statistics):
    """Outputs, distances and the gradient of both."""
    images = images.clone().requires_grad_()
    with evaluation_mode(teacher.module), batch_norm_distances(teacher, statistics) as distances:
        outputs = teacher.module(images.clone())
    loss = torch.stack(distances).mean() + outputs.square().mean()
    return outputs.detach(), torch.stack(distances).detach(), torch.autograd.grad(loss, images)[0]


@pytest.mark.parametrize("statistics", ["batch", "image"])
@pytest.mark.parametrize("kind", ["plain", "residual", "mlp", "timm"])
def test_the_same_function_distances_and_gradient(kind, statistics, monkeypatch):
    teacher = teacher_of(kind)
    images = torch.randn(4, *teacher.input_spec.size, generator=torch.Generator().manual_seed(1))
    with folded_batch_norms(teacher) as folded:
        assert len(folded) >= (20 if kind == "timm" else 1)  # most of them: what follows counts
    found = measured(teacher, images, statistics)
    with monkeypatch.context() as patch:
        patch.setattr(_statistics, "folded_batch_norms", lambda _: nullcontext({}))
        wanted = measured(teacher, images, statistics)
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) < 2e-4 * float(other.norm())


def test_nothing_stays_behind_also_when_the_network_fails():
    teacher = teacher_of("residual")
    before = {name: (value, value.clone()) for name, value in teacher.module.state_dict(keep_vars=True).items()}
    with pytest.raises(RuntimeError, match="on purpose"), folded_batch_norms(teacher) as folded:
        assert folded
        raise RuntimeError("on purpose")
    after = teacher.module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value)
    assert not any("forward" in vars(part) for part in teacher.module.modules())


def test_a_norm_with_a_channel_that_is_switched_off_stays():
    teacher = teacher_of("plain")
    norms = list(teacher.batch_norms.values())
    with torch.no_grad():
        norms[0].weight[2] = 0
        norms[1].weight[1] = 1e-4 * norms[1].bias[1].abs().clamp(min=0.1)
        norms[1].bias[1] = 0.1
    with folded_batch_norms(teacher) as folded:
        assert folded == {}
    with torch.no_grad():
        norms[0].weight[2] = 1.0
    with folded_batch_norms(teacher) as folded:
        assert list(folded) == norms[:1]


def test_what_is_read_elsewhere_too_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

        def forward(self, x):
            x = self.conv(x)
            return self.head((self.norm(x) + x).mean((2, 3)))

    with folded_batch_norms(as_teacher(Twice())) as folded:
        assert folded == {}
