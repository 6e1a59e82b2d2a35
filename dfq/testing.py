"""Contract tests for methods of other packages: generators, quantizers, losses, algorithms, exporters.

    python -m dfq.testing their_package [their_package.generators.Mine ...]

finds the methods in a package (or takes those that are named), runs each against the contract of its family on tiny
networks, prints a line a check, and exits with status 1 if one fails. The same functions test the methods of dfq:
``check_generator(Mine(batch_size=8))`` and the others raise an AssertionError that says what is not as promised.

A method is a class that can be made without arguments: one derived from dfq's Generator or Algorithm; one with
``qparams`` (a quantizer); one with ``export`` and ``suffix`` (an exporter). A loss is a function, or a class with
``__call__``, whose name ends in ``loss`` in any case, of the outputs of student and teacher.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import pkgutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq import pipeline
from dfq.algorithms._base import Algorithm
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.generators._base import Generator, batch_rng
from dfq.generators.gaussian import Gaussian
from dfq.quantization import choose_qparams
from dfq.quantizers._observation import Histogram, Observation
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import build, locate, to_config
from dfq.student import Student
from dfq.teacher import InputSpec, Teacher, TokenSpec, hash_tensors

SCHEME = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8))
SPEC = InputSpec((3, 8, 8), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
GRIDS = [TensorScheme(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


# ------------------------------------------------------------------------------------------------ tiny networks


class TinyTransformer(nn.Module):
    """Patches and a class token, one block of attention, layer norms."""

    def __init__(self, width: int = 16, num_heads: int = 2):
        super().__init__()
        self.patches, self.num_heads = nn.Conv2d(3, width, 2, stride=2), num_heads
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj, self.head = (nn.Linear(width, n) for n in (3 * width, width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(self.norm2(x)[:, 0])


class _Language(nn.Module):
    """Each token says what comes next, from itself and the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hidden, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        return self.head(x + self.hidden(nn.functional.pad(x, (0, 0, 1, -1))).relu())


def tiny_network() -> nn.Sequential:
    """Two convolutions with batch norm and ReLU, one of each kind, and a classifier; random weights."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def tiny_teacher(kind: str = "batch norm", seed: int = 0) -> Teacher:
    """A network of a few hundred weights: ``batch norm``, ``attention`` (images [N, 3, 8, 8]) or ``tokens``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "tokens":
            return Teacher(_Language(), "language_modeling", TokenSpec(30, 12), name="tiny")
        if kind == "attention":
            return Teacher(TinyTransformer(), "classification", SPEC, name="tiny")
        module = tiny_network()
        norms = [m for m in module if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.3)
        with torch.no_grad():
            module(tiny_images(128))
        for norm in norms:
            norm.momentum = 0.1
        return Teacher(module, "classification", SPEC, name="tiny")


def tiny_images(num_samples: int, seed: int = 1) -> Tensor:
    """Smooth images [N, 3, 8, 8] with a mean: nothing like noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_samples, 3, 2, 2, generator=rng)
    return nn.functional.interpolate(coarse, (8, 8), mode="bilinear") * 1.5 + 0.7


# ------------------------------------------------------------------------------------------------ contracts


class Skipped(Exception):
    """A method that needs more than there is here."""


def _that(condition: Any, promise: str) -> None:
    if not condition:  # no assert: those are left out under python -O
        raise AssertionError(f"promised: {promise}")


def check_settings(method: Any) -> None:
    """What is recorded of a method makes it again, so that a result's settings can be compared."""
    config = to_config(method)
    again = build(config)
    _that(to_config(again) == config, f"a frozen dataclass that {config} makes again")
    _that(again == method, "methods with the same settings are equal (a dataclass)")


def check_generator(generator: Any, teacher: Teacher | None = None) -> None:
    """Right shapes, nothing left behind on the network or in global random numbers, batch i from (seed, i) alone.

    Args:
        teacher: a tiny network that has what the generator needs; None: one of :func:`tiny_teacher`.
    """
    _that(isinstance(generator, Generator), "a generator derives from dfq.generators._base.Generator")
    check_settings(generator)
    if generator.needs_boxes and teacher is None:
        raise Skipped("it needs a detector, of which there is no tiny one here")
    tokens = generator.kind == "token ids"
    if teacher is None:
        teacher = tiny_teacher("tokens" if tokens else "attention" if generator.needs_attention else "batch norm")
    module = teacher.module

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]

    def sample(seed: int = 0, index: int = 0, advance: Callable = lambda amount: None) -> Tensor:
        made = generator.sample(teacher, 4, batch_rng(seed, index), advance)
        return made["images"] if isinstance(made, dict) else made

    weights, modes, hooks_before = hash_tensors(module.state_dict()), [m.training for m in module.modules()], hooks()
    done: list[float] = []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images = sample(advance=done.append)
    _that(torch.equal(torch.get_rng_state(), state), "random numbers come from rng, not from torch's global ones")
    kind = torch.int64 if tokens else torch.float32
    size = (4, *teacher.input_spec.size)
    _that(images.shape == size and images.dtype == kind, f"samples {list(size)} of {kind}, got {list(images.shape)}")
    _that(not images.requires_grad and torch.isfinite(images).all(), "finite samples without gradients")
    _that(float(images.double().std()) > 0, "samples that are not all one value")
    rows = {tuple(row.flatten().tolist()) for row in images}
    _that(len(rows) == 4, "samples of a batch differ")
    _that(not done or math.isclose(sum(done), 4, rel_tol=1e-6), "advance is called with the number of samples, in all")
    torch.manual_seed(1)
    other = sample(index=1)
    _that(torch.equal(sample(), images), "the same (seed, index) gives the same bits, whatever was made before")
    _that(not torch.equal(other, images), "another index gives other samples")
    _that(not torch.equal(sample(seed=1), images), "another seed gives other samples")
    _that(hash_tensors(module.state_dict()) == weights, "the network's weights and statistics stay as they are")
    _that([m.training for m in module.modules()] == modes, "the network's modes are restored")
    _that(hooks() == hooks_before, "no hook is left on the network")
    _that(not any(p.requires_grad or p.grad is not None for p in module.parameters()), "its parameters get no gradient")
    small = replace(generator, batch_size=4)
    with _work() as folder:
        whole = pipeline.generate(teacher, small, 10, 3, folder / "whole")
        part = pipeline.generate(teacher, small, 5, 3, folder / "part")
        _that(len(part) == 5 and len(whole) == 10, "a dataset as large as it was asked for")
        _that(torch.equal(part.samples(), whole.samples(5)), "a smaller dataset is the beginning of a larger one")
        grown = pipeline.generate(teacher, small, 10, 3, folder / "part")
        _that(grown.sha256 == whole.sha256, "a dataset that is made in two calls has the bits of one made in one")


def check_quantizer(quantizer: Any, grids: Sequence[TensorScheme] = GRIDS) -> None:
    """Finite scales and zero points within the grid, one a channel, that follow the scale of the values."""
    check_settings(quantizer)
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1.0], [50.0], [0.0]]
    )
    for scheme in grids:
        label = f"with {scheme.label} bits, {'symmetric' if scheme.symmetric else 'asymmetric'}"
        observation = Observation.of_tensor(rows, 0)
        before = observation.values.clone()
        scale, zero_point = quantizer.qparams(observation, scheme)
        _that(torch.equal(observation.values, before), f"what is observed stays as it is {label}")
        _that(scale.shape == zero_point.shape == (4,), f"one scale and one zero point a channel {label}")
        _that(scale.dtype == torch.float32 and torch.isfinite(scale).all(), f"finite float32 scales {label}")
        _that((scale >= torch.finfo(torch.float32).tiny).all(), f"scales above zero, of zeros too {label}")
        if not scheme.has_float_zero_point:
            inside = (zero_point >= scheme.quant_min) & (zero_point <= scheme.quant_max)
            _that(zero_point.dtype == torch.int32 and inside.all(), f"int32 zero points within the grid {label}")
        else:
            _that(zero_point.dtype == torch.float32, f"float32 zero points {label}")
        if scheme.symmetric:
            _that((zero_point == 0).all(), f"zero points of zero {label}")
        larger, same = quantizer.qparams(Observation.of_tensor(rows[1:2] * 64, 0), scheme)
        alone, _ = quantizer.qparams(Observation.of_tensor(rows[1:2], 0), scheme)
        _that(torch.allclose(larger, scale[1:2] * 64, rtol=1e-4), f"64 times the values, 64 times the scale {label}")
        _that(torch.allclose(same.float(), zero_point[1:2].float(), atol=1e-6), f"and the same zero point {label}")
        _that(torch.allclose(alone, scale[1:2]), f"a channel's range does not depend on its neighbours' {label}")
        widest = choose_qparams(rows.amin(1), rows.amax(1), scheme)[0]
        # A symmetric grid of 2 bits has one level on one side; other grids reach no further than their last value.
        room = 1.0001 if scheme.grid != "uniform" else 2.01 if scheme.num_bits == 2 else 1.2
        _that((scale[:3] <= widest[:3] * room).all(), f"no wider than all that was seen {label}")
    histogram = Histogram()
    histogram.add(torch.randn(4000, generator=torch.Generator().manual_seed(0)).relu())
    _, zero_point = quantizer.qparams(histogram.observation(), TensorScheme(4))
    _that(zero_point.tolist() == [0], "a grid from zero for what is never negative")


def check_loss(loss: Callable[[Any, Any], Tensor]) -> None:
    """A finite scalar, least where the outputs are equal, with a gradient for the student."""
    rng = torch.Generator().manual_seed(0)
    output, target = torch.randn(6, 10, generator=rng), torch.randn(6, 10, generator=rng)
    mine, theirs = output.clone().requires_grad_(), target.clone()
    value = loss(mine, theirs)
    _that(value.shape == () and torch.isfinite(value), "a finite scalar")
    value.backward()
    _that(mine.grad is not None and torch.isfinite(mine.grad).all() and mine.grad.abs().sum() > 0, "a finite gradient")
    _that(torch.equal(mine.detach(), output) and torch.equal(theirs, target), "its inputs stay as they are")
    _that(float(loss(target, target)) <= float(value.detach()), "equal outputs cost no more than others")
    _that(torch.equal(loss(output, target), value.detach()), "the same value for the same outputs")


def check_algorithm(algorithm: Any, teacher: Teacher | None = None, quantizer: Any = None) -> None:
    """The same bits twice, saved and loaded without a difference, close to a teacher that stays as it was.

    Args:
        teacher: a tiny network; None: one of :func:`tiny_teacher`.
        quantizer: of weights and activations; None: min_max.
    """
    _that(isinstance(algorithm, Algorithm), "an algorithm derives from dfq.algorithms._base.Algorithm")
    check_settings(algorithm)
    if teacher is None:
        teacher = tiny_teacher("tokens" if getattr(algorithm, "kind", "images") == "token ids" else "batch norm")
    quantizer = MinMax() if quantizer is None else quantizer
    with _work() as folder:
        dataset = _tiny_dataset(teacher, folder)
        weights = hash_tensors(teacher.module.state_dict())
        made = [
            pipeline.quantize(teacher, dataset, SCHEME, algorithm, quantizer, quantizer, 0, folder / str(i))
            for i in range(2)
        ]
        (student, path), (again, _) = made
        x = dataset.samples(16)
        with torch.no_grad():
            outputs, wanted = student(x), teacher(x)
            _that(torch.isfinite(outputs).all(), "finite outputs")
            _that(torch.equal(again(x), outputs), "the same seed, the same bits")
            _that(torch.equal(Student.load(path, teacher)(x), outputs), "the outputs of the saved student are its own")
        error = float((outputs - wanted).square().sum() / wanted.square().sum())
        _that(error < 0.1, f"4-bit weights stay near a tiny network's outputs (relative squared error {error:.3f})")
        _that(hash_tensors(teacher.module.state_dict()) == weights, "the teacher stays as it is")
        _that(not teacher.module.training, "the teacher stays in evaluation mode")
        _that(not any(p.requires_grad for p in student.module.parameters()), "a student that is not trained any more")
        files = sorted(file.name for file in path.iterdir())
        _that(files == ["student.json", "student.safetensors"], f"no file beside the student's, got {files}")
        for layer in student.layers.values():
            for part in (layer.input_quantizer, layer.weight_quantizer):
                _that(part.enabled and (part.scale > 0).all(), "quantizers that are on, with scales above zero")


def check_exporter(exporter: Any, teacher: Teacher | None = None) -> None:
    """A file and a description of it; the student stays as it is; ONNX files compute what it does.

    Args:
        teacher: a tiny network; None: one of :func:`tiny_teacher`.
    """
    check_settings(exporter)
    _that(isinstance(exporter.suffix, str) and exporter.suffix.startswith("."), "a suffix such as .onnx")
    if getattr(exporter, "kind", "images") == "token ids":
        raise Skipped("it is for networks of transformers, of which there is no tiny one here")
    teacher = tiny_teacher() if teacher is None else teacher
    with _work() as folder:
        dataset = _tiny_dataset(teacher, folder)
        student = Student.from_teacher(teacher, SCHEME)
        _calibrated(student, dataset)
        state, path = hash_tensors(student.module.state_dict()), folder / f"artifact{exporter.suffix}"
        found = pipeline.export(student, exporter, path, teacher, dataset)
        _that(path.exists() and path.stat().st_size > 0, "a file at the path that was asked for")
        missing = {"path", "format", "size_bytes", "parity", "latency_ms"} - found.keys()
        _that(not missing, f"a description with {', '.join(sorted(missing))}")
        _that(found["path"] == str(path), "a description with the file's path")
        _that(hash_tensors(student.module.state_dict()) == state, "the student stays as it is")
        if exporter.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is not None:
            _check_in_runtime(path, student, dataset.samples(16))


def _check_in_runtime(path: Path, student: Student, x: Tensor) -> None:
    """An ONNX file's first output is the student's, for batches of any size."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (x, x[:1]):
        outputs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])
        with torch.no_grad():
            wanted = student(batch).cpu()
        # A value beside a midpoint may round to the other code in the runtime: close, not equal.
        error = float((outputs - wanted).abs().mean() / wanted.abs().mean())
        _that(error < 0.02, f"the student's outputs in onnxruntime for {len(batch)} samples (off by {error:.3f})")


def _calibrated(student: Student, dataset: SyntheticDataset) -> None:
    from dfq.calibration import calibrate

    calibrate(student, dataset.samples(16), MinMax(), MinMax())
    student.freeze()


def _tiny_dataset(teacher: Teacher, folder: Path) -> SyntheticDataset:
    if isinstance(teacher.input_spec, TokenSpec):
        from dfq.generators.random_tokens import RandomTokens

        return pipeline.generate(teacher, RandomTokens(batch_size=16), 40, 0, folder / "dataset")
    return pipeline.generate(teacher, Gaussian(batch_size=16), 40, 0, folder / "dataset")


class _work:
    """A folder that is gone afterwards."""

    def __enter__(self) -> Path:
        self.folder = tempfile.TemporaryDirectory()
        return Path(self.folder.name)

    def __exit__(self, *_: Any) -> None:
        self.folder.cleanup()


# ------------------------------------------------------------------------------------------------ finding and running

CHECKS: dict[str, Callable[..., None]] = {
    "generator": check_generator,
    "quantizer": check_quantizer,
    "loss": check_loss,
    "algorithm": check_algorithm,
    "exporter": check_exporter,
}


def family_of(found: Any) -> str | None:
    """The family that a class or function is a method of."""
    if inspect.isfunction(found):
        return "loss" if found.__name__.lower().endswith("loss") else None
    if not inspect.isclass(found):
        return None
    for base, family in ((Generator, "generator"), (Algorithm, "algorithm")):
        if issubclass(found, base):
            return family if found is not base else None
    if callable(getattr(found, "qparams", None)):
        return "quantizer"
    if callable(getattr(found, "export", None)) and hasattr(found, "suffix"):
        return "exporter"
    return "loss" if found.__name__.lower().endswith("loss") and "__call__" in vars(found) else None


def methods_of(name: str) -> Iterator[tuple[str, str, Any]]:
    """(name, family, class or function) of every method in a package, or of the one that is named."""
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise UserError(f"got {name}", "a package that can be imported", f"importing it says: {error}") from error
        found = locate(name)
        family = family_of(found)
        if family is None:
            raise UserError(f"got {name}, which is no method", " | ".join(CHECKS)) from None
        yield name, family, found
        return
    modules = [package]
    for info in pkgutil.walk_packages(getattr(package, "__path__", []), f"{name}."):
        if info.name.endswith(".__main__"):  # runs what the package is for
            continue
        modules.append(importlib.import_module(info.name))
    for module in modules:
        for key, value in sorted(vars(module).items()):
            own = getattr(value, "__module__", None) == module.__name__ and not key.startswith("_")
            if own and (family := family_of(value)) is not None:
                yield f"{module.__name__}.{key}", family, value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the contract tests of packages or methods; the exit status: 0, 1 if a check fails, 2 for a mistake."""
    names = list(sys.argv[1:] if arguments is None else arguments)
    if not names or names[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if names else 2
    sys.path.insert(0, "")  # what lies in this folder, as python -m does
    failed = skipped = total = 0
    try:
        found = [method for name in names for method in methods_of(name)]
    except UserError as error:
        print(f"dfq.testing: {error}", file=sys.stderr)
        return 2
    for name, family, kind in found:
        total += 1
        try:
            method = kind if inspect.isfunction(kind) else kind()
            CHECKS[family](method)
            print(f"passed   {family:9} {name}")
        except Skipped as error:
            skipped += 1
            print(f"skipped  {family:9} {name}: {error}")
        except Exception as error:  # whatever somebody else's method raises is the result
            failed += 1
            shown = str(error) or traceback.format_exc(limit=-1).strip().splitlines()[-1]
            shown = shown if isinstance(error, AssertionError) else f"{type(error).__name__} {shown}"
            print(f"FAILED   {family:9} {name}: {shown}")
    if not total:
        print(
            f"dfq.testing: got {', '.join(names)}, without a method in it; allowed: {' | '.join(CHECKS)}",
            file=sys.stderr,
        )
        return 2
    left = f", {skipped} skipped" if skipped else ""
    print(f"{total - failed - skipped} of {total} methods keep their contracts{left}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
