"""Layer by layer rounding on second moments of inputs: what GPTQ, COMQ and QuantEase share.

Blocks run in order, and layers in order inside a block, so that a layer's input X_q [I, n] holds the rounding of all
that comes before it and of its own input quantizer. A solver then looks for Q on the layer's weight grid with

    minimize  tr((W* - Q) H (W* - Q)^T),     H = 2/n X_q X_q^T + damping mean(diag) I.

What a solver does not see is done here, the same for all:

- **Columns.** Of a convolution X holds its im2col columns; a convolution with P groups has P such problems, which are
  solved side by side. H needs I^2 memory and n passes by: no activations of more than one block are kept.
- **QEP** (Quantization Error Propagation, Arai & Ichikawa 2025, arXiv 2504.09629): a weight that makes up for what its
  input has lost. With the float network's input X_f to the same layer,

      W* = W + alpha W (X_f - X_q) X_q^T (X_q X_q^T + damping)^-1                                     (``propagate``)

  which for alpha = 1 is the least-squares solution of W X_f = W* X_q.
- **RSQ** (Sung et al., 2025, arXiv 2503.01820): columns of tokens that matter more count more in all moments, as
  :mod:`dfq.algorithms._token_weights` says (``token_weights``).
- **Bias.** Where ``correct_bias``, the bias takes over the mean of what is left, b + W mean(X_f) - Q mean(X_q), and H
  and W* are those of X_q and X_f without their means: least squares with a constant term.

- **Layers that run more than once** (the heads of a detector, once a level) or in no block: whole forwards of both
  networks bring their inputs, and moments are those of all calls.

Grids stay what calibration made them (COMQ may change scales). Layers without such a problem of their own keep nearest
rounding, and are named: those whose weight another layer or its owner reads as well, embeddings, transposed
convolutions, experts of a mixture in no block or that no token chose, what no sample reaches. Other experts see neither
QEP nor a bias, nor do layers that get other rows in the float network: there other tokens may choose them.

Differences from the QEP paper: its damping (the mean of the diagonal, ``propagate_damping``) can be set; it skips some
layers of language models to save time, here none; grids are not made anew for W*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dfq.algorithms._base import Algorithm, Clock, Work, tell_left
from dfq.algorithms._bias_correction import has_own_bias, remember_bias_correction
from dfq.algorithms._linear_algebra import cholesky, damped
from dfq.algorithms._reconstruction import float_copy
from dfq.algorithms._token_weights import Kind, token_weights
from dfq.blocks import Block, Captured, Captures, find_blocks, run_block
from dfq.hooks import Dataflow, Op, forward_hooks, op_name, record_dataflow
from dfq.modules import QuantizedLayer
from dfq.progress import progress_bar
from dfq.quantization import round_to_grid
from dfq.scheme import TensorScheme
from dfq.settings import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from dfq.student import Student

PRODUCT_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv3d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}
Runs = Callable[[], Iterator[tuple[Callable[[], Any], Callable[[], Any], Tensor | None]]]
LARGEST_COLUMNS = 2**24  # entries of im2col columns held at a time


# ------------------------------------------------------------------------------------------------ the problem


@dataclass(frozen=True)
class Grid:
    """A weight's grid, column by column.

    Shapes: ``scale`` and ``zero_point`` [P, O, I] (per group), [P, O, 1] (per channel) or [1, 1, 1] (per tensor).
    """

    scheme: TensorScheme
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, layer: QuantizedLayer, num_problems: int) -> Grid:
        """The grid of a layer whose output channels lie along dimension 0 of its weight."""
        quantizer, channels = layer.weight_quantizer, layer.weight.shape[0]
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach()
        if scale.dim() == 0:
            return cls(quantizer.scheme, scale.view(1, 1, 1), zero_point.view(1, 1, 1))
        size = quantizer.scheme.group_size or 1
        shape = (num_problems, channels // num_problems, -1)
        return cls(
            quantizer.scheme,
            scale.view(shape).repeat_interleave(size, -1),
            zero_point.view(shape).repeat_interleave(size, -1),
        )

    def nearest(self, values: Tensor, columns: int | Tensor | None = None) -> Tensor:
        """The nearest levels to ``values`` [P, O, J].

        Args:
            columns: which columns these are: one (J is 1), [P, O, J], or all.
        """
        scale, zero_point = self._at(self.scale, columns), self._at(self.zero_point, columns)
        return round_to_grid(values, scale, zero_point, self.scheme)

    def nearest_at(self, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The nearest levels to ``values`` [P, K] of the entries ``rows``, ``columns`` [P, K]."""
        every = torch.arange(len(values), device=values.device)[:, None]

        def at(entries: Tensor) -> Tensor:
            if entries.numel() == 1:
                return entries.view(1, 1)
            return entries[every, rows, columns if entries.shape[-1] > 1 else 0]

        return round_to_grid(values, at(self.scale), at(self.zero_point), self.scheme)

    @staticmethod
    def _at(entries: Tensor, columns: int | Tensor | None) -> Tensor:
        if columns is None or entries.shape[-1] == 1:
            return entries
        if isinstance(columns, Tensor):
            return entries.gather(-1, columns)
        return entries[..., columns : columns + 1]

    def permuted(self, order: Tensor) -> Grid:
        """With columns in ``order`` [P, I]."""
        if self.scale.shape[-1] == 1:
            return self
        index = order[:, None].expand_as(self.scale)
        return replace(self, scale=self.scale.gather(-1, index), zero_point=self.zero_point.gather(-1, index))


@dataclass(frozen=True)
class Problem:
    """One layer: Q on ``grid`` that minimizes tr((W - Q) H (W - Q)^T), for each of P groups of a convolution.

    Shapes: ``weight`` [P, O, I], ``hessian`` [P, I, I], positive definite; ``output`` [P, O, O], what errors of outputs
    cost together, for solvers that ask for it (:meth:`LayerwiseRounding.output_moments`).
    """

    weight: Tensor
    hessian: Tensor
    grid: Grid
    output: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """[P, I]."""
        return self.hessian.diagonal(dim1=-2, dim2=-1)

    def objective(self, values: Tensor) -> Tensor:
        """(w - q) H (w - q)^T of each row [P, O]."""
        error = self.weight - values
        return ((error @ self.hessian) * error).sum(-1)

    def by_activation(self) -> tuple[Problem, Tensor]:
        """The same with columns in falling order of their diagonal, and the permutation [P, 1, I] that undoes it."""
        order = self.diagonal.argsort(dim=-1, descending=True, stable=True)
        rows = self.hessian.gather(1, order[:, :, None].expand_as(self.hessian))
        hessian = rows.gather(2, order[:, None, :].expand_as(rows))
        weight = self.weight.gather(-1, order[:, None].expand_as(self.weight))
        return Problem(weight, hessian, self.grid.permuted(order)), order.argsort(-1)[:, None]


@dataclass(frozen=True)
class Solution:
    """Levels Q [P, O, I], and another scale (shaped like the weight quantizer's, flat) if the solver changed it."""

    values: Tensor
    scale: Tensor | None = None


# ------------------------------------------------------------------------------------------------ moments


class Moments:
    """Running means over input columns: of X_q X_q^T, X_f X_q^T, X_q and X_f. Shapes [P, I, I] and [P, I]."""

    def __init__(self) -> None:
        self.count = 0.0  # columns, or the sum of what they count
        self.second: Tensor | None = None
        self.cross: Tensor | None = None
        self.mean: Tensor | None = None
        self.float_mean: Tensor | None = None

    def add(
        self, x: Tensor, float_x: Tensor | None = None, with_cross: bool = True, weights: Tensor | None = None
    ) -> None:
        """Columns [P, I, n] of the student, and of the float network at the same places; they count ``weights`` [n]."""
        before, self.count = self.count, self.count + (x.shape[-1] if weights is None else float(weights.sum()))
        share = 1 / self.count
        weighted = x if weights is None else x * weights

        def averaged(old: Tensor | None, added: Tensor) -> Tensor:
            return added * share if old is None else old * (before * share) + added * share

        self.second = averaged(self.second, weighted @ x.mT)
        self.mean = averaged(self.mean, weighted.sum(-1))
        if float_x is not None:
            self.float_mean = averaged(self.float_mean, (float_x if weights is None else float_x * weights).sum(-1))
            if with_cross:
                self.cross = averaged(self.cross, float_x @ weighted.mT)

    def hessian(self, centered: bool = False) -> Tensor:
        """2/n X_q X_q^T; ``centered``: of X_q without its mean."""
        assert self.second is not None and self.mean is not None
        return 2 * (self.second - self.mean[:, :, None] * self.mean[:, None]) if centered else 2 * self.second

    def cross_hessian(self, centered: bool = False) -> Tensor:
        """2/n X_f X_q^T."""
        assert self.cross is not None and self.mean is not None and self.float_mean is not None
        return 2 * (self.cross - self.float_mean[:, :, None] * self.mean[:, None]) if centered else 2 * self.cross


def propagated(weight: Tensor, hessian: Tensor, cross: Tensor, alpha: float, damping: float) -> Tensor:
    """QEP: W + alpha W (C - H) (H + damping)^-1 with C = 2/n X_f X_q^T. Shapes: ``weight`` [P, O, I]."""
    right = weight @ (cross - hessian)
    return weight + alpha * torch.cholesky_solve(right.mT, cholesky(damped(hessian, damping))).mT


@dataclass(frozen=True)
class Product:
    """The operation with which a layer uses its weight: its name and its arguments."""

    name: str
    arguments: dict[str, Any]

    @property
    def num_problems(self) -> int:
        return self.arguments.get("groups", 1)

    def places(self, x: Tensor) -> tuple[int, ...]:
        """The output positions [H_out, W_out] (tokens [T]) of inputs ``x`` [N, ...]."""
        if self.name == "linear":
            return (x[0].numel() // x.shape[-1],)
        return tuple(self._patches(x).shape[2 + len(self._kernel) :])

    def columns(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the rows of the weight are multiplied with [N, P, I, L], at ``positions`` [L] of the flat output."""
        if self.name == "linear":
            return x.reshape(len(x), -1, x.shape[-1])[:, positions].mT[:, None]
        where: tuple[Any, ...] = (..., *torch.unravel_index(positions, self.places(x)))
        return self._patches(x)[where].reshape(len(x), self.num_problems, -1, len(positions))

    @property
    def _kernel(self) -> tuple[int, ...]:
        return tuple(self.arguments["weight"].shape[2:])

    def _patches(self, x: Tensor) -> Tensor:
        """A view [N, C, H_kernel, W_kernel, H_out, W_out] of a convolution's padded input, nothing copied."""
        kernel = self._kernel
        stride, dilation = (self._numbers(name, 1) for name in ("stride", "dilation"))
        padding = self.arguments.get("padding", 0)
        if padding == "same":  # what is odd goes to the right
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = [side for n in reversed(total) for side in (n // 2, n - n // 2)]
        else:
            sides = [side for n in reversed(self._numbers("padding", 0)) for side in (n, n)]
        x = F.pad(x, sides)
        steps = x.stride()[2:]
        sizes = [
            (n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)
        ]
        inside = [n * d for n, d in zip(steps, dilation, strict=True)]
        across = [n * s for n, s in zip(steps, stride, strict=True)]
        return x.as_strided((*x.shape[:2], *kernel, *sizes), (*x.stride()[:2], *inside, *across))

    def _numbers(self, name: str, default: int) -> tuple[int, ...]:
        """A setting of the convolution, one number for each dimension."""
        value, length = self.arguments.get(name, default), len(self._kernel)
        value = 0 if value == "valid" else value
        return (value,) * length if isinstance(value, int) else tuple(value) * (length // len(value))


class _Reached(Exception):
    """Ends a forward at the last product that was waited for."""


class _ProductsOf(TorchFunctionMode):
    """Ends a forward at the last product of one layer; what each multiplies is quantized, padded, and all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.inside = False
        self.found: list[Product] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names = PRODUCT_ARGUMENTS.get(op_name(func))
        if not self.inside or names is None:
            return func(*args, **kwargs)
        self.inside = False
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, length = given["input"], 1 if op_name(func) == "linear" else given["weight"].dim() - 1
        given["input"] = x[None] if x.dim() == length else x  # of one sample alone
        if len(self.found) + 1 == self.count:
            self.found.append(Product(op_name(func), given))
            raise _Reached
        self.found.append(Product(op_name(func), given | {"input": given["input"].clone()}))  # it may be written into
        return func(*args, **kwargs)


def products_in(network: nn.Module, name: str, count: int, run: Callable[[], Any]) -> list[Product]:
    """The first ``count`` products of the layer ``name`` when ``run`` runs ``network`` or a part of it.

    None of a layer that the samples at hand do not reach.
    """
    mode = _ProductsOf(count)

    def enter(_name: str, _module: nn.Module, _inputs: tuple) -> None:
        mode.inside = True

    try:
        with forward_hooks([(name, network.get_submodule(name))], before=enter), mode:
            run()
    except _Reached:
        pass
    return mode.found


def _inputs(products: list[Product]) -> list[Tensor]:
    return [product.arguments["input"] for product in products]


# ------------------------------------------------------------------------------------------------ the algorithm


@dataclass(frozen=True)
class LayerwiseRounding(Algorithm):
    """What the methods have in common; each gives :meth:`solve` and settings of its own."""

    rounds_weights: ClassVar[bool] = True
    num_samples: PositiveInt = 256  # synthetic samples whose activations are looked at
    num_positions: PositiveInt | None = 256  # positions (tokens) of a sample that count, drawn by the seed; null: all
    batch_size: PositiveInt = 64  # samples a forward
    damping: NonNegativeFloat = 0.01  # added to the diagonal of H, in units of its mean
    propagate: Fraction = 0.5  # alpha of QEP: share of the inputs' error that a weight makes up for; 0: off
    propagate_damping: NonNegativeFloat = 1.0  # added to the diagonal for QEP, in units of its mean
    correct_bias: bool = True  # the bias takes over the mean of what is left
    token_weights: Kind = "none"  # which tokens of text count more in H: those that attention goes to, or large ones
    smallest_token_weight: Fraction = 0.01  # r_min
    memory_bytes: PositiveInt = 2**31  # activations of one tensor kept in memory; more go to a file
    time_limit_s: PositiveFloat | None = None  # seconds, behind which layers keep nearest rounding; null: no limit

    def solve(self, problem: Problem) -> Solution:
        raise NotImplementedError

    def output_moments(self, work: Work, reference: nn.Module, images: Tensor, layers: list[str]) -> dict[str, Tensor]:
        """Layer → what errors of its outputs cost together [P, O, O]; those that have none cost all the same.

        Asked for as many ``layers`` at once as ``memory_bytes`` have room for, before the first of them is rounded.
        """
        return {}

    def _within_memory(self, student: Student, names: list[str]) -> Iterator[list[str]]:
        """``names`` in parts whose output moments fit into ``memory_bytes``, or hold one layer."""
        part: list[str] = []
        size = 0
        for name in names:
            layer = student.layers[name]
            needed = 4 * layer.weight.shape[0] ** 2 // getattr(layer, "groups", 1)
            if part and size + needed > self.memory_bytes:
                yield part
                part, size = [], 0
            part.append(name)
            size += needed
        yield part

    @torch.no_grad()
    def run(self, work: Work) -> None:
        """Round the weights of the student; ``work_dir`` holds activations while a block is looked at."""
        clock = Clock(self.time_limit_s)
        student, work_dir, images = work.student, work.work_dir, work.images(self.num_samples)
        reference = float_copy(student, work.teacher)
        work.ensure_calibrated(images)
        flow = record_dataflow(reference, work.teacher.example())
        wanted = solvable(student, flow)
        blocks = [block for block in find_blocks(reference, flow, student.layers) if block.calls == 1]
        others = wanted.keys() - student.expert_layers - {name for block in blocks for name in block.layers}
        first = {op.module: index for index, op in reversed(list(enumerate(flow.ops)))}
        parts: list[tuple[Block | None, list[str]]] = [(None, [name]) for name in others]
        parts += [(block, [name for name in block.layers if name in wanted]) for block in blocks]
        parts = [(block, names) for block, names in parts if names]
        parts.sort(key=lambda part: min(first[name] for name in part[1]))
        tell_left(self, student, {name for _, names in parts for name in names})
        rng = torch.Generator().manual_seed(work.seed)
        outputs: dict[str, Tensor] = {}
        ahead = list(self._within_memory(student, [name for _, names in parts for name in names]))
        captures = Captures(student.module, reference, images, self.batch_size, work_dir, self.memory_bytes)
        with captures, progress_bar(type(self).__name__, len(wanted), "layers") as advance:
            for block, names in parts:
                if not clock.allows_another():
                    return
                captured = None if block is None else captures.of(block)
                if captured is not None:
                    captured.token_weights = token_weights(
                        reference, captured, self.token_weights, self.smallest_token_weight, self.batch_size
                    )
                for name in names:
                    if not clock.allows_another():
                        return
                    if ahead and name == ahead[0][0]:
                        outputs = self.output_moments(work, reference, images, ahead.pop(0))
                    runs = partial(self._runs, student, reference, captures, captured)
                    self._round(student, reference, runs, name, wanted[name], rng, outputs.pop(name, None))
                    advance(1)

    def _round(
        self,
        student: Student,
        reference: nn.Module,
        runs: Runs,
        name: str,
        count: int,
        rng: torch.Generator,
        output: Tensor | None,
    ) -> None:
        """One layer, which runs ``count`` times: its weight is then on its grid."""
        layer = student.layers[name]
        in_pairs = self.propagate > 0 or self.correct_bias
        moments = None
        if not (in_pairs and name in student.expert_layers):
            moments = self._moments(student, reference, runs, name, count, rng)
        if moments is None:
            # Other tokens may choose an expert in the float network: there is no pair of inputs to compare.
            alone = replace(self, propagate=0.0, correct_bias=False)
            alone._round(student, reference, runs, name, count, rng, output)
            return
        if moments.mean is None:  # an expert that no token chose: nearest rounding
            return
        centered = self.correct_bias and has_own_bias(student, name)
        hessian = moments.hessian(centered)
        weight = layer.weight.detach().float().reshape(len(hessian), -1, hessian.shape[-1])
        target = weight
        if self.propagate > 0:
            cross = moments.cross_hessian(centered)
            target = propagated(weight, hessian, cross, self.propagate, self.propagate_damping)
        solution = self.solve(Problem(target, damped(hessian, self.damping), Grid.of(layer, len(hessian)), output))
        if solution.scale is not None:
            layer.weight_quantizer.set_qparams(solution.scale, layer.weight_quantizer.zero_point)
        if layer.bias_quantizer is not None and layer.bias is not None:
            layer.bias_quantizer.make_room(layer)
        rounded = layer.weight_quantizer(solution.values.view_as(layer.weight).to(layer.weight.dtype))
        if centered:
            assert moments.float_mean is not None and layer.bias is not None
            means = torch.stack([moments.float_mean, moments.mean], -1)  # [P, I, 2]
            left = (weight @ means)[..., 0] - (rounded.float().reshape(weight.shape) @ means)[..., 1]
            before = layer.bias.detach().clone()
            layer.bias += left.flatten().to(layer.bias.dtype)
            remember_bias_correction(layer, before, of_weight=True)
        layer.weight.copy_(rounded)

    def _runs(
        self, student: Student, reference: nn.Module, captures: Captures, captured: Captured | None
    ) -> Iterator[tuple[Callable[[], Any], Callable[[], Any], Tensor | None]]:
        """Batch by batch what runs a block, or all, of the student and of the reference; and what its tokens count."""
        if captured is None:
            yield from ((mine, theirs, None) for mine, theirs in captures.forwards())
            return

        def run(network: nn.Module, inputs: Tensor) -> Tensor:
            return run_block(network, captured.block, inputs.to(student.device), captured.arguments)

        for start in range(0, len(captured.inputs), self.batch_size):
            batch = slice(start, start + self.batch_size)
            counts = None if captured.token_weights is None else captured.token_weights[batch].to(student.device)
            mine, theirs = captured.inputs[batch], captured.float_inputs[batch]
            yield partial(run, student.module, mine), partial(run, reference, theirs), counts

    def _moments(
        self, student: Student, reference: nn.Module, runs: Runs, name: str, count: int, rng: torch.Generator
    ) -> Moments | None:
        """Over all samples, and all calls of the layer; None where it gets other rows in the float network."""
        moments = Moments()
        needs_float = self.propagate > 0 or self.correct_bias
        for run, run_float, counts in runs():
            mine = products_in(student.module, name, count, run)
            theirs = products_in(reference, name, count, run_float) if needs_float else []
            if needs_float and [x.shape for x in _inputs(mine)] != [x.shape for x in _inputs(theirs)]:
                return None
            for call, product in enumerate(mine):
                inputs = [_inputs(products)[call] for products in (mine, theirs) if products]
                if not inputs[0].numel():
                    continue
                for columns, weights in self._columns(product, inputs, counts, rng):
                    moments.add(columns[0], columns[1] if needs_float else None, self.propagate > 0, weights)
        return moments

    def _columns(
        self, product: Product, inputs: list[Tensor], counts: Tensor | None, rng: torch.Generator
    ) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        """Columns [P, I, n] of each of ``inputs`` [N, ...] at the same places, and their weights [n], part by part.

        Args:
            counts: [N, T] of tokens; they are those of the block, which a layer inside it may not see one by one.
        """
        positions = torch.arange(math.prod(product.places(inputs[0])))
        if self.num_positions is not None and len(positions) > self.num_positions:
            positions = torch.randperm(len(positions), generator=rng)[: self.num_positions].sort().values
        positions = positions.to(inputs[0].device)
        if counts is not None and (len(inputs[0]), *product.places(inputs[0])) != counts.shape:
            counts = None
        size = product.columns(inputs[0][:1], positions).numel()
        taken = max(1, LARGEST_COLUMNS // size)
        for start in range(0, len(inputs[0]), taken):
            part = slice(start, start + taken)
            columns = [product.columns(x[part].float(), positions) for x in inputs]
            weights = None if counts is None else counts[part][:, positions].flatten()
            yield [c.permute(1, 2, 0, 3).flatten(2) for c in columns], weights


def solvable(student: Student, flow: Dataflow) -> dict[str, int]:
    """How often each layer runs that has a problem of its own: its products read the weight, and nothing else does."""
    numbers = {name: number for number, names in flow.parameters.items() for name in names}
    readers: dict[int, list[Op]] = {}
    for op in flow.ops:
        for number in set(op.inputs) & flow.parameters.keys():
            readers.setdefault(number, []).append(op)
    found = {}
    for name, layer in student.layers.items():
        uses = readers.get(numbers.get(f"{name}.weight".lstrip("."), -1), [])
        alone = all(op.module == name and op.name in PRODUCT_ARGUMENTS for op in uses)
        if uses and alone and layer.weight_quantizer.has_qparams:
            found[name] = len(uses)
    return found
