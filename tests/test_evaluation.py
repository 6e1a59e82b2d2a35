"""Evaluation on labelled data by hand, and the data-free figures against NumPy."""

import math
import zipfile

import numpy as np
import pytest
import torch
from conftest import NETS, SPEC, settle
from PIL import Image
from torch import nn

import dfq
from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.evaluation import Arrays, ImageFolder, NoEvaluation, batch_norm_match, fidelity, measure
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.student import Student
from dfq.tasks.classification import Classification
from dfq.tasks.detection import BoxMetrics
from dfq.tasks.language_modeling import LanguageModeling
from dfq.teacher import InputSpec, Teacher, TokenSpec

TASK = Classification()


def pixels(num_samples=37, size=(8, 8, 3)):
    return np.random.default_rng(0).integers(0, 256, (num_samples, *size), dtype=np.uint8)


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def teacher(make_teacher):
    return make_teacher("plain")


def by_hand(teacher, images):
    """Logits in float64 NumPy preprocessing."""
    x = (images.astype(np.float64) / 255 - np.array(SPEC.mean)) / np.array(SPEC.std)
    with torch.no_grad():
        return teacher(torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))).numpy()


@pytest.mark.parametrize("batch_size", [1, 10, 250])
def test_arrays_accuracy_by_hand(tmp_path, teacher, batch_size):
    images = pixels()
    logits = by_hand(teacher, images)
    labels = np.where(np.arange(37) % 3 > 0, logits.argmax(1), 4).astype(np.int64)
    evaluation = Arrays(save(tmp_path / "a.npz", images=images, labels=labels), batch_size=batch_size)
    found = measure(teacher, TASK, evaluation.batches(SPEC), evaluation.num_samples, "teacher")
    top5 = (np.argsort(-logits, 1)[:, :5] == labels[:, None]).any(1).mean()
    assert evaluation.num_samples == 37
    assert found == pytest.approx({"top1": (logits.argmax(1) == labels).mean(), "top5": top5})


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_labels_of_any_integer_type(tmp_path, teacher, dtype):
    path = save(tmp_path / "a.npz", images=pixels(), labels=np.arange(37).astype(dtype) % 10)
    assert next(Arrays(path).batches(SPEC))[1].dtype == torch.int64


def test_gray_images_without_a_channel_dimension(tmp_path):
    path = save(tmp_path / "a.npz", images=pixels(size=(8, 8)), labels=np.zeros(37, np.int64))
    assert next(Arrays(path).batches(InputSpec((1, 8, 8), (0.5,), (0.5,))))[0].shape == (37, 1, 8, 8)


LABELS = np.zeros(37, np.int64)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            {"images": pixels()},
            r"without labels; allowed: a \.npz file with images uint8 \[N, H, W, C\] and labels int64 \[N\]",
        ),
        ({"x": LABELS}, "without images and labels"),
        ({"images": pixels().astype(np.float32) / 255, "labels": LABELS}, r"with images float32 \[37, 8, 8, 3\]"),
        ({"images": pixels(), "labels": LABELS[:36]}, r"labels int64 \[36\]"),
        ({"images": pixels(), "labels": np.eye(37, dtype=np.int64)}, r"labels int64 \[37, 37\]"),
        ({"images": pixels(), "labels": LABELS + 0.7}, r"labels float64 \[37\]"),
        (
            {"images": pixels(size=(9, 8, 3)), "labels": LABELS},
            r"images of 9 x 8 x 3; allowed: 8 x 8 x 3 \(height, width, channels\)",
        ),
        ({"images": pixels(size=(3, 8, 8)), "labels": LABELS}, r"images of 3 x 8 x 8; allowed: 8 x 8 x 3"),
        ({"images": pixels(size=(8, 8)), "labels": LABELS}, r"images of 8 x 8 x 1; allowed"),
        ({"images": np.array([{}], dtype=object), "labels": LABELS}, "can't be read"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, message):
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        list(Arrays(path).batches(SPEC))
    assert path in str(error.value) and "\n" not in str(error.value)


def damaged(path):
    np.savez_compressed(path, images=pixels(), labels=LABELS)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: None,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("images, labels"),
        lambda p: np.save(p.open("wb"), pixels()),
        lambda p: (np.savez(p, images=pixels(), labels=LABELS), p.write_bytes(p.read_bytes()[:-50])),
        damaged,
        lambda p: zipfile.ZipFile(p, "w").close(),
        lambda p: p.mkdir(),
    ],
    ids=["missing", "empty", "text", "npy", "truncated", "damaged", "empty zip", "folder"],
)
def test_files_that_are_no_arrays(tmp_path, make):
    make(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"got .*a\.npz.*; allowed: a \.npz file with images uint8") as error:
        list(Arrays(str(tmp_path / "a.npz")).batches(SPEC))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label", [-1, 10, 1000])
def test_labels_out_of_range(tmp_path, teacher, label):
    labels = LABELS.copy()
    labels[-1] = label
    evaluation = Arrays(save(tmp_path / "a.npz", images=pixels(), labels=labels), batch_size=10)
    with pytest.raises(UserError, match="and a network with 10 outputs; allowed: labels from 0 to 9"):
        measure(teacher, TASK, evaluation.batches(SPEC), 37, "teacher")


def test_reference_images_are_spread_over_the_file(tmp_path):
    images = np.broadcast_to(np.arange(37, dtype=np.uint8)[:, None, None, None], (37, 8, 8, 3))
    evaluation = Arrays("unused", save(tmp_path / "a.npz", images=images, labels=LABELS))
    found = SPEC.to_pixels(evaluation.reference_images(SPEC, 4))[:, 0, 0, 0].tolist()
    assert found == [0, 12, 24, 36] and len(evaluation.reference_images(SPEC, 99)) == 37


def test_no_evaluation(teacher):
    assert measure(teacher, TASK, NoEvaluation().batches(SPEC), 0, "teacher") == {}


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_image_folder_by_hand(tmp_path, teacher, mode):
    images = pixels(12)
    for i, image in enumerate(images):
        (tmp_path / f"class{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(image).convert(mode).save(tmp_path / f"class{i % 3}" / f"{i:02d}.png")
    (tmp_path / "class0" / "notes.txt").write_text("no image")
    evaluation = ImageFolder(str(tmp_path), resize=8, batch_size=5)
    order = [i for c in range(3) for i in range(c, 12, 3)]
    shown = np.stack([np.asarray(Image.fromarray(images[i]).convert(mode).convert("RGB")) for i in order])
    logits, labels = by_hand(teacher, shown), np.repeat(np.arange(3), 4)
    assert evaluation.num_samples == 12
    assert torch.cat([y for _, y in evaluation.batches(SPEC)]).tolist() == labels.tolist()
    found = measure(teacher, TASK, evaluation.batches(SPEC), 12, "teacher")
    assert found["top1"] == pytest.approx((logits.argmax(1) == labels).mean())


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 8, 8), (3, 8, 16)])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (5, 5)])
def test_image_folder_resizes_and_crops_without_a_border(tmp_path, size, shape):
    (tmp_path / "a").mkdir()
    Image.new("RGB", shape[::-1], (255, 255, 255)).save(tmp_path / "a" / "0.png")
    spec = InputSpec(size, (0.0,) * size[0], (1.0,) * size[0])
    found, _ = next(ImageFolder(str(tmp_path)).batches(spec))
    assert found.shape == (1, *size) and float(found.min()) > 0.99  # black: the crop was wider than the image


@pytest.mark.parametrize(
    "make",
    [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x"), lambda p: (p / "class").mkdir(parents=True)],
)
def test_folders_without_images(tmp_path, make):
    make(tmp_path / "f")
    with pytest.raises(
        UserError, match=r"which has no images in folders of classes .*; allowed: DIR/<class>/<image>"
    ) as error:
        list(ImageFolder(str(tmp_path / "f")).batches(SPEC))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ data-free figures


def quantized(teacher, bits):
    student = Student.from_teacher(teacher, Scheme(TensorScheme(bits, True, "per_channel"), TensorScheme(bits)))
    calibrate(student, settle(NETS["bare"](), seed=3), MinMax(), MinMax())
    return student.freeze()


def test_fidelity_of_a_fine_and_a_coarse_student(teacher):
    images = settle(NETS["bare"](), seed=4, num_samples=50)
    fine, coarse = (fidelity(teacher, quantized(teacher, bits), TASK, images) for bits in (8, 3))
    assert fine["agreement"] > 0.9 and fine["kl"] < 1e-3 < coarse["kl"]
    assert [layer["name"] for layer in fine["layers"]] == ["0", "3", "8"]
    for good, bad in zip(fine["layers"], coarse["layers"], strict=True):
        assert good["sqnr_db"] > 25 > bad["sqnr_db"] > 0 and good["weight_bits"] == good["activation_bits"] == 8


def test_fidelity_by_hand(teacher):
    images = settle(NETS["bare"](), seed=4, num_samples=50) * 2  # beyond what was calibrated: some of it is clipped
    student = quantized(teacher, 4)
    found = fidelity(teacher, student, TASK, images, batch_size=7)
    with torch.no_grad():
        t, s = teacher(images).double(), student(images).double()
        wanted, got = teacher.module[:2](images), student.module[:2](images)
    assert found["agreement"] == pytest.approx(float((t.argmax(1) == s.argmax(1)).double().mean()))
    assert found["kl"] == pytest.approx(
        float((t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()), rel=1e-4
    )
    first = found["layers"][0]
    assert first["sqnr_db"] == pytest.approx(
        10 * math.log10(float(wanted.square().sum() / (wanted - got).square().sum())), rel=1e-4
    )
    quantizer = student.layers["0"].input_quantizer
    codes = images / quantizer.scale + quantizer.zero_point
    clipped = float(((codes < -0.5) | (codes > 15.5)).double().mean())
    assert clipped > 0 and first["clipped_fraction"] == pytest.approx(clipped, abs=1e-4)


@pytest.mark.parametrize("inplace", [True, False])
def test_fidelity_compares_like_with_like_where_the_norm_carries_an_activation(inplace):
    from timm.layers import BatchNormAct2d

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), BatchNormAct2d(8, inplace=inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    settle(net)
    teacher = Teacher(net, "classification", SPEC)
    found = fidelity(teacher, quantized(teacher, 8), TASK, settle(NETS["bare"](), seed=4))
    assert found["layers"][0]["sqnr_db"] > 25


@pytest.mark.parametrize("kind", ["plain", "residual", "mlp"])
def test_batch_norm_match_of_the_data_behind_the_statistics(kind):
    net = NETS[kind]()
    images = settle(net)
    teacher = Teacher(net, "classification", SPEC)
    match, other = batch_norm_match(teacher, images, batch_size=13), batch_norm_match(teacher, torch.randn_like(images))
    assert list(match) == list(teacher.batch_norms)
    assert max(match.values()) < 1e-3  # running_var is the unbiased variance: not exactly 0
    assert min(other.values()) > 10 * max(match.values())


def test_batch_norm_match_where_the_mean_is_far_larger_than_the_deviation():
    """Sums of squares lose the variance in float32."""
    net = NETS["plain"]()
    net.insert(1, nn.Identity())
    settle(net)
    net[0] = nn.Conv2d(3, 8, 3, padding=1)
    nn.init.constant_(net[0].bias, 3000.0)
    images = settle_statistics(net)
    assert max(batch_norm_match(Teacher(net, "classification", SPEC), images, batch_size=32).values()) < 1e-2


def settle_statistics(net):
    images = settle(NETS["bare"](), seed=6)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(images)
    net.eval()
    return images


def test_rows_longer_than_a_network_has_positions(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    teacher = Teacher(transformers.GPT2LMHeadModel(config), "language_modeling", TokenSpec(64, 16), name="gpt2")
    path = tmp_path / "rows.npz"
    np.savez(path, input_ids=np.zeros((2, 40), np.int64))
    with pytest.raises(UserError) as error:
        dfq.evaluate(teacher, None, "tokens", path=str(path))
    assert str(error.value) == (
        f"got {path} with a row of 40 tokens and gpt2, which has 32 positions; allowed: rows of at most 32 tokens; "
        "give evaluation.length=32"
    )
    assert dfq.evaluate(teacher, None, "tokens", path=str(path), length=32)["teacher"]["perplexity"] > 1


def test_one_process_of_several_evaluates_alone(monkeypatch):
    """The others do something else meanwhile, and nobody would answer."""
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    logits, labels = torch.eye(8)[:4], torch.arange(4)
    metrics = Classification().metrics(8)
    metrics.update(logits, labels)
    assert float(metrics.compute()["top1"]) == 1.0
    metrics = LanguageModeling().metrics(8)
    metrics.update(torch.zeros(1, 4, 8), labels[None])
    assert float(metrics.compute()["perplexity"]) == pytest.approx(8)
    metrics = BoxMetrics(None)
    box = {"boxes": torch.tensor([[0.0, 0.0, 8.0, 8.0]]), "labels": torch.ones(1, dtype=torch.long)}
    metrics.metric.update([{**box, "scores": torch.ones(1)}], [box])
    assert float(metrics.compute()["map"]) == pytest.approx(1)
