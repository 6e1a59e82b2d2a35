"""A small network that makes images out of latents, of any size, for one kind of image or for many."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["auto", "linear", "convolutional"]
LARGEST_LINEAR = 64  # pixels; larger images come from a map of latents, unless asked otherwise
PATCH = 16  # pixels of an image's side for one place of that map


class GeneratorNetwork(nn.Module):
    """Latents to images [N, C, H, W] whose channels have mean 0 and variance 1 over the batch.

    ``linear``, after the paper: a linear layer to a map of a quarter of the size, then twice (upsampling, convolution).
    ``convolutional``: a map of latents of a 16th of the size, and four times. Each upsampling doubles the nearest
    pixels; what exceeds the size is cut off.

    Args:
        size: C, H, W.
        num_latents: numbers that an image is made from; convolutional: each 32x32 pixels of it.
        num_channels: of the widest layers.
        rng: for the weights; drawn as PyTorch draws its own layers', from U(-1, 1) / sqrt(fan in).
        num_conditions: numbers that say what an image is to show; 0: none. They scale and shift the channels behind
            every norm, and the norms remember what they saw in training: evaluated, an image depends on itself alone.
        kind: auto: linear up to 64 pixels, whose weights grow with the image: 103 million at 224 pixels and the
            paper's 256 latents and 128 channels.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        num_latents: int,
        num_channels: int,
        rng: torch.Generator,
        num_conditions: int = 0,
        kind: Kind = "auto",
    ):
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if num_conditions:
                return ConditionalBatchNorm(channels, num_conditions)
            return nn.BatchNorm2d(channels, track_running_stats=False)

        colors, *self.size = size
        widths = [num_channels, num_channels // 2]
        with torch.device("meta"):  # the layers' own start would draw from the global random numbers
            if kind == "linear" or (kind == "auto" and max(self.size) <= LARGEST_LINEAR):
                coarse = [max(2, -(-length // 4)) for length in self.size]  # one place could not be normalized alone
                self.latent_shape: tuple[int, ...] = (num_latents,)
                linear = nn.Linear(num_latents, num_channels * coarse[0] * coarse[1])
                self.first: nn.Module = nn.Sequential(linear, nn.Unflatten(1, (num_channels, *coarse)))
            else:
                in_latents = -(-num_latents * PATCH**2 // 32**2)
                fewest = 2 if max(self.size) <= PATCH else 1  # as above
                self.latent_shape = (in_latents, *(max(fewest, -(-length // PATCH)) for length in self.size))
                self.first = nn.Conv2d(in_latents, num_channels, 3, padding=1)
                widths = [num_channels, *widths, num_channels // 4]
            layers: list[nn.Module] = [norm(num_channels)]
            for narrow, wide in zip(widths[1:], widths, strict=False):
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1)]
                layers += [norm(narrow), nn.LeakyReLU(0.2)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(widths[-1], colors, 3, padding=1), nn.Tanh()]
            self.layers = nn.Sequential(*layers)
            self.norm = nn.BatchNorm2d(colors, affine=False, track_running_stats=num_conditions > 0)
        self.to_empty(device="cpu").to(memory_format=torch.channels_last)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = layer.weight[0].numel() ** -0.5
                for parameter in layer.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=rng)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()  # ones and zeros

    def forward(self, latents: Tensor, conditions: Tensor | None = None) -> Tensor:
        """[N, *latent_shape] and [N, num_conditions] to images [N, C, H, W]."""
        height, width = self.size
        maps = self.first(latents).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            maps = layer(maps, conditions) if isinstance(layer, ConditionalBatchNorm) else layer(maps)
        return self.norm(maps[..., :height, :width])


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift are linear in the conditions (de Vries et al., 2017, arXiv 1707.00683)."""

    def __init__(self, num_channels: int, num_conditions: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_channels, affine=False)
        self.scale = nn.Linear(num_conditions, num_channels)
        self.shift = nn.Linear(num_conditions, num_channels)

    def forward(self, maps: Tensor, conditions: Tensor) -> Tensor:
        scale, shift = (of(conditions)[..., None, None] for of in (self.scale, self.shift))
        return self.norm(maps) * (1 + scale) + shift
