"""Scales between layers with which rounding does the least harm.

Of all layers l that make or read a channel with a scale, in relation to what their output channels o vary by, it is

    sum_l sum_o ( sum_i W_oi^2 e_i(t s_i)  +  c sum_i d_oi^2 x_i^2 / s_i^2 ) / var(y_o)

with e_i(t s_i) the squared error of input channel i on synthetic samples, rounded to the bits that it gets within a
range of t s_i (t, the range of the whole tensor, is found along), x_i^2 its mean square, d_oi the error of a weight,
its step over sqrt(12), where the step follows from the largest scaled weight that shares it; c is
:data:`ROUNDING_SHARE`. A tensor that only per-channel and depthwise weights stand around is thus as good as rounded
channel by channel, and no runtime knows.

Own formulation; scales between layers are of DFQ (:mod:`dfq.algorithms._equalization`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfq.algorithms._ties import Ties
from dfq.channels import (
    TRANSPOSED,
    FloatNetwork,
    channel_dim,
    double,
    rescaled,
)
from dfq.hooks import forward_hooks
from dfq.quantization import choose_qparams, fake_quantize, from_groups, to_groups
from dfq.scheme import TensorScheme
from dfq.student import Student

SMALLEST_RANGE = 0.1  # of a channel's activations, in units of the mean of all channels: real ones may well have more
ROUNDING_SHARE = 0.1  # of nearest rounding's squared error that is left where errors of weights make up for each other
RATIOS = (0.05, 32.0, 50)  # ranges that a channel is tried with, in units of its own: from, to, how many
NORM_ORDER = 16  # of weights that share a step, in place of the largest
LEARNING_RATE = 0.2  # of logarithms of scales and ranges
NUM_VALUES = 4096  # of a channel that are looked at, drawn at random
NUM_LARGEST = 8  # and the largest of each batch


@dataclass(frozen=True)
class _Seen:
    """What a layer reads and makes of synthetic samples, in the student's units.

    Attributes:
        values: [I, M] of each input feature: some, and the largest ones, which 8 bits must not clip.
        shares: [M], how many of all values each of them stands for.
        power: [I], mean square.
        variance: [O] of each output channel; the smallest count as a hundredth of the mean.
    """

    values: Tensor
    shares: Tensor
    power: Tensor
    variance: Tensor


def least_noise_scales(
    student: Student, network: FloatNetwork, ties: Ties, images: Tensor, iterations: int = 200
) -> Tensor:
    """What the channels of each class are to be divided by, [K], float64 on the CPU.

    Adam on the logarithms of all scales and ranges at once, from those that suit activations alone; what is minimized
    is in the module's docstring.

    Args:
        images: [N, C, H, W], which show what is read and made.
        iterations: steps.
    """
    if not ties.num_classes:
        return torch.ones(0, dtype=torch.float64)
    seen = _looked_at(student, network, ties.layers, images)
    layers = {name: student.layers[name] for name in seen}
    readers = {name for name in layers if (ties.read[name] >= 0).any()}
    errors = {
        name: _RangeErrors(seen[name].values, seen[name].shares, layers[name].input_quantizer.scheme)
        for name in readers
        if not layers[name].input_quantizer.scheme.is_float
    }
    noises = {name: _LayerNoise(layer, seen[name], errors.get(name), name in readers) for name, layer in layers.items()}
    start, alive = _first_logs(ties, noises, errors)
    logs = start.requires_grad_()
    ranges = {name: error.best.log().mean().requires_grad_() for name, error in errors.items()}

    def noise(name: str) -> Tensor:
        live = torch.where(alive, logs, 0.0)
        into_log = ties.at_inputs(name, live, 0.0) if name in readers else None
        out_log = ties.at_outputs(name, live, 0.0) if (ties.made[name] >= 0).any() else None
        return noises[name](into_log, out_log, ranges.get(name))

    optimizer = torch.optim.Adam([logs, *ranges.values()], lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    with torch.enable_grad():
        for _ in range(iterations):
            loss = torch.stack([noise(name) for name in layers]).sum()
            if not loss.requires_grad:  # nothing is rounded
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return torch.where(alive, logs.detach(), 0.0).exp()


def _first_logs(ties: Ties, noises: dict[str, _LayerNoise], errors: dict[str, _RangeErrors]) -> tuple[Tensor, Tensor]:
    """Logarithms [K] with which a channel's own best range is as large as any in each tensor, on average over those
    that read it; and whether a class is made and read at all [K]: others stay."""
    total, count = torch.zeros(2, ties.num_classes, dtype=torch.float64)
    is_made, is_read = torch.zeros(2, ties.num_classes, dtype=torch.bool)
    for name, noise in noises.items():
        made, read = ties.made[name], ties.read[name]
        is_made[made[(made >= 0) & (noise.largest_made > 0)]] = True
        is_read[read[(read >= 0) & (noise.largest_read > 0)]] = True
        if name in errors:
            known, best = read >= 0, errors[name].best.clamp(min=1e-30).log()
            total.index_add_(0, read[known], (best - best.mean())[known])
            count.index_add_(0, read[known], torch.ones(int(known.sum()), dtype=torch.float64))
    alive = is_made & is_read
    return torch.where(alive, total / count.clamp(min=1), 0.0), alive


class _LayerNoise:
    """Noise of one layer's outputs, in relation to what they vary by, as a function of the scales before and behind it.

    Scales are factors of rows and columns, so that what is summed over both needs no more than a product with a vector.

    Args:
        errors: of its inputs; None: they are float.
        is_scaled: there are scales before it.

    Attributes:
        largest_made, largest_read: magnitude of the weights that make an output [O], and that read an input [I].
    """

    def __init__(self, layer: nn.Module, seen: _Seen, errors: _RangeErrors | None, is_scaled: bool):
        self.layer, self.seen, self.errors = layer, seen, errors
        self.groups = getattr(layer, "groups", 1)
        kernels = double(layer.weight).view(*layer.weight.shape[:2], -1)
        self.kernel_size = kernels.shape[2]
        largest = self._in_groups(kernels.abs().amax(-1))  # [G, O / G, I / G]
        squares = self._in_groups(kernels.square().sum(-1))
        self.gains = (squares / seen.variance.view(self.groups, -1, 1)).sum(1).flatten()  # [I]
        self.largest_made, self.largest_read = largest.amax(2).flatten(), largest.amax(1).flatten()
        self.most = largest.amax().clamp(min=1e-30)
        self.powers = (largest / self.most) ** NORM_ORDER
        quantizer = layer.weight_quantizer
        self.steps, self.axis = quantizer.scheme, quantizer.axis
        # A step of its own goes along with its output.
        self.rounds = not quantizer.scheme.is_float and (self.axis is None or is_scaled)

    def __call__(self, into_log: Tensor | None, out_log: Tensor | None, log_range: Tensor | None) -> Tensor:
        """A scalar, the mean over outputs, of the logarithms of what inputs [I] are multiplied by and outputs [O] are
        divided by (None: nothing), and of the range of the input tensor."""
        total = torch.zeros((), dtype=torch.float64)
        into_log = torch.zeros_like(self.gains) if into_log is None else into_log
        if self.errors is not None:
            assert log_range is not None
            total = (self.gains * self.errors(log_range + into_log)).sum()
        if self.rounds:
            out_log = torch.zeros_like(self.largest_made) if out_log is None else out_log
            total = total + ROUNDING_SHARE * self._rounding(into_log, out_log)
        return total / len(self.largest_made)

    def _rounding(self, into_log: Tensor, out_log: Tensor) -> Tensor:
        """Of weights: d^2 x^2 / s^2 over the variance, summed."""
        read = (self.seen.power * (-2 * into_log).exp()).view(self.groups, 1, -1) * self.kernel_size
        made = ((2 * out_log).exp() / self.seen.variance).view(self.groups, -1, 1)
        half_step = self._shared_range(into_log, -out_log) / (self.steps.quant_max - self.steps.quant_min)
        squares = half_step.square() / 3
        if squares.shape[2] == 1:  # all that an output reads has one step
            return ((squares * made).sum((1, 2)) * read.sum((1, 2))).sum()
        return (squares * made * read).sum()

    def _shared_range(self, into_log: Tensor, made_log: Tensor) -> Tensor:
        """About the largest magnitude of the scaled weights that share a step: [G, O / G, 1 or I / G].

        A norm of high order, for the gradient: all weights that are nearly as large have to give way together.
        """
        highest = into_log.detach().amax(), made_log.detach().amax()  # keeps powers within what float64 holds
        read = (NORM_ORDER * (into_log - highest[0])).exp().view(self.groups, -1, 1)
        made = (NORM_ORDER * (made_log - highest[1])).exp().view(self.groups, -1, 1)
        size = self.steps.group_size
        if self.axis is not None and size is not None and self.powers.numel() == self.layer.weight.numel():
            scaled = self.powers * read.mT * made
            kernels = (scaled.mT if isinstance(self.layer, TRANSPOSED) else scaled).flatten(0, 1)  # as the weight lies
            groups = to_groups(kernels, self.axis, size)
            groups = groups.sum(-1, keepdim=True).expand_as(groups)
            sums = self._in_groups(from_groups(groups, self.axis, kernels.shape))
        else:
            sums = self.powers @ read * made
            if self.axis is None:
                sums = sums.sum().expand_as(sums)
        # Rows of zeros have a gradient too.
        return sums.clamp(min=1e-300).pow(1 / NORM_ORDER) * self.most * (highest[0] + highest[1]).exp()

    def _in_groups(self, kernels: Tensor) -> Tensor:
        """One value a kernel of the weight, [G, O / G, I / G]."""
        kernels = kernels.view(self.groups, -1, kernels.shape[1])
        return kernels.mT if isinstance(self.layer, TRANSPOSED) else kernels


class _RangeErrors:
    """Squared error of each input feature as a function of the range that it is rounded within.

    Args:
        values: [I, M] of each feature; of one that is hardly there they count as larger.
        shares: [M], how many values each stands for.
        scheme: bits and grid of the whole tensor.

    Attributes:
        best: [I], the range with the least error.
    """

    def __init__(self, values: Tensor, shares: Tensor, scheme: TensorScheme):
        own = values.abs().amax(1)
        least = (SMALLEST_RANGE * own.mean()).clamp(min=torch.finfo(torch.float32).tiny)
        ramp = torch.linspace(0, 1, values.shape[1]).expand_as(values)
        values = torch.where(own[:, None] > 0, values * (least / own).clamp(min=1)[:, None], least * ramp)
        low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
        self.own = torch.maximum(-low, high).double()
        first, last, number = RATIOS
        ratios = torch.linspace(math.log(first), math.log(last), number, dtype=torch.float64)
        found, weights = [], shares / shares.sum()
        for ratio in ratios.exp().tolist():
            scale, zero_point = choose_qparams(low * ratio, high * ratio, scheme)
            found.append((fake_quantize(values, scale, zero_point, scheme, axis=0) - values).square() @ weights)
        errors = torch.stack(found, 1).double()
        self.best = self.own * ratios[errors.argmin(1)].exp()
        self.logs = errors.clamp(min=1e-12 * float(errors.max()) + 1e-300).log()
        self.first, self.width = float(ratios[0]), float(ratios[1] - ratios[0])

    def __call__(self, log_range: Tensor) -> Tensor:
        """[I], between the points linear in logarithms; ``log_range``: [I]."""
        place = ((log_range - self.own.log() - self.first) / self.width).clamp(0, self.logs.shape[1] - 1.001)
        before = place.detach().long()[:, None]
        low, high = self.logs.gather(1, before)[:, 0], self.logs.gather(1, before + 1)[:, 0]
        return (low + (high - low) * (place - before[:, 0])).exp()


def _looked_at(student: Student, network: FloatNetwork, names: Iterable[str], images: Tensor) -> dict[str, _Seen]:
    """Layer → what it reads and makes in the float network."""
    rng = torch.Generator().manual_seed(0)
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    shares: dict[str, list[Tensor]] = {name: [] for name in names}
    power: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}

    def add(sums: dict[str, Tensor], name: str, x: Tensor, share: float) -> None:
        sums[name] = sums.get(name, 0) + double(x.mean(1)) * share

    def look(name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if not inputs[0].numel():  # nothing was chosen for it
            return
        share = len(inputs[0]) / len(images)
        x = inputs[0].float().movedim(channel_dim(layer, inputs[0]), 0).flatten(1)
        y = output.float().movedim(channel_dim(layer, output), 0).flatten(1)
        some, most = math.ceil(NUM_VALUES * share), min(NUM_LARGEST, x.shape[1] - 1)
        chosen = torch.randint(x.shape[1], (some,), generator=rng)
        if x.shape[1] <= some:  # all there are, once: a linear layer reads one of each image
            some, chosen = x.shape[1], torch.arange(x.shape[1])
        values[name] += [x[:, chosen.to(x.device)].cpu(), x.gather(1, x.abs().topk(most, 1).indices).cpu()]
        shares[name] += [torch.full((some,), (x.shape[1] - most) / some), torch.ones(most)]
        for sums, seen in ((power, x.square()), (first, y), (second, y.square())):
            add(sums, name, seen, share)

    modules = [(name, network.module.get_submodule(name)) for name in values]
    with forward_hooks(modules, after=look):
        for batch in images.split(64):
            network.outputs(batch)
    found = {}
    for name, parts in values.items():
        if not parts:
            continue  # it does not run on these samples: no noise either
        record = rescaled(student, name)
        variance = (second[name] - first[name].square()) / record.scale.square()
        variance = variance.clamp(min=max(1e-2 * float(variance.mean()), 1e-30))
        read = torch.cat(parts, 1) / record.input_scale.float()[:, None]
        found[name] = _Seen(read, torch.cat(shares[name]), power[name] / record.input_scale.square(), variance)
    return found
