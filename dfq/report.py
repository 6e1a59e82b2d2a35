"""Report: what a run leaves in its folder for people and for programs, and the table on the terminal.

::

    DIR/report.json    the contract: exactly the keys of :data:`REPORT`, a stage that was not run is null
    DIR/details.json   what the page shows besides: :data:`DETAILS`
    DIR/images.png     up to 64 synthetic images in a grid
    DIR/report.html    one self-contained page, made from the three files above and from nothing else

Metrics are fractions in 0..1 (or perplexity), sizes bytes, times seconds unless the name says ``_ms``. A figure that is
missing or not finite is null in the files and "n/a" on the page, never "nan".
"""

from __future__ import annotations

import base64
import io
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, TypeGuard

import jinja2
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import dfq
from dfq.dataset import read_json, write_atomic, write_json
from dfq.errors import UserError
from dfq.teacher import resolve_device


@dataclass(frozen=True)
class Layout:
    """Of the grid of images: at most so many, in so many columns, the longer side of each so many pixels."""

    most: int
    columns: int
    longest: int


SMALL, WIDE = Layout(64, 8, 112), Layout(24, 2, 720)
LABELS = {"top1": "top-1", "top5": "top-5", "map": "mAP", "map_50": "mAP at 50 % overlap"}
MAIN_METRIC = {
    "classification": "top1",
    "detection": "map",
    "language_modeling": "perplexity",
    "masked_language_modeling": "perplexity",
}
LOWER_IS_BETTER = ("perplexity",)
SHARES = ("top1", "top5", "agreement")  # of samples: their standard error follows from how many there are

# What the files hold. A mapping: these exact keys; {str: x}: any keys; [x]: a list of x; (x, None): x or null.
NUMBER, TEXT = (float, None), (str, None)
METRICS = {str: NUMBER}
REPORT: dict[str, Any] = {
    "dfq_version": str,
    "created": str,
    "command": str,
    "seed": (int, None),
    "environment": {str: object},
    "teacher": {
        "name": str,
        "sha256": str,
        "task": str,
        "num_parameters": int,
        "size_bytes": int,
        "metrics": METRICS,
    },
    "dataset": (
        {
            "path": str,
            "generator": str,
            "num_samples": int,
            "sha256": str,
            "seconds": NUMBER,
            "provenance": {"pixels": bool, "labels": bool},
        },
        None,
    ),
    "student": (
        {
            "scheme": str,
            "policy": str,
            "algorithm": str,
            "size_bytes": int,
            "mean_weight_bits": NUMBER,
            "seconds": NUMBER,
            "metrics": METRICS,
        },
        None,
    ),
    "fidelity": (
        {
            "agreement": NUMBER,
            "kl": NUMBER,
            "layers": [
                {
                    "name": str,
                    "weight_bits": (int, None),
                    "activation_bits": (int, None),
                    "sqnr_db": NUMBER,
                    "clipped_fraction": NUMBER,
                }
            ],
        },
        None,
    ),
    "artifact": (
        {
            "path": str,
            "format": str,
            "size_bytes": int,
            "parity": ({str: object}, None),
            "latency_ms": ({"float": NUMBER, "quantized": NUMBER}, None),
        },
        None,
    ),
}
REFERENCE: dict[str, Any] = {  # one row of the table
    "row": str,
    "role": str,  # teacher | student | reference
    "generator": TEXT,
    "metrics": METRICS,
    "agreement": NUMBER,
    "kl": NUMBER,
    "seconds": NUMBER,
    "num_samples": (int, None),
}
DETAILS: dict[str, Any] = {  # every key may be missing
    "references": [REFERENCE],  # in order of display
    # distance of the statistics of each source's images to the running statistics; 0 is a perfect match
    "batch_norm_match": [{"name": str, "synthetic": NUMBER, "gaussian": NUMBER, "real": NUMBER}],
    "allocation": ({str: object}, None),  # what allocation.json of a student of mixed precision holds
    "images": {str: object},
    "kept_float": {str: str},  # layer → reason
    "unreached": [str],  # layers of experts that no token chose during calibration
    "held_out": {"num_samples": (int, None)},
    "judged": {"num_samples": (int, None)},  # that the metrics come from; null where they are not counted
    # share of the teacher's metric that is lost on real data, estimated without any, and what it was estimated from
    "estimated_drop": (
        {"drop": NUMBER, "low": NUMBER, "high": NUMBER, "disagreement": NUMBER, "doubled_disagreement": NUMBER},
        None,
    ),
    "continuation": ({"match_length": NUMBER, "num_tokens": int}, None),  # of texts that teacher and student go on with
    "quality": ({str: object}, None),  # what quality.json of the dataset holds
    "student_dir": TEXT,
    "network": TEXT,  # of a student that is not made of its teacher's: what builds it
    "notes": [str],
    "grid": ({"num_images": int, "columns": int, "height": int, "width": int}, None),  # tiles of images.png, pixels
    "predictions": ([str], None),  # what the teacher says to each image of the grid
    "boxes_from": TEXT,  # of a detector's images: "generator", which made them to hold these boxes, or "teacher"
}

OPTIONAL = (
    "student_dir",
    "network",
    "grid",
    "predictions",
    "boxes_from",
    "allocation",
    "estimated_drop",
    "continuation",
    "quality",
)  # of DETAILS; null where missing


def validate(report: Any) -> None:
    """Check keys and types of a report against :data:`REPORT`; a ValueError names what differs."""
    _check(report, REPORT, "report")


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, tuple):
        if value is not None:
            _check(value, schema[0], where)
    elif isinstance(schema, dict):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}, not a mapping")
        anything = schema.get(str)
        if anything is None and value.keys() != schema.keys():
            missing, unknown = [k for k in schema if k not in value], [k for k in value if k not in schema]
            faults = [f"{where}.{key} is missing" for key in missing] + [f"{where}.{key} is unknown" for key in unknown]
            raise ValueError(" and ".join(faults))
        for key, item in value.items():
            _check(item, anything or schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{where} is {value!r}, not a list")
        for index, item in enumerate(value):
            _check(item, schema[0], f"{where}[{index}]")
    else:
        kinds = (int, float) if schema is float else (schema,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and schema in (int, float)):
            raise ValueError(f"{where} is {value!r}, not of type {schema.__name__}")


def _checked_details(details: Mapping[str, Any]) -> dict[str, Any]:
    """``details`` with every key of :data:`DETAILS`, and every row with every key of :data:`REFERENCE`."""
    lists: dict[str, Any] = {key: [] for key in ("references", "batch_norm_match", "notes", "unreached")}
    mappings: dict[str, Any] = {key: {} for key in ("images", "kept_float")}
    counts: dict[str, Any] = {"held_out": {"num_samples": None}, "judged": {"num_samples": None}}
    filled = lists | mappings | counts | dict.fromkeys(OPTIONAL) | dict(details)
    if isinstance(filled["references"], Sequence):
        empty: dict[str, Any] = {**dict.fromkeys(REFERENCE), "metrics": {}}
        filled["references"] = [{**empty, **row} if isinstance(row, Mapping) else row for row in filled["references"]]
    _check(filled, DETAILS, "details")
    return filled


def _plain(value: Any) -> Any:
    """``value`` as json holds it: paths as text, numpy's and torch's numbers as Python's, not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(device: str | torch.device = "auto") -> dict[str, Any]:
    """Versions and machine, as far as they decide figures and times. ``device``: what the run computed on."""
    found = resolve_device(device)
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "dfq": dfq.__version__,
        "onnxruntime": _version("onnxruntime"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(found) if found.type == "cuda" else str(found),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:  # Linux; platform.processor() is empty there
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------ files


def write(
    output_dir: str | os.PathLike,
    report: Mapping[str, Any],
    details: Mapping[str, Any],
    images: Tensor | None = None,
    predictions: Sequence[str] | None = None,
    layout: Layout = SMALL,
) -> Path:
    """Write ``report.json``, ``details.json``, ``images.png`` and ``report.html``; returns the path of the page.

    Args:
        images: uint8 [N, C, H, W]; the first 64 are shown.
        predictions: what the teacher says to each of them.
    """
    output_dir = Path(output_dir)
    plain, extra = _plain(report), _plain(details)
    validate(plain)
    extra["grid"], extra["predictions"] = None, None
    if images is not None and len(images):
        images = images[: layout.most]
        content, extra["grid"] = _draw_grid(images, layout)
        if predictions is not None:
            extra["predictions"] = [str(label) for label in predictions[: len(images)]]
        write_atomic(output_dir / "images.png", content)
    else:
        (output_dir / "images.png").unlink(missing_ok=True)
    _checked_details(extra)
    write_json(output_dir / "details.json", extra)
    write_json(output_dir / "report.json", plain)
    return render(output_dir)


def read(output_dir: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """report and details of a run's folder. A folder without a whole report.json is a UserError."""
    path = Path(output_dir) / "report.json"
    report, details = _plain(read_json(path, "run")), {}
    try:
        validate(report)
        path = Path(output_dir) / "details.json"
        if path.exists():
            details = _plain(read_json(path, "run"))
        return report, _checked_details(details)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"got {path}, which is not as dfq writes it ({error})", "a run folder") from None


def render(output_dir: str | os.PathLike) -> Path:
    """Make ``report.html`` from the files beside it, see :func:`read`."""
    output_dir = Path(output_dir)
    report, details = read(output_dir)
    tiles = _read_grid(output_dir / "images.png", details["grid"])
    page = _template().render(_page(report, details, tiles))
    write_atomic(output_dir / "report.html", page.encode())
    return output_dir / "report.html"


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {
        "number": format_number,
        "whole": format_count,
        "size": format_size,
        "duration": format_seconds,
        "percent": format_percent,
        "metric_label": metric_label,
    }
    return page.get_template("report.html.j2")


def draw_boxes(images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor], color: str) -> Tensor:
    """Boxes [n, 4] xyxy in pixels, with their labels, on uint8 [N, C, H, W]; returns [N, 3, H, W]."""
    from torchvision.utils import draw_bounding_boxes

    if images.shape[1] != 3:
        images = images.float().mean(1, keepdim=True).to(torch.uint8).expand(-1, 3, -1, -1)
    drawn = []
    for image, found, names in zip(images, boxes, labels, strict=True):
        there = (found[:, 2:] >= found[:, :2]).all(1)
        words = [str(int(name)) for name in names[there]]
        width = max(1, min(image.shape[1:]) // 160)
        drawn.append(draw_bounding_boxes(image, found[there], words, color, width=width) if words else image)
    return torch.stack(drawn)


def _draw_grid(images: Tensor, layout: Layout = SMALL) -> tuple[bytes, dict[str, int]]:
    """PNG of uint8 [N, C, H, W] in rows, and where they are. One channel: gray, three: RGB, others: their mean."""
    if images.shape[1] not in (1, 3):
        images = images.float().mean(1, keepdim=True).to(torch.uint8)
    height, width = images.shape[2:]
    longer = max(height, width)
    # Small images are enlarged in whole steps, so that each pixel stays a square; large ones shrink for a light page.
    scale = max(1, 64 // longer) if longer <= layout.longest else layout.longest / longer
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    columns = min(layout.columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("L" if images.shape[1] == 1 else "RGB", (columns * width, rows * height))
    for index, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        tile = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        grid.paste(tile.resize((width, height), resample), (index % columns * width, index // columns * height))
    return _png(grid), {"num_images": len(images), "columns": columns, "height": height, "width": width}


def _read_grid(path: Path, grid: Mapping[str, int] | None) -> list[str]:
    """The tiles of ``images.png`` as data URIs; none where there is no such picture."""
    if grid is None:
        return []
    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"got {path}, which can't be read as an image ({error})", "a run folder") from None
    tiles = []
    for index in range(grid["num_images"]):
        left, top = index % grid["columns"] * grid["width"], index // grid["columns"] * grid["height"]
        tile = picture.crop((left, top, left + grid["width"], top + grid["height"]))
        tiles.append("data:image/png;base64," + base64.b64encode(_png(tile)).decode())
    return tiles


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


# ------------------------------------------------------------------------------------------------ words and figures


def format_number(value: Any, digits: int = 4, sign: bool = False) -> str:
    """``0.9173``; ``n/a`` for what is no finite number."""
    if not _is_number(value):
        return "n/a"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.lstrip("+-") if sign and float(text) == 0 else text


def format_count(value: Any) -> str:
    """``1,024``"""
    return f"{value:,}" if _is_number(value) else "n/a"


def format_size(value: Any) -> str:
    """Bytes as ``1.09 MB``."""
    if not _is_number(value):
        return "n/a"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value} bytes"


def format_seconds(value: Any) -> str:
    return format_number(value, 1 if value < 100 else 0) if _is_number(value) else "n/a"


def format_percent(value: Any) -> str:
    """A fraction as ``97.3 %``; small ones keep two figures."""
    if not _is_number(value):
        return "n/a"
    return f"{value * 100:.1f} %" if value >= 0.001 or value == 0 else f"{value * 100:.1g} %"


def metric_label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def ratio_text(before: Any, after: Any, better: str, worse: str) -> str:
    """``7.6x smaller``; empty where there is no ratio."""
    if not (_is_number(before) and _is_number(after) and before > 0 and after > 0):
        return ""
    ratio = before / after
    return f"{ratio:.1f}x {better}" if ratio >= 1 else f"{1 / ratio:.1f}x {worse}"


def _smaller(report: Mapping[str, Any], part: Mapping[str, Any] | None) -> str:
    """The size of the student or the artifact against the float network."""
    return ratio_text(report["teacher"]["size_bytes"], part["size_bytes"], "smaller", "larger") if part else ""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _main_metric(report: Mapping[str, Any]) -> str:
    """The metric that the verdict and the terminal speak of."""
    usual = MAIN_METRIC.get(report["teacher"]["task"], "top1")
    measured = [*report["teacher"]["metrics"], *(report["student"] or {}).get("metrics", {})]
    return usual if usual in measured or not measured else measured[0]


def _difference(metric: str, value: Any, other: Any) -> float | None:
    """``value`` - ``other``: in percentage points for fractions, as it is for others."""
    if not (_is_number(value) and _is_number(other)):
        return None
    return (value - other) * (1 if metric in LOWER_IS_BETTER else 100)


def _against(metric: str, value: Any, other: Any, whom: str) -> str:
    """``1.2 points below the teacher``."""
    difference = _difference(metric, value, other)
    if difference is None:
        return ""
    if round(abs(difference), 1) == 0:
        return f"level with {whom}"
    unit = "" if metric in LOWER_IS_BETTER else " points"
    return f"{abs(difference):.1f}{unit} {'below' if difference < 0 else 'above'} {whom}"


def _rows(report: Mapping[str, Any], details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table: those of ``details`` (teacher and student alone where there are none), with scheme and
    the difference to the teacher in the main metric."""
    teacher, student, fidelity = report["teacher"], report["student"], report["fidelity"] or {}
    references = details["references"]
    if not references:
        references = [{"row": "float teacher", "role": "teacher", "metrics": teacher["metrics"]}]
        if student:
            closeness = {key: fidelity.get(key) for key in ("agreement", "kl")}
            source = report["dataset"] or {}
            references.append(
                {
                    "row": f"synthetic ({source['generator']})" if source else "student",
                    "role": "student",
                    "generator": source.get("generator"),
                    "metrics": student["metrics"],
                    "num_samples": source.get("num_samples"),
                    "seconds": student["seconds"],
                    **closeness,
                }
            )
    metric = _main_metric(report)
    rows = []
    scheme = f"{student['scheme']} {student['policy']}" if student else ""
    for reference in references:
        row = {**dict.fromkeys(REFERENCE), **reference}
        row["scheme"] = "float" if row["role"] == "teacher" else scheme
        row["difference"] = _difference(metric, row["metrics"].get(metric), teacher["metrics"].get(metric))
        rows.append(row)
    return rows


def _loses_to_noise(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], details: Mapping[str, Any]) -> str:
    """A clause for the verdict where Gaussian noise serves as well as the synthetic data; empty where it does not.

    A share of N samples is worse where it is lower by more than two standard errors of the difference of two such
    shares (as if they were independent: those of students of one teacher differ by less).
    """
    student = next((row for row in rows if row["role"] == "student"), None)
    noise = next((row for row in rows if row["role"] == "reference" and row["generator"] == "gaussian"), None)
    if noise is None or student is None:
        return ""
    metric = _main_metric(report)
    name, mine, its = metric_label(metric), student["metrics"].get(metric), noise["metrics"].get(metric)
    count = details["judged"]["num_samples"]
    if not (_is_number(mine) and _is_number(its)):
        name, mine, its = "agreement on synthetic samples", student["agreement"], noise["agreement"]
        metric, count = "agreement", details["held_out"]["num_samples"]
    if not (_is_number(mine) and _is_number(its)):
        return ""
    if (mine < its) if metric in LOWER_IS_BETTER else (mine > its):
        return ""
    chance = 0.0
    if count and metric in SHARES:
        chance = 2 * math.sqrt(max(mine * (1 - mine) + its * (1 - its), 0.0) / count)
    word = "no better" if abs(mine - its) <= chance else "worse"
    return f"{word} than the same from Gaussian noise ({name} {its:.3f})"


def verdict(report: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The run in one sentence, from its figures alone."""
    report, details = _plain(report), _checked_details(_plain(details))
    teacher, dataset, student = report["teacher"], report["dataset"], report["student"]
    metric = _main_metric(report)
    name, before = metric_label(metric), teacher["metrics"].get(metric)
    if student is None:
        data = f"{dataset['num_samples']} synthetic samples" if dataset else "no synthetic data"
        measured = f" ({name} {before:.3f})" if _is_number(before) else ""
        return f"{teacher['name']}{measured}: {data} and no student so far"
    after, agreement = student["metrics"].get(metric), (report["fidelity"] or {}).get("agreement")
    if _is_number(after):
        against = _against(metric, after, before, "the teacher")
        result = f"{name} {after:.3f}" + (f", {against}" if against else "")
    elif _is_number(agreement):
        share = format_percent(agreement)
        result = f"{name} not measured, same answer as the teacher on {share} of held-out synthetic samples"
    else:
        result = f"{name} not measured"
    estimate = estimated_loss(details)
    if estimate and not _is_number(after):
        result += f", an estimated {estimate} of the {name} lost"
    parts = result, _smaller(report, student), _loses_to_noise(report, _rows(report, details), details)
    return f"{student['scheme']} student of {teacher['name']}{_origin(dataset)}: {'; '.join(filter(None, parts))}"


def estimated_loss(details: Mapping[str, Any]) -> str:
    """``"2.1 % (0.4 to 9.8 %)"``: share of the teacher's metric that is lost, estimated without data, if known."""
    found = details["estimated_drop"]
    if found is None or not all(_is_number(found[key]) for key in ("drop", "low", "high")):
        return ""
    drop, low, high = (format_number(100 * found[key], 1) for key in ("drop", "low", "high"))
    return f"{drop} % ({low} to {high} %)"


def true_loss(report: Mapping[str, Any]) -> float | None:
    """The same, measured on labelled data; None where there is none or it says nothing."""
    metric = _main_metric(report)
    before, after = (part["metrics"].get(metric) if part else None for part in (report["teacher"], report["student"]))
    if metric in LOWER_IS_BETTER or not (_is_number(before) and _is_number(after)) or before <= 0:
        return None
    return 1 - after / before


def _origin(dataset: Mapping[str, Any] | None) -> str:
    if dataset is None:
        return ""
    read = [what for what, key in (("images", "pixels"), ("labels", "labels")) if dataset["provenance"][key]]
    return f", made with real {' and '.join(read)}" if read else ", made without data"


# ------------------------------------------------------------------------------------------------ terminal


def table(report: Mapping[str, Any], details: Mapping[str, Any]) -> Table:
    """The rows of the report for a terminal of 80 columns or more."""
    report, details = _plain(report), _checked_details(_plain(details))
    metric = _main_metric(report)
    found = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    found.add_column("data", overflow="fold", min_width=8)
    found.add_column("scheme", overflow="fold", min_width=8)
    points = "change" if metric in LOWER_IS_BETTER else "points"
    for heading in (metric_label(metric), points, "agree", "KL", "seconds", "samples"):
        found.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    for row in _rows(report, details):
        cells = [
            row["row"],
            row["scheme"],
            format_number(row["metrics"].get(metric)),
            "" if row["role"] == "teacher" else format_number(row["difference"], 2, sign=True),
            format_number(row["agreement"]),
            format_number(row["kl"]),
            "" if row["role"] == "teacher" else format_seconds(row["seconds"]),
            "" if row["role"] == "teacher" else format_count(row["num_samples"]),
        ]
        style = {"student": "bold", "reference": "dim"}.get(row["role"], "")
        found.add_row(*(Text(cell) for cell in cells), style=style)
    return found


def _parity(parity: Mapping[str, Any]) -> str:
    """What matters of an exporter's check, in one line; the page has all of it."""
    agreement, samples = parity.get("argmax_agreement", parity.get("box_agreement")), parity.get("num_samples")
    if agreement is None or samples is None:
        return ", ".join(f"{key} {_any(value)}" for key, value in parity.items())
    if "argmax_agreement" in parity:
        text = f"the same answer as the student in {_any(agreement * 100)} % of {samples} samples"
    else:
        text = f"the same boxes as the student's, {_any(agreement * 100)} % of their scores, in {samples} samples"
    text += f", {parity['runtime']}" if "runtime" in parity else ""
    return text + (f"; {parity['warning']}" if parity.get("warning") else "")


def summary(
    report: Mapping[str, Any],
    details: Mapping[str, Any],
    console: Console,
    report_path: str | os.PathLike | None = None,
) -> None:
    """Print verdict, table, sizes, latency and paths. ``report_path``: the page, as :func:`write` returns it."""
    report, details = _plain(report), _checked_details(_plain(details))
    console.print(Text(verdict(report, details), style="bold"))
    console.print()
    console.print(table(report, details))
    for name, text in _closing_lines(report, details, report_path):
        # One line each, however long: a path that is broken in two can't be copied.
        console.print(Text.assemble((f"{name:<9}", "bold"), text), soft_wrap=True)


def _closing_lines(report: Mapping[str, Any], details: Mapping[str, Any], report_path: Any) -> list[tuple[str, str]]:
    teacher, dataset, student, artifact = (report[key] for key in ("teacher", "dataset", "student", "artifact"))
    sizes = [f"float {format_size(teacher['size_bytes'])}"]
    for what, part in (("student", student), ("artifact", artifact)):
        if part:
            sizes.append(f"{what} {format_size(part['size_bytes'])} ({_smaller(report, part) or 'n/a'})")
    lines = [("size", " -> ".join(sizes))]
    if estimate := estimated_loss(details):
        truth = true_loss(report)
        measured = f"; measured: {format_number(100 * truth, 1)} %" if truth is not None else ""
        lines.insert(0, ("estimate", f"{estimate} of the teacher's accuracy lost{measured}"))
    quality = details["quality"]
    if student and quality and quality["verdict"] == "poor" and teacher["task"] == "classification":
        lines.insert(0, ("estimate", "none: what a student does on poor samples says little about real ones"))
    if quality and quality["verdict"] in ("doubtful", "poor"):
        lines.append(("data", f"{quality['verdict']}: {'; '.join(quality['reasons'])}"))
    if artifact:
        latency = artifact["latency_ms"] or {}
        if latency:
            before, after = latency["float"], latency["quantized"]
            text = f"float {format_number(before, 2)} ms -> artifact {format_number(after, 2)} ms"
            lines.append(("latency", f"{text} ({ratio_text(before, after, 'faster', 'slower') or 'n/a'})"))
        if artifact["parity"]:
            lines.append(("parity", _parity(artifact["parity"])))
            integer = artifact["parity"].get("integer") or {}
            if integer.get("integer_mac_fraction") is not None:
                share = format_number(100 * integer["integer_mac_fraction"], 1)
                lines.append(("integers", f"{share} % of the multiply-accumulates in the runtime's optimized graph"))
    if details["network"]:
        lines.append(("network", f"{details['network']}, not the teacher's"))
    if details["kept_float"]:
        lines.append(("float", ", ".join(f"{name}: {why}" for name, why in list(details["kept_float"].items())[:3])))
        if len(details["kept_float"]) > 3:
            lines.append(("", f"and {len(details['kept_float']) - 3} more; the report lists them"))
    if details.get("unreached"):
        lines.append(("unseen", f"{len(details['unreached'])} layers of experts that no token chose in calibration"))
    lines += [("note", note) for note in details["notes"]]
    paths = {
        "dataset": (dataset or {}).get("path"),
        "student": details["student_dir"],
        "artifact": (artifact or {}).get("path"),
        "report": report_path,
    }
    return lines + [(name, str(path)) for name, path in paths.items() if path]


def _any(value: Any) -> str:
    """Any json value in short."""
    if isinstance(value, bool | str):
        return str(value).lower() if isinstance(value, bool) else value
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "n/a"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_any(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ("; " if any(isinstance(item, Mapping) for item in value) else ", ").join(map(_any, value))
    return "n/a" if value is None else str(value)


def flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Every value in short, those of a mapping inside as "outer: inner"."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}: {inner}": _any(item) for inner, item in value.items()}
        else:
            found[key] = _any(value)
    return found


def quality_facts(quality: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a quality.json, each in a line; those that were not measured are left out."""
    q = {key: value for key, value in quality.items() if value is not None}
    found: dict[str, str] = {}
    if "statistic_distance" in q:
        noise = f", {format_percent(q['distance_to_noise'])} of Gaussian noise's" if "distance_to_noise" in q else ""
        norms = f"on average of {len(q['statistic_distances'])} batch norms"
        found["statistic distance"] = f"{format_number(q['statistic_distance'])} {norms}{noise}"
    if "class_entropy" in q:
        found["class entropy"] = f"{format_number(q['class_entropy'], 3)} of the largest possible"
    found["duplicates"] = f"{format_percent(q['duplicates'])} of {q['num_looked_at']} samples"
    if "deviation" in q:
        found["deviation"] = f"{format_number(q['deviation'], 2)}, in units of that of the input's normalization"
    if "between_images" in q:
        found["variance"] = f"{format_percent(q['between_images'])} of it between images"
    if "spectrum" in q:
        found["spectrum"] = f"power falls with the frequency to the power of {format_number(q['spectrum'], 2)}"
    if "agreement" in q:
        share = format_percent(q["agreement"])
        found["cheap student"] = f"says what the teacher says on {share} of held-out samples (w8a4, calibrated only)"
    return found


# ------------------------------------------------------------------------------------------------ page


def _page(report: Mapping[str, Any], details: Mapping[str, Any], tiles: list[str]) -> dict[str, Any]:
    """What the template shows. Prose and layout are its business, numbers and geometry are found here."""
    rows, metric = _rows(report, details), _main_metric(report)
    student, artifact = report["student"], report["artifact"]
    latency = (artifact or {}).get("latency_ms") or {}
    layers = (report["fidelity"] or {}).get("layers", [])
    sqnr = [layer["sqnr_db"] for layer in layers if _is_number(layer["sqnr_db"])]
    labels = (details["predictions"] or []) + [""] * len(tiles)
    before, after = report["teacher"]["metrics"].get(metric), (student or {"metrics": {}})["metrics"].get(metric)
    references = [row for row in rows if row["role"] == "reference"]
    against = [
        (row["row"], _against(metric, after, row["metrics"].get(metric), "the same network")) for row in references
    ]
    return {
        "report": report,
        "details": details,
        "verdict": verdict(report, details),
        "loses_to_noise": bool(_loses_to_noise(report, rows, details)),
        "rows": rows,
        "metric": metric,
        "metrics": [metric, *dict.fromkeys(name for row in rows for name in row["metrics"] if name != metric)],
        "difference_label": "change" if metric in LOWER_IS_BETTER else "points",
        "before": before,
        "after": after,
        "against_teacher": _against(metric, after, before, "the teacher"),
        "against_references": [f"{text} from {name}" for name, text in against if text],
        "student_ratio": _smaller(report, student),
        "artifact_ratio": _smaller(report, artifact),
        "speedup": ratio_text(latency.get("float"), latency.get("quantized"), "faster", "slower"),
        "latency": latency,
        "parity": flat((artifact or {}).get("parity") or {}),
        "environment": {key: _any(value) for key, value in report["environment"].items()},
        "tiles": [{"uri": uri, "label": label} for uri, label in zip(tiles, labels, strict=False)],
        "layer_chart": _layer_chart(layers),
        "worst": sorted((layer for layer in layers if layer["sqnr_db"] in sqnr), key=lambda layer: layer["sqnr_db"])[
            :3
        ],
        "median_sqnr_db": median(sqnr) if sqnr else None,
        "allocation_chart": _allocation_chart(details["allocation"] or {}),
        "match_chart": _match_chart(details["batch_norm_match"]),
        "quality_facts": quality_facts(details["quality"]) if details["quality"] else {},
        "class_chart": _class_chart(details["quality"] or {}),
        "estimated_loss": estimated_loss(details),
        "true_loss": true_loss(report),
        "series": [s for s in SERIES if any(_is_number(entry[s[0]]) for entry in details["batch_norm_match"])],
    }


# Geometry of the charts, in SVG units (pixels at full width): one column a layer, in the order of the network.
WIDTH, LEFT = 1000, 62
SERIES = (("synthetic", "synthetic"), ("gaussian", "Gaussian noise"), ("real", "real data"))


def _columns(count: int) -> tuple[float, list[dict[str, Any]]]:
    """Width of a column, and the labels below: at most about 20 of 1, 2, ... count."""
    step = min((WIDTH - LEFT) / max(count, 1), 48)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, count) if count / n <= 20 or n == count)
    numbers = [n for n in range(1, count + 1) if n % every == 0 or (n == 1 and every > 2)]
    return step, [{"x": LEFT + (n - 0.5) * step, "text": str(n)} for n in numbers]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers, the outer ones at or beyond ``low`` and ``high``."""
    rough = max(high - low, 1e-12) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(n * unit for n in (1, 2, 5, 10) if n * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _bars(
    values: Sequence[Any], step: float, top: float, height: float, least: float, count: int, unit: str
) -> dict[str, Any]:
    """A panel of columns that stand on zero. ``least``: how far the axis reaches at the least."""
    numbers = [value for value in values if _is_number(value)]
    ticks = _ticks(min([0, *numbers]), max([least, *numbers]), count)
    low, high = ticks[0], ticks[-1]

    def y(value: float) -> float:
        return top + height * (high - value) / (high - low)

    bars = []
    for index, value in enumerate(values):
        if _is_number(value):
            ends = y(max(value, 0)), y(min(value, 0))
            bars.append(
                {"index": index, "x": LEFT + (index + 0.14) * step, "y": ends[0], "height": max(ends[1] - ends[0], 0.8)}
            )
    lines = [{"y": y(tick), "text": f"{tick:g}{unit}"} for tick in ticks]
    return {"bars": bars, "lines": lines, "zero": y(0), "top": top, "bottom": top + height, "bar_width": step * 0.72}


def _layer_chart(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """SQNR, clipped inputs and bits of every layer, one below the other."""
    if not layers:
        return None
    step, labels = _columns(len(layers))
    clipped = [la["clipped_fraction"] * 100 if _is_number(la["clipped_fraction"]) else None for la in layers]
    return {
        "right": LEFT + step * len(layers),
        "labels": labels,
        "sqnr": _bars([la["sqnr_db"] for la in layers], step, 24, 170, 10, 4, ""),
        "clipped": _bars(clipped, step, 236, 60, 0.1, 2, " %"),
        "strips": [
            {"name": name, "y": y, "runs": _runs([la[key] for la in layers], step)}
            for name, key, y in (("weights", "weight_bits", 8), ("inputs", "activation_bits", 38))
        ],
    }


def _class_chart(quality: Mapping[str, Any]) -> dict[str, Any] | None:
    """Samples, or objects of a detector's samples, of each class; none for more classes than there are pixels."""
    counts, names = quality.get("class_counts") or [], quality.get("class_labels")
    if not 1 < len(counts) <= WIDTH:
        return None
    step, labels = _columns(len(counts))
    what, names = ("objects", names) if names else ("samples", range(len(counts)))
    return {
        "right": LEFT + step * len(counts),
        "labels": [{**label, "text": str(names[int(label["text"]) - 1])} for label in labels],
        "bars": _bars(counts, step, 24, 90, 1, 3, ""),
        "what": what,
        "titles": [f"class {name}: {format_count(n)} {what}" for name, n in zip(names, counts, strict=True)],
    }


def _runs(bits: Sequence[int | None], step: float) -> list[dict[str, Any]]:
    """Neighbors with the same number of bits, together."""
    runs: list[dict[str, Any]] = []
    for index, value in enumerate(bits):
        if runs and runs[-1]["bits"] == value:
            runs[-1]["last"], runs[-1]["width"] = index + 1, runs[-1]["width"] + step
        else:
            runs.append({"bits": value, "first": index + 1, "last": index + 1, "x": LEFT + index * step, "width": step})
    return runs


def _allocation_chart(allocation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bits of every layer as columns, and below the frontier of cost and sensitivity on a logarithmic axis."""
    layers, frontier = allocation.get("layers"), allocation.get("frontier")
    if not layers or not frontier:
        return None
    step, labels = _columns(len(layers))
    candidates = allocation["candidates"]
    harms = [point["sensitivity"] for point in (*frontier, *candidates) if point["sensitivity"] > 0] or [1.0]
    top, height = 24.0, 220.0
    last = math.ceil(math.log10(max(harms)) + 1e-9)
    first = min(math.floor(math.log10(min(harms))), last - 1)
    marks = _ticks(min(point["cost"] for point in frontier), max(point["cost"] for point in frontier), 6)

    def place(cost: float, harm: float) -> dict[str, float]:
        exponent = math.log10(harm) if harm > 0 else first
        share = (min(max(cost, marks[0]), marks[-1]) - marks[0]) / (marks[-1] - marks[0])
        return {"x": LEFT + (WIDTH - LEFT) * share, "y": top + height * (last - exponent) / (last - first)}

    def cost_text(cost: float) -> str:
        if allocation["budget"] == "size_bytes":
            return format_size(round(cost))
        unit, size = next(((u, s) for u, s in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if cost >= s), ("", 1.0))
        return f"{cost / size:.4g} {unit}".rstrip()

    chosen = next(c for c in candidates if (c["cost"], c["kl"]) == (allocation["cost"], allocation["kl"]))
    uniform = next((c for c in candidates if c["is_uniform"]), None)
    points = [place(point["cost"], point["sensitivity"]) for point in frontier]
    return {
        "right": LEFT + step * len(layers),
        "labels": labels,
        "weights": _bars([layer["weight_bits"] for layer in layers], step, 24, 100, 8, 4, ""),
        "inputs": _bars([layer["activation_bits"] for layer in layers], step, 158, 60, 8, 2, ""),
        "bottom": top + height,
        "grid": [
            {"y": top + height * (last - n) / (last - first), "text": f"{10.0**n:g}"} for n in range(first, last + 1)
        ],
        "marks": [{"x": place(mark, 1.0)["x"], "text": cost_text(mark)} for mark in marks],
        "line": " ".join(f"{point['x']:.1f},{point['y']:.1f}" for point in points),
        "chosen": place(chosen["cost"], chosen["sensitivity"]),
        "uniform": uniform and not chosen["is_uniform"] and place(uniform["cost"], uniform["sensitivity"]),
        "uniform_kl": uniform and uniform["kl"],
        "limit": place(allocation["limit"], 1.0)["x"],
        "cost": cost_text(allocation["cost"]),
        "limit_text": cost_text(allocation["limit"]),
    }


def _match_chart(norms: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Distance of every batch norm on a logarithmic axis, one line for each source of data."""
    positive = [entry[key] for entry in norms for key, _ in SERIES if _is_number(entry[key]) and entry[key] > 0]
    if not positive:
        return None
    step, labels = _columns(len(norms))
    high = math.ceil(math.log10(max(positive)) + 1e-9)
    # Eight decades at most: a perfect match (zero) lies on the bottom line.
    low = max(min(math.floor(math.log10(min(positive))), high - 1), high - 8)
    top, height = 24.0, 190.0

    def y(value: float) -> float:
        exponent = math.log10(value) if value > 0 else low
        return top + height * (high - min(max(exponent, low), high)) / (high - low)

    lines = []
    for key, _ in SERIES:
        points: list[dict[str, Any]] = []
        pieces: list[list[str]] = [[]]
        for index, entry in enumerate(norms):
            if _is_number(entry[key]):
                point = {"index": index, "x": LEFT + (index + 0.5) * step, "y": y(entry[key])}
                points.append(point)
                pieces[-1].append(f"{point['x']:.1f},{point['y']:.1f}")
            else:
                pieces.append([])
        lines.append({"key": key, "points": points, "pieces": [" ".join(piece) for piece in pieces if len(piece) > 1]})
    return {
        "right": LEFT + step * len(norms),
        "labels": labels,
        "bottom": top + height,
        "grid": [{"y": y(10.0**n), "text": f"{10.0**n:g}"} for n in range(low, high + 1)],
        "lines": lines,
        "radius": min(3.2, max(1.2, step / 4)),
    }
