"""ZeroQ: images whose activations have the statistics that the network's batch norms remember.

Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020, arXiv 2001.00281 (eq. 1: distilled data).

    images = argmin  bn_loss(images) + class_weight * cross_entropy(teacher(images), targets)

bn_loss is :func:`dfq.losses.batch_norm_statistics.batch_norm_distance`, averaged over channels and over layers.

Images are smoothed in every step, and so when they are done, unless they are tiny: a descent on single pixels leaves
noise in them that no photograph has, and students learn from it (DGH in Sony MCT, WACV 2025, arXiv 2410.22110, which
blurs with a 3x3 kernel).

They start, in units of the mean and deviation of photographs whatever range of numbers the network takes, from noise
with the spectrum of photographs and with a brightness, a tint and a contrast of its own in every
image (``start: diverse``, after Sony MCT, which draws a mean and a deviation for every channel). White noise makes
images that are all equally bright, since the descent matches the statistics of a batch and has no need of differences
between its images; steps of activations learned from such images clip real ones.

Differences from the paper: statistics are those of the whole batch at each batch norm's own input, taken by hooks on
the batch norms themselves (the paper pairs convolutions with batch norms by order and takes the statistics of each
image, which ``statistics: image`` does too); the loss is normalized by the running deviation per channel and averaged
per layer, so its weights depend neither on the batch nor on the resolution; the step decays to zero along a cosine, so
some tens of iterations do what took 500; pixels stay legal (Sony MCT), so that a range calibrated on the images is not
wider than any real image.

Options from other methods, off unless asked for:

- ``class_weight``, ``label_smoothing``: class targets, balanced and smoothed (DeepInversion, Yin et al., CVPR 2020,
  arXiv 1912.08795);
- ``min_confidence``: an image is pulled to its class only up to a confidence of its own, drawn from [min_confidence, 1]
  (as IntraQ's soft inception loss draws it, Zhong et al., CVPR 2022, arXiv 2111.09136, which also pulls down what lies
  above), because images of which the teacher is certain teach a student little;
- ``difficulty``: an image's pull to its class is multiplied by (1 - p)^difficulty, p the confidence that it has
  reached, so that images stay which are not easy (HAST, Li et al., "Hard Sample Matters a Lot in Zero-Shot
  Quantization", CVPR 2023, arXiv 2303.13826; without its adversarial part, which needs the student);
- ``statistics: dataset``: the images of a batch are moved ``step_size`` at a time and their statistics are matched
  together (all-images statistics of Sony MCT, :class:`dfq.generators._statistics.SharedMoments`), so that a batch can
  be as large as the dataset (``batch_size`` = ``num_samples``) whatever the memory;
- ``slack``: what lies within a margin of the statistics costs nothing; the margin of a layer is that quantile over its
  channels of the distances of Gaussian noise (:func:`dfq.generators._statistics.noise_slack`; 0.9 in the paper).
  ``emphasis``: with ``statistics: image``, every image has one layer that counts 1 + emphasis times as much, the
  layers in turn. Both are DSG's (Zhang et al., "Diversifying Sample Generation for Accurate Data-Free Quantization",
  CVPR 2021, arXiv 2103.01049): slack distribution alignment, and layerwise sample enhancement, whose weights of image
  i and layer l are the entries of I + 11^T (emphasis 1). Here they are divided by their mean over images, so that
  statistics do not count more against other terms;
- ``stretch_weight``: outputs are driven apart, since nothing holds what lies behind the last batch norm
  (:mod:`dfq.losses.output_stretching`, DGH);
- ``variation_weight``: neighboring pixels alike (total variation, as in DeepInversion);
- ``flip``, ``shift``: augmentation in every step (DGH, which crops from larger images in place of a shift with
  reflection); one draw for the whole batch;
- ``crop`` (IntraQ's local object reinforcement) and ``jitter`` of brightness, contrast and saturation in every step: a
  draw for each image;
- ``low_pass``: the finished images without their finest detail (SynQ, Kim et al., ICLR 2025);
- ``keep_best``: the iterate with the lowest loss instead of the last;
- ``coarse_share``: the first steps on smaller images, which cost as much less as they have fewer pixels;
- ``patience``: no more steps once the loss has stopped falling (measured on a plateau, so with a step that is still
  long: worth it where ``iterations`` are many).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.generators._base import Generator
from dfq.generators._filters import (
    augment,
    check_shift,
    diverse_noise,
    gaussian_blur,
    photograph_blur,
    pink_noise,
    total_variation,
    white_noise,
)
from dfq.generators._needs import check_needs
from dfq.generators._optimization import (
    Penalty,
    class_penalty,
    coarse_to_fine,
    cosine,
    finish,
    mean_log_range,
    optimize,
    picture_statistics,
    together,
)
from dfq.generators._precision import Precision
from dfq.generators._statistics import SharedMoments, Statistics, batch_norm_distances, noise_slack
from dfq.progress import Advance
from dfq.settings import Bound, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from dfq.teacher import InputSpec, Teacher


@dataclass(frozen=True)
class ZeroQ(Generator):
    """Gradient descent on the pixels of one batch at a time."""

    iterations: PositiveInt = 50  # steps per batch
    learning_rate: PositiveFloat = 0.2  # first step of Adam, in units of the deviation of pictures
    clip: bool = True  # keep pixels between black and white
    statistics: Statistics = "batch"  # of what a step moves, of each image alone, or (dataset) of a batch in steps
    step_size: PositiveInt = 32  # images of a batch that a step moves, with statistics=dataset
    start: Literal["white", "pink", "diverse"] = "diverse"  # noise to start from
    blur: NonNegativeFloat | None = None  # deviation in pixels of a blur in every step; null: 0.8 from 32 pixels on
    flip: bool = False  # show the images mirrored left to right in half of the steps
    shift: NonNegativeInt = 0  # show the images moved by up to so many pixels in every step
    crop: Share = 0.0  # show a part of each image at full size, whose sides lack up to this share; 0: all of it
    jitter: NonNegativeFloat = 0.0  # deviation of each image's brightness and log contrast and saturation in every step
    low_pass: NonNegativeFloat = 0.0  # cutoff of a filter on the finished images, in cycles per pixel; 0: none
    keep_best: bool = False  # keep the iterate with the lowest loss instead of the last
    class_weight: NonNegativeFloat = 0.0  # weight of the class targets; 0: statistics alone
    label_smoothing: Fraction = 0.3  # share of a class target spread over all classes
    min_confidence: Fraction = 1.0  # an image is pulled to its class up to a confidence between this and 1; 1: always
    difficulty: NonNegativeFloat = 0.0  # exponent: how much less images count whose class is nearly certain; 0: no less
    slack: Fraction = 0.0  # quantile of the distances of noise, below which a distance costs nothing; 0: all cost
    emphasis: NonNegativeFloat = 0.0  # with statistics=image: additional weight of one layer in each image, in turn
    stretch_weight: NonNegativeFloat = 0.0  # weight of the logarithm of the outputs' range, which grows; 0: none
    variation_weight: NonNegativeFloat = 0.0  # weight of the total variation: mean difference of neighbors; 0: none
    coarse_share: Fraction = 0.0  # share of the steps that are taken first, on smaller images; 0: none
    coarse_scale: Annotated[float, Bound(above=0, at_most=1)] = 0.5  # size of a side of these
    patience: NonNegativeInt = 0  # stop after so many steps that bring less than tolerance; 0: never
    tolerance: Fraction = 0.01  # share of the loss that so many steps have to bring
    compile: bool | Literal["auto"] = False  # each batch's step as one program; auto: on CUDA
    precision: Precision = "float32"  # of the network while images are made; auto: the faster one, measured, is kept
    needs_batch_norm: ClassVar[bool] = True

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        check_needs(teacher, self, "zeroq", "matches batch-norm statistics")
        spec = teacher.input_spec
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        check_shift(self.shift, spec.size)
        if self.emphasis > 0 and self.statistics != "image":
            raise UserError(
                f"got generator.emphasis={self.emphasis} and generator.statistics={self.statistics}",
                "statistics=image: in a batch's statistics no image has a layer of its own",
            )
        if self.compile is True and self.statistics == "dataset":
            raise UserError(
                "got generator.compile=true and generator.statistics=dataset, where what is matched changes every step",
                "statistics=batch | image",
            )
        shape = (num_samples, *spec.size)
        noise = {"white": white_noise, "pink": pink_noise, "diverse": diverse_noise}[self.start](shape, rng)
        sizes = [num_samples]
        if self.statistics == "dataset":
            sizes = [min(self.step_size, num_samples - i) for i in range(0, num_samples, self.step_size)]
        turns = _Turns(sizes)
        class_targets = (self.class_weight, self.label_smoothing, self.min_confidence, self.difficulty)
        classes = class_penalty(teacher, num_samples, rng, *class_targets, shown=lambda: turns.rows)
        mean, std = (values.view(-1, 1, 1).to(teacher.device) for values in picture_statistics(spec))
        penalty = together(classes, *self._penalties(std))
        slack = None
        if self.slack > 0:
            seen = white_noise((sizes[0], *spec.size), rng).to(teacher.device) * std + mean
            slack = noise_slack(teacher, self.statistics, self.slack, seen)
        sigma = photograph_blur(spec.size[1:]) if self.blur is None else self.blur
        limits = [(limit - mean) / std for limit in spec.limits(teacher.device)]

        def descend(start: Tensor, first: int, last: int) -> Tensor:
            height, width = start.shape[-2:]
            scale = height / spec.size[1]
            blur = gaussian_blur((height, width), scale * sigma, teacher.device)
            shift = min(round(scale * self.shift), min(height, width) - 1)
            whole = len(sizes) == 1
            parts = [part.requires_grad_() for part in ([start] if whole else map(torch.clone, start.split(sizes)))]
            best = [_Best(part) for part in parts] if self.keep_best else []
            optimizer = torch.optim.Adam(parts, lr=self.learning_rate, betas=(0.9, 0.9))
            shared = None if whole else SharedMoments(sizes)
            turns.start(shared)

            def observe(loss: Tensor) -> None:
                if best:
                    best[turns.part].observe(loss)

            def after_step() -> None:
                if self.clip:
                    parts[turns.part].clamp_(*limits)
                turns.next()

            optimize(
                teacher,
                batch_norm_distances(teacher, self.statistics, slack, self.emphasis, shared),
                lambda: augment(
                    blur(parts[turns.part]) * std + mean, self.flip, shift, rng, self.crop, self.jitter, std
                ),
                [cosine(optimizer, self.iterations, first=first, turns=len(sizes))],
                (last - first) * len(sizes),
                advance,
                penalty=penalty,
                observe=observe,
                after_step=after_step,
                of=self.iterations,
                patience=self.patience * len(sizes),
                tolerance=self.tolerance,
                compiled=self.compile if whole else False,
                precision=self.precision,
            )
            found = [each.images for each in best] or [part.detach() for part in parts]
            return found[0] if whole else torch.cat(found)

        start = noise.to(teacher.device, memory_format=torch.channels_last)
        found = coarse_to_fine(teacher, start, self.coarse_share, self.coarse_scale, self.iterations, descend)
        blur = gaussian_blur((spec.size[1], spec.size[2]), sigma, teacher.device)
        return finish(blur(found) * std + mean, spec, self.low_pass, self.clip)

    def _penalties(self, std: Tensor) -> Iterator[Penalty]:
        """Those that look at nothing but images and outputs."""
        if self.stretch_weight > 0:
            yield lambda _images, outputs: -self.stretch_weight * mean_log_range(outputs, "the statistics alone")
        if self.variation_weight > 0:
            yield lambda images, _outputs: self.variation_weight * total_variation(images / std)


class _Turns:
    """Which part of a batch is shown and moved: one after the other."""

    def __init__(self, sizes: list[int]):
        ends = list(itertools.accumulate(sizes))
        self.places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.start(None)

    @property
    def rows(self) -> slice:
        return self.places[self.part]

    def start(self, shared: SharedMoments | None) -> None:
        self.part, self.shared = 0, shared

    def next(self) -> None:
        self.part = (self.part + 1) % len(self.places)
        if self.shared is not None:
            self.shared.part = self.part


class _Best:
    """The iterate with the lowest loss so far; compared where the tensors are."""

    def __init__(self, pixels: Tensor):
        self.pixels, self.images = pixels, pixels.detach().clone()
        self.loss = torch.full((), torch.inf, device=pixels.device)

    def observe(self, loss: Tensor) -> None:
        self.images = torch.where(loss < self.loss, self.pixels.detach(), self.images)
        self.loss = torch.minimum(loss, self.loss)
