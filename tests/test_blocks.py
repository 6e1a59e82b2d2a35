"""Blocks: found in networks of every shape, run alone exactly as inside the network, captured in bounded memory."""

import copy

import pytest
import torch
from conftest import NETS, as_teacher
from torch import nn
from torch.nn import functional as F

from dfq import blocks
from dfq.blocks import Block, Captures, call_arguments, find_blocks, layer_inputs, run_block
from dfq.hooks import Choice, forward_hooks, kept_choices, record_dataflow
from dfq.modules import weight_layers
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def conv(i, o, k=3, **kwargs):
    return nn.Conv2d(i, o, k, padding=k // 2, **kwargs)


class Basic(nn.Module):
    def __init__(self, i, o, shortcut=False):
        super().__init__()
        self.conv1, self.conv2 = conv(i, o), conv(o, o)
        self.shortcut = conv(i, o, 1) if shortcut else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class Net(nn.Module):
    """A stem, two stages of residual blocks, a depthwise pair in two lists, a head; functional calls in between."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.stage1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.stage2 = nn.ModuleList([Basic(8, 12, shortcut=True), Basic(12, 12)])
        self.depthwise, self.pointwise = nn.ModuleList([conv(12, 12, groups=12)]), nn.ModuleList([conv(12, 16, 1)])
        self.inverted = nn.Sequential(conv(16, 24, 1), nn.ReLU6(), conv(24, 24, groups=24), nn.ReLU6(), conv(24, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = self.stage1(x)
        for block in self.stage2:
            x = block(x)
        for spatial, mix in zip(self.depthwise, self.pointwise, strict=True):
            x = F.relu(mix(spatial(x)))
        return self.head(self.inverted(x).mean((2, 3)))


class UNet(nn.Module):
    """What goes down is read again on the way up."""

    def __init__(self):
        super().__init__()
        self.down, self.bottom, self.up = conv(3, 4), nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4)), conv(8, 4)

    def forward(self, x):
        down = self.down(x)
        return self.up(torch.cat([down, self.bottom(F.relu(down))], 1)).flatten(1)


class Twice(nn.Module):
    """A layer that runs on what it gave, and one whose owner reads the weight."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.own = conv(3, 4), conv(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.shared(self.shared(self.first(x)))
        return F.linear(x.mean((2, 3)), self.own.weight, self.own.bias)


class Heads(nn.Module):
    """A head of two parts on maps of three sizes, the smallest made behind the first call; what it gives is read."""

    def __init__(self):
        super().__init__()
        self.stem, self.smaller, self.smallest = conv(3, 4), conv(4, 4, stride=2), conv(4, 4, stride=2)
        self.tower = nn.Sequential(conv(4, 4), nn.ReLU(inplace=True), conv(4, 4))
        self.depthwise, self.pointwise = conv(4, 4, groups=4), conv(4, 2, 1)
        self.merge = conv(2, 2)

    def forward(self, x):
        fine = self.stem(x)
        found = [self.merge(self.head(fine))]
        coarse = self.smaller(fine)
        return torch.cat([part.flatten(1) for part in (*found, self.head(coarse), self.head(self.smallest(coarse)))], 1)

    def head(self, x):
        return self.pointwise(self.depthwise(self.tower(x)))


def blocks_of(net, single_layers=False):
    net.eval()
    return find_blocks(net, record_dataflow(net, IMAGES[:2]), weight_layers(net), single_layers)


def test_blocks_follow_the_dataflow():
    assert [(b.modules, len(b.layers)) for b in blocks_of(Net())] == [
        (("stem",), 1),
        (("stage1.0",), 2),
        (("stage1.1",), 2),
        (("stage2.0",), 3),
        (("stage2.1",), 2),
        (("depthwise.0", "pointwise.0"), 2),
        (("inverted",), 3),
        (("head",), 1),
    ]
    assert [b.name for b in blocks_of(Net())][5] == "depthwise.0..pointwise.0"


def test_every_layer_a_block_of_its_own():
    net = Net()
    found = blocks_of(net, single_layers=True)
    assert all(b.modules == b.layers and len(b.layers) == 1 for b in found)
    assert {b.layers[0] for b in found} == set(weight_layers(net))


def test_what_has_skip_connections_is_looked_into():
    assert [b.layers for b in blocks_of(UNet())] == [("down",), ("bottom.0", "bottom.2"), ("up",)]


def test_layers_that_run_on_what_they_gave_or_are_never_called_are_in_no_block():
    assert [b.layers for b in blocks_of(Twice())] == [("first",)]


def test_what_runs_several_times_is_a_block_behind_all_that_brings_its_inputs():
    assert [(b.modules, b.calls) for b in blocks_of(Heads())] == [
        (("stem",), 1),
        (("smaller",), 1),
        (("smallest",), 1),
        (("tower",), 3),
        (("depthwise", "pointwise"), 3),
        (("merge",), 1),  # behind its input, which is made before the second call of the tower
    ]
    assert [(b.name, b.calls) for b in blocks_of(Heads(), single_layers=True)][3:5] == [("tower.0", 3), ("tower.2", 3)]


def test_a_recurrence_through_other_layers_is_no_block():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared, self.between = conv(3, 4), nn.Sequential(conv(4, 4), nn.ReLU()), conv(4, 4)

        def forward(self, x):
            return self.shared(self.between(self.shared(self.first(x))))

    assert [b.name for b in blocks_of(Loop())] == ["first", "between"]


def test_of_what_runs_another_layer_in_each_call_the_layers_are_blocks():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([conv(4, 2), conv(4, 2)])

        def forward(self, x, level):
            return F.relu(self.parts[level](x))

    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = conv(3, 4), Chosen()

        def forward(self, x):
            x = self.stem(x)
            return torch.cat([self.head(F.avg_pool2d(x, 2**level), level).flatten(1) for level in (0, 1)], 1)

    assert [(b.name, b.calls) for b in blocks_of(Levels())] == [("stem", 1), ("head.parts.0", 1), ("head.parts.1", 1)]


@pytest.mark.parametrize("policy", ["all", "hardware"])
def test_each_call_of_a_block_alone_computes_what_it_computes_inside(policy, make_dataset):
    """With the quantizers of that call: sites between its operations are other ones in each."""
    teacher = as_teacher(Heads())
    student = Student.from_teacher(
        teacher, Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4), policy=policy)
    )
    quantizer = resolve("quantizer", "min_max")
    resolve("algorithm", "round_to_nearest").quantize(
        student, teacher, make_dataset(teacher), quantizer, quantizer, 0, None
    )
    for block in find_blocks(student.module, record_dataflow(student.module, IMAGES[:2]), student.layers):
        kept = []
        last = student.module.get_submodule(block.modules[-1])
        with forward_hooks([("", last)], after=lambda _n, _m, _i, out, kept=kept: kept.append(out.clone()) and None):
            student(IMAGES)
        calls = call_arguments(student.module, block.modules[0], IMAGES, block.calls)
        with torch.no_grad():
            alone = [run_block(student.module, block, call.activation, call) for call in calls]
        assert len(kept) == len(alone) == block.calls
        assert all(map(torch.equal, alone, kept)), block.name


@pytest.mark.parametrize("make", [Net, UNet, *NETS.values()], ids=lambda make: make.__name__)
def test_each_layer_is_in_one_block_at_most_and_blocks_come_in_order(make):
    net = make()
    found = blocks_of(net)
    layers = [name for block in found for name in block.layers]
    assert len(layers) == len(set(layers)) and set(layers) == set(weight_layers(net))
    order = [op.module for op in record_dataflow(net.eval(), IMAGES[:2]).ops]
    firsts = [order.index(block.layers[0]) for block in found]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("policy", ["all", "hardware"])
@pytest.mark.parametrize("make", [Net, UNet], ids=lambda make: make.__name__)
def test_a_block_alone_computes_what_it_computes_inside(make, policy, make_dataset):
    """With its quantizers, also those between operations: same input, same bits."""
    teacher = as_teacher(make())
    scheme = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4), policy=policy)
    student = Student.from_teacher(teacher, scheme)
    quantizer = resolve("quantizer", "min_max")
    resolve("algorithm", "round_to_nearest").quantize(
        student, teacher, make_dataset(teacher), quantizer, quantizer, 0, None
    )
    found = find_blocks(student.module, record_dataflow(student.module, IMAGES[:2]), student.layers)
    assert len(found) > 2
    for block in found:
        kept = {}
        handle = student.module.get_submodule(block.modules[-1]).register_forward_hook(
            lambda m, i, o, kept=kept: kept.update(out=o)
        )
        student(IMAGES)
        handle.remove()
        [arguments] = call_arguments(student.module, block.modules[0], IMAGES)
        with torch.no_grad():
            alone = run_block(student.module, block, arguments.activation, arguments)
        assert torch.equal(alone, kept["out"])
    assert torch.equal(student(IMAGES), student(IMAGES))  # nothing is left behind


def test_a_block_takes_keyword_and_other_arguments():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, mask, *, hidden, factor=1.0):
            return hidden + self.b(F.relu(self.a(hidden))) * factor * (1 if mask is None else mask)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.inner(None, hidden=x.mean(1), factor=2.0).mean(1))

    net = Outer().eval()
    blocks = blocks_of(net)
    assert [b.layers for b in blocks] == [("inner.a", "inner.b"), ("head",)]
    [arguments] = call_arguments(net, "inner", IMAGES)
    x = torch.randn(4, 8, 8)
    with torch.no_grad():
        assert torch.equal(run_block(net, blocks[0], x, arguments), net.inner(None, hidden=x, factor=2.0))


def test_what_is_the_same_for_all_samples_gets_as_many_rows_as_the_activation():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, mask, own):
            assert mask.shape == (len(x), 8)  # as some networks insist
            return self.layer(x) * mask + own.sum()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Masked(), nn.Linear(8, 3)

        def forward(self, x):
            x = x.mean((1, 2))
            return self.head(self.inner(x, torch.arange(8.0).expand(len(x), 8), torch.ones(3)))

    net = Outer().eval()
    block = Block(("inner",), ("inner.layer",))
    [arguments] = call_arguments(net, "inner", IMAGES)
    for count in (1, 3, 9, len(IMAGES)):
        x = torch.randn(count, 8)
        with torch.no_grad():
            wanted = net.inner(x, torch.arange(8.0).expand(count, 8), torch.ones(3))
            assert torch.equal(run_block(net, block, x, arguments), wanted)


@pytest.mark.parametrize("limit", [2**31, 100])
def test_captured_tensors_are_those_of_a_whole_forward_in_memory_or_in_a_file(limit, tmp_path):
    net = Net().eval()
    reference = copy.deepcopy(net)
    with torch.no_grad():
        net.stem.weight.mul_(1.5)  # as if it were quantized
    block = blocks_of(net)[1]
    assert block == Block(("stage1.0",), ("stage1.0.conv1", "stage1.0.conv2"))
    found = Captures(net, reference, IMAGES, 4, tmp_path, limit).of(block)  # 6 samples: the last batch is shorter
    for network, inputs in ((net, found.inputs), (reference, found.float_inputs)):
        with layer_inputs(network, ["stage1.0"]) as seen, torch.no_grad():
            network(IMAGES)
        torch.testing.assert_close(inputs, seen["stage1.0"])
    torch.testing.assert_close(found.float_outputs, reference.stage1[0](found.float_inputs).detach())
    assert not torch.allclose(found.inputs, found.float_inputs)
    assert len(list(tmp_path.glob("*.activations"))) == (0 if limit > 1000 else 3)


@pytest.mark.parametrize("limit", [2**31, 100])
@pytest.mark.parametrize("make", [Net, UNet, *NETS.values()], ids=lambda make: make.__name__)
def test_a_block_gets_what_the_one_before_gave(make, limit, tmp_path, monkeypatch):
    """To the bit what a whole forward brings, whatever was done to the blocks before; and fewer of these run."""
    student = as_teacher(make()).module
    reference, found = copy.deepcopy(student), blocks_of(student)
    reached, real = [], call_arguments
    with Captures(student, reference, IMAGES, 2, tmp_path / "one_by_one", limit) as captures, torch.no_grad():
        for block in found:
            monkeypatch.setattr(blocks, "call_arguments", lambda *given: reached.append(given[1]) or real(*given))
            one = captures.of(block)
            monkeypatch.undo()
            alone = Captures(student, reference, IMAGES, 2, tmp_path / "alone", limit).of(block)
            for key in ("inputs", "float_inputs", "float_outputs"):
                assert torch.equal(getattr(one, key), getattr(alone, key)), (block.name, key)
            assert len(list((tmp_path / "one_by_one").glob("*.activations"))) <= (0 if limit > 1000 else 4)
            for name in block.layers:  # as if they were quantized
                student.get_submodule(name).weight.mul_(1.5)
    assert not list((tmp_path / "one_by_one").glob("*.activations"))
    if make is Net:
        once, each_batch = 3, 7  # of three batches, in two networks, and one sample
        follow = {"stage1.1", "stage2.0", "stage2.1", "depthwise.0"}
        assert {name: reached.count(name) for name in reached} == {
            block.modules[0]: once if block.modules[0] in follow else each_batch for block in found
        }


@pytest.mark.parametrize("limit", [2**31, 9000, 100])
def test_all_calls_are_captured_as_a_whole_forward_has_them(limit, tmp_path, monkeypatch):
    """In memory or in files: the three of a block are one tensor for the limit."""
    student = as_teacher(Heads()).module
    reference, found, reached, real = copy.deepcopy(student), blocks_of(student), [], call_arguments
    with Captures(student, reference, IMAGES, 4, tmp_path, limit) as captures, torch.no_grad():
        for block in found:
            monkeypatch.setattr(blocks, "call_arguments", lambda *given: reached.append(given[1]) or real(*given))
            calls = captures.calls_of(block)
            monkeypatch.undo()
            assert len(calls) == block.calls
            for network, name in ((student, "inputs"), (reference, "float_inputs")):
                part, wanted = network.get_submodule(block.modules[0]), []
                with forward_hooks([("", part)], before=lambda _n, _m, given, to=wanted: to.append(given[0].clone())):
                    network(IMAGES)
                for call, values in zip(calls, wanted, strict=True):
                    torch.testing.assert_close(getattr(call, name), values)
            for call in calls:
                alone = run_block(reference, block, call.float_inputs.clone(), call.arguments)
                torch.testing.assert_close(call.float_outputs, alone)
            if limit == 9000 and block.name == "tower":  # 6 samples, 4 channels: 6144 bytes, 1536 and 384
                assert len(list(tmp_path.glob("inputs*"))) == 0
            if limit == 100:
                assert len(list(tmp_path.glob("inputs*"))) == block.calls
            for layer in block.layers:  # as if they were quantized
                student.get_submodule(layer).weight.mul_(1.5)
    assert not list(tmp_path.glob("*.activations"))
    each_batch, follows = 5, 3  # of two batches, in two networks, and one sample
    assert {name: reached.count(name) for name in reached if name in ("tower", "depthwise")} == {
        "tower": each_batch,
        "depthwise": follows,
    }


def test_a_few_samples_say_whether_a_block_follows(tmp_path, monkeypatch):
    """No forward of a batch is needed behind the first block; where a tensor beside the activation is another one for
    each sample, that of the whole batch is taken."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = conv(4, 4)

        def forward(self, x, shift):
            return self.layer(x) + shift.view(-1, 1, 1, 1)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.plain, self.shifted = conv(3, 4), nn.Sequential(conv(4, 4), nn.ReLU()), Shifted()

        def forward(self, x):
            x = self.plain(self.stem(x))
            return self.shifted(x, x.mean((1, 2, 3)))

    net, images = Chain().eval(), torch.cat([IMAGES, IMAGES * 2])
    reference, sizes, real = copy.deepcopy(net), {}, call_arguments
    found = [
        Block((name,), (layer,))
        for name, layer in (("stem", "stem"), ("plain", "plain.0"), ("shifted", "shifted.layer"))
    ]

    def counted(network, name, given, count):
        sizes.setdefault(name, []).append(len(given))
        return real(network, name, given, count)

    monkeypatch.setattr(blocks, "call_arguments", counted)
    with Captures(net, reference, images, len(images), tmp_path) as captures, torch.no_grad():
        for block in found:
            captured = captures.of(block)
            with layer_inputs(net, [block.layers[0]]) as seen:
                net(images)
            assert torch.equal(captured.inputs, seen[block.layers[0]])
    torch.testing.assert_close(captured.float_outputs, reference(images).detach())
    assert sizes == {"stem": [4, 4, 1, 12, 12], "plain": [4, 4, 1], "shifted": [4, 4, 1, 12, 12]}


def test_a_block_that_writes_into_its_input_leaves_what_was_captured(tmp_path):
    net = nn.Sequential(conv(3, 4), nn.Sequential(nn.ReLU(inplace=True), conv(4, 4)), conv(4, 2)).eval()
    with Captures(net, copy.deepcopy(net), IMAGES, 4, tmp_path) as captures, torch.no_grad():
        for block, inputs in zip(blocks_of(net), (IMAGES, net[0](IMAGES), net[1](net[0](IMAGES))), strict=True):
            found = captures.of(block)
            torch.testing.assert_close(found.inputs, inputs)
            torch.testing.assert_close(found.float_inputs, inputs)
            assert float(inputs.min()) < 0


class Choosing(nn.Module):
    """Goes on with the two rows of an image that are largest; their layer has a row for each."""

    def __init__(self):
        super().__init__()
        self.first, self.chosen, self.head = conv(3, 4), Choice(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)  # [N, 4, 8, 8]
        rows = self.chosen(x.mean((1, 3)).topk(2, dim=1).indices)  # [N, 2]
        taken = x.mean(1).gather(1, rows[:, :, None].expand(-1, -1, 8))
        return self.head(taken.flatten(0, 1)).view(len(x), -1)


def test_a_block_behind_a_choice_is_captured_at_what_the_reference_has_chosen(tmp_path):
    torch.manual_seed(0)
    net = Choosing().eval()
    reference = copy.deepcopy(net)
    with torch.no_grad():
        net.first.weight.mul_(-1)  # it would choose other rows
        block, maps = Block(("head",), ("head",)), [network.first(IMAGES).mean(1) for network in (net, reference)]
        rows = reference.first(IMAGES).mean((1, 3)).topk(2, dim=1).indices[:, :, None].expand(-1, -1, 8)
        own = net.first(IMAGES).mean((1, 3)).topk(2, dim=1).indices
        assert not torch.equal(own, rows[..., 0])
        captures = Captures(net, reference, IMAGES, 4, tmp_path)
        found = captures.of(block)
        for got, values in zip((found.inputs, found.float_inputs), maps, strict=True):
            assert got.shape == (12, 8)
            torch.testing.assert_close(got, values.gather(1, rows).flatten(0, 1))
        torch.testing.assert_close(found.float_outputs, reference.head(found.float_inputs))
        seen = []
        for run, _ in captures.forwards():
            with layer_inputs(net, ["head"]) as inputs:
                run()
            seen.append(inputs["head"])
        torch.testing.assert_close(torch.cat(seen), found.inputs)
        with kept_choices(net) as chosen:
            net(IMAGES)
        assert torch.equal(chosen["chosen"], own), "nothing is left behind"
    flow = record_dataflow(net, IMAGES[:2])
    assert [name for name in ("first", "chosen", "head") if flow.follows_choice(net, name)] == ["chosen", "head"]


def test_what_begins_with_tokens_is_no_block(tmp_path):
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(x.mean(1).transpose(0, 1)).mean(0))  # [8, N, 8] in between

    net = TokensFirst().eval()
    captures = Captures(net, copy.deepcopy(net), IMAGES, 4, tmp_path)
    assert [captures.of(block) is None for block in blocks_of(net, single_layers=True)] == [True, False]
