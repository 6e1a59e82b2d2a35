"""What is quantized to what: bits, grid, granularity, policy. Plain frozen dataclasses, no torch.

A :class:`Scheme` is all that a runtime has to know: two :class:`TensorScheme` (weights, activations) and a
policy that says which layers get them. The command line checks a whole configuration with this file alone.

Policies (the convention has to be named, or two papers cannot be compared):

``all``
    every weight layer, first and last included, at the stated bits, weights and inputs alike: the network's
    own input is rounded too. Stricter than SynQ and GDFQ, which leave the input of the first layer float.
``edges_8bit``
    the first and the last weight layer at 8 bits, weights and inputs (the BRECQ, QDrop and Genie convention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from dfq.errors import UserError, did_you_mean

POLICIES = ("all", "edges_8bit")
GRANULARITIES = ("per_tensor", "per_channel")


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor is rounded: x_hat = (q - zero_point) * scale with integer q."""

    num_bits: int = 8  # 2 to 8
    symmetric: bool = False  # signed around 0; false: from the lowest value (or 0) to the highest
    granularity: str = "per_tensor"  # per_tensor | per_channel (weights: one scale an output channel)

    def __post_init__(self):
        if isinstance(self.num_bits, bool) or not isinstance(self.num_bits, int) or not 2 <= self.num_bits <= 8:
            raise UserError(
                f"got num_bits={self.num_bits!r}", "a whole number from 2 to 8", "give a bit width in that range"
            )
        if not isinstance(self.symmetric, bool):
            raise UserError(f"got symmetric={self.symmetric!r}", "true | false")
        if self.granularity not in GRANULARITIES:
            raise UserError(
                f"got granularity={self.granularity!r}",
                " | ".join(GRANULARITIES),
                did_you_mean(str(self.granularity), GRANULARITIES),
            )

    @property
    def quant_min(self) -> int:
        return -(2 ** (self.num_bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        return 2 ** (self.num_bits - 1) - 1 if self.symmetric else 2**self.num_bits - 1


@dataclass(frozen=True)
class Scheme:
    """Bits, grid and granularity of weights and activations, and the policy that hands them to layers."""

    weight: TensorScheme = field(default_factory=lambda: TensorScheme(8, True, "per_channel"))
    activation: TensorScheme = field(default_factory=lambda: TensorScheme(8, False, "per_tensor"))
    policy: str = "all"  # all | edges_8bit
    name: str = ""  # null or empty: made of the bits

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise UserError(
                f"got scheme.policy={self.policy!r}", " | ".join(POLICIES), did_you_mean(str(self.policy), POLICIES)
            )
        if self.activation.granularity != "per_tensor":
            raise UserError(
                f"got scheme.activation.granularity={self.activation.granularity!r}",
                "per_tensor",
                "no integer runtime multiplies activations that have a scale per channel",
            )
        if not self.name:
            object.__setattr__(self, "name", f"w{self.weight.num_bits}a{self.activation.num_bits}")

    def for_layer(self, is_edge: bool) -> tuple[TensorScheme, TensorScheme]:
        """(weight, activation) scheme of one layer; ``is_edge``: it is the first or the last weight layer."""
        if self.policy == "edges_8bit" and is_edge:
            return replace(self.weight, num_bits=8), replace(self.activation, num_bits=8)
        return self.weight, self.activation

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], name: str = "") -> Scheme:
        """Scheme from the plain mapping of a yaml or a manifest; an unknown key is an error that names it."""
        values = dict(config)
        for part in ("weight", "activation"):
            if part in values:
                _check_keys(values[part], TensorScheme, f"scheme.{part}")
                try:
                    values[part] = TensorScheme(**values[part])
                except UserError as error:
                    raise UserError(error.got.replace("got ", f"got scheme.{part}."), error.allowed, error.do) from None
        _check_keys(values, cls, "scheme")
        values.setdefault("name", name)
        return cls(**values)


def _check_keys(values, target, where: str) -> None:
    known = [f.name for f in fields(target)]
    if not isinstance(values, Mapping):
        raise UserError(f"got {where}={values!r}", f"a mapping with {', '.join(known)}")
    for key in values:
        if key not in known:
            raise UserError(
                f"got {where}.{key}", ", ".join(f"{where}.{name}" for name in known), did_you_mean(str(key), known)
            )
