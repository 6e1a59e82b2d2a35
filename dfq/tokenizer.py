"""Tokenizers: where a teacher's lies, which of its ids are ordinary text, and a hash of what decides ids."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dfq.errors import UserError
from dfq.progress import say
from dfq.teacher import Teacher

READ = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is in a folder with a tokenizer
NOT_READ = ("tekken.json", "spiece.model", "sentencepiece.bpe.model")
WITHOUT = "all ids are taken as ordinary text; give {}=FOLDER of one with tokenizer.json"
# Ids that stand for no text: bytes of byte fallback, and places that were kept free for later.
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
UNUSED = re.compile(r"[<\[(|]+\s*(unused|reserved|extra_id|special|pad|placeholder)[\w ]*[|\])>]+", re.IGNORECASE)


def folder_of(teacher: Teacher) -> str | None:
    """The folder, or the id on the hub, that a teacher of transformers came from; None: from none."""
    return _given_name(teacher) or getattr(getattr(teacher.module, "config", None), "_name_or_path", None) or None


def _given_name(teacher: Teacher) -> str | None:
    """``teacher.name`` of transformers' loader, as the user gave it."""
    config = teacher.config or {}
    return config.get("name") if "huggingface" in str(config.get("_target_")) else None


def load_tokenizer(name: str, key: str = "tokenizer") -> Any:
    """The tokenizer in a folder, or of an id on the hub; no code that lies beside it is run."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(f"got {key}={name}, which needs transformers, not installed here", do="pip install 'dfq[llm]'")
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, local_files_only=Path(name).is_dir()
        )
    except Exception as error:  # nearly any, on what is none
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"got {key}={name}, from which no tokenizer can be loaded ({lines[0][:200]})",
            "a folder with tokenizer.json, or an id on the Hugging Face hub",
        ) from error


def find_tokenizer(teacher: Teacher, name: str | None, key: str = "tokenizer") -> Any | None:
    """The tokenizer called ``name``, else the teacher's own; None where it has none.

    It is said where there may be one that is not read here: files of another kind, or a place that a network in memory
    remembers and that is gone. Nobody gave that place, so it is no mistake.
    """
    if name is not None:
        return load_tokenizer(name, key)
    folder = folder_of(teacher)
    if folder is None:
        return None
    if Path(folder).is_dir():
        there = {file.name for file in Path(folder).iterdir()}
        if there & {*READ}:
            return load_tokenizer(folder, key)
        for file in [file for file in NOT_READ if file in there][:1]:
            _say_once(f"{teacher.name}: {folder} has {file} and no tokenizer.json: {WITHOUT.format(key)}")
        return None
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        return load_tokenizer(folder, key)
    except UserError:
        if folder == _given_name(teacher):
            raise
        _say_once(f"{teacher.name}: no tokenizer at {folder}, where its network says it is from: {WITHOUT.format(key)}")
        return None


@cache
def _say_once(text: str) -> None:
    """A dataset asks for its tokenizer more than once."""
    say(text)


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what decides ids: the model, its special tokens, its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = sorted((key, str(value)) for key, value in tokenizer.special_tokens_map.items())
    return hashlib.sha256(repr((content, special, tokenizer.chat_template)).encode()).hexdigest()


def ordinary_ids(tokenizer: Any, vocab_size: int, scripts: Sequence[str] = ()) -> list[int]:
    """Ids below ``vocab_size`` that stand for text: no special or added ones, no lone bytes, none without an entry.

    Args:
        scripts: keep those alone that have a letter, and letters of these Unicode scripts only (``LATIN``, ``CJK``,
            the first words of characters' names).
    """
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = [i for i in range(vocab_size) if i in vocabulary and i not in special]
    ids = [i for i in ids if not BYTE.fullmatch(vocabulary[i]) and not UNUSED.fullmatch(vocabulary[i])]
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    wanted = {script.upper() for script in scripts}
    return [
        i
        for i, text in zip(ids, texts, strict=True)
        if text and "\ufffd" not in text and (not wanted or (_scripts(text) and _scripts(text) <= wanted))
    ]


def _scripts(text: str) -> set[str]:
    return {unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha()}


def special_id(teacher: Teacher, tokenizer: Any | None, name: str) -> int | None:
    """An id such as ``bos_token_id``: the tokenizer's, else what the network's configuration says."""
    found = getattr(tokenizer, name, None)
    for source in ("generation_config", "config"):
        if found is None:
            found = getattr(getattr(teacher.module, source, None), name, None)
    return found[0] if isinstance(found, list) else found


def end_ids(teacher: Teacher, tokenizer: Any | None) -> set[int]:
    """The ids behind which a text ends."""
    found: set[int] = set()
    for source in (tokenizer, getattr(teacher.module, "generation_config", None)):
        value = getattr(source, "eos_token_id", None)
        found |= set(value if isinstance(value, list) else [] if value is None else [value])
    return found or {value for value in [special_id(teacher, None, "eos_token_id")] if value is not None}
