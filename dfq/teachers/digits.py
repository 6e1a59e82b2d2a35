"""The embedded teacher: a small MobileNet-style classifier of 8x8 handwritten digits, shipped with its weights.

It has what makes networks of this kind hard to quantize: batch norm, depthwise convolutions and linear bottlenecks with
residual adds, in 0.2 MB. ``examples/train_digits.py`` reproduces the weights and the images beside them.

Architecture after Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, arXiv:1801.04381,
with ReLU in place of ReLU6.
"""

from importlib.resources import files

import safetensors.torch
from torch import Tensor, nn

from dfq.teacher import InputSpec, Teacher

MEAN = (0.3048,)  # of the training images, bytes / 255
STD = (0.3756,)
INPUT_SIZE = (1, 8, 8)  # C, H, W
DATA = files(__package__) / "digits_data"  # weights.safetensors, train.npz, heldout.npz


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the resolution (over ``stride``), and its batch norm."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]


def depthwise_separable(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Depthwise 3x3, then pointwise 1x1, each with batch norm and ReLU (MobileNetV1's block)."""
    return nn.Sequential(
        *conv_bn(in_channels, in_channels, 3, stride, groups=in_channels),
        nn.ReLU(),
        *conv_bn(in_channels, out_channels, 1),
        nn.ReLU(),
    )


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3x3, linear pointwise projection, added to the input (MobileNetV2's block)."""

    def __init__(self, channels: int, hidden_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            *conv_bn(channels, hidden_channels, 1),
            nn.ReLU(),
            *conv_bn(hidden_channels, hidden_channels, 3, groups=hidden_channels),
            nn.ReLU(),
            *conv_bn(hidden_channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H, W]."""
        return x + self.layers(x)


class DigitsNet(nn.Module):
    """Classifier of images [N, 1, 8, 8], normalized as ``(byte / 255 - MEAN) / STD``, into logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*conv_bn(1, 32, 3), nn.ReLU()),
            depthwise_separable(32, 48),
            depthwise_separable(48, 64, stride=2),
            InvertedResidual(64, 192),
            nn.Sequential(*conv_bn(64, 128, 1), nn.ReLU()),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 8, 8] to logits [N, 10]."""
        return self.classifier(self.flatten(self.pool(self.features(x))))


def digits_net(weights: bool = True) -> DigitsNet:
    """The network in eval mode, with the shipped weights, or with fresh random ones if ``weights`` is false."""
    net = DigitsNet()
    if weights:
        net.load_state_dict(safetensors.torch.load((DATA / "weights.safetensors").read_bytes()))
    return net.eval()


def load(weights: bool = True) -> Teacher:
    """The embedded teacher; ``weights=False`` builds the structure alone."""
    return Teacher(digits_net(weights), "classification", InputSpec(INPUT_SIZE, MEAN, STD), name="digits")
