"""Student: the teacher's own module tree with batch norm folded and quantized layers swapped in; save and load.

::

    DIR/student.json          scheme, layers, how to rebuild the teacher, what made it, checksum
    DIR/student.safetensors   packed integer weights (4-bit weights take half a byte), scales, and what stays float
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import dfq
from dfq import dataset as store
from dfq.dataset import write_atomic, write_json
from dfq.errors import UserError
from dfq.hooks import evaluation_mode
from dfq.modules import QuantizedLayer, Swap, find_foldable, fold_batch_norm, quantized_layers, swap_layer, swap_layers
from dfq.quantization import dequantize, pack, quantize, unpack
from dfq.scheme import Scheme, TensorScheme
from dfq.teacher import InputSpec, Teacher, hash_tensors

SCHEMA_VERSION = 1
CODES = ".weight_codes"


class Student:
    """A network whose weight layers are quantized; callable on the same batches as its teacher.

    Attributes:
        module: the network. Freshly made, its quantizers have no grid and it computes what the teacher computes.
        swap: layers in call order with their schemes, and those kept float with the reason.
        settings: what made it (algorithm, dataset, seed, ...), any json-able mapping.
        seconds: how long that took.
    """

    def __init__(
        self, module: nn.Module, scheme: Scheme, swap: Swap, folded: list[tuple[str, str]], teacher: dict[str, Any]
    ):
        self.module, self.scheme, self.swap, self.folded = module, scheme, swap, folded
        self.teacher = teacher
        self.settings: dict[str, Any] = {}
        self.seconds = 0.0

    @classmethod
    def from_teacher(cls, teacher: Teacher, scheme: Scheme) -> Student:
        """A copy of the teacher with batch norm folded and every weight layer swapped; nothing has a grid yet."""
        flow = teacher.dataflow
        module = copy.deepcopy(teacher.module)
        folded = find_foldable(module, flow)
        fold_batch_norm(module, folded)
        swap = swap_layers(module, scheme, flow)
        return cls(module, scheme, swap, folded, _describe(teacher))

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """Name → quantized layer, in call order."""
        found = quantized_layers(self.module)
        return {name: found[name] for name in self.swap.layers}

    @property
    def input_spec(self) -> InputSpec:
        return InputSpec(**self.teacher["input_spec"])

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).weight.device

    def __call__(self, images: Tensor) -> Any:
        with evaluation_mode(self.module):
            return self.module(images.to(self.device, copy=True))  # some networks write into their input

    @torch.no_grad()
    def freeze(self) -> Student:
        """Put every weight on its grid and stop all training: what is in memory is then exactly what is saved."""
        for layer in self.layers.values():
            layer.weight.copy_(layer.weight_quantizer(layer.weight))
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                scale = quantizer.scale.detach().clone()
                quantizer._parameters.pop("scale", None)
                quantizer.register_buffer("scale", scale)
                quantizer.gradient_scale = 1.0
        self.module.eval().requires_grad_(False)
        return self

    @property
    def mean_weight_bits(self) -> float:
        """Bits per weight, averaged over all weights of the quantized layers."""
        counts = {name: layer.weight.numel() for name, layer in self.layers.items()}
        bits = sum(count * self.swap.layers[name][0].num_bits for name, count in counts.items())
        return bits / sum(counts.values())

    @property
    def sha256(self) -> str:
        """Hash of what is stored: codes, scales, and what stays float."""
        return hash_tensors(self.tensors())

    def integer_weight(self, name: str) -> Tensor:
        """Integer codes (int32, weight-shaped) of a quantized layer."""
        layer = self.layers[name]
        quantizer = layer.weight_quantizer
        limits = quantizer.scheme.quant_min, quantizer.scheme.quant_max
        return quantize(layer.weight.detach(), quantizer.scale.detach(), quantizer.zero_point, *limits, quantizer.axis)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored: packed codes for quantized weights, every other entry of the state as it is."""
        state = self.module.state_dict()
        owners = {name for name, _ in self.module.named_modules()}  # each module once, under its first name
        state = {name: t.detach().cpu() for name, t in state.items() if name.rpartition(".")[0] in owners}
        for name, (weight_scheme, _) in self.swap.layers.items():
            if not self.layers[name].weight_quantizer.enabled:
                raise UserError(
                    f"got a student whose layer {name} has no grid yet", do="run an algorithm on it before saving"
                )
            del state[f"{name}.weight"]
            if weight_scheme.symmetric:
                del state[f"{name}.weight_quantizer.zero_point"]  # zero by definition
            state[name + CODES] = pack(self.integer_weight(name), weight_scheme.num_bits, weight_scheme.quant_min)
        return {name: tensor.clone().contiguous() for name, tensor in state.items()}

    def save(self, path: str | os.PathLike) -> Path:
        """Write the folder; ``student.json`` comes last, so that a folder with one is whole."""
        path = Path(path)
        content = save_safetensors(self.tensors())
        (path / "student.json").unlink(missing_ok=True)
        write_atomic(path / "student.safetensors", content)
        manifest = {
            "format": "dfq.student",
            "schema_version": SCHEMA_VERSION,
            "dfq_version": dfq.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "teacher": self.teacher,
            "scheme": self.scheme.to_dict(),
            "layers": {
                name: {"weight": asdict(w), "activation": asdict(a)} for name, (w, a) in self.swap.layers.items()
            },
            "kept_float": self.swap.kept_float,
            "folded": self.folded,
            "settings": self.settings,
            "seconds": round(self.seconds, 3),
            "mean_weight_bits": self.mean_weight_bits,
            "size_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_json(path / "student.json", manifest)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike, teacher: Teacher) -> Student:
        """The student saved in ``path``: the same outputs, bit for bit.

        Args:
            teacher: gives the module tree (only its structure is used).
        """
        path = Path(path)
        manifest = read_manifest(path)
        content = (path / "student.safetensors").read_bytes() if (path / "student.safetensors").exists() else b""
        if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
            raise UserError(
                f"got {path / 'student.safetensors'}, whose content does not match its checksum",
                do="run the same quantize command again with another student_dir",
            )
        try:
            tensors = load_safetensors(content)
        except SafetensorError as error:
            raise UserError(f"got {path / 'student.safetensors'}, which is no safetensors file ({error})") from None
        module = copy.deepcopy(teacher.module)
        folded = [(layer, norm) for layer, norm in manifest["folded"]]
        layers = {
            name: (TensorScheme(**entry["weight"]), TensorScheme(**entry["activation"]))
            for name, entry in manifest["layers"].items()
        }
        try:
            fold_batch_norm(module, folded)
            for name, schemes in layers.items():
                swap_layer(module.get_submodule(name), *schemes)
            swap = Swap(layers, manifest["kept_float"])
            student = cls(module, Scheme.from_dict(manifest["scheme"]), swap, folded, manifest["teacher"])
            for name, (weight_scheme, _) in layers.items():
                student._unpack_weight(name, weight_scheme, tensors)
            missing, unexpected = module.load_state_dict(tensors, strict=False)
            missing = [name for name in missing if name.rpartition(".")[0] in {n for n, _ in module.named_modules()}]
            if missing or unexpected:
                raise KeyError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"got a student of {manifest['teacher']['name']} and the teacher {teacher.name}, whose layers differ "
                f"({str(error).splitlines()[0]})",
                do="load it with the teacher it was made from",
            ) from error
        for layer in student.layers.values():
            layer.weight_quantizer.enabled = layer.input_quantizer.enabled = True
        student.settings, student.seconds = manifest["settings"], manifest["seconds"]
        student.module.to(teacher.device)
        return student.freeze()

    def _unpack_weight(self, name: str, scheme: TensorScheme, tensors: dict[str, Tensor]) -> None:
        """Replace the codes in ``tensors`` by what the module's state expects."""
        layer = self.module.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        codes = unpack(tensors.pop(name + CODES), scheme.num_bits, scheme.quant_min, tuple(layer.weight.shape))
        scale = tensors[f"{name}.weight_quantizer.scale"]
        zero_point = tensors.setdefault(
            f"{name}.weight_quantizer.zero_point", torch.zeros_like(scale, dtype=torch.int32)
        )
        tensors[f"{name}.weight"] = dequantize(codes, scale, zero_point, layer.weight_quantizer.axis)


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


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The checked manifest of a student folder."""
    keys = ("teacher", "scheme", "layers", "kept_float", "folded", "settings", "seconds", "size_bytes", "sha256")
    return store.read_manifest(Path(path) / "student.json", "student", SCHEMA_VERSION, keys)
