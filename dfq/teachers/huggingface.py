"""Networks of transformers, from a folder or the Hugging Face hub: language models, classifiers of images or text,
and detectors.

Weights are read from safetensors alone, in float32, and no code that lies beside them is run. Those of a large network
stay in files (:mod:`dfq.weights`). A network that would be part random (its file lacks entries) is refused.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from dfq.errors import UserError
from dfq.settings import PositiveInt
from dfq.teacher import AnyInputSpec, InputSpec, Teacher, TokenSpec
from dfq.teachers._checkpoint import some
from dfq.teachers._folder import ALLOWED, check_folder
from dfq.teachers._task_settings import no_detector
from dfq.weights import to_file

HALF = {torch.float16: "F16", torch.bfloat16: "BF16"}  # in a safetensors file

Task = Literal["language_modeling", "masked_language_modeling", "classification", "detection"]

# Auto class of transformers → (task, its table of network types, what the network takes), in order of preference.
KINDS = {
    "AutoModelForCausalLM": ("language_modeling", "CAUSAL_LM", TokenSpec),
    "AutoModelForMaskedLM": ("masked_language_modeling", "MASKED_LM", TokenSpec),
    "AutoModelForImageClassification": ("classification", "IMAGE_CLASSIFICATION", InputSpec),
    "AutoModelForSequenceClassification": ("classification", "SEQUENCE_CLASSIFICATION", TokenSpec),
    "AutoModelForObjectDetection": ("detection", "OBJECT_DETECTION", InputSpec),
}


def load(
    name: str,  # a folder with config.json and *.safetensors, or an id on the Hugging Face hub
    task: Task | None = None,  # null: what it was trained for, by the architectures in its config.json
    length: PositiveInt = 128,  # tokens of a sample; at most what the network takes
    input_size: Sequence[int] | None = None,  # of an image, [channels, height, width]; null: the network's own
    mean: Sequence[float] | None = None,  # of the normalization; null: what preprocessor_config.json says
    std: Sequence[float] | None = None,  # of the normalization; null: what preprocessor_config.json says
    attn_implementation: Literal["sdpa", "eager"] | None = None,  # null: sdpa where the network has it, else eager
    revision: str | None = None,  # on the hub: branch, tag or commit; null: main
    weights: bool = True,  # false: the structure alone, with random weights
    adapter: str | None = None,  # of a detector: package.module:Adapter; null: that of its family
    task_settings: Mapping[str, Any] | None = None,  # of a detector: {least_score: 0.25, box_weight: 1.0}
) -> Teacher:
    """Teacher from ``AutoModelFor....from_pretrained``; ``weights=False`` reads config.json alone."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            "got teacher=huggingface, which needs transformers, not installed here", do="pip install 'dfq[llm]'"
        )
    is_folder = check_folder(name, weights)
    import transformers

    source: dict[str, Any] = {"local_files_only": is_folder} | ({"revision": revision} if revision else {})
    options = {"dtype": torch.float32, "attn_implementation": attn_implementation, "trust_remote_code": False}
    with _one_line(name, is_folder), _quiet(is_folder):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **source)
        kind = _kind(name, config, task)
        its_task, _, spec_type = KINDS[kind]
        auto = getattr(transformers, kind)
        if weights:

            def read(dtype: torch.dtype) -> Any:
                module, found = auto.from_pretrained(
                    name,
                    config=config,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # they are in what it found, by name
                    output_loading_info=True,
                    **source,
                    **options | {"dtype": dtype},
                )
                _check_complete(name, found)
                return module

            module = _in_float32(
                read, config, lambda: Path(transformers.utils.cached_file(name, "config.json", **source))
            )
        else:
            with torch.random.fork_rng(devices=[]):
                module = auto.from_config(config, **options)
        spec: AnyInputSpec
        if spec_type is TokenSpec:
            text = config.get_text_config()
            longest = getattr(text, "max_position_embeddings", None) or length  # null: any length
            spec = TokenSpec(text.vocab_size, min(length, longest))
        else:
            spec = _image_spec(name, config, source, input_size, mean, std)
    if its_task == "detection":
        from dfq.teachers._detector import as_detector

        module = as_detector(module, adapter, task_settings)
    else:
        no_detector(f"teacher.task={its_task}", adapter, task_settings)
    shown = Path(name).resolve().name if is_folder else name.rpartition("/")[2]
    return Teacher(module, its_task, spec, name=shown)


def _in_float32(read: Callable[[torch.dtype], Any], config: Any, config_path: Callable[[], Path]) -> Any:
    """The network in float32, its weights in files where they are large: transformers maps those of the checkpoint, but
    makes all others at once, the ones in another dtype too. So these are read as they are and cast one by one.
    """
    if config.dtype in HALF:
        module = read(config.dtype)
        # In half precision all the rest would lose digits: other weights, and what a network computes when it is made.
        exact = all(b.dtype == torch.float32 for b in module.buffers() if b.is_floating_point())
        exact = exact and _stored_dtypes(config_path().parent) == {HALF[config.dtype]}
        if exact and to_file(module, torch.float32):
            found = module.config
            for part in (found, *(getattr(found, key) for key in found.sub_configs)):
                part.dtype = torch.float32
            return module
    module = read(torch.float32)
    to_file(module, torch.float32)
    return module


def _stored_dtypes(folder: Path) -> set[str]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # it is no mapping
    return found


def _kind(name: str, config: Any, task: str | None) -> str:
    """The auto class that loads this network: one of ``task``, else the one that its architecture belongs to."""
    from transformers.models.auto import modeling_auto

    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"got teacher.name={name}, whose weights are quantized already", "a float network")
    architectures = config.architectures or []
    able: dict[str, str] = {}  # task → auto class
    for kind, (its_task, table, _) in KINDS.items():
        classes = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").get(config.model_type, ())
        classes = (classes,) if isinstance(classes, str) else classes
        if task in (None, its_task) and set(architectures) & set(classes):
            return kind
        if classes:
            able.setdefault(its_task, kind)
    if task in able:
        return able[task]
    what = f"and teacher.task={task}" if task else f"with architectures={architectures} in its config.json"
    raise UserError(
        f"got teacher.name={name} of type {config.model_type} {what}",
        ", ".join(f"*{kind.removeprefix('AutoModel')}" for kind in KINDS),
        f"give teacher.task={' | '.join(able)}" if able else "",
    )


def _check_complete(name: str, found: dict[str, Any]) -> None:
    """What a file lacks, transformers fills with random numbers and a warning."""
    lacking = sorted(found["missing_keys"])
    other = sorted(entry[0] for entry in found["mismatched_keys"])
    if lacking or other:
        parts = [f"lacks {some(lacking)}" if lacking else "", f"has {some(other)} in another shape" if other else ""]
        raise UserError(
            f"got teacher.name={name}, which {' and '.join(part for part in parts if part)}",
            "weights for every layer of the network",
            "choose a network trained for this, or another teacher.task",
        )


def _image_spec(
    name: str,
    config: Any,
    source: dict[str, Any],
    input_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> InputSpec:
    """What the folder says of the images it was trained on, where the settings do not."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        own, _ = ImageProcessingMixin.get_image_processor_dict(name, **source)
    except OSError:  # there is none
        own = {}
    size = tuple(input_size) if input_size else (getattr(config, "num_channels", 3), *_height_width(config, own))
    # (byte * factor - mean) / std in the units of (byte / 255 - mean) / std
    unit = 255 * (own.get("rescale_factor", 1 / 255) if own.get("do_rescale", True) else 1)
    normalizes = own.get("do_normalize", True)
    own_mean = own.get("image_mean") if normalizes else [0.0] * size[0]
    own_std = own.get("image_std") if normalizes else [1.0] * size[0]
    mean = mean or (own_mean and [value / unit for value in own_mean])
    std = std or (own_std and [value / unit for value in own_std])
    missing = [
        f"teacher.{key}=[...]" for key, value in (("input_size", size[1:]), ("mean", mean), ("std", std)) if not value
    ]
    if missing:
        raise UserError(
            f"got teacher.name={name}, whose config.json and preprocessor_config.json do not say how images come in",
            do=f"give {' '.join(missing)}",
        )
    assert mean is not None and std is not None
    return InputSpec(size, tuple(mean), tuple(std))


def _height_width(config: Any, own: dict[str, Any]) -> tuple[int, ...]:
    """Height and width of an image; nothing where neither the network's nor its preprocessor's config says."""
    for size in (getattr(config, "image_size", None), own.get("crop_size"), own.get("size")):
        if isinstance(size, dict):
            size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge")
        if size:
            return (size, size) if isinstance(size, int) else tuple(size)
    return ()


@contextmanager
def _one_line(name: str, is_folder: bool) -> Iterator[None]:
    """Whatever transformers raises, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # nearly any, on what is none of its networks
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        reason = f"{type(error).__name__}: {lines[0][:300]}"
        if is_folder:
            raise UserError(f"got teacher.name={name}, which transformers can't load ({reason})", ALLOWED) from error
        raise UserError(
            f"got teacher.name={name}, which is no folder here and does not come from the Hugging Face hub ({reason})",
            ALLOWED,
            "check the name and the connection",
        ) from error


@contextmanager
def _quiet(is_folder: bool) -> Iterator[None]:
    """Without the reports of transformers on what it loads; a download shows how far it is."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if is_folder:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
