"""Tiny teachers with fixed weights: what a test of a layer above needs in a millisecond."""

import functools
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reads the network

import pytest
import torch
from torch import nn

from dfq.dataset import SyntheticDataset
from dfq.settings import resolve
from dfq.teacher import InputSpec, Teacher, TokenSpec
from dfq.testing import SPEC, tiny_network

NUM_CLASSES = 10

os.fsync = lambda _file: None  # no test's files have to survive a power failure; each would wait for the disk


def pytest_runtest_setup():
    """What torch.onnx.export knows of operators takes half a second to read, for each file anew: here once."""
    module = sys.modules.get("torch.onnx._internal.exporter._registration")  # none has been exported before it is there
    kind = getattr(module, "ONNXRegistry", None)
    if kind is None or isinstance(vars(kind).get("from_torchlib"), staticmethod):
        return
    read = functools.cache(kind.from_torchlib)

    def from_torchlib(*args, **options):
        registry, known = kind(), read(*args, **options)
        vars(registry).update(vars(known))
        registry.functions = {target: list(found) for target, found in known.functions.items()}  # it may be added to
        return registry

    kind.from_torchlib = staticmethod(from_torchlib)


class Residual(nn.Module):
    """Depthwise, pointwise, batch norm without affine parameters, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels, affine=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + self.bn2(self.pointwise(self.relu(self.bn1(self.depthwise(x)))))


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Residual(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, NUM_CLASSES),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, NUM_CLASSES))


def bare() -> nn.Module:
    """No batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, NUM_CLASSES),
    )


NETS = {"plain": tiny_network, "residual": residual, "mlp": mlp, "bare": bare}


def settle(module: nn.Module, size=SPEC.size, seed: int = 0, num_samples: int = 128) -> torch.Tensor:
    """Give ``module`` weights from ``seed`` and its batch norms the statistics of the images that are returned."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            fan_in = p[0].numel() if p.dim() > 1 else 1
            p.copy_(
                torch.randn(p.shape, generator=rng) * (2 / fan_in) ** 0.5
                if p.dim() > 1
                else torch.randn(p.shape, generator=rng) * 0.3
            )
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            if norm.weight is not None:
                norm.weight.copy_(torch.rand(norm.weight.shape, generator=rng) + 0.5)
        # Smooth images with a mean: nothing like Gaussian noise, so that matching statistics is work.
        coarse = torch.randn(num_samples, size[0], *(max(2, n // 4) for n in size[1:]), generator=rng)
        images = torch.nn.functional.interpolate(coarse, size[1:], mode="bilinear") * 1.5 + 0.7
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        module.train()(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    module.eval()
    return images


def as_teacher(module: nn.Module, spec: InputSpec = SPEC, name: str = "tiny", seed: int = 0) -> Teacher:
    settle(module, spec.size, seed)
    return Teacher(module, "classification", spec, name=name)


@pytest.fixture
def make_teacher():
    """``make_teacher("plain")``: a settled tiny teacher."""
    return lambda kind="plain", seed=0: as_teacher(NETS[kind](), name=kind, seed=seed)


class _Language(nn.Module):
    """Each token says what comes next, from itself and the one before it."""

    def __init__(self):
        super().__init__()
        self.tokens, self.hidden, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30)

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        return self.head(x + self.hidden(nn.functional.pad(x, (0, 0, 1, -1))).relu())


def language():
    """A tiny causal language model that is none of transformers'."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Teacher(_Language(), "language_modeling", TokenSpec(30, 12), name="language")


@pytest.fixture
def make_dataset(tmp_path):
    """A dataset of smooth images, or random token ids, and the teacher's logits, in shards of ``batch_size``."""

    def make(teacher, num_samples=40, batch_size=16, name="dataset"):
        if isinstance(teacher.input_spec, TokenSpec):
            images = teacher.input_spec.example(num_samples, torch.Generator().manual_seed(1))
        else:
            images = settle(NETS["bare"](), teacher.input_spec.size, seed=1, num_samples=num_samples)
        task = resolve("task", teacher.task)
        dataset = SyntheticDataset.create(tmp_path / name, {"seed": 0}, {"pixels": False, "labels": False})
        for index, part in enumerate(images.split(batch_size)):
            with torch.no_grad():
                dataset.write_shard(index, {"images": part, "logits": task.raw_outputs(teacher, part)}, 0.0)
        return dataset

    return make
