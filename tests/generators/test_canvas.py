"""Images as waves: what they start as, what they can become, and what a step does to them."""

import numpy as np
import pytest
import torch

from dfq.generators._base import batch_rng
from dfq.generators._canvas import Canvas, Pixels, opponent_colors, photograph_noise
from dfq.generators._filters import diverse_noise
from dfq.quality import spectrum
from dfq.teacher import InputSpec

UNIT = InputSpec((3, 24, 30), (0.0,) * 3, (1.0,) * 3)
IMAGENET = InputSpec((3, 24, 31), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("spec", [UNIT, IMAGENET, InputSpec((1, 9, 8), (0.5,), (0.5,))])
@pytest.mark.parametrize("clip", [True, False])
def test_a_canvas_starts_as_what_it_is_given(spec, clip):
    noise = 0.3 * photograph_noise((2, *spec.size), batch_rng(0, 0))
    canvas = Canvas(noise, spec, clip)
    images = canvas().detach()
    assert images.shape == (2, *spec.size)
    if all(std == 1 for std in spec.std):  # photographs in 0..1
        assert 0.35 < float(images.mean()) < 0.55 and float(images.std()) < 0.12
    torch.testing.assert_close(canvas.start(), noise, atol=2e-5, rtol=1e-4)
    again = Canvas(canvas.start(), spec, clip)
    torch.testing.assert_close(again(), images, atol=1e-4, rtol=1e-4)


def test_pixels_stay_legal_whatever_a_step_does():
    canvas = Canvas(photograph_noise((2, *UNIT.size), batch_rng(0, 0)), UNIT, True)
    with torch.no_grad():
        canvas.coefficients.mul_(50)
    assert float(canvas().detach().min()) >= 0 and float(canvas().detach().max()) <= 1


@pytest.mark.parametrize("clip", [True, False])
def test_pixels_are_images_themselves_and_legal_after_a_step_if_asked(clip):
    noise = photograph_noise((2, *IMAGENET.size), batch_rng(0, 0))
    low, high = (limit.view(-1, 1, 1) for limit in IMAGENET.limits(torch.device("cpu")))
    pixels = Pixels(3 * noise, IMAGENET, clip)
    wanted = (3 * noise).clamp(low, high) if clip else 3 * noise  # normalized by the deviation of pictures: 0 and 1
    torch.testing.assert_close(pixels().detach(), wanted)
    pixels().sum().backward()
    with torch.no_grad():
        pixels.coefficients.add_(pixels.coefficients.grad * 9)
    pixels.settle()
    within = bool((pixels() >= low).all()) and bool((pixels() <= high).all())
    assert within == clip and pixels.size == IMAGENET.size[1:]
    unit = Pixels(noise, UNIT, clip=True)
    assert float(unit().detach().min()) >= 0 and float(unit().detach().max()) <= 1, "photographs in 0..1"


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_opponent_colors_are_apart_and_channels_have_variance_one(channels):
    mix = opponent_colors(channels).double().numpy()
    gram = mix.T @ mix
    assert np.allclose(gram, np.diag(np.diag(gram)), atol=1e-6) and np.trace(gram) == pytest.approx(channels, rel=1e-5)
    assert np.allclose(mix[:, 0], mix[0, 0]) and mix[0, 0] > 0, "gray is the same in all channels"
    if channels == 3:
        noise = photograph_noise((64, 3, 16, 16), batch_rng(0, 0))
        plain = diverse_noise((64, 3, 16, 16), batch_rng(0, 0))
        together, apart = (np.corrcoef(x.transpose(0, 1).flatten(1).numpy())[0, 1] for x in (noise, plain))
        assert together > 0.8 and together > apart + 0.3


def test_equal_steps_change_images_as_photographs_differ():
    spec = InputSpec((3, 64, 64), (0.0,) * 3, (1.0,) * 3)
    canvas = Canvas(torch.zeros(4, 3, 64, 64), spec, False)
    before = canvas().detach()
    with torch.no_grad():
        steps = torch.randint(0, 2, canvas.coefficients.shape, generator=batch_rng(0, 0)) * 2 - 1
        canvas.coefficients.add_(0.1 * steps)
    assert -2.4 < spectrum(canvas().detach() - before) < -1.6
    assert 0.5 < float((canvas().detach() - before).std() / (0.1 * 0.25)) < 3
