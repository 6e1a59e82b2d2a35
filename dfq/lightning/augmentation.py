"""Random changes to a batch of synthetic images that a teacher can label again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfq.errors import UserError


@dataclass(frozen=True)
class Moves:
    """Where the content of each image goes: ``up_left`` [2, N] pixels, after it was ``mirrored`` [N] left to right."""

    up_left: Tensor
    mirrored: Tensor

    def boxes(self, boxes: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """Boxes [n, 4] xyxy in pixels of each image, as they lie behind :func:`augment`; cut off at the border."""
        height, width = size
        found = []
        for index, (x1, y1, x2, y2) in enumerate(rows.unbind(-1) for rows in boxes):
            up, left = self.up_left[:, index].tolist()
            if self.mirrored[index]:
                x1, x2 = width - x2, width - x1
            corners = (x1 - left, y1 - up, x2 - left, y2 - up)
            limits = (width, height, width, height)
            found.append(torch.stack([c.clamp(0, most) for c, most in zip(corners, limits, strict=True)], -1))
        return found


def draw_moves(images: Tensor, rng: torch.Generator, flip: bool, shift: int) -> Moves | None:
    """One draw for each of ``images``; None where they stay, or are no images."""
    if not (images.is_floating_point() and images.dim() == 4) or not (flip or shift):
        return None
    moves = torch.randint(-shift, shift + 1, (2, len(images)), generator=rng)
    mirrored = torch.rand(len(images), generator=rng) < 0.5 if flip else torch.zeros(len(images), dtype=torch.bool)
    return Moves(moves, mirrored)


@dataclass(frozen=True)
class Views:
    """How many ``count`` looks algorithms get at each image: itself, and copies mirrored and moved at random.

    Rounding fits what images have in common; copies differ in where the content lies, at no cost of generation.
    """

    count: int = 1
    flip: bool = True
    shift: int = 0

    def of(self, images: Tensor, seed: int) -> Tensor:
        """Images [N, C, H, W] as [count N, C, H, W], the given ones first; the same seed gives the same.

        Raises:
            UserError: there is more than one view of what are no images.
        """
        if self.count == 1:
            return images
        if not (images.is_floating_point() and images.dim() == 4):
            raise UserError(
                f"got algorithm.views={self.count} and samples of {images.dtype} {list(images.shape[1:])}",
                "views of images [C, H, W]",
                "algorithm.views=1",
            )
        rng = torch.Generator().manual_seed(seed)
        copies = [augment(images, rng, self.flip, self.shift) for _ in range(self.count - 1)]
        return torch.cat([images, *copies])


def augment(
    images: Tensor,
    rng: torch.Generator,
    flip: bool = True,
    shift: int = 0,
    mixup: float = 0.0,
    jitter: float = 0.0,
    limits: tuple[Tensor, Tensor] | None = None,
    moves: Moves | None = None,
) -> Tensor:
    """Images [N, C, H, W], each mirrored with probability one half, moved, blended and lit otherwise, on their device.

    Random numbers come from ``rng`` on the CPU, so that every device sees the same images. What is no batch of images
    (token ids have an order) stays as it is.

    Args:
        shift: pixels in each direction at most; what moves in from outside is a reflection.
        mixup: probability that the batch is blended with itself in another order, x <- a x + (1 - a) x', a uniform:
            mixup (Zhang et al., ICLR 2018, arXiv 1710.09412, eq. 1) with alpha = 1.
        jitter: deviation of each image's brightness (in units of the normalized input) and of the logarithm of its
            contrast. Images matched to the statistics of a batch are all about as bright; photographs are not.
        limits: the values of black and white, broadcast to images; what jitter carries beyond them is cut off.
        moves: those of :func:`draw_moves`, where somebody else has to know them; None: drawn here.
    """
    if not (images.is_floating_point() and images.dim() == 4):
        return images
    num_samples, _, height, width = images.shape
    moves = moves or draw_moves(images, rng, flip, shift)
    if moves is not None:
        rows = _reflected(moves.up_left[0], height)
        columns = _reflected(moves.up_left[1], width)
        columns = torch.where(moves.mirrored[:, None], width - 1 - columns, columns)
        samples = torch.arange(num_samples)[:, None, None]
        where = (samples, slice(None), rows[:, :, None], columns[:, None, :])
        moved = images[tuple(part if isinstance(part, slice) else part.to(images.device) for part in where)]
        images = moved.permute(0, 3, 1, 2)  # indexing by several tensors puts the channel last
    if mixup and torch.rand((), generator=rng) < mixup:
        amount = torch.rand((), generator=rng).to(images)
        images = torch.lerp(images[torch.randperm(num_samples, generator=rng).to(images.device)], images, amount)
    if jitter:
        contrast, brightness = (jitter * torch.randn(2, num_samples, 1, 1, 1, generator=rng)).to(images)
        images = torch.addcmul(brightness, images, contrast.exp())
        images = images if limits is None else images.clamp(*limits)
    return images


def _reflected(moves: Tensor, size: int) -> Tensor:
    """Source indices [N, size] of a line that is moved by ``moves`` [N] and reflected at its ends."""
    source = (torch.arange(size) + moves[:, None]).abs()
    return ((size - 1) - (size - 1 - source).abs()).clamp(0, size - 1)
