"""Quality of a dataset: every figure against NumPy, verdicts of what is known to be bad and good, where it is told."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from dfq import quality
from dfq import report as reports
from dfq.dataset import QUALITY, SyntheticDataset
from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators._filters import gaussian_blur, pink_noise
from dfq.generators.gaussian import Gaussian
from dfq.generators.zeroq import ZeroQ
from dfq.inspection import describe
from dfq.pipeline import generate
from dfq.settings import resolve
from dfq.teacher import InputSpec, Teacher
from tests.conftest import SPEC, bare, settle
from tests.test_report import make_details, make_report, write
from tests.test_tokens import language
from tests.tiny_detectors import two_stages

GOOD = quality.Quality(
    num_samples=1024,
    num_looked_at=256,
    shorter_side=32,
    statistic_distances={"bn1": 0.02, "bn2": 0.04},
    distance_to_noise=0.05,
    class_counts=[100] * 10,
    class_entropy=1.0,
    confidence=0.6,
    duplicates=0.0,
    deviation=1.0,
    between_images=0.33,
    spectrum=-1.8,
    agreement=0.8,
)


def images(num_samples=12, size=(3, 8, 8), seed=0):
    return torch.randn(num_samples, *size, generator=torch.Generator().manual_seed(seed))


def changed(**figures):
    return quality.verdict(dataclasses.replace(GOOD, **figures))


# ------------------------------------------------------------------------------------------------ measures


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5], 1.0), ([4, 0, 0], 0.0), ([1, 1, 0, 0], 1.0), ([3, 1, 0], None), ([2], 1.0)]
)
def test_entropy_is_a_share_of_the_largest_possible(counts, expected):
    if expected is None:  # three of one class and one of another, of three
        expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(3)
    assert quality.class_entropy(counts) == pytest.approx(expected)


def test_variance_between_images():
    x = images() + 0.7 * images(12, (3, 1, 1), seed=1)
    a = x.double().numpy()
    expected = np.mean([a[:, c].mean((1, 2)).var() / a[:, c].var() for c in range(3)])
    assert quality.between_images(x) == pytest.approx(expected, rel=1e-9) and expected > 0.2
    assert quality.between_images(torch.zeros(4, 3, 8, 8)) is None


def test_deviation_counts_where_the_normalization_is_by_it():
    x = 0.7 * images() + images(1, (3, 1, 1), seed=1)
    expected = np.sqrt(np.mean([x.double().numpy()[:, c].var() for c in range(3)]))
    assert quality._deviation(x, SPEC) == pytest.approx(expected, rel=1e-9)
    assert quality._deviation(x, InputSpec(SPEC.size, (0.5,) * 3, (0.5,) * 3)) is None


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 6, 10)])
def test_spectrum(size):
    x = images(5, size).cumsum(3)
    power = (np.abs(np.fft.fft2(x.numpy() - x.numpy().mean((2, 3), keepdims=True))) ** 2).sum((0, 1))
    points = [
        (np.log(f), np.log(power[i, j]))
        for i, v in enumerate(np.fft.fftfreq(size[1]))
        for j, h in enumerate(np.fft.fftfreq(size[2]))
        if 0 < (f := np.hypot(v, h)) <= 0.5
    ]
    expected = np.polyfit(*np.array(points).T, 1)[0]
    assert quality.spectrum(x) == pytest.approx(expected, rel=1e-4) and expected < -0.3
    assert quality.spectrum(torch.ones(2, *size)) is None and quality.spectrum(torch.ones(2, 3, 1, 1)) is None


def test_white_noise_has_a_flat_spectrum():
    assert abs(quality.spectrum(images(64, (3, 32, 32)))) < 0.02


def test_a_blur_makes_the_spectrum_steeper_by_what_its_limits_say():
    pink = pink_noise((64, 1, 64, 64), torch.Generator().manual_seed(0))
    sharp, soft = (quality.spectrum(gaussian_blur((64, 64), sigma, pink.device)(pink)) for sigma in (0.0, 0.7))
    assert sharp == pytest.approx(-2, abs=0.05) and soft - sharp == pytest.approx(-2, abs=0.2)


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 40, 70)])
def test_copies_are_found_and_alike_ones_are_not(size):
    x = images(20, size) + 100
    assert quality.duplicates(x) == 0
    x[7], x[19], x[11] = x[3], x[3] + 1e-3 * images(1, size, 5)[0], 0.7 * x[2] + 0.3 * x[4]
    assert quality.duplicates(x) == pytest.approx(2 / 20)
    assert quality.duplicates(x[:1].expand(8, *size)) == pytest.approx(7 / 8)
    assert quality.duplicates(x[:1]) == 0


@pytest.mark.parametrize("size", [(3, 8, 8), (1, 40, 70)])
def test_a_collapse_is_found_in_noise_and_at_any_brightness(size):
    copies = images(1, size).expand(64, *size) + 0.01 * images(64, size, 1)
    assert quality.duplicates(copies) == pytest.approx(63 / 64)
    assert quality.duplicates(copies + 0.5 * images(64, (size[0], 1, 1), 2)) == pytest.approx(63 / 64)
    # A large part that all share, as strokes at the same places, makes none of them a copy.
    assert quality.duplicates(images(1, size) + 0.3 * images(64, size, 1)) == 0


def test_images_of_one_color_are_told_apart_by_it():
    assert quality.duplicates(images(64, (3, 1, 1), 2).expand(64, 3, 8, 8)) < 0.2


def test_copies_among_token_ids():
    ids = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2, 3]])
    assert quality.duplicates(ids) == 0.5


def test_places_are_spread():
    assert quality.places(3, 8) == [0, 1, 2]
    assert quality.places(10, 4) == [0, 2, 5, 7]


def test_figures_of_a_network(make_teacher):
    teacher = make_teacher("residual")
    x = settle(bare(), SPEC.size, seed=1, num_samples=40)
    with torch.no_grad():
        logits = teacher(x)
    found = quality.measure(teacher, x[:30], logits, x[30:])
    assert (found.num_samples, found.num_looked_at, found.shorter_side) == (40, 30, 8)
    match = batch_norm_match(teacher, x[:30])
    assert found.statistic_distances == match and found.statistic_distance == pytest.approx(np.mean([*match.values()]))
    noise = teacher.input_spec.example(30, quality.batch_rng(0, -1))
    shares = [match[name] / value for name, value in batch_norm_match(teacher, noise).items()]
    assert found.distance_to_noise == pytest.approx(np.median(shares))
    answers = logits.numpy().argmax(1)
    assert found.class_counts == np.bincount(answers, minlength=10).tolist()
    p = np.exp(logits.double().numpy())
    assert found.confidence == pytest.approx((p / p.sum(1, keepdims=True)).max(1).mean(), rel=1e-4)
    assert found.agreement is not None and 10 * found.agreement == pytest.approx(round(10 * found.agreement))


def test_a_network_without_batch_norm_is_judged_by_the_rest_and_that_is_said(make_teacher):
    teacher = make_teacher("bare")
    x = settle(bare(), SPEC.size, seed=1, num_samples=40)
    with torch.no_grad():
        found = quality.measure(teacher, x[:30], teacher(x), x[30:])
    assert found.statistic_distances == {} and found.distance_to_noise is None and found.statistic_distance is None
    word, reasons = quality.verdict(found)
    assert (
        word in quality.WORDS and "the network has no batch norm, so there are no statistics to compare" in reasons[-1]
    )
    found = dataclasses.replace(GOOD, statistic_distances={}, distance_to_noise=None)
    assert quality.verdict(found)[0] == "good" and "no batch norm" in quality.verdict(found)[1][-1]


def test_what_is_not_finite_is_said_first(make_teacher):
    teacher = make_teacher("plain")
    x = settle(bare(), SPEC.size, seed=1, num_samples=64)
    x[5, 1, 2, 3] = float("nan")
    with torch.no_grad():
        logits = teacher(x)
    for stored in (logits, None):
        word, reasons = quality.verdict(quality.measure(teacher, x, stored, x[:8]))
        assert word == "poor" and reasons[0].startswith("not finite: NaN or infinity in 1 samples")


def test_samples_that_are_not_finite_are_not_stored(make_teacher, tmp_path):
    teacher = make_teacher("plain")
    first = generate(teacher, ZeroQ(iterations=2, batch_size=16), 16, 0, tmp_path / "d")
    teacher.batch_norms[next(iter(teacher.batch_norms))].running_var[0] = float("nan")
    for folder, num_samples, batch in ((tmp_path / "d", 32, 1), (tmp_path / "e", 16, 0)):
        with pytest.raises(UserError, match=f"got images that are not finite in batch {batch} of generator=zeroq"):
            generate(teacher, ZeroQ(iterations=2, batch_size=16), num_samples, 0, folder)
    assert len(SyntheticDataset(tmp_path / "d")) == len(first) == 16 and not (tmp_path / "e").exists()


def test_a_network_that_cannot_be_quantized_has_no_agreement():
    teacher = Teacher(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), "classification", SPEC)
    found = quality.measure(teacher, images(), teacher(images()), images(4))
    assert found.agreement is None and found.class_counts is not None


# ------------------------------------------------------------------------------------------------ verdict


def test_a_good_one_has_reasons_too():
    word, reasons = quality.verdict(GOOD)
    assert word == "good" and reasons == [
        "5 % of the distance of Gaussian noise to the batch norms' statistics",
        "10 of 10 classes, entropy 1.00 of 1",
        "33 % of the variance lies between images (photographs: about a third)",
        "power falls with the frequency to the power of -1.8 (photographs -2 to -3.5, white noise 0)",
    ]


@pytest.mark.parametrize(
    ("figure", "doubtful", "poor", "reason"),
    [
        ("distance_to_noise", 0.5, 1.0, "of the distance of Gaussian noise"),
        ("class_entropy", 0.6, 0.1, "few classes"),
        ("duplicates", 0.2, 0.7, "all but copies"),
        ("deviation", 0.75, 0.3, "reach further and will be clipped"),
        ("deviation", 1.5, 2.5, "wider than real images need"),
        ("between_images", 0.05, 0.018, "all equally bright"),
        ("spectrum", -0.4, 0.0, "as noisy as noise"),
        ("spectrum", -5.5, -7.5, "out of focus"),
        ("num_samples", 5, None, "5 samples are too few to say"),
    ],
)
def test_each_fault_is_named(figure, doubtful, poor, reason):
    for value, expected in ((doubtful, "doubtful"), (poor, "poor")):
        if value is not None:
            word, reasons = changed(**{figure: value})
            assert word == expected and len(reasons) == 1 and reason in reasons[0], reasons


def test_what_made_students_clip_is_poor_and_the_worst_comes_first():
    word, reasons = changed(deviation=0.75, between_images=(0.1 / 0.75) ** 2)
    assert word == "poor" and "all equally bright" in reasons[0] and "deviation 0.75 instead of 1" in reasons[1]


def test_small_images_need_not_differ_in_brightness():
    assert changed(shorter_side=8, between_images=0.008)[0] == "good"


def test_zeroq_is_good_and_noise_is_poor_on_the_digits(tmp_path):
    teacher = resolve("teacher", "digits")
    good = quality.read(generate(teacher, ZeroQ(batch_size=32), 32, 0, tmp_path / "zeroq"))
    assert good["verdict"] == "good" and good["class_entropy"] > 0.9 and good["distance_to_noise"] < 0.2, good
    for num_samples in (24, 256):
        noise = quality.read(generate(teacher, Gaussian(), num_samples, 0, tmp_path / f"noise{num_samples}"))
        assert noise["verdict"] == "poor" and any("as noisy as noise" in reason for reason in noise["reasons"]), noise
        assert 0.8 < noise["distance_to_noise"] < 1.25


# ------------------------------------------------------------------------------------------------ where it is told


def shown(path) -> str:
    console = Console(width=300)
    with console.capture() as captured:
        console.print(describe(path))
    return captured.get()


def test_stored_once_and_again_when_samples_are_added(make_teacher, tmp_path, monkeypatch):
    teacher = make_teacher("plain")
    dataset = generate(teacher, Gaussian(batch_size=8), 24, 0, tmp_path / "d")
    stored = json.loads((tmp_path / "d" / QUALITY).read_text())
    assert stored["format"] == "dfq.quality" and stored["dataset_sha256"] == dataset.sha256
    assert stored["num_samples"] == 24 and sum(stored["class_counts"]) == 24
    assert "quality" not in dataset.manifest
    generate(teacher, Gaussian(batch_size=8), 32, 0, tmp_path / "d")
    more = json.loads((tmp_path / "d" / QUALITY).read_text())
    assert more["num_samples"] == 32 and more["dataset_sha256"] != stored["dataset_sha256"]
    monkeypatch.setattr(quality, "measure", lambda *a: pytest.fail("measured again"))
    generate(teacher, Gaussian(batch_size=8), 32, 0, tmp_path / "d")


def test_a_run_that_ended_before_it_was_measured_goes_on(make_teacher, tmp_path):
    teacher = make_teacher("plain")
    generate(teacher, Gaussian(batch_size=8), 16, 0, tmp_path / "d")
    whole = (tmp_path / "d" / QUALITY).read_bytes()
    for damage in ("", "{}", whole.decode()[:-40], None):
        (tmp_path / "d" / QUALITY).unlink() if damage is None else (tmp_path / "d" / QUALITY).write_text(damage)
        assert "not measured; the generate command that made it measures it" in shown(tmp_path / "d")
        generate(teacher, Gaussian(batch_size=8), 16, 0, tmp_path / "d")
        assert (tmp_path / "d" / QUALITY).read_bytes() == whole


def test_one_sample(make_teacher, tmp_path):
    stored = quality.read(generate(make_teacher("plain"), Gaussian(), 1, 0, tmp_path / "d"))
    assert stored["verdict"] != "good" and "1 samples are too few to say" in stored["reasons"]


def test_inspect_answers_without_the_teacher(make_teacher, tmp_path):
    generate(make_teacher("plain"), Gaussian(batch_size=32), 64, 0, tmp_path / "d")
    stored = json.loads((tmp_path / "d" / QUALITY).read_text())
    text = shown(tmp_path / "d")
    lines = {line[:20].strip(): line for line in text.splitlines()}
    assert lines["quality"].split()[1:] == ["poor"]
    assert stored["reasons"][0][:60] in lines["because"]
    assert f"{stored['statistic_distance']:.4f} on average of 2 batch norms" in lines["statistic distance"]
    assert "0.0 % of 58 samples" in lines["duplicates"]
    assert "says what the teacher says on" in lines["cheap student"]


def test_inspect_of_a_folder_whose_settings_say_little(make_teacher, tmp_path):
    generate(make_teacher("plain"), Gaussian(batch_size=32), 32, 0, tmp_path / "d")
    file = tmp_path / "d" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "settings": {}}))
    lines = {line[:20].strip(): line.split()[1:] for line in shown(tmp_path / "d").splitlines()}
    assert lines["generator"] == ["?"] and lines["teacher"] == ["plain", "(sha256", "?)"]


def test_of_token_ids_only_copies_are_told(make_dataset):
    teacher = language()
    dataset = make_dataset(teacher, 24)
    stored = quality.assess(teacher, dataset)
    assert stored["verdict"] == "not judged" and stored["reasons"] == ["of token ids only copies are told"]
    assert stored["duplicates"] == 0 and stored["spectrum"] is None and stored["class_counts"] is None
    assert [*reports.quality_facts(stored)] == ["duplicates", "cheap student"]


def test_the_page_and_the_terminal_tell_it(tmp_path):
    word, reasons = changed(duplicates=0.6)
    found = {"verdict": word, "reasons": reasons, "statistic_distance": 0.03, **dataclasses.asdict(GOOD)}
    details = make_details() | {"quality": found | {"class_counts": [7, 0, 3]}}
    page = write(tmp_path, details=details)
    assert "Is this dataset good?" in page.text and "Poor , by measures that need no real image" in page.text
    assert "60 % of the samples are all but copies of others" in page.text
    assert "class 0: 7 samples" in page.text and "class 2: 3 samples" in page.text
    assert "0.0300 on average of 2 batch norms, 5.0 % of Gaussian noise's" in page.text
    lines = dict(reports._closing_lines(make_report(), dict.fromkeys(reports.OPTIONAL) | details, None))
    assert lines["data"] == "poor: 60 % of the samples are all but copies of others"
    without = write(tmp_path)
    assert "Is this dataset good?" not in without.text


def test_objects_are_counted_by_the_labels_of_their_network(tmp_path):
    """Of a network whose label 0 is nothing, the first bar is that of label 1."""
    teacher = two_stages()
    labels = [torch.tensor([1, 1, 3]), torch.tensor([3, 1])]
    images = teacher.example(4)
    figures = quality.measure(teacher, images, None, images[:2], 2, labels)
    assert (figures.class_labels, figures.class_counts) == ([1, 2, 3], [3, 0, 2])
    assert quality.measure(teacher, images, None, images[:2], 2, [labels[0][:0]]).class_counts is None
    found = {"verdict": "good", "reasons": [], "statistic_distance": None, **dataclasses.asdict(figures)}
    page = write(tmp_path, details=make_details() | {"quality": found})
    assert "class 1: 3 objects" in page.text and "class 3: 2 objects" in page.text and "class 0: " not in page.text
    assert "What the samples hold" in page.text and "objects of each class" in page.text
    assert "What the teacher says to the samples" not in page.text and "samples of each class" not in page.text


def test_many_classes_have_no_chart_and_the_page_stands(tmp_path):
    found = {"verdict": "good", "reasons": [], "statistic_distance": None, **dataclasses.asdict(GOOD)}
    for count, charts in ((1000, True), (5000, False)):
        page = write(tmp_path, details=make_details() | {"quality": found | {"class_counts": [1] * count}})
        assert ("samples of each class" in page.text) == charts
