"""The loop beside its steps: statistics over parts, smaller images first, early stop, compiling, no waiting."""

import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETS, SPEC, as_teacher
from tiny_detectors import cell_teacher
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators import _optimization
from dfq.generators._attention import negative_entropies
from dfq.generators._base import batch_rng
from dfq.generators._optimization import coarse_to_fine, compiled_step, cosine, optimize
from dfq.generators._precision import arithmetic
from dfq.generators._statistics import SharedMoments, batch_norm_distances
from dfq.generators.box_sampling import BoxSampling
from dfq.generators.deep_inversion import DeepInversion
from dfq.generators.gdfq import GDFQ
from dfq.generators.genie import Genie
from dfq.generators.psaq import PSAQ
from dfq.generators.spectrum import Spectrum
from dfq.generators.zeroq import ZeroQ
from dfq.hooks import tensors_in
from dfq.teacher import Teacher
from dfq.testing import TinyTransformer

PARTS = ZeroQ(iterations=4, statistics="dataset", step_size=5)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(generator, teacher, num_samples=12, amounts=None):
    told = [] if amounts is None else amounts
    return generator.sample(teacher, num_samples, batch_rng(0, 0), lambda amount, note="": told.append(amount))


def transformer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Teacher(TinyTransformer(), "classification", SPEC)


# ------------------------------------------------------------------------------------------------ statistics of a set


def test_moments_of_parts_are_those_of_all():
    """Of unequal parts, against NumPy on all of them; the gradient is that of the part that runs."""
    parts = [noise(n, 4, 3, 2, seed=n) * n for n in (5, 2, 3)]
    shared = SharedMoments([5, 2, 3])
    for shared.part, part in enumerate(parts):
        shared.of_all(0, part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0))
    shared.part = 1
    moved = (parts[1] + 1).requires_grad_()
    mean, variance = shared.of_all(0, moved.mean((0, 2, 3)), moved.var((0, 2, 3), correction=0))
    everything = torch.cat([parts[0], moved.detach(), parts[2]]).double().numpy()
    np.testing.assert_allclose(mean.detach(), everything.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance.detach(), everything.var((0, 2, 3)), rtol=1e-4)
    (found,) = torch.autograd.grad(mean.sum() + variance.sum(), moved)
    wanted = torch.cat([parts[0], moved.detach(), parts[2]]).requires_grad_()
    (wanted.mean((0, 2, 3)).sum() + wanted.var((0, 2, 3), correction=0).sum()).backward()
    torch.testing.assert_close(found, wanted.grad[5:7], rtol=1e-4, atol=1e-6)


def test_parts_that_have_not_run_do_not_count():
    shared = SharedMoments([2, 2])
    mean, variance = noise(3), noise(3, seed=1).square()
    for found, wanted in zip(shared.of_all(0, mean, variance), (mean, variance), strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_part_is_the_batch(make_teacher):
    teacher = make_teacher("residual")
    whole = sample(ZeroQ(iterations=3, class_weight=0.5), teacher)
    parts = sample(ZeroQ(iterations=3, class_weight=0.5, statistics="dataset", step_size=12), teacher)
    assert torch.equal(parts, whole)


def test_parts_match_together_what_none_of_them_matches_alone(make_teacher):
    """All images together are as close as a batch moved at once; parts of two of them are not."""
    teacher = make_teacher("residual")

    def distance(images):
        return np.mean(list(batch_norm_match(teacher, images).values()))

    images = sample(ZeroQ(iterations=25, statistics="dataset", step_size=2), teacher, 8)
    at_once = sample(ZeroQ(iterations=25), teacher, 8)
    start = sample(ZeroQ(iterations=1, learning_rate=1e-9), teacher, 8)
    assert distance(images) < 3 * distance(at_once) < 0.3 * distance(start)
    assert distance(images) < 0.5 * np.mean([distance(part) for part in images.split(2)])


@pytest.mark.parametrize("options", [{}, {"class_weight": 0.5, "min_confidence": 0.5, "keep_best": True, "slack": 0.5}])
def test_every_part_is_moved_as_often_and_its_bits_repeat(options, make_teacher):
    teacher, amounts = make_teacher("residual"), []
    first = sample(replace(PARTS, **options), teacher, amounts=amounts)
    assert first.shape == (12, 3, 8, 8) and first.isfinite().all()
    assert amounts == pytest.approx([5 / 4, 5 / 4, 2 / 4] * 4)
    assert torch.equal(sample(replace(PARTS, **options), teacher), first)


# ------------------------------------------------------------------------------------------------ smaller images first


def test_what_smaller_images_moved_by_is_added_to_the_start(make_teacher):
    teacher, start, seen = make_teacher("plain"), noise(2, 3, 8, 8), []
    moved = {4: noise(2, 3, 4, 4, seed=1), 8: noise(2, 3, 8, 8, seed=2)}

    def descend(images, first, last):
        seen.append((first, last, images.clone()))
        return images + moved[images.shape[-1]]

    found = coarse_to_fine(teacher, start.clone(), 0.5, 0.5, 11, descend)
    assert [(first, last) for first, last, _ in seen] == [(0, 5), (5, 11)]
    torch.testing.assert_close(seen[0][2], F.avg_pool2d(start, 2))
    larger = F.interpolate(moved[4], (8, 8), mode="bilinear")
    torch.testing.assert_close(found, start + larger + moved[8])


@pytest.mark.parametrize("generator", [ZeroQ(), DeepInversion(iterations=50), Spectrum(iterations=50)], ids=type)
def test_a_network_sees_smaller_images_first(generator, make_teacher):
    teacher, sizes, amounts = make_teacher("plain"), [], []
    generator = replace(generator, iterations=10, coarse_share=0.6, shift=3)
    handle = teacher.module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    images = sample(generator, teacher, amounts=amounts)
    handle.remove()
    assert sizes[-10:] == [4] * 6 + [8] * 4 and images.shape == (12, 3, 8, 8)
    assert sum(amounts) == pytest.approx(12) and torch.equal(sample(generator, teacher), images)


def test_smaller_images_first_come_as_close(make_teacher):
    teacher = make_teacher("plain")
    start, plain, coarse = (
        np.mean(list(batch_norm_match(teacher, sample(replace(ZeroQ(), **options), teacher, 32)).values()))
        for options in ({"iterations": 1, "learning_rate": 1e-9}, {}, {"coarse_share": 0.5})
    )
    assert coarse < 3 * plain and coarse < 0.2 * start


def test_a_network_that_takes_no_smaller_images(make_teacher):
    with pytest.raises(UserError) as error:
        sample(ZeroQ(coarse_share=0.5), make_teacher("mlp"))
    assert "does not take images of 4x4 pixels (RuntimeError: " in str(error.value)
    assert "set generator.coarse_share=0, or a larger generator.coarse_scale" in str(error.value)


def test_the_step_goes_on_along_one_cosine():
    pixels = torch.zeros(1, requires_grad=True)

    def rates(steps, **options):
        optimizer = torch.optim.SGD([pixels], lr=2.0)
        schedule, found = cosine(optimizer, 10, **options), []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    whole = rates(10)
    assert rates(4) + rates(6, first=4) == whole
    assert rates(20, turns=2) == [rate for rate in whole for _ in range(2)]


# ------------------------------------------------------------------------------------------------ early stop


@pytest.mark.parametrize(
    "losses, options, wanted",
    [
        ([8, 4, 2, 2, 2, 2, 2, 2], {"patience": 2, "tolerance": 0.1}, 6),  # means 6, 2, 2
        ([8, 4, 2, 2, 2, 2, 2, 2], {"patience": 0, "tolerance": 0.1}, 8),
        ([1, 1, 1, 1, 1, 1, 1, 0], {"patience": 2, "tolerance": 0.1, "settled": 3}, 7),  # means of steps 4 to 7
        ([-1, -1, -2, -2, -2, -2, -2, -2], {"patience": 2, "tolerance": 0.1}, 6),  # falling below zero
        ([9, 8, 7, 6, 5, 4, 3, 2], {"patience": 1, "tolerance": 0.0}, 8),
    ],
)
def test_it_stops_when_a_window_is_no_better_than_the_one_before(losses, options, wanted, make_teacher):
    pixels, shown = torch.zeros(2, 3, 8, 8, requires_grad=True), iter(losses)
    schedule = cosine(torch.optim.SGD([pixels], lr=0.1), len(losses))
    taken = optimize(
        make_teacher("plain"),
        None,
        lambda: pixels,
        [schedule],
        len(losses),
        lambda amount: None,
        penalty=lambda images, _outputs: next(shown) + 0 * images.sum(),
        **options,
    )
    assert taken == wanted


def test_fewer_steps_where_they_bring_little(make_teacher):
    teacher, amounts = make_teacher("plain"), []
    images = sample(ZeroQ(iterations=200, patience=10, tolerance=0.2), teacher, amounts=amounts)
    assert 20 <= len(amounts) < 150 and images.isfinite().all()
    again = []
    assert torch.equal(sample(ZeroQ(iterations=200, patience=10, tolerance=0.2), teacher, amounts=again), images)
    assert again == amounts


# ------------------------------------------------------------------------------------------------ no waiting


class Waits(TorchDispatchMode):
    """Counts what reads a number from a tensor on the host.

    But for what lies there on any device: optimizers' own step counters, and random numbers and constants that no
    network has seen.
    """

    def __init__(self):
        super().__init__()
        self.count, self.drawn = 0, {}  # id → tensor, kept so that no other gets the id

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(tensors_in([args, kwargs]))
        is_drawn = all(id(tensor) in self.drawn for tensor in given)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default) and not is_drawn:
            self.count += not any("optim" in Path(frame.filename).parts for frame in traceback.extract_stack())
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self.drawn.pop(id(tensor), None)
            if is_drawn:
                self.drawn[id(tensor)] = tensor
        return result


ALL = {
    "zeroq": ("plain", ZeroQ(flip=True, shift=1, class_weight=1.0, keep_best=True, min_confidence=0.5, slack=0.5)),
    "zeroq image": ("residual", ZeroQ(statistics="image", emphasis=1.0, stretch_weight=0.1, variation_weight=0.1)),
    "zeroq dataset": ("residual", replace(PARTS, difficulty=1.0, class_weight=1.0)),
    "genie": ("plain", Genie(num_channels=8)),
    "gdfq": ("plain", GDFQ(num_channels=8, train_batch_size=8, superposed=0.5)),
    "deep_inversion": ("plain", DeepInversion(shift=1, crop=0.3, jitter=0.2)),
    "spectrum": ("bare", Spectrum(shift=1)),
    "psaq": (None, PSAQ(shift=1)),
    "box_sampling": ("cells", BoxSampling(rounds=0)),  # labels are compared on the host, in so many of the steps
}


@pytest.mark.parametrize("name", ALL)
def test_no_step_waits_for_the_device(name):
    kind, generator = ALL[name]
    if kind == "cells":
        teacher = cell_teacher()
    else:
        teacher = as_teacher(NETS[kind]()) if kind else transformer()
    teacher.dataflow  # noqa: B018  # looked at once a network
    counts = []
    for iterations in (2, 5):
        with Waits() as waits:
            sample(replace(generator, iterations=iterations), teacher, 4)
        counts.append(waits.count)
    assert counts[0] == counts[1]


def test_similarities_of_patches_are_measured_in_float32():
    teacher, found = transformer(), {}
    for precision in ("float32", "bfloat16"):
        images = torch.randn(4, *teacher.input_spec.size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with negative_entropies(4) as entropies, arithmetic(images.device, precision):
            teacher.module(images.clone())
        found[precision] = torch.stack(entropies)
    assert found["bfloat16"].dtype == torch.float32 and len(found["bfloat16"]) == len(found["float32"]) > 0
    torch.testing.assert_close(found["bfloat16"], found["float32"], rtol=0.05, atol=0.05)
    assert not torch.equal(found["bfloat16"], found["float32"])
    images = [sample(PSAQ(iterations=2, precision=precision), teacher, 4) for precision in ("float32", "bfloat16")]
    assert torch.isfinite(images[1]).all() and not torch.equal(*images)


def test_waits_are_counted():
    computed = torch.ones(())
    with Waits() as waits:
        float(torch.ones(()))  # known without waiting
        float(loss := torch.ones(()).mul_(computed))
        bool(loss > 0)
    assert waits.count == 2


def test_patience_waits_once_in_so_many_steps(make_teacher):
    teacher, counts = make_teacher("plain"), []
    teacher.dataflow  # noqa: B018  # looked at once a network
    for options in ({}, {"patience": 5, "tolerance": 0.0}):
        with Waits() as waits:
            sample(ZeroQ(iterations=20, **options), teacher)
        counts.append(waits.count)
    assert counts[1] - counts[0] <= 4 and counts[1] > counts[0]


# ------------------------------------------------------------------------------------------------ compiling


def loss_of(images):
    return (images**2).sum() / 2


def test_a_step_that_does_not_compile_runs_as_it_is_and_says_so(make_teacher, monkeypatch, capsys):
    teacher, plain = make_teacher("plain"), ZeroQ(iterations=3)
    wanted = sample(plain, teacher)

    def broken(*_args, **_kwargs):
        raise OSError("no C++ compiler\nmore of it")

    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", broken)
    assert torch.equal(sample(replace(plain, compile=True), teacher), wanted)
    assert capsys.readouterr().err.splitlines() == ["generate: steps run uncompiled (OSError: no C++ compiler)"]


def test_a_program_that_computes_something_else_is_not_used(monkeypatch, capsys):
    import torch._inductor

    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: lambda x: (loss_of(x), 1.1 * x))
    assert compiled_step(loss_of, noise(2, 3, 4, 4)) is None
    assert "gradient off by 0.1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, generator",
    [
        ("residual", ZeroQ(class_weight=0.5, flip=True, shift=1)),
        ("plain", DeepInversion(shift=1)),
        (None, PSAQ(shift=1)),
        (None, DeepInversion()),
        ("plain", Spectrum(coarse_share=0.5)),
    ],
)
def test_recorded_operations_make_the_same_images(kind, generator, monkeypatch, capsys):
    """Hooks, modes and the backward pass are in what is recorded; the compiler itself is left out, being slow."""
    import torch._inductor

    recorded = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: recorded.append(graph) or graph)
    teacher = as_teacher(NETS[kind]()) if kind else transformer()
    generator = replace(generator, iterations=4)
    wanted = sample(generator, teacher, 4)
    found = sample(replace(generator, compile=True), teacher, 4)
    assert len(recorded) == (2 if generator.coarse_share else 1) and capsys.readouterr().err == ""
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_compiled_steps_make_the_same_images(make_teacher, capsys):
    teacher = make_teacher("residual")
    wanted, found = (sample(ZeroQ(iterations=4, compile=compile), teacher) for compile in (False, True))
    if "uncompiled" in capsys.readouterr().err:
        pytest.skip("no compiler here")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_auto_compiles_where_it_pays():
    wants = _optimization.wants_compiled
    assert [wants("auto", torch.device(kind)) for kind in ("cpu", "mps", "cuda")] == [False, False, True]
    assert wants(True, torch.device("cpu")) and not wants(False, torch.device("cuda"))


def test_what_changes_from_step_to_step_is_not_compiled(make_teacher):
    with pytest.raises(UserError, match=r"compile=true and generator\.statistics=dataset"):
        sample(replace(PARTS, compile=True), make_teacher("plain"))


def test_distances_of_parts_are_of_all_that_ran(make_teacher):
    """What two forwards leave is what one forward of both would give."""
    teacher, images = make_teacher("residual"), noise(6, 3, 8, 8)
    shared = SharedMoments([4, 2])
    with torch.no_grad(), batch_norm_distances(teacher, "dataset", shared=shared) as found:
        for shared.part, part in enumerate(images.split([4, 2])):
            found.clear()
            teacher(part)
    with torch.no_grad(), batch_norm_distances(teacher) as wanted:
        teacher(images)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-4, atol=1e-6)
