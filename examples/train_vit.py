"""Train a small vision transformer on scikit-learn's digits, scaled up: a network without batch norm to try dfq on.

    python examples/train_vit.py --out outputs/vit          weights.safetensors, train.npz and heldout.npz

A DeiT-like network of timm (Touvron et al., ICML 2021, arXiv 2012.12877, without the distillation token): images of
24x24 pixels, 36 patches of 4x4, four blocks of width 64. Trained for some minutes on one thread, on the 1,000 images
that ``train_digits.py`` trains on. docs/generation.md has the commands that quantize it.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F
from train_digits import NUM_TRAIN, SEED, as_batch, fit, load_images, split, top1, write

SIZE, PATCH = 24, 4  # pixels
WIDTH, DEPTH, HEADS = 64, 4, 4
EPOCHS = 60
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05


def network() -> VisionTransformer:
    """Random weights; images [N, 1, 24, 24], normalized as ``(byte / 255 - MEAN) / STD``, to logits [N, 10]."""
    return VisionTransformer(
        img_size=SIZE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=10,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=3,
        qkv_bias=True,
    )


def enlarged(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 8, 1] to uint8 [N, 24, 24, 1]."""
    larger = F.interpolate(as_batch(images), (SIZE, SIZE), mode="bilinear")
    return (255 * larger).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def train(x: Tensor, labels: Tensor, epochs: int, seed: int) -> VisionTransformer:
    """A network trained on images [N, 1, 24, 24] in 0..1, in eval mode."""
    torch.manual_seed(seed)  # initial weights
    rng = torch.Generator().manual_seed(seed)  # order of the images, augmentation
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    fit(net, optimizer, x, labels, epochs, LABEL_SMOOTHING, rng)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for weights.safetensors, train.npz, heldout.npz"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order: the same bits again

    images, labels = load_images()
    images = enlarged(images)
    indices = dict(zip(("train", "heldout"), split(labels, NUM_TRAIN, SEED), strict=True))
    x, y = as_batch(images[indices["train"]]), torch.from_numpy(labels[indices["train"]])
    start = time.perf_counter()
    net = train(x, y, args.epochs, SEED)
    print(
        f"trained for {args.epochs} epochs in {time.perf_counter() - start:.0f} s; training top-1 {top1(net, x, y):.4f}"
    )
    write(args.out, net, images, labels, indices)
    held_out = indices["heldout"]
    score = top1(net, as_batch(images[held_out]), torch.from_numpy(labels[held_out]))
    print(f"held-out top-1 {score:.4f} on {len(held_out)} images")


if __name__ == "__main__":
    main()
