"""What all generators must do beside test_contracts.py, and the reference generator."""

from dataclasses import replace

import pytest
import torch
from conftest import NETS, SPEC, as_teacher
from torch import nn

from dfq.dataset import SyntheticDataset
from dfq.generators._base import batch_rng
from dfq.generators.gaussian import Gaussian
from dfq.generators.gdfq import GDFQ
from dfq.generators.genie import Genie
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import generate
from dfq.teacher import Teacher

ZEROQ = ZeroQ(batch_size=8, iterations=2)
GENIE = Genie(batch_size=8, iterations=2, num_channels=8)
QIMERA = GDFQ(
    batch_size=8, iterations=2, train_batch_size=8, num_channels=8, superposed=0.5, embedding="classifier", low_pass=0.3
)
AUGMENTED = replace(ZEROQ, start="pink", blur=0.6, flip=True, shift=2, low_pass=0.3, keep_best=True)
AUGMENTED = replace(AUGMENTED, class_weight=1.0, min_confidence=0.3)


def name_of(generator):
    return type(generator).__name__ + ("_augmented" if generator is AUGMENTED else "")


def every(*generators):
    return pytest.mark.parametrize("generator", generators, ids=name_of)


def sample(generator, teacher, seed=0, index=0, num_samples=32):
    return generator.sample(teacher, num_samples, batch_rng(seed, index), lambda amount: None)


def test_batch_rng_never_repeats_a_stream():
    """(1, 11) and (11, 1) and (1, 1)...: no two share numbers."""
    firsts = {torch.rand((), generator=batch_rng(seed, index)).item() for seed in range(12) for index in range(12)}
    assert len(firsts) == 144


def test_gaussian_is_standard_normal(make_teacher):
    images = sample(Gaussian(), make_teacher("bare"), num_samples=256)
    assert abs(float(images.mean())) < 0.02 and abs(float(images.std()) - 1) < 0.02
    assert float(images.abs().max()) > 3.5


@every(AUGMENTED, replace(GENIE, swing="shared", low_pass=0.3), QIMERA)
def test_same_bits_whatever_was_drawn_before(generator, make_teacher):
    teacher = make_teacher("plain")
    torch.manual_seed(0)
    first = sample(generator, teacher)
    torch.manual_seed(1)
    other = sample(generator, teacher, index=1)
    assert torch.equal(sample(generator, teacher), first) and not torch.equal(other, first)


@every(AUGMENTED, GENIE)
def test_a_killed_run_goes_on_bit_for_bit(generator, make_teacher, tmp_path, monkeypatch):
    """The second batch is interrupted half way; what is made later is what would have been made at once."""
    teacher = make_teacher("plain")
    whole = generate(teacher, generator, 20, 3, tmp_path / "whole")
    make, made = type(generator).sample, []

    def killed(self, teacher, num_samples, rng, advance):
        def until(amount):
            if made:
                raise KeyboardInterrupt
            advance(amount)

        images = make(self, teacher, num_samples, rng, until)
        made.append(images)
        return images

    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(teacher, generator, 20, 3, tmp_path / "killed")
    assert len(SyntheticDataset(tmp_path / "killed")) == 8
    assert not any(m._forward_pre_hooks or m.training for m in teacher.module.modules())
    assert generate(teacher, generator, 20, 3, tmp_path / "killed").sha256 == whole.sha256


class InPlace(nn.Module):
    """Normalizes its input in place, as some networks' forward does."""

    def __init__(self):
        super().__init__()
        self.net = NETS["plain"]()

    def forward(self, x):
        x -= 0.1
        return self.net(x)


@every(Gaussian(batch_size=8), ZEROQ, AUGMENTED, GENIE, QIMERA)
def test_a_network_that_writes_into_its_input(generator, tmp_path):
    """What is stored is what the generator made: the teacher says the same of it again."""
    net = InPlace()
    net.net = as_teacher(net.net).module
    teacher = Teacher(net.eval(), "classification", SPEC)
    found = generate(teacher, generator, 8, 0, tmp_path / "d").tensors()
    with torch.no_grad():
        torch.testing.assert_close(teacher(found["images"].clone()), found["logits"], rtol=1e-4, atol=1e-5)


class Fails(nn.Module):
    def forward(self, x):
        if x.requires_grad:
            raise RuntimeError("no gradients here")
        return x


@every(ZEROQ, GENIE, QIMERA)
def test_no_hook_stays_behind_when_the_network_fails(generator):
    net = NETS["plain"]()
    net.append(Fails())
    teacher = as_teacher(net)
    with pytest.raises(RuntimeError, match="no gradients here"):
        sample(generator, teacher)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())


@every(ZEROQ, GENIE, QIMERA)
def test_a_teacher_in_training_mode_stays_as_it_was(generator, make_teacher):
    teacher = make_teacher("plain")
    before = {k: v.clone() for k, v in teacher.module.state_dict().items()}
    teacher.module.train()
    teacher.module[1].eval()
    modes = [m.training for m in teacher.module.modules()]
    sample(generator, teacher)
    assert [m.training for m in teacher.module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in teacher.module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in teacher.module.modules())
