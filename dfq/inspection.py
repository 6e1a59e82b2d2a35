"""What is in a dataset, a student or an artifact: read from the folder alone, checksums verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dfq import quality
from dfq.dataset import LEFT_OUT, SyntheticDataset, file_sha256, read_json
from dfq.errors import UserError
from dfq.report import flat, quality_facts
from dfq.student import read_manifest

BAR = 24  # characters of the most frequent class
MOST_BARS = 12
MOST_NAMED = 20  # classes without a box


def describe(path: Path) -> Table:
    """A table for the terminal; a broken file is a UserError that names it."""
    if not path.exists():
        raise UserError(f"got {path}, which does not exist", "a dataset, student or artifact folder")
    if path.is_dir() and (path / "manifest.json").exists():
        return _dataset(SyntheticDataset(path))
    if path.is_dir() and (path / "student.json").exists():
        return _student(path)
    descriptions = [path.with_name(path.name + ".json")] if path.is_file() else sorted(path.glob("*.json"))
    for description in descriptions:
        if description.exists() and read_json(description, "artifact").get("format") == "dfq.artifact":
            return _artifact(description)
    if path.is_dir() and (path / "shards").is_dir():
        raise UserError(
            f"got {path}, which has no manifest.json", "a dataset folder", "generate it again into a new folder"
        )
    raise UserError(f"got {path}", "a dataset, student or artifact folder")


def _table(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, str(value))
    return table


def _dataset(dataset: SyntheticDataset) -> Table:
    if not dataset.shards:
        raise UserError(
            f"got {dataset.path}, a dataset without samples", do="run the generate command that started it again"
        )
    dataset.verify()
    settings = dataset.manifest["settings"]
    generator = settings.get("generator", {})
    method, options = generator.get("_target_", "?"), ", ".join(f"{k}={v}" for k, v in generator.items() if k[0] != "_")
    first = dataset[0]
    rows = {
        "folder": dataset.path,
        "samples": f"{len(dataset)} in {len(dataset.shards)} shards",
        "tensors": ", ".join(
            f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in first.items()
        ),
        "generator": f"{method} ({options})" if options else method,
        "teacher": f"{dataset.provenance.get('teacher', '?')} (sha256 {settings.get('teacher_sha256', '?')[:12]})",
        "seed": settings.get("seed", "none"),
        "made": f"{dataset.manifest['created']} in {dataset.seconds:.1f} s with dfq {dataset.manifest['dfq_version']}",
        "real data read": _what_was_read(dataset.provenance),
        "checksums": f"all {len(dataset.shards)} shards match; sha256 of the content {dataset.sha256[:12]}",
    }
    if "logits" in first and first["logits"].dim() == 1:
        logits = dataset.tensors(names=("logits",))["logits"]
        counts = logits.argmax(1).bincount(minlength=logits.shape[1]).tolist()
        most = sorted(range(len(counts)), key=lambda c: -counts[c])[:10]
        rows["teacher's answers"] = f"{sum(c > 0 for c in counts)} of {len(counts)} classes; most often " + ", ".join(
            f"{c}: {counts[c]}" for c in most if counts[c]
        )
        rows["confidence"] = f"{float(logits.softmax(1).amax(1).mean()):.3f} on average"
    if LEFT_OUT in dataset.manifest:
        size, most = (dataset.manifest[LEFT_OUT][key] / 2**20 for key in ("bytes_a_sample", "most_bytes"))
        rows["raw outputs"] = f"left out: {size:.1f} MiB a sample, at most {most:g} are stored; made again when needed"
    found = quality.read(dataset)
    if "boxes" in dataset.lists:
        rows |= _boxes(dataset.tensors(names=("labels",))["labels"], found or {})
    if found is None:
        rows["quality"] = "not measured; the generate command that made it measures it"
    else:
        rows |= {"quality": found["verdict"], "because": "; ".join(found["reasons"]), **quality_facts(found)}
    return _table("Synthetic dataset", rows)


def _boxes(labels: list[Tensor], found: Mapping[str, Any]) -> dict[str, str]:
    """How many boxes there are, in each image and of each class; ``labels``: of the boxes of each image, [n] each.

    Only the network tells which classes have none: ``found``, its quality.json, has them counted.
    """
    sizes, every = [len(row) for row in labels], torch.cat(labels)
    counts = dict(zip(found.get("class_labels") or [], found.get("class_counts") or [], strict=False))
    counts = counts or {label: n for label, n in enumerate(every.bincount().tolist()) if n}
    held, classes = sum(n > 0 for n in counts.values()), len(found.get("class_labels") or [])
    without = [label for label, n in counts.items() if not n]
    rows = {
        "boxes": f"{len(every)}, {len(every) / len(sizes):.1f} an image (at most {max(sizes)}; {sizes.count(0)} images "
        f"with none), of {held} {f'of {classes} ' if classes else ''}classes"
    }
    if held:
        rows["boxes of a class"] = histogram({label: n for label, n in counts.items() if n})
    if without:
        more = f" and {len(without) - MOST_NAMED} more" if len(without) > MOST_NAMED else ""
        rows["without a box"] = f"{len(without)} classes: {', '.join(map(str, without[:MOST_NAMED]))}{more}"
    return rows


def histogram(counts: Mapping[int, int]) -> str:
    """Class, bar and count, most frequent first, each in a line; of many classes those at both ends."""
    order = sorted(counts, key=lambda label: (-counts[label], label))
    half, most = MOST_BARS // 2, max(counts.values())
    shown = order if len(order) <= MOST_BARS else order[:half] + order[-half:]
    width = max(len(str(label)) for label in shown)
    lines = [f"{label:>{width}} {'█' * max(1, round(BAR * counts[label] / most))} {counts[label]}" for label in shown]
    if len(shown) < len(order):
        left = [counts[label] for label in order[half:-half]]
        lines.insert(half, f"{len(left)} classes between, {left[-1]} to {left[0]} each")
    return "\n".join(lines)


def _student(path: Path) -> Table:
    manifest = read_manifest(path)
    file = path / "student.safetensors"
    if not file.exists() or file_sha256(file) != manifest["sha256"]:
        what = "whose content does not match its checksum" if file.exists() else "which is missing"
        raise UserError(f"got {file}, {what}", do="run the same quantize command again with another student_dir")
    settings, kept = manifest["settings"], manifest["kept_float"]
    dataset = settings.get("dataset", {})
    rows = {
        "folder": path,
        "teacher": f"{manifest['teacher']['name']} (sha256 {manifest['teacher']['sha256'][:12]})",
        **({"network": manifest["network"]} if manifest.get("network") else {}),
        "scheme": f"{manifest['scheme']['name']}, policy {manifest['scheme']['policy']}",
        "layers": f"{len(manifest['layers'])} quantized, {len(kept)} kept float",
        "batch norms folded": len(manifest["folded"]),
        **{f"kept float: {name}": reason for name, reason in kept.items()},
        **{f"calibration never reached: {name}": "ranges of its siblings" for name in manifest.get("unreached", [])},
        "weights": f"{manifest['mean_weight_bits']:.2f} bits on average",
        "size": f"{manifest['size_bytes']:,} bytes",
        "algorithm": settings.get("algorithm", {}).get("_target_", "?"),
        "dataset": f"{dataset.get('path', '?')} ({dataset.get('num_samples', '?')} samples)",
        "real data read": _what_was_read(dataset.get("provenance", {})),
        "made": f"{manifest['created']} in {manifest['seconds']:.1f} s with dfq {manifest['dfq_version']}",
        "checksum": f"matches; sha256 {manifest['sha256'][:12]}",
    }
    return _table("Student", rows)


def _artifact(description_path: Path) -> Table:
    description = read_json(description_path, "artifact")
    file = description_path.with_name(description_path.name.removesuffix(".json"))
    if not file.exists() or file_sha256(file) != description["sha256"]:
        what = "whose content does not match its checksum" if file.exists() else "which is missing"
        raise UserError(f"got {file}, {what}", do="run the same export command again")
    rows = {
        "file": file,
        "format": description["exporter"]["_target_"] if isinstance(description.get("exporter"), dict) else "?",
        "size": f"{description['size_bytes']:,} bytes",
        **({"exact size": f"{bits['bytes']:,.1f} bytes"} if (bits := description.get("exact_bits")) else {}),
        **{f"parity: {key}": value for key, value in flat(description["parity"]).items()},
        **{
            f"latency, {key}": f"{value:.3f} ms"
            for key, value in (description["latency_ms"] or {}).items()
            if value is not None
        },
        "checksum": f"matches; sha256 {description['sha256'][:12]}",
    }
    return _table("Artifact", rows)


def _what_was_read(provenance: dict[str, Any]) -> str:
    if not provenance:
        return "unknown"
    read = [name for name in ("pixels", "labels") if provenance.get(name)]
    return ", ".join(read) if read else "nothing: no pixels, no labels"
