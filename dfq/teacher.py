"""Teacher: a frozen float network, the task it solves, the input it takes, and a hash of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dfq.errors import UserError
from dfq.hooks import Dataflow, evaluation_mode, record_dataflow
from dfq.modules import BATCH_NORMS
from dfq.ranks import local_rank

LONGEST_EXAMPLE = 64  # tokens
MOST_TOKENS = 4096  # in a forward
MOST_LOGITS = 2**26  # of all tokens in a forward: 256 MB
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class InputSpec:
    """What a vision network takes: float [N, C, H, W], (byte / 255 - mean) / std, channels in the network's order."""

    size: tuple[int, ...]  # C, H, W
    mean: tuple[float, ...]
    std: tuple[float, ...]
    kind: ClassVar[str] = "images"

    def __post_init__(self):
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if len(self.size) != 3 or min(self.size) < 1:
            raise UserError(f"got input_size={list(self.size)}", "[channels, height, width], all at least 1")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.size[0]:
                raise UserError(
                    f"got {name} with {len(getattr(self, name))} entries for {self.size[0]} input channels",
                    "one entry a channel",
                    f"give {name} as a list of {self.size[0]}",
                )
        if min(self.std) <= 0:
            raise UserError(f"got std={list(self.std)}", "numbers above 0")

    def batch_shape(self, num_samples: int) -> tuple[int, ...]:
        return (num_samples, *self.size)

    def batches(self, samples: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """``samples`` [N, ...] in the parts that run at a time."""
        return samples.split(batch_size)

    def example(self, num_samples: int, rng: torch.Generator) -> Tensor:
        """Gaussian noise [N, C, H, W]."""
        return torch.randn(self.batch_shape(num_samples), generator=rng)

    def _per_channel(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [..., C, H, W] (0 to 255) → the float tensor the network takes."""
        return (images.float() / 255 - self._per_channel(self.mean, images)) / self._per_channel(self.std, images)

    def limits(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The normalized values of bytes 0 and 255, [C, 1, 1] each: no real image lies outside."""
        bytes_ = torch.tensor([0, 255], dtype=torch.uint8, device=device).view(2, 1, 1, 1)
        low, high = self.normalize(bytes_.expand(2, self.size[0], 1, 1))
        return low, high

    def to_pixels(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`, rounded and clipped to 0..255, uint8: for looking at images."""
        pixels = images.float() * self._per_channel(self.std, images) + self._per_channel(self.mean, images)
        return (pixels * 255).round().clamp(0, 255).to(torch.uint8)

    def to_dict(self) -> dict[str, Any]:
        return {"size": list(self.size), "mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True)
class TokenSpec:
    """What a language network takes: token ids, int64 [N, T], each from 0 to ``vocab_size`` - 1."""

    vocab_size: int
    length: int  # T of the samples that are made; the network may take others
    kind: ClassVar[str] = "token ids"

    def __post_init__(self):
        for name in ("vocab_size", "length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"got {name}={value}", "a whole number >= 1")

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.length,)

    def batch_shape(self, num_samples: int) -> tuple[int, ...]:
        return (num_samples, *self.size)

    def at_once(self, num_tokens: int, batch_size: int) -> int:
        """Samples of ``num_tokens`` that run at a time, at most ``batch_size``: a token has as many logits as there are
        ids."""
        return max(1, min(batch_size, min(MOST_TOKENS, MOST_LOGITS // self.vocab_size) // max(num_tokens, 1)))

    def batches(self, samples: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """``samples`` [N, T] in the parts that run at a time, of at most ``batch_size``."""
        return samples.split(self.at_once(samples.shape[1], batch_size))

    def example(self, num_samples: int, rng: torch.Generator) -> Tensor:
        """Uniformly random ids [N, T]."""
        return torch.randint(self.vocab_size, self.batch_shape(num_samples), generator=rng)

    def to_dict(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "length": self.length}


AnyInputSpec = InputSpec | TokenSpec


def input_spec_from_dict(values: Mapping[str, Any]) -> AnyInputSpec:
    """The spec whose ``to_dict`` gave ``values``: which one it was, its keys say."""
    for kind in (InputSpec, TokenSpec):
        if values.keys() == {entry.name for entry in fields(kind)}:
            return kind(**values)
    raise UserError(
        f"got an input spec of {', '.join(values) or 'nothing'}",
        "size, mean, std (images) | vocab_size, length (token ids)",
    )


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; a device that is not there is an error that names those that are."""
    available = ["cpu"]
    if torch.cuda.is_available():
        available = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + available
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if str(device) == "auto":
        shared = max(1, len(available) - 1)  # processes on one computer take a GPU each
        return torch.device(available[local_rank() % shared if torch.cuda.is_available() else 0])
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    name = f"cuda:{found.index or 0}" if found is not None and found.type == "cuda" else str(device)
    if found is None or name not in available:
        raise UserError(f"got device={device}", f"auto | {' | '.join(available)} on this machine")
    return torch.device(name)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Teacher:
    """A frozen float network with what is needed to feed it and to understand its outputs.

    Callable on a batch like the network itself. Its parameters require no gradient, so that a gradient with respect
    to the input costs nothing more than that. What comes in half precision, as transformers loads it, is float32 from
    here on, in place: the values are the same, and what is computed with them needs it. ``config`` is what rebuilds it
    (the ``teacher`` part of a configuration), None for a network handed over in Python.
    """

    module: nn.Module
    task: str
    input_spec: AnyInputSpec
    name: str = ""
    config: dict[str, Any] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self):
        if not isinstance(self.module, nn.Module):
            raise UserError(f"got a {type(self.module).__name__} as teacher", "a torch.nn.Module")
        self.name = self.name or type(self.module).__name__
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        empty = [name for name, tensor in tensors if is_lazy(tensor) or tensor.device.type == "meta"]
        if empty:
            raise UserError(
                f"got {self.name}, whose {empty[0]} has no values yet ({len(empty)} such tensors)",
                "a trained network",
                "load its weights (lazy layers: after one forward; the meta device: to_empty() first)",
            )
        self.module.eval().requires_grad_(False)
        if any(t.dtype in HALF for t in (*self.module.parameters(), *self.module.buffers())):
            self.module.float()
        config: Any = getattr(self.module, "config", None)
        if getattr(config, "use_cache", False):  # transformers: keys and values that no later forward would read
            config.use_cache = False
        self.to(self.device)

    def to(self, device: str | torch.device) -> Teacher:
        self.device = resolve_device(device)
        if any(t.device != self.device for t in (*self.module.parameters(), *self.module.buffers())):
            self.module.to(self.device)  # elsewhere not even called: tensors without content can't be swapped
        return self

    def __call__(self, images: Tensor) -> Any:
        """Outputs for a batch on the teacher's device: images [N, C, H, W], differentiable; or token ids [N, T]."""
        with evaluation_mode(self.module):
            return self.module(images.to(self.device, copy=True))  # some networks write into their input

    @cached_property
    def sha256(self) -> str:
        """Hash of all parameters and buffers."""
        return hash_tensors(self.module.state_dict())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters and buffers; tied ones count once."""
        tensors = {id(t): t for t in self.module.state_dict(keep_vars=True).values()}
        return sum(t.numel() * t.element_size() for t in tensors.values())

    def example(self, num_samples: int = 2) -> Tensor:
        """A fixed batch of noise (images) or of random token ids to see how data flows.

        A network of transformers gets short texts: it takes any, and whoever looks keeps every value of a forward.
        """
        example = self.input_spec.example(num_samples, torch.Generator().manual_seed(0))
        if isinstance(self.input_spec, TokenSpec) and hasattr(self.module, "config"):
            example = example[:, :LONGEST_EXAMPLE]
        return example.to(self.device)

    @cached_property
    def dataflow(self) -> Dataflow:
        """What one forward does, see :func:`dfq.hooks.record_dataflow`."""
        try:
            return record_dataflow(self.module, self.example())
        except UserError:
            raise
        except Exception as error:  # whatever a user's forward raises on an input it does not take
            tokens = isinstance(self.input_spec, TokenSpec)
            what, settings = ("token ids", "vocab_size and length") if tokens else ("an input", "teacher.input_size")
            raise UserError(
                f"got an error from {self.name} on {what} of {list(self.input_spec.batch_shape(2))}: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                do=f"check {settings} against what the network takes",
            ) from error

    @cached_property
    def batch_norms(self) -> dict[str, nn.Module]:
        """Name → batch norm with running statistics, of those that ran."""
        ran = {call.name for call in self.dataflow.calls}
        return {
            name: m
            for name, m in self.module.named_modules()
            if isinstance(m, BATCH_NORMS) and m.running_mean is not None and name in ran
        }
