"""What goes with a language model's file: tokenizer, chat template and generation settings, copied as they are.

Needs no transformers: exporters of any network look here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from dfq.dataset import write_atomic
from dfq.errors import UserError
from dfq.exporters import _artifact as artifact
from dfq.student import Student

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "chat_template*")
COPIED = (*TOKENIZER, "generation_config.json", "spiece.model", "sentencepiece*.model")
# What of these is looked for on the hub, which has no patterns.
ON_HUB = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json", "spiece.model"),
)
NO_TOKENIZER = "not stored: the teacher came without one, or its folder can't be read from here"


def source_folder(student: Student) -> Path | None:
    """The folder that the teacher came from; for one of the hub, that of its files here, with those of its tokenizer
    fetched where they lack; None: it was made in memory, or is out of reach."""
    config = student.teacher.get("config") or {}
    both = ((config.get("name"), config.get("revision")), (student.module.config._name_or_path, None))
    names = [(name, revision) for name, revision in both if name]
    folders = (Path(name) for name, _ in names)
    here = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    return here or next(filter(None, (_from_hub(name, revision) for name, revision in names)), None)


def _from_hub(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download

    found = None
    for file in ("config.json", *ON_HUB):
        # Nearly any error: no such network, no such file in it, no connection, a name that is none.
        with contextlib.suppress(Exception), artifact.silence():
            found = Path(hf_hub_download(name, file, revision=revision)).parent
        if found is None:  # not even config.json
            return None
    return found


def travelling(student: Student, folder: Path | None) -> dict[str, bytes]:
    """Files of tokenizer and generation settings that go with the network, by name."""
    if folder is None:
        generation = getattr(student.module, "generation_config", None)
        return {} if generation is None else {"generation_config.json": generation.to_json_string().encode()}
    found = {file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()}
    return {file.name: file.read_bytes() for file in sorted(found)}


def has_tokenizer(files: Iterable[str]) -> bool:
    """Whether there is a tokenizer among files of these names."""
    return any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece")) for name in files)


def write_beside(path: Path, files: dict[str, bytes]) -> None:
    """Each file into the folder of ``path``."""
    for name, content in files.items():
        try:
            write_atomic(path.parent / name, content)
        except OSError as error:
            raise UserError(
                f"got artifact_path={path}, beside which {name} can't be written ({error.strerror})"
            ) from error
