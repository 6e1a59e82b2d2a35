"""compressed-tensors: a folder that vLLM, SGLang and plain transformers load, with the student's own codes and scales.

::

    DIR/model.safetensors         weight_packed (codes), weight_scale, weight_shape of quantized layers; the rest as is
    DIR/config.json               the network's own, and quantization_config: bits, granularity, which layers
    DIR/tokenizer.json, ...       whatever came with the teacher: tokenizer, chat template, generation settings
    DIR/model.safetensors.json    what made it, and parity

Written by hand: ``pip install compressed-tensors`` is what reads it in transformers; where that is installed, the
folder is loaded again and its logits are compared with the student's. Weights take 1 to 8 bits each
(``pack-quantized``: values from -2^(b-1) are stored from 0 on, dense along the input dimension in int32 words); with
8-bit weights and activations they are int8 (``int-quantized``). Zero points are packed the same way along the output
dimension. Layers that are no ``nn.Linear`` in transformers (GPT-2's) are stored as floats on their grid: the same
outputs, no smaller file. What keys and values are rounded to is not stored: no reader has grids per token for them.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dfq.errors import UserError
from dfq.exporters import _artifact as artifact
from dfq.exporters import _transformers as network
from dfq.exporters._artifact import Comparison, batches_of, outputs_of
from dfq.scheme import TensorScheme
from dfq.student import Student
from dfq.teacher import Teacher

FILE = "model.safetensors"


@dataclass(frozen=True)
class CompressedTensors:
    """A folder for vLLM and transformers; ``artifact_path`` is the ``model.safetensors`` in it."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of scales and of what is not quantized

    format: ClassVar[str] = "compressed_tensors"
    suffix: ClassVar[str] = ".safetensors"
    file_name: ClassVar[str] = FILE
    kind: ClassVar[str] = "token ids"  # what its networks take

    def export(
        self, student: Student, path: Path, teacher: Teacher | None = None, images: Tensor | None = None
    ) -> dict[str, Any]:
        """Write the folder that ``path`` lies in.

        Args:
            path: ``DIR/model.safetensors``.
            teacher: the float network; what the error of quantization is measured against.
            images: ids [N, T] to compare student and folder on; default: a few random ones.

        Returns:
            what ``path``.json holds.
        """
        path = Path(path)
        artifact.check(student, path)
        if path.name != FILE:
            raise UserError(
                f"got artifact_path={path}",
                f"DIR/{FILE}, the name that transformers looks for",
                f"give {path.parent / FILE}",
            )
        config = network.configuration(student, "compressed_tensors")
        settings, packed = quantization_config(student)
        dtype = getattr(torch, self.dtype)
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in network.tensors(student, teacher).items()
        }
        for name, form in packed.items():
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": tensor for key, tensor in codes_of(student, name, form, dtype).items()}
        config |= {"dtype": self.dtype} | ({} if settings is None else {"quantization_config": settings})
        config.pop("torch_dtype", None)
        content = save_safetensors(state, metadata={"format": "pt", **artifact.provenance(student)})
        files = {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **network.travelling(student)}
        network.write_beside(path, files)
        artifact.write(path, content, self, student, {"parity": None, "latency_ms": None})
        images = artifact.noise(student.input_spec, 4) if images is None else images[:16]
        found = {"parity": parity(student, path, images, teacher), "latency_ms": None}
        stored_float = [name for name in student.layers if name not in packed]
        return artifact.write(path, content, self, student, {**found, "stored_float": stored_float})


# ------------------------------------------------------------------------------------------------ what is stored


def quantization_config(student: Student) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """What config.json says, and layer → format of those whose codes are stored."""
    linear = set(network.linear_layers(student))
    groups: dict[tuple[str, str], list[str]] = {}
    forms: dict[str, str] = {}
    for name, (weight, activation) in student.swap.layers.items():
        if weight.is_float or name not in linear:
            if not activation.is_float:
                raise UserError(
                    f"got exporter=compressed_tensors and layer {name} with quantized inputs, which is no nn.Linear in "
                    "transformers",
                    "quantized inputs of nn.Linear with quantized weights",
                    f"give scheme.skip=[...,{name}]",
                )
            continue
        inputs = None if activation.is_float else _arguments(activation, name, "activation")
        weights = _arguments(weight, name, "weight")
        forms[name] = "int-quantized" if inputs and inputs["num_bits"] == weights["num_bits"] == 8 else "pack-quantized"
        key = json.dumps({"weights": weights, "input_activations": inputs, "output_activations": None}), forms[name]
        groups.setdefault(key, []).append(name)
    if not forms:  # a network without any nn.Linear: floats on their grids are all there is
        return None, {}
    ignored = sorted(linear - forms.keys())
    has_zero_points = any(not student.swap.layers[name][0].symmetric for name in forms)
    found = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": next(iter(forms.values())) if len(set(forms.values())) == 1 else "mixed-precision",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if len(groups) == 1 else names, **json.loads(key), "format": form}
            for i, ((key, form), names) in enumerate(groups.items())
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        # Of packed zero points transformers 5.24 expects the shape before packing, unless it unpacks while it loads.
        **({"dequantize": True} if has_zero_points else {}),
    }
    return found, forms


def _arguments(scheme: TensorScheme, name: str, part: str) -> dict[str, Any]:
    """Bits, granularity and symmetry in the words of compressed-tensors."""
    what = f"got exporter=compressed_tensors and layer {name} with scheme.{part}"
    if scheme.zero_point == "float":
        raise UserError(f"{what}.zero_point=float", "zero_point=integer", "the format has no others")
    if not scheme.has_integer_codes or scheme.num_bits > 8:
        raise UserError(
            f"{what}.grid={scheme.grid} of {scheme.num_bits} bits", "grid=uniform, or symmetric ternary ones"
        )
    if scheme.scale_format not in ("float32", "float16"):
        raise UserError(f"{what}.scale_format={scheme.scale_format}", "scale_format=float32 | float16")
    strategies = {"per_tensor": "tensor", "per_channel": "channel", "per_group": "group", "per_token": "token"}
    strategy = strategies[scheme.granularity]
    if part == "activation" and not (scheme.dynamic and scheme.symmetric and strategy == "token"):
        raise UserError(
            f"{what}.granularity={scheme.granularity} and symmetric={str(scheme.symmetric).lower()}",
            "granularity=per_token and symmetric=true for inputs, or grid=float",
        )
    return {
        "num_bits": scheme.num_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size,
        "dynamic": scheme.dynamic,
        "observer": None,
        "actorder": None,
        "block_structure": None,
    }


def codes_of(student: Student, name: str, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer, by the last part of their names."""
    layer, scheme = student.layers[name], student.swap.layers[name][0]
    codes = student.integer_weight(name).cpu()
    scale, zero_point = network.weight_grid(layer)
    offset = 0 if scheme.symmetric else 2 ** (scheme.num_bits - 1)  # codes here begin at 0, there at -2^(b-1)
    found = {"weight_scale": scale.to(dtype).contiguous()}
    if form == "int-quantized":
        found["weight"] = (codes - offset).to(torch.int8)
        if not scheme.symmetric:
            found["weight_zero_point"] = (zero_point - offset).to(torch.int8)
        return found
    signed = codes - offset
    found["weight_packed"] = pack_to_int32(signed, scheme.num_bits)
    found["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    if not scheme.symmetric:
        rows = (zero_point - offset).view(-1, zero_point.shape[-1] if zero_point.dim() > 1 else 1)
        found["weight_zero_point"] = pack_to_int32(rows.mT.contiguous(), scheme.num_bits).mT.contiguous()
    return found


def pack_to_int32(values: Tensor, num_bits: int) -> Tensor:
    """Signed values [R, C] of ``num_bits`` bits, offset to begin at 0, densely along the row, lowest bits first.

    Returns:
        int32 [R, ceil(C num_bits / 32)]; values of 3, 5, 6 and 7 bits cross from a word into the next.
    """
    unsigned = (values.to(torch.int64) + 2 ** (num_bits - 1)) & (2**num_bits - 1)
    rows, columns = unsigned.shape
    words = -(-columns * num_bits // 32)
    bits = (unsigned[:, :, None] >> torch.arange(num_bits)) & 1
    flat = torch.zeros(rows, words * 32, dtype=torch.int64)
    flat[:, : columns * num_bits] = bits.reshape(rows, -1)
    packed = (flat.view(rows, words, 32) << torch.arange(32)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


# ------------------------------------------------------------------------------------------------ parity


@torch.no_grad()
def parity(student: Student, path: Path, ids: Tensor, teacher: Teacher | None) -> dict[str, Any]:
    """The folder in transformers against the student; of that nothing where compressed-tensors is not installed."""
    needs_reader = "quantization_config" in json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    if needs_reader and importlib.util.find_spec("compressed_tensors") is None:
        return {"runtime": None, "note": "compressed-tensors is not installed here: the folder was not loaded again"}
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with artifact.silence():
            loaded = getattr(transformers, "AutoModelForCausalLM").from_pretrained(path.parent).eval()  # noqa: B009
    finally:
        transformers.utils.logging.set_verbosity(level)
    compared, quantization = Comparison(), Comparison()
    for batch in batches_of(ids):
        wanted = [student(batch).logits.float().cpu()]
        compared.add(wanted, [loaded(batch).logits.float()])
        if teacher is not None:
            quantization.add(outputs_of(teacher, batch)[:1], wanted)
    reference = quantization.relative_error if teacher is not None else None
    return {
        "runtime": f"transformers {transformers.__version__}",
        "num_samples": len(ids),
        "argmax_agreement": compared.agreement,
        "max_abs_error": compared.largest,
        "relative_error": compared.relative_error,
        "quantization_error": reference,
    }
