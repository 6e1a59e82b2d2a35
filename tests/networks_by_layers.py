"""Networks of a few named layers, whose forward is a function of them."""

import torch
from torch import nn
from torch.nn import functional as F


def conv(i, o, k=3, **kwargs):
    kwargs.setdefault("padding", k // 2)
    return nn.Conv2d(i, o, k, **kwargs)


class Forward(nn.Module):
    """Layers by name, and a forward that is a function of them."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.run(self, x)


def pooled(m, x):
    return m.fc(F.relu(x).mean((2, 3)))


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def concatenated(m, x):
    x = F.relu(m.a(x))
    return pooled(m, torch.cat([x, m.b(x)], 1))


def split(m, x):
    left, right = m.a(x).relu().chunk(2, 1)
    return m.fc(torch.cat([m.b(left), m.c(right)], 1).mean((2, 3)))
