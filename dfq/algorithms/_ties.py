"""Which channels of a whole network have to be scaled alike, so that it computes what it did.

What one layer makes may be read by several (branches, stages that a neck looks at again), be a part of a concatenation,
or be added to what others make (a residual stream). Such channels are tied: a class of channels has one scale, which
divides the weights of all that make them and multiplies the weights of all that read them. A pair of layers with
nothing else in between (:mod:`dfq.algorithms._paths`) is the smallest case.

Nothing is looked up in a list of operations: it is measured. Positive noise stands in the place of what each layer
makes, and each layer's input is looked at.

- **Homogeneous** is an input feature that is s times as large where all noise is, for s of 16 and 1/16, where noise is
  positive and where it has both signs. Any other one, each of the network's outputs, and what quantized layers read
  that run more than once, keeps the channels that it depends on as they are; these are found by a gradient.
- **Which channel** a feature stems from is told by doubling the channels whose number has bit k set, for every k.
- A feature that is more than one channel's, each bit leaving it between once and twice as large, is a **sum**. Mostly
  channels are added that have the same index within their layers: the index is told by the bits of indices, the layers
  by one gradient for all features of an input. Other sums (shortcuts that are padded, sums over channels) take a
  gradient each.

In the end powers of two are passed on, which must not change one bit of what the network makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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


class UnknownTies(Exception):
    """A network that does not show what its channels have to do with each other."""


class _Probes:
    """What layers read while noise stands in the place of what they make; inputs [I, M] of some places alone.

    Args:
        names: layers whose channels may get a scale.
        others: those whose may not, and neither what they read.
    """

    def __init__(self, network: FloatNetwork, names: Iterable[str], others: Iterable[str]):
        self.network = network
        self.layers = {name: network.module.get_submodule(name) for name in names}
        self.read = self.layers | {name: network.module.get_submodule(name) for name in others}
        self.starts: dict[str, int] = {}
        self.num_channels = 0
        for name, layer in self.layers.items():
            self.starts[name] = self.num_channels
            self.num_channels += num_outputs(layer)
        self.firsts = {name: (layer, self.starts[name]) for name, layer in self.layers.items()}
        self.index = torch.cat([torch.arange(num_outputs(layer)) for layer in self.layers.values()])  # within its layer
        self.sizes: dict[str, torch.Size] = {}  # of inputs, in the first run
        self.places: dict[str, Tensor] = {}
        self.rng = torch.Generator().manual_seed(0)

    def inputs(self, change: Change, with_grad: bool = False) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Layer → what it reads, with noise ``change``d; and what depends on nothing that may change: the network's
        outputs, what other layers read, and what is read in another number of places than in the first run, which is
        no number in what is read."""
        found: dict[str, Tensor] = {}
        ends: list[Tensor] = []

        def look(name: str, x: Tensor) -> None:
            if name not in self.layers or self.sizes.setdefault(name, x.shape) != x.shape:
                ends.append(x)
                return
            if not x.numel():
                raise UnknownTies(f"{name} reads nothing")  # but may read something another time
            if name not in self.places:
                self.places[name] = torch.randint(x.shape[1], (NUM_PLACES,), generator=self.rng)
            found[name] = x[:, self.places[name].to(x.device)].float().cpu()

        outputs = substituted(self.network, self.firsts, self.read, change, look, with_grad)
        for name, layer in self.layers.items():
            if name not in self.places:
                raise UnknownTies(f"{name} does not run")
            found.setdefault(name, torch.full((num_inputs(layer), NUM_PLACES), torch.nan))
        return found, [x.float() for x in (*ends, *tensors_in(outputs)) if x.is_floating_point()]

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

    def kinds(self, base: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Layer → which features [I] stay what they are where all noise is scaled, and which are homogeneous (zeros are
        both)."""
        stays = {name: torch.ones(len(x), dtype=torch.bool) for name, x in base.items()}
        follows = {name: torch.ones(len(x), dtype=torch.bool) for name, x in base.items()}

        def scaled(factor: float, is_signed: bool) -> dict[str, Tensor]:
            return self.inputs(lambda noise, _: (_signed(noise) if is_signed else noise) * factor)[0]

        for is_signed in (False, True):
            before = scaled(1.0, True) if is_signed else base
            for factor in (FAR, 1 / FAR):
                after = scaled(factor, is_signed)
                for name, x in before.items():
                    stays[name] &= _is_multiple(after[name], x, 1.0)
                    follows[name] &= _is_multiple(after[name], x, factor)
        return stays, follows

    def dependences(self) -> _Dependences:
        """By gradients."""
        return _Dependences(self)


class _Dependences:
    """Which channels a value depends on, where noise is positive, and where it has both signs and is large or small."""

    def __init__(self, probes: _Probes):
        self.factors = torch.ones(probes.num_channels, requires_grad=True)
        with _gradients_needed():
            self.runs = self._runs(probes)
        self.rng = torch.Generator().manual_seed(1)

    def _runs(self, probes: _Probes) -> list[tuple[dict[str, Tensor], list[Tensor]]]:
        return [
            probes.inputs(lambda noise, channel: noise * self.factors[channel], with_grad=True),
            probes.inputs(lambda noise, channel: _signed(noise) * self.factors[channel], with_grad=True),
            probes.inputs(lambda noise, channel: _signed(noise) / FAR * self.factors[channel], with_grad=True),
        ]

    def of_feature(self, name: str, feature: int) -> Tensor:
        """Channels [channels] that one input feature depends on, where noise is positive."""
        with torch.enable_grad():
            total = self.runs[0][0][name][feature].sum()
        return self._of_sum(total)

    def _of_sum(self, total: Tensor) -> Tensor:
        with _gradients_needed():
            (gradient,) = torch.autograd.grad(total, self.factors, retain_graph=True, allow_unused=True)
        return torch.zeros(len(self.factors), dtype=torch.bool) if gradient is None else gradient != 0

    def of(self, features: Mapping[str, Tensor], and_ends: bool = False) -> Tensor:
        """Channels [channels] that any of some input features depends on; ``features``: layer → [I], bool."""
        found = torch.zeros(len(self.factors), dtype=torch.bool)
        for inputs, ends in self.runs:
            with torch.enable_grad():
                values = [inputs[name][chosen] for name, chosen in features.items() if chosen.any()]
                values = [value for value in values + (ends if and_ends else []) if value.requires_grad]
                if not values:
                    continue
                # Random weights, so that nothing cancels.
                terms = [(value * torch.rand(value.shape, generator=self.rng).to(value)).sum() for value in values]
                total = torch.stack([term.cpu() for term in terms]).sum()
            found |= self._of_sum(total)
        return found


@contextmanager
def _gradients_needed() -> Iterator[None]:
    """Networks that only run have none: written over in place, taken to numpy."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnknownTies(str(error)) from error


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

    UnknownTies where the network has no gradient (it writes into what its gradient needs), or does not run all of them.

    Args:
        unlimited: ReLU6 modules that count as ReLUs.
    """
    names = list(names)
    products = layer_products(network, names)
    if not products:
        return Ties({}, {}, 0)
    unlimited = list(unlimited)
    for parameter in network.module.parameters():
        parameter.requires_grad_(False)
    probes = _Probes(network, products, [name for name in names if name not in products])
    with without_limit(unlimited):
        ties = _measured(probes)
        return _without_surprises(network, probes.layers, ties)


def _measured(probes: _Probes) -> Ties:
    base, _ = probes.inputs(lambda noise, _: noise)
    channels, is_one = probes.bits(torch.arange(probes.num_channels), base)
    is_constant, is_homogeneous = probes.kinds(base)
    # What is zero where noise is positive, and only there, does not show where it stems from.
    is_odd = {name: ~is_constant[name] & ~(is_homogeneous[name] & (x != 0).any(1)) for name, x in base.items()}
    is_sum = {name: ~one & ~is_odd[name] & ~is_constant[name] for name, one in is_one.items()}
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
    # A norm does not follow a scale of all channels; of one channel it may.
    kept = dependences.of({name: odd | is_constant[name] for name, odd in is_odd.items()}, and_ends=True)
    stays = {classes.root(channel) for channel in kept.nonzero().flatten().tolist()}
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

    def inputs() -> dict[str, list[Tensor]]:
        """Of each call of each module."""
        seen: dict[str, list[Tensor]] = {name: [] for name in modules}

        def look(name: str, _module: nn.Module, given: tuple) -> None:
            seen[name].append(double(given[0]))

        with without_limit(modules.values()), forward_hooks(modules.items(), before=look):
            network.outputs(network.example)
        return seen

    before = inputs()
    ties.pass_on(layers, torch.full((ties.num_classes,), 2.0, dtype=torch.float64))
    after = inputs()
    ties.pass_on(layers, torch.full((ties.num_classes,), 0.5, dtype=torch.float64))
    return {name for name in modules if not all(map(torch.equal, before[name], after[name]))}
