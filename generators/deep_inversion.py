"""DeepInversion: class targets, smoothness, and feature targets from whatever normalization a network has.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020, arXiv 1912.08795. ::

    images = argmin  feature_distance(images) + class_weight * cross_entropy(teacher(images), targets)
                     + variation_weight * total_variation(images)

feature_distance is averaged over norms. A batch norm remembers statistics of real data
(:mod:`dfq.losses.batch_norm_statistics`). A layer norm or group norm remembers none; its targets are the statistics
that its weight and bias imply (:mod:`dfq.losses.affine_statistics`), which is an assumption and not a memory: it makes
no channel silent and none loud, and can't bring back what real images look like. ``affine_weight`` says how much it
counts, 0 leaves classes and smoothness. For networks with attention, psaq measures what pictures are known to do.

Differences from the paper: norms other than batch norm; the batch-norm term in units of the running deviation, averaged
instead of summed; targets are class-balanced and smoothed; no norm of the image, since pixels stay legal; no
competition with a student (the paper's Adaptive DeepInversion). The defaults were not tuned on a trained network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from dfq.generators._needs import check_needs
from dfq.generators._norms import norm_distances
from dfq.generators._optimization import class_penalty
from dfq.generators._pixels import PixelGenerator
from dfq.progress import Advance
from dfq.settings import Fraction, NonNegativeFloat
from dfq.teacher import Teacher


@dataclass(frozen=True)
class DeepInversion(PixelGenerator):
    """Gradient descent on the pixels of one batch at a time."""

    affine_weight: NonNegativeFloat = 0.1  # of the targets of layer and group norms; those of a batch norm have 1
    class_weight: NonNegativeFloat = 0.1  # weight of the class targets; 0: none
    label_smoothing: Fraction = 0.3  # share of a class target spread over all classes
    needs_norm: ClassVar[bool] = True

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        check_needs(teacher, self, "deep_inversion", "matches the features behind it")
        noise = torch.randn(num_samples, *self.image_size(teacher), generator=rng)
        classes = class_penalty(teacher, num_samples, rng, self.class_weight, self.label_smoothing)
        measured = partial(norm_distances, teacher, self.affine_weight)
        return self.descend(teacher, rng, advance, noise, measured, classes)
