"""The report: the exact keys of report.json, a page that stands alone and shows every figure, a table for terminals."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dfq import report as reports
from dfq.errors import UserError

NAN = float("nan")
VOID = {"meta", "img", "br", "link"}


def make_report(num_layers: int = 5) -> dict:
    return {
        "dfq_version": "0.1.0",
        "created": "2025-01-02T03:04:05+00:00",
        "command": "dfq run scheme=w4a4",
        "seed": 7,
        "environment": {"python": "3.12.1", "num_threads": 2, "onnxruntime": None},
        "teacher": {
            "name": "digits",
            "sha256": "ab" * 32,
            "task": "classification",
            "num_parameters": 272474,
            "size_bytes": 1105152,
            "metrics": {"top1": 0.9173, "top5": 0.9971},
        },
        "dataset": {
            "path": "outputs/datasets/one",
            "generator": "zeroq",
            "num_samples": 1024,
            "sha256": "cd" * 32,
            "seconds": 23.4,
            "provenance": {"pixels": False, "labels": False},
        },
        "student": {
            "scheme": "w4a4",
            "policy": "edges_8bit",
            "algorithm": "distillation",
            "size_bytes": 145122,
            "mean_weight_bits": 4.25,
            "seconds": 61.2,
            "metrics": {"top1": 0.9052, "top5": 0.9912},
        },
        "fidelity": {
            "agreement": 0.9523,
            "kl": 0.0412,
            "layers": [
                {
                    "name": f"stage{i}.conv",
                    "weight_bits": 8 if i in (0, num_layers - 1) else 4,
                    "activation_bits": 4,
                    "sqnr_db": 30.2 - 5.1 * i,
                    "clipped_fraction": 0.0123,
                }
                for i in range(num_layers)
            ],
        },
        "artifact": {
            "path": "outputs/artifacts/one.onnx",
            "format": "onnx_qdq",
            "size_bytes": 312877,
            "parity": {"argmax_agreement": 0.9987},
            "latency_ms": {"float": 1.234, "quantized": 0.712},
        },
    }


def make_details(num_norms: int = 4) -> dict:
    def row(name, role, generator, top1, agreement, kl, seconds, num_samples):
        metrics = {"top1": top1, "top5": 0.99}
        return dict(
            zip(reports.REFERENCE, (name, role, generator, metrics, agreement, kl, seconds, num_samples), strict=True)
        )

    return {
        "references": [
            {
                "row": "float teacher",
                "role": "teacher",
                "generator": None,
                "metrics": {"top1": 0.9173},
                "agreement": 1.0,
                "kl": 0.0,
            },
            row("synthetic (zeroq)", "student", "zeroq", 0.9052, 0.9523, 0.0412, 84.6, 1024),
            row("Gaussian noise", "reference", "gaussian", 0.6831, 0.7012, 0.8123, 62.3, 1024),
            row("real data", "reference", "real", 0.9114, 0.9411, 0.0502, 60.9, 1000),
        ],
        "batch_norm_match": [
            {"name": f"stage{i}.bn", "synthetic": 0.0021 * (i + 1), "gaussian": 0.53, "real": 0.0007}
            for i in range(num_norms)
        ],
        "images": {"dataset": "outputs/datasets/one"},
        "kept_float": {"head.up": "no quantized ConvTranspose2d yet"},
        "held_out": {"num_samples": 102},
        "student_dir": "outputs/students/one",
        "notes": ["the whole run took 97 s"],
    }


def make_images(num_images: int = 12, channels: int = 3, size: int = 8) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, channels, size, size), generator=rng, dtype=torch.uint8)


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether its tags are closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write(path, report=None, details=None, images=None, predictions=None) -> Page:
    page = reports.write(
        path,
        make_report() if report is None else report,
        make_details() if details is None else details,
        images,
        predictions,
    )
    assert page == path / "report.html"
    return Page(page.read_text())


def printed(report, details, width=80, **settings) -> str:
    stream = io.StringIO()
    reports.summary(report, details, Console(file=stream, width=width, **settings))
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------ report.json


def test_report_json_has_exactly_the_keys_others_rely_on(tmp_path):
    """Spelled out here once more: a key that is renamed in reports.REPORT has to fail somewhere."""
    write(tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    for part, keys in (
        (stored, "dfq_version created command seed environment teacher dataset student fidelity artifact"),
        (stored["teacher"], "name sha256 task num_parameters size_bytes metrics"),
        (stored["dataset"], "path generator num_samples sha256 seconds provenance"),
        (stored["dataset"]["provenance"], "pixels labels"),
        (stored["student"], "scheme policy algorithm size_bytes mean_weight_bits seconds metrics"),
        (stored["fidelity"], "agreement kl layers"),
        (stored["fidelity"]["layers"][0], "name weight_bits activation_bits sqnr_db clipped_fraction"),
        (stored["artifact"], "path format size_bytes parity latency_ms"),
        (stored["artifact"]["latency_ms"], "float quantized"),
    ):
        assert list(part) == keys.split()
    assert stored == make_report()
    reports.validate(stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("seed"), "report.seed is missing"),
        (lambda r: r.update(extra=1), "report.extra is unknown"),
        (lambda r: r["teacher"].pop("sha256"), "report.teacher.sha256 is missing"),
        (lambda r: r["student"].update(top1=0.9), "report.student.top1 is unknown"),
        (lambda r: r["fidelity"]["layers"][2].pop("sqnr_db"), r"report.fidelity.layers\[2\].sqnr_db is missing"),
        (lambda r: r["artifact"]["latency_ms"].pop("float"), "report.artifact.latency_ms.float is missing"),
        (lambda r: r["dataset"].update(num_samples="many"), "report.dataset.num_samples is 'many', not of type int"),
        (lambda r: r["teacher"].update(size_bytes=True), "report.teacher.size_bytes is True, not of type int"),
        (lambda r: r["dataset"]["provenance"].update(pixels=None), "pixels is None, not of type bool"),
        (lambda r: r.update(teacher=None), "report.teacher is None, not a mapping"),
        (lambda r: r["fidelity"].update(layers="none"), "report.fidelity.layers is 'none', not a list"),
        (
            lambda r: r["student"]["metrics"].update(top1="high"),
            "report.student.metrics.top1 is 'high', not of type float",
        ),
    ],
)
def test_validate_names_what_differs(tmp_path, change, message):
    report = make_report()
    change(report)
    with pytest.raises(ValueError, match=message):
        reports.validate(report)
    with pytest.raises(ValueError, match=message):
        reports.write(tmp_path, report, make_details())
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_sections_may_be_null_and_metrics_empty():
    report = {**make_report(), "dataset": None, "student": None, "fidelity": None, "artifact": None}
    report["teacher"]["metrics"] = {}
    reports.validate(report)


def test_files_hold_strict_json_whatever_kind_the_numbers_are(tmp_path):
    report = make_report()
    report["fidelity"]["kl"] = torch.tensor(0.5)
    report["fidelity"]["agreement"] = np.float32(0.25)
    report["fidelity"]["layers"][0]["sqnr_db"] = NAN
    report["fidelity"]["layers"][1]["sqnr_db"] = math.inf
    report["dataset"]["path"] = tmp_path
    write(tmp_path, report)

    def refuse(name):
        raise AssertionError(name)

    stored = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert (stored["fidelity"]["kl"], stored["fidelity"]["agreement"]) == (0.5, 0.25)
    assert [layer["sqnr_db"] for layer in stored["fidelity"]["layers"][:2]] == [None, None]
    assert stored["dataset"]["path"] == str(tmp_path)


def test_environment():
    found = reports.environment("cpu")
    expected = ["python", "torch", "dfq", "onnxruntime", "platform", "cpu", "num_cpus", "num_threads", "device"]
    assert list(found) == expected
    assert (found["torch"], found["device"]) == (str(torch.__version__), "cpu")
    assert found["num_threads"] == torch.get_num_threads()
    json.dumps(found)


# ------------------------------------------------------------------------------------------------ report.html


def test_page_shows_every_row_and_figure(tmp_path):
    page = write(tmp_path, images=make_images(), predictions=[f"class {i}" for i in range(12)])
    text = page.text
    for wanted in [
        *("float teacher", "synthetic (zeroq)", "Gaussian noise", "real data", "w4a4 edges_8bit"),
        *("0.9173", "0.9052", "0.6831", "0.9114", "-1.21", "-23.42", "-0.59"),  # top-1 and points against the teacher
        *("0.9523", "0.7012", "0.9411", "0.0412", "0.8123", "0.0502"),  # agreement, KL
        *("84.6", "62.3", "60.9", "1,024", "1,000", "102"),
        *("7.6x smaller", "3.5x smaller", "1.7x faster", "1.23 ms", "0.71 ms", "1.11 MB", "145 kB", "313 kB"),
        *("4.25", "argmax agreement", "0.9987", "onnx_qdq", "outputs/artifacts/one.onnx"),
        *("30.2", "25.1", "20.0", "14.9", "9.8", "1.2 %"),  # SQNR, clipped
        *("0.0021", "0.0042", "0.0063", "0.0084", "0.5300", "0.0007"),  # batch-norm match
        *("head.up", "no quantized ConvTranspose2d yet", "the whole run took 97 s", "class 11"),
        *(
            "dfq run scheme=w4a4",
            "3.12.1",
            "ab" * 32,
            "cd" * 32,
            "outputs/datasets/one",
            "outputs/students/one",
            "272,474",
        ),
        "22.2 points above the same network from Gaussian noise and 0.6 points below the same network from real data",
    ]:
        assert wanted in text, wanted
    for layer in make_report()["fidelity"]["layers"]:
        assert layer["name"] in text


def test_page_stands_alone_and_is_accessible(tmp_path):
    page = write(tmp_path, images=make_images(), predictions=["0"] * 12)
    html = (tmp_path / "report.html").read_text()
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "xlink:href", "style", "onload"):
            if name in attributes:
                assert (tag, name) == ("img", "src") and attributes[name].startswith("data:image/png;base64,")
    assert all(image["alt"] for image in page.find("img"))
    charts = [svg for svg in page.find("svg") if svg["class"] == "chart"]
    assert len(charts) == 3 and all(svg["role"] == "img" and svg["aria-label"] for svg in charts)
    assert all("aria-hidden" in svg for svg in page.find("svg") if svg not in charts)
    assert page.find("html") == [{"lang": "en"}]
    assert all(cell.get("scope") for cell in page.find("th"))
    assert "prefers-color-scheme: dark" in html and "tabular-nums" in html


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "</title></svg><b>&amp;"]
)
def test_hostile_names_stay_text(tmp_path, hostile):
    report, details = make_report(), make_details()
    tags = [tag for tag, _ in write(tmp_path, report, details, make_images(2), ["1", "2"]).tags]
    report["teacher"]["name"] = report["command"] = report["dataset"]["path"] = hostile
    report["fidelity"]["layers"][0]["name"] = report["environment"]["cpu"] = hostile
    report["environment"][hostile] = report["artifact"]["parity"][hostile] = hostile
    details["references"][1]["row"] = details["notes"][0] = details["batch_norm_match"][0]["name"] = hostile
    details["kept_float"] = {hostile: hostile}
    page = write(tmp_path, report, details, make_images(2), [hostile, hostile])
    extra = [tag for tag, _ in page.tags]
    for tag in set(extra) - {"dt", "dd"}:  # one more line of environment and of parity
        assert extra.count(tag) == tags.count(tag), tag
    assert hostile not in (tmp_path / "report.html").read_text()
    assert page.text.count(hostile) >= 12
    assert hostile in [image["alt"].split("says ")[1] for image in page.find("img")]


def test_render_makes_the_same_page_from_the_files(tmp_path):
    write(tmp_path, images=make_images(), predictions=["0"] * 12)
    written = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    assert reports.render(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == written


def test_the_contract_alone_is_enough_to_render(tmp_path):
    write(tmp_path, images=make_images())
    (tmp_path / "details.json").unlink()
    (tmp_path / "images.png").unlink()
    text = Page(reports.render(tmp_path).read_text()).text
    assert "float teacher" in text and "synthetic (zeroq)" in text and "0.9052" in text and "Gaussian" not in text


@pytest.mark.parametrize("present", range(5))
def test_null_sections(tmp_path, present):
    """Each stage needs those before it: with ``present`` of them, the rest is null."""
    report, stages = make_report(), ["dataset", "student", "fidelity", "artifact"]
    for stage in stages[present:]:
        report[stage] = None
    details = make_details() if present == 4 else {}
    page = write(tmp_path, report, details)
    assert ("no student so far" in page.text) == (present < 2)
    assert ("Data-free" in page.text) == (present >= 1)
    assert ("Error of each layer" in page.text) == (present >= 3)
    assert ("Batch-norm match" in page.text) == (present == 4)
    assert "digits" in printed(report, details)
    for stage in stages:  # and each one missing alone
        alone = {**make_report(), stage: None}
        write(tmp_path, alone)
        assert "digits" in printed(alone, make_details())


def test_missing_and_unfinished_figures_are_not_available(tmp_path):
    report, details = make_report(), make_details()
    report["teacher"]["metrics"] = {"top1": NAN}
    report["student"]["metrics"] = {}
    report["student"]["mean_weight_bits"] = report["student"]["seconds"] = None
    report["fidelity"].update(agreement=None, kl=NAN)
    for layer in report["fidelity"]["layers"]:
        layer.update(sqnr_db=None, clipped_fraction=NAN, weight_bits=None, activation_bits=None)
    report["artifact"]["latency_ms"] = {"float": None, "quantized": NAN}
    for row in details["references"]:
        row.update(metrics={"top1": NAN}, agreement=NAN, kl=None, seconds=None, num_samples=None)
    for norm in details["batch_norm_match"]:
        norm.update(synthetic=NAN, gaussian=None, real=None)
    text = write(tmp_path, report, details).text
    shown = printed(report, details)
    for output in (text, shown):
        assert "n/a" in output and not re.search(r"\b(nan|None|inf)\b", output)
    assert "top-1 not measured" in text and "top-1 not measured" in shown
    assert "Batch-norm match" not in text


@pytest.mark.parametrize("count", [1, 2, 53, 300])
def test_any_number_of_layers_stays_inside_the_charts(tmp_path, count):
    report, details = make_report(count), make_details(count)
    for index, layer in enumerate(report["fidelity"]["layers"]):
        layer["sqnr_db"] = 40 - index if index % 7 else None  # down to far below zero
        layer["weight_bits"] = (2, 3, 4, 8)[index % 4]
    details["batch_norm_match"][0].update(synthetic=0.0, gaussian=1e9, real=1e-12)  # beyond eight decades
    page = write(tmp_path, report, details)
    boxes = [svg["viewbox"] for svg in page.find("svg") if svg["class"] == "chart"]
    assert len(boxes) == 3
    tallest = max(float(box.split()[3]) for box in boxes)
    marks = 0
    for tag in ("rect", "circle", "line", "text", "polyline"):
        for shape in page.find(tag):
            for name, value in shape.items():
                if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                    assert -1 <= float(value) <= (1014 if name[-1] != "y" else tallest), (tag, shape)
            if tag == "rect" and "x" in shape:
                marks += 1
                assert float(shape["x"]) + float(shape["width"]) <= 1014
                assert float(shape["y"]) + float(shape["height"]) <= tallest
    assert marks >= count
    heights = [float(pair.split(",")[1]) for line in page.find("polyline") for pair in line["points"].split()]
    assert len(heights) == (3 * count if count > 1 else 0)
    assert all(24 <= y <= 214 for y in heights)


def test_few_decades_and_equal_distances_are_drawn(tmp_path):
    details = make_details(3)
    for norm in details["batch_norm_match"]:
        norm.update(synthetic=0.1, gaussian=None, real=None)
    page = write(tmp_path, details=details)
    assert len(page.find("circle")) == 3 + 1  # and the one of the legend
    assert len(page.find("polyline")) == 1


# ------------------------------------------------------------------------------------------------ images.png


@pytest.mark.parametrize(
    ("num_images", "channels", "size"), [(1, 1, 8), (12, 3, 8), (64, 1, 28), (5, 2, 8), (3, 3, 40)]
)
def test_grid_holds_every_pixel(tmp_path, num_images, channels, size):
    images = make_images(num_images, channels, size)
    page = write(tmp_path, images=images)
    sources = page.find("img")
    assert len(sources) == num_images
    wanted = images if channels != 2 else images.float().mean(1, keepdim=True).to(torch.uint8)
    for source, image in zip(sources, wanted, strict=True):
        tile = np.array(Image.open(io.BytesIO(base64.b64decode(source["src"].split(",")[1]))))
        step = tile.shape[0] // size
        assert step == max(1, 64 // size)
        assert np.array_equal(
            tile[step // 2 :: step, step // 2 :: step].reshape(size, size, -1), image.permute(1, 2, 0)
        )


def test_large_images_shrink_and_only_64_are_shown(tmp_path):
    page = write(tmp_path, images=make_images(70, 3, 160), predictions=[str(i) for i in range(70)])
    assert [image["alt"] for image in page.find("img")][-1] == "synthetic image 64, the teacher says 63"
    with Image.open(tmp_path / "images.png") as grid:
        assert grid.size == (8 * 112, 8 * 112)


def test_images_of_an_earlier_report_do_not_stay(tmp_path):
    write(tmp_path, images=make_images(), predictions=["0"] * 12)
    page = write(tmp_path)
    assert not (tmp_path / "images.png").exists() and not page.find("img")


# ------------------------------------------------------------------------------------------------ mistakes


def test_render_of_a_folder_without_a_report(tmp_path):
    with pytest.raises(UserError) as caught:
        reports.render(tmp_path)
    assert str(caught.value) == f"got {tmp_path}, which has no report.json; allowed: a run folder"


def test_render_of_a_broken_report(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"seed": ')
    with pytest.raises(UserError) as caught:
        reports.render(tmp_path)
    assert str(caught.value) == (
        f"got {path}, which can't be read as json (Expecting value: line 1 column 10 (char 9)); allowed: a run folder"
    )
    path.write_text("[]")
    with pytest.raises(UserError) as caught:
        reports.render(tmp_path)
    assert str(caught.value) == f"got {path}, which holds no json object; allowed: a run folder"
    report = make_report()
    del report["student"]["scheme"]
    path.write_text(json.dumps(report))
    with pytest.raises(UserError) as caught:
        reports.render(tmp_path)
    assert str(caught.value) == (
        f"got {path}, which is not as dfq writes it (report.student.scheme is missing); allowed: a run folder"
    )
    assert not (tmp_path / "report.html").exists()


def test_render_of_broken_details_and_images(tmp_path):
    write(tmp_path, images=make_images())
    (tmp_path / "images.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"images\.png, which can't be read as an image"):
        reports.render(tmp_path)
    (tmp_path / "details.json").write_text('{"references": [{"row": 1}]}')
    with pytest.raises(
        UserError, match=r"details\.json, which is not as dfq writes it \(details\.references\[0\]\.row is 1"
    ):
        reports.render(tmp_path)


# ------------------------------------------------------------------------------------------------ verdict


def verdict(report=None, details=None) -> str:
    return reports.verdict(report or make_report(), make_details() if details is None else details)


def test_verdict():
    assert (
        verdict()
        == "w4a4 student of digits, made without data: top-1 0.905, 1.2 points below the teacher; 7.6x smaller"
    )


def test_verdict_is_honest():
    report, details = make_report(), make_details()
    details["references"][2]["metrics"]["top1"] = 0.93
    assert verdict(report, details).endswith("7.6x smaller; worse than the same from Gaussian noise (top-1 0.930)")
    details["references"][2]["metrics"]["top1"] = 0.9052
    assert verdict(report, details).endswith("; no better than the same from Gaussian noise (top-1 0.905)")
    details["judged"] = {"num_samples": 10_000}  # standard error of a difference of 1 point: 0.4
    details["references"][2]["metrics"]["top1"] = 0.9125
    assert verdict(report, details).endswith("; no better than the same from Gaussian noise (top-1 0.912)")
    details["references"][2]["metrics"]["top1"] = 0.9135
    assert verdict(report, details).endswith("; worse than the same from Gaussian noise (top-1 0.913)")
    for row in details["references"]:
        row["metrics"] = {}
    details["references"][2]["agreement"] = 0.97
    report["teacher"]["metrics"] = report["student"]["metrics"] = {}
    assert verdict(report, details) == (
        "w4a4 student of digits, made without data: top-1 not measured, same answer as the teacher on 95.2 % of "
        "held-out synthetic samples; 7.6x smaller; no better than the same from Gaussian noise (agreement on synthetic "
        "samples 0.970)"  # of 102 samples: two
    )
    report = make_report()
    report["dataset"]["provenance"] = {"pixels": True, "labels": True}
    assert ", made with real images and labels: " in verdict(report)
    report["dataset"] = None
    assert verdict(report).startswith("w4a4 student of digits: top-1 0.905")
    report["student"]["metrics"]["top1"] = 0.9271
    assert "1.0 points above the teacher" in verdict(report)
    report["student"]["metrics"]["top1"] = 0.9175
    assert "level with the teacher" in verdict(report)
    report["student"]["size_bytes"] = 2 * report["teacher"]["size_bytes"]
    assert "2.0x larger" in verdict(report)


def test_perplexity_is_better_when_lower():
    report, details = make_report(), make_details()
    report["teacher"].update(task="language_modeling", metrics={"perplexity": 6.25})
    report["student"]["metrics"] = {"perplexity": 7.0}
    for row, value in zip(details["references"], (6.25, 7.0, 9.5, 6.75), strict=True):
        row["metrics"] = {"perplexity": value}
    assert "perplexity 7.000, 0.8 above the teacher; 7.6x smaller" in verdict(report, details)
    assert "Gaussian" not in verdict(report, details)
    shown = printed(report, details)
    assert "perplexity" in shown and "+0.75" in shown and "+3.25" in shown


# ------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("width", [80, 100])
def test_terminal_table(width):
    shown = printed(make_report(), make_details(), width)
    lines = shown.splitlines()
    assert "\x1b" not in shown and "…" not in shown
    table = [line for line in lines if not re.match(r"(size|latency|parity|note|dataset|student|artifact) ", line)]
    assert max(map(len, table)) <= width
    (row,) = [line for line in lines if "0.9052" in line]
    assert re.search(r"w4a4.* 0\.9052 +-1\.21 +0\.9523 +0\.0412 +84\.6 +1,024$", row.rstrip())
    (heading,) = [line for line in lines if "top-1" in line and "KL" in line]
    assert heading.split() == ["data", "scheme", "top-1", "points", "agree", "KL", "seconds", "samples"]
    for figure in ("0.9173", "0.6831", "-23.42", "0.9114", "0.8123", "1,000"):
        assert figure in shown
    for line in (
        "size     float 1.11 MB -> student 145 kB (7.6x smaller) -> artifact 313 kB (3.5x smaller)",
        "latency  float 1.23 ms -> artifact 0.71 ms (1.7x faster)",
        "parity   argmax_agreement 0.9987",
        "student  outputs/students/one",
        "artifact outputs/artifacts/one.onnx",
    ):
        assert line in lines


def test_terminal_keeps_long_paths_whole_and_brackets_as_they_are(tmp_path):
    report = make_report()
    report["dataset"]["path"] = "outputs/[bold]" + "x" * 120
    stream = io.StringIO()
    reports.summary(report, make_details(), Console(file=stream, width=80), tmp_path / "report.html")
    lines = stream.getvalue().splitlines()
    assert f"dataset  {report['dataset']['path']}" in lines
    assert f"report   {tmp_path / 'report.html'}" in lines


def test_summary_does_not_change_what_it_is_given():
    report, details = make_report(), make_details()
    before = copy.deepcopy((report, details))
    printed(report, details)
    assert (report, details) == before
