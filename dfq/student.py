"""Student: the teacher's own module tree with batch norm folded and quantized layers swapped in; save and load.

::

    DIR/student.json          scheme, layers, how to rebuild the teacher, what made it, checksum
    DIR/student.safetensors   packed integer weights (4-bit weights take half a byte), scales, and what stays float
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dfq
from dfq import dataset as store
from dfq.dataset import write_json
from dfq.errors import UserError
from dfq.hooks import Dataflow, evaluation_mode, record_dataflow
from dfq.modules import (
    LowRankCorrection,
    QuantizedLayer,
    Quantizer,
    Swap,
    find_foldable,
    fold_batch_norm,
    functional_uses,
    quantized_layers,
    share_tied_grids,
    swap_layer,
    swap_layers,
)
from dfq.quantization import dequantize, from_groups, pack, quantize, tensor_scale, to_groups, unpack
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.sites import HOLDER, Sites, find_sites, place_sites
from dfq.surgery import Experts, apply, prepare
from dfq.teacher import AnyInputSpec, InputSpec, Teacher, hash_tensors, input_spec_from_dict
from dfq.weights import copy_network

SCHEMA_VERSION = 2
CODES = ".weight_codes"
SCALE, TENSOR_SCALE = ".weight_quantizer.scale", ".weight_quantizer.tensor_scale"


@dataclass(frozen=True)
class Rescaled:
    """What equalization has done to a layer: it makes y / scale - shift of x * input_scale, where the teacher's makes y
    of x.

    Shapes: ``scale`` and ``shift`` [O], ``input_scale`` [I]; float64, on the CPU.
    """

    scale: Tensor
    shift: Tensor
    input_scale: Tensor


@dataclass
class Surgery:
    """What was done to the teacher's module tree, in this order; enough to do it again without running anything."""

    rewrites: list[tuple[str, str]]  # (module, kind): attention taken apart, and the like
    folded: list[tuple[str, str]]  # (layer, batch norm)
    swap: Swap
    sites: Sites
    rescaled: dict[str, Rescaled] = field(default_factory=dict, compare=False)  # layer → what equalization did to it
    rotated: bool = field(default=False, compare=False)  # outputs of layers are the teacher's in other coordinates
    corrections: dict[str, tuple[int, str]] = field(default_factory=dict, compare=False)  # layer → rank, format (LQER)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rewrites": self.rewrites,
            "folded": self.folded,
            "layers": {
                name: {"weight": asdict(w), "activation": asdict(a)} for name, (w, a) in self.swap.layers.items()
            },
            "kept_float": self.swap.kept_float,
            "sites": {path: asdict(scheme) for path, scheme in self.sites.quantizers.items()},
            "aliases": self.sites.aliases,
            "layer_inputs": self.sites.layer_inputs,
            "integer_bias": self.sites.has_integer_bias,
            **({"site_axes": self.sites.feature_axes} if self.sites.feature_axes else {}),
            **({"rotated": True} if self.rotated else {}),
            **({"corrections": self.corrections} if self.corrections else {}),
            "rescaled": {
                name: {part: values.tolist() for part, values in vars(record).items()}
                for name, record in self.rescaled.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Surgery:
        layers = {
            name: (TensorScheme(**entry["weight"]), TensorScheme(**entry["activation"]))
            for name, entry in values["layers"].items()
        }
        quantizers = {path: TensorScheme(**scheme) for path, scheme in values["sites"].items()}
        rescaled = {
            name: Rescaled(**{part: torch.tensor(numbers, dtype=torch.float64) for part, numbers in record.items()})
            for name, record in values.get("rescaled", {}).items()  # not in students from before it
        }
        return cls(
            [(name, kind) for name, kind in values["rewrites"]],
            [(layer, norm) for layer, norm in values["folded"]],
            Swap(layers, dict(values["kept_float"])),
            Sites(
                quantizers,
                dict(values["aliases"]),
                dict(values["layer_inputs"]),
                values["integer_bias"],
                dict(values.get("site_axes", {})),  # not in students from before it
            ),
            rescaled,
            values.get("rotated", False),
            {name: (rank, form) for name, (rank, form) in values.get("corrections", {}).items()},
        )

    @classmethod
    def perform(
        cls, module: nn.Module, scheme: Scheme, example: Tensor, flow: Dataflow | None = None, fold: bool = True
    ) -> Surgery:
        """Turn a float network into a quantized one, in place; its quantizers have no grid yet.

        Args:
            example: what it takes, to see how data flows.
            flow: what :func:`~dfq.hooks.record_dataflow` says of both, where it is known.
            fold: batch norms into the layers before them.
        """
        rewrites = prepare(module)
        if rewrites or flow is None:
            flow = record_dataflow(module, example)
        folded = find_foldable(module, flow) if fold else []
        fold_batch_norm(module, folded)
        after = record_dataflow(module, example) if folded else flow  # without the folded ones' operations
        functional = functional_uses(module, after)
        swap = swap_layers(module, scheme, flow)
        sites = find_sites(scheme, swap, after, functional)
        place_sites(module, sites)
        return cls(rewrites, folded, swap, sites)

    def repeat(self, module: nn.Module) -> nn.Module:
        """The same on a fresh copy of the network; AttributeError and the like if it is another network."""
        apply(module, self.rewrites)
        fold_batch_norm(module, self.folded)
        for name, schemes in self.swap.layers.items():
            swap_layer(module.get_submodule(name), *schemes)
        share_tied_grids(module)
        for name, (rank, form) in self.corrections.items():
            layer = module.get_submodule(name)
            assert isinstance(layer, QuantizedLayer)
            outputs, inputs = layer.weight.shape
            like = {"dtype": getattr(torch, form), "device": layer.weight.device}
            layer.correction = LowRankCorrection(torch.zeros(rank, inputs, **like), torch.zeros(outputs, rank, **like))
        return place_sites(module, self.sites)


class Student:
    """A network whose weight layers are quantized; callable on the same batches as its teacher.

    Attributes:
        module: the network. Freshly made, its quantizers have no grid and it computes what the teacher computes.
        surgery: how its module tree came out of the teacher's, or of that of ``network``.
        network: package.module:function that builds the network it is made of; None: its teacher's own.
        settings: what made it (algorithm, dataset, seed, ...), any json-able mapping.
        seconds: how long that took.
        unreached: layers of a mixture's experts that no token chose during calibration.
    """

    def __init__(self, module: nn.Module, scheme: Scheme, surgery: Surgery, teacher: dict[str, Any]):
        self.module, self.scheme, self.surgery, self.teacher = module, scheme, surgery, teacher
        self.network: str | None = None
        self.settings: dict[str, Any] = {}
        self.seconds = 0.0
        self.unreached: list[str] = []

    @classmethod
    def from_teacher(cls, teacher: Teacher, scheme: Scheme) -> Student:
        """A copy of the teacher, prepared, batch norm folded, every weight layer swapped; nothing has a grid yet."""
        module, flow = copy_network(teacher.module), teacher.dataflow
        return cls(module, scheme, Surgery.perform(module, scheme, teacher.example(), flow), _describe(teacher))

    def become(self, other: Student) -> None:
        """The same student of the same teacher as ``other``: for what makes another one and has to hand over this."""
        self.module, self.surgery, self.network = other.module, other.surgery, other.network
        self.unreached = other.unreached

    @property
    def swap(self) -> Swap:
        """Layers in call order with their schemes, and those kept float with the reason."""
        return self.surgery.swap

    @property
    def activation_quantizers(self) -> dict[str, Quantizer]:
        """Name → quantizer of a layer's input or of a site; each once, where one serves several."""
        weights = {id(layer.weight_quantizer) for layer in self.layers.values()}
        return {
            name: part
            for name, part in self.module.named_modules()
            if isinstance(part, Quantizer) and id(part) not in weights
        }

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """Name → quantized layer, in call order."""
        found = quantized_layers(self.module)
        return {name: found[name] for name in self.swap.layers}

    @property
    def expert_layers(self) -> dict[str, str]:
        """Quantized layer of a mixture's expert → what its siblings share: the name without the expert's number."""
        found = {}
        for name in self.swap.layers:
            owner, _, layer = name.rpartition(".")
            mixture, _, number = owner.rpartition(".")
            if number.isdigit() and isinstance(self.module.get_submodule(mixture), Experts):
                found[name] = f"{mixture}.*.{layer}"
        return found

    @property
    def has_grids(self) -> bool:
        """Whether an algorithm has given every quantizer its grid."""
        parts = [part for part in self.module.modules() if isinstance(part, Quantizer)]
        return all(part.enabled for part in parts)

    @property
    def input_spec(self) -> AnyInputSpec:
        return input_spec_from_dict(self.teacher["input_spec"])

    def batches(self, samples: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """``samples`` [N, ...] in the parts that run at a time; also where nothing is known of the input."""
        known = self.teacher["input_spec"] is not None
        return self.input_spec.batches(samples, batch_size) if known else samples.split(batch_size)

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).weight.device

    def in_its_units(self, name: str, output: Tensor) -> Tensor:
        """What ``name`` makes where the teacher's makes ``output``: a layer that was rescaled has other units."""
        record = self.surgery.rescaled.get(name)
        if record is None:
            return output
        shape = (-1, *[1] * (self.layers[name].weight.dim() - 2))
        return output / record.scale.to(output).view(shape) - record.shift.to(output).view(shape)

    def __call__(self, images: Tensor) -> Any:
        with evaluation_mode(self.module):
            return self.module(images.to(self.device, copy=True))  # some networks write into their input

    @torch.no_grad()
    def freeze(self) -> Student:
        """Put every weight on its grid and stop all training: what is in memory is then exactly what is saved."""
        for part in self.module.modules():
            if isinstance(part, Quantizer):
                part.freeze()
        for layer in self.layers.values():
            layer.weight.copy_(layer.weight_quantizer(layer.weight))
            if layer.bias_quantizer is not None and layer.bias is not None:
                layer.bias.copy_(layer.bias_quantizer(layer.bias, layer))
        self.module.eval().requires_grad_(False)
        return self

    @property
    def mean_weight_bits(self) -> float:
        """Bits per weight, averaged over all weights of the quantized layers."""
        weights = {id(layer.weight): (layer.weight.numel(), name) for name, layer in self.layers.items()}
        bits = sum(
            count * (32 if self.swap.layers[name][0].is_float else self.swap.layers[name][0].bits_per_value)
            for count, name in weights.values()
        )
        return bits / sum(count for count, _ in weights.values())

    @property
    def sha256(self) -> str:
        """Hash of what decides its outputs: codes, scales, what stays float, and how they are used.

        Tensors alone do not tell students apart: grids that are found as the network runs (per token) have none.
        """
        use = {"network": self.network, "scheme": self.scheme.to_dict(), **self.surgery.to_dict()}
        stored = hashlib.sha256(hash_tensors(self.tensors()).encode())
        stored.update(json.dumps(use, sort_keys=True).encode())
        return stored.hexdigest()

    def integer_weight(self, name: str) -> Tensor:
        """Integer codes (int32, weight-shaped) of a quantized layer."""
        layer = self.layers[name]
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach()
        if quantizer.scheme.group_size is None:
            return quantize(weight, scale, zero_point, quantizer.scheme, quantizer.axis)
        assert quantizer.axis is not None
        groups = to_groups(weight, quantizer.axis, quantizer.scheme.group_size)
        codes = quantize(groups, scale[..., None], zero_point[..., None], quantizer.scheme)
        return from_groups(codes, quantizer.axis, weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: packed codes for quantized weights, every other entry of the state as it is, each once."""
        names = _once(self.module)
        state = {name: t.detach().cpu() for name, t in self.module.state_dict().items() if name in names}
        for name, (weight_scheme, _) in self.swap.layers.items():
            layer = self.layers[name]
            if not (layer.weight_quantizer.enabled and layer.input_quantizer.enabled):
                raise UserError(
                    f"got a student whose layer {name} has no grid yet", do="run an algorithm on it before saving"
                )
            if weight_scheme.is_float or f"{name}.weight" not in state:
                continue  # tied: stored with the first layer that has it
            del state[f"{name}.weight"]
            if weight_scheme.symmetric:
                del state[f"{name}.weight_quantizer.zero_point"]  # zero by definition
            state[name + CODES] = pack(self.integer_weight(name), weight_scheme)
            _pack_scale(name, weight_scheme, state)
        # Codes are no one else's.
        return {name: t if name.endswith(CODES) else t.clone().contiguous() for name, t in state.items()}

    def save(self, path: str | os.PathLike) -> Path:
        """Write the folder; ``student.json`` comes last, so that a folder with one is whole."""
        path = Path(path)
        file, tensors = path / "student.safetensors", self.tensors()
        (path / "student.json").unlink(missing_ok=True)
        with store.atomic(file) as temporary:
            save_file(tensors, temporary)
        manifest = {
            "format": "dfq.student",
            "schema_version": SCHEMA_VERSION,
            "dfq_version": dfq.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "teacher": self.teacher,
            "network": self.network,
            "scheme": self.scheme.to_dict(),
            **self.surgery.to_dict(),
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
            **({"unreached": self.unreached} if self.unreached else {}),
            "mean_weight_bits": self.mean_weight_bits,
            "size_bytes": file.stat().st_size,
            "sha256": store.file_sha256(file),
        }
        write_json(path / "student.json", manifest)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike, teacher: Teacher) -> Student:
        """The student saved in ``path``: the same outputs, bit for bit.

        Args:
            teacher: gives the module tree (only its structure is used), unless the student has a network of its own.
        """
        path = Path(path)
        manifest = read_manifest(path)
        file = path / "student.safetensors"
        if not file.exists() or store.file_sha256(file) != manifest["sha256"]:
            raise UserError(
                f"got {file}, whose content does not match its checksum",
                do="run the same quantize command again with another student_dir",
            )
        try:
            tensors = load_file(file)  # mapped: what is unpacked is read layer by layer
        except SafetensorError as error:
            raise UserError(f"got {file}, which is no safetensors file ({error})") from None
        network = manifest.get("network")  # not in students from before it
        fresh = copy_network(teacher.module) if network is None else build_network(network, manifest["teacher"]).module
        try:
            surgery = Surgery.from_dict(manifest)
            module = surgery.repeat(fresh)
            student = cls(module, Scheme.from_dict(manifest["scheme"]), surgery, manifest["teacher"])
            unpacked = {
                f"{name}.weight"
                for name, (weight_scheme, _) in surgery.swap.layers.items()
                if student._unpack_weight(name, weight_scheme, tensors)
            }
            state = OrderedDict(tensors)
            state._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]  # versions, which some modules ask
            missing, unexpected = module.load_state_dict(state, strict=False)
            names = _once(module) - unpacked
            missing = [name for name in missing if name in names]
            if missing or unexpected:
                raise KeyError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            whose, do = f"the teacher {teacher.name}", "load it with the teacher it was made from"
            if network is not None:
                whose, do = f"the network that {network} builds", "have it build what it built then"
            raise UserError(
                f"got a student of {manifest['teacher']['name']} and {whose}, whose layers differ "
                f"({str(error).splitlines()[0]})",
                do=do,
            ) from error
        student.network = network
        for part in student.module.modules():
            if isinstance(part, Quantizer):
                part.enabled = True
        student.settings, student.seconds = manifest["settings"], manifest["seconds"]
        student.unreached = list(manifest.get("unreached", []))  # not in students from before it
        student.module.to(teacher.device)
        return student.freeze()

    def _unpack_weight(self, name: str, scheme: TensorScheme, tensors: dict[str, Tensor]) -> bool:
        """Take the codes out of ``tensors``, into the layer's weight, and leave the grid as the module's state has it.

        False where there are none: a float weight, or one tied to a layer before.
        """
        if scheme.is_float or name + CODES not in tensors:
            return False
        layer = self.module.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        quantizer = layer.weight_quantizer
        codes = unpack(tensors.pop(name + CODES), scheme, tuple(layer.weight.shape))
        _unpack_scale(name, scheme, tensors)
        scale = tensors[name + SCALE]
        zero_point = tensors.setdefault(
            f"{name}.weight_quantizer.zero_point", torch.zeros_like(scale, dtype=torch.int32)
        )
        if scheme.group_size is None:
            weight = dequantize(codes, scale, zero_point, scheme, quantizer.axis)
        else:
            assert quantizer.axis is not None
            groups = to_groups(codes, quantizer.axis, scheme.group_size)
            values = dequantize(groups, scale[..., None], zero_point[..., None], scheme)
            weight = from_groups(values, quantizer.axis, codes.shape)
        layer.weight.data.copy_(weight)
        return True


def _once(module: nn.Module) -> set[str]:
    """Names of parameters and buffers, of those that are there twice (shared modules, tied weights) the first one.

    A quantizer that serves a layer and a site goes by the layer's name.
    """
    found: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in sorted(named, key=lambda pair: HOLDER in pair[0].split(".")):
        found.setdefault(id(tensor), name)
    return set(found.values())


def _pack_scale(name: str, scheme: TensorScheme, state: dict[str, Tensor]) -> None:
    """A scale in the format of its scheme: float16 two bytes, e8m0 one, e4m3 one beside a float32 for the tensor."""
    scale = state[name + SCALE]
    if scheme.scale_format == "e8m0":
        state[name + SCALE] = (torch.log2(scale).round() + 127).clamp(0, 254).to(torch.uint8)
    elif scheme.scale_format == "e4m3":
        state[name + TENSOR_SCALE] = tensor_scale(scale)
        state[name + SCALE] = (scale / state[name + TENSOR_SCALE]).to(torch.float8_e4m3fn)
    elif scheme.scale_format == "float16":
        state[name + SCALE] = scale.half()


def _unpack_scale(name: str, scheme: TensorScheme, tensors: dict[str, Tensor]) -> None:
    scale = tensors[name + SCALE]
    if scheme.scale_format == "e8m0":
        tensors[name + SCALE] = torch.exp2(scale.float() - 127)
    elif scheme.scale_format == "e4m3":
        tensors[name + SCALE] = scale.float() * tensors.pop(name + TENSOR_SCALE)
    elif scheme.scale_format == "float16":
        tensors[name + SCALE] = scale.float()


def _describe(teacher: Teacher) -> dict[str, Any]:
    return json.loads(
        json.dumps(
            {
                "name": teacher.name,
                "sha256": teacher.sha256,
                "task": teacher.task,
                "input_spec": teacher.input_spec.to_dict(),
                "config": teacher.config,
            }
        )
    )


def build_network(factory: str, teacher: Mapping[str, Any]) -> Teacher:
    """The network of a student that is not made of its teacher's (``Student.network``), as a teacher of its own.

    Args:
        teacher: what ``Student.teacher`` holds; the network takes the same images and is for the same task.
    """
    spec = input_spec_from_dict(teacher["input_spec"])
    if not isinstance(spec, InputSpec):
        raise UserError(
            f"got algorithm.student_network={factory} and {teacher['name']}, which takes {spec.kind}",
            "algorithm.student_network=null for such a network",
        )
    images = {"input_size": list(spec.size), "mean": list(spec.mean), "std": list(spec.std)}
    try:
        return resolve("teacher", "factory", factory=factory, task=teacher["task"], **images)
    except UserError as error:
        got = error.got.replace("teacher.factory", "algorithm.student_network")
        raise UserError(got, error.allowed or "a function that takes no argument", error.do) from None


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The checked manifest of a student folder."""
    keys = ("teacher", "scheme", "layers", "kept_float", "folded", "settings", "seconds", "size_bytes", "sha256")
    keys += ("rewrites", "sites", "aliases", "layer_inputs", "integer_bias")  # type: ignore[assignment]
    return store.read_manifest(Path(path) / "student.json", "student", SCHEMA_VERSION, keys)
