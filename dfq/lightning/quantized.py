"""Quantized networks inside somebody else's LightningModule: found, made, written into its checkpoints, read again.

A LightningModule with a quantized network has a record of it, a :class:`~dfq.student.Student` whose module is that
very network, and a class that derives from its own and writes the record into every checkpoint (under ``"dfq"``):
scheme, what was done to the module tree, and whether ranges are there. What a checkpoint records is done to the module
tree before its weights are loaded, so that ``trainer.test(ckpt_path=...)`` works on a fresh module.

Nothing here imports Lightning: ``lightning`` and ``pytorch_lightning`` are two sets of classes.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dfq
from dfq.calibration import enable
from dfq.errors import UserError, did_you_mean
from dfq.hooks import Dataflow, forward_hooks, record_dataflow
from dfq.lightning.packages import PACKAGES
from dfq.modules import Quantizer, weight_layers
from dfq.scheme import Scheme
from dfq.student import Student, Surgery
from dfq.teacher import InputSpec, hash_tensors

KEY, SCHEMA_VERSION = "dfq", 1  # of a checkpoint
RECORDS = "quantized_networks"  # attribute of a LightningModule: name of the network → Student
FLOAT = "float_networks"  # another: name → the network as it was before, frozen, for distillation; in no checkpoint
ITSELF = "."  # the name of a network that is the LightningModule itself


def is_lightning_class(kind: Any) -> bool:
    """Whether it is a LightningModule of either package; none is imported to know."""
    mro = kind.__mro__ if isinstance(kind, type) else ()
    return any(c.__name__ == "LightningModule" and c.__module__.startswith(PACKAGES) for c in mro)


# ------------------------------------------------------------------------------------------------ finding


def find_network(module: nn.Module, attribute: str | None) -> str:
    """The name of the network in a LightningModule: ``attribute`` if it is one, else the only part that has weights.

    ``.`` is the LightningModule itself, where it calls its layers in its own ``forward``.
    """
    parts = [name for name, child in module.named_children() if weight_layers(child)]
    kind = type(module).__name__
    if attribute is not None:
        if attribute == ITSELF:
            return attribute
        try:
            module.get_submodule(attribute)
        except AttributeError:
            known = [name for name, _ in module.named_children()]
            raise UserError(
                f"got attribute={attribute} and a {kind}, which has no such part",
                " | ".join([*known, ITSELF]),
                did_you_mean(attribute, known),
            ) from None
        return attribute
    if len(parts) == 1:
        return parts[0]
    if parts and not _has_forward(module):
        raise _ambiguous(module, parts)
    if not parts:
        raise UserError(
            f"got a {kind} without a layer that has weights",
            "a network that is made in __init__ or configure_model, not in setup",
        )
    return ITSELF


def _has_forward(module: nn.Module) -> bool:
    return not type(module).forward.__module__.startswith((*PACKAGES, "torch."))


def _ambiguous(module: nn.Module, parts: list[str]) -> UserError:
    return UserError(
        f"got a {type(module).__name__} with several networks: {', '.join(parts)}",
        f"attribute={' | '.join([*parts, ITSELF])}",
        f"name the one to quantize; {ITSELF} is all that its own forward calls",
    )


def network_of(module: nn.Module, attribute: str) -> nn.Module:
    """The network itself, also where torch.compile has wrapped it."""
    found = module if attribute == ITSELF else module.get_submodule(attribute)
    return getattr(found, "_orig_mod", found)


def dataflow_of(network: nn.Module, example: Tensor) -> Dataflow:
    """What a forward does; a UserError if the network does not take ``example``."""
    try:
        return record_dataflow(network, example)
    except UserError:
        raise
    except Exception as error:  # whatever a user's forward raises on an input it does not take
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            f"got an error from {type(network).__name__} on an input of {list(example.shape)}: "
            f"{type(error).__name__}: {reason}",
            "a network that takes one tensor",
            "give one that it takes as example=",
        ) from error


# ------------------------------------------------------------------------------------------------ making


def records(module: nn.Module) -> dict[str, Student]:
    """Name → the quantized network of that name."""
    return vars(module).get(RECORDS, {})


@dataclass(frozen=True)
class Frozen:
    """A network that is no part of the module that holds it; copies of the module (averages of weights) share it."""

    network: nn.Module

    def __deepcopy__(self, _memo: dict) -> Frozen:
        return self


def keep_float(module: nn.Module, attribute: str | None) -> None:
    """Keep a frozen copy of a LightningModule's network with it, to distil from."""
    name = find_network(module, attribute)
    network = copy.deepcopy(network_of(module, name)).eval().requires_grad_(False)
    vars(module).setdefault(FLOAT, {})[name] = Frozen(network)


def float_network(module: nn.Module, name: str) -> nn.Module | None:
    """What :func:`keep_float` has kept."""
    kept = vars(module).get(FLOAT, {}).get(name)
    return None if kept is None else kept.network


def quantize_in_place(
    module: nn.Module,
    attribute: str | None,
    scheme: Scheme,
    example: Tensor,
    fold: bool = True,
    describe: dict[str, Any] | None = None,
) -> Student:
    """Swap the layers of a LightningModule's network, which computes what it did until it is calibrated.

    Args:
        attribute: see :func:`find_network`.
        example: what the network takes, [N, ...].
        fold: batch norms into the layers before them.
        describe: ``task``, ``input_spec`` and ``config`` of the record, where they are known.
    """
    name = find_network(module, attribute)
    network = network_of(module, name)
    example = example.to(next(network.parameters()).device)
    flow = dataflow_of(network, example)
    if attribute is None and name == ITSELF:
        ran = {call.name.partition(".")[0] for call in flow.calls}
        parts = [child for child, part in module.named_children() if weight_layers(part)]
        if set(parts) - ran:
            raise _ambiguous(module, parts)
    spec = None
    if example.dim() == 4 and example.is_floating_point():
        channels = example.shape[1]
        spec = InputSpec(tuple(example.shape[1:]), (0.0,) * channels, (1.0,) * channels).to_dict()
    teacher = {
        "name": type(network).__name__,
        "sha256": hash_tensors(network.state_dict()),
        "task": "classification",
        "input_spec": spec,
        "config": None,
        **{key: value for key, value in (describe or {}).items() if value is not None},
    }
    changed = copy.deepcopy(network)  # a network that can't be quantized stays as it is
    surgery = Surgery.perform(changed, scheme, example, flow, fold)
    surgery.repeat(network)
    network.load_state_dict(changed.state_dict())
    student = Student(network, scheme, surgery, teacher)
    remember(module, name, student)
    return student


def remember(module: nn.Module, name: str, student: Student) -> None:
    """Keep the record of a quantized network with its LightningModule, which writes it into checkpoints from now on."""
    write_records(module)
    vars(module).setdefault(RECORDS, {})[name] = student


def elements_per_sample(student: Student, example: Tensor) -> dict[str, int]:
    """Name of each activation quantizer → elements that it rounds in one sample of ``example``."""
    found: dict[str, int] = {}

    def look(name: str, _module: nn.Module, inputs: tuple) -> None:
        found[name] = found.get(name, 0) + inputs[0].numel()

    with torch.no_grad(), forward_hooks(student.activation_quantizers.items(), before=look):
        student(example[:1])
    return found


def student_of(module: nn.Module, attribute: str | None = None) -> Student:
    """A frozen copy of a LightningModule's quantized network: to evaluate, to export, to save.

    Args:
        attribute: its name, if there are several.
    """
    found = records(module)
    if not found or (attribute is None and len(found) > 1) or attribute not in (None, *found):
        raise UserError(
            f"got a {type(module).__name__} "
            + (f"and attribute={attribute}" if found else "in which nothing is quantized"),
            " | ".join(found) or "one that dfq.quantize or a QuantizationCallback has quantized",
        )
    student = found[attribute if attribute is not None else next(iter(found))]
    if not student.has_grids:
        raise UserError(
            f"got a {type(module).__name__} whose ranges are not there yet",
            do="fit it with the QuantizationCallback, past its start_step",
        )
    return copy.deepcopy(student).freeze()


# ------------------------------------------------------------------------------------------------ checkpoints


class QuantizedModuleMixin:
    """``class Mine(QuantizedModuleMixin, LightningModule)``: ``Mine.load_from_checkpoint`` reads quantized checkpoints.

    Unquantized ones are read as ever. A ``on_load_checkpoint`` or ``on_save_checkpoint`` of your own has to call its
    ``super()``. A module without it that a :class:`~dfq.lightning.QuantizationCallback` has quantized gets it then.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]  # of the LightningModule this is mixed into
        assert isinstance(self, nn.Module)
        if records(self):
            checkpoint[KEY] = to_record(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert isinstance(self, nn.Module)
        restore(self, checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def write_records(module: nn.Module) -> None:
    """Give a LightningModule the mixin, if its class lacks it."""
    if not isinstance(module, QuantizedModuleMixin):
        module.__class__ = _with_records(type(module))  # type: ignore[arg-type]  # mypy: a type is no Hashable


@functools.cache
def _with_records(kind: Any) -> Any:
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (QuantizedModuleMixin, kind), own)


def to_record(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds beside the tensors; plain json."""
    kind = type(module)  # one that was made here goes by the name of the class it derives from
    value = {
        "format": "dfq.lightning",
        "schema_version": SCHEMA_VERSION,
        "dfq_version": dfq.__version__,
        "module": f"{kind.__module__}:{kind.__qualname__}",
        "networks": {
            name: {
                "teacher": student.teacher,
                "scheme": student.scheme.to_dict(),
                **student.surgery.to_dict(),
                "settings": student.settings,
                "enabled": [key for key, part in _quantizers(student) if part.enabled],
                "learned": {
                    key: {"names": list(part._parameters), "gradient_scale": part.gradient_scale, "stable": part.stable}
                    for key, part in _quantizers(student)
                    if part._parameters
                },
            }
            for name, student in records(module).items()
        },
    }
    return json.loads(json.dumps(value))


def _quantizers(student: Student) -> Iterator[tuple[str, Quantizer]]:
    for name, part in student.module.named_modules():
        if isinstance(part, Quantizer):
            yield name, part


def read_record(checkpoint: dict[str, Any], where: str = "the checkpoint") -> dict[str, Any]:
    """The checked record of a checkpoint."""
    record = checkpoint.get(KEY)
    if not isinstance(record, dict) or record.get("format") != "dfq.lightning":
        raise UserError(f"got {where}, in which nothing is quantized", "a checkpoint of a quantized LightningModule")
    if record["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"got {where} of schema version {record['schema_version']}",
            f"at most {SCHEMA_VERSION}",
            "install a newer dfq to read it",
        )
    return record


def read_checkpoint(path: str | os.PathLike, key: str = "path") -> dict[str, Any]:
    """What a Trainer wrote, without unpickling objects; ``key`` is what the path is called in errors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"got {key}={path}, which does not exist", "a .ckpt file that a Trainer wrote") from None
    except Exception as error:  # torch's reader of a file that is none of its own raises nearly anything
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        if "weights only" in reason.lower() or "unsupported" in str(error).lower():
            raise UserError(
                f"got {key}={path}, which holds pickled objects, and dfq never unpickles",
                "tensors and plain values",
                "keep objects out of save_hyperparameters (its ignore=[...])",
            ) from None
        raise UserError(f"got {key}={path}, which can't be read ({reason})", "a .ckpt file of a Trainer") from None
    if not isinstance(content, dict) or "state_dict" not in content or "pytorch-lightning_version" not in content:
        raise UserError(f"got {key}={path}, which no Trainer wrote", "a .ckpt file of a Trainer")
    return content


def load_module(kind: Any, path: str | os.PathLike, key: str, arguments: str, given: Mapping[str, Any]) -> Any:
    """``kind.load_from_checkpoint``, of quantized networks too; a UserError says what does not fit.

    Args:
        kind: the LightningModule's class.
        given: arguments of it beyond the checkpoint's hyper-parameters.
        key, arguments: what the path and ``given`` are called in errors.
    """
    name = kind.__name__
    try:
        reader = kind if issubclass(kind, QuantizedModuleMixin) else _with_records(kind)
        return reader.load_from_checkpoint(path, map_location="cpu", weights_only=True, **given)
    except UserError:
        raise
    except TypeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"got {key}={path}, with which {name} can't be made ({reason})",
            "hyper-parameters that the class takes",
            f"give the others as {arguments}, or have {name} call save_hyperparameters()",
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"got {key}={path} and a {name} that it does not fit ({reason})") from error


def restore(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Do to a LightningModule what was done to the one that ``checkpoint`` is of; its weights are loaded after this.

    Nothing is done where nothing is quantized on either side.
    """
    have = records(module)
    if KEY not in checkpoint:
        if have and not any(_has_grids(name, checkpoint) for name in have):
            raise UserError(
                f"got a checkpoint in which nothing is quantized, for a {type(module).__name__} that is",
                "a checkpoint that was written with the QuantizationCallback",
                "load float weights before: Module.load_from_checkpoint(path), then trainer.fit without ckpt_path",
            )
        return
    for name, values in read_record(checkpoint)["networks"].items():
        scheme, surgery = Scheme.from_dict(values["scheme"]), Surgery.from_dict(values)
        student = have.get(name)
        if student is None:
            find_network(module, name)
            student = _repeat(module, name, scheme, surgery, values["teacher"])
        elif not _is_same(student, values):
            raise UserError(
                f"got a checkpoint of a network quantized with {_label(scheme, surgery)} and one quantized with "
                f"{_label(student.scheme, student.surgery)}",
                "the same scheme and network",
                "give the callback the settings that the checkpoint was made with, or start without ckpt_path",
            )
        student.teacher = values["teacher"]
        student.settings = {**values["settings"], **student.settings}
        _take_over(student, values)


def _has_grids(name: str, checkpoint: dict[str, Any]) -> bool:
    prefix = "" if name == ITSELF else f"{name}."
    return any(key.startswith(prefix) and "_quantizer." in key for key in checkpoint["state_dict"])


def _is_same(student: Student, values: dict[str, Any]) -> bool:
    mine = json.loads(json.dumps({"scheme": student.scheme.to_dict(), **student.surgery.to_dict()}))
    return all(values.get(key) == value for key, value in mine.items())


def _label(scheme: Scheme, surgery: Surgery) -> str:
    return f"{scheme.name or 'a scheme of its own'}, policy {scheme.policy} ({len(surgery.swap.layers)} layers)"


def _repeat(module: nn.Module, name: str, scheme: Scheme, surgery: Surgery, teacher: dict[str, Any]) -> Student:
    network = network_of(module, name)
    try:
        surgery.repeat(network)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"got a checkpoint of {teacher['name']} and a {type(module).__name__} whose layers differ "
            f"({str(error).splitlines()[0]})",
            do="load it into the class it was written from, made with the same arguments",
        ) from error
    student = Student(network, scheme, surgery, teacher)
    remember(module, name, student)
    return student


def _take_over(student: Student, values: dict[str, Any]) -> None:
    """Whether quantizers round, and which of their tensors are parameters: no tensor says so."""
    enabled, learned = set(values["enabled"]), values["learned"]
    for name, part in _quantizers(student):
        part.enabled = name in enabled
        how = learned.get(name, {"names": []})
        for key in how["names"]:
            if key in part._buffers:
                start = part._buffers.pop(key)
                part.register_parameter(key, nn.Parameter(start.float()))
            part.gradient_scale, part.stable = how["gradient_scale"], how["stable"]


def replace_network(module: nn.Module, name: str, student: Student) -> None:
    """Make a LightningModule's float network the one of ``student``, in place: layers, grids and weights."""
    network = network_of(module, name)
    student.surgery.repeat(network)
    network.load_state_dict(student.module.state_dict())
    modes, trained = list(network.modules()), [p for p in network.parameters() if p.requires_grad]
    training = [part.training for part in modes]
    mine = Student(network, student.scheme, student.surgery, student.teacher)
    mine.settings, mine.seconds = student.settings, student.seconds
    enable(mine, True)
    mine.freeze()
    for parameter in trained:  # it is to be trained as it was before
        parameter.requires_grad_(True)
    for part, mode in zip(modes, training, strict=True):
        part.training = mode
    remember(module, name, mine)
