"""The estimate of the accuracy drop: shares by hand, order, ends of the interval, where it is shown."""

import math

import numpy as np
import pytest
import torch

from dfq import drop
from dfq import report as reports
from dfq.algorithms.auto import _Judge
from dfq.drop import estimate_drop
from dfq.evaluation import fidelity
from dfq.pipeline import evaluate, generate
from dfq.quality import read
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student
from tests.test_report import make_details, make_report


def logits(num_samples: int = 200, num_classes: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_samples, num_classes, generator=torch.Generator().manual_seed(seed))


def test_shares_and_rule_by_hand():
    teacher = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    student = torch.tensor([[0.0, 1.0], [0.0, 2.5], [0.0, 2.0], [0.0, 4.0]])  # two differ; with doubled margins one
    found = estimate_drop(student, teacher)
    assert (found.disagreement, found.doubled_disagreement) == (2.5 / 5, 1.5 / 5)
    x = drop.A + drop.B * np.mean([np.log(p / (1 - p)) for p in (0.5, 0.3)])
    for value, expected in (
        (found.drop, 1 / (1 + np.exp(-x))),
        (found.low, 1 / (1 + np.exp(-(x - 1.645 * drop.S))) - 0.01),
        (found.high, 1 / (1 + np.exp(-(x + 1.645 * drop.S))) + 0.01),
    ):
        assert math.isclose(value, expected, rel_tol=1e-6)


@pytest.mark.parametrize("num_samples", [1, 51, 400])
def test_grows_with_the_noise_and_stays_a_share(num_samples):
    teacher = logits(num_samples)
    noises = [estimate_drop(teacher + noise * logits(num_samples, seed=1), teacher) for noise in (0, 0.1, 0.5, 2, 50)]
    drops = [found.drop for found in noises]
    assert drops == sorted(drops)
    assert num_samples == 1 or drops[0] < 0.02 < 0.3 < drops[-1]
    assert all(-drop.FLOOR <= found.low < found.drop < found.high <= 1 for found in noises)


def test_shifting_all_logits_of_a_sample_changes_nothing():
    teacher, student = logits(), logits() + 0.5 * logits(seed=1)
    assert estimate_drop(student + 3 * torch.arange(200.0)[:, None], teacher) == estimate_drop(student, teacher)


def test_fidelity_has_it_for_classifiers(make_teacher, make_dataset):
    teacher = make_teacher("residual")
    dataset = make_dataset(teacher, 64)
    images = dataset.tensors()["images"][:20]
    drops = []
    for bits in (8, 2):
        student = Student.from_teacher(teacher, Scheme(TensorScheme(bits, True, "per_channel"), TensorScheme(bits)))
        quantizer = resolve("quantizer", "min_max")
        resolve("algorithm", "round_to_nearest").quantize(student, teacher, dataset, quantizer, quantizer, 0, None)
        found = fidelity(teacher, student.freeze(), resolve("task", "classification"), images, batch_size=7)
        assert found["estimated_drop"]["disagreement"] == pytest.approx((20 * (1 - found["agreement"]) + 0.5) / 21)
        drops.append(found["estimated_drop"]["drop"])
    assert drops[0] < drops[1]


def test_none_is_given_for_poor_samples(tmp_path):
    """Noise that all looks alike to a network is all answered alike by a student: that would be told as no loss."""
    teacher, words = resolve("teacher", "digits"), {}
    for name in ("gaussian", "zeroq"):
        dataset = generate(teacher, resolve("generator", name), 64, 0, tmp_path / name)
        words[name] = read(dataset)["verdict"]
        student = Student.from_teacher(teacher, Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(8)))
        quantizer = resolve("quantizer", "min_max")
        resolve("algorithm", "round_to_nearest").quantize(student, teacher, dataset, quantizer, quantizer, 0, None)
        found = evaluate(teacher, student.freeze(), resolve("evaluation", "none"), dataset)["fidelity"]
        assert (found["estimated_drop"] is None) == (words[name] == "poor") and found["agreement"] > 0.8
        figures = _Judge(teacher, dataset)(student)
        assert (figures.drop is None) == (words[name] == "poor")
    assert words["gaussian"] == "poor" != words["zeroq"]


def test_report_says_why_there_is_none():
    quality = {"verdict": "poor", "reasons": ["all equally bright"]}
    details = dict.fromkeys(reports.OPTIONAL) | make_details() | {"estimated_drop": None, "quality": quality}
    lines = dict(reports._closing_lines(make_report(), details, None))
    assert lines["estimate"] == "none: what a student does on poor samples says little about real ones"


def test_report_shows_it_and_the_truth():
    estimate = {"drop": 0.0213, "low": -0.004, "high": 0.0981, "disagreement": 0.1, "doubled_disagreement": 0.05}
    report, details = make_report(), make_details() | {"estimated_drop": estimate}
    lines = dict(reports._closing_lines(report, dict.fromkeys(reports.OPTIONAL) | details, None))
    truth = 100 * (1 - 0.9052 / 0.9173)
    assert lines["estimate"] == f"2.1 % (-0.4 to 9.8 %) of the teacher's accuracy lost; measured: {truth:.1f} %"
    report["student"]["metrics"] = {}
    assert "an estimated 2.1 % (-0.4 to 9.8 %) of the top-1 lost" in reports.verdict(report, details)
    assert "estimated" not in reports.verdict(report, make_details())
