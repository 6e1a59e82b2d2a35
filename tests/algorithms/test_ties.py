"""Channels that have to be scaled alike: classes written down by hand, functions that stay, and what is won by them."""

import pytest
import torch
from conftest import NUM_CLASSES, SPEC, as_teacher, settle
from networks_by_layers import Forward, concatenated, conv, pooled, shuffled, split
from torch import nn
from torch.nn import functional as F

from dfq.algorithms._equalization import equalize
from dfq.algorithms._inputs import in_float
from dfq.algorithms._least_noise import least_noise_scales
from dfq.algorithms._paths import find_paths
from dfq.algorithms._reconstruction import float_reference
from dfq.algorithms._ties import Ties, _measured, _Probes, find_ties
from dfq.calibration import calibrate
from dfq.channels import float_network, output_scales, scaled_float_network
from dfq.evaluation import fidelity
from dfq.hooks import capture_outputs
from dfq.lightning.distillation import DistillationModule
from dfq.lightning.settings import DistillationSettings
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student
from dfq.tasks._task import task_of
from dfq.teacher import Teacher

PER_TENSOR = Scheme(TensorScheme(8, True, "per_tensor"), TensorScheme(8))
FOUR_BITS = Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(4))


def residual(m, x):
    x = F.relu(m.a(x))
    return pooled(m, x + m.c(F.relu(m.b(x))))


def stage(m, x):
    x = F.max_pool2d(F.relu(m.a(x)), 2)
    x = F.leaky_relu(m.b(x) + m.c(x), 0.1)  # a shortcut with weights
    return pooled(m, x + m.d(x))


def padded(m, x):
    x = F.relu(m.a(x))
    return pooled(m, m.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))


def unit(m, x):
    left, right = m.a(x).relu().chunk(2, 1)
    return pooled(m, shuffled(torch.cat([left, m.b(right)], 1)))


def neck(m, x):
    fine = F.relu(m.a(x))
    coarse = F.relu(m.b(F.avg_pool2d(fine, 2)))
    return pooled(m, m.c(torch.cat([F.avg_pool2d(fine, 2), coarse], 1)) + m.d(coarse))


def turned(m, x):
    x = F.relu(m.a(x))
    return pooled(m, m.b(x) + x.flip(1))


FC8, FC4 = nn.Linear(8, NUM_CLASSES), nn.Linear(4, NUM_CLASSES)
# Network, its layers, and for each layer the classes that it makes and reads, by names of our own; "." stays.
NETWORKS = {
    "concatenated": (
        concatenated,
        {"a": conv(3, 4), "b": conv(4, 4), "fc": nn.Linear(8, 10)},
        {"a": ("abcd", "..."), "b": ("efgh", "abcd"), "fc": ("." * 10, "abcdefgh")},
    ),
    "split": (
        split,
        {"a": conv(3, 8), "b": conv(4, 4), "c": conv(4, 4), "fc": nn.Linear(8, 10)},
        {
            "a": ("abcdefgh", "..."),
            "b": ("ijkl", "abcd"),
            "c": ("mnop", "efgh"),
            "fc": ("." * 10, "ijklmnop"),
        },
    ),
    "residual": (
        residual,
        {"a": conv(3, 4), "b": conv(4, 3), "c": conv(3, 4), "fc": nn.Linear(4, 10)},
        {"a": ("abcd", "..."), "b": ("efg", "abcd"), "c": ("abcd", "efg"), "fc": ("." * 10, "abcd")},
    ),
    "stage": (
        stage,
        {"a": conv(3, 4), "b": conv(4, 5), "c": conv(4, 5, 1), "d": conv(5, 5), "fc": nn.Linear(5, 10)},
        {
            "a": ("abcd", "..."),
            "b": ("efghi", "abcd"),
            "c": ("efghi", "abcd"),
            "d": ("efghi", "efghi"),
            "fc": ("." * 10, "efghi"),
        },
    ),
    "padded": (  # channels of the shortcut lie elsewhere in its sum: those that are added have different indices
        padded,
        {"a": conv(3, 2), "b": conv(2, 4, stride=2), "fc": nn.Linear(4, 10)},
        {"a": ("ab", "..."), "b": ("cabd", "ab"), "fc": ("." * 10, "cabd")},
    ),
    "unit": (
        unit,
        {"a": conv(3, 8), "b": conv(4, 4), "fc": nn.Linear(8, 10)},
        {"a": ("abcdefgh", "..."), "b": ("ijkl", "efgh"), "fc": ("." * 10, "aibjckdl")},
    ),
    "neck": (
        neck,
        {"a": conv(3, 2), "b": conv(2, 3), "c": conv(5, 4), "d": conv(3, 4), "fc": nn.Linear(4, 10)},
        {
            "a": ("ab", "..."),
            "b": ("cde", "ab"),
            "c": ("fghi", "abcde"),
            "d": ("fghi", "cde"),
            "fc": ("." * 10, "fghi"),
        },
    ),
    "turned": (
        turned,
        {"a": conv(3, 4), "b": conv(4, 4), "fc": nn.Linear(4, 10)},
        {"a": ("abcd", "..."), "b": ("dcba", "abcd"), "fc": ("." * 10, "dcba")},
    ),
    "sum over channels": (
        lambda m, x: pooled(m, m.b(F.relu(m.a(x)).cumsum(1))),
        {"a": conv(3, 4), "b": conv(4, 4), "fc": nn.Linear(4, 10)},
        {"a": ("aaaa", "..."), "b": ("bcde", "aaaa"), "fc": ("." * 10, "bcde")},
    ),
}


def make(name, seed=0):
    """Channels have ranges of two orders of magnitude."""
    forward, layers, _ = NETWORKS[name]
    teacher = as_teacher(Forward(forward, **layers), seed=seed)
    rng = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        scale = 10 ** (2 * torch.rand(len(layer.weight), generator=rng) - 1)
        layer.weight.data *= scale.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias.data *= scale
    return teacher


def images(num_samples=32):
    return settle(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), seed=3, num_samples=num_samples)


def partition(sides):
    """The same for the same classes, whatever they are called."""
    names: dict = {}
    return [None if label in (".", -1) else names.setdefault(label, len(names)) for side in sides for label in side]


def ties_of(teacher, **kwargs):
    student = Student.from_teacher(teacher, PER_TENSOR)
    return find_ties(float_network(student, teacher), student.layers, **kwargs)


@pytest.mark.parametrize("name", NETWORKS)
def test_classes_of_channels(name):
    ties, expected = ties_of(make(name)), NETWORKS[name][2]
    found = [side.tolist() for layer in expected for side in (ties.made[layer], ties.read[layer])]
    assert partition(found) == partition([side for layer in expected.values() for side in layer])
    numbers = {number for side in found for number in side if number >= 0}
    assert numbers == set(range(ties.num_classes))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_records_say_what_was_done(name):
    teacher, x = make(name), images()
    student = Student.from_teacher(teacher, PER_TENSOR)
    before = {key: layer.weight.clone() for key, layer in student.layers.items()}
    equalize(student, teacher, images=x, iterations=30)
    ties = ties_of(teacher)
    changed = {key for key, layer in student.layers.items() if not torch.equal(layer.weight, before[key])}
    assert changed == set(ties.layers) and changed
    with torch.no_grad(), capture_outputs(student.module, student.layers) as made:
        output = student(x)
    with torch.no_grad(), capture_outputs(teacher.module, student.layers) as wanted:
        torch.testing.assert_close(output, teacher(x), rtol=1e-4, atol=1e-4 * float(output.abs().max()))
    for key in student.layers:
        units = student.in_its_units(key, wanted[key])
        torch.testing.assert_close(made[key], units, rtol=1e-3, atol=1e-4 * float(units.abs().max()))


STAYS = {  # what is done to what "a" makes on its way to what comes next
    "elu": lambda m, x: pooled(m, m.b(F.elu(m.a(x)))),  # the identity of all that is positive
    "silu": lambda m, x: pooled(m, m.b(F.silu(m.a(x)))),
    "relu6": lambda m, x: pooled(m, m.b(F.relu6(m.a(x)))),
    "an upper limit far away": lambda m, x: pooled(m, m.b(m.a(x).clamp(max=20.0))),
    "softmax": lambda m, x: pooled(m, m.b(m.a(x).softmax(1))),
    "layer norm": lambda m, x: pooled(m, m.b(F.layer_norm(m.a(x), (4, 8, 8)))),
    "a gate": lambda m, x: pooled(m, (y := m.a(x)) * m.b(y.mean((2, 3), keepdim=True)).sigmoid()),
    "a constant": lambda m, x: pooled(m, m.b(m.a(x) + 1)),
    "an output": lambda m, x: (pooled(m, m.b(y := m.a(x))), y),
    "an output of one more reader": lambda m, x: pooled(m, m.b(y := m.a(x))) + y.mean((1, 2, 3))[:, None],
    "times itself": lambda m, x: pooled(m, m.b((y := m.a(x)) * y)),
    "the place of the largest": lambda m, x: pooled(m, m.b(y := m.a(x)) + y.argmax(1, keepdim=True)),
    "a layer that runs twice": lambda m, x: pooled(m, m.b(m.b(m.a(x)))),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name):
    teacher = as_teacher(Forward(STAYS[name], a=conv(3, 4), b=conv(4, 4, 1), fc=nn.Linear(4, 10)))
    assert (ties_of(teacher).made["a"] == -1).all()


def test_one_branch_that_stays_keeps_what_is_added_to_it_and_nothing_else():
    def forward(m, x):
        x = F.relu(m.a(x))
        y = F.relu(m.b(x))
        return m.fc(F.gelu(m.c(y) + x).mean((2, 3)))

    teacher = as_teacher(Forward(forward, a=conv(3, 4), b=conv(4, 6), c=conv(6, 4), fc=nn.Linear(4, 10)))
    ties = ties_of(teacher)
    assert (ties.made["a"] == -1).all() and (ties.made["c"] == -1).all()
    assert ties.made["b"].tolist() == ties.read["c"].tolist() == list(range(6))


def test_a_relu6_that_clips_keeps_the_channels_of_all_that_is_added_to_it():
    def forward(m, x):
        x = m.six(m.a(x))
        x = x + m.b(x)
        return m.fc(F.relu(m.c(m.other(m.d(x)))).mean((2, 3)))

    layers = {"a": conv(3, 4), "b": conv(4, 4), "d": conv(4, 5), "c": conv(5, 4), "fc": nn.Linear(4, 10)}
    teacher, x = as_teacher(Forward(forward, six=nn.ReLU6(), other=nn.ReLU6(), **layers)), images()
    teacher.module.a.weight.data *= 50
    teacher.module.d.weight.data *= 0.02
    student = Student.from_teacher(teacher, PER_TENSOR)
    equalize(student, teacher, images=x, iterations=20)
    assert isinstance(student.module.six, nn.ReLU6) and type(student.module.other) is nn.ReLU
    scales = {name: record.scale for name, record in student.surgery.rescaled.items()}
    assert all((scales[name] == 1).all() for name in ("a", "b") if name in scales)
    assert (scales["d"] != 1).all()
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["concatenated", "residual", "stage", "padded", "unit", "neck"])
def test_less_is_lost_than_with_pairs_alone(name):
    """Four bits for activations whose channels have ranges of two orders of magnitude."""
    teacher, x = make(name), images(64)
    lost = []
    for pairs_alone in (True, False):
        student = Student.from_teacher(teacher, FOUR_BITS)
        network = float_network(student, teacher)
        ties = find_ties(network, student.layers)
        if pairs_alone:
            paths = [path for path in find_paths(network, student.layers) if path.is_private]
            ties = Ties.of_paths(paths, student.layers)
        scale = least_noise_scales(student, network, ties, x)
        ties.pass_on(student.layers, scale)
        ties.record(student, scale)
        calibrate(student, x, resolve("quantizer", "mse"), resolve("quantizer", "mse"))
        with torch.no_grad():
            lost.append(float((student(x) - teacher(x)).square().sum() / teacher(x).square().sum()))
    assert lost[1] < 0.92 * lost[0]


# ------------------------------------------------------------------------------------------------ units


class Stages(nn.Module):
    """Two residual stages, each a module."""

    class Stage(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.first, self.second, self.skip = conv(i, o, stride=2), conv(o, o), conv(i, o, 1, stride=2)

        def forward(self, x):
            return F.relu(self.second(F.relu(self.first(x))) + self.skip(x))

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = conv(3, 4), self.Stage(4, 6), self.Stage(6, 8)
        self.fc = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.two(self.one(F.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def equalized():
    """A teacher with channels of many ranges, an equalized student of it, and images."""
    module, x = Stages(), images(32)
    settle(module)
    rng = torch.Generator().manual_seed(0)
    for layer in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
        layer.weight.data *= (10 ** (torch.rand(len(layer.weight), generator=rng) - 0.5)).view(-1, 1, 1, 1)
    teacher = Teacher(module, "classification", SPEC)
    student = Student.from_teacher(teacher, FOUR_BITS)
    equalize(student, teacher, images=x)
    return teacher, student, x


def test_scales_of_modules_that_are_no_layers(equalized):
    teacher, student, x = equalized
    places = ["one", "two", "stem"]
    scales = output_scales(student, teacher, places)
    assert set(scales) == {"one", "two"}  # of layers a student knows itself
    with torch.no_grad(), in_float(student), capture_outputs(student.module, places) as made:
        student(x)
    with torch.no_grad(), capture_outputs(teacher.module, places) as wanted:
        teacher(x)
    for name, scale in scales.items():
        torch.testing.assert_close(made[name] * scale.float(), wanted[name], rtol=1e-3, atol=1e-4)
        assert float(scale.max() / scale.min()) > 2


def test_a_student_that_was_not_equalized_has_no_scales():
    teacher = as_teacher(Stages())
    assert output_scales(Student.from_teacher(teacher, FOUR_BITS), teacher, ["one", "two"]) == {}


@pytest.mark.parametrize("settings", [{}, {"intervention": 1.0}], ids=["features", "intervention"])
def test_features_are_compared_and_handed_on_in_the_students_units(equalized, settings):
    """In float the student's features are the teacher's; and with the teacher's in their place it computes the same."""
    teacher, student, x = equalized
    student.module.requires_grad_(True)
    places = {"one": "one", "two": "two"}
    wanted = DistillationSettings(**settings)
    module = DistillationModule(student, teacher, features=places, settings=wanted)
    with in_float(student):
        seen = module._teach(x)
        module._learn(x, seen, dict.fromkeys(module.cuts, 1.0))
        losses = [float(module._feature_loss(name, seen.got[name], seen.wanted[name])) for name in places]
    assert max(losses) < 1e-6
    torch.testing.assert_close(seen.output, seen.target, rtol=1e-3, atol=1e-3)


def test_blocks_of_rounded_weights_are_fitted_in_the_students_units(equalized):
    """Of a student in float the reference is itself; of a rounded one, the teacher with the student's scales."""
    teacher, student, x = equalized
    with torch.no_grad(), in_float(student), capture_outputs(student.module, ["one", "two"]) as wanted:
        student(x)
    calibrate(student, x, resolve("quantizer", "mse"), resolve("quantizer", "mse"))
    student.freeze()
    reference = float_reference(student, teacher)
    with torch.no_grad(), capture_outputs(reference, ["one", "two"]) as found:
        reference(x)
    for name in ("one", "two"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_layers_are_compared_in_the_students_units(equalized):
    teacher, student, x = equalized
    with in_float(student):
        layers = fidelity(teacher, student, task_of(teacher), x)["layers"]
    assert min(layer["sqnr_db"] for layer in layers) > 60


# ------------------------------------------------------------------------------------------------ what is hard to see


def flattened(m, x):
    return m.fc(F.relu(m.b(F.relu(m.a(x)))).flatten(1))


def test_inputs_that_few_places_show_are_read_too():
    """The example has two samples: of both, half of what a ReLU reads is negative."""
    layers = {"a": conv(3, 16), "b": conv(16, 16), "fc": nn.Linear(16 * 64, 10)}
    ties = ties_of(as_teacher(Forward(flattened, **layers)))
    assert ties.num_classes == 32
    assert (ties.read["fc"].view(16, 64) == ties.made["b"][:, None]).all()


NORMS = {
    "layer norm": lambda x: F.layer_norm(x, (4, 8, 8), eps=1e-9),
    "unit length": lambda x: F.normalize(x, dim=1),
    "between 0 and 1": lambda x: x.clamp(0, 1),
}


@pytest.mark.parametrize("norm", NORMS)
def test_what_a_norm_reads_beside_a_layer_stays_and_nothing_else(norm):
    """Scaling all of its channels together changes nothing in it; scaling one does."""
    layers = {"a": conv(3, 4), "b": conv(4, 4), "c": conv(4, 4), "fc": nn.Linear(4, 10)}
    teacher = as_teacher(Forward(lambda m, x: pooled(m, m.b(y := m.a(x)) + m.c(NORMS[norm](y))), **layers))
    student = Student.from_teacher(teacher, PER_TENSOR)
    network = float_network(student, teacher)
    probes = _Probes(network, student.layers, ())
    ties = _measured(probes)  # without the trial of powers of two
    assert (ties.made["a"] == -1).all() and (ties.made["b"] == ties.made["c"]).all() and (ties.made["b"] >= 0).all()


@pytest.mark.parametrize("groups", [1, 4])
def test_what_a_layer_reads_that_runs_twice_stays(groups):
    """Without a bias it is homogeneous; but its record would have to say two things."""
    shared = conv(4, 4, bias=False, groups=groups)
    layers = {"a": conv(3, 4), "b": shared, "c": conv(4, 4), "fc": nn.Linear(4, 10)}
    teacher = as_teacher(Forward(lambda m, x: pooled(m, m.c(F.relu(m.b(F.relu(m.b(F.relu(m.a(x)))))))), **layers))
    ties = ties_of(teacher)
    assert (ties.made["a"] == -1).all() and (ties.read["c"] == -1).all() and (ties.made["c"] >= 0).all()


NO_GRADIENT = {
    "views in place": lambda m, x: torch.cat([part.relu_() for part in m.a(x).chunk(2, 1)], 1),
    "a gate in place": lambda m, x: m.a(x) * m.b(x).sigmoid_().mul_(2.0),
    "numpy": lambda m, x: F.relu(m.a(x)) * (1 + 0 * float(m.b(x).numpy().max())),
}


@pytest.mark.parametrize("kind", NO_GRADIENT)
def test_networks_that_have_no_gradient_are_equalized_in_pairs(kind):
    layers = {"a": conv(3, 4), "b": conv(3, 4), "c": conv(4, 4), "d": conv(4, 4), "fc": nn.Linear(4, 10)}

    def forward(m, x):
        return pooled(m, m.d(F.relu(m.c(NO_GRADIENT[kind](m, x)))))

    teacher, x = as_teacher(Forward(forward, **layers)), images()
    student = Student.from_teacher(teacher, PER_TENSOR)
    equalize(student, teacher, images=x, iterations=20)
    assert (student.surgery.rescaled["d"].input_scale != 1).all()
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("least", [0.5, 1e6], ids=["some", "none"])
def test_layers_that_read_rows_which_are_chosen(least):
    """How many there are depends on what is scaled; there may be none, where nothing shows what depends on them."""

    def forward(m, x):
        x = F.relu(m.b(F.relu(m.a(x))))
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        return m.fc(x.mean((2, 3)) + m.c(rows[rows.mean(1) > least]).sum(0))

    layers = {"a": conv(3, 4), "b": conv(4, 4), "c": nn.Linear(4, 4), "fc": nn.Linear(4, 10)}
    teacher, x = as_teacher(Forward(forward, **layers)), images()
    student = Student.from_teacher(teacher, PER_TENSOR)
    equalize(student, teacher, images=x, iterations=20)
    assert set(student.surgery.rescaled) == {"a", "b"} and (student.surgery.rescaled["b"].scale == 1).all()
    with torch.no_grad():
        torch.testing.assert_close(student(x), teacher(x), rtol=1e-3, atol=1e-3 * float(teacher(x).abs().max()))


class Inverted(nn.Module):
    """A stem and an inverted residual, with a ReLU6 each."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.wide, self.narrow = conv(3, 6), conv(6, 12, 1), conv(12, 6, 1)
            self.six, self.other = nn.ReLU6(), nn.ReLU6()

        def forward(self, x):
            x = self.six(self.stem(x))
            return x + self.narrow(self.other(self.wide(x)))

    def __init__(self):
        super().__init__()
        self.block, self.last, self.fc = self.Block(), conv(6, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        return pooled(self, self.last(self.block(x)))


@pytest.fixture
def without_relu6():
    """A teacher whose ReLU6 hardly clip samples, but do other inputs; a student in which they are ReLUs; samples."""
    module, x = Inverted(), images(32)
    settle(module)
    rng = torch.Generator().manual_seed(0)
    for layer in (module.block.stem, module.block.wide, module.block.narrow):
        layer.weight.data *= (10 ** (torch.rand(len(layer.weight), generator=rng) - 0.5)).view(-1, 1, 1, 1)
    teacher = Teacher(module, "classification", SPEC)
    student, x = Student.from_teacher(teacher, FOUR_BITS), x * 0.05
    equalize(student, teacher, images=x, iterations=50)
    return teacher, student, x


def test_units_where_a_relu6_has_become_a_relu(without_relu6):
    teacher, student, x = without_relu6
    assert [kind for _, kind in student.surgery.rewrites] == ["relu", "relu"]
    scales = output_scales(student, teacher, ["block"])
    with torch.no_grad(), in_float(student), capture_outputs(student.module, ["block"]) as made:
        student(x)
    with torch.no_grad(), capture_outputs(teacher.module, ["block"]) as wanted:
        teacher(x)
    torch.testing.assert_close(made["block"] * scales["block"].float(), wanted["block"], rtol=1e-3, atol=1e-2)
    assert float(scales["block"].max() / scales["block"].min()) > 2
    reference = scaled_float_network(student, teacher).module
    with torch.no_grad(), capture_outputs(reference, ["block"]) as found:
        reference(x)
    torch.testing.assert_close(found["block"], made["block"], rtol=1e-3, atol=1e-4)


def test_equalization_goes_on_where_a_relu6_has_become_a_relu(without_relu6):
    teacher, student, x = without_relu6
    with torch.no_grad():
        before = student(x)
    equalize(student, teacher, images=x, iterations=20)
    with torch.no_grad():
        torch.testing.assert_close(student(x), before, rtol=1e-3, atol=1e-3)


def test_a_relu6_of_several_places_is_left_alone_where_that_is_asked_for():
    def forward(m, x):
        return pooled(m, m.b(m.six(m.a(x))) + m.six(m.c(m.six(m.a(-x)))))

    layers = {"a": conv(3, 4), "b": conv(4, 4), "c": conv(4, 4), "fc": nn.Linear(4, 10)}
    teacher, x = as_teacher(Forward(forward, six=nn.ReLU6(), **layers)), images()
    student = Student.from_teacher(teacher, PER_TENSOR)
    equalize(student, teacher, images=0.1 * x, iterations=5, replace_relu6=False)
    assert isinstance(student.module.six, nn.ReLU6) and not student.surgery.rewrites
