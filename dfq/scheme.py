"""What is quantized to what: bits, grid, granularity, policy. Plain frozen dataclasses, no torch.

A :class:`Scheme` is all that a runtime has to know: :class:`TensorScheme` of weights and activations (and of what goes
into attention's two products, if they are asked for), and a policy that says which layers get them. The command line
checks a whole configuration with this file alone.

Policies (the convention has to be named, or two papers cannot be compared):

``all``
    every weight layer, first and last included, at the stated bits, weights and inputs alike: the network's
    own input is rounded too. Stricter than SynQ and GDFQ, which leave the input of the first layer float; comparable to
    them with ``input_bits=8``, the bits that an image comes with.
``edges_8bit``
    the first and the last weight layer at 8 bits, weights and inputs (the BRECQ, QDrop and Genie convention).
``hardware``
    every tensor that an integer runtime holds as an integer: ``all``, and both inputs of every residual add, the
    outputs of concatenations, pools, activations and of the last layer; biases are int32 in steps of input scale times
    weight scale. A tensor that several layers read has one grid.

Grids (x_hat is what stands for x; s the scale, z the zero point, b the bits):

``uniform``
    x_hat = (q - z) s, q = clamp(round(x / s) + z); symmetric: z = 0, signed; a float z is added before rounding,
    and z s is a float16 number where s is one (``scale_format``).
``ternary``
    x_hat = q s, q in -1, 0, 1 (TWN, 1605.04711); not symmetric: x_hat = q s + shift (TernaryLLM, 2406.07177).
``seq``
    stretched elastic quantization (ParetoQ, 2502.02631): x_hat = (q + 1/2) s, no level at zero; the only 1-bit grid.
``fp8_e4m3``, ``fp8_e5m2``, ``fp4_e2m1``
    x_hat = s times a small float. With groups of 32 and scales that are powers of two fp4_e2m1 is MXFP4, with groups of
    16 and e4m3 scales NVFP4.
``log2``
    x_hat = s 2^-q, q in 0 .. 2^b - 1: for outputs of a softmax (FQ-ViT, 2111.13824).
``float``
    not quantized.

Keys of attention have a few channels that are large for every token: ``key`` rounds them channel by channel, over
groups of tokens (KIVI, Liu et al., ICML 2024, arXiv 2402.02750); those of a group that is not full yet stay float, and
so do they for queries of that group, so that a text that is written token by token sees what a whole one does.

Of a language model (token ids in, as many logits as it has token ids out) embeddings, head and routers stay float,
unless ``skip`` says otherwise or ``overrides`` name such a layer in full; with ``policy=hardware`` they do not.

A :class:`MixedScheme` is a scheme whose bits are still to be chosen, layer by layer, under a :class:`Budget`. What
``dfq.mixed_precision`` makes of it is a plain :class:`Scheme` again, whose overrides name every layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dfq.errors import UserError, did_you_mean

POLICIES = ("all", "edges_8bit", "hardware")
GRANULARITIES = ("per_tensor", "per_channel", "per_group", "per_token")
GRIDS = ("uniform", "ternary", "seq", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "log2", "float")
SCALE_FORMATS = ("float32", "float16", "e8m0", "e4m3")
RANGES = ("full", "narrow", "7bit")
ZERO_POINTS = ("integer", "float")
FIXED_BITS = {"ternary": 2, "fp8_e4m3": 8, "fp8_e5m2": 8, "fp4_e2m1": 4, "float": 16}


@dataclass(frozen=True)
class FloatFormat:
    """A small float: its largest value and the exponent of its smallest normal number."""

    mantissa_bits: int
    smallest_exponent: int
    maximum: float


FLOAT_FORMATS = {  # OCP 8-bit floating point (2023) and microscaling formats (2023)
    "fp8_e4m3": FloatFormat(3, -6, 448.0),
    "fp8_e5m2": FloatFormat(2, -14, 57344.0),
    "fp4_e2m1": FloatFormat(1, 0, 6.0),
}


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"got {name}={value!r}", " | ".join(allowed), did_you_mean(str(value), allowed))


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor is rounded; see the grids above."""

    num_bits: int = 8  # weights 1 to 8, activations 2 to 16; ternary and small floats have bits of their own
    symmetric: bool = False  # signed around 0; false: from the lowest value (or 0) to the highest
    granularity: str = "per_tensor"  # per_tensor | per_channel | per_group | per_token; channel: weights, token: inputs
    group_size: int | None = None  # values that share a scale, along the input dimension; with per_group. Keys: tokens
    grid: str = "uniform"  # uniform | ternary | seq | fp8_e4m3 | fp8_e5m2 | fp4_e2m1 | log2 | float
    dynamic: bool = False  # activations: the range of each batch instead of a calibrated one
    scale_format: str = "float32"  # float32 | float16 | e8m0 | e4m3; powers of two, or small beside a float32 a tensor
    range: str = "full"  # full | narrow | 7bit; narrow: -127..127, 7bit: -64..63 in 8 bits, for CPUs without VNNI
    zero_point: str = "integer"  # integer | float; float: of weights, finer at 2 and 3 bits, but few formats hold it

    def __post_init__(self):
        _choice("grid", self.grid, GRIDS)
        if self.grid in FIXED_BITS:
            object.__setattr__(self, "num_bits", FIXED_BITS[self.grid])
        if isinstance(self.num_bits, bool) or not isinstance(self.num_bits, int) or not 1 <= self.num_bits <= 16:
            raise UserError(
                f"got num_bits={self.num_bits!r}",
                "a whole number: weights 1 to 8, activations 2 to 16",
                "give a bit width in that range",
            )
        for name in ("symmetric", "dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"got {name}={getattr(self, name)!r}", "true | false")
        _choice("granularity", self.granularity, GRANULARITIES)
        _choice("scale_format", self.scale_format, SCALE_FORMATS)
        _choice("range", self.range, RANGES)
        _choice("zero_point", self.zero_point, ZERO_POINTS)
        self._check_together()
        if self.granularity == "per_token":
            object.__setattr__(self, "dynamic", True)

    def _check_together(self) -> None:
        """What each setting allows of the others."""
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UserError(f"got group_size={size!r}", "a whole number >= 1")
        of_tokens = self.granularity == "per_channel" and self.dynamic  # of keys: tokens that share a channel's range
        if (self.granularity == "per_group") != (size is not None) and not of_tokens:
            raise UserError(
                f"got granularity={self.granularity} and group_size={'null' if size is None else size}",
                "granularity=per_group together with a group_size",
                "give both or neither",
            )
        if self.num_bits == 1 and self.grid != "seq":
            raise UserError(
                f"got num_bits=1 and grid={self.grid}",
                "grid=seq for 1 bit",
                "a uniform grid of 1 bit has no positive level",
            )
        if self.grid == "seq" and self.num_bits > 8:
            raise UserError(f"got num_bits={self.num_bits} and grid=seq", "1 to 8 bits")
        if self.grid in ("seq", *FLOAT_FORMATS) and not self.symmetric:
            raise UserError(f"got grid={self.grid} and symmetric=false", "symmetric=true", "its levels are symmetric")
        if self.grid == "log2" and (self.symmetric or self.num_bits > 4):
            raise UserError(
                f"got grid=log2, symmetric={str(self.symmetric).lower()} and num_bits={self.num_bits}",
                "symmetric=false and at most 4 bits",
                "its levels are 1, 1/2, 1/4, ...: all positive, and the 16th is small enough for any softmax",
            )
        if self.range != "full" and not (self.grid == "uniform" and self.symmetric):
            raise UserError(f"got range={self.range}", "full", "only symmetric uniform grids can be narrower")
        if self.zero_point == "float" and (self.grid != "uniform" or self.symmetric):
            raise UserError(
                f"got zero_point=float, grid={self.grid} and symmetric={str(self.symmetric).lower()}",
                "zero_point=float with grid=uniform and symmetric=false",
                "leave zero_point away: other grids have none, or one that is no code anyway",
            )
        if self.range == "7bit" and self.num_bits != 8:
            raise UserError(f"got range=7bit and num_bits={self.num_bits}", "num_bits=8")
        if self.scale_format == "e4m3" and self.grid not in FLOAT_FORMATS:
            raise UserError(
                f"got scale_format=e4m3 and grid={self.grid}",
                f"float32 | float16 | e8m0, or a grid of {', '.join(FLOAT_FORMATS)}",
            )

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        if self.grid == "ternary":
            return -1
        if not self.symmetric or self.grid in FLOAT_FORMATS:
            return 0
        if self.range == "7bit":
            return -64
        return -(2 ** (self.num_bits - 1)) + (self.range == "narrow")

    @property
    def quant_max(self) -> int:
        """The largest code."""
        if self.grid == "ternary":
            return 1
        if not self.symmetric or self.grid in FLOAT_FORMATS:
            return 2**self.num_bits - 1
        return 63 if self.range == "7bit" else 2 ** (self.num_bits - 1) - 1

    @property
    def is_float(self) -> bool:
        """Not quantized."""
        return self.grid == "float"

    @property
    def has_integer_codes(self) -> bool:
        """x_hat = (q - z) s with whole q and z: what integer kernels compute with."""
        whole = self.grid == "uniform" and self.zero_point == "integer"
        return whole or (self.grid == "ternary" and self.symmetric)

    @property
    def has_float_zero_point(self) -> bool:
        return self.zero_point == "float" or (self.grid == "ternary" and not self.symmetric)

    @property
    def bits_per_value(self) -> float:
        """Bits that a stored code takes; five ternary ones share a byte (log2 of 3 is 1.58)."""
        return 1.6 if self.grid == "ternary" else float(self.num_bits)

    @property
    def label(self) -> str:
        """What a scheme's name says of it."""
        if self.grid == "fp4_e2m1":
            return {"e8m0": "mxfp4", "e4m3": "nvfp4"}.get(self.scale_format, "fp4")
        names = {"fp8_e4m3": "fp8", "fp8_e5m2": "fp8e5m2", "ternary": "ternary", "float": "16"}
        return names.get(self.grid, f"{self.num_bits}{self.grid if self.grid != 'uniform' else ''}")


FLOAT = TensorScheme(16, True, grid="float")
OPERANDS = ("attention", "softmax", "key_value", "key")  # of attention's products, beside weight and activation
ROLES = ("embeddings", "head", "routers")  # of layers of a language model
PARTS = ("weight", "activation", *OPERANDS)
Overrides = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Scheme:
    """Bits, grid and granularity of each kind of tensor, and the policy that hands them to layers."""

    weight: TensorScheme = field(default_factory=lambda: TensorScheme(8, True, "per_channel"))
    activation: TensorScheme = field(default_factory=lambda: TensorScheme(8, False, "per_tensor"))
    policy: str = "all"  # all | edges_8bit | hardware
    name: str = ""  # null or empty: made of the bits
    overrides: Overrides = field(default_factory=dict)  # by name of the layer: '{head.*: {weight: {num_bits: 8}}}'
    attention: TensorScheme = FLOAT  # queries, keys and values in attention's products
    softmax: TensorScheme = FLOAT  # probabilities in the second of them
    key_value: TensorScheme = FLOAT  # keys and values there, as a cache holds them; float: what scheme.attention says
    skip: tuple[str, ...] = ROLES  # layers left float, by name or by what they are in a language model; []: none
    input_bits: int | None = None  # bits of the network's own input; null: those of activations. Images come with 8
    key: TensorScheme = FLOAT  # keys there, per channel over group_size tokens (KIVI); float: what key_value says

    def __post_init__(self):
        _choice("scheme.policy", self.policy, POLICIES)
        bits = self.input_bits
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16):
            raise UserError(f"got scheme.input_bits={bits!r}", "a whole number from 2 to 16, or null")
        _check_weight(self.weight, "scheme.weight")
        for part in ("activation", "attention", "softmax", "key_value"):
            _check_activation(getattr(self, part), f"scheme.{part}")
        _check_key(self.key)
        for part in ("attention", "softmax"):
            if getattr(self, part).granularity == "per_group":
                raise UserError(f"got scheme.{part}.granularity=per_group", "per_tensor | per_token")
        _check_layer_input(self.key_value, "scheme.key_value")
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise UserError(f"got scheme.skip={self.skip!r}", f"a list of names of layers, or of {', '.join(ROLES)}")
        object.__setattr__(self, "skip", tuple(self.skip))
        _check_layer_input(self.activation, "scheme.activation")
        if self.policy == "hardware":
            _check_hardware(self.weight, self.activation, "scheme")
        object.__setattr__(self, "overrides", _checked_overrides(self.overrides))
        for pattern in self.overrides:
            self._overridden(self.weight, self.activation, [pattern])
        if not self.name:
            object.__setattr__(self, "name", self._made_of_the_bits())

    def _made_of_the_bits(self) -> str:
        weight, activation = self.weight.label, self.activation.label
        plain = weight.isdigit() and activation.isdigit()
        name = f"w{weight}a{activation}" if plain else f"w{weight}_a{activation}"
        kinds = {"k": self.key if not self.key.is_float else self.key_value, "v": self.key_value}
        kept = {part: scheme.label for part, scheme in kinds.items() if not scheme.is_float}
        if kept:
            same = len(kept) == 2 and len(set(kept.values())) == 1
            added = f"kv{kept['k']}" if same else "".join(part + label for part, label in kept.items())
            name += added if plain else f"_{added}"
        implied = {"mxfp4": 32, "nvfp4": 16}.get(weight)
        if self.weight.group_size not in (None, implied):
            name += f"_g{self.weight.group_size}"
        if self.key.group_size not in (None, self.weight.group_size):  # tokens that share a channel's range
            name += f"_k{self.key.group_size}"
        if self.weight.scale_format == self.activation.scale_format == "e8m0" and self.weight.grid == "uniform":
            name += "_po2"
        return name

    @property
    def network_input(self) -> TensorScheme:
        """Of what goes into the network, before policies and overrides."""
        if self.input_bits is None or self.activation.is_float:
            return self.activation
        return replace(self.activation, num_bits=self.input_bits, grid="uniform", scale_format="float32")

    def for_layer(self, is_edge: bool, name: str = "", reads_input: bool = False) -> tuple[TensorScheme, TensorScheme]:
        """(weight, activation) scheme of one layer.

        Args:
            is_edge: it is the first or the last weight layer.
            reads_input: what it multiplies is the network's input.
        """
        weight, activation = self.weight, self.activation
        if self.policy == "edges_8bit" and is_edge:
            weight, activation = (
                part if part.num_bits >= 8 else replace(part, num_bits=8, grid="uniform", scale_format="float32")
                for part in (weight, activation)  # float ones have 16
            )
        if reads_input and self.input_bits is not None:
            activation = self.network_input
        return self._overridden(weight, activation, [p for p in self.overrides if fnmatchcase(name, p)])

    def _overridden(
        self, weight: TensorScheme, activation: TensorScheme, patterns: list[str]
    ) -> tuple[TensorScheme, TensorScheme]:
        """With the overrides of ``patterns``, later ones on top."""
        for pattern in patterns:
            changes, where = self.overrides[pattern], f"scheme.overrides[{pattern!r}]"
            try:
                weight = _replace(weight, changes.get("weight", {}))
                activation = _replace(activation, changes.get("activation", {}))
            except UserError as error:
                raise UserError(error.got.replace("got ", f"got {where}: ", 1), error.allowed, error.do) from None
            _check_weight(weight, f"{where}.weight")
            _check_activation(activation, f"{where}.activation")
            _check_layer_input(activation, f"{where}.activation")
            if self.policy == "hardware":
                _check_hardware(weight, activation, where, or_float=True)
        return weight, activation

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads; parts that are not quantized and empty overrides are left out."""
        values = asdict(self)
        for part in OPERANDS:
            if getattr(self, part) == FLOAT:
                del values[part]
        if not self.overrides:
            del values["overrides"]
        if self.input_bits is None:
            del values["input_bits"]
        if self.skip == ROLES:
            del values["skip"]
        return values

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], name: str = "") -> Scheme:
        """Scheme from the plain mapping of a yaml or a manifest; an unknown key is an error that names it.

        One with a budget, or anything else that only a :class:`MixedScheme` has, is one.
        """
        values = dict(config)
        if cls is Scheme and not values.keys().isdisjoint(MIXED_KEYS):
            return MixedScheme.from_dict(values, name)
        for part in PARTS:
            if part in values:
                _check_keys(values[part], TensorScheme, f"scheme.{part}")
                implied = {"dynamic": True} if part == "key" and values[part].get("grid") != "float" else {}
                try:
                    values[part] = TensorScheme(**implied | _with_implied(values[part]))
                except UserError as error:
                    got = error.got.replace("got ", f"got scheme.{part}.", 1)
                    raise UserError(got, error.allowed, error.do) from None
        _check_keys(values, cls, "scheme")
        values.setdefault("name", name)
        return cls(**values)


def _with_implied(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` and what their grid implies where they do not say it."""
    values = dict(values)
    if values.get("grid") in ("float", "seq", "ternary", *FLOAT_FORMATS):
        values.setdefault("symmetric", True)
    if values.get("grid") == "log2":
        values.setdefault("num_bits", 4)
    return values


def _replace(scheme: TensorScheme, changes: Mapping[str, Any]) -> TensorScheme:
    """``scheme`` with ``changes``, which win over what they do not go with.

    A granularity without groups drops the group size, other bits a grid that has bits of its own, a grid the range and
    the format of scales that it does not have.
    """
    if not changes:
        return scheme
    values: dict[str, Any] = dict(changes)
    if "granularity" in values and values["granularity"] != "per_group":
        values.setdefault("group_size", None)
    other_bits = values.get("num_bits", scheme.num_bits) != scheme.num_bits
    if scheme.is_float or (other_bits and scheme.grid in FIXED_BITS):
        values.setdefault("grid", "uniform")
    grid = values.get("grid", scheme.grid)
    if grid != "uniform":
        values.setdefault("range", "full")
    if grid not in FLOAT_FORMATS and scheme.scale_format == "e4m3":
        values.setdefault("scale_format", "float32")
    return replace(scheme, **_with_implied(values))


def _check_weight(scheme: TensorScheme, where: str) -> None:
    if scheme.is_float:
        return
    if scheme.num_bits > 8:
        raise UserError(f"got {where}.num_bits={scheme.num_bits}", "1 to 8", "or grid=float for float weights")
    if scheme.granularity == "per_token" or scheme.dynamic:
        raise UserError(
            f"got {where}.granularity={scheme.granularity} and dynamic={str(scheme.dynamic).lower()}",
            "per_tensor | per_channel | per_group and dynamic=false",
            "weights have no tokens and do not change",
        )
    if scheme.grid == "log2":
        raise UserError(f"got {where}.grid=log2", " | ".join(g for g in GRIDS if g != "log2"), "it has no sign")


def _check_activation(scheme: TensorScheme, where: str) -> None:
    if scheme.is_float:
        return
    if scheme.zero_point == "float":
        raise UserError(f"got {where}.zero_point=float", "zero_point=integer", "float ones are for weights")
    if scheme.granularity == "per_channel":
        raise UserError(
            f"got {where}.granularity=per_channel",
            "per_tensor | per_token | per_group",
            "no integer runtime multiplies activations that have a scale per channel",
        )
    if scheme.granularity == "per_group" and not scheme.dynamic:
        raise UserError(
            f"got {where}.granularity=per_group and dynamic=false", "dynamic=true", "groups have ranges of each batch"
        )
    if scheme.grid in ("ternary", "seq") or scheme.num_bits == 1:
        raise UserError(
            f"got {where}.grid={scheme.grid} and num_bits={scheme.num_bits}",
            "uniform | fp8_e4m3 | fp8_e5m2 | fp4_e2m1 | float, 2 to 16 bits",
            "grid=ternary and grid=seq are for weights",
        )


def _check_key(scheme: TensorScheme) -> None:
    if scheme.is_float:
        return
    if not (scheme.granularity == "per_channel" and scheme.group_size and scheme.dynamic and scheme.grid == "uniform"):
        raise UserError(
            f"got scheme.key.granularity={scheme.granularity}, group_size={scheme.group_size} and grid={scheme.grid}",
            "granularity=per_channel, grid=uniform and a group_size, the tokens that share a channel's range",
            "scheme.key_value rounds keys and values per token",
        )


def _check_layer_input(scheme: TensorScheme, where: str) -> None:
    if scheme.grid == "log2":
        raise UserError(f"got {where}.grid=log2", "another grid", "it is for scheme.softmax")


def _check_hardware(weight: TensorScheme, activation: TensorScheme, where: str, or_float: bool = False) -> None:
    """Integer runtimes have these tensors; ``or_float``: and one layer may stay float."""
    weight_fits = weight.grid == "uniform" and weight.granularity in ("per_tensor", "per_channel")
    if not weight_fits and not (or_float and weight.is_float):
        raise UserError(
            f"got scheme.policy=hardware, {where}.weight.grid={weight.grid} and granularity={weight.granularity}",
            "grid=uniform and granularity=per_tensor | per_channel",
            "use scheme.policy=all for other grids",
        )
    is_static = activation.granularity == "per_tensor" and not activation.dynamic
    if not (activation.grid == "uniform" and is_static) and not (or_float and activation.is_float):
        raise UserError(
            f"got scheme.policy=hardware, {where}.activation.grid={activation.grid}, "
            f"granularity={activation.granularity} and dynamic={str(activation.dynamic).lower()}",
            "grid=uniform, granularity=per_tensor and dynamic=false",
            "integer runtimes know every activation's grid beforehand; use scheme.policy=all for others",
        )


def _checked_overrides(overrides: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Overrides as plain mappings, every key of them known."""
    if not isinstance(overrides, Mapping):
        raise UserError(f"got scheme.overrides={overrides!r}", "{layer.*: {weight: {num_bits: 8}}}")
    found = {}
    for pattern, parts in overrides.items():
        where = f"scheme.overrides[{pattern!r}]"
        if not isinstance(parts, Mapping) or not parts or not set(parts) <= {"weight", "activation"}:
            raise UserError(f"got {where}={parts!r}", "{weight: {num_bits: 8}, activation: {...}}")
        for part, values in parts.items():
            _check_keys(values, TensorScheme, f"{where}.{part}")
        found[str(pattern)] = {str(part): dict(values) for part, values in parts.items()}
    return found


def _check_keys(values, target, where: str) -> None:
    known = [f.name for f in fields(target)]
    if not isinstance(values, Mapping):
        raise UserError(f"got {where}={values!r}", f"a mapping with {', '.join(known)}")
    for key in values:
        if key not in known:
            hint = did_you_mean(str(key), known).replace("'", f"'{where}.", 1)
            raise UserError(f"got {where}.{key}", ", ".join(f"{where}.{name}" for name in known), hint)


# ------------------------------------------------------------------------------------------------ mixed precision

MEASURES = ("kl", "sqnr", "hessian")
ALLOCATION = "allocation.json"  # in a student's folder


@dataclass(frozen=True)
class Budget:
    """What a student may cost: one of the four. None of them: as many bytes as the scheme has without mixing."""

    size_bytes: float | None = None  # of the student's file: packed codes, scales, and all that stays float
    mean_weight_bits: float | None = None  # bits a weight, on average over the weights of all quantized layers
    bops: float | None = None  # bit operations a sample: multiply-accumulates x weight bits x input bits, summed
    latency_ms: float | None = None  # of a sample in the runtime: the sum of its layers
    latency_table: Any = None  # json file {layer: {"4": ms, "8x8": ms, "float": ms}}, bits of weights (x inputs)

    def __post_init__(self):
        for name in BUDGETS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise UserError(f"got budget.{name}={value!r}", "a number > 0")
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(
                f"got {' and '.join(f'budget.{name}={getattr(self, name):g}' for name in given)}",
                "one of them",
                "leave one away",
            )
        if self.latency_table is not None and self.latency_ms is None:
            raise UserError("got budget.latency_table without budget.latency_ms", "both", "give budget.latency_ms=...")
        if self.latency_table is not None:  # what is in it counts, not what it is called
            object.__setattr__(self, "latency_table", _latency_table(self.latency_table))

    @property
    def kind(self) -> str:
        """Which of :data:`BUDGETS` is given; ``size_bytes`` where none is."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), "size_bytes")

    @property
    def limit(self) -> float | None:
        """None: what the scheme costs without mixing."""
        return getattr(self, self.kind)


BUDGETS = ("size_bytes", "mean_weight_bits", "bops", "latency_ms")


@dataclass(frozen=True)
class MixedScheme(Scheme):
    """A scheme whose bits are chosen layer by layer: as little harm as possible within a budget.

    Bits of layer inputs are chosen only where the budget sees them (``bops``, ``latency_ms``), and not with
    ``policy=hardware``, where several layers share the grid of a tensor. What ``overrides`` say of a layer's bits or
    grid stays as it is, and so do the 8 bits of ``policy=edges_8bit``.
    """

    budget: Budget = field(default_factory=Budget)  # one of size_bytes, mean_weight_bits, bops, latency_ms
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)  # what a layer's weights can have
    activation_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)  # what a layer's input can have
    measure: str = "kl"  # kl | sqnr | hessian; of what rounding one tensor does to the network's outputs
    num_samples: int = 128  # synthetic samples that it is measured on
    num_candidates: int = 8  # allocations near the budget that are compared with everything rounded at once
    allocation: str | None = None  # allocation.json of an earlier run, or its student's folder: those bits

    def __post_init__(self):
        if not self.name:
            object.__setattr__(self, "name", "mixed")
        super().__post_init__()
        if not isinstance(self.budget, Budget):
            _check_keys(self.budget, Budget, "budget")
            object.__setattr__(self, "budget", Budget(**self.budget))
        _choice("scheme.measure", self.measure, MEASURES)
        for name in ("num_samples", "num_candidates"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"got scheme.{name}={value!r}", "a whole number >= 1")
        if self.allocation is not None and any(value is not None for value in asdict(self.budget).values()):
            raise UserError("got scheme.allocation and a budget", "one of the two", "leave one away")
        for part in ("weight", "activation"):
            self._check_bits(part)

    def _check_bits(self, part: str) -> None:
        """Each choice makes a scheme of that part."""
        scheme, where = getattr(self, part), f"scheme.{part}_bits"
        bits = getattr(self, where.partition(".")[2])
        if isinstance(bits, str | Mapping) or not hasattr(bits, "__iter__") or not list(bits):
            raise UserError(f"got {where}={bits!r}", "a list of whole numbers [2,3,4,8]")
        if scheme.is_float and part == "activation":
            return
        if scheme.grid in FIXED_BITS:
            free = " | ".join(grid for grid in GRIDS if grid not in FIXED_BITS and grid != "log2")
            raise UserError(f"got scheme.{part}.grid={scheme.grid}, which has bits of its own, to be mixed", free)
        for number in bits:
            try:
                changed = replace(scheme, num_bits=number)
                (_check_weight if part == "weight" else _check_activation)(changed, "")
            except UserError as error:
                allowed = f"whole numbers that go with scheme.{part} ({error.allowed})"
                raise UserError(f"got {where}={list(bits)}, of which {number!r} is not allowed", allowed) from None
        object.__setattr__(self, f"{part}_bits", tuple(sorted(set(bits))))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], name: str = "") -> Scheme:
        """The scheme of a configuration; an allocation that it can't take its bits from is found now."""
        values = {key: value for key, value in config.items() if value is not None or key not in MIXED_KEYS}
        scheme = super().from_dict(values, name)
        assert isinstance(scheme, MixedScheme)
        if scheme.allocation is not None:
            scheme.with_bits(read_allocation(scheme.allocation)["overrides"])
        return scheme

    def with_bits(self, overrides: Overrides) -> Scheme:
        """The plain scheme with the bits of an allocation; this scheme's own overrides come last."""
        both = {pattern: parts for pattern, parts in overrides.items() if pattern not in self.overrides}
        for pattern, mine in self.overrides.items():
            chosen = overrides.get(pattern, {})
            parts = dict.fromkeys([*chosen, *mine])
            both[pattern] = {part: {**chosen.get(part, {}), **mine.get(part, {})} for part in parts}
        operands = {part: getattr(self, part) for part in OPERANDS}
        rest = {"skip": self.skip, "input_bits": self.input_bits, **operands}
        return Scheme(self.weight, self.activation, self.policy, self.name, both, **rest)


MIXED_KEYS = {entry.name for entry in fields(MixedScheme)} - {entry.name for entry in fields(Scheme)}


def _read(path: Path, key: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"got {key}={path}, which can't be read", what) from None
    except ValueError as error:
        raise UserError(f"got {key}={path}, which is no json ({str(error).splitlines()[0]})", what) from None
    if not isinstance(value, dict):
        raise UserError(f"got {key}={path}, which holds no json object", what)
    return value


def read_allocation(path: str | Path) -> dict[str, Any]:
    """What a run with ``scheme=mixed`` left in its student's folder."""
    path, what = Path(path), f"the {ALLOCATION} of a student made with scheme=mixed"
    value = _read(path / ALLOCATION if path.is_dir() else path, "scheme.allocation", what)
    if value.get("format") != "dfq.allocation" or not isinstance(value.get("overrides"), dict):
        raise UserError(f"got scheme.allocation={path}, which is none", what)
    return value


def _latency_table(table: Any) -> dict[str, dict[str, float]]:
    """Checked, and read where it is the name of a file."""
    what = 'json {layer: {"4": ms, "8x8": ms, "float": ms}}, bits of weights (x bits of inputs)'
    if isinstance(table, str | Path):
        table = _read(Path(table), "budget.latency_table", what)
    for layer, row in table.items() if isinstance(table, Mapping) else [("", table)]:
        if not isinstance(row, Mapping) or not all(map(_is_latency, row, row.values())):
            raise UserError(f"got budget.latency_table with {layer}: {row!r}", what)
    return {str(layer): dict(row) for layer, row in table.items()}


def _is_latency(bits: Any, value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return is_number and re.fullmatch(r"\d+(x\d+)?|float", str(bits)) is not None
