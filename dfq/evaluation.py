"""Evaluation: real labelled data, read here and nowhere else; and the data-free figures beside it.

An evaluation is an iterable of (images [N, C, H, W] normalized for the network, labels [N]) batches; for detectors the
labels are a list of mappings (:class:`dfq.tasks.detection.BoxMetrics`). Nothing that makes data or students imports
this file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.decoding import Decoder, greedy
from dfq.errors import UserError
from dfq.hooks import capture_outputs, evaluation_mode, forward_hooks, given_choices, kept_choices
from dfq.losses.batch_norm_statistics import batch_norm_distance
from dfq.progress import progress_bar
from dfq.settings import PositiveInt
from dfq.student import Student
from dfq.tasks._backend import coco_backend
from dfq.tasks._outputs import moved
from dfq.tasks.language_modeling import NO_LABEL
from dfq.teacher import InputSpec, Teacher, TokenSpec
from dfq.tokenizer import folder_of, load_tokenizer

Batch = tuple[Tensor, Tensor]
DIGITS = Path(__file__).with_name("teachers") / "digits_data"


@dataclass(frozen=True)
class NoEvaluation:
    """No labelled data there is."""

    num_samples = 0
    reference_path = None

    def batches(self, spec: InputSpec) -> Iterator[Batch]:
        return iter(())

    def fingerprint(self) -> str:
        return ""


@dataclass(frozen=True)
class Arrays:
    """Images and labels from one ``.npz`` file."""

    path: str  # .npz with images uint8 [N, H, W, C] or [N, H, W], labels int64 [N]
    reference_path: str | None = None  # real images in the same format for the real-data reference row
    batch_size: PositiveInt = 250  # images at a time

    kind: ClassVar[str] = "images"  # what it reads, as the input spec of the networks that take it calls it

    @property
    def num_samples(self) -> int:
        return len(self._read(self.path)[1])

    def batches(self, spec: InputSpec) -> Iterator[Batch]:
        images, labels = self._read(self.path)
        _check_shape(images, spec, self.path)
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield spec.normalize(images[part]), labels[part]

    def fingerprint(self) -> str:
        """Changes when the file does."""
        return fingerprint([Path(self.path)])

    def reference_images(self, spec: InputSpec, num_samples: int) -> Tensor:
        """Up to ``num_samples`` real images [N, C, H, W], spread over the file."""
        assert self.reference_path is not None
        images, _ = self._read(self.reference_path)
        _check_shape(images, spec, self.reference_path)
        chosen = torch.linspace(0, len(images) - 1, min(num_samples, len(images))).round().long()
        return spec.normalize(images[chosen])

    @staticmethod
    def _read(path: str) -> tuple[Tensor, Tensor]:
        """images uint8 [N, C, H, W], labels int64 [N]."""
        allowed = "a .npz file with images uint8 [N, H, W, C] and labels int64 [N]"
        images, labels = _read_arrays(path, ("images", "labels"), allowed).values()
        if images.ndim == 3:
            images = images[..., None]
        integers = np.issubdtype(labels.dtype, np.integer)
        if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or not integers:
            raise UserError(
                f"got {path} with images {images.dtype} {list(images.shape)} "
                f"and labels {labels.dtype} {list(labels.shape)}",
                allowed,
            )
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


@dataclass(frozen=True)
class Digits(Arrays):
    """The embedded teacher's held-out digits; its training images make the real-data row."""

    path: str = str(DIGITS / "heldout.npz")  # held-out digits
    reference_path: str | None = str(DIGITS / "train.npz")  # training digits


@dataclass(frozen=True)
class ImageFolder:
    """Images in one folder per class (torchvision's ImageFolder), resized and center-cropped to the network's input."""

    path: str  # DIR/<class>/<image>
    reference_path: str | None = None  # a folder in the same layout for the real-data reference row
    resize: PositiveInt | None = None  # shorter side before the center crop; null: the larger input side * 256 / 224
    batch_size: PositiveInt = 100  # images at a time

    kind: ClassVar[str] = "images"

    @property
    def num_samples(self) -> int:
        return len(self._folder(self.path, None))

    def batches(self, spec: InputSpec) -> Iterator[Batch]:
        folder = self._folder(self.path, spec)
        for start in range(0, len(folder), self.batch_size):
            rows = [folder[i] for i in range(start, min(start + self.batch_size, len(folder)))]
            yield spec.normalize(torch.stack([image for image, _ in rows])), torch.tensor([label for _, label in rows])

    def fingerprint(self) -> str:
        """Changes when a file comes, goes or changes."""
        return fingerprint(sorted(Path(self.path).rglob("*")))

    def reference_images(self, spec: InputSpec, num_samples: int) -> Tensor:
        """Up to ``num_samples`` real images [N, C, H, W], spread over the classes."""
        assert self.reference_path is not None
        folder = self._folder(self.reference_path, spec)
        chosen = torch.linspace(0, len(folder) - 1, min(num_samples, len(folder))).round().long().tolist()
        return spec.normalize(torch.stack([folder[i][0] for i in chosen]))

    def _folder(self, path: str, spec: InputSpec | None) -> Any:
        from torchvision.datasets import ImageFolder as Folder
        from torchvision.transforms import v2

        transform = None
        if spec is not None:
            channels, height, width = spec.size
            transform = v2.Compose(
                [
                    v2.PILToTensor(),
                    v2.Grayscale(channels) if channels == 1 else v2.RGB(),
                    v2.Resize(self.resize or round(max(height, width) * 256 / 224), antialias=True),
                    v2.CenterCrop((height, width)),
                ]
            )
        try:
            return Folder(path, transform=transform)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"got evaluation.path={path}, which has no images in folders of classes ({str(error).splitlines()[0]})",
                "DIR/<class>/<image>",
            ) from None


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids; a label is the id itself, which a causal network has to predict from those before it."""

    path: str  # .npz with input_ids [N, T], int; shorter rows end in negative numbers
    reference_path: str | None = None  # real rows in the same format for the real-data reference row
    length: PositiveInt | None = None  # tokens of a row at most, longer ones are cut into several; null: as they are
    batch_size: PositiveInt = 16  # rows at a time at most; long rows and large vocabularies take fewer

    kind: ClassVar[str] = "token ids"

    def for_teacher(self, teacher: Teacher) -> Tokens:
        """A UserError for rows that are longer than the network has positions, and where there is none."""
        most = getattr(getattr(teacher.module, "config", None), "max_position_embeddings", None)
        longest = max(map(len, self._rows(self.path)), default=0)
        if not longest:
            raise UserError(f"got {self.path}, in which no row has a token to predict", "rows of at least two tokens")
        if most is not None and longest > most:
            raise UserError(
                f"got {self.path} with a row of {longest} tokens and {teacher.name}, which has {most} positions",
                f"rows of at most {most} tokens",
                f"give evaluation.length={most}",
            )
        return self

    @property
    def num_samples(self) -> int:
        return len(self._rows(self.path))

    def batches(self, spec: TokenSpec) -> Iterator[Batch]:
        rows = self._rows(self.path)
        _check_ids(rows, spec, self.path)
        at_once = spec.at_once(max(map(len, rows), default=1), self.batch_size)
        for start in range(0, len(rows), at_once):
            yield padded(rows[start : start + at_once])

    def fingerprint(self) -> str:
        """Changes when the file does."""
        return fingerprint([Path(self.path)])

    def reference_images(self, spec: TokenSpec, num_samples: int) -> Tensor:
        """Up to ``num_samples`` real rows [N, T] of the samples' length, spread over the file; shorter ones go on with
        the next."""
        assert self.reference_path is not None
        rows = self._rows(self.reference_path)
        _check_ids(rows, spec, self.reference_path)
        ids = torch.cat(rows)
        if len(ids) < spec.length:
            raise UserError(f"got {self.reference_path} of {len(ids)} tokens", f"at least {spec.length}")
        ids = ids[: len(ids) // spec.length * spec.length].view(-1, spec.length)
        return ids[torch.linspace(0, len(ids) - 1, min(num_samples, len(ids))).round().long()]

    def _rows(self, path: str) -> list[Tensor]:
        allowed = "a .npz file with input_ids [N, T], whole numbers, shorter rows ending in negative ones"
        arrays = _read_arrays(path, ("input_ids",), allowed)
        ids = arrays["input_ids"]
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"got {path} with input_ids {ids.dtype} {list(ids.shape)}", allowed)
        rows = [torch.from_numpy(row[: int((row >= 0).sum())].astype(np.int64)) for row in ids]
        if any((row < 0).any() for row in rows):
            raise UserError(f"got {path} with rows that go on behind a negative number", allowed)
        return _cut(rows, self.length)


@dataclass(frozen=True)
class Text(Tokens):
    """Text, cut into rows of token ids: each begins anew, so its first token is not predicted."""

    path: str  # .txt (one text) or .jsonl (one {"text": ...} a line)
    tokenizer: str | None = None  # folder or hub id; null: the teacher's

    def for_teacher(self, teacher: Teacher) -> Text:
        """With the tokenizer and the length of a teacher, where the settings do not say."""
        name = self.tokenizer or folder_of(teacher)
        if name is None:
            raise UserError(
                f"got evaluation=text and {teacher.name}, which comes without a tokenizer",
                "evaluation=tokens, or evaluation.tokenizer=FOLDER",
            )
        length = self.length or teacher.input_spec.size[0]
        found = replace(self, tokenizer=name, length=length)
        Tokens.for_teacher(found, teacher)
        return found

    def _rows(self, path: str) -> list[Tensor]:
        if self.tokenizer is None:
            raise UserError("got evaluation=text without a tokenizer", do="give evaluation.tokenizer=FOLDER")
        return list(
            _text_rows(path, self.tokenizer, self.length, fingerprint([Path(path)]) if Path(path).exists() else "")
        )


@lru_cache(maxsize=2)
def _text_rows(path: str, tokenizer: str, length: int | None, _fingerprint: str) -> tuple[Tensor, ...]:
    allowed = 'a .txt file, or a .jsonl file with a {"text": ...} a line'
    try:
        content = Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
        jsonl = Path(path).suffix == ".jsonl"
        # Not splitlines(): a string of json may hold other ends of lines as they are.
        texts = [json.loads(line)["text"] for line in content.split("\n") if line.strip()] if jsonl else [content]
    except FileNotFoundError:
        raise UserError(f"got {path}, which does not exist", allowed) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"got {path}, which can't be read ({type(error).__name__})", allowed) from None
    for wrong in [text for text in texts if not isinstance(text, str)][:1]:
        raise UserError(f"got {path} with {str(wrong)[:50]!r} for text", "a string for text")
    read = load_tokenizer(tokenizer, "evaluation.tokenizer")
    return tuple(_cut([torch.tensor(read(text)["input_ids"], dtype=torch.int64) for text in texts], length))


def _cut(rows: Iterable[Tensor], length: int | None) -> list[Tensor]:
    """Rows of at most ``length`` ids; those of one id predict nothing and are left out."""
    parts = [part for row in rows for part in (row.split(length) if length else (row,))]
    return [part for part in parts if len(part) > 1]


def padded(rows: list[Tensor]) -> Batch:
    """Ids [N, T] and labels: the same, of padding :data:`NO_LABEL`."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_LABEL)
    return ids, labels


def _check_ids(rows: list[Tensor], spec: TokenSpec, path: str) -> None:
    largest = max((int(row.max()) for row in rows), default=0)
    if largest >= spec.vocab_size:
        raise UserError(
            f"got {path} with id {largest} and a network with a vocabulary of {spec.vocab_size}",
            f"ids from 0 to {spec.vocab_size - 1}",
            "use the tokenizer of this network",
        )


def _read_arrays(path: str, names: tuple[str, ...], allowed: str) -> dict[str, Any]:
    """The named arrays of a .npz file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in names if name not in arrays]
            if missing:
                raise UserError(f"got {path} without {' and '.join(missing)}", allowed)
            return {name: arrays[name] for name in names}
    except FileNotFoundError:
        raise UserError(f"got {path}, which does not exist", allowed) from None
    except UserError:
        raise
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"got {path}, which can't be read ({reason})", allowed) from None


YOLO_GRAY = 114.0


@dataclass(frozen=True)
class Coco:
    """Images with boxes, in COCO's format: a folder of images and one ``.json`` file."""

    images: str  # DIR with the images
    annotations: str  # FILE.json with images, annotations and categories
    reference_path: str | None = None  # a folder of real images for the real-data reference row
    labels: Literal["order", "id"] = "order"  # the network's labels: categories in the order of their ids, or the ids
    fit: Literal["stretch", "pad"] = "stretch"  # to the network's input: aspect lost, or kept with a border of its mean
    batch_size: PositiveInt = 16  # images at a time

    kind: ClassVar[str] = "images"

    def __post_init__(self):
        coco_backend()  # now rather than after hours

    @property
    def num_samples(self) -> int:
        return len(self._entries())

    def batches(self, spec: InputSpec) -> Iterator[Any]:
        entries = self._entries()
        for start in range(0, len(entries), self.batch_size):
            part = entries[start : start + self.batch_size]
            fitted = [self._read(Path(self.images) / entry["file_name"], spec) for entry in part]
            images = spec.normalize(torch.stack([pixels for pixels, _ in fitted]))
            yield images, [entry | {"size": size} for entry, (_, size) in zip(part, fitted, strict=True)]

    def fingerprint(self) -> str:
        """Changes when a file comes, goes or changes."""
        annotations = Path(self.annotations)
        if not annotations.exists():
            raise UserError(f"got evaluation.annotations={annotations}, which does not exist", "COCO's json")
        return fingerprint([annotations, *_files("evaluation.images", self.images)])

    def reference_images(self, spec: InputSpec, num_samples: int) -> Tensor:
        """Up to ``num_samples`` real images [N, C, H, W], spread over the folder."""
        assert self.reference_path is not None
        suffixes = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
        files = _files("evaluation.reference_path", self.reference_path)
        files = [file for file in files if file.suffix.lower() in suffixes]
        if not files:
            raise UserError(f"got evaluation.reference_path={self.reference_path}, which has no images", "DIR/<image>")
        chosen = torch.linspace(0, len(files) - 1, min(num_samples, len(files))).round().long().tolist()
        return spec.normalize(torch.stack([self._read(files[i], spec)[0] for i in chosen]))

    def _entries(self) -> list[dict[str, Any]]:
        """Each image's file_name, boxes [n, 4] xyxy in its pixels, labels [n], iscrowd [n]."""
        allowed = "COCO's json: images (id, file_name), annotations (image_id, category_id, bbox) and categories (id)"
        try:
            content = json.loads(Path(self.annotations).read_text(encoding="utf-8"))
            numbers = sorted(category["id"] for category in content["categories"])
            label = {number: i if self.labels == "order" else number for i, number in enumerate(numbers)}
            rows: dict[Any, list[tuple[list[float], int, int]]] = {image["id"]: [] for image in content["images"]}
            for entry in content["annotations"]:
                x, y, width, height = entry["bbox"]
                row = ([x, y, x + width, y + height], label[entry["category_id"]], int(entry.get("iscrowd", 0)))
                rows[entry["image_id"]].append(row)
            return [_targets(os.fspath(image["file_name"]), rows[image["id"]]) for image in content["images"]]
        except FileNotFoundError:
            raise UserError(f"got evaluation.annotations={self.annotations}, which does not exist", allowed) from None
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"got evaluation.annotations={self.annotations}, which is not as COCO's ({reason})", allowed
            ) from None

    def _read(self, path: Path, spec: InputSpec) -> tuple[Tensor, tuple[float, float]]:
        """An image's bytes [C, H, W] as the network takes them, and what its whole input is in the image's pixels."""
        try:
            with Image.open(path) as picture:
                pixels = np.array(picture.convert("L" if spec.size[0] == 1 else "RGB"))
        except OSError as error:  # PIL's own are of that kind too
            raise UserError(f"got {path}, which can't be read ({error})", "an image in evaluation.images") from None
        image = torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)
        (height, width), (rows, columns) = image.shape[1:], spec.size[1:]
        if self.fit == "stretch":
            return _resized(image, (rows, columns)), (float(height), float(width))
        scale = min(rows / height, columns / width)
        resized = _resized(image, (max(1, round(height * scale)), max(1, round(width * scale))))
        # Networks that take bytes as they are were trained with YOLO's gray around their images.
        border = torch.tensor(spec.mean) * 255 if any(spec.mean) else torch.full((spec.size[0],), YOLO_GRAY)
        gray = border.round().to(torch.uint8).view(-1, 1, 1)
        canvas = gray.expand(spec.size).clone()
        canvas[:, : resized.shape[1], : resized.shape[2]] = resized
        return canvas, (rows / scale, columns / scale)


def _files(setting: str, folder: str) -> list[Path]:
    """In order of their names."""
    try:
        return sorted(Path(folder).iterdir())
    except OSError as error:
        raise UserError(f"got {setting}={folder}, which can't be read ({error.strerror})", "DIR with images") from None


def _targets(file_name: str, rows: list[tuple[list[float], int, int]]) -> dict[str, Any]:
    return {
        "file_name": file_name,
        "boxes": torch.tensor([box for box, _, _ in rows], dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor([label for _, label, _ in rows], dtype=torch.int64),
        "iscrowd": torch.tensor([crowd for _, _, crowd in rows], dtype=torch.int64),
    }


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bytes [C, H, W], bilinear without filtering, as detectors are fed."""
    return F.interpolate(image[None].float(), size, mode="bilinear")[0].round().clamp(0, 255).to(torch.uint8)


def fingerprint(files: Iterable[Path]) -> str:
    """Hash of names, sizes and times of change: whether data on disk is still what was measured on."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _check_shape(images: Tensor, spec: InputSpec, path: str) -> None:
    if tuple(images.shape[1:]) != spec.size:
        channels, height, width = images.shape[1:]
        raise UserError(
            f"got {path} with images of {height} x {width} x {channels}",
            f"{spec.size[1]} x {spec.size[2]} x {spec.size[0]} (height, width, channels) as the network takes",
            "resize them first, or use evaluation=imagefolder, which resizes",
        )


def _check_labels(known: Tensor, allowed: list[int]) -> None:
    """Labels [n] of boxes; allowed are those that objects can have."""
    wrong = sorted(set(known.tolist()) - set(allowed))
    if wrong:
        raise UserError(
            f"got boxes with label {wrong[0]} and a network of labels from {allowed[0]} to {allowed[-1]}",
            "labels of the network: evaluation.labels=order (categories from 0) | id (the ids of the annotations)",
        )


@torch.no_grad()
def measure(
    model: Callable[[Tensor], Any], task: Any, batches: Iterable[Batch], total: int, what: str
) -> dict[str, float]:
    """The task's metrics of ``model`` over labelled batches, as fractions; an empty dict where there is no batch."""
    metrics = None
    with progress_bar(f"evaluate {what}", total, "samples") as advance:
        for images, labels in batches:
            outputs = moved(task.raw_outputs(model, images), getattr(task, "device", "cpu"))
            if metrics is None:
                metrics = task.metrics(task.num_outputs(outputs))
            num_outputs = task.num_outputs(outputs)
            if isinstance(labels, Tensor):
                known = labels[labels != NO_LABEL]
            else:
                known = torch.cat([target["labels"] for target in labels])
                _check_labels(known, task.labels(outputs))
            if len(known) and not 0 <= int(known.min()) <= int(known.max()) < num_outputs:
                lowest, highest = int(known.min()), int(known.max())
                raise UserError(
                    f"got labels from {lowest} to {highest} and a network with {num_outputs} outputs",
                    f"labels from 0 to {num_outputs - 1}",
                )
            metrics.update(outputs, labels)
            advance(len(labels))
    return {} if metrics is None else {name: float(value) for name, value in metrics.compute().items()}


@torch.no_grad()
def fidelity(teacher: Teacher, student: Student, task: Any, images: Tensor, batch_size: int = 32) -> dict[str, Any]:
    """How close the student is to the teacher on ``images`` (held-out synthetic samples); no label is needed.

    agreement: share of samples with the same answer. kl: KL(teacher || student) in nats. layers: signal-to-
    quantization-noise ratio at the layer's output (after the batch norm that was folded into it), accumulated over the
    network up to there, and the share of the layer's inputs that its grid clips. A student with a network of its own
    has no layer that is one of the teacher's, and no such ratio; nor has one whose residual stream was rotated, nor an
    expert of a mixture, which is part of one tensor there.
    estimated_drop: what is lost of the metric on real data, by :mod:`dfq.drop`; None where the task has no rule for it.
    """
    folded = dict(student.surgery.folded)
    # A folded batch norm that carried an activation is still there under its name, with the activation alone.
    is_alike = student.network is None and not student.surgery.rotated
    theirs = dict(teacher.module.named_modules())
    at = {name: folded.get(name, name) for name in student.layers if is_alike and name in theirs}
    here = {
        name: norm if not isinstance(student.module.get_submodule(norm), nn.Identity) else name
        for name, norm in at.items()
    }
    sums = {name: [0.0, 0.0] for name in student.layers}
    # Where one quantizer serves several layers it is counted once and its share is that of each of them.
    quantizers = {name: layer.input_quantizer for name, layer in student.layers.items()}
    distinct = {id(q): (str(id(q)), q) for q in quantizers.values() if q.has_qparams and q.scheme.grid == "uniform"}
    clipped = {key: [0, 0] for key, _ in distinct.values()}

    def count_clipped(key: str, quantizer: nn.Module, inputs: tuple) -> None:
        x = inputs[0]
        low = (quantizer.scheme.quant_min - quantizer.zero_point - 0.5) * quantizer.scale
        high = (quantizer.scheme.quant_max - quantizer.zero_point + 0.5) * quantizer.scale
        clipped[key][0] += int(((x < low) | (x > high)).sum())
        clipped[key][1] += x.numel()

    agreement = kl = 0.0
    estimate = getattr(task, "estimate_drop", None)
    logits: list[tuple[Tensor, Tensor]] = []  # of student and teacher, where they are for one answer a sample
    for batch in teacher.input_spec.batches(images, batch_size):
        with capture_outputs(teacher.module, at.values()) as wanted, kept_choices(teacher.module) as chosen:
            target = task.raw_outputs(teacher, batch)
        with (
            capture_outputs(student.module, here.values()) as got,
            forward_hooks(distinct.values(), before=count_clipped),
        ):
            output = task.raw_outputs(student, batch)
        if chosen and at:  # layers are compared on the same proposals; answers, on each network's own
            with capture_outputs(student.module, here.values()) as got, given_choices(student.module, chosen):
                task.raw_outputs(student, batch)
        agreement += float(task.agreement(output, target)) * len(batch)
        kl += float(task.distillation_loss(output, target)) * len(batch)
        if estimate is not None:
            logits.append((output.cpu(), target.cpu()))
        for name in at:
            reference = student.in_its_units(name, wanted[at[name]])
            sums[name][0] += float(reference.square().sum())
            sums[name][1] += float((reference - got[here[name]]).square().sum())
    layers = []
    for name, (weight_scheme, activation_scheme) in student.swap.layers.items():
        signal, noise = sums[name]
        num_clipped, num_seen = clipped.get(str(id(quantizers[name])), (0, 0))
        layers.append(
            {
                "name": name,
                "weight_bits": weight_scheme.num_bits,
                "activation_bits": activation_scheme.num_bits,
                "sqnr_db": 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None,
                "clipped_fraction": num_clipped / num_seen if num_seen else None,
            }
        )
    drop = None if estimate is None else asdict(estimate(*(torch.cat(parts) for parts in zip(*logits, strict=True))))
    found = {"agreement": agreement / len(images), "kl": kl / len(images), "layers": layers}
    if getattr(task, "writes", False):
        found["continuation"] = continuation(teacher, student, task, images)
    return found | {"estimated_drop": drop}


@torch.no_grad()
def continuation(
    teacher: Teacher, student: Student, task: Any, ids: Tensor, num_prompts: int = 32, num_tokens: int = 32
) -> dict[str, float]:
    """How long a text stays the same: teacher and student go on greedily behind the first quarter of ids [N, T].

    match_length: tokens until the first other one, on average; of ``num_tokens``.
    """
    start = max(1, ids.shape[1] // 4)
    num_tokens = min(num_tokens, ids.shape[1] - start)
    if num_tokens < 1:
        return {"match_length": 0.0, "num_tokens": 0}
    prompts = ids[:num_prompts, :start]

    def written(model: Teacher | Student) -> Tensor:
        def last(x: Tensor) -> Tensor:
            parts = teacher.input_spec.batches(x, num_prompts)
            return torch.cat([task.raw_outputs(model, part)[:, -1:] for part in parts])

        decoder = Decoder(model.module, last, model.device, prompts.shape[1] + num_tokens)
        return greedy(decoder, prompts, num_tokens)

    wanted, got = written(teacher), written(student)
    same = (wanted == got).int().cumprod(1).sum(1).double()
    return {"match_length": float(same.mean()), "num_tokens": num_tokens}


@torch.no_grad()
def batch_norm_match(teacher: Teacher, images: Tensor, batch_size: int = 64) -> dict[str, float]:
    """Distance of each batch norm's input statistics over ``images`` to its running statistics; 0: a perfect match."""
    norms = teacher.batch_norms
    moments: dict[str, list[Tensor]] = {}

    def add(name: str, norm: nn.Module, inputs: tuple) -> None:
        # Moments about the running mean: those about zero cancel where the mean is far from it.
        x = inputs[0].transpose(0, 1).flatten(1) - norm.running_mean[:, None]
        parts = [x.sum(1).cpu().double(), x.square().sum(1).cpu().double(), torch.tensor(float(x.shape[1])).double()]
        moments[name] = [a + b for a, b in zip(moments[name], parts, strict=True)] if name in moments else parts

    with evaluation_mode(teacher.module), forward_hooks(norms.items(), before=add):
        for batch in images.split(batch_size):
            teacher(batch)
    distances = {}
    for name, norm in norms.items():
        total, squares, count = moments[name]
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        distance = batch_norm_distance(
            mean, variance, torch.zeros_like(mean), norm.running_var.cpu().double(), norm.eps
        )
        distances[name] = float(distance.mean())
    return distances
