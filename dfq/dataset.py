"""SyntheticDataset: the store of synthetic samples, a folder that describes itself.

::

    DIR/manifest.json              what made it: teacher hash, generator and settings, seed, versions, provenance; once
                                   it is whole, num_samples
    DIR/shards/000003.safetensors  batch 3: images (exactly as they left the optimizer), logits (the teacher's outputs),
                                   raw.NAME (outputs that have names); of detectors boxes, labels, scores; of text
                                   input_ids, num_tokens, the teacher's largest log-probabilities if asked for
    DIR/shards/000003.json         num_samples, sha256 and seconds of that shard
    DIR/source.safetensors         weights of a network that all images were drawn from, where there is one (gdfq)
    DIR/quality.json               once it is whole: figures and a verdict, see dfq/quality.py; may be missing

A shard is written to a temporary name and renamed, and counts only once its json is there: a killed run loses at most
the batch in flight. Batch i depends on (seed, i) alone, so whoever continues makes the same bits. Reading is
memory-mapped.

What has another length in every sample (boxes) lies in a shard as one tensor, all samples' rows one after the other,
beside ``NAME.counts`` [N], the rows of each.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

import dfq
from dfq.errors import UserError

SCHEMA_VERSION = 1
COUNTS = ".counts"  # behind the name of what has another length in every sample
QUALITY = "quality.json"
LEFT_OUT = "raw_outputs_left_out"  # of a manifest: the teacher's outputs were too large to be stored
SOURCE = "source.safetensors"
HOST = re.sub(r"[^\w]+", "_", socket.gethostname()) or "here"
ABANDONED_S = 86_400.0  # after which a temporary file of another machine belongs to nobody
SAMPLES = ("images", "input_ids")  # what a network takes, by its name in a shard
MOST_IN_MEMORY = 2**29  # bytes of samples that are read at once; more are mapped
AT_ONCE = 16  # samples that are copied at once


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; then flush to disk, rename: ``path`` is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors writes for the owner's eyes alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """``content`` into a file that is whole or not there."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def remove_if_empty(folder: Path) -> None:
    """Remove ``folder`` and the folders below it unless there is a file in it."""
    if folder.is_dir() and not any(file.is_file() for file in folder.rglob("*")):
        shutil.rmtree(folder)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The json object in ``path``; a UserError that says what is missing or broken otherwise."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"got {path.parent}, which has no {path.name}", f"a {what} folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"got {path}, which can't be read as json ({error})", f"a {what} folder") from None
    if not isinstance(value, dict):
        raise UserError(f"got {path}, which holds no json object", f"a {what} folder")
    return value


def read_manifest(path: Path, kind: str, schema_version: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """The manifest in ``path``: of this ``kind`` ("student"), not newer than we read, and with ``keys``."""
    what = kind.replace("_", " ")
    manifest = read_json(path, what)
    if manifest.get("format") != f"dfq.{kind}":
        raise UserError(f"got {path.parent}, which is a {manifest.get('format')} folder", f"a {what} folder")
    version = manifest.get("schema_version")
    if not isinstance(version, int):
        raise UserError(f"got {path} without schema_version", f"a whole {what} folder")
    if version > schema_version:
        raise UserError(
            f"got a {what} of schema version {version}", f"at most {schema_version}", "install a newer dfq to read it"
        )
    missing = [key for key in keys if key not in manifest]
    if missing:
        raise UserError(f"got {path} without {', '.join(missing)}", f"a whole {what} folder")
    return manifest


def samples_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """What a network takes among ``tensors`` of a dataset or a batch: images [N, C, H, W], or token ids [N, T]."""
    return next(tensors[name] for name in SAMPLES if name in tensors)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SyntheticDataset(torch.utils.data.Dataset):
    """Samples on disk; reads like any torch dataset: ``dataset[i]`` is a dict of tensors (``images`` [C, H, W],
    ``logits`` [num_classes], ``boxes`` [n, 4], ...), ``dataset.tensors()`` all of them stacked; a list of tensors of
    what has another length in every sample.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest = read_manifest(
            self.path / "manifest.json", "synthetic_dataset", SCHEMA_VERSION, ("settings", "provenance", "created")
        )
        self._open: dict[int, Any] = {}

    # -- writing ------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, path: str | os.PathLike, settings: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> SyntheticDataset:
        """Open the dataset in ``path`` to add shards, or start it.

        Args:
            settings: everything that decides the content of a shard (teacher, generator, seed, ...). A folder that
                was made with other settings is an error that names the first difference.
            provenance: what was read to make it: ``{"pixels": False, "labels": False}`` for a data-free one.
        """
        path = Path(path)
        manifest = {
            "format": "dfq.synthetic_dataset",
            "schema_version": SCHEMA_VERSION,
            "dfq_version": dfq.__version__,
            "torch_version": str(torch.__version__),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": json.loads(json.dumps(settings)),
            "provenance": dict(provenance),
        }
        if (path / "manifest.json").exists():
            dataset = cls(path)
            difference = first_difference(dataset.manifest["settings"], manifest["settings"])
            if difference and not dataset.shards:  # started and never got anywhere: nothing to protect
                write_json(path / "manifest.json", manifest)
                dataset = cls(path)
            elif difference:
                raise UserError(
                    f"got dataset_dir={path}, a dataset made with other settings ({difference})",
                    "an empty or new folder, or the same settings",
                    "choose another dataset_dir",
                )
        else:
            if path.exists() and (not path.is_dir() or any(map(_is_foreign, path.iterdir()))):
                raise UserError(
                    f"got dataset_dir={path}, which is {'not empty' if path.is_dir() else 'a file'} and no dataset",
                    "an empty or new folder",
                    "choose another dataset_dir",
                )
            write_json(path / "manifest.json", manifest)
            dataset = cls(path)
        for file in [*path.glob(".*.tmp"), *(path / "shards").glob(".*.tmp")]:
            if _is_temporary(file) and not _is_in_use(file):
                file.unlink(missing_ok=True)
        return dataset

    def has_shard(self, index: int, num_samples: int) -> bool:
        """Whether shard ``index`` is there, whole (checksum) and holds exactly ``num_samples``."""
        entry = self._entry(index)
        if entry is None or entry["num_samples"] != num_samples:
            return False
        data = self._shard_path(index)
        return data.exists() and file_sha256(data) == entry["sha256"]

    def write_shard(self, index: int, tensors: Mapping[str, Tensor | Sequence[Tensor]], seconds: float) -> None:
        """Add (or replace) batch ``index``; the first dimension of every tensor is the sample, or there is a list of
        tensors, one a sample.
        """
        sizes = {len(tensor) for tensor in tensors.values()}
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in _flat(tensors).items()})
        if len(sizes) != 1:
            raise ValueError(f"tensors of one shard must agree in their first dimension, got {sorted(sizes)}")
        self._shard_path(index, ".json").unlink(missing_ok=True)
        write_atomic(self._shard_path(index), content)
        write_json(
            self._shard_path(index, ".json"),
            {"num_samples": sizes.pop(), "sha256": hashlib.sha256(content).hexdigest(), "seconds": round(seconds, 3)},
        )
        self._forget()

    def write_source(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights of the network that all images are drawn from."""
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
        write_atomic(self.path / SOURCE, content)
        self.note(source_sha256=hashlib.sha256(content).hexdigest())

    def adopt(self, other: SyntheticDataset) -> None:
        """Take over the shards of ``other`` that are missing here: a part made elsewhere, with the same settings.

        Each is checked against its checksum. Where both have a shard of as many samples, it has to be the same bits.
        """
        difference = first_difference(other.manifest["settings"], self.manifest["settings"])
        if difference:
            raise UserError(
                f"got {other.path}, made with other settings than {self.path} ({difference})",
                "parts of one dataset: the same teacher, generator, seed and batch size",
            )
        weights = other.source()
        if weights is not None and self.source() is None:
            self.write_source(weights)
        self.note(**{key: other.manifest[key] for key in ("boxes_from", LEFT_OUT) if key in other.manifest})
        for shard in other.shards:
            index, count = shard["index"], shard["num_samples"]
            mine = self._entry(index)
            if mine is not None and self.has_shard(index, mine["num_samples"]):
                if mine["num_samples"] == count and mine["sha256"] != shard["sha256"]:
                    raise UserError(
                        f"got {other.path}, whose batch {index} has other bits than that in {self.path}",
                        "parts made with the same version of torch on the same kind of machine",
                        "make one of them again",
                    )
                if mine["num_samples"] >= count:
                    continue
            content = other._shard_path(index).read_bytes()
            if hashlib.sha256(content).hexdigest() != shard["sha256"]:
                raise UserError(
                    f"got {other._shard_path(index)}, whose content does not match its checksum",
                    do="run the command that made it again to repair it",
                )
            self._shard_path(index, ".json").unlink(missing_ok=True)
            write_atomic(self._shard_path(index), content)
            write_json(
                self._shard_path(index, ".json"), {key: shard[key] for key in ("num_samples", "sha256", "seconds")}
            )
        self._forget()

    def discard_if_empty(self) -> None:
        """Remove the folder again if no sample ever got into it."""
        if not self.shards:
            for name in ("manifest.json", QUALITY, SOURCE):
                (self.path / name).unlink(missing_ok=True)
            remove_if_empty(self.path)

    # -- reading ------------------------------------------------------------------------------------------------

    @cached_property
    def shards(self) -> list[dict[str, Any]]:
        """Index, num_samples, sha256 and seconds of every complete shard, in order."""
        entries = []
        for index in self._indices(".json"):
            entry = self._entry(index)
            if entry is not None and self._shard_path(index).exists():
                entries.append({"index": index, **entry})
        return entries

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for shard in self.shards:
            starts.append(starts[-1] + shard["num_samples"])
        return starts

    @property
    def num_samples(self) -> int:
        return self._starts[-1]

    def __len__(self) -> int:
        return self.num_samples

    @property
    def sha256(self) -> str:
        """Hash of the content: the checksums of the shards in order. Says nothing of when or how fast it was made."""
        return hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode()).hexdigest()

    @property
    def seconds(self) -> float:
        return sum(shard["seconds"] for shard in self.shards)

    @property
    def provenance(self) -> dict[str, Any]:
        return self.manifest["provenance"]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        position = bisect.bisect_right(self._starts, index) - 1
        file = self._file(position)
        row = index - self._starts[position]
        names = set(file.keys())
        found = {}
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name + COUNTS in names:
                counts = file.get_tensor(name + COUNTS)
                start = int(counts[:row].sum())
                found[name] = file.get_slice(name)[start : start + int(counts[row])]
            elif not name.endswith(COUNTS):
                found[name] = file.get_slice(name)[row : row + 1][0]
        return found

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def tensors(self, num_samples: int | None = None, names: Collection[str] | None = None) -> dict[str, Any]:
        """All samples (or the first ``num_samples``) as one dict of stacked tensors (or of those with ``names``).

        What has another length in every sample comes as a list.
        """
        if not self.shards:
            raise UserError(f"got {self.path}, a dataset without samples", do="generate into it first")
        parts: dict[str, list[Any]] = {}
        for position in range(len(self.shards)):
            file = self._file(position)
            stored = set(file.keys())
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name.endswith(COUNTS) or (names is not None and name not in names):
                    continue
                tensor = file.get_tensor(name)
                if name + COUNTS in stored:
                    tensor = list(tensor.split(file.get_tensor(name + COUNTS).tolist()))
                parts.setdefault(name, []).append(tensor)
            if num_samples is not None and self._starts[position + 1] >= num_samples:
                break
        return {
            name: (torch.cat(rows) if isinstance(rows[0], Tensor) else [*chain.from_iterable(rows)])[:num_samples]
            for name, rows in parts.items()
        }

    @property
    def lists(self) -> set[str]:
        """Names of what has another length in every sample."""
        if not self.shards:
            return set()
        return {name.removesuffix(COUNTS) for name in self._file(0).keys() if name.endswith(COUNTS)}  # noqa: SIM118

    def samples(self, which: int | Sequence[int] | None = None) -> Tensor:
        """What the network takes, images or token ids: of all samples, of the first ``which``, or of those numbers.

        More than :data:`MOST_IN_MEMORY` bytes are mapped from a file without a name, so that they can be large without
        taking memory from what works on them.
        """
        if not self.shards:
            raise UserError(f"got {self.path}, a dataset without samples", do="generate into it first")
        indices = range(len(self))[:which] if which is None or isinstance(which, int) else which
        name = next(name for name in SAMPLES if name in self._file(0).keys())  # noqa: SIM118 (not a dict)
        rows: dict[int, list[tuple[int, int]]] = {}  # shard → places in what is returned, and rows of the shard
        for place, index in enumerate(indices):
            position = bisect.bisect_right(self._starts, index) - 1
            rows.setdefault(position, []).append((place, index - self._starts[position]))
        found: Tensor | None = None
        for position, pairs in rows.items():
            values = self._file(position).get_tensor(name)
            if found is None:
                found = _room((len(indices), *values.shape[1:]), values.dtype)
            places, chosen = (list(numbers) for numbers in zip(*pairs, strict=True))
            for start in range(0, len(places), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                found[places[part]] = values[chosen[part]]
        return self._file(0).get_tensor(name)[:0] if found is None else found

    def source(self) -> dict[str, Tensor] | None:
        """Weights of the network that all images were drawn from; None: there is none, each batch was made for itself.

        A UserError where it is missing or broken.
        """
        wanted, path = self.manifest.get("source_sha256"), self.path / SOURCE
        if wanted is None:
            return None
        if not path.exists() or file_sha256(path) != wanted:
            what = "whose content does not match its checksum" if path.exists() else "which is missing"
            raise UserError(f"got {path}, {what}", do="generate the dataset into a new folder")
        return load_file(path)

    def without_padding(self, indices: Sequence[int]) -> Tensor:
        """:meth:`samples` of these numbers for whoever lets every token count: where texts end before their row does,
        [M, T] in which one goes on with the next, as text is cut that networks are trained on; less than a row is left
        away."""
        found = self.samples(indices)
        counts = self.tensors(names=("num_tokens",)).get("num_tokens")
        if counts is None or bool((counts[list(indices)] >= found.shape[1]).all()):
            return found
        ids = torch.cat([row[:count] for row, count in zip(found, counts[list(indices)].tolist(), strict=True)])
        length = min(found.shape[1], len(ids))
        return ids[: len(ids) // length * length].view(-1, length)

    def texts(self) -> Iterator[list[int]]:
        """Token ids of each sample, without padding."""
        if not self.shards:
            raise UserError(f"got {self.path}, a dataset without samples", do="generate into it first")
        if "input_ids" not in self[0]:
            raise UserError(f"got {self.path}, a dataset of images", "a dataset of token ids")
        for sample in self:
            ids = samples_of(sample)
            yield ids[: int(sample.get("num_tokens", len(ids)))].tolist()

    def to_jsonl(self, path: str | os.PathLike, decode: Callable[[list[int]], str] | None = None) -> Path:
        """Token ids for other tools, ``{"input_ids": [...]}`` a line; with ``decode`` (a tokenizer's) ``text`` too."""
        lines = []
        for ids in self.texts():
            lines.append(json.dumps({"input_ids": ids} | ({} if decode is None else {"text": decode(ids)})))
        try:
            write_atomic(Path(path), ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise UserError(
                f"got to_jsonl({path}), which can't be written ({error.strerror})", "a file name"
            ) from error
        return Path(path)

    def to_huggingface(self) -> Any:
        """Token ids as a ``datasets.Dataset`` with ``input_ids`` and ``attention_mask``: what calibration asks for."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                "got to_huggingface(), which needs datasets, not installed here",
                "to_jsonl(path), which needs nothing",
                "pip install datasets",
            ) from None
        rows = list(self.texts())
        return datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]})

    def note(self, **facts: Any) -> None:
        """Add what is known only once samples are there to the manifest, beside the settings that made them."""
        if any(self.manifest.get(key) != value for key, value in facts.items()):
            self.manifest |= json.loads(json.dumps(facts))
            write_json(self.path / "manifest.json", self.manifest)

    def split(self, fraction: float = 0.1) -> tuple[list[int], list[int]]:
        """Indices (kept, held out): every k-th sample is held out, k = 1 / fraction, so every batch gives its share.

        The held-out part is what data-free selection looks at: early stopping, fidelity, comparison of settings.
        """
        if not 0 < fraction <= 0.5:
            raise UserError(f"got a held-out share of {fraction}", "above 0, at most 0.5")
        every = round(1 / fraction)
        held_out = [i for i in range(len(self)) if i % every == every - 1] or [len(self) - 1]
        taken = set(held_out) if len(self) > 1 else set()
        return [i for i in range(len(self)) if i not in taken], held_out

    def stored_quality(self) -> dict[str, Any] | None:
        """Figures and verdict that :mod:`dfq.quality` has stored, if they are of the content that is there now."""
        try:
            stored = json.loads((self.path / QUALITY).read_text())
        except (OSError, ValueError):
            return None
        known = isinstance(stored, Mapping) and stored.get("format") == "dfq.quality"
        return dict(stored) if known and stored.get("dataset_sha256") == self.sha256 else None

    @property
    def is_poor(self) -> bool:
        """Whether it was found to be such that what a student does on it says little about real samples."""
        return (self.stored_quality() or {}).get("verdict") == "poor"

    def verify(self) -> None:
        """Check every shard against its checksum; a UserError names the first broken or missing one."""
        indices = {*self._indices(".json"), *self._indices(".safetensors")}
        for index in range(max(indices, default=-1) + 1):
            entry, data = self._entry(index), self._shard_path(index)
            if entry is None or not data.exists():
                missing = self._shard_path(index, ".json") if data.exists() else data
                raise UserError(
                    f"got {self.path} without {missing.name}", do="run the same generate command again to repair it"
                )
            if file_sha256(data) != entry["sha256"]:
                raise UserError(
                    f"got {data}, whose content does not match its checksum",
                    do="run the same generate command again to repair it",
                )
        finished = self.manifest.get("num_samples", 0)
        if len(self) < finished:
            missing = self._shard_path(max(indices, default=-1) + 1)
            raise UserError(
                f"got {self.path} without {missing.name}: {len(self)} of the {finished} samples that were finished",
                do="run the same generate command again to repair it",
            )
        self.source()

    def _shard_path(self, index: int, suffix: str = ".safetensors") -> Path:
        return self.path / "shards" / f"{index:06d}{suffix}"

    def _indices(self, suffix: str) -> list[int]:
        files = (self.path / "shards").glob(f"*{suffix}")
        return sorted(int(file.stem) for file in files if file.stem.isdecimal())

    def _entry(self, index: int) -> dict[str, Any] | None:
        try:
            entry = json.loads(self._shard_path(index, ".json").read_text())
            return {
                "num_samples": int(entry["num_samples"]),
                "sha256": str(entry["sha256"]),
                "seconds": float(entry["seconds"]),
            }
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _file(self, position: int):
        if position not in self._open:
            path = self._shard_path(self.shards[position]["index"])
            try:
                self._open[position] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"got {path}, which is no whole safetensors file ({error})",
                    do="run the same generate command again to repair it",
                ) from None
        return self._open[position]

    def _forget(self) -> None:
        self._open.clear()
        self.__dict__.pop("shards", None)
        self.__dict__.pop("_starts", None)

    def __getstate__(self) -> dict[str, Any]:  # open files do not travel to worker processes
        return {**self.__dict__, "_open": {}}


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor; above :data:`MOST_IN_MEMORY` in a file that goes when nothing refers to it any more."""
    size = torch.Size(shape).numel()
    if size * dtype.itemsize <= MOST_IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="dfq_", delete=os.name == "posix") as file:
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def _flat(tensors: Mapping[str, Tensor | Sequence[Tensor]]) -> dict[str, Tensor]:
    """As a shard holds them: lists as one tensor and its counts."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            found[name] = value
        else:
            found[name] = torch.cat(list(value))
            found[name + COUNTS] = torch.tensor([len(rows) for rows in value])
    return found


def collate(samples: Sequence[Mapping[str, Tensor]], lists: Collection[str] = ()) -> dict[str, Any]:
    """Samples of a dataset as a batch: tensors stacked, those with a name in ``lists`` side by side in a list."""
    return {
        name: [s[name] for s in samples] if name in lists else torch.stack([s[name] for s in samples])
        for name in samples[0]
    }


def _is_foreign(file: Path) -> bool:
    """Whether somebody else has put ``file`` into a folder that has no manifest yet."""
    return not _is_temporary(file) and file.name != QUALITY


def _is_temporary(file: Path) -> bool:
    """Whether ``file`` has the kind of name that :func:`write_atomic` writes under."""
    return file.name.startswith(".") and file.suffix == ".tmp"


def _is_in_use(temporary: Path) -> bool:
    """Whether the process that writes ``temporary`` may still be at work; of one elsewhere its age alone tells."""
    host, _, process = temporary.stem.rpartition(".")[2].rpartition("-")
    if host not in ("", HOST):
        try:
            return time.time() - temporary.stat().st_mtime < ABANDONED_S
        except OSError:
            return False
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return int(process) != os.getpid()


def first_difference(have: Any, want: Any, where: str = "") -> str:
    """Where two json-able settings first differ (``"seed: there 0, here 1"``), or an empty string."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in sorted({*have, *want}):
            found = first_difference(have.get(key), want.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return ""
    return "" if have == want else f"{where}: there {have!r}, here {want!r}"
