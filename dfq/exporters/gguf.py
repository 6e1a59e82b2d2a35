"""GGUF: one file for llama.cpp, ollama and transformers' ``gguf_file=``, with the student's own codes and scales.

Blocks of 32 weights of a row, ternary ones of 256, share a float16 scale d, in Q4_1 a float16 offset m too (GGUF
specification, version 3)::

    Q4_0    d, 16 bytes: weight j in the low and weight j + 16 in the high half of byte j, code + 8;  w = (code) d
    Q4_1    d, m, 16 bytes as above, code;                                                            w = code d + m
    Q8_0    d, 32 int8;                                                                               w = code d
    TQ2_0   64 bytes, d: of 128 weights, j, j + 32, j + 64, j + 96 from the low bits of byte j on, code + 1;  w = code d

Nothing is derived from the weights again: codes and scales are the student's, so ``scheme.weight.scale_format=float16``
makes the file exact; other scales are rounded to float16 here. The offset is -scale * zero point: with such scales
``scheme.weight.zero_point=float`` has zero points whose offset is a float16 number, and weights differ by the last bits
of a float32; of a whole zero point (up to 15 scales) the offset is rounded here, by 0.8 % of the step at most. How far
weights are from the student's is in the description. Groups are multiples of a block, or whole rows. What is not
quantized is float32. Rows of queries and keys are in the order of llama.cpp's rotary embedding, where it has one of
its own. The vocabulary is written from ``tokenizer.json`` where the teacher came with one.
"""

from __future__ import annotations

import importlib.util
import io
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dfq.errors import UserError
from dfq.exporters import _artifact as artifact
from dfq.exporters import _transformers as network
from dfq.exporters._travelling import NO_TOKENIZER
from dfq.scheme import TensorScheme
from dfq.student import Student
from dfq.teacher import Teacher

ALIGNMENT = 32
F32, Q4_0, Q4_1, Q8_0, TQ2_0 = 0, 2, 3, 8, 35  # numbers of tensor types
BLOCKS = {Q4_0: (32, 18), Q4_1: (32, 20), Q8_0: (32, 34), TQ2_0: (256, 66)}  # weights and bytes of a block
FILE_TYPES = {Q4_0: 2, Q4_1: 3, Q8_0: 7, TQ2_0: 37}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # of values of metadata
FORMS = {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type → GGUF's
NAMES = {  # sub-module of a layer → its name in GGUF
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# How a byte-level tokenizer.json splits text, and whether whole words pass by its merges → what llama.cpp calls it.
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
)
PRE_TOKENIZERS = {
    (True, WORDS + "{1,3}" + REST): "llama-bpe",
    (False, WORDS + "{1,3}" + REST): "smaug-bpe",
    (False, WORDS + REST): "qwen2",
    (True, CASES + REST.replace("[\\r\\n]*", r"[\r\n/]*", 1)): "tekken",
    (False, "bytes"): "gpt-2",
    (False, "digits", "bytes"): "smollm",
}


@dataclass(frozen=True)
class GGUF:
    """One ``.gguf`` file with Q4_0, Q4_1, Q8_0 and TQ2_0 blocks."""

    format: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"
    kind: ClassVar[str] = "token ids"  # what its networks take

    def export(
        self, student: Student, path: Path, teacher: Teacher | None = None, images: Tensor | None = None
    ) -> dict[str, Any]:
        """Write ``path`` and ``path``.json.

        Args:
            path: the file, usually ``*.gguf``.
            teacher: the float network, for modules of it that the student has rewritten.
            images: ids [N, T] to compare student and file on in transformers, where gguf and accelerate are installed;
                default: a few random ones. Weights are compared one by one without them.

        Returns:
            what ``path``.json holds.
        """
        path = Path(path)
        artifact.check(student, path)
        published, folder = network.configuration(student, "gguf")
        config = {**student.module.config.to_dict(), **published}
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise UserError(
                f"got exporter=gguf and {student.teacher['name']} of type {kind}",
                " | ".join(ARCHITECTURES),
                "exporter=compressed_tensors takes others",
            )
        stored = dict(_stored(student, config, teacher)) | _scaled_frequencies(student, config)
        vocabulary, tokenizer = _vocabulary(folder, config)
        content = serialize(_metadata(student, config, stored) | vocabulary, stored)
        found: dict[str, Any] = {"parity": None, "latency_ms": None, "tokenizer": tokenizer}
        if network.rounds_attention(student):
            found["key_value"] = "not stored: the format has no such grid"
        artifact.write(path, content, self, student, found)
        images = artifact.noise(student.input_spec, 4) if images is None else images[:16]
        found["parity"] = _weights(student, config, content) | _logits(student, path, images, teacher)
        return artifact.write(path, content, self, student, found)


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in the file."""

    kind: int
    shape: tuple[int, ...]  # as torch has it; the file has it the other way round
    content: bytes


def _stored(student: Student, config: dict[str, Any], teacher: Teacher | None) -> Iterator[tuple[str, Stored]]:
    state = network.tensors(student, teacher)
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if owner == "lm_head" and config.get("tie_word_embeddings"):
            continue
        target = f"{_name(owner)}.{last}"
        if owner in student.layers and last == "weight" and not student.swap.layers[owner][0].is_float:
            kind, content = _blocks(student, owner, config)
            yield target, Stored(kind, tuple(tensor.shape), content)
        else:
            values = _in_order(tensor.float(), owner, config).contiguous()
            yield target, Stored(F32, tuple(tensor.shape), values.numpy().tobytes())


def _name(owner: str) -> str:
    if owner in WHOLE:
        return WHOLE[owner]
    _, _, layer, part = owner.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}"


def _in_order(rows: Tensor, owner: str, config: dict[str, Any]) -> Tensor:
    """Rows of queries and keys: pairs that are rotated together lie side by side, in the file of a Llama."""
    part = owner.rpartition(".")[2]
    if ARCHITECTURES[config["model_type"]] != "llama" or part not in ("q_proj", "k_proj"):
        return rows
    heads = config["num_attention_heads"]
    if part == "k_proj":
        heads = config.get("num_key_value_heads") or heads
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def _blocks(student: Student, name: str, config: dict[str, Any]) -> tuple[int, bytes]:
    """Codes and scales of one layer in blocks."""
    scheme, activation = student.swap.layers[name]
    kind = _kind(scheme)
    block = BLOCKS[kind][0] if kind is not None else 32
    if kind is None or (scheme.group_size or 0) % block or not activation.is_float:
        raise UserError(
            f"got exporter=gguf and layer {name} with {scheme.num_bits} bits, symmetric="
            f"{str(scheme.symmetric).lower()}, group_size={scheme.group_size}"
            + ("" if activation.is_float else ", and quantized inputs"),
            "grid=uniform with 4 bits, or with 8 and symmetric=true, groups of a multiple of 32 (grid=ternary with "
            "symmetric=true: of 256), and inputs that stay float",
            "use scheme=w4a16_g32 scheme.weight.scale_format=float16",
        )
    codes = student.integer_weight(name).cpu()
    if codes.shape[1] % block:
        raise UserError(
            f"got exporter=gguf and layer {name} with {codes.shape[1]} inputs",
            f"a multiple of {block}",
            f"give scheme.skip=[...,{name}]",
        )
    scale, zero_point = network.weight_grid(student.layers[name])
    num_blocks = codes.shape[1] // block

    def of_blocks(numbers: Tensor) -> np.ndarray:
        """One float16 a block, from one a group, row or tensor."""
        columns = numbers.view(-1, numbers.shape[-1] if numbers.dim() > 1 else 1)
        columns = columns.repeat_interleave(num_blocks // columns.shape[1], 1).expand(len(codes), -1).contiguous()
        halves = _in_order(columns, name, config).half().contiguous()
        return halves.numpy().view(np.uint8).reshape(len(codes), num_blocks, 2)

    d = of_blocks(scale)
    values = _in_order(codes, name, config).reshape(len(codes), num_blocks, block)
    if kind == Q8_0:
        quants = values.to(torch.int8).contiguous().numpy().view(np.uint8)
        return kind, np.concatenate([d, quants], -1).tobytes()
    if kind in (Q4_0, Q4_1):
        low, high = (values + 8 if kind == Q4_0 else values).to(torch.uint8).chunk(2, -1)
        m = [] if kind == Q4_0 else [of_blocks(-zero_point * scale)]
        return kind, np.concatenate([d, *m, (low | high << 4).numpy()], -1).tobytes()
    parts = (values + 1).to(torch.uint8).unflatten(-1, (2, 4, 32)).unbind(-2)
    quants = (parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6).flatten(-2).numpy()
    return kind, np.concatenate([quants, d], -1).tobytes()


def _kind(scheme: TensorScheme) -> int | None:
    """The type of tensor that holds this grid."""
    return {
        ("uniform", True, 4): Q4_0,
        ("uniform", False, 4): Q4_1,
        ("uniform", True, 8): Q8_0,
        ("ternary", True, 2): TQ2_0,
    }.get((scheme.grid, scheme.symmetric, scheme.num_bits))


# ------------------------------------------------------------------------------------------------ the file


def serialize(metadata: dict[str, tuple[int, Any]], tensors: dict[str, Stored]) -> bytes:
    """Header, metadata, where each tensor lies, and the tensors."""
    file = io.BytesIO()
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, (kind, value) in metadata.items():
        file.write(_string(key) + struct.pack("<I", kind) + _value(kind, value))
    offset = 0
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]
        file.write(_string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        file.write(struct.pack("<IQ", tensor.kind, offset))
        offset += -(-len(tensor.content) // ALIGNMENT) * ALIGNMENT
    for tensor in [Stored(F32, (), b""), *tensors.values()]:
        file.write(tensor.content)
        file.write(bytes(-file.tell() % ALIGNMENT))
    return file.getvalue()


def _string(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return struct.pack(f"<{FORMS[kind]}", value)


def _metadata(student: Student, config: dict[str, Any], stored: dict[str, Stored]) -> dict[str, tuple[int, Any]]:
    name = ARCHITECTURES[config["model_type"]]
    heads = config["num_attention_heads"]
    head_dim = _head_dim(config)
    kinds = [tensor.kind for tensor in stored.values() if tensor.kind != F32]
    found: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, name),
        "general.name": (STRING, student.teacher["name"]),
        "general.file_type": (UINT32, FILE_TYPES[max(set(kinds), key=kinds.count)] if kinds else 0),
        "general.quantization_version": (UINT32, 2),
        f"{name}.context_length": (UINT32, config["max_position_embeddings"]),
        f"{name}.block_count": (UINT32, config["num_hidden_layers"]),
        f"{name}.embedding_length": (UINT32, config["hidden_size"]),
        f"{name}.feed_forward_length": (UINT32, config["intermediate_size"]),
        f"{name}.attention.head_count": (UINT32, heads),
        f"{name}.attention.head_count_kv": (UINT32, config.get("num_key_value_heads") or heads),
        f"{name}.attention.key_length": (UINT32, head_dim),
        f"{name}.attention.value_length": (UINT32, head_dim),
        f"{name}.attention.layer_norm_rms_epsilon": (FLOAT32, config.get("rms_norm_eps", 1e-6)),
        f"{name}.rope.dimension_count": (UINT32, head_dim),
        f"{name}.rope.freq_base": (FLOAT32, student.module.config.rope_parameters["rope_theta"]),
        f"{name}.vocab_size": (UINT32, config["vocab_size"]),
    }
    found |= {f"{name}.rope.scaling.{key}": value for key, value in _scaling(student).items()}
    return found | {f"dfq.{key}": (STRING, str(value)) for key, value in artifact.provenance(student).items()}


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _scaling(student: Student) -> dict[str, tuple[int, Any]]:
    """How the rotary embedding's positions are scaled for longer texts, where a factor or two say it (linear, YaRN)."""
    rope = student.module.config.rope_parameters
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):
        return {}
    if kind == "linear":
        return {"type": (STRING, kind), "factor": (FLOAT32, rope["factor"])}
    # llama.cpp reads no other bounds of the ramp for these networks, and rounds them outwards.
    own = {"truncate": True, "beta_fast": 32, "beta_slow": 1}
    other = [f"{key}={rope[key]}" for key, value in own.items() if rope.get(key) not in (None, value)]
    if kind != "yarn" or other:
        raise UserError(
            f"got exporter=gguf and {student.teacher['name']} with {' and '.join([f'rope_type={kind}', *other])}",
            "default | linear | yarn with its usual bounds | llama3 (in networks of type llama and mistral)",
            "exporter=compressed_tensors takes others",
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # llama.cpp multiplies by the paper's factor of attention itself; what is stored comes on top.
    _, attention = ROPE_INIT_FUNCTIONS[kind](student.module.config, torch.device("cpu"))
    return {
        "type": (STRING, kind),
        "factor": (FLOAT32, rope["factor"]),
        "original_context_length": (UINT32, rope["original_max_position_embeddings"]),
        "attn_factor": (FLOAT32, attention / (0.1 * log(rope["factor"]) + 1)),
    }


def _scaled_frequencies(student: Student, config: dict[str, Any]) -> dict[str, Stored]:
    """What llama.cpp divides each frequency of the rotary embedding by, for those that are scaled one by one."""
    rope = student.module.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return {}
    if ARCHITECTURES[config["model_type"]] != "llama":
        raise UserError(
            f"got exporter=gguf and {student.teacher['name']} of type {config['model_type']} with rope_type=llama3",
            "llama3 in networks of type llama and mistral, alone of which llama.cpp reads frequencies",
            "exporter=compressed_tensors takes others",
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](student.module.config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2, dtype=torch.float64) / (2 * len(scaled)))
    factors = (plain / scaled.double()).float().numpy()
    return {"rope_freqs.weight": Stored(F32, factors.shape, factors.tobytes())}


def _vocabulary(folder: Path | None, config: dict[str, Any]) -> tuple[dict[str, tuple[int, Any]], str]:
    """Tokens, their kinds and merges, and the chat template, and in words what was written."""
    nothing = {"tokenizer.ggml.model": (STRING, "none")}  # without it llama.cpp refuses the file
    if folder is None or not (folder / "tokenizer.json").is_file():
        return nothing, NO_TOKENIZER.replace("one", "a tokenizer.json", 1)
    read, settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")), _settings(folder)
    model = read.get("model", {})
    if model.get("type") != "BPE":
        return (
            nothing,
            f"not stored: tokenizers of type BPE alone are, its tokenizer.json is of {model.get('type')}",
        )
    added = {token["id"]: token for token in read.get("added_tokens", [])}
    by_id = {index: token for token, index in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    size = config["vocab_size"]
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    falls_back = bool(model.get("byte_fallback"))
    kinds = []
    for index, token in enumerate(tokens):
        if index not in by_id:
            kinds.append(5)  # unused
        elif index in added:
            kinds.append(2 if token == model.get("unk_token") else 3 if added[index].get("special") else 4)
        else:
            kinds.append(6 if falls_back and len(token) == 6 and token.startswith("<0x") else 1)
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    found: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.model": (STRING, "llama" if falls_back else "gpt2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (INT32, kinds)),
    }
    if falls_back:  # as sentencepiece has it: what is merged first scores highest
        rank = {pair.replace(" ", ""): -float(i) for i, pair in reversed(list(enumerate(pairs)))}
        found["tokenizer.ggml.scores"] = (ARRAY, (FLOAT32, [rank.get(token, 0.0) for token in tokens]))
        prepends = any(part.get("type") == "Prepend" for part in _parts(read, "normalizer"))
        spaces = [part for part in _parts(read, "pre_tokenizer") if part.get("type") == "Metaspace"]
        prepends |= any(part.get("prepend_scheme", "always") != "never" for part in spaces)
        found["tokenizer.ggml.add_space_prefix"] = (BOOL, prepends)
        words = "byte-pair encoding as sentencepiece has it"
    else:
        name = _pre_tokenizer(read)
        found["tokenizer.ggml.pre"] = (STRING, name or "default")
        found["tokenizer.ggml.merges"] = (ARRAY, (STRING, pairs))
        words = (
            f"byte-pair encoding, text split as in {name}"
            if name
            else (
                "byte-pair encoding; how it splits text has no name in llama.cpp that is known here: other tokens there"
            )
        )
    ids = {token: index for index, token in by_id.items()}
    templates = [part["single"] for part in _parts(read, "post_processor") if part.get("type") == "TemplateProcessing"]
    for name, key, place in (("bos", "bos", 0), ("eos", "eos", -1), ("padding", "pad", None)):
        value = ids.get(settings.get(f"{key}_token"), config.get(f"{key}_token_id"))
        value = value[0] if isinstance(value, list) else value
        if value is not None and not 0 <= value < size:  # -1 is what some configurations have for none
            value = None
        if value is not None:
            found[f"tokenizer.ggml.{name}_token_id"] = (UINT32, value)
        if place is not None:
            added_there = [ids.get(single[place].get("SpecialToken", {}).get("id")) for single in templates]
            adds = settings.get(f"add_{key}_token", value is not None and value in added_there)
            found[f"tokenizer.ggml.add_{key}_token"] = (BOOL, bool(adds))
    if settings.get("chat_template"):
        found["tokenizer.chat_template"] = (STRING, settings["chat_template"])
    return found, words


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, special tokens by their text, the chat template from where it lies."""
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {key: value.get("content", value) if isinstance(value, dict) else value for key, value in found.items()}
    template = found.get("chat_template")
    if isinstance(template, list):
        found["chat_template"] = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        found["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return found


def _parts(read: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """The steps of a section of tokenizer.json, which has one or a sequence of them."""
    whole = read.get(section) or {}
    return next((whole[key] for key in ("normalizers", "pretokenizers", "processors") if key in whole), [whole])


def _pre_tokenizer(read: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a byte-level tokenizer.json splits text."""
    steps: list[Any] = []
    for part in _parts(read, "pre_tokenizer"):
        kind = part.get("type")
        if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            steps.append(part["pattern"].get("Regex"))
        elif kind == "Digits" and part.get("individual_digits"):
            steps.append("digits")
        elif kind == "ByteLevel" and not part.get("add_prefix_space"):
            steps += ["bytes"] if part.get("use_regex", True) else []
        else:
            steps.append(None)
    return PRE_TOKENIZERS.get((bool(read["model"].get("ignore_merges")), *steps))


# ------------------------------------------------------------------------------------------------ parity


def read_weights(content: bytes) -> dict[str, np.ndarray]:
    """Every tensor of such a file as floats, read by the specification."""
    position = 0

    def take(form: str) -> Any:
        nonlocal position
        values = struct.unpack_from("<" + form, content, position)
        position += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text() -> str:
        nonlocal position
        size = take("Q")
        position += size
        return content[position - size : position].decode("utf-8")

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take(FORMS[kind])

    magic, version, num_tensors, num_values = take("4sIQQ")
    assert (magic, version) == (b"GGUF", 3)
    for _ in range(num_values):
        text()
        value(take("I"))
    where = []
    for _ in range(num_tensors):
        name, dims = text(), take("I")
        shape = [take("Q") for _ in range(dims)][::-1]
        where.append((name, shape, take("I"), take("Q")))
    start = -(-position // ALIGNMENT) * ALIGNMENT
    found = {}
    for name, shape, kind, offset in where:
        count, at = int(np.prod(shape)), start + offset
        if kind == F32:
            found[name] = np.frombuffer(content, "<f4", count, at).reshape(shape)
            continue
        size, width = BLOCKS[kind]
        blocks = np.frombuffer(content, np.uint8, count // size * width, at).reshape(-1, width)
        scales, quants = (blocks[:, -2:], blocks[:, :-2]) if kind == TQ2_0 else (blocks[:, :2], blocks[:, 2:])
        d = scales.copy().view("<f2").astype(np.float32)
        m = np.zeros_like(d)
        if kind == Q4_0:
            codes = np.concatenate([quants & 15, quants >> 4], -1).astype(np.float32) - 8
        elif kind == Q4_1:
            m, quants = quants[:, :2].copy().view("<f2").astype(np.float32), quants[:, 2:]
            codes = np.concatenate([quants & 15, quants >> 4], -1).astype(np.float32)
        elif kind == TQ2_0:
            shifted = quants.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
            codes = (shifted & 3).astype(np.float32).reshape(len(blocks), size) - 1
        else:
            codes = quants.copy().view(np.int8).astype(np.float32)
        found[name] = (d * codes + m).reshape(shape)
    return found


def _weights(student: Student, config: dict[str, Any], content: bytes) -> dict[str, Any]:
    """The file's weights against the student's: the largest difference, and the largest in steps of the grid."""
    found, largest, in_steps = read_weights(content), 0.0, 0.0
    for name, layer in student.layers.items():
        if f"{_name(name)}.weight" in found:
            weight = layer.weight.detach().cpu().float()
            error = np.abs(found[f"{_name(name)}.weight"] - _in_order(weight, name, config).numpy())
            largest = max(largest, float(error.max()))
            if layer.weight_quantizer.has_qparams:
                steps = layer.weight_quantizer.steps_of(layer.weight.detach()).cpu().expand_as(weight)
                in_steps = max(in_steps, float((error / _in_order(steps, name, config).numpy()).max()))
    return {
        "num_layers": len(student.layers),
        "max_abs_error_of_weights": largest,
        "max_error_of_weights_in_steps": in_steps,
    }


def _logits(student: Student, path: Path, ids: Tensor, teacher: Teacher | None) -> dict[str, Any]:
    """The file in transformers against the student; of that nothing where its readers are not installed."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        return {"runtime": None, "note": f"{' and '.join(missing)} not installed here: the file was not loaded again"}
    import transformers

    source: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config, own = transformers.AutoConfig.from_pretrained(path.parent, **source), student.module.config
    keys = ("rope_parameters", "head_dim")
    other = [key for key in keys if getattr(own, key, None) != getattr(config, key, None)]
    for key in other:
        setattr(config, key, getattr(own, key))
    found = network.parity(student, path.parent, ids, teacher, config=config, dtype=torch.float32, **source)
    if other:
        named = " and ".join(other)
        found["warning"] = f"gguf_file= of transformers does not read {named}: set it in a config and give that too"
    return found
