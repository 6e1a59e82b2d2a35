"""ZeroQ: what it comes to, and each option on its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NETS, SPEC, settle
from torch import nn
from torch.nn import functional as F

from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators._base import batch_rng
from dfq.generators._filters import diverse_noise, low_pass, pink_noise
from dfq.generators._optimization import class_penalty
from dfq.generators.gaussian import Gaussian
from dfq.generators.spectrum import Spectrum
from dfq.generators.zeroq import ZeroQ, _Best
from dfq.settings import resolve
from dfq.teacher import InputSpec, Teacher
from dfq.teachers.digits import load

STILL = ZeroQ(iterations=1, learning_rate=1e-9, clip=False)  # images as they start


def mean_distance(teacher, images):
    distances = batch_norm_match(teacher, images)
    return sum(distances.values()) / len(distances)


def sample(generator, teacher, seed=0, num_samples=32):
    return generator.sample(teacher, num_samples, batch_rng(seed, 0), lambda amount: None)


@pytest.mark.parametrize("kind", ["plain", "residual", "mlp"])
def test_it_comes_much_closer_than_noise(make_teacher, kind):
    teacher = make_teacher(kind)
    noise = mean_distance(teacher, sample(Gaussian(), teacher))
    matched = mean_distance(teacher, sample(ZeroQ(), teacher))
    assert matched < noise / 5, (matched, noise)


@pytest.mark.parametrize(
    "settings",
    [{}, {"statistics": "image"}, {"start": "pink"}, {"start": "diverse"}, {"blur": 0.5, "flip": True, "shift": 1}],
    ids=lambda settings: " ".join(settings) or "default",
)
def test_it_comes_much_closer_than_noise_on_digits(settings):
    teacher = load()
    noise = mean_distance(teacher, sample(Gaussian(), teacher))
    assert mean_distance(teacher, sample(ZeroQ(iterations=30, **settings), teacher)) < noise / 2


def test_more_iterations_come_closer(make_teacher):
    teacher = make_teacher("plain")
    few, many = (mean_distance(teacher, sample(ZeroQ(iterations=n), teacher)) for n in (3, 30))
    assert many < few


def test_statistics_of_each_image_make_each_image_match(make_teacher):
    """Matched as a batch, images may differ in what they have; matched one by one, they do not."""
    teacher = make_teacher("residual")
    batch, image = (
        np.mean([mean_distance(teacher, one[None]) for one in sample(ZeroQ(statistics=of), teacher, num_samples=8)])
        for of in ("batch", "image")
    )
    assert image < batch / 2


@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_pixels_stay_between_black_and_white(make_teacher, blur):
    teacher = make_teacher("plain")
    mean, std = torch.tensor(SPEC.mean).view(3, 1, 1), torch.tensor(SPEC.std).view(3, 1, 1)
    inside = []
    for clip in (True, False):
        generator = ZeroQ(iterations=8, learning_rate=2.0, clip=clip, blur=blur, shift=1, low_pass=0.4)
        pixels = sample(generator, teacher, num_samples=16) * std + mean
        inside.append(bool((pixels > -1e-5).all() and (pixels < 1 + 1e-5).all()))
    assert inside == [True, False]


def test_start(make_teacher):
    teacher, rng = make_teacher("plain"), batch_rng(0, 0)
    white = torch.randn(32, 3, 8, 8, generator=rng)
    torch.testing.assert_close(sample(replace(STILL, start="white"), teacher), white)
    diverse = diverse_noise((32, 3, 8, 8), batch_rng(0, 0))
    torch.testing.assert_close(sample(STILL, teacher), diverse)
    pink = pink_noise((32, 3, 8, 8), batch_rng(0, 0))
    torch.testing.assert_close(sample(replace(STILL, start="pink"), teacher), pink)


def test_low_pass_is_applied_once_to_what_is_made_without_it(make_teacher):
    teacher, generator = make_teacher("plain"), ZeroQ(iterations=5)
    wanted = low_pass(sample(generator, teacher), 0.2).clamp(*SPEC.limits(teacher.device))
    torch.testing.assert_close(sample(replace(generator, low_pass=0.2), teacher), wanted)


class Watched(nn.Module):
    """Remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = NETS["plain"](), []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.net(x)


def shown(generator, num_samples=2):
    """The images that a teacher is shown in the loop, and those that come out."""
    net = Watched()
    settle(net.net)
    teacher = Teacher(net, "classification", SPEC)
    assert teacher.batch_norms  # looked for now, in a forward of its own
    net.seen.clear()
    images = sample(generator, teacher, num_samples=num_samples)
    return net.seen, images


def test_flip_shows_half_of_the_steps_mirrored():
    seen, images = shown(replace(STILL, iterations=40, flip=True))
    mirrored = [not torch.allclose(one, images, atol=1e-4) for one in seen]
    for one, flipped in zip(seen, mirrored, strict=True):
        torch.testing.assert_close(one.flip(-1) if flipped else one, images, rtol=0, atol=1e-4)
    assert 10 <= sum(mirrored) <= 30


def test_shift_shows_every_move_of_a_padded_image():
    seen, images = shown(replace(STILL, iterations=60, shift=1))
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)], mode="reflect")
    crops = [padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    found = [[k for k, crop in enumerate(crops) if np.allclose(one.numpy(), crop, atol=1e-4)] for one in seen]
    assert all(len(numbers) == 1 for numbers in found)
    assert {numbers[0] for numbers in found} == set(range(9))


def test_what_comes_out_is_blurred_as_what_was_shown():
    seen, images = shown(replace(STILL, blur=0.8))
    start = torch.randn(2, 3, 8, 8, generator=batch_rng(0, 0))
    torch.testing.assert_close(images, seen[0], rtol=1e-4, atol=1e-5)
    assert float(images.diff(dim=-1).abs().mean()) < 0.6 * float(start.diff(dim=-1).abs().mean())


def test_best_is_the_iterate_with_the_lowest_loss():
    pixels = torch.zeros(2)
    best = _Best(pixels)
    for loss in (3.0, 1.0, 2.0, 1.0):
        pixels.add_(1)
        best.observe(torch.tensor(loss))
    assert best.images.tolist() == [2, 2] and float(best.loss) == 1


def test_keep_best(make_teacher):
    """A step that is far too long: the start is better than all that follows."""
    teacher, wild = make_teacher("plain"), ZeroQ(iterations=4, learning_rate=50.0, clip=False, start="white")
    best, last = sample(replace(wild, keep_best=True), teacher), sample(wild, teacher)
    assert torch.equal(best, torch.randn(32, 3, 8, 8, generator=batch_rng(0, 0)))
    assert mean_distance(teacher, best) < mean_distance(teacher, last)


# ------------------------------------------------------------------------------------------------ class targets


def test_class_targets_pull_the_teachers_answers_to_them(make_teacher):
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


def test_images_that_are_certain_enough_are_pulled_no_further(make_teacher):
    """The gradient is that of the smoothed cross-entropy, and none where the class has its confidence already."""
    teacher = make_teacher("plain")
    penalty = class_penalty(teacher, 200, batch_rng(0, 0), weight=0.7, label_smoothing=0.2, min_confidence=0.4)
    rng = batch_rng(0, 0)  # the same numbers again
    targets = resolve("task", "classification").synthesis_targets(200, 10, rng, 0.2)
    enough = 0.4 + 0.6 * torch.rand(200, generator=rng)
    logits = 3 * torch.randn(200, 10, generator=rng)
    logits[torch.arange(200), targets.argmax(1)] += 5
    logits.requires_grad_()
    loss = penalty(torch.zeros(200, 3, 8, 8), logits)
    loss.backward()
    probability = F.softmax(logits.detach(), 1)
    wanted = 0.7 * (probability - targets) / 200
    reached = probability[torch.arange(200), targets.argmax(1)] >= enough
    assert 20 < int(reached.sum()) < 180
    wanted[reached] = 0
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-7)
    assert float(loss.detach()) == pytest.approx(0.7 * float(F.cross_entropy(logits.detach(), targets)), rel=1e-5)


def test_min_confidence_leaves_answers_less_certain():
    teacher, certainty = load(), []
    for least in (1.0, 0.2):
        images = sample(ZeroQ(class_weight=1.0, label_smoothing=0.0, min_confidence=least), teacher, num_samples=50)
        with torch.no_grad():
            certainty.append(float(teacher(images).softmax(1).amax(1).mean()))
    assert certainty[0] > 0.94 and certainty[1] < certainty[0] - 0.02


def test_outputs_that_are_no_plain_tensor():
    class Head(nn.Module):
        def forward(self, x):
            return {"logits": x, "features": x * 2}

    net = NETS["plain"]()
    net.append(Head())
    net_in = nn.Sequential(*net)
    settle(net_in)
    teacher = Teacher(net_in, "classification", SPEC)
    images = sample(ZeroQ(iterations=2, class_weight=1.0, min_confidence=0.5), teacher, num_samples=4)
    assert images.shape == (4, 3, 8, 8)


# ------------------------------------------------------------------------------------------------ mistakes


def test_a_shift_that_no_reflection_can_fill(make_teacher):
    with pytest.raises(UserError) as error:
        sample(ZeroQ(shift=8), make_teacher("plain"))
    assert str(error.value) == "got generator.shift=8 and images of 8x8 pixels; allowed: a whole number from 0 to 7"
    assert sample(ZeroQ(shift=7, iterations=2), make_teacher("plain")).isfinite().all()
    # On 4 of 8 pixels half of it would be 4, which is drawn sooner or later.
    for method in (ZeroQ, Spectrum):
        images = sample(method(shift=7, iterations=80, coarse_share=0.5), make_teacher("plain"))
        assert images.isfinite().all()


def test_images_of_a_network_that_takes_pixels_start_as_photographs():
    """mean 0 and std 1 only set the range of numbers: 0.45 +- 0.25 of white, not noise of deviation 1."""
    spec = InputSpec((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    network = NETS["plain"]()
    settle(network, spec.size)
    teacher = Teacher(network, "classification", spec)
    made = ZeroQ(iterations=1, learning_rate=1e-4, blur=0.0).sample(teacher, 32, batch_rng(0, 0), lambda *_: None)
    assert 0.4 < float(made.mean()) < 0.5 and 0.15 < float(made.std()) < 0.3
    assert float(((made == 0) | (made == 1)).float().mean()) < 0.15
