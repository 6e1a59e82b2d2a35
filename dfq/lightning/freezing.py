"""Frozen channels: weight gradients for the output channels that matter, for speed.

EfQAT (Ashkboos et al., 2024, arXiv 2411.11038). The importance of an output channel is the mean magnitude of its
weights; only the most important share of each layer's channels is trained, and the others are looked at again every so
many steps. The backward pass then computes a part of the weights' gradients. Steps, zero points and biases are trained
in all channels.

Differences from the paper: its channel-wise mode alone (not whole layers); the partial backward pass is for ungrouped
convolutions and linear layers, other layers get a whole gradient and are put back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.modules import QuantizedConv1d, QuantizedConv2d, QuantizedConv3d, QuantizedLayer, QuantizedLinear

CONVOLUTIONS = (QuantizedConv1d, QuantizedConv2d, QuantizedConv3d)


class FrozenChannels:
    """Which output channels of which layers stay, and how little of the backward pass the others need."""

    def __init__(self, layers: list[QuantizedLayer], share: float):
        self.share = share
        # A weight that two layers have in common is chosen once.
        self.layers = list({id(layer.weight): layer for layer in layers}.values())
        self.trained: dict[QuantizedLayer, Tensor] = {}
        self.frozen: dict[QuantizedLayer, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def choose(self) -> None:
        """Take the most important channels of each layer, by the weights as they are now."""
        trained = []
        for layer in self.layers:
            rows = layer.weight.movedim(layer.channel_axis, 0).flatten(1)
            order = rows.abs().mean(1).argsort(descending=True, stable=True)
            count = max(1, round(len(order) * (1 - self.share)))
            trained.append(order[:count].sort().values)
        self.hold(trained)

    @torch.no_grad()
    def hold(self, trained: list[Tensor]) -> None:
        """Train these channels of each layer; the others stay as they are now."""
        for layer, channels in zip(self.layers, trained, strict=True):
            self.trained[layer] = channels = channels.to(layer.weight.device)
            is_frozen = torch.ones(layer.weight.shape[layer.channel_axis], dtype=torch.bool, device=channels.device)
            frozen = is_frozen.index_fill(0, channels, False).nonzero().flatten()
            self.frozen[layer] = (frozen, layer.weight.index_select(layer.channel_axis, frozen))

    @torch.no_grad()
    def restore(self) -> None:
        """Put frozen channels back where an optimizer's momentum has moved them."""
        for layer, (frozen, weight) in self.frozen.items():
            layer.weight.index_copy_(layer.channel_axis, frozen, weight)

    @contextmanager
    def partial_gradients(self) -> Iterator[None]:
        """Forwards inside compute no weight gradients for frozen channels."""
        possible = [layer for layer in self.layers if _is_simple(layer)]
        try:
            for layer in possible:
                layer.__dict__["forward"] = functools.partial(_forward, layer, self.trained[layer])
            yield
        finally:
            for layer in possible:
                layer.__dict__.pop("forward", None)


def _is_simple(layer: QuantizedLayer) -> bool:
    """Whether :func:`_forward` does what the layer does."""
    if type(layer) is QuantizedLinear:
        return True
    if type(layer) not in CONVOLUTIONS:
        return False
    convolution: Any = layer
    plain = convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)
    return plain and convolution.groups == 1


def _forward(layer: Any, trained: Tensor, input: Tensor) -> Tensor:
    """As :meth:`QuantizedLayer.forward`, with a product whose backward pass is partial."""
    x = input if layer.input_is_on_grid else layer.input_quantizer(input)
    bias = layer.bias if layer.bias_quantizer is None else layer.bias_quantizer(layer.bias, layer)
    shape = None if isinstance(layer, nn.Linear) else (layer.stride, layer.padding, layer.dilation)
    return _PartialProduct.apply(x, layer.weight_quantizer(layer.weight), bias, trained, shape)


class _PartialProduct(torch.autograd.Function):
    """Linear (``shape`` None) or convolution (stride, padding, dilation): weight gradient of some output channels."""

    @staticmethod
    def forward(ctx, x, weight, bias, trained, shape):
        ctx.save_for_backward(x, weight, trained)
        ctx.shape = shape
        if shape is None:
            return F.linear(x, weight, bias)
        stride, padding, dilation = shape
        zeros = [0] * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, zeros, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, trained = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        if ctx.shape is None:
            flat = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                grad_x = grad @ weight
            if grad_weight is not None:
                grad_weight[trained] = flat[:, trained].mT @ x.flatten(0, -2)
            if ctx.needs_input_grad[2]:
                grad_bias = flat.sum(0)
            return grad_x, grad_weight, grad_bias, None, None
        zeros = [0] * len(ctx.shape[0])

        def backward(of: Tensor, by: Tensor, mask: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(of, x, by, None, *ctx.shape, False, zeros, 1, mask)

        if ctx.needs_input_grad[0]:
            grad_x = backward(grad, weight, [True, False, False])[0]
        if grad_weight is not None:
            # Channels are taken where they lie, so that a channels-last gradient stays one.
            part = grad.movedim(1, -1).index_select(-1, trained).movedim(-1, 1)
            grad_weight[trained] = backward(part, weight[trained], [False, True, False])[1]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum([d for d in range(grad.dim()) if d != 1])
        return grad_x, grad_weight, grad_bias, None, None
