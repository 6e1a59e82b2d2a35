"""What a network has to have for a generator, and which generators do with what it has."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from dfq.errors import UserError
from dfq.generators._attention import has_attention
from dfq.generators._base import Generator
from dfq.generators._norms import has_norm
from dfq.settings import choices, load
from dfq.teacher import Teacher

NEEDS: dict[str, tuple[str, Callable[[Teacher], bool]]] = {
    "needs_batch_norm": ("batch norm", lambda teacher: bool(teacher.batch_norms)),
    "needs_norm": ("normalization that has statistics or a weight", has_norm),
    "needs_attention": ("attention between patches", has_attention),
    "needs_boxes": ("boxes among its outputs", lambda teacher: teacher.task == "detection"),
}


def check_needs(teacher: Teacher, generator: Generator, name: str, does: str) -> None:
    """A UserError that names the generators that would work, if the network lacks what ``generator`` ``does`` it to."""
    teacher.dataflow  # noqa: B018  # the error of a network that does not take its input is told there
    for attribute, (what, has) in NEEDS.items():
        if getattr(generator, attribute) and not has(teacher):
            raise UserError(
                f"got a network without {what} ({teacher.name}), and {name} {does}",
                " | ".join(f"generator={other}" for other in _working(teacher)),
            )


def _working(teacher: Teacher) -> list[str]:
    """Names of the generators that work on the network."""
    found = {attribute: has(teacher) for attribute, (_, has) in NEEDS.items()}
    names = []
    for name in choices("generator"):
        module, _, attribute = load("generator", name)["_target_"].rpartition(".")
        generator = getattr(import_module(module), attribute)
        has_all = all(there or not getattr(generator, need) for need, there in found.items())
        if has_all and generator.kind == teacher.input_spec.kind:
            names.append(name)
    return names
