"""Genie-D: images from a small network that is trained, together with its inputs, to match batch-norm statistics.

Jeon et al., "Genie: Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780 (section 3.1).

    latents, network = argmin  bn_loss(network(latents)) + image_weight * picture_loss(network(latents))

For every batch a fresh GeneratorNetwork and fresh latents N(0, 1) are optimized together; the network shares what
images have in common, its upsampling makes neighboring pixels alike. picture_loss pulls mean and deviation of each
image's channels to those of a picture (``looks: diverse``: to a brightness, a tint and a contrast of its own, drawn
once as they differ between photographs; ``alike``, the paper's: to those of the average one, which leaves nothing
between images for the statistics of the first layers). Swing convolution: while images are made, the input of every
strided convolution of the teacher is moved by a random -1, 0 or 1 pixels along each axis, the gap filled by reflection,
so that a stride gives every pixel a gradient and leaves no checkerboard.

Differences from the paper: an image's own looks; 16 channels instead of 128, whose images are worth more and cost less
(docs/generation.md); bn_loss is normalized by the running deviation per channel and averaged over layers
(:func:`dfq.losses.batch_norm_statistics.batch_norm_distance`), picture_loss by the pictures' deviation, averaged over
channels and counted like one more layer; the latents' step follows a cosine (the paper's shrinks on a plateau, which
needs the loss on the host); 300 iterations, the recipe has 4000 (``iterations=4000``); convolutions that read maps of
one size can share their move (``swing: shared``), so that a block's branch and its shortcut see the same image; above
64 pixels the network is convolutional throughout, from a map of as many latents for each 32x32 pixels, because the
paper's first layer grows with the image (``network: linear num_channels: 128``: 103 million weights at 224 pixels); any
size; pixels can be kept legal, in every step; SynQ's ``low_pass`` on the finished images as an option (Kim et al., ICLR
2025).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dfq.generators._base import Generator
from dfq.generators._filters import drawn_looks, shift_reflecting
from dfq.generators._needs import check_needs
from dfq.generators._network import GeneratorNetwork, Kind
from dfq.generators._optimization import cosine, finish, optimize, picture_distance, picture_statistics
from dfq.generators._precision import Precision
from dfq.generators._statistics import batch_norm_distances
from dfq.hooks import forward_hooks
from dfq.progress import Advance
from dfq.settings import Bound, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from dfq.teacher import InputSpec, Teacher


@dataclass(frozen=True)
class Genie(Generator):
    """Gradient descent on the latents and the network that make one batch."""

    iterations: PositiveInt = 300  # steps per batch
    latent_learning_rate: PositiveFloat = 0.1  # first step of Adam on the latents; it falls to zero along a cosine
    network_learning_rate: PositiveFloat = 0.01  # first step of Adam on the GeneratorNetwork
    network_decay: Fraction = 0.95  # factor on that step after every 100 iterations
    network: Kind = "auto"  # its first layer: linear (the paper), convolutional, or linear up to 64 pixels
    num_latents: PositiveInt = 256  # numbers that an image is made from; convolutional: each 32x32 pixels of it
    num_channels: Annotated[int, Bound(at_least=4)] = 16  # of the GeneratorNetwork's widest layers; the paper: 128
    image_weight: NonNegativeFloat = 1.0  # weight of each image's own mean and deviation; 1: that of a batch norm
    looks: Literal["diverse", "alike"] = "diverse"  # these are an image's own, or the same for all
    swing: Literal["independent", "shared", "none"] = "independent"  # moves drawn a layer, a map size, or not at all
    clip: bool = True  # keep pixels between black and white
    low_pass: NonNegativeFloat = 0.0  # cutoff of a filter on the finished images, in cycles per pixel; 0: none
    precision: Precision = "float32"  # of the network while images are made; auto: the faster one, measured, is kept
    needs_batch_norm: ClassVar[bool] = True

    def sample(self, teacher: Teacher, num_samples: int, rng: torch.Generator, advance: Advance) -> Tensor:
        check_needs(teacher, self, "genie", "matches batch-norm statistics")
        spec = teacher.input_spec
        assert isinstance(spec, InputSpec)  # the pipeline sees to it
        network = GeneratorNetwork(spec.size, self.num_latents, self.num_channels, rng, kind=self.network)
        network.to(teacher.device)
        latents = torch.randn(num_samples, *network.latent_shape, generator=rng).to(teacher.device).requires_grad_()
        mean, std = (values.to(teacher.device) for values in picture_statistics(spec))
        looks = None
        if self.looks == "diverse":
            brightness, tint, contrast = drawn_looks(num_samples, spec.size[0], rng)
            looks = (brightness + tint).to(teacher.device), contrast.to(teacher.device)
        limits = spec.limits(teacher.device)
        share = self.image_weight / len(teacher.batch_norms)

        def make() -> Tensor:
            images = network(latents) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
            images = images.contiguous(memory_format=torch.channels_last)
            return images.clamp(*limits) if self.clip else images

        def picture_loss(images: Tensor, _outputs: object) -> Tensor:
            return share * picture_distance(images, mean, std, looks)

        of_latents = torch.optim.Adam([latents], lr=self.latent_learning_rate)
        of_network = torch.optim.Adam(network.parameters(), lr=self.network_learning_rate)
        schedules = [
            cosine(of_latents, self.iterations),
            LambdaLR(of_network, lambda step: self.network_decay ** (step // 100)),
        ]
        with swing_convolutions(teacher.module, rng, self.swing):
            distances = batch_norm_distances(teacher)
            precision = self.precision
            optimize(teacher, distances, make, schedules, self.iterations, advance, picture_loss, precision=precision)
        with torch.no_grad():
            return finish(make(), spec, self.low_pass, self.clip)


@contextmanager
def swing_convolutions(module: nn.Module, rng: torch.Generator, swing: str = "independent") -> Iterator[None]:
    """While the context is open, strided convolutions of ``module`` read their input moved by up to a pixel.

    Args:
        swing: ``independent``: every convolution draws a move in every forward; ``shared``: those that read maps of one
            height and width in a forward share it; ``none``.
    """
    convolutions = ((name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d))
    strided = [(name, conv) for name, conv in convolutions if max(conv.stride) > 1 and swing != "none"]
    moves: dict[tuple[int, ...], list[int]] = {}

    def move(_name: str, conv: nn.Module, inputs: tuple) -> tuple[tuple, dict]:
        x = inputs[0]
        size = tuple(x.shape[-2:])
        if swing == "independent" or size not in moves:
            moves[size] = torch.randint(-1, 2, (2,), generator=rng).tolist()
        for dim, offset, stride in zip((-2, -1), moves[size], conv.stride, strict=True):
            if stride > 1 and x.shape[dim] > 1:
                x = shift_reflecting(x, offset, dim)
        return (x, *inputs[1:]), {}

    with forward_hooks([("", module)], before=lambda *_: moves.clear()), forward_hooks(strided, before=move):
        yield
