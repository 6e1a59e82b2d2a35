"""Seconds per synthetic image: every generator, a loop in the style of the references, and the arithmetic floor.

    python benchmarks/generation.py                             torchvision's ResNet-18 with random weights, 32 px
    python benchmarks/generation.py --kit DIR --network resnet20 --size 32 --batch 128
    python benchmarks/generation.py --mct install               and the data generation of model-compression-toolkit,
                                                                installed for it in an environment that is thrown away
    python benchmarks/generation.py --mct ENV/bin/python        the same in an environment that has it
    python benchmarks/generation.py --mode step --size 224 --batch 32     what share of the matrix peak one step reaches
    python benchmarks/generation.py --mode step --size 224 --batch 32 --precision float32,bfloat16   the same in both
    python benchmarks/generation.py --mode profile --size 224 --batch 32  where the time of one step goes
    python benchmarks/generation.py --mode cost                 seconds and peak memory over samples and pixels
    python benchmarks/generation.py --mode cost --kit DIR --network fastestdet --generators box_sampling \\
        --iterations 8 --sizes 160,352,640 --counts 8 --batch 4     a detector; a tenth of the steps

All contenders run in turns in one process, so that a busy machine slows all of them down. A run of 1 + STEPS steps and
one of 1 step tell what a step costs and what comes once a batch; ``s / image`` is both at the row's own iterations.
gdfq trains once for all ``--samples``. The reference loop is what ZeroQ's release does, written anew: hooks, squared
norms of each image's statistics, parameters that require gradients, contiguous layout, the loss on the host in every
step for the plateau schedule, 500 iterations. The floor is the multiply-accumulates of one forward and one gradient to
the input, counted, over the peak of a large matrix product measured in the same rounds; ``of peak`` is what a step
reaches of it (of the product in float32, whatever ``--precision``). It counts what the teacher needs: a generator that
trains a network of its own does more.

``--mode cost`` measures batches of ``--batch`` or, with ``--batch auto``, as large as ``memory_bytes`` allow: then the
peak is compared with that bound. ``--mode profile`` sorts the operations of one step by what they are for; with a
profiler on, a step takes longer than without.

Random weights make no good images, but cost what trained ones cost. What images are worth is another question:
``benchmarks/accuracy.py``. In ``--mode cost`` generators take ``--iterations`` steps, and those with two stages as many
of the second as go with them; "all its steps" is a batch without what comes once a dataset, multiplied.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils.flop_counter import FlopCounterMode

import dfq
from dfq.errors import UserError
from dfq.generators._base import Generator, batch_rng
from dfq.generators.box_sampling import low_size
from dfq.hooks import forward_hooks
from dfq.settings import choices, resolve
from dfq.teacher import Teacher

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples import digits_scenes, fastestdet

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
KIT = {"resnet20": 32, "fdmobilenet": 224, "fastestdet": 352}  # size of the images that they were trained on
DETECTORS = ("fastestdet", "retinanet")
STEPS = ("iterations", "final_iterations")  # what generators call how many steps they take
REFERENCE = "reference loop"
AUTO = "auto"
LARGEST_MATRIX, LONGEST_PRODUCT = 4096, 3.0  # places of a side, seconds
MCT = """
import json, sys, time
import model_compression_toolkit as mct, torch
clock = {"wall": time.perf_counter, "cpu": time.process_time}[sys.argv[5]]
network = torch.load(sys.argv[1], weights_only=False).eval()
size, batch, iterations = map(int, sys.argv[2:5])
config = mct.data_generation.get_pytorch_data_generation_config(n_iter=iterations, data_gen_batch_size=batch)
start = clock()
mct.data_generation.pytorch_data_generation_experimental(
    model=network, n_images=batch, output_image_size=size, data_generation_config=config)
print(json.dumps(clock() - start))
"""


@dataclass(frozen=True)
class Contender:
    """``run(n)`` makes ``images`` images in ``n`` steps; the recipe takes ``iterations``."""

    run: Callable[[int], object]
    iterations: int
    images: int
    note: str = ""


@dataclass(frozen=True)
class Row:
    step: float  # seconds a step
    once: float  # seconds a batch beside the steps
    per_image: float  # at the recipe's iterations


# ------------------------------------------------------------------------------------------------ networks


def build(name: str, size: int | None, kit: Path | None, device: str) -> Teacher:
    """Digits as they ship, ResNet-18 or a small RetinaNet with random weights, or a network of the kit."""
    if name == "digits":
        return dfq.load_teacher("digits", device=device)
    if name == "resnet18":
        return _teacher(settled(torchvision.models.resnet18, size or 32), size or 32, device)
    if name == "retinanet":
        return _teacher(settled(digits_scenes.retinanet, size or 64, False), size or 64, device, True)
    if name not in KIT:
        raise UserError(f"got --network {name}", f"digits | resnet18 | retinanet | {' | '.join(KIT)}")
    if kit is None or not (kit / f"{name}.py").exists():
        raise UserError(f"got --network {name} and --kit {kit}", f"a folder with {name}.py", "give --kit DIR")
    sys.path.insert(0, str(kit.resolve()))
    sys.dont_write_bytecode = True
    return _teacher(__import__(name).load(), size or KIT[name], device, name in DETECTORS)


def settled(make: Callable[[], nn.Module], size: int, forward: bool = True) -> nn.Module:
    """A network with random weights whose batch norms remember noise, one of its own for every channel.

    Args:
        forward: it can be called in training mode on images alone.
    """
    torch.manual_seed(0)
    network = make()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.3)
        for _ in range(10 * forward):
            network.train()(torch.randn(8, 3, min(size, 64), min(size, 64)))
    return network.eval()


def _teacher(network: nn.Module, size: int, device: str, finds_boxes: bool = False) -> Teacher:
    settings: dict[str, Any] = dict(IMAGENET)
    if finds_boxes:
        settings["task"] = "detection"
    if type(network).__name__ == "FastestDet":
        settings |= {"adapter": fastestdet.Adapter, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return dfq.load_teacher(network, input_size=(3, size, size), device=device, **settings)


# ------------------------------------------------------------------------------------------------ contenders


def reference_loop(teacher: Teacher, batch: int, iterations: int) -> torch.Tensor:
    """ZeroQ as published (eq. 1, 500 iterations of Adam), in the plain way that research code is written."""
    network = teacher.module
    found: list[tuple[torch.Tensor, torch.Tensor, nn.Module]] = []

    def measure(_name: str, norm: nn.Module, inputs: tuple) -> None:
        x = inputs[0].flatten(2) if inputs[0].dim() > 2 else inputs[0][..., None]
        found.append((x.mean(2), (x.var(2, correction=min(1, x.shape[2] - 1)) + 1e-6).sqrt(), norm))

    network.requires_grad_(True)
    try:
        images = torch.randn(batch, *teacher.input_spec.size, generator=batch_rng(0, 0)).to(teacher.device)
        images.requires_grad_()
        optimizer = torch.optim.Adam([images], lr=0.5)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100, min_lr=1e-4)
        with forward_hooks(teacher.batch_norms.items(), before=measure):
            for _ in range(iterations):
                found.clear()
                optimizer.zero_grad()
                network.zero_grad()
                network(images.clone())
                loss = images.mean((2, 3)).square().sum() / batch
                loss = loss + (images.std((2, 3)) - 1).square().sum() / batch
                for mean, std, norm in found:
                    wanted = (norm.running_var + 1e-6).sqrt()
                    loss = loss + ((mean - norm.running_mean).square().sum() + (std - wanted).square().sum()) / batch
                loss.backward()
                optimizer.step()
                plateau.step(loss.item())
    finally:
        network.requires_grad_(False)
        network.zero_grad(set_to_none=True)
    return images.detach()


def contender(
    teacher: Teacher, name: str, batch: int, samples: int, iterations: int | None, precision: str = "float32"
) -> Contender:
    """The generator with its yaml's settings (``iterations`` if given, ``precision`` if it has one)."""
    generator = resolve("generator", name)
    known = {field.name for field in dataclasses.fields(generator)}
    if "precision" in known:
        generator = dataclasses.replace(generator, precision=precision)
    trains = "train_batch_size" in known
    own = (iterations or generator.iterations) if "iterations" in known else 0

    def run(steps: int) -> None:
        chosen: Generator = dataclasses.replace(generator, iterations=steps) if own else generator
        chosen.sample(teacher, batch, batch_rng(0, 0), lambda amount, note="": None)

    note = f"trained once for {samples} images" if trains else ""
    return Contender(run, own, samples if trains else batch, note)


def install_mct(folder: Path) -> str:
    """An interpreter that has model-compression-toolkit and, behind it, what this one has (PyTorch).

    Raises:
        OSError: it does not install; the message is the installer's last line.
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (inside / "outer.pth").write_text(sysconfig.get_path("purelib"))
    words = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "model-compression-toolkit"]
    made = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if made.returncode:
        raise OSError(f"it does not install: {(made.stderr.strip().splitlines() or ['no message'])[-1]}")
    return str(python)


def mct_contender(python: str, teacher: Teacher, batch: int, clock: str, folder: Path) -> Contender | str:
    """model-compression-toolkit's generator, in its own interpreter; or a line that says why there is none.

    Args:
        python: the interpreter; ``install``: one that is made in ``folder``.
    """
    path = folder / "network.pt"
    torch.save(teacher.module, path)

    def run(steps: int) -> float:
        words = [python, "-c", MCT, path, teacher.input_spec.size[-1], batch, steps, clock]
        paths = os.pathsep.join(entry for entry in sys.path if entry and "site-packages" not in entry)
        made = subprocess.run(
            [*map(str, words)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
        )
        if made.returncode:
            raise OSError((made.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(made.stdout.strip().splitlines()[-1])

    try:
        if python == "install":
            python = install_mct(folder / "environment")
        run(1)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"no row of model-compression-toolkit: {python} says: {error}"
    return Contender(run, 500, batch, "in its own process")


# ------------------------------------------------------------------------------------------------ measuring


class Clock:
    """Seconds of work on the device: of the wall, or (on a busy machine) of this process over its threads."""

    def __init__(self, kind: str, device: torch.device):
        self.kind, self.device = kind, device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() if self.kind == "wall" else time.process_time() / torch.get_num_threads()

    def time(self, work: Callable[[], object]) -> float:
        """What ``work`` takes; if it gives a number, it has measured itself (another process)."""
        start = self()
        result = work()
        return result if isinstance(result, float) else self() - start


def product(clock: Clock) -> Callable[[], float]:
    """A function that measures the FLOP/s of an fp32 matrix product: 4096^3, or what takes less than a second or so."""

    def of(size: int) -> Callable[[], float]:
        a, b = (torch.randn(size, size, device=clock.device) for _ in range(2))
        out = a @ b
        return lambda: 2 * size**3 / clock.time(lambda: torch.mm(a, b, out=out))

    size = min(512, LARGEST_MATRIX)
    while size < LARGEST_MATRIX and 2 * (2 * size) ** 3 / of(size)() < LONGEST_PRODUCT:
        size *= 2
    return of(size)


def count_flops(teacher: Teacher, batch: int) -> int:
    """Of one forward and one gradient to the images; a multiply-accumulate is two."""
    images = teacher.input_spec.example(batch, batch_rng(0, 0)).to(teacher.device).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        outputs = teacher(images)
        first = outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))
        first.sum().backward()
    return counter.get_total_flops()


def measure(contenders: dict[str, Contender], clock: Clock, steps: int, rounds: int) -> tuple[dict[str, Row], float]:
    """(name → median over rounds, the best FLOP/s of a matrix product), everything in turns."""
    multiply = product(clock)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    peaks = []
    for each in contenders.values():  # what is done once a process: kernels chosen, memory taken
        each.run(1)
    for _ in range(rounds):
        peaks += [multiply() for _ in range(2)]
        for name, each in contenders.items():
            few, many = (clock.time(lambda n=n, run=each.run: run(n)) for n in (1, 1 + steps))
            times[name].append((few, many))
    rows = {}
    for name, each in contenders.items():
        step = statistics.median((many - few) / steps for few, many in times[name]) if each.iterations else 0.0
        once = statistics.median(few for few, _ in times[name]) - step
        rows[name] = Row(step, once, (once + step * each.iterations) / each.images)
    return rows, max(peaks)


def table(teacher: Teacher, options: argparse.Namespace, clock: Clock) -> None:
    names = options.generators.split(",") if options.generators else choices("generator")
    contenders = {REFERENCE: Contender(lambda n: reference_loop(teacher, options.batch, n), 500, options.batch)}
    if not teacher.batch_norms:
        contenders.clear()
    notes = []
    for name in names:
        try:
            one = contender(teacher, name, options.batch, options.samples, options.iterations)
            one.run(1)
            contenders[name] = one
        except UserError as error:
            notes.append(f"no row of {name}: {error.args[0]}")
    with tempfile.TemporaryDirectory() as scratch:
        if options.mct:
            found = mct_contender(options.mct, teacher, options.batch, options.clock, Path(scratch))
            if isinstance(found, str):
                notes.append(found)
            else:
                contenders["model-compression-toolkit"] = found
        else:
            notes.append("no row of model-compression-toolkit: give --mct install, or PYTHON that has it")
        rows, peak = measure(contenders, clock, options.steps, options.rounds)
    floor = count_flops(teacher, options.batch) / peak
    print(_heading(teacher, options, peak))
    print("| | iterations | ms a step | of peak | s / image | floor, s / image | reference loop / this |")
    print("|---|---|---|---|---|---|---|")
    for name, each in contenders.items():
        row = rows[name]
        share = f"{100 * floor / row.step:.0f} %" if row.step > 0 and each.images == options.batch else ""
        least = f"{floor * each.iterations / options.batch:.4f}" if share else ""
        ratio = f"{rows[REFERENCE].per_image / row.per_image:.1f}" if REFERENCE in rows and row.per_image > 0 else ""
        label = f"{name} ({each.note})" if each.note else name
        cells = (label, each.iterations, f"{1000 * row.step:.1f}", share, f"{row.per_image:.4f}", least, ratio)
        print(f"| {' | '.join(map(str, cells))} |")
    for note in notes:
        print(note)


def one_step(teacher: Teacher, options: argparse.Namespace, clock: Clock) -> None:
    """What share of the matrix peak a step of each generator reaches, beside the bare network and the reference."""

    def bare(steps: int) -> None:
        images = teacher.input_spec.example(options.batch, batch_rng(0, 0)).to(teacher.device)
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        for _ in range(steps):
            images.grad = None
            outputs = teacher(images)
            (outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))).sum().backward()

    contenders = {"forward and gradient alone": Contender(bare, 1, options.batch)}
    if teacher.batch_norms:
        contenders[REFERENCE] = Contender(lambda n: reference_loop(teacher, options.batch, n), 1, options.batch)
    for name in (options.generators or "zeroq").split(","):
        for precision in options.precision.split(","):
            label = name if precision == "float32" else f"{name}, {precision}"
            contenders[label] = contender(teacher, name, options.batch, options.samples, 1, precision)
    rows, peak = measure(contenders, clock, options.steps, options.rounds)
    flops = count_flops(teacher, options.batch)
    print(_heading(teacher, options, peak))
    print(f"needed: {flops / 1e9:.1f} GFLOP a step, {flops / peak:.3f} s at the peak\n")
    print("| | s a step | of peak |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.step:.3f} | {100 * flops / peak / row.step:.0f} % |")


def _heading(teacher: Teacher, options: argparse.Namespace, peak: float) -> str:
    size = "x".join(map(str, teacher.input_spec.size))
    threads = f"{torch.get_num_threads()} threads" if teacher.device.type == "cpu" else torch.cuda.get_device_name()
    return (
        f"\n{teacher.name} {size}, batch {options.batch}, {threads}, {options.clock} seconds, median of "
        f"{options.rounds} rounds of {options.steps} steps; matrix peak {peak / 1e9:.1f} GFLOP/s\n"
    )


# ------------------------------------------------------------------------------------------------ profile

KINDS = {  # what an operation is for, by what its name has in it; the first that fits
    "convolution, backward": ("convolution_backward",),
    "convolution, forward": ("convolution", "conv2d"),
    "matrix product": ("mm", "matmul", "linear"),
    "statistics": ("mean", "var", "square", "sub_", "addcmul", "sub"),
    "batch norm": ("batch_norm",),
    "activation": ("relu", "threshold", "hardtanh", "silu", "gelu"),
    "pooling": ("pool",),
    "copies": ("copy_", "clone", "contiguous", "to_copy"),
}


def kind_of(operation: str) -> str:
    """The kind of an operation such as ``aten::convolution_backward``."""
    name = operation.removeprefix("aten::")
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(teacher: Teacher, options: argparse.Namespace, clock: Clock) -> None:
    """Where the time of one step of a generator goes: the time of each operation itself, by kind."""
    name = (options.generators or "zeroq").split(",")[0]
    one = contender(teacher, name, options.batch, options.samples, options.iterations)
    with torch_profile(activities=[ProfilerActivity.CPU]):  # the profiler's own first start
        one.run(1)
    kinds: dict[str, list[float]] = {}
    for steps, sign in ((1, -1.0), (1 + options.steps, 1.0)):  # what comes once a batch falls out
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if teacher.device.type == "cuda" else [])]
        with torch_profile(activities=activities) as found:
            one.run(steps)
        for entry in found.key_averages():
            spent = entry.self_device_time_total if teacher.device.type == "cuda" else entry.self_cpu_time_total
            row = kinds.setdefault(kind_of(entry.key), [0.0, 0.0])
            row[0] += sign * spent / 1000 / options.steps
            row[1] += sign * entry.count / options.steps
    kinds = {kind: [max(0.0, spent), count] for kind, (spent, count) in kinds.items()}  # a difference of two runs
    total = sum(spent for spent, _ in kinds.values())
    peak = max(product(clock)() for _ in range(2))
    print(_heading(teacher, options, peak))
    print(f"{name}: {total:.1f} ms a step with the profiler on\n")
    print("| | ms a step | share | operations a step |\n|---|---|---|---|")
    for kind, (spent, count) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        print(f"| {kind} | {spent:.2f} | {100 * spent / total:.0f} % | {count:.0f} |")


# ------------------------------------------------------------------------------------------------ cost


def cost(options: argparse.Namespace) -> None:
    """Seconds and memory of whole datasets, each in a process of its own (peak memory never falls)."""
    name = (options.generators or "zeroq").split(",")[0]
    print(f"\n{options.network}, {name}, {options.iterations or 2} iterations, batch {options.batch}\n")
    bound = resolve("generator", name).memory_bytes
    if options.batch == AUTO:
        print(f"memory_bytes {bound / 2**20:.0f} MiB\n")
    print(
        "| pixels | samples | batch | s | s / image | us / image and pixel | of the floor | all its steps, s / image "
        "| peak memory above the network's, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size in map(int, options.sizes.split(",")):
        for samples in map(int, options.counts.split(",")):
            words = ["--mode", "worker", "--network", options.network, "--generators", name, "--size", str(size)]
            words += ["--samples", str(samples), "--batch", str(options.batch), "--clock", options.clock]
            words += ["--iterations", str(options.iterations or 2), "--device", options.device]
            words += ["--kit", str(options.kit)] if options.kit else []
            made = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(made.stdout.strip().splitlines()[-1])
            each = found["seconds"] / samples
            print(
                f"| {size} | {samples} | {found['batch']} | {found['seconds']:.1f} | {each:.4f} "
                f"| {1e6 * each / size**2:.3f} | {100 * found['floor'] / found['steps']:.0f} % "
                f"| {found['steps'] / found['share']:.3f} "
                f"| {found['bytes'] / 2**20:.0f} |"
            )


def worker(options: argparse.Namespace) -> None:
    teacher = build(options.network, options.size, options.kit, options.device)
    clock = Clock(options.clock, teacher.device)
    generator = options.generators
    own = {name: getattr(resolve("generator", generator), name, 0) for name in STEPS}
    share = options.iterations / own["iterations"] if own["iterations"] else 1.0
    settings = {name: max(1, round(steps * share)) for name, steps in own.items() if steps}
    with tempfile.TemporaryDirectory() as folder:
        dfq.generate(teacher, generator, 2, Path(folder) / "warm", batch_size=2, **settings)
        before, start = peak_bytes(teacher.device), clock()
        path = Path(folder) / "data"
        dataset = dfq.generate(teacher, generator, options.samples, path, batch_size=options.batch, **settings)
        seconds, batch = clock() - start, dataset.manifest["settings"]["batch_size"]
        memory = peak_bytes(teacher.device) - before
    made: Generator = dataclasses.replace(resolve("generator", generator), **settings)
    sampler = made.prepare(teacher, batch_rng(0, 0))
    work = clock.time(lambda: sampler.sample(teacher, batch, batch_rng(0, 0), lambda amount, note="": None))
    multiply = product(clock)
    floor = floor_flops(teacher, generator, settings) / max(multiply() for _ in range(3))
    found = {"seconds": seconds, "bytes": memory, "batch": batch, "floor": floor, "share": share}
    print(json.dumps({**found, "steps": work / batch}))


def floor_flops(teacher: Teacher, generator: str, steps: Mapping[str, int]) -> float:
    """Of one image: a forward and a gradient to it in every step, at the size that the step is taken at."""
    total = 0.0
    for name, count in steps.items():
        size = teacher.input_spec.size
        if name == "iterations" and "final_iterations" in steps:
            size = (size[0], *low_size(teacher, teacher.input_spec, resolve("generator", generator).resolution))
        shown = dataclasses.replace(teacher.input_spec, size=size)
        total += count * count_flops(dataclasses.replace(teacher, input_spec=shown), 1)
    return total


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ command line


def _batch(word: str) -> int | str:
    return word if word == AUTO else int(word)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("table", "step", "profile", "cost", "worker"), default="table")
    parser.add_argument(
        "--network", default="resnet18", help=f"digits, resnet18, retinanet, {', '.join(KIT)} (with --kit)"
    )
    parser.add_argument("--kit", type=Path, help="folder with resnet20.py, fdmobilenet.py, fastestdet.py")
    parser.add_argument("--mct", help="install, or an interpreter that has model-compression-toolkit")
    parser.add_argument("--generators", help="names with commas; by default all (step, cost: zeroq)")
    parser.add_argument("--size", type=int, help="pixels of a side; by default the network's own (resnet18: 32)")
    parser.add_argument("--batch", type=_batch, default=32, help="images made together; auto (--mode cost): what fits")
    parser.add_argument("--samples", type=int, default=1024, help="images of a dataset, for what is done once for all")
    parser.add_argument("--iterations", type=int, help="instead of each generator's own (cost: 2)")
    parser.add_argument("--precision", default="float32", help="with commas, for --mode step: float32,bfloat16")
    parser.add_argument("--steps", type=int, default=3, help="measured in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="32,128,224", help="pixels, for --mode cost")
    parser.add_argument("--counts", default="64,256,1024", help="samples, for --mode cost")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process, by its threads")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(words)
    if options.mode == "worker":
        return worker(options)
    if options.mode == "cost":
        return cost(options)
    try:
        teacher = build(options.network, options.size, options.kit, options.device)
    except UserError as error:
        sys.exit(str(error))
    if options.batch == AUTO:
        parser.error("--batch auto is for --mode cost")
    {"table": table, "step": one_step, "profile": profile}[options.mode](
        teacher, options, Clock(options.clock, teacher.device)
    )
    return None


if __name__ == "__main__":
    main()
