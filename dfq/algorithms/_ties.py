"""Which channels of a whole network have to be scaled alike, so that it computes what it did.

What one layer makes may be read by several (branches, stages that a neck looks at again), be a part of a concatenation,
or be added to what others make (a residual stream). Such channels are tied: a class of channels has one scale, which
divides the weights of all that make them and multiplies the weights of all that read them. A pair of layers with
nothing else in between (:mod:`dfq.algorithms._paths`) is the smallest case.

Nothing is looked up in a list of operations: it is measured. Positive noise stands in the place of what each layer
makes, and each layer's input is looked at.

- **Homogeneous** is an input feature that is s times as large where all noise is, for s of 16 and 1/16 and signs of
  both kinds. Any other one, and each of the network's outputs, keeps the channels that it depends on as they are; these
  are found by a gradient.
- **Which channel** a feature stems from is told by doubling the channels whose number has bit k set, for every k.
- A feature that is more than one channel's, each bit leaving it between once and twice as large, is a **sum**. Mostly
  channels are added that have the same index within their layers: the index is told by the bits of indices, the layers
  by one gradient for all features of an input. Other sums (shortcuts that are padded, sums over channels) take a
  gradient each.

In the end powers of two are passed on, which must not change one bit of what the network makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as with_changes

import torch
from torch import Tensor, nn

from dfq.algorithms._paths import Path, layer_products, substituted, without_limit
from dfq.channels import FloatNetwork, double, multiply, num_inputs, num_outputs, rescaled, shaped
from dfq.hooks import forward_hooks, tensors_in
from dfq.student import Student

NUM_PLACES = 64  # of an input feature that are looked at, drawn at random
TOLERANCE = 1e-3  # of ratios
EXACT = 1e-4  # largest change of outputs, in units of the largest output
FAR = 16.0  # a scale that is far from 1

Change = Callable[[Tensor, Tensor], Tensor]  # of noise and the numbers of channels


@dataclass(frozen=True)
class Ties:
    """Classes of channels.

    Attributes:
        made: layer → [O], number of the class of each output channel; -1: it has to stay as it is.
        read: layer → [I], number of the class that each input feature stems from; -1: from none.
        num_classes: how many there are.
    """

    made: dict[str, Tensor]
    read: dict[str, Tensor]
    num_classes: int

    @staticmethod
    def of_paths(paths: list[Path], layers: Mapping[str, nn.Module]) -> Ties:
        """Private paths: each output channel of a first layer is a class of its own, in the order of ``paths``."""
        names = dict.fromkeys(name for path in paths for name in (path.first, path.last))
        made = {name: torch.full((num_outputs(layers[name]),), -1) for name in names}
        read = {name: torch.full((num_inputs(layers[name]),), -1) for name in names}
        number = 0
        for path in paths:
            made[path.first] = number + torch.arange(num_outputs(layers[path.first]))
            read[path.last] = torch.where(path.channels < 0, -1, number + path.channels)
            number += num_outputs(layers[path.first])
        return Ties(made, read, number)

    @property
    def layers(self) -> list[str]:
        """Those that anything happens to."""
        return [name for name in self.made if (self.made[name] >= 0).any() or (self.read[name] >= 0).any()]

    def at_outputs(self, name: str, values: Tensor, rest: float) -> Tensor:
        """Values of classes [K] at the layer's output channels [O]; ``rest`` for those without a class."""
        return _at(values, self.made[name], rest)

    def at_inputs(self, name: str, values: Tensor, rest: float) -> Tensor:
        """And at its input features [I]."""
        return _at(values, self.read[name], rest)

    def pass_on(self, layers: Mapping[str, nn.Module], scale: Tensor) -> None:
        """Divide what makes a channel by the ``scale`` [K] of its class, and multiply what reads it; in place."""
        for name in self.layers:
            layer, made = layers[name], 1 / self.at_outputs(name, scale, 1.0)
            kernels = shaped(layer, made, inputs=False) * shaped(layer, self.at_inputs(name, scale, 1.0), inputs=True)
            multiply(layer.weight, kernels)
            if layer.bias is not None:
                multiply(layer.bias, made)

    def record(self, student: Student, scale: Tensor) -> None:
        """That it has been done to the student's layers."""
        for name in self.layers:
            made, old = self.at_outputs(name, scale, 1.0), rescaled(student, name)
            student.surgery.rescaled[name] = with_changes(
                old,
                scale=old.scale * made,
                shift=old.shift / made,
                input_scale=old.input_scale * self.at_inputs(name, scale, 1.0),
            )

    def without(self, classes: Tensor) -> Ties:
        """The same without some classes (numbers), which keep theirs."""
        left = torch.full((self.num_classes + 1,), -1)  # the last one for -1
        kept = torch.ones(self.num_classes, dtype=torch.bool)
        kept[classes] = False
        left[:-1][kept] = torch.arange(int(kept.sum()))
        made = {name: left[numbers] for name, numbers in self.made.items()}
        return Ties(made, {name: left[numbers] for name, numbers in self.read.items()}, int(kept.sum()))


def _at(values: Tensor, numbers: Tensor, rest: float) -> Tensor:
    if not len(values):
        return torch.full(numbers.shape, rest, dtype=values.dtype)
    return torch.where(numbers < 0, rest, values[numbers.clamp(min=0)])


class _Classes:
    """Union-find over channels."""

    def __init__(self, size: int):
        self.parent = list(range(size))

    def root(self, channel: int) -> int:
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel

    def tie(self, channels: list[int]) -> None:
        for channel in channels[1:]:
            self.parent[self.root(channel)] = self.root(channels[0])


class _Probes:
    """What layers read while noise stands in the place of what they make; inputs [I, M] of some places alone."""

    def __init__(self, network: FloatNetwork, names: Iterable[str]):
        self.network = network
        self.layers = {name: network.module.get_submodule(name) for name in names}
        self.starts: dict[str, int] = {}
        self.num_channels = 0
        for name, layer in self.layers.items():
            self.starts[name] = self.num_channels
            self.num_channels += num_outputs(layer)
        self.firsts = {name: (layer, self.starts[name]) for name, layer in self.layers.items()}
        self.index = torch.cat([torch.arange(num_outputs(layer)) for layer in self.layers.values()])  # within its layer
        self.places: dict[str, Tensor] = {}
        self.rng = torch.Generator().manual_seed(0)

    def inputs(self, change: Change, with_grad: bool = False) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Layer → what it reads, with noise ``change``d; and the network's outputs."""
        found: dict[str, Tensor] = {}

        def look(name: str, x: Tensor) -> None:
            if name not in self.places:
                self.places[name] = torch.randint(x.shape[1], (NUM_PLACES,), generator=self.rng)
            found[name] = x[:, self.places[name].to(x.device)].float().cpu()

        outputs = substituted(self.network, self.firsts, self.layers, change, look, with_grad)
        return found, [x.float() for x in tensors_in(outputs) if x.is_floating_point()]

    def bits(self, numbers: Tensor, base: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Layer → the number [I] in ``numbers`` [channels] of the channel that each feature stems from, bit by bit; and
        whether that is one number [I]."""
        found = {name: torch.zeros(len(x), dtype=torch.int64) for name, x in base.items()}
        is_one = {name: torch.ones(len(x), dtype=torch.bool) for name, x in base.items()}

        def with_bit(bit: int) -> Change:
            return lambda noise, channel: noise * (1 + (numbers[channel] >> bit & 1))

        for bit in range(int(numbers.max()).bit_length()):
            doubled, _ = self.inputs(with_bit(bit))
            for name, x in base.items():
                low, high = _ratios(doubled[name], x)
                is_set = (low - 2).abs().maximum((high - 2).abs()) < TOLERANCE
                is_one[name] &= is_set | ((low - 1).abs().maximum((high - 1).abs()) < TOLERANCE)
                found[name] += is_set.long() << bit
        return found, is_one

    def dependences(self) -> _Dependences:
        """By gradients."""
        return _Dependences(self)


class _Dependences:
    """Which channels a value depends on, both where noise is positive and where it has both signs."""

    def __init__(self, probes: _Probes):
        self.factors = torch.ones(probes.num_channels, requires_grad=True)
        self.runs = [
            probes.inputs(lambda noise, channel: noise * self.factors[channel], with_grad=True),
            probes.inputs(lambda noise, channel: _signed(noise) * self.factors[channel], with_grad=True),
        ]
        self.rng = torch.Generator().manual_seed(1)

    def of_feature(self, name: str, feature: int) -> Tensor:
        """Channels [channels] that one input feature depends on, where noise is positive."""
        with torch.enable_grad():
            total = self.runs[0][0][name][feature].sum()
        (gradient,) = torch.autograd.grad(total, self.factors, retain_graph=True, allow_unused=True)
        return torch.zeros(len(self.factors), dtype=torch.bool) if gradient is None else gradient != 0

    def of(self, features: Mapping[str, Tensor], and_outputs: bool = False) -> Tensor:
        """Channels [channels] that any of some input features depends on; ``features``: layer → [I], bool."""
        found = torch.zeros(len(self.factors), dtype=torch.bool)
        for inputs, outputs in self.runs:
            with torch.enable_grad():
                values = [inputs[name][chosen] for name, chosen in features.items() if chosen.any()]
                values = [value for value in values + (outputs if and_outputs else []) if value.requires_grad]
                if not values:
                    continue
                # Random weights, so that nothing cancels.
                terms = [(value * torch.rand(value.shape, generator=self.rng).to(value)).sum() for value in values]
                total = torch.stack([term.cpu() for term in terms]).sum()
            (gradient,) = torch.autograd.grad(total, self.factors, retain_graph=True, allow_unused=True)
            if gradient is not None:
                found |= gradient != 0
        return found


def _signed(noise: Tensor) -> Tensor:
    """The same noise with signs of both kinds."""
    return torch.where((noise * 1024).frac() < 0.5, -noise, noise)


def _ratios(values: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest [I] where ``base`` [I, M] is not zero; infinities where it is everywhere."""
    seen, ratio = base != 0, values / base
    return torch.where(seen, ratio, torch.inf).amin(1), torch.where(seen, ratio, -torch.inf).amax(1)


def _is_multiple(values: Tensor, base: Tensor, factor: float) -> Tensor:
    """Whether each feature [I, M] is ``factor`` times what it was."""
    margin = EXACT * base.abs().amax(1, keepdim=True)
    return ((values / factor - base).abs() <= margin).all(1)


def find_ties(network: FloatNetwork, names: Iterable[str], unlimited: Iterable[nn.Hardtanh] = ()) -> Ties:
    """Classes of channels of the layers ``names``; others, and layers that run more than once, stay as they are.

    Args:
        unlimited: ReLU6 modules that count as ReLUs.
    """
    products = layer_products(network, names)
    if not products:
        return Ties({}, {}, 0)
    unlimited = list(unlimited)
    for parameter in network.module.parameters():
        parameter.requires_grad_(False)
    probes = _Probes(network, products)
    with without_limit(unlimited):
        ties = _measured(probes)
        return _without_surprises(network, probes.layers, ties)


def _measured(probes: _Probes) -> Ties:
    base, _ = probes.inputs(lambda noise, _: noise)
    channels, is_one = probes.bits(torch.arange(probes.num_channels), base)
    both = probes.inputs(lambda noise, _: _signed(noise))[0]
    is_constant, is_odd = {}, {}
    runs = [
        (FAR, probes.inputs(lambda noise, _: _signed(noise) * FAR)[0]),
        (1 / FAR, probes.inputs(lambda noise, _: _signed(noise) / FAR)[0]),
    ]
    for name, x in both.items():
        is_constant[name] = torch.stack([_is_multiple(run[name], x, 1.0) for _, run in runs]).all(0)
        is_homogeneous = torch.stack([_is_multiple(run[name], x, s) for s, run in runs]).all(0)
        is_odd[name] = ~is_homogeneous & ~is_constant[name]
    is_sum = {
        name: ~one & ~is_odd[name] & ~is_constant[name] & (base[name] != 0).any(1) for name, one in is_one.items()
    }
    dependences, classes = probes.dependences(), _Classes(probes.num_channels)
    read = {
        name: torch.where(is_odd[name] | is_constant[name] | is_sum[name], -1, numbers)
        for name, numbers in channels.items()
    }
    if any(sums.any() for sums in is_sum.values()):
        indices, is_one = probes.bits(probes.index, base)
        for name, sums in is_sum.items():
            of_one = sums & is_one[name]
            added = dependences.of({name: of_one})
            for feature in sums.nonzero().flatten().tolist():
                if of_one[feature]:
                    members = (added & (probes.index == indices[name][feature])).nonzero().flatten().tolist()
                else:
                    members = dependences.of_feature(name, feature).nonzero().flatten().tolist()
                if members:
                    classes.tie(members)
                    read[name][feature] = members[0]
                else:
                    is_odd[name][feature] = True
    stays = {classes.root(channel) for channel in dependences.of(is_odd, and_outputs=True).nonzero().flatten().tolist()}
    roots = torch.tensor([classes.root(channel) for channel in range(probes.num_channels)])
    is_read = {int(roots[channel]) for numbers in read.values() for channel in numbers[numbers >= 0].tolist()}
    number = torch.full((probes.num_channels,), -1)
    chosen = torch.tensor(sorted(is_read - stays), dtype=torch.int64)
    number[chosen] = torch.arange(len(chosen))
    number = number[roots]
    made = {name: number[start : start + num_outputs(probes.layers[name])] for name, start in probes.starts.items()}
    return Ties(made, {name: torch.where(x < 0, -1, number[x.clamp(min=0)]) for name, x in read.items()}, len(chosen))


# ------------------------------------------------------------------------------------------------ powers of two


@torch.no_grad()
def _without_surprises(network: FloatNetwork, layers: Mapping[str, nn.Module], ties: Ties) -> Ties:
    """Those along which powers of two may be passed on without changing what the network computes."""
    rng = torch.Generator().manual_seed(0)
    before = network.outputs(network.example)

    def is_exact(classes: Tensor) -> bool:
        exponents = torch.zeros(ties.num_classes, dtype=torch.float64)
        exponents[classes] = torch.randint(-2, 3, (len(classes),), generator=rng).double()
        ties.pass_on(layers, torch.exp2(exponents))
        after = network.outputs(network.example)
        ties.pass_on(layers, torch.exp2(-exponents))
        return after.shape == before.shape and bool((after - before).abs().max() <= EXACT * before.abs().max())

    if not ties.num_classes or is_exact(torch.arange(ties.num_classes)):
        return ties
    return ties.without(torch.cat([part for part in _made_together(ties) if not is_exact(part)]))


def _made_together(ties: Ties) -> list[Tensor]:
    """All classes, those that one layer makes in one part."""
    parts = _Classes(ties.num_classes)
    for numbers in ties.made.values():
        parts.tie(numbers[numbers >= 0].tolist())
    roots = torch.tensor([parts.root(number) for number in range(ties.num_classes)])
    return [(roots == root).nonzero().flatten() for root in roots.unique()]


@torch.no_grad()
def limits_between(network: FloatNetwork, ties: Ties, modules: Mapping[str, nn.Hardtanh]) -> set[str]:
    """The ReLU6 modules that channels with a class go through."""
    layers = {name: network.module.get_submodule(name) for name in ties.layers}
    seen: dict[str, Tensor] = {}
    changed: set[str] = set()

    def look(name: str, _module: nn.Module, inputs: tuple) -> None:
        x = double(inputs[0])
        if name in seen and not torch.equal(seen[name], x):
            changed.add(name)
        seen.setdefault(name, x)

    with without_limit(modules.values()), forward_hooks(modules.items(), before=look):
        network.outputs(network.example)
        for factor in (2.0, 0.5):
            ties.pass_on(layers, torch.full((ties.num_classes,), factor, dtype=torch.float64))
            if factor == 2.0:
                network.outputs(network.example)
    return changed
