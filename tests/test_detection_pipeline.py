"""Detectors through the arrows: generate, quantize, export, evaluate, report; and nothing real is read on the way."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_detectors import CLASSES, SPEC, Cells, DecodeOnly, cell_teacher, two_stages

from dfq import pipeline, quality
from dfq.coco import export_coco
from dfq.dataset import SyntheticDataset
from dfq.detectors._base import adapter_record
from dfq.errors import UserError
from dfq.evaluation import Coco
from dfq.hooks import tensors_in
from dfq.inspection import describe
from dfq.lightning.augmentation import augment, draw_moves
from dfq.lightning.data import SyntheticDataModule
from dfq.lightning.distillation import _terms
from dfq.lightning.settings import DistillationSettings
from dfq.pipeline import Experiment, evaluate, export, generate, quantize
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import choices, load, resolve, signature
from dfq.student import Student
from dfq.tasks._task import task_of
from dfq.tasks.detection import Detection
from dfq.teacher import Teacher
from dfq.teachers._detector import as_detector

W4A8 = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8))
FAST = {"iterations": 3, "final_iterations": 2, "finish_iterations": 2, "max_steps": 4, "checks": 2, "batch_size": 8}
FAST["num_candidates"] = 10
FAST["rungs"] = ["round_to_nearest", {**load("algorithm", "reconstruction"), "iterations": 3, "finish_iterations": 2}]
QUANTIZERS = [resolve("quantizer", "mse", num_candidates=10)] * 2


def build(family, name, **settings):
    known = signature(load(family, name)["_target_"]) or {}
    return resolve(family, name, **{key: value for key, value in FAST.items() if key in known} | settings)


@pytest.fixture
def teacher():
    return cell_teacher()


@pytest.fixture
def dataset(teacher, tmp_path):
    return generate(teacher, build("generator", "box_sampling"), 20, 0, tmp_path / "data")


# ------------------------------------------------------------------------------------------------ the store


def ragged(path, lengths=((2, 0, 3), (1, 0))):
    dataset = SyntheticDataset.create(path, {"seed": 0}, {"pixels": False, "labels": False})
    rng = torch.Generator().manual_seed(0)
    written = []
    for index, part in enumerate(lengths):
        rows = [torch.rand(n, 4, generator=rng) for n in part]
        names = [torch.arange(n) for n in part]
        images = torch.rand(len(part), 3, 2, 2, generator=rng)
        dataset.write_shard(index, {"images": images, "boxes": rows, "labels": names}, 0.0)
        written += rows
    return dataset, written


def test_what_has_another_length_in_each_sample_comes_back(tmp_path):
    dataset, written = ragged(tmp_path / "d")
    assert dataset.lists == {"boxes", "labels"} and len(dataset) == 5
    dataset.verify()
    for i, rows in enumerate(written):
        sample = dataset[i]
        assert set(sample) == {"images", "boxes", "labels"} and sample["boxes"].shape == (len(rows), 4)
        assert torch.equal(sample["boxes"], rows) and sample["labels"].tolist() == list(range(len(rows)))
    whole = dataset.tensors()
    assert all(torch.equal(a, b) for a, b in zip(whole["boxes"], written, strict=True))
    assert whole["images"].shape == (5, 3, 2, 2) and len(dataset.tensors(4)["boxes"]) == 4
    assert set(dataset.tensors(names=("boxes",))) == {"boxes"}
    again = SyntheticDataset(tmp_path / "d")
    assert torch.equal(again[2]["boxes"], written[2])


def test_lists_and_tensors_of_a_shard_have_as_many_samples(tmp_path):
    dataset = SyntheticDataset.create(tmp_path / "d", {}, {"pixels": False, "labels": False})
    with pytest.raises(ValueError, match=r"agree in their first dimension, got \[2, 3\]"):
        dataset.write_shard(0, {"images": torch.zeros(3, 1), "boxes": [torch.zeros(1, 4)] * 2}, 0.0)


def test_a_broken_shard_of_boxes_is_told_and_made_again(teacher, tmp_path):
    generator = build("generator", "box_sampling")
    whole = generate(teacher, generator, 20, 0, tmp_path / "data")
    sha256, file = whole.sha256, tmp_path / "data" / "shards" / "000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"000001\.safetensors, whose content does not match its checksum"):
        SyntheticDataset(tmp_path / "data").verify()
    assert generate(teacher, generator, 20, 0, tmp_path / "data").sha256 == sha256


def test_batches_of_boxes_are_lists(dataset):
    data = SyntheticDataModule(dataset, batch_size=4)
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert batch["images"].dim() == 4 and isinstance(batch["boxes"], list)
        assert len(batch["boxes"]) == len(batch["labels"]) == len(batch["scores"]) == len(batch["images"])


# ------------------------------------------------------------------------------------------------ generators


@pytest.mark.parametrize("name", ["gaussian", "zeroq", "genie", "spectrum", "box_sampling"])
@pytest.mark.parametrize("adapter", ["cells", "decode only"])
def test_generators_make_images_with_boxes(name, adapter, tmp_path):
    teacher = cell_teacher(DecodeOnly) if adapter == "decode only" else cell_teacher()
    made = generate(teacher, build("generator", name), 9, 0, tmp_path / "d")
    made.verify()
    assert {"images", "boxes", "labels", "scores"} <= set(made[0]) and len(made) == 9
    assert ({"raw.places", "raw.classes"} if adapter == "decode only" else {"logits"}) <= set(made[0])
    with torch.no_grad():
        outputs = teacher(made.tensors()["images"])
    stored = made.tensors()["logits"] if adapter == "cells" else made.tensors()["raw.places"]
    torch.testing.assert_close(stored, outputs if adapter == "cells" else outputs["places"])
    assert generate(teacher, build("generator", name), 9, 0, tmp_path / "e").sha256 == made.sha256
    assert made.manifest["boxes_from"] == ("generator" if name == "box_sampling" else "teacher")
    text = [str(cell) for column in describe(made.path).columns for cell in column.cells]
    assert "boxes" in text


def told(path):
    names, texts = (list(column.cells) for column in describe(path).columns)
    return dict(zip(names, texts, strict=True))


def test_inspect_tells_the_balance_of_classes(dataset):
    """The network's classes, those that have no box among them: they are in the quality that lies beside."""
    labels = dataset.tensors(names=("labels",))["labels"]
    counts = torch.cat(labels).bincount(minlength=CLASSES).tolist()
    rows = told(dataset.path)
    lines = rows["boxes of a class"].splitlines()
    assert {int(line.split()[0]): int(line.split()[-1]) for line in lines} == {c: n for c, n in enumerate(counts) if n}
    shown = [int(line.split()[-1]) for line in lines]
    assert shown == sorted(shown, reverse=True) and lines[0].count("█") == 24
    assert [line.count("█") for line in lines] == [max(1, round(24 * n / shown[0])) for n in shown]
    sizes = [len(row) for row in labels]
    mean, most = sum(sizes) / len(sizes), max(sizes)
    assert rows["boxes"].startswith(f"{sum(sizes)}, {mean:.1f} an image (at most {most}; {sizes.count(0)} images with ")
    assert rows["boxes"].endswith(f"of {len(lines)} of {CLASSES} classes")
    assert ("without a box" in rows) == (0 in counts)


def test_inspect_names_classes_without_a_box(dataset):
    file = dataset.path / quality.QUALITY
    stored = json.loads(file.read_text())
    few = [0] * 30 + [7, 1] + list(range(2, 22))  # as quality.json has them: nothing is counted again
    file.write_text(json.dumps(stored | {"class_labels": list(range(1, 53)), "class_counts": few}))
    rows = told(dataset.path)
    assert rows["without a box"] == f"30 classes: {', '.join(map(str, range(1, 21)))} and 10 more"
    assert "of 22 of 52 classes" in rows["boxes"]
    lines = rows["boxes of a class"].splitlines()
    assert len(lines) == 13 and lines[0].split()[0] == "52" and lines[6] == "10 classes between, 7 to 15 each"
    assert lines[-1].split() == ["32", "█", "1"]


def test_inspect_counts_boxes_of_a_dataset_that_was_not_measured(tmp_path):
    dataset, _ = ragged(tmp_path / "d")
    rows = told(dataset.path)
    assert rows["boxes"] == "6, 1.2 an image (at most 3; 2 images with none), of 3 classes"
    assert [(line.split()[0], line.split()[-1]) for line in rows["boxes of a class"].splitlines()] == [
        ("0", "3"), ("1", "2"), ("2", "1"),
    ]  # fmt: skip
    assert "without a box" not in rows
    none, _ = ragged(tmp_path / "none", ((0, 0),))
    assert told(none.path)["boxes"] == "0, 0.0 an image (at most 0; 2 images with none), of 0 classes"


def test_as_many_images_at_once_as_fit_into_memory(teacher, tmp_path):
    generator = build("generator", "box_sampling", batch_size="auto", memory_bytes=2_000_000)
    made = generate(teacher, generator, 9, 0, tmp_path / "d")
    assert len(made) == 9 and 1 <= made.manifest["settings"]["batch_size"] <= 256


def test_raw_outputs_that_are_too_large_are_left_out_and_that_is_said(teacher, tmp_path, monkeypatch, capsys):
    generator = build("generator", "gaussian", batch_size=4)
    whole = generate(teacher, generator, 9, 0, tmp_path / "whole")
    assert "left out" not in capsys.readouterr().err and "raw_outputs_left_out" not in whole.manifest
    size = whole[0]["logits"].numel() * 4
    monkeypatch.setattr(Detection, "most_bytes", size - 1)
    made = generate(teacher, generator, 9, 0, tmp_path / "d")
    assert "logits" not in made[0] and torch.equal(made.tensors()["images"], whole.tensors()["images"])
    said = capsys.readouterr().err
    assert said.count("the teacher's raw outputs take 0.0 MiB a sample, more than the") == 1, "once, not for each batch"
    assert made.manifest["raw_outputs_left_out"] == {"bytes_a_sample": size, "most_bytes": size - 1}
    assert told(made.path)["raw outputs"].startswith("left out: 0.0 MiB a sample, at most ")
    merged = generate(teacher, generator, 9, 0, tmp_path / "merged", parts=[made.path])
    assert merged.manifest["raw_outputs_left_out"] == made.manifest["raw_outputs_left_out"]
    algorithm = build("algorithm", "distillation")
    apart = []
    for name, data in {"without": made, "with": whole}.items():
        student, _ = quantize(teacher, data, W4A8, algorithm, *QUANTIZERS, 0, tmp_path / name)
        apart.append((student(whole.tensors()["images"]) - whole.tensors()["logits"]).square().mean())
    torch.testing.assert_close(*apart, rtol=0.02, atol=0)  # they are made again when they are needed


@pytest.mark.parametrize("name", ["gdfq", "deep_inversion"])
def test_generators_that_pull_to_one_class_say_so(name, teacher, tmp_path):
    with pytest.raises(UserError, match=r"pulls each image to one class, and a detector.*generator=box_sampling"):
        generate(teacher, build("generator", name), 8, 0, tmp_path / "d")


# ------------------------------------------------------------------------------------------------ algorithms


@pytest.fixture(scope="module", params=[cell_teacher, two_stages], ids=["one stage", "two stages"])
def made(request, tmp_path_factory):
    """A function that makes a detector, and a dataset of it, which all algorithms read."""
    return request.param, generate(
        request.param(), build("generator", "box_sampling"), 20, 0, tmp_path_factory.mktemp("made") / "data"
    )


@pytest.mark.parametrize("name", choices("algorithm"))
def test_algorithms_quantize_detectors(made, name, tmp_path):
    make, dataset = made
    teacher = make()
    if name == "rotation":
        with pytest.raises(UserError, match=f"got algorithm=rotation and {teacher.name}, in which no layer reads from"):
            quantize(teacher, dataset, W4A8, build("algorithm", name), *QUANTIZERS, 0, tmp_path / "s")
        return
    settings = {"budget": "10s"} if name == "auto" else {}  # of 10 minutes it would take what it can use
    algorithm = build("algorithm", name, **settings)
    student, path = quantize(teacher, dataset, W4A8, algorithm, *QUANTIZERS, 0, tmp_path / "s")
    images = dataset.tensors()["images"][:4]
    with torch.no_grad():
        outputs, wanted = list(tensors_in(student(images))), list(tensors_in(teacher(images)))
        again = list(tensors_in(Student.load(path, teacher)(images)))
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))
    # The first: what no choice of proposals has come before.
    assert float((outputs[0] - wanted[0]).square().sum() / wanted[0].square().sum()) < 0.2


def test_layers_behind_proposals_are_compared_on_the_same_ones(tmp_path):
    """At 8 bits a layer is close to its teacher's, wherever it lies; that of other proposals is not."""
    teacher = two_stages()
    dataset = generate(teacher, build("generator", "gaussian"), 20, 0, tmp_path / "data")
    scheme = Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(8))
    for algorithm in ("round_to_nearest", "bias_correction"):
        method = build("algorithm", algorithm)
        student, _ = quantize(teacher, dataset, scheme, method, *QUANTIZERS, 0, tmp_path / algorithm)
        layers = evaluate(teacher, student, resolve("evaluation", "none"), dataset)["fidelity"]["layers"]
        ratios = {row["name"]: row["sqnr_db"] for row in layers}
        assert min(ratios.values()) > 20, ratios


@pytest.mark.parametrize("settings", [{"task_weight": 0.1}, {"task_weight": 0.1, "shift": 3}, {"kl_weight": 0.0}])
def test_distillation_of_what_only_decodes(settings, tmp_path):
    teacher = cell_teacher(DecodeOnly)
    dataset = generate(teacher, build("generator", "box_sampling"), 20, 0, tmp_path / "data")
    algorithm = build("algorithm", "distillation", **settings)
    student, _ = quantize(teacher, dataset, W4A8, algorithm, *QUANTIZERS, 0, tmp_path / "s")
    found = evaluate(teacher, student, resolve("evaluation", "none"), dataset)["fidelity"]
    assert 0 <= found["agreement"] <= 1 and found["kl"] >= 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"reverse_kl_weight": 1.0},
            "got algorithm.reverse_kl_weight=1.0 and a detector; allowed: algorithm.kl_weight",
        ),
        ({"temperature": 2.0}, "got algorithm.temperature=2.0 and a detector; allowed: algorithm.kl_weight"),
        ({"task_weight": 1.0, "mixup": 0.5}, "got algorithm.mixup=0.5 and a detector; allowed: algorithm.kl_weight"),
    ],
)
def test_losses_that_need_one_answer_a_sample_are_refused(settings, message, teacher, dataset, tmp_path):
    with pytest.raises(UserError) as error:
        quantize(teacher, dataset, W4A8, build("algorithm", "distillation", **settings), *QUANTIZERS, 0, tmp_path / "s")
    assert str(error.value).startswith(message)


def test_the_weight_of_boxes_that_no_adapter_tells_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "OUTPUTS", tmp_path / "outputs")
    teacher = cell_teacher(DecodeOnly)
    dataset = generate(teacher, build("generator", "gaussian"), 8, 0, tmp_path / "data")
    with pytest.raises(UserError) as error:
        quantize(teacher, dataset, W4A8, build("algorithm", "distillation", box_weight=2.0), *QUANTIZERS, 0)
    assert str(error.value) == (
        "got algorithm.box_weight=2.0 and the adapter DecodeOnly, whose raw outputs alone are compared; "
        "allowed: algorithm.box_weight=0, or an adapter with candidates(raw)"
    )
    terms = [_terms(DistillationSettings(), True, task_of(t)) for t in (teacher, cell_teacher())]
    assert [set(found) for found in terms] == [{"kl", "feature"}, {"kl", "box", "feature"}]


def test_boxes_weigh_what_the_task_says_unless_the_algorithm_says_otherwise():
    task = replace(task_of(cell_teacher()), box_weight=3.0)
    weights = [_terms(DistillationSettings(box_weight=given), True, task).get("box") for given in (None, 2.0, 0.0)]
    assert weights == [3.0, 2.0, None]


def test_boxes_move_with_their_images():
    images = torch.zeros(6, 1, 20, 30)
    boxes = [torch.tensor([[5.0, 6.0, 11.0, 12.0]])] * 6
    images[:, :, 6:12, 5:11] = 1
    rng = torch.Generator().manual_seed(1)
    moves = draw_moves(images, rng, flip=True, shift=3)
    assert moves is not None and 0 < int(moves.mirrored.sum()) < 6
    moved = augment(images, rng, moves=moves, flip=False)
    for image, (box,) in zip(moved, moves.boxes(boxes, (20, 30)), strict=True):
        where = image[0].nonzero()
        wanted = [*where.amin(0).flip(0).tolist(), *(where.amax(0) + 1).flip(0).tolist()]
        assert box.tolist() == wanted
    same = augment(images, torch.Generator().manual_seed(1), True, 3)
    assert torch.equal(moved, same), "the draw is the one that augment makes by itself"


# ------------------------------------------------------------------------------------------------ the rest


def test_export_has_the_raw_outputs(teacher, dataset, tmp_path):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    student, _ = quantize(
        teacher, dataset, W4A8, build("algorithm", "round_to_nearest"), *QUANTIZERS, 0, tmp_path / "s"
    )
    exporter = resolve("exporter", "onnx_qdq", latency=False)
    found = export(student, exporter, tmp_path / "a.onnx", teacher, dataset)
    assert "argmax_agreement" not in found["parity"]  # which says nothing of boxes
    assert found["parity"]["box_agreement"] >= found["parity"]["self_agreement"] - 0.03
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    images = dataset.tensors()["images"][:3]
    (outputs,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        wanted = student(images)
    assert (torch.from_numpy(outputs) - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def coco_of(folder, dataset, spec=SPEC):
    """An evaluation made of the dataset's own images and boxes, as files."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    tensors = dataset.tensors()
    content = {"images": [], "annotations": [], "categories": [{"id": i} for i in range(CLASSES)]}
    for i, image in enumerate(spec.to_pixels(tensors["images"]).permute(0, 2, 3, 1).numpy()):
        Image.fromarray(np.ascontiguousarray(image)).save(folder / "images" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png"})
        for (x1, y1, x2, y2), label in zip(tensors["boxes"][i].tolist(), tensors["labels"][i].tolist(), strict=True):
            entry = {"id": len(content["annotations"]) + 1, "image_id": i, "category_id": label}
            content["annotations"].append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    (folder / "boxes.json").write_text(json.dumps(content))
    return Coco(str(folder / "images"), str(folder / "boxes.json"), str(folder / "images"))


def test_coco_export_reads_back(teacher, dataset, tmp_path):
    annotations = export_coco(dataset, tmp_path / "coco")
    (images, rows), *_ = Coco(str(tmp_path / "coco" / "images"), str(annotations), labels="id").batches(SPEC)
    tensors = dataset.tensors()
    for row, boxes, labels in zip(rows, tensors["boxes"], tensors["labels"], strict=False):
        torch.testing.assert_close(row["boxes"], boxes, atol=1e-3, rtol=0)
        assert torch.equal(row["labels"], labels) and row["size"] == (32.0, 32.0)
    assert torch.equal(SPEC.to_pixels(images), SPEC.to_pixels(tensors["images"][: len(images)]))
    with pytest.raises(UserError, match="which is not empty; allowed: an empty or new folder"):
        export_coco(dataset, tmp_path / "coco")
    plain = SyntheticDataset.create(tmp_path / "plain", {}, {"pixels": False, "labels": False})
    plain.write_shard(0, {"images": torch.zeros(2, 3, 4, 4), "logits": torch.zeros(2, 3)}, 0.0)
    with pytest.raises(UserError, match="a dataset without boxes; allowed: a dataset made for a detector"):
        export_coco(plain, tmp_path / "other")


OPENED: list[str] = []
WATCHING = [False]


def _watch(event, arguments, watching=WATCHING, opened=OPENED):  # bound: it is called after this module is torn down
    if watching[0] and event in ("open", "os.listdir", "os.scandir"):
        opened.append(str(arguments[0]))


sys.addaudithook(_watch)  # Python has no way to take one back: it looks away unless it is told to look


def test_a_run_reads_nothing_real_until_it_evaluates(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "OUTPUTS", tmp_path / "outputs")
    evaluation = coco_of(tmp_path / "real", generate(teacher, build("generator", "gaussian"), 12, 5, tmp_path / "g"))
    OPENED.clear()
    seen = {}
    original = pipeline.evaluate

    def evaluated(*args, **kwargs):
        seen["before"] = [path for path in OPENED if str(tmp_path / "real") in path]
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline, "evaluate", evaluated)
    WATCHING[0] = True
    try:
        report = pipeline.run(
            Experiment(
                teacher, build("generator", "box_sampling"), W4A8, build("algorithm", "distillation"), *QUANTIZERS,
                evaluation, None, 16, 0, output_dir=tmp_path / "run", references=("gaussian", "real"),
            )
        )  # fmt: skip
    finally:
        WATCHING[0] = False
    assert seen["before"] == [], "a file of the evaluation was opened before the evaluation"
    assert [path for path in OPENED if str(tmp_path / "real") in path], "and the watch sees such files"
    assert report["dataset"]["provenance"] == {"pixels": False, "labels": False}
    assert set(report["teacher"]["metrics"]) == set(report["student"]["metrics"]) == {"map", "map_50"}
    assert report["teacher"]["task"] == "detection" and 0 <= report["fidelity"]["agreement"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    details = json.loads((tmp_path / "run" / "details.json").read_text())
    assert [row["role"] for row in details["references"]] == ["teacher", "student", "reference", "reference"]
    assert details["grid"]["columns"] == 2 and details["predictions"][0].startswith("made from ")
    assert "white: the boxes it was made from, green" in page
    assert "teacher" in details["predictions"][0] and "student" in details["predictions"][0] and "data:image" in page


def test_boxes_that_the_teacher_found_are_called_so(teacher, tmp_path):
    """No image of this generator was made from a box."""
    dataset = generate(teacher, build("generator", "gaussian"), 8, 0, tmp_path / "data")
    algorithm = build("algorithm", "round_to_nearest")
    student, path = quantize(teacher, dataset, W4A8, algorithm, *QUANTIZERS, 0, tmp_path / "s")
    pipeline.report_student(teacher, student, path, resolve("evaluation", "none"), dataset, tmp_path / "run", "")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "white: the boxes it is labelled with, which the teacher found in it, green" in page
    assert "made from" not in "".join(json.loads((tmp_path / "run" / "details.json").read_text())["predictions"])
    other = SyntheticDataset.create(tmp_path / "other", dataset.manifest["settings"], dataset.provenance)
    other.adopt(dataset)
    assert other.manifest["boxes_from"] == "teacher", "as a part made elsewhere says"


def test_an_adapter_that_has_changed_is_measured_anew(tmp_path, monkeypatch):
    """The same weights and the same name: what was made and measured by the file's old content is not read again."""
    monkeypatch.setattr(pipeline, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second would be read from the cache
    monkeypatch.syspath_prepend(tmp_path)
    base, generator = cell_teacher(), build("generator", "box_sampling")
    evaluation = coco_of(tmp_path / "real", generate(base, generator, 12, 5, tmp_path / "g"))

    def run(shift):
        monkeypatch.delitem(sys.modules, "edited_adapter", raising=False)
        (tmp_path / "edited_adapter.py").write_text(
            "from tiny_detectors import Cells\n\n\nclass Adapter(Cells):\n    def decode(self, raw, sizes):\n"
            f"        return [row._replace(boxes=row.boxes + {shift}) for row in super().decode(raw, sizes)]\n"
        )
        teacher = Teacher(as_detector(base.module.network, "edited_adapter:Adapter"), "detection", SPEC, name="edited")
        dataset = generate(teacher, generator, 8)
        algorithm = build("algorithm", "round_to_nearest")
        student, student_dir = quantize(teacher, dataset, W4A8, algorithm, *QUANTIZERS)
        figures = evaluate(teacher, student, evaluation)
        return figures["teacher"]["map"], figures["student"]["map"], dataset.path, student_dir

    right, wrong, again = run(0.0), run(12.0), run(0.0)
    assert right[0] > wrong[0] and right[1] > wrong[1], "the detector that is 12 pixels off is worse"
    assert right[2:] == again[2:] and all(a != b for a, b in zip(right[2:], wrong[2:], strict=True))
    running = sys.modules["edited_adapter"].Adapter(base.module.network)
    record = adapter_record(running)
    (tmp_path / "edited_adapter.py").write_text("")
    assert adapter_record(running) == record, "an edit while it runs says nothing of what runs"
    assert right == again and len(list((tmp_path / "outputs" / "datasets").iterdir())) == 2, "nothing is made twice"


def test_what_settings_of_the_task_decide_is_made_anew(tmp_path, monkeypatch):
    """Labels: the dataset, and what is made with it. The weight of boxes: students alone."""
    monkeypatch.setattr(pipeline, "OUTPUTS", tmp_path / "outputs")
    places, divergences = {}, {}
    for name, given in {"usual": {}, "sure": {"least_score": 0.4}, "boxes": {"box_weight": 9.0}}.items():
        base = cell_teacher().module.network
        teacher = Teacher(as_detector(base, Cells, given), "detection", SPEC, name="cells")
        dataset = generate(teacher, build("generator", "gaussian"), 8)
        assert all((scores >= given.get("least_score", 0.25)).all() for scores in dataset.tensors()["scores"])
        student, folder = quantize(teacher, dataset, W4A8, build("algorithm", "round_to_nearest"), *QUANTIZERS)
        places[name] = dataset.path, folder
        divergences[name] = evaluate(teacher, student, resolve("evaluation", "none"), dataset)["fidelity"]["kl"]
        if name == "sure":
            assert dataset.manifest["settings"]["adapter"]["task"] == given
    assert places["usual"][0] == places["boxes"][0] != places["sure"][0]
    assert len({folder for _, folder in places.values()}) == 3
    assert divergences["boxes"] > divergences["usual"]


def test_what_a_record_says_of_an_adapter():
    from conftest import NETS, as_teacher
    from tiny_detectors import family_teacher

    assert adapter_record(as_teacher(NETS["plain"]()).module) == {}, "folders of classifiers keep their names"
    assert adapter_record(family_teacher("ssd").module) == {"adapter": {"name": "dfq.detectors.ssd.Adapter"}}
    mine = adapter_record(cell_teacher().module)["adapter"]
    assert mine["name"] == "tiny_detectors.Cells" and len(mine["sha256"]) == 64
    scopes = [{"Cells": Cells, "__name__": "typed"} for _ in range(3)]  # classes of no file
    for scope, most in zip(scopes, (10, 20, 10), strict=True):
        exec(f"class Adapter(Cells):\n    def suppress(self, *row):\n        return row[:{most}]", scope)
    hashes = [adapter_record(scope["Adapter"](torch.nn.Identity()))["adapter"]["sha256"] for scope in scopes]
    assert hashes[0] == hashes[2] != hashes[1]


def test_edges_are_the_stem_and_the_last_layer_of_each_head(tmp_path):
    class Heads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = torch.nn.Conv2d(3, 6, 3, 2), torch.nn.Conv2d(6, 6, 3, 2)
            self.box = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 1), torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 5, 1))
            self.kind = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 1), torch.nn.ReLU(), torch.nn.Conv2d(6, CLASSES, 1))

        def forward(self, x):
            x = self.body(self.stem(x).relu()).relu()
            return torch.cat([self.box(x), self.kind(x)], 1)

    teacher = Teacher(Cells(Heads()), "detection", SPEC)
    student = Student.from_teacher(teacher, Scheme(TensorScheme(4), TensorScheme(4), policy="edges_8bit"))
    bits = {name.removeprefix("network."): weight.num_bits for name, (weight, _) in student.swap.layers.items()}
    assert bits == {"stem": 8, "body": 4, "box.0": 4, "box.2": 8, "kind.0": 4, "kind.2": 8}
