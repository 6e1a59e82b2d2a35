"""Rotation: turn the residual stream of a language model, so that no channel holds all the large values.

QuaRot (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456, section 4, stages 1a and 1c). The network's function stays what
it is, whatever the orthogonal matrix Q, if what writes into the residual stream is multiplied by Q, what reads from it
by Q^T, and norms in between only divide by the root of the mean square; likewise P within the heads of an attention,
whose outputs are mixtures of values::

    read      W <- W diag(g) Q,      norm's gain g <- 1
    write     W <- Q^T W,  b <- Q^T b,      embedding E <- E Q
    values    of each head, W_h <- P^T W_h,  b_h <- P^T b_h;      what reads the mixtures, of each head, W_h <- W_h P

Q = D H / sqrt(H), D random signs, H Hadamard of the largest power of two, times a random orthogonal matrix for what is
left of the width; P alike, another one a layer. Nothing runs at inference that did not before: exporters see other
weights and nothing else.

With ``iterations`` Q and P are trained from there (SpinQuant; Liu et al., ICLR 2025, arXiv 2405.16406, eq. 1: R_1 and
R_2), so that the rounded network's outputs come near the float one's::

    minimize  KL(float || rounded)  over A skew,      Q <- Q (I + A)^-1 (I - A),  the Cayley transform; P alike

Every ``refresh`` steps the rotation so far goes into the weights, A begins at zero again, and grids are found anew. The
random rotation stays unless held-out samples say that the trained one is better.

Which layers read and which write is found by running the network once: a layer reads if its input comes out of a norm,
and writes if its output is as wide as the stream. Afterwards the logits are compared with those of before, and a
network in which they differ (norms that subtract a mean) is refused; heads that can't be turned stay. A head with the
embedding's weight gets one of its own: the norm's gain goes into it and not into the embedding. The student is larger
by that.

Differences from the papers: none of their rotations online, which cost something at inference (R_3, R_4). Trained by
Adam on A instead of Cayley SGD with momentum, on the divergence to the teacher instead of the text's cross-entropy, and
with the weights rounded too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from dfq.algorithms._base import Algorithm, Work
from dfq.algorithms._reconstruction import output_loss
from dfq.attention import AttentionRecord
from dfq.calibration import Ranges, enable
from dfq.dataset import atomic
from dfq.errors import UserError
from dfq.hooks import Dataflow, evaluation_mode, record_dataflow
from dfq.modules import Quantizer, product_of
from dfq.precision import exact, exact_device
from dfq.progress import progress_bar, say
from dfq.quantization import broadcast
from dfq.settings import NonNegativeInt, PositiveFloat, PositiveInt
from dfq.sites import FUSED_ATTENTION, MOVING
from dfq.surgery import REWRITES
from dfq.tasks._task import task_of
from dfq.teacher import Teacher
from dfq.weights import to_memory

TOLERANCE = 1e-3  # relative, of logits in float32


@dataclass(frozen=True)
class Rotation(Algorithm):
    """Seconds, with ``iterations`` minutes; before an algorithm that rounds: ``algorithm=sequence
    algorithm.steps=[rotation,gptq]``."""

    num_calibration_samples: PositiveInt = 512  # samples whose activations are looked at
    heads: bool = True  # values are turned within their heads too
    iterations: NonNegativeInt = 0  # steps that train the rotations; 0: random ones stay
    learning_rate: PositiveFloat = 0.05  # Adam on angles: about how far a vector turns in a step, in radians
    batch_size: PositiveInt = 16  # samples a step
    refresh: PositiveInt = 20  # steps with the same grids
    num_range_samples: PositiveInt = 16  # samples that static ranges of inputs are found by meanwhile
    weights_stay_float: ClassVar[bool] = True
    kind: ClassVar[str] = "token ids"  # what its networks take

    def run(self, work: Work) -> None:
        """Turn the student's float weights, then give it its grids."""
        student = work.student
        if student.has_grids:
            raise UserError(
                "got algorithm=rotation behind an algorithm that has given the student its grids",
                "rotation as the first step",
            )
        turns = rotate(student.module, work.teacher, torch.Generator().manual_seed(work.seed), self.heads)
        student.surgery.rewrites += [(name, "untied") for name in turns.untied]
        student.surgery.rotated = True
        for name in turns.untied:  # its weight is another one now, and so are its values' ends
            if (layer := student.layers.get(name)) is not None:
                layer.weight_quantizer = copy.deepcopy(layer.weight_quantizer)
        if self.iterations:
            _Training(self, work, turns).run()
        work.calibrate(work.images(self.num_calibration_samples))


@dataclass(frozen=True)
class Heads:
    """Values of an attention and what reads their mixtures, head by head."""

    value: str  # the layer whose rows are values
    output: str  # the layer whose columns read mixtures; more heads than of values share them in order
    size: int  # values a head


@dataclass
class Turns:
    """Which weights the rotations of a network turn."""

    width: int
    readers: list[str]
    writers: list[str]
    tables: list[str]
    heads: list[Heads] = field(default_factory=list)
    untied: list[str] = field(default_factory=list)  # had an embedding's weight, and have one of their own now

    @property
    def names(self) -> set[str]:
        """Of all parameters that may be turned."""
        of_heads = [name for part in self.heads for name in (part.value, part.output)]
        layers = (*self.readers, *self.writers, *self.tables, *of_heads)
        return {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}

    def of(self, state: Mapping[str, Tensor], stream: Tensor | None, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The turned ones of ``state``'s weights and biases, differentiable.

        Args:
            state: parameters by name.
            stream: [H, H] orthogonal; None: the stream stays.
            heads: name of an attention's layer of values → [size, size] orthogonal.
        """
        new: dict[str, Tensor] = {}
        if stream is not None:
            for name in (*self.readers, *self.tables):
                new[f"{name}.weight"] = state[f"{name}.weight"] @ stream
            for name in self.writers:
                new[f"{name}.weight"] = stream.mT @ state[f"{name}.weight"]
                if f"{name}.bias" in state:
                    new[f"{name}.bias"] = state[f"{name}.bias"] @ stream
        for part in self.heads:
            if part.value not in heads:
                continue
            now, turn, rows = {**state, **new}, heads[part.value], (-1, part.size)
            value, output = f"{part.value}.weight", f"{part.output}.weight"
            new[value] = (turn.mT @ now[value].unflatten(0, rows)).flatten(0, 1)
            new[output] = (now[output].unflatten(1, rows) @ turn).flatten(1)
            if (bias := f"{part.value}.bias") in state:
                new[bias] = (state[bias].unflatten(0, rows) @ turn).flatten()
        return new


@torch.no_grad()
def rotate(module: nn.Module, teacher: Teacher, rng: torch.Generator, heads: bool = True) -> Turns:
    """Turn the residual stream of ``module``, in place: the teacher's module tree, its weights still float.

    Args:
        heads: values within their heads too.
    """
    example = teacher.example()
    parts = dict(module.named_modules())
    flow = record_dataflow(module, example)
    norms = {name for name, part in parts.items() if _is_gain(part)}
    made: dict[int, str] = {}  # number of a value → the norm that it comes out of
    for op in flow.ops:
        if op.module in norms:
            made.update(dict.fromkeys(op.outputs, op.module))
        elif op.name in MOVING and op.inputs and op.inputs[0] in made:
            made.update(dict.fromkeys(op.outputs, made[op.inputs[0]]))
    matrices = [name for name, part in parts.items() if getattr(part, "weight", None) is not None]
    matrices = [name for name in matrices if parts[name].weight.dim() == 2]  # routers too, which are no nn.Linear
    products = {name: product_of(name, flow) for name in matrices}
    linears = {name: op for name, op in products.items() if op is not None and op.name == "linear"}
    readers = {name: made[op.inputs[0]] for name, op in linears.items() if op.inputs[0] in made}
    shared = {id(part.weight): name for name, part in reversed(parts.items()) if isinstance(part, nn.Embedding)}
    tables = {name: parts[name] for name in shared.values()}  # of those with the same weight the first
    if not readers or not tables:
        raise _refused(teacher, "in which no layer reads from a norm")
    width = next(iter(tables.values())).embedding_dim
    wide = {norm for norm in readers.values() if next(parts[norm].parameters()).numel() == width}  # heads' are not
    readers = {name: norm for name, norm in readers.items() if parts[name].weight.shape[1] == width and norm in wide}
    writers = [name for name in linears if name not in readers and parts[name].weight.shape[0] == width]
    owners: dict[int, str] = {}
    untied = [name for name in readers if any(parts[name].weight is table.weight for table in tables.values())]
    for name in [*readers, *writers]:
        is_tables = name not in untied and any(parts[name].weight is table.weight for table in tables.values())
        if id(parts[name].weight) in owners or is_tables:
            raise _refused(teacher, f"whose {name} shares its weight with another layer")
        owners[id(parts[name].weight)] = name
    before = _logits(module, example)
    for name in untied:
        REWRITES["untied"](parts[name])
    for norm in dict.fromkeys(readers.values()):
        gain = _take_gain(parts[norm])
        if gain is None:
            raise _refused(teacher, f"whose {norm} does more than divide by a root mean square and multiply")
        for name, of in readers.items():
            if of == norm:
                parts[name].weight.copy_(exact(parts[name].weight) * gain)
    turns = Turns(width, list(readers), writers, list(tables), untied=untied)
    there = exact_device(example.device)
    _put(module, turns.of(_doubles(module, turns.names), orthogonal(width, rng).to(there), {}))
    if not _is_near(_logits(module, example), before):
        raise _refused(teacher, "whose function changes when its residual stream is turned")
    if not heads:
        return turns
    turns.heads = _find_heads(teacher, linears)
    kept = _doubles(module, turns.names)
    inner = {part.value: orthogonal(part.size, rng).to(there) for part in turns.heads}
    _put(module, turns.of(kept, None, inner))
    if not _is_near(_logits(module, example), before):
        say(f"rotation: values of {teacher.name} are not turned within their heads, which would change what it does")
        _put(module, kept)
        turns.heads = []
    return turns


def _find_heads(teacher: Teacher, linears: Mapping[str, object]) -> list[Heads]:
    """Of each attention that torch computes in one piece, with nothing between it and two layers but moved values."""
    flow, found = teacher.dataflow, []
    record = AttentionRecord(with_maps=False)
    with evaluation_mode(teacher.module), record:
        teacher.module(teacher.example())
    fused = [op for op in flow.ops if op.name == FUSED_ATTENTION]
    if len(fused) != len(record.outputs):
        return []
    for op, mixture in zip(fused, record.outputs, strict=True):
        value, output = _layer_before(flow, op.inputs[2]), _layer_behind(flow, op.outputs[0])
        if value is not None and output is not None and {value, output} <= linears.keys():
            found.append(Heads(value, output, mixture.shape[-1]))
    is_whole = all(
        teacher.module.get_submodule(name).weight.shape[axis] % part.size == 0
        for part in found
        for name, axis in ((part.value, 0), (part.output, 1))
    )
    return found if is_whole and len({part.value for part in found}) == len(found) else []


def _layer_before(flow: Dataflow, number: int) -> str | None:
    """Of the linear layer whose moved output a value is."""
    makers = {output: op for op in flow.ops for output in op.outputs}
    while (op := makers.get(number)) is not None and op.name in MOVING and op.inputs:
        number = op.inputs[0]
    return op.module if op is not None and op.name == "linear" else None


def _layer_behind(flow: Dataflow, number: int) -> str | None:
    """Of the one linear layer that reads a value, moved or not."""
    numbers, found = {number}, set()
    for op in flow.ops:
        if numbers & set(op.inputs[:1]):
            if op.name in MOVING:
                numbers |= set(op.outputs)
            else:
                found.add(op.module if op.name == "linear" else None)
    return found.pop() if len(found) == 1 else None


class _Training:
    """SpinQuant's: the rotations of a student that was turned at random, trained in steps between which grids stay.

    Weights are always those of the beginning, turned by all rotations so far in one: a run that goes on from
    ``work_dir`` has the same bits.
    """

    def __init__(self, settings: Rotation, work: Work, turns: Turns):
        self.settings, self.work, self.turns = settings, work, turns
        student = work.student
        to_memory(student.module)
        student.module.requires_grad_(False)
        device = work.teacher.device
        sizes = {"stream": turns.width, **{part.value: part.size for part in turns.heads}}
        there = exact_device(device)
        self.total = {name: torch.eye(size, dtype=torch.float64, device=there) for name, size in sizes.items()}
        self.angles = {name: torch.zeros(size, size, device=device, requires_grad=True) for name, size in sizes.items()}
        # Each of a row's angles moves by lr, and a vector by the root of their squares.
        self.rates = [settings.learning_rate / math.sqrt(size) for size in sizes.values()]
        self.optimizer = torch.optim.Adam([{"params": [angles]} for angles in self.angles.values()])
        self.first = _doubles(student.module, self.turns.names)
        self.task = task_of(work.teacher)
        self.held_out = work.dataset.without_padding(work.dataset.split()[1])

    def run(self) -> None:
        s, images, path = self.settings, self.work.images(len(self.work.dataset)), self.work.work_dir / "rotation"
        step = self._load(path)
        if step == 0:
            self._bake()
            self.loss_before = self._held_out_loss()
        with progress_bar("rotate", s.iterations, "steps") as advance:
            advance(step)
            while step < s.iterations:
                self._bake()
                for index in range(step, min(step + s.refresh, s.iterations)):
                    decay = 0.5 * (1 + math.cos(math.pi * index / s.iterations))
                    for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                        group["lr"] = rate * decay
                    seed = self.work.seed * 1_000_003 + index
                    rng = torch.Generator().manual_seed(seed)
                    chosen = torch.randint(len(images), (min(s.batch_size, len(images)),), generator=rng)
                    self.optimizer.zero_grad(set_to_none=True)
                    self._loss(images[chosen], seed).backward()
                    self.optimizer.step()
                    advance(1)
                step = min(step + s.refresh, s.iterations)
                with torch.no_grad():
                    for name, angles in self.angles.items():
                        self.total[name] = self.total[name] @ cayley(exact(angles))
                        angles.zero_()
                self._save(path, step)
        self._bake()
        loss = self._held_out_loss()
        if not loss < self.loss_before:
            self.total = {name: torch.eye(len(turn)).to(turn) for name, turn in self.total.items()}
            self._bake()
        say(f"rotate: divergence of held-out samples {self.loss_before:.4f} before, {loss:.4f} after")
        enable(self.work.student, False)

    def _now(self) -> tuple[Tensor, dict[str, Tensor]]:
        stream, *heads = (cayley(angles) for angles in self.angles.values())
        return stream, dict(zip(list(self.angles)[1:], heads, strict=True))

    def _loss(self, ids: Tensor, seed: int | None = None) -> Tensor:
        """Of rounding as it is; with ``seed``, of errors that are drawn."""
        student, teacher = self.work.student, self.work.teacher
        weights = self.turns.of(dict(student.module.named_parameters()), *self._now())

        def rounded(batch: Tensor) -> Any:
            rng = None if seed is None else torch.Generator(batch.device).manual_seed(seed)  # the same of each part
            with evaluation_mode(student.module), drawn_errors(student.module, rng):
                return functional_call(student.module, weights, (batch,))

        return output_loss(self.task, rounded, teacher, student.batches(ids.to(teacher.device), len(ids)))

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        losses = [self._loss(batch) * len(batch) for batch in self.held_out.split(self.settings.batch_size)]
        return float(torch.stack(losses).sum()) / len(self.held_out)

    @torch.no_grad()
    def _bake(self) -> None:
        """The rotations so far go into the weights, and grids are found anew."""
        work, student = self.work, self.work.student
        stream, *heads = self.total.values()
        _put(student.module, self.turns.of(self.first, stream, dict(zip(list(self.total)[1:], heads, strict=True))))
        enable(student, False)
        ranges = Ranges(student, work.weight_quantizer, work.activation_quantizer)
        if ranges.seen or ranges.unreached:
            with ranges.watching():
                for batch in student.batches(work.images(self.settings.num_range_samples), self.settings.batch_size):
                    student(batch)
        ranges.choose()
        student.module.requires_grad_(False)

    def _save(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"total.{name}": turn for name, turn in self.total.items()}
        for name, angles in self.angles.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[angles].items()}
        tensors |= {
            "step_index": torch.tensor(step),
            "loss_before": torch.tensor(self.loss_before, dtype=torch.float64),
        }
        with atomic(folder / "state.safetensors") as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def _load(self, folder: Path) -> int:
        """How many steps were made before an interruption."""
        file = folder / "state.safetensors"
        if not file.exists():
            return 0
        tensors = load_file(file)
        for name, angles in self.angles.items():
            self.total[name] = tensors[f"total.{name}"].to(self.total[name])
            self.optimizer.state[angles] = {
                key: tensors[f"{key}.{name}"].to("cpu" if key == "step" else angles.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.loss_before = float(tensors["loss_before"])
        return int(tensors["step_index"])


class DrawnErrors(Quantizer):
    """In the place of a quantizer: adds errors as those of a uniform grid, half a step at most, drawn evenly.

    Steps have a gradient here: they change as the range does of what is rounded with them.
    """

    rng: torch.Generator

    def _fake_quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
        if self.scheme.grid != "uniform":
            return super()._fake_quantize(x, scale, zero_point, axis)
        scale = broadcast(scale, x, axis)
        dims = [d for d in range(x.dim()) if scale.dim() == 0 or scale.shape[d] == 1]
        span = x.abs().amax(dims, True) if self.scheme.symmetric else x.amax(dims, True) - x.amin(dims, True)
        scale = scale.detach() * span / span.detach().clamp(min=torch.finfo(x.dtype).tiny)
        return x + scale * (torch.rand(x.shape, generator=self.rng, device=x.device, dtype=x.dtype) - 0.5)


@contextmanager
def drawn_errors(module: nn.Module, rng: torch.Generator | None) -> Iterator[None]:
    """Quantizers of ``module`` add errors from ``rng`` inside; None: they round."""
    parts = [part for part in module.modules() if type(part) is Quantizer] if rng is not None else []
    for part in parts:
        part.__class__, part.rng = DrawnErrors, rng
    try:
        yield
    finally:
        for part in parts:
            part.__class__ = Quantizer
            del part.rng


def cayley(angles: Tensor) -> Tensor:
    """(I + A)^-1 (I - A) [H, H], orthogonal, A = (X - X^T) / 2 of ``angles`` X [H, H]."""
    skew = (angles - angles.mT) / 2
    eye = torch.eye(len(angles), dtype=angles.dtype, device=angles.device)
    return torch.linalg.solve(eye + skew, eye - skew)  # they commute


def _doubles(module: nn.Module, names: Container[str]) -> dict[str, Tensor]:
    """Parameters of these names, in float64."""
    found = {name: p.detach() for name, p in module.named_parameters() if name in names}
    return {name: exact(p) for name, p in found.items()}


@torch.no_grad()
def _put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, weight in weights.items():
        parameters[name].copy_(weight)


def _is_near(after: Tensor, before: Tensor) -> bool:
    return float((after - before).norm()) <= TOLERANCE * float(before.norm())


def orthogonal(width: int, rng: torch.Generator) -> Tensor:
    """Q [H, H], float64: random signs, Hadamard of the largest power of two, random orthogonal for what is left."""
    power = width & -width
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    rest, triangular = torch.linalg.qr(torch.randn(width // power, width // power, generator=rng, dtype=torch.float64))
    rest = (rest * torch.sign(torch.diagonal(triangular))).contiguous()
    signs = torch.randint(0, 2, (width, 1), generator=rng).double() * 2 - 1
    return signs * torch.kron(hadamard / math.sqrt(power), rest)


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    with evaluation_mode(module):
        outputs = module(ids)
    return getattr(outputs, "logits", outputs if isinstance(outputs, Tensor) else None)  # type: ignore[return-value]


def _is_gain(part: nn.Module) -> bool:
    """Whether a module has one vector and nothing else: what a norm without a mean has."""
    own = [p for p in part.parameters()]
    return not list(part.children()) and len(own) == 1 and own[0].dim() == 1


def _take_gain(norm: nn.Module) -> Tensor | None:
    """The gain of a norm, which is 1 from now on; None if it is no such norm."""
    (weight,) = norm.parameters()
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)

    def gains(forward: Callable[[Tensor], Tensor]) -> Tensor:
        y, wide = (exact(t) for t in (forward(x), x))
        return y / (wide * wide.square().mean(-1, keepdim=True).rsqrt())

    try:
        found = gains(norm)
    except TypeError:  # it takes more than what it divides, such as a gate
        return None
    if not torch.allclose(found, found[:1].expand_as(found), rtol=1e-3, atol=1e-5):
        return None
    for neutral in (1.0, 0.0):  # some add one to what they hold
        weight.fill_(neutral)
        if torch.allclose(gains(norm), torch.ones_like(found), rtol=1e-3):
            held = found[0]
            return held
    return None


def _refused(teacher: Teacher, why: str) -> UserError:
    return UserError(
        f"got algorithm=rotation and {teacher.name}, {why}",
        "decoders with root-mean-square norms (Llama, Mistral, Qwen, Gemma)",
        "leave rotation away for such a network",
    )
