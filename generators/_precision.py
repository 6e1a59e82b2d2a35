"""In which arithmetic the teacher runs while images are made; and which is faster here.

Mixed precision is autocast's: products of matrices and convolutions in bfloat16, whose exponents are those of float32,
so that no gradient is lost and no loss has to be scaled (as it would in float16). Images, statistics, losses and steps
stay in float32. What it is worth depends on the device: on a CPU without units for it a step is many times slower.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.generators._base import Generator, batch_rng
from dfq.generators._memory import COUNTED
from dfq.progress import say
from dfq.sites import map_tensors
from dfq.teacher import Teacher

Precision = Literal["float32", "bfloat16", "auto"]
MEASURED = ("float32", "bfloat16")
MOST_SAMPLES = 32  # that are made to tell which is faster


@contextmanager
def arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """A forward of the teacher in it; ``auto`` is float32 until :func:`faster_precision` has said otherwise."""
    if precision != "bfloat16":
        yield
        return
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    except UserError:
        raise
    except Exception as error:  # whatever a device lacks, or a forward that mixes kinds of numbers
        reason = str(error).strip().splitlines()
        raise UserError(
            f"got generator.precision=bfloat16 and a network that does not run in it on {device.type} "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'})",
            "generator.precision=float32",
        ) from error


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """For what is measured in the middle of such a forward, of maps made float32; once a layer and step, so that it
    costs nothing where there is no such arithmetic."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def as_float(outputs: Any) -> Any:
    """A tensor, or a network's outputs, with float32 in place of bfloat16; what transformers return comes as a dict."""
    found = dict(outputs) if hasattr(outputs, "to_tuple") else outputs
    return map_tensors(lambda x: x.float() if x.dtype == torch.bfloat16 else x, found)


def faster_precision(generator: Generator, teacher: Teacher) -> Precision:
    """The precision in which ``generator`` makes some images faster, as a line says.

    Measured, so that it may be another one on another machine, or on a busy one; who makes images records it.
    """
    try:
        seconds = {precision: _seconds(generator, teacher, precision) for precision in MEASURED}
    except UserError as error:
        say(f"generate: in float32 ({error})")
        return "float32"
    found: Precision = "bfloat16" if seconds["bfloat16"] < seconds["float32"] else "float32"
    told = " and ".join(f"{each:.3g} s in {precision}" for precision, each in seconds.items())
    say(f"generate: in {found}; some steps took {told}")
    return found


def _seconds(generator: Generator, teacher: Teacher, precision: str) -> float:
    """Of a short run, the second one: the first prepares kernels."""
    short = generator.with_known({**COUNTED, "precision": precision})
    count = MOST_SAMPLES if generator.batch_size == "auto" else min(MOST_SAMPLES, generator.batch_size)
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        made = short.sample(teacher, count, batch_rng(0, 0), lambda amount, note="": None)
        (made if isinstance(made, Tensor) else made["images"]).cpu()  # waits for the device
    return time.perf_counter() - start
