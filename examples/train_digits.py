"""Reproduce the embedded ``digits`` teacher: its training images, its held-out images and its weights.

    python examples/train_digits.py --out dfq/teachers/digits_data

Needs scikit-learn, which carries the images. The recipe below was chosen by cross-validation inside the training images
(``--folds 5`` prints it); the held-out images are read once, for the figure printed at the end.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.teachers.digits import MEAN, STD, DigitsNet

SEED = 0
NUM_TRAIN = 1000
EPOCHS = 150
BATCH_SIZE = 50
LEARNING_RATE = 0.05
WEIGHT_DECAY = 1e-3
LABEL_SMOOTHING = 0.05


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8, 1] and labels int64 [1797] of scikit-learn's digits, in their order there."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # the 8x8 counts are 0..16
    return images[..., None], digits.target.astype(np.int64)


def split(labels: np.ndarray, num_first: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint sorted index arrays that cover ``labels``, with every class in both in the same proportion."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    # An image's rank inside its own class, as a fraction: taking the smallest takes the same share of every class.
    fraction = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        fraction[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = np.argsort(fraction, kind="stable")
    return np.sort(chosen[:num_first]), np.sort(chosen[num_first:])


def as_batch(images: np.ndarray) -> Tensor:
    """uint8 [N, 8, 8, 1] to float [N, 1, 8, 8] in 0..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()


def normalize(x: Tensor) -> Tensor:
    return (x - MEAN[0]) / STD[0]


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Random small rotation, scale, shear and shift of every image of [N, 1, H, W]; the background is 0."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=rng) * 2 - 1) * limit

    angle, shear = uniform(math.radians(12)), uniform(0.15)
    scale_x, scale_y = 1 + uniform(0.12), 1 + uniform(0.12)
    shift_x, shift_y = uniform(0.2), uniform(0.2)  # of half the width: 0.2 is 0.8 pixels
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([cos * scale_x, (shear - sin) * scale_y, shift_x], 1)
    row_y = torch.stack([sin * scale_x, cos * scale_y, shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def batch_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def fit(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    epochs: int,
    label_smoothing: float,
    rng: torch.Generator,
) -> None:
    """Train on images [N, 1, H, W] in 0..1, augmented, in an order drawn anew each epoch, one cycle of the step."""
    rate, steps = optimizer.param_groups[0]["lr"], epochs * (len(x) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    net.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x), generator=rng).split(BATCH_SIZE):
            if len(batch) < BATCH_SIZE:
                continue  # the rest comes in another epoch: the order is drawn anew
            logits = net(normalize(augment(x[batch], rng)))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch) / len(x)
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1} of {epochs}: loss {total:.3f}", flush=True)


def train(x: Tensor, labels: Tensor, seed: int) -> DigitsNet:
    """A network trained on images [N, 1, 8, 8] in 0..1 for a fixed number of epochs, in eval mode."""
    torch.manual_seed(seed)  # initial weights
    rng = torch.Generator().manual_seed(seed)  # order of the images, augmentation
    net = DigitsNet()
    for norm in batch_norms(net):
        # As PyTorch did before 1.2, from almost zero up. Channels of unequal strength are what makes MobileNets break
        # under one scale per tensor, and digits are too easy a task to grow them from equal ones.
        nn.init.uniform_(norm.weight, 0.05, 1.0)
    optimizer = torch.optim.SGD(net.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    fit(net, optimizer, x, labels, EPOCHS, LABEL_SMOOTHING, rng)
    settle_batch_norm(net, x)
    return net.eval()


@torch.no_grad()
def settle_batch_norm(net: nn.Module, x: Tensor) -> None:
    """Set the running statistics to those of all training images in one batch, without augmentation or lag."""
    norms = batch_norms(net)
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    net.train()(normalize(x))
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value


@torch.no_grad()
def top1(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    return (net(normalize(x)).argmax(1) == labels).float().mean().item()


def cross_validate(x: Tensor, labels: Tensor, num_folds: int) -> None:
    """Print top-1 of every fold: a network trained on the others, inside the training images."""
    fold = np.empty(len(labels), dtype=np.int64)
    rest = np.arange(len(labels))
    for k in range(num_folds):
        taken, left = split(labels.numpy()[rest], round(len(rest) / (num_folds - k)), seed=SEED)
        fold[rest[taken]], rest = k, rest[left]
    scores = []
    for k in range(num_folds):
        inside, outside = torch.from_numpy(fold != k), torch.from_numpy(fold == k)
        scores.append(top1(train(x[inside], labels[inside], SEED), x[outside], labels[outside]))
        print(f"fold {k}: top-1 {scores[-1]:.4f}", flush=True)
    print(f"mean of {num_folds} folds: {np.mean(scores):.4f}")


def write(folder: Path, net: nn.Module, images: np.ndarray, labels: np.ndarray, indices: dict[str, np.ndarray]) -> None:
    """weights.safetensors, and the images of each name in ``indices`` as NAME.npz for ``evaluation=arrays``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, index in indices.items():
        np.savez_compressed(folder / f"{name}.npz", images=images[index], labels=labels[index])
    (folder / "weights.safetensors").write_bytes(safetensors.torch.save(net.state_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for weights.safetensors, train.npz and heldout.npz")
    what.add_argument("--folds", type=int, help="cross-validate inside the training images, write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same bits again
    torch.use_deterministic_algorithms(True)

    images, labels = load_images()
    indices = dict(zip(("train", "heldout"), split(labels, NUM_TRAIN, SEED), strict=True))
    x, y = as_batch(images[indices["train"]]), torch.from_numpy(labels[indices["train"]])
    print(f"{len(x)} training images, mean {x.mean():.4f}, std {x.std():.4f} (MEAN, STD: {MEAN[0]}, {STD[0]})")
    if args.folds:
        cross_validate(x, y, args.folds)
        return

    start = time.perf_counter()
    net = train(x, y, SEED)
    print(f"trained for {EPOCHS} epochs in {time.perf_counter() - start:.0f} s; training top-1 {top1(net, x, y):.4f}")
    write(args.out, net, images, labels, indices)
    held_out = indices["heldout"]
    score = top1(net, as_batch(images[held_out]), torch.from_numpy(labels[held_out]))
    print(f"held-out top-1 {score:.4f} on {len(held_out)} images")


if __name__ == "__main__":
    main()
