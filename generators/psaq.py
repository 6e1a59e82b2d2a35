"""PSAQ-ViT: images whose patches resemble each other as differently as those of pictures, for vision transformers.

Li et al., "Patch Similarity Aware Data-Free Quantization for Vision Transformers", ECCV 2022, arXiv 2203.02250. ::

    images = argmin  -entropy(images) + class_weight * cross_entropy(teacher(images), targets)
                     + variation_weight * total_variation(images)

entropy is the differential entropy of the cosine similarities between patches
(:mod:`dfq.losses.patch_similarity`), where attention has been multiplied with the values, averaged over images and
blocks. Where that is, is found by following values (:class:`dfq.generators._attention.PatchTokens`): any network with
attention between patches will do, fused or not, in windows or not; class and distillation tokens are no patches.

``prior: task_independent`` does without classes, for networks whose outputs are none: after the idea of PSAQ-ViT V2
(Li et al., TNNLS 2023, arXiv 2209.05687), as its abstract states it. Here each image's mean and deviation a channel are
pulled to those of pictures instead.

Differences from the papers: the Gaussian estimate of the entropy besides the kernel estimate; means over blocks and
pixels in place of sums, so that no weight depends on depth or resolution (the published 1.0 and 0.05 belong to a sum
over blocks); similarities of all windows of an image count as one distribution; targets are class-balanced and
smoothed; the heads of a block side by side, as the projection behind them reads them; pixels stay legal in every step.
Of V2, the game between generated samples and the quantized student is left out: a generator here sees no student. The
defaults were not tuned on a trained network.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from dfq.generators._attention import negative_entropies
from dfq.generators._needs import check_needs
from dfq.generators._optimization import Penalty, class_penalty, picture_distance, picture_statistics
from dfq.generators._pixels import PixelGenerator
from dfq.progress import Advance
from dfq.settings import Bound, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat
from dfq.teacher import InputSpec, Teacher


@dataclass(frozen=True)
class PSAQ(PixelGenerator):
    """Gradient descent on the pixels of one batch at a time."""

    learning_rate: PositiveFloat = 0.25  # largest step of Adam, in units of the deviation of pictures
    shift: NonNegativeInt = 4  # show the images moved by up to so many pixels in every step
    entropy: Literal["gaussian", "kernel"] = "gaussian"  # estimate: closed form by the variance, or the paper's
    bandwidth: Annotated[float, Bound(at_least=0.005, at_most=0.5)] = 0.02  # of the kernel estimate
    prior: Literal["class", "task_independent"] = "class"  # besides: class targets, or pictures' mean and deviation
    class_weight: NonNegativeFloat = 0.1  # weight of the class targets
    label_smoothing: Fraction = 0.3  # share of a class target spread over all classes
    picture_weight: NonNegativeFloat = 0.1  # weight of the mean and deviation of each image, without class targets
    needs_attention: ClassVar[bool] = True

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        check_needs(teacher, self, "psaq", "maximizes the entropy of its patches' similarities")
        noise = torch.randn(num_samples, *self.image_size(teacher), generator=rng)
        if self.prior == "class":
            prior = class_penalty(teacher, num_samples, rng, self.class_weight, self.label_smoothing)
        else:
            prior = self._picture_penalty(teacher)
        return self.descend(teacher, rng, advance, noise, lambda: self.negative_entropies(num_samples), prior)

    def negative_entropies(self, num_samples: int) -> AbstractContextManager[list[Tensor]]:
        """See :func:`dfq.generators._attention.negative_entropies`."""
        return negative_entropies(num_samples, self.bandwidth if self.entropy == "kernel" else None)

    def _picture_penalty(self, teacher: Teacher) -> Penalty:
        assert isinstance(teacher.input_spec, InputSpec)  # the pipeline sees to it
        mean, std = (values.to(teacher.device) for values in picture_statistics(teacher.input_spec))
        return lambda images, _outputs: self.picture_weight * picture_distance(images, mean, std)
