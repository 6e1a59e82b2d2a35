"""What all generators must do beside test_contracts.py, and the reference generator."""

from dataclasses import replace

import pytest
import torch
from conftest import NETS, SPEC, as_teacher
from torch import nn

from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.generators._base import batch_rng
from dfq.generators.gaussian import Gaussian
from dfq.generators.gdfq import GDFQ
from dfq.generators.genie import Genie
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import generate
from dfq.settings import resolve
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


# ------------------------------------------------------------------------------------------------ mistakes

NEEDS = {
    "zeroq": "without batch norm (bare), and zeroq matches batch-norm statistics",
    "genie": "without batch norm (bare), and genie matches batch-norm statistics",
    "gdfq": "without batch norm (bare), and gdfq matches batch-norm statistics",
    "deep_inversion": "without normalization that has statistics or a weight (bare), and deep_inversion matches the "
    "features behind it",
    "psaq": "without attention between patches (bare), and psaq maximizes the entropy of its patches' similarities",
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_network_that_lacks_what_is_needed_is_told_which_generators_would_do(name, make_teacher):
    with pytest.raises(UserError) as error:
        sample(resolve("generator", name), make_teacher("bare"))
    got, _, allowed = str(error.value).partition("; allowed: ")
    assert got == f"got a network {NEEDS[name]}"
    names = {f"generator={other}" for other in NEEDS}
    assert {"generator=gaussian", "generator=spectrum"} <= set(allowed.split(" | ")) and not names & set(
        allowed.split(" | ")
    )


WRONG = [
    ("deep_inversion", {"affine_weight": -1}, "got generator.affine_weight=-1; allowed: a number >= 0"),
    ("deep_inversion", {"flip": 1}, "got generator.flip=1; allowed: "),
    ("deep_inversion", {"statistics": "batch"}, "got generator.statistics='batch'; allowed: "),
    ("genie", {"swing": "always"}, "got generator.swing='always'; allowed: independent | shared | none"),
    ("genie", {"num_channels": 2}, "got generator.num_channels=2; allowed: a whole number >= 4"),
    ("genie", {"network_decay": 1.5}, "got generator.network_decay=1.5; allowed: a number from 0 to 1"),
    ("genie", {"latent_learning_rate": 0}, "got generator.latent_learning_rate=0; allowed: a number > 0"),
    ("genie", {"iterations": 0}, "got generator.iterations=0; allowed: a whole number >= 1"),
    ("psaq", {"entropy": "renyi"}, "got generator.entropy='renyi'; allowed: gaussian | kernel"),
    ("psaq", {"prior": "task"}, "got generator.prior='task'; allowed: class | task_independent"),
    ("psaq", {"bandwidth": 0}, "got generator.bandwidth=0; allowed: a number from 0.005 to 0.5"),
    ("psaq", {"warmup": 2}, "got generator.warmup=2; allowed: a number from 0 to 1"),
    ("psaq", {"iterations": 0}, "got generator.iterations=0; allowed: a whole number >= 1"),
    ("zeroq", {"start": "brown"}, "got generator.start='brown'; allowed: white | pink | diverse"),
    ("zeroq", {"statistics": "all"}, "got generator.statistics='all'; allowed: batch | image"),
    ("zeroq", {"blur": -1}, "got generator.blur=-1; allowed: a number >= 0"),
    ("zeroq", {"shift": 0.5}, "got generator.shift=0.5; allowed: a whole number >= 0"),
    ("zeroq", {"low_pass": True}, "got generator.low_pass=true; allowed: a number >= 0"),
    ("zeroq", {"min_confidence": 2}, "got generator.min_confidence=2; allowed: a number from 0 to 1"),
    ("zeroq", {"smoothing": 0.1}, "got generator.smoothing=0.1; allowed: "),
]


@pytest.mark.parametrize("name, setting, message", WRONG)
def test_wrong_settings(name, setting, message):
    with pytest.raises(UserError) as error:
        resolve("generator", name, **setting)
    assert str(error.value).startswith(message)
