"""Options that zeroq has from other methods, each against a computation of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators._base import batch_rng
from dfq.generators._optimization import class_penalty, together
from dfq.generators._statistics import batch_norm_distances, noise_slack
from dfq.generators.zeroq import ZeroQ
from dfq.hooks import forward_hooks
from dfq.losses.batch_norm_statistics import batch_norm_distance
from dfq.settings import resolve

QUICK = ZeroQ(iterations=30)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(generator, teacher, num_samples=16):
    return generator.sample(teacher, num_samples, batch_rng(0, 0), lambda amount: None)


def inputs_of(teacher, images):
    """Batch norm → its input as an array, in order of execution."""
    found = {}
    with torch.no_grad(), forward_hooks(teacher.batch_norms.items(), before=lambda n, m, x: found.update({m: x[0]})):
        teacher(images)
    return {norm: x.double().numpy() for norm, x in found.items()}


def per_channel(norm, x, axes):
    """Differences of mean and deviation, the unit, in double precision."""
    mean, var = norm.running_mean.double().numpy(), norm.running_var.double().numpy() + norm.eps
    unit = np.sqrt(np.maximum(var, norm.eps + 0.01 * (var - norm.eps).mean()))
    return x.mean(axes) - mean, np.sqrt(x.var(axes) + norm.eps) - np.sqrt(var), unit


# ------------------------------------------------------------------------------------------------ DSG


def test_distance_beyond_a_slack():
    mean, variance, running_mean = noise(6), noise(6, seed=1).abs() + 0.1, noise(6, seed=2)
    slack = (torch.tensor(0.8), torch.tensor(0.2))
    found = batch_norm_distance(mean, variance, running_mean, torch.ones(6), 0.0, slack)
    off = np.maximum(np.abs((mean - running_mean).numpy()) - 0.8, 0)
    off_std = np.maximum(np.abs(np.sqrt(variance.numpy()) - 1) - 0.2, 0)
    np.testing.assert_allclose(found, off**2 + off_std**2, rtol=1e-5)
    assert (off == 0).any() and (off > 0).any() and (off_std == 0).any() and (off_std > 0).any()


@pytest.mark.parametrize("statistics, axes", [("batch", (0, 2, 3)), ("image", (2, 3))])
def test_slack_is_a_quantile_of_what_noise_is_off(statistics, axes, make_teacher):
    teacher, images = make_teacher("residual"), noise(12, 3, 8, 8)
    found = noise_slack(teacher, statistics, 0.7, images)
    for norm, x in inputs_of(teacher, images).items():
        off, off_std, _ = per_channel(norm, x, axes)
        wanted = [np.quantile(np.abs(values), 0.7) for values in (off, off_std)]
        np.testing.assert_allclose([float(value) for value in found[norm]], wanted, rtol=1e-4)


@pytest.mark.parametrize("slack", [None, 0.5])
def test_every_image_has_a_layer_that_counts_more(slack, make_teacher):
    teacher, images = make_teacher("residual"), noise(7, 3, 8, 8, seed=3)
    free = None if slack is None else noise_slack(teacher, "image", slack, noise(16, 3, 8, 8))
    with torch.no_grad(), batch_norm_distances(teacher, "image", free, emphasis=1.5) as found:
        teacher(images)
    wanted, count = [], len(teacher.batch_norms)
    assert count == 3
    for place, (norm, x) in enumerate(inputs_of(teacher, images).items()):
        off, off_std, unit = per_channel(norm, x, (2, 3))
        margins = (0, 0) if free is None else [float(value) for value in free[norm]]
        off, off_std = (np.maximum(np.abs(d) - m, 0) for d, m in zip((off, off_std), margins, strict=True))
        of_images = ((off / unit) ** 2 + (off_std / unit) ** 2).mean(1)
        weights = np.array([2.5 if image % count == place else 1.0 for image in range(7)])
        wanted.append((of_images * weights).sum() / weights.sum())
    np.testing.assert_allclose([float(value) for value in found], wanted, rtol=1e-3)


def test_emphasis_in_the_statistics_of_a_batch_is_a_mistake(make_teacher):
    with pytest.raises(UserError) as error:
        sample(ZeroQ(emphasis=1.0), make_teacher("plain"))
    assert str(error.value).startswith(
        "got generator.emphasis=1.0 and generator.statistics=batch; allowed: statistics=image"
    )


def test_slack_leaves_images_further_from_the_statistics_than_no_slack(make_teacher):
    teacher = make_teacher("plain")
    distances = []
    for slack in (0.0, 0.9):
        images = sample(replace(QUICK, slack=slack), teacher)
        with torch.no_grad(), batch_norm_distances(teacher) as found:
            teacher(images)
        distances.append(float(torch.stack(found).mean()))
    assert distances[0] < 0.7 * distances[1]


# ------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize("difficulty", [0.5, 2.0])
def test_difficult_images_count_more(difficulty, make_teacher):
    teacher = make_teacher("plain")
    penalty = class_penalty(teacher, 50, batch_rng(0, 0), 0.7, 0.2, difficulty=difficulty)
    targets = resolve("task", "classification").synthesis_targets(50, 10, batch_rng(0, 0), 0.2).double().numpy()
    logits = 3 * noise(50, 10)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    lacks = 1 - p[np.arange(50), targets.argmax(1)]
    wanted = 0.7 * (lacks**difficulty * -(targets * np.log(p)).sum(1)).mean()
    assert float(penalty(noise(50, 3, 8, 8), logits)) == pytest.approx(wanted, rel=1e-4)


# ------------------------------------------------------------------------------------------------ outputs, pixels


def test_penalties_of_outputs_and_pixels():
    images, outputs = noise(4, 3, 6, 5), noise(4, 10, seed=1).requires_grad_()
    penalty = together(None, *ZeroQ(stretch_weight=0.3, variation_weight=0.2)._penalties(torch.ones(3, 1, 1)))
    x, y = images.double().numpy(), outputs.detach().double().numpy()
    wanted = 0.2 * (np.abs(np.diff(x, axis=2)).mean() + np.abs(np.diff(x, axis=3)).mean())
    wanted -= 0.3 * np.log(y.max(1) - y.min(1)).mean()
    assert float(penalty(images, outputs).detach()) == pytest.approx(wanted, rel=1e-5)
    quarter = torch.full((3, 1, 1), 0.25)  # what pictures deviate by where pixels go from 0 to 1
    smooth = together(None, *ZeroQ(variation_weight=0.2)._penalties(quarter))
    assert float(smooth(images, outputs)) == pytest.approx(4 * (wanted + 0.3 * np.log(y.max(1) - y.min(1)).mean()))
    assert together(None, *ZeroQ()._penalties(quarter)) is None


def test_stretching_drives_outputs_apart(make_teacher):
    teacher, ranges = make_teacher("plain"), []
    for weight in (0.0, 1.0):
        images = sample(replace(QUICK, stretch_weight=weight), teacher)
        with torch.no_grad():
            outputs = teacher(images)
        ranges.append(float((outputs.amax(1) - outputs.amin(1)).mean()))
    assert ranges[1] > 1.2 * ranges[0]


def test_variation_makes_neighbors_alike(make_teacher):
    teacher = make_teacher("plain")
    white = replace(QUICK, start="white")
    rough, smooth = (
        float(sample(replace(white, variation_weight=w), teacher).diff(dim=-1).abs().mean()) for w in (0.0, 1.0)
    )
    assert smooth < 0.8 * rough


def test_all_of_them_at_once_are_the_same_bits_again(make_teacher):
    teacher = make_teacher("residual")
    generator = ZeroQ(iterations=3, statistics="image", slack=0.5, emphasis=1.0, class_weight=0.5, difficulty=1.0)
    generator = replace(generator, stretch_weight=0.1, variation_weight=0.1, min_confidence=0.5)
    first = sample(generator, teacher)
    assert torch.equal(sample(generator, teacher), first) and first.isfinite().all()


# ------------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("option", [{"crop": 0.4}, {"jitter": 0.3}])
@pytest.mark.parametrize("name", ["zeroq", "deep_inversion"])
def test_what_is_cropped_or_lit_in_every_step_is_stored_whole(option, name, make_teacher):
    teacher = make_teacher("plain")
    plain, first, again = (
        sample(resolve("generator", name, iterations=12, **settings), teacher) for settings in ({}, option, option)
    )
    assert torch.equal(first, again) and not torch.equal(first, plain)
    low, high = teacher.input_spec.limits(first.device)
    assert (first >= low).all() and (first <= high).all()
    start = sample(resolve("generator", name, iterations=1, **option), teacher)
    distances = [sum(batch_norm_match(teacher, images).values()) for images in (start, first)]
    assert distances[1] < distances[0]


def test_a_crop_leaves_something(make_teacher):
    with pytest.raises(UserError, match=r"got generator.crop=1.0; allowed: a number from 0 to 0.999"):
        resolve("generator", "zeroq", crop=1.0)
