"""compressed-tensors: a folder that transformers, and vLLM but for a part, load with the student's codes and scales.

::

    DIR/model.safetensors         weight_packed (codes), weight_scale, weight_shape of quantized layers; the rest as is
    DIR/config.json               the network's own, and quantization_config: bits, granularity, which layers
    DIR/tokenizer.json, ...       whatever came with the teacher: tokenizer, chat template, generation settings
    DIR/model.safetensors.json    what made it, and parity

Written by hand: ``pip install compressed-tensors`` is what reads it in transformers; where that is installed, the
folder is loaded again and its logits are compared with the student's. Weights take 1 to 8 bits each
(``pack-quantized``: values from -2^(b-1) are stored from 0 on, dense along the input dimension in int32 words); with
8-bit activations, symmetric 8-bit weights per channel or tensor are int8 (``int-quantized``: others vLLM has packed
alone). Zero points are packed the same way along the output dimension. Layers that are no ``nn.Linear`` in transformers
(GPT-2's) are stored as floats on their grid: the same outputs, no smaller file. Experts of a mixture go by the names of
published checkpoints, a packed tensor each, where transformers can put them together again (one grid for all layers,
symmetric, inputs float); elsewhere as floats too.

Keys and values with one static symmetric grid a layer (``scheme.key_value.granularity=per_tensor``, integers or e4m3)
are in ``kv_cache_scheme``, their scales beside the attention (``k_scale``, ``v_scale``). No reader has grids per token
or per channel for them: such ones are left out, and ``key_value`` in the description says so. With transformers 5.24
compressed-tensors 0.20 does not find the cache, which was renamed, and parity is that of float keys and values. What
transformers loads and vLLM does not is in the warning beside parity (:func:`unread_by_vllm`).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.exporters import _artifact as artifact
from dfq.exporters import _transformers as network
from dfq.exporters._travelling import NO_TOKENIZER, has_tokenizer, travelling, write_beside
from dfq.scheme import TensorScheme
from dfq.student import Student
from dfq.surgery import stacked_experts
from dfq.teacher import Teacher

FILE = "model.safetensors"
PACKED_AT_ONCE = 2**22  # bits that are apart at a time, each in an int64: those of a whole head would not fit anywhere


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
        config, folder = network.configuration(student, "compressed_tensors")
        if folder is not None and path.parent.resolve() == folder.resolve():  # a checkpoint in parts has no such file
            raise UserError(
                f"got artifact_path={path}, in the folder that the float network was read from",
                "a folder of its own, since config.json is written beside the file",
                "choose another folder",
            )
        settings, packed = quantization_config(student)
        # Readers look for grids of the cache beside those of weights.
        key_value, scales = (None, {}) if settings is None else key_value_scheme(student)
        if settings is not None and key_value is not None:
            settings["kv_cache_scheme"] = key_value
        dtype = getattr(torch, self.dtype)
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in network.tensors(student, teacher).items()
        }
        experts = {name: form for name, form in packed.items() if name in student.expert_layers}
        for name, form in [entry for entry in packed.items() if entry[0] not in experts]:
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": tensor for key, tensor in codes_of(student, name, form, dtype).items()}
        if experts:
            for owner, part in network.mixtures_of(student).items():
                for name in stacked_experts(part, lambda _, layer: layer.weight):
                    del state[f"{owner}.{name}"]
            state = network.as_published(student, state) | packed_experts(student, experts, dtype)
        state |= {name: tensor.to(dtype) for name, tensor in scales.items()}
        config |= {"dtype": self.dtype} | ({} if settings is None else {"quantization_config": settings})
        config.pop("torch_dtype", None)
        content = save_safetensors(state, metadata={"format": "pt", **artifact.provenance(student)})
        files = travelling(student, folder)
        write_beside(path, {"config.json": (json.dumps(config, indent=2) + "\n").encode(), **files})
        artifact.write(path, content, self, student, {"parity": None, "latency_ms": None})
        images = artifact.noise(student.input_spec, 4) if images is None else images[:16]
        found: dict[str, Any] = {"parity": parity(student, path, images, teacher), "latency_ms": None}
        if settings is not None and (unread := unread_by_vllm(settings, network.linear_layers(student))):
            told = found["parity"].get("warning")
            found["parity"]["warning"] = "; ".join([*([told] if told else []), f"vLLM {'; '.join(unread)}"])
        found |= {"stored_float": [name for name in student.layers if name not in packed]}
        if not has_tokenizer(files):
            found["tokenizer"] = NO_TOKENIZER
        if network.rounds_attention(student):
            why = "no weight has a grid" if settings is None else "no reader has such a grid"
            found["key_value"] = f"not stored: {why}" if key_value is None else key_value
        return artifact.write(path, content, self, student, found)


# ------------------------------------------------------------------------------------------------ what is stored


def quantization_config(student: Student) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """What config.json says, and layer → format of those whose codes are stored."""
    linear = set(network.linear_layers(student)) | packable_experts(student)
    shared = network.tied(student)  # a head with the embedding's weight, which is float on its grid in the file
    groups: dict[tuple[str, str], list[str]] = {}
    forms: dict[str, str] = {}
    for name, (weight, activation) in student.swap.layers.items():
        if weight.is_float or name not in linear or f"{name}.weight" in shared:
            if not activation.is_float:
                what = (
                    "shares the embedding's weight" if f"{name}.weight" in shared else "is no nn.Linear in transformers"
                )
                raise UserError(
                    f"got exporter=compressed_tensors and layer {name} with quantized inputs, which {what}",
                    "quantized inputs of nn.Linear with quantized weights",
                    f"give scheme.skip=[...,{name}]",
                )
            continue
        inputs = None if activation.is_float else _arguments(activation, name, "activation")
        weights = _arguments(weight, name, "weight")
        forms[name] = _form(weights, inputs)
        key = json.dumps({"weights": weights, "input_activations": inputs, "output_activations": None}), forms[name]
        groups.setdefault(key, []).append(name)
    if not forms:  # a network without any nn.Linear: floats on their grids are all there is
        return None, {}
    ignored = sorted(linear - forms.keys())
    head = [name for name in (network.head(student),) if name in forms]
    has_zero_points = any(not student.swap.layers[name][0].symmetric for name in forms)
    has_experts = not forms.keys().isdisjoint(student.expert_layers)
    if has_experts:  # routers, which are no nn.Linear in transformers and are one elsewhere
        ignored += sorted(name.removesuffix(".weight") for name in student.swap.kept_float.keys() - linear)
    found = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": next(iter(forms.values())) if len(set(forms.values())) == 1 else "mixed-precision",
        "config_groups": {
            # By its class vLLM finds no head, which is none of its linear layers.
            f"group_{i}": {
                "targets": names if len(groups) > 1 else ["Linear", *head],
                **json.loads(key),
                "format": form,
            }
            for i, ((key, form), names) in enumerate(groups.items())
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
        # Of packed zero points transformers 5.24 expects the shape before packing, unless it unpacks while it loads.
        # And it puts experts together only then.
        **({"dequantize": True} if has_zero_points or has_experts else {}),
    }
    return found, forms


def _form(weights: dict[str, Any], inputs: dict[str, Any] | None) -> str:
    """How codes are stored. As int8 vLLM reads symmetric ones without groups alone, which its int8 kernels take."""
    of_8_bits = inputs is not None and inputs["num_bits"] == weights["num_bits"] == 8
    plain = weights["symmetric"] and weights["strategy"] in ("tensor", "channel")
    return "int-quantized" if of_8_bits and plain else "pack-quantized"


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
        return found | {"weight": codes.to(torch.int8)}
    signed = codes - offset
    found["weight_packed"] = pack_to_int32(signed, scheme.num_bits)
    found["weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
    if not scheme.symmetric:
        rows = (zero_point - offset).view(-1, zero_point.shape[-1] if zero_point.dim() > 1 else 1)
        found["weight_zero_point"] = pack_to_int32(rows.mT.contiguous(), scheme.num_bits).mT.contiguous()
    return found


def packable_experts(student: Student) -> set[str]:
    """Layers of experts, if transformers can unpack them: one symmetric grid a row or group for all layers that it
    finds packed, inputs float, and a published checkpoint that has a tensor for each of them."""
    layers = student.expert_layers
    schemes = {
        student.swap.layers[name] for name in (*layers, *network.linear_layers(student)) if name in student.layers
    }
    if not layers or len(schemes) != 1:
        return set()
    ((weight, activation),) = schemes
    fits = weight.has_integer_codes and weight.symmetric and weight.granularity != "per_tensor" and activation.is_float
    return set(layers) if fits and published_experts(student, lambda _, layer: layer.weight) else set()


def published_experts(student: Student, of_layer: Callable[[str, nn.Module], Tensor]) -> dict[str, Tensor]:
    """What ``of_layer(name, layer)`` gives of each expert's layer [O, ...], by the layers' names in published
    checkpoints, which may have two layers for one; nothing if they have no layer for an expert."""
    found: dict[str, Tensor] = {}
    for owner, part in network.mixtures_of(student).items():
        whole = partial(_of_owner, of_layer, owner)
        found |= {f"{owner}.{name}": value.detach().cpu() for name, value in stacked_experts(part, whole).items()}
    named = network.as_published(student, found)
    if not all(re.search(r"\.\d+\.\w+\.weight$", name) and value.dim() <= 2 for name, value in named.items()):
        return {}  # one column may have become none: transformers 5.17 squeezes what it splits
    return {name.removesuffix(".weight"): value for name, value in named.items()}


def _of_owner(of_layer: Callable[[str, nn.Module], Tensor], owner: str, name: str, layer: nn.Module) -> Tensor:
    return of_layer(f"{owner}.{name}", layer)


def packed_experts(student: Student, forms: dict[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of all experts. Codes pass through transformers' own renaming as floats, which hold them exactly."""
    scheme = student.swap.layers[next(iter(forms))][0]
    codes = published_experts(student, lambda name, _: student.integer_weight(name).float())
    scales = published_experts(student, lambda name, _: network.weight_grid(student.layers[name])[0])
    found = {}
    for name, values in codes.items():
        found[f"{name}.weight_packed"] = pack_to_int32(values.to(torch.int32), scheme.num_bits)
        found[f"{name}.weight_scale"] = scales[name].reshape(len(values), -1).to(dtype).contiguous()
        found[f"{name}.weight_shape"] = torch.tensor(values.shape, dtype=torch.int64)
    return found


def key_value_scheme(student: Student) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """What ``kv_cache_scheme`` says, and the scales of keys and values by the attention they belong to; (None, {}):
    keys and values are float, or rounded in a way that no reader knows."""
    places = network.keys_and_values(student)
    schemes = {quantizer.scheme for pair in places.values() for quantizer in pair.values()}
    if len(schemes) != 1 or not all(pair.keys() == {"k", "v"} for pair in places.values()):
        return None, {}
    (scheme,) = schemes
    kind = {"uniform": "int", "fp8_e4m3": "float"}.get(scheme.grid)
    fits = scheme.symmetric and scheme.granularity == "per_tensor" and not scheme.dynamic and scheme.num_bits <= 8
    if kind is None or not fits or scheme.range != "full":
        return None, {}
    arguments = {"num_bits": scheme.num_bits, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}
    scales = {
        f"{name}.{part}_scale": quantizer.scale.detach().cpu().view(1)
        for name, pair in places.items()
        for part, quantizer in pair.items()
    }
    return {**arguments, "group_size": None, "observer": None, "actorder": None, "block_structure": None}, scales


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM computes as one layer


def unread_by_vllm(settings: dict[str, Any], linear: list[str]) -> list[str]:
    """What of a ``quantization_config`` is beyond vLLM, in phrases that its name goes before.

    Args:
        linear: names of all ``nn.Linear``.
    """
    # What layers/quantization/compressed_tensors of 0.32 takes, run on a CPU, the rest by its source:
    # CompressedTensorsWNA16 and WNA8Int (packed), W8A8Int8 (int8), CompressedTensorsKVCacheMethod.
    found = []
    for group in settings["config_groups"].values():
        weights, inputs = group["weights"], group["input_activations"]
        bits, points = weights["num_bits"], "" if weights["symmetric"] else " with zero points"
        if group["format"] != "pack-quantized":
            continue
        if weights["strategy"] == "tensor":
            found.append("reads packed weights per channel or group, not per tensor")
        elif inputs is None:
            if points and bits not in (4, 8):
                found.append(f"reads packed weights with zero points at 4 and 8 bits, at {bits} in new versions (0.32)")
        elif inputs["num_bits"] not in (4, 8):
            found.append(f"reads inputs of packed weights at 4 and 8 bits, not at {inputs['num_bits']}")
        else:
            found.append(
                "rounds inputs of packed weights in its Humming kernels alone (0.32), elsewhere they stay float"
            )
    if split := _split(settings, linear):
        found.append(f"needs one grid for {' and '.join(split)}, which it computes as one layer")
    cache = settings["kv_cache_scheme"]
    if cache is not None and cache["type"] != "float":
        found.append(f"has keys and values in floats of 8 bits (grid=fp8_e4m3), not in integers of {cache['num_bits']}")
    return list(dict.fromkeys(found))


def _split(settings: dict[str, Any], linear: list[str]) -> list[str]:
    """Which of :data:`FUSED` have layers that are not of one config group, or of which some are float."""
    groups = {name: i for i, group in enumerate(settings["config_groups"].values()) for name in group["targets"]}
    found: dict[tuple[str, tuple[str, ...]], set[int | None]] = {}
    for name in linear:
        owner, _, last = name.rpartition(".")
        of_class = groups.get("Linear") if name not in settings["ignore"] else None
        for parts in FUSED:
            if last in parts:
                found.setdefault((owner, parts), set()).add(groups.get(name, of_class))
    return list(dict.fromkeys(", ".join(parts) for (_, parts), own in found.items() if len(own) > 1))


def pack_to_int32(values: Tensor, num_bits: int) -> Tensor:
    """Signed values [R, C] of ``num_bits`` bits, offset to begin at 0, densely along the row, lowest bits first.

    Returns:
        int32 [R, ceil(C num_bits / 32)]; values of 3, 5, 6 and 7 bits cross from a word into the next.
    """
    size = max(1, PACKED_AT_ONCE // max(1, values.shape[1] * num_bits))
    return torch.cat([_packed(rows, num_bits) for rows in values.split(size)])


def _packed(values: Tensor, num_bits: int) -> Tensor:
    unsigned = (values.to(torch.int64) + 2 ** (num_bits - 1)) & (2**num_bits - 1)
    rows, columns = unsigned.shape
    words = -(-columns * num_bits // 32)
    bits = (unsigned[:, :, None] >> torch.arange(num_bits)) & 1
    flat = torch.zeros(rows, words * 32, dtype=torch.int64)
    flat[:, : columns * num_bits] = bits.reshape(rows, -1)
    packed = (flat.view(rows, words, 32) << torch.arange(32)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


# ------------------------------------------------------------------------------------------------ parity


def parity(student: Student, path: Path, ids: Tensor, teacher: Teacher | None) -> dict[str, Any]:
    """The folder in transformers against the student; of that nothing where compressed-tensors is not installed."""
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    settings = config.pop("quantization_config", None)
    if settings is not None and importlib.util.find_spec("compressed_tensors") is None:
        return {"runtime": None, "note": "compressed-tensors is not installed here: the folder was not loaded again"}
    if settings is None or len(settings["config_groups"]) == 1 or not reads_one_group():
        return network.parity(student, path.parent, ids, teacher)
    return _parity_of_groups(student, path, ids, teacher, config, settings)


def reads_one_group() -> bool:
    """Whether the transformers that is installed reads all layers by the first config group, as 5.24 does."""
    return hasattr(importlib.import_module("transformers.integrations.compressed_tensors"), "get_dense_scheme")


def _parity_of_groups(
    student: Student,
    path: Path,
    ids: Tensor,
    teacher: Teacher | None,
    config: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What compressed-tensors by itself reads, each layer by its own config group."""
    import transformers

    warning = (
        f"transformers {transformers.__version__} reads all layers by the first of {len(settings['config_groups'])} "
        "config groups and gets others wrong or not at all; the same grid for all layers is read (no scheme.overrides)"
    )
    groups = settings["config_groups"].values()
    if settings["kv_cache_scheme"] or any(g["input_activations"] for g in groups) or network.mixtures_of(student):
        return {"runtime": None, "note": warning}

    def load() -> nn.Module:
        auto, kind = (getattr(transformers, name) for name in ("AutoModelForCausalLM", "AutoConfig"))
        loaded = auto.from_config(kind.for_model(**config), dtype=torch.float32)
        loaded.load_state_dict(decompressed(path, settings), strict=False)  # what is tied is there once
        return loaded

    found = network.compared(student, load, ids, teacher)
    version = importlib.import_module("compressed_tensors").__version__  # a statement would say that exporting needs it
    return found | {"runtime": f"compressed-tensors {version}", "warning": warning}


def decompressed(path: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The float tensors of a folder, read by compressed-tensors."""
    config = importlib.import_module("compressed_tensors.quantization").QuantizationConfig.model_validate(settings)
    registry = importlib.import_module("compressed_tensors.compressors").BaseCompressor
    state = load_safetensors(path)
    for group in config.config_groups.values():
        reader = registry.get_value_from_registry(group.format or config.format)
        for name in group.targets:
            stored = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.weight")}
            parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}
            state[f"{name}.weight"] = reader.decompress(parts, group)["weight"]
    return state
