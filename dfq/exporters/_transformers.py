"""What exporters of language models share: the network's configuration and tokenizer, its tensors by their names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.exporters import _artifact as artifact
from dfq.exporters._travelling import source_folder
from dfq.modules import QuantizedLayer, Quantizer
from dfq.scheme import OPERANDS
from dfq.sites import FUSED_ATTENTION, HOLDER, SITE, site_quantizer
from dfq.student import Student
from dfq.surgery import stacked_experts
from dfq.teacher import Teacher

OWN = ("weight_quantizer", "input_quantizer", "bias_quantizer", "correction", HOLDER)  # sub-modules that dfq has added

OF_A_RUN = ("use_cache", "dtype", "torch_dtype", "architectures", "transformers_version")  # not of the network itself


def configuration(student: Student, exporter: str) -> tuple[dict[str, Any], Path | None]:
    """config.json of the network as transformers reads it, and the folder that it came from."""
    if student.surgery.corrections:
        raise UserError(
            f"got exporter={exporter} and a student with low-rank corrections (algorithm=lqer)",
            "exporter=pt2 | onnx_qdq for such a student",
            "these files have no place for the pairs beside the layers",
        )
    config = getattr(student.module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise UserError(
            f"got exporter={exporter} and {student.teacher['name']}, which is no network of transformers",
            "exporter=onnx_qdq | pt2 for such a network",
        )
    folder = source_folder(student)
    if folder is None:
        found = {**config.to_dict(), "use_cache": True, "architectures": [architecture(student.module)]}
    else:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not (student.teacher.get("config") or {}).get("name"):  # in memory it may have become another since
            found |= _changed(config.to_dict(), found)
    return found | ({"tie_word_embeddings": False} if untied(student) else {}), folder


def _changed(own: dict[str, Any], published: dict[str, Any]) -> dict[str, Any]:
    """What a network's configuration says otherwise than the config.json it began from: a vocabulary that has grown."""
    return {
        key: value
        for key, value in own.items()
        if key in published and value != published[key] and key not in OF_A_RUN and not isinstance(value, dict)
    }


def architecture(module: nn.Module) -> str:
    """The name of the network's class in transformers."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers."))


def rounds_attention(student: Student) -> bool:
    """Operands of attention's products are rounded: keys, values, queries, probabilities."""
    return not all(getattr(student.scheme, part).is_float for part in OPERANDS)


def tensors(student: Student, teacher: Teacher | None) -> dict[str, Tensor]:
    """Every tensor of the network by the name that transformers has for it; quantized weights as floats on their grid.

    A module that was rewritten (:mod:`dfq.surgery`) is stored as it was before; tied ones come once.
    """
    state = {}
    mixtures = mixtures_of(student)
    shared = tied(student)
    rewritten = _rewritten(student)
    for name, tensor in student.module.state_dict().items():
        parts = name.split(".")
        if any(part in OWN for part in parts) or name in shared:
            continue
        if any(name.startswith(f"{owner}.") for owner in mixtures):
            continue
        kind = rewritten.get(name.rpartition(".")[0])
        if kind == "transposed_linear" and parts[-1] == "weight":
            tensor = tensor.mT
        elif kind not in (None, "transposed_linear", "linear", "base_class"):
            tensor = _as_it_was(name, kind, student, teacher)
        state[name] = tensor.detach().cpu().contiguous().clone()
    for owner, part in mixtures.items():
        biases = stacked_experts(part, lambda _, layer: None if layer.bias is None else layer.bias[:, None])
        state |= {f"{owner}.{name}_bias": tensor.flatten(1) for name, tensor in biases.items()}
        weights = stacked_experts(part, lambda _, layer: layer.weight)
        state |= {f"{owner}.{name}": tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def tied(student: Student) -> set[str]:
    """Weights that are another one's too, under which name alone they are stored."""
    found = set(getattr(student.module, "all_tied_weights_keys", None) or {})
    return found - {f"{name}.weight" for name in untied(student)}


def untied(student: Student) -> list[str]:
    """Layers that shared a weight and have one of their own now."""
    return [name for name, kind in student.surgery.rewrites if kind == "untied"]


def _rewritten(student: Student) -> dict[str, str]:
    """Module → how it was rewritten, if its tensors are others than before."""
    return {name: kind for name, kind in student.surgery.rewrites if kind != "untied"}


def mixtures_of(student: Student) -> dict[str, nn.Module]:
    """Name → experts that were taken apart."""
    return {name: student.module.get_submodule(name) for name, kind in student.surgery.rewrites if kind == "experts"}


def as_published(student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` by the names that published checkpoints of this network have for it, put together as there."""
    from transformers.core_model_loading import revert_weight_conversion

    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(student.module, state).items()}


def keys_and_values(student: Student) -> dict[str, dict[str, Quantizer]]:
    """Attention → "k" and "v" → the quantizer of its keys and values in the products, where there is one.

    Of two products without a fused one, the keys' is the one in which they come transposed.
    """
    found: dict[str, dict[str, Quantizer]] = {}
    if student.scheme.key_value.is_float and student.scheme.key.is_float:
        return found
    for path in student.surgery.sites.quantizers:
        site = SITE.fullmatch(path.replace(".", "/"))
        if site is None or site["place"] in ("input_0", "softmax", "output"):
            continue
        if site["operation"] == FUSED_ATTENTION:
            part = "k" if site["place"] == "input_1" else "v"
        else:
            part = "k" if path in student.surgery.sites.feature_axes else "v"
        owner = site["module"].rstrip("/").replace("/", ".")
        found.setdefault(owner, {})[part] = site_quantizer(student.module, path)
    return found


def _as_it_was(name: str, kind: str, student: Student, teacher: Teacher | None) -> Tensor:
    owner = name.rpartition(".")[0]
    own = None if teacher is None else teacher.module.state_dict().get(name)
    if own is None or owner in student.layers:
        raise UserError(
            f"got a student whose {owner} was rewritten ({kind}), so that its weight is not the network's own",
            "such a layer float, and the teacher at hand",
            f"give scheme.skip=[...,{owner}]",
        )
    return own


def linear_layers(student: Student) -> list[str]:
    """Names of what transformers builds as nn.Linear."""
    rewritten = _rewritten(student)
    experts = tuple(f"{name}." for name in mixtures_of(student))
    return [
        name
        for name, part in student.module.named_modules()
        if isinstance(part, nn.Linear)
        and name not in rewritten
        and not name.startswith(experts)
        and not any(p in OWN for p in name.split("."))
    ]


def head(student: Student) -> str | None:
    """The layer that gives the logits."""
    last = student.module.get_output_embeddings()
    return next((name for name, part in student.module.named_modules() if part is last), None)


@torch.no_grad()
def weight_grid(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a Linear's weight, [O, G]: one column for a channel, one entry in all for a tensor."""
    scale, zero_point = (t.detach().cpu() for t in (layer.weight_quantizer.scale, layer.weight_quantizer.zero_point))
    return (scale.view(len(scale), -1), zero_point.view(len(scale), -1)) if scale.dim() else (scale.view(1), zero_point)


def parity(student: Student, folder: Path, ids: Tensor, teacher: Teacher | None, **options: Any) -> dict[str, Any]:
    """What transformers loads from ``folder`` against the student: logits of ids [N, T]."""
    import transformers

    def load() -> nn.Module:
        auto = getattr(transformers, "AutoModelForCausalLM")  # noqa: B009
        return auto.from_pretrained(folder, **options)

    return compared(student, load, ids, teacher) | {"runtime": f"transformers {transformers.__version__}"}


@torch.no_grad()
def compared(student: Student, load: Callable[[], nn.Module], ids: Tensor, teacher: Teacher | None) -> dict[str, Any]:
    """The network that ``load`` gives against the student: logits of ids [N, T]."""
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with artifact.silence():
            loaded = load().eval()
    finally:
        transformers.utils.logging.set_verbosity(level)
    outputs, quantization = artifact.Comparison(), artifact.Comparison()
    for batch in artifact.batches_of(ids):
        wanted = [student(batch).logits.float().cpu()]
        outputs.add(wanted, [loaded(batch).logits.float()])
        if teacher is not None:
            quantization.add(artifact.outputs_of(teacher, batch)[:1], wanted)
    return {
        "num_samples": len(ids),
        "argmax_agreement": outputs.agreement,
        "max_abs_error": outputs.largest,
        "relative_error": outputs.relative_error,
        "quantization_error": quantization.relative_error if teacher is not None else None,
    }
