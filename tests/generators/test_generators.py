"""What is particular to one generator; what all must do is in test_contracts.py."""

import pytest
import torch
from conftest import NETS, SPEC, as_teacher, settle
from torch import nn

from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators._base import batch_rng
from dfq.generators.gaussian import Gaussian
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import generate
from dfq.teacher import Teacher


def mean_distance(teacher, images):
    distances = batch_norm_match(teacher, images)
    return sum(distances.values()) / len(distances)


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


@pytest.mark.parametrize("kind", ["plain", "residual", "mlp"])
def test_zeroq_comes_much_closer_than_noise(make_teacher, kind):
    teacher = make_teacher(kind)
    noise = mean_distance(teacher, sample(Gaussian(), teacher))
    matched = mean_distance(teacher, sample(ZeroQ(), teacher))
    assert matched < noise / 5, (matched, noise)


def test_more_iterations_come_closer(make_teacher):
    teacher = make_teacher("plain")
    few, many = (mean_distance(teacher, sample(ZeroQ(iterations=n), teacher)) for n in (3, 30))
    assert many < few


def test_zeroq_with_class_targets_pulls_the_teachers_answers_to_them(make_teacher):
    """Certain answers, for as many samples of one class as of another."""
    teacher = make_teacher("plain")
    certainty, most = [], []
    for weight in (0.0, 10.0):
        images = sample(ZeroQ(class_weight=weight, label_smoothing=0.0, iterations=60), teacher, num_samples=40)
        with torch.no_grad():
            answers = teacher(images).softmax(1)
        certainty.append(float(answers.amax(1).mean()))
        most.append(int(answers.argmax(1).bincount().max()))
    assert certainty[1] > certainty[0] + 0.1 and most[1] < most[0]


def test_zeroq_keeps_pixels_between_black_and_white(make_teacher):
    teacher = make_teacher("plain")
    mean, std = torch.tensor(SPEC.mean).view(3, 1, 1), torch.tensor(SPEC.std).view(3, 1, 1)
    inside = [
        ((images * std + mean) > -1e-5).all() and ((images * std + mean) < 1 + 1e-5).all()
        for images in (
            ZeroQ(iterations=8, learning_rate=1.0, clip=clip).sample(teacher, 16, batch_rng(0, 0), lambda n: None)
            for clip in (True, False)
        )
    ]
    assert inside == [True, False]


def test_zeroq_needs_batch_norm(make_teacher):
    with pytest.raises(UserError) as error:
        sample(ZeroQ(), make_teacher("bare"))
    got, _, allowed = str(error.value).partition("; allowed: ")
    assert got == "got a network without batch norm (bare), and zeroq matches batch-norm statistics"
    names = allowed.split(" | ")
    assert "generator=gaussian" in names and "generator=zeroq" not in names


def test_zeroq_leaves_a_teacher_in_training_mode_as_it_was(make_teacher):
    teacher = make_teacher("plain")
    before = {k: v.clone() for k, v in teacher.module.state_dict().items()}
    teacher.module.train()
    teacher.module[1].eval()
    modes = [m.training for m in teacher.module.modules()]
    sample(ZeroQ(iterations=2), teacher)
    assert [m.training for m in teacher.module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in teacher.module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in teacher.module.modules())


class Fails(nn.Module):
    def forward(self, x):
        if x.requires_grad:
            raise RuntimeError("no gradients here")
        return x


def test_zeroq_leaves_no_hook_behind_when_the_network_fails():
    net = NETS["plain"]()
    net.append(Fails())
    teacher = as_teacher(net)
    with pytest.raises(RuntimeError, match="no gradients here"):
        sample(ZeroQ(iterations=2), teacher)
    assert not any(m._forward_pre_hooks for m in net.modules())


class InPlace(nn.Module):
    """Normalizes its input in place, as some networks' forward does."""

    def __init__(self):
        super().__init__()
        self.net = NETS["plain"]()

    def forward(self, x):
        x -= 0.1
        return self.net(x)


@pytest.mark.parametrize(
    "generator", [Gaussian(batch_size=8), ZeroQ(batch_size=8, iterations=2)], ids=["gaussian", "zeroq"]
)
def test_a_network_that_writes_into_its_input(generator, tmp_path):
    """What is stored is what the generator made: the teacher says the same of it again."""
    net = InPlace()
    net.net = as_teacher(net.net).module
    teacher = Teacher(net.eval(), "classification", SPEC)
    found = generate(teacher, generator, 8, 0, tmp_path / "d").tensors()
    with torch.no_grad():
        torch.testing.assert_close(teacher(found["images"].clone()), found["logits"], rtol=1e-4, atol=1e-5)


def test_zeroq_takes_outputs_that_are_no_plain_tensor():
    class Head(nn.Module):
        def forward(self, x):
            return {"logits": x, "features": x * 2}

    net = NETS["plain"]()
    net.append(Head())
    net_in = nn.Sequential(*net)
    settle(net_in)
    images = sample(ZeroQ(iterations=2, class_weight=1.0), Teacher(net_in, "classification", SPEC), num_samples=4)
    assert images.shape == (4, 3, 8, 8)
