"""Is this dataset good? Measures of synthetic samples that need neither a real image nor a label, and a verdict.

- statistic distance: of each batch norm's inputs to its running statistics; against that of Gaussian noise, since what
  is far depends on the network.
- class histogram: what the teacher says to the samples, and its entropy as a share of the largest that is possible.
- duplicates: share of samples that an earlier one all but equals, or would if it were as bright.
- deviation, and the share of the variance that lies between images (their means a channel differ), because steps of
  activations learned from images that are all equally bright clip real ones.
- spectrum: the exponent with which power falls with frequency; about -3 in photographs as networks are shown them (the
  law of -2, and what resizing takes of the finest detail), 0 in white noise, far below in images out of focus.
- expected calibration value: how often a cheap student (8-bit weights, 4-bit activations, calibrated and not trained)
  says what the teacher says on held-out samples. How much a network bears decides this as much as the data does, so it
  is told and not judged.

Language models take token ids: of these measures they have duplicates and the last one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dfq
from dfq.calibration import calibrate
from dfq.dataset import QUALITY, SyntheticDataset, write_json
from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators._base import batch_rng
from dfq.generators._optimization import picture_statistics
from dfq.losses.power_spectrum import radial_frequency
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.student import Student
from dfq.tasks._task import task_of
from dfq.teacher import InputSpec, Teacher

MOST_SAMPLES = 256  # looked at, whatever the size of the dataset: a share of them is known to 3 points or so
NOISE = 64  # images of it, for the distance of noise: it is so far that more of them change its third digit
CALIBRATED_ON = 128  # samples, for the cheap student, and as many held out at most
CHEAP = Scheme(TensorScheme(8, True, "per_channel"), TensorScheme(4))

# From where on a dataset is doubtful, and poor. The embedded digits (8x8) and what follows from the definitions:
FEWEST = 16  # samples that say something of the others
# Of noise 1 by definition. zeroq's digits: 0.1 or less, real digits 0.003.
DISTANCE_TO_NOISE = (0.4, 0.8)
# Uniform draws of as many samples as classes: 0.92. Noise on the digits network: 0.66; one of ten classes: 0.
CLASS_ENTROPY = (0.7, 0.4)
# Independent draws have none. A tenth is a tenth of the time that making and training took.
DUPLICATES = (0.1, 0.5)
NEAR = 0.01  # of the mean square of the distances between samples: a hundred times as close as others are
# Photographs 1, by definition of the normalization. Images that made students clip real ones: 0.75.
LEAST_DEVIATION, LARGEST_DEVIATION = (0.85, 0.5), (1.4, 2.0)
# Photographs about 0.35. Images that made students clip real ones: 0.02 (means deviating by 0.1 of 0.75 in all).
BETWEEN_IMAGES = (0.1, 0.03)
PHOTOGRAPHS = 32  # pixels of the shorter side; smaller images are none (real digits of 8x8: 0.01)
# White noise 0; measured: digits -2, photographs of 224 pixels -2.9, of 32 pixels -3.3.
SPECTRUM = (-0.5, -0.2)
# What a blur of 0.7 pixels makes of photographs, and what no single blur makes of them.
STEEP_SPECTRUM = (-5.0, -7.0)
WORDS = ("good", "doubtful", "poor")
SEEN_AT = 32  # pixels of a side at which images are compared with each other; finer detail makes no other image


@dataclass(frozen=True)
class Quality:
    """The figures. None: does not apply to this network, or could not be measured.

    Attributes:
        num_samples: of the dataset; num_looked_at: of these, for everything but the class histogram.
        statistic_distances: batch norm → distance, see :func:`dfq.evaluation.batch_norm_match`; empty without any.
        distance_to_noise: median over batch norms of the distance as a share of that of Gaussian noise.
        class_counts: samples of each class, by the teacher's answer; class_entropy: as a share of the largest possible.
        class_labels: of a detector, whose class_counts are of objects, the label of each; None: samples, from label 0.
        confidence: the teacher's, on average.
        duplicates: share of samples that all but equal an earlier one.
        deviation: of all pixels, in units of the deviation that the input is normalized by; None where it is not.
        between_images: share of the variance of a channel that lies between the images' means.
        spectrum: exponent of power over frequency.
        agreement: of the cheap student with the teacher.
        num_not_finite: samples with a pixel, or an answer of the teacher's, that is no finite number.
    """

    num_samples: int
    num_looked_at: int
    shorter_side: int | None
    statistic_distances: dict[str, float | None]
    distance_to_noise: float | None
    class_counts: list[int] | None
    class_entropy: float | None
    confidence: float | None
    duplicates: float
    deviation: float | None
    between_images: float | None
    spectrum: float | None
    agreement: float | None
    num_not_finite: int = 0
    class_labels: list[int] | None = None

    @property
    def statistic_distance(self) -> float | None:
        """Mean over batch norms."""
        known = [value for value in self.statistic_distances.values() if value is not None]
        return fmean(known) if known else None


MEASURED = [f.name for f in fields(Quality) if f.name != "class_labels"]  # older files lack it
KEYS = ("format", "dataset_sha256", "verdict", "reasons", "statistic_distance", *MEASURED)


# ------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def measure(
    teacher: Teacher,
    images: Tensor,
    logits: Tensor | None,
    held_out: Tensor,
    num_samples: int | None = None,
    labels: list[Tensor] | None = None,
) -> Quality:
    """The figures of a dataset, in a time that its size does not change.

    Args:
        images: samples [N, ...], of which at most :data:`MOST_SAMPLES` are looked at.
        logits: what the teacher says to all samples of the dataset; None: not stored, as those of text are not.
        held_out: samples that are not among ``images``, for the cheap student.
        num_samples: of the dataset; None: as many as there are logits.
        labels: of the objects in all samples, for a detector, whose outputs are no logits.
    """
    seen = spread(images, MOST_SAMPLES)
    spec, pictures = teacher.input_spec, isinstance(teacher.input_spec, InputSpec)
    distances, to_noise = _distances(teacher, seen) if pictures else ({}, None)
    num_samples = num_samples or len(images if logits is None else logits)
    of_classes = logits if logits is not None and logits.dim() == 2 and logits.shape[1] > 1 else None
    counts = None if of_classes is None else of_classes.argmax(1).bincount(minlength=of_classes.shape[1]).tolist()
    class_labels = None
    if labels is not None:
        counts, class_labels = _objects(teacher, labels)
    return Quality(
        num_samples=num_samples,
        num_looked_at=len(seen),
        shorter_side=min(spec.size[1:]) if isinstance(spec, InputSpec) else None,
        statistic_distances=distances,
        distance_to_noise=to_noise,
        class_counts=counts,
        class_entropy=class_entropy(counts) if counts else None,
        confidence=None if of_classes is None else _finite(of_classes.softmax(1).amax(1).mean()),
        duplicates=duplicates(seen),
        deviation=_deviation(seen, spec) if isinstance(spec, InputSpec) else None,
        between_images=between_images(seen) if pictures else None,
        spectrum=spectrum(seen) if pictures else None,
        agreement=_agreement(teacher, spread(images, CALIBRATED_ON), spread(held_out, CALIBRATED_ON)),
        num_not_finite=max(_not_finite(seen), 0 if logits is None else _not_finite(logits)),
        class_labels=class_labels,
    )


def _not_finite(values: Tensor) -> int:
    """Rows of ``values`` [N, ...] with a number that is not finite."""
    return int((~values.isfinite()).flatten(1).any(1).sum())


def spread(samples: Tensor, most: int) -> Tensor:
    """At most ``most`` of ``samples``, from all over."""
    return samples[places(len(samples), most)]


def places(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spaced."""
    return list(range(count)) if count <= most else [i * count // most for i in range(most)]


def class_entropy(counts: list[int]) -> float:
    """0: one class, 1: as even as so many samples of so many classes can be."""
    total = sum(counts)
    largest = math.log(min(total, len(counts)))
    entropy = -sum(n / total * math.log(n / total) for n in counts if n)
    return entropy / largest if largest > 0 else 1.0


def duplicates(samples: Tensor) -> float:
    """Share of samples [N, ...] that an earlier one all but equals: see :data:`NEAR`; token ids in all places."""
    if not samples.is_floating_point():
        return 1 - len(samples.flatten(1).unique(dim=0)) / len(samples)
    small = F.adaptive_avg_pool2d(samples, [min(n, SEEN_AT) for n in samples.shape[-2:]]).flatten(1).double()
    apart = _squared_distances(small)
    near = apart <= NEAR * apart.mean() + 1e-9
    # Where all are copies with a little noise, they are as far from each other as others are: of images that share
    # nothing the mean is twice what varies within one.
    shapes = small.unflatten(1, (samples.shape[1], -1))
    shapes = (shapes - shapes.mean(-1, keepdim=True)).flatten(1)
    near |= _squared_distances(shapes) < NEAR * 2 * shapes.square().sum(1).mean()
    return float(near.tril(-1).any(1).double().mean())


def _squared_distances(rows: Tensor) -> Tensor:
    """Of each of ``rows`` [N, D] to each [N, N]."""
    rows = rows - rows.mean(0)  # else a common offset would drown the differences
    squares = rows.square().sum(1)
    return (squares[:, None] + squares - 2 * rows @ rows.T).clamp(min=0)


def between_images(images: Tensor) -> float | None:
    """Share of the variance of images [N, C, H, W] that their means make, mean over channels."""
    images = images.double()
    total = images.var((0, 2, 3), correction=0)
    between = images.mean((2, 3)).var(0, correction=0)
    return _finite((between / total).mean())


def spectrum(images: Tensor) -> float | None:
    """The exponent of power over frequency in images [N, C, H, W]: a straight line through the logarithms of both."""
    frequency = radial_frequency((images.shape[-2], images.shape[-1])).flatten()
    power = torch.zeros(len(frequency), dtype=torch.float64)
    for batch in images.split(64):
        deviations = batch - batch.mean((2, 3), keepdim=True)
        power += torch.fft.fft2(deviations).abs().square().sum((0, 1)).flatten().double()
    whole_circle = (frequency > 0) & (frequency <= 0.5)  # corners of the square have no direction but the diagonals
    if whole_circle.sum() < 2 or not power[whole_circle].min() > 0:
        return None
    x, y = frequency[whole_circle].double().log(), power[whole_circle].log()
    x = x - x.mean()
    return _finite((x * y).sum() / x.square().sum())


def _deviation(images: Tensor, spec: InputSpec) -> float | None:
    unit = picture_statistics(spec)[1]
    if not bool((unit == 1).all()):  # the normalization only sets a range, so nothing says what the deviation should be
        return None
    return _finite(images.double().var((0, 2, 3), correction=0).mean().sqrt())


def _distances(teacher: Teacher, images: Tensor) -> tuple[dict[str, float | None], float | None]:
    """Of each batch norm, and the median of the distances as shares of those of Gaussian noise."""
    if not teacher.batch_norms:
        return {}, None
    found = batch_norm_match(teacher, images)
    num_noise = min(len(images), NOISE)
    noise = batch_norm_match(teacher, teacher.input_spec.example(num_noise, batch_rng(0, -1)))
    shares = [value / noise[name] for name, value in found.items() if math.isfinite(value) and noise[name] > 0]
    return {name: _finite(value) for name, value in found.items()}, _finite(median(shares)) if shares else None


def _objects(teacher: Teacher, labels: list[Tensor]) -> tuple[list[int] | None, list[int]]:
    """Objects of each class in all images, None where there is none at all; and the labels of these classes."""
    task = task_of(teacher)
    known = task.labels(task.raw_outputs(teacher, teacher.example(1)))
    counts = torch.cat(labels).bincount(minlength=max(known) + 1)[known].tolist()
    return counts if sum(counts) else None, known


def _agreement(teacher: Teacher, images: Tensor, held_out: Tensor) -> float | None:
    try:
        student = Student.from_teacher(teacher, CHEAP)
        # Nothing is clipped at 8 bits, and of a large network the search would take longer than all other measures.
        calibrate(student, images, resolve("quantizer", "min_max"), resolve("quantizer", "mse"))
    except UserError:  # a network that can't be quantized; who asks for a student of it is told why
        return None
    student.freeze()
    task, total = task_of(teacher), 0.0
    for batch in teacher.input_spec.batches(held_out, 32):
        total += float(task.agreement(task.raw_outputs(student, batch), task.raw_outputs(teacher, batch))) * len(batch)
    return _finite(total / len(held_out))


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------ verdict


def verdict(quality: Quality) -> tuple[str, list[str]]:
    """``good``, ``doubtful``, ``poor`` or ``not judged``, and one line for each reason: faults if there are any.

    What does not apply to the network is said too, since a verdict from fewer measures is worth less.
    """
    q = quality
    found: list[tuple[int, str, str]] = []  # how bad; what to say of it if it is a fault, and if it is none

    def judge(value: float | None, limits: tuple[float, float], fault: str, merit: str = "") -> None:
        if value is not None:
            rising = limits[0] < limits[1]
            found.append((sum((value > limit) if rising else (value < limit) for limit in limits), fault, merit))

    if q.num_not_finite:
        found.append((2, f"not finite: NaN or infinity in {q.num_not_finite} samples or what is said of them", ""))
    if q.distance_to_noise is not None:
        share = f"{100 * q.distance_to_noise:.0f} % of the distance of Gaussian noise to the batch norms' statistics"
        judge(q.distance_to_noise, DISTANCE_TO_NOISE, f"{share}: images that the network was not trained on", share)
    if q.class_entropy is not None and q.class_counts is not None:
        named = f"{sum(n > 0 for n in q.class_counts)} of {len(q.class_counts)} classes"
        entropy = f"entropy {q.class_entropy:.2f} of 1"
        judge(q.class_entropy, CLASS_ENTROPY, f"few classes: {named}, {entropy}", f"{named}, {entropy}")
    copies = f"{100 * q.duplicates:.0f} % of the samples are all but copies of others"
    judge(q.duplicates, DUPLICATES, copies)  # to have none is no merit
    if q.deviation is not None:
        text = f"deviation {q.deviation:.2f} instead of 1"
        judge(q.deviation, LEAST_DEVIATION, f"{text}: real images reach further and will be clipped")
        judge(q.deviation, LARGEST_DEVIATION, f"{text}: steps will be wider than real images need")
    if q.shorter_side is not None and q.shorter_side >= PHOTOGRAPHS and q.between_images is not None:
        share = f"{100 * q.between_images:.0f} % of the variance lies between images (photographs: about a third)"
        judge(q.between_images, BETWEEN_IMAGES, f"all equally bright: {share}", share)
    if q.spectrum is not None:
        text = (
            f"power falls with the frequency to the power of {q.spectrum:.1f} (photographs -2 to -3.5, white noise 0)"
        )
        judge(q.spectrum, SPECTRUM, f"as noisy as noise: {text}", text)
        judge(q.spectrum, STEEP_SPECTRUM, f"out of focus: {text}")
    if q.num_samples < FEWEST:
        found.append((1, f"{q.num_samples} samples are too few to say", ""))
    worst = max(level for level, _, _ in found)
    faults = [fault for level, fault, _ in sorted(found, key=lambda entry: -entry[0]) if level]
    reasons = faults or [merit for _, _, merit in found if merit]
    if q.shorter_side is None and q.class_counts is None:
        reasons.append("of token ids only copies are told")
        return (WORDS[worst] if worst else "not judged"), reasons
    if not q.statistic_distances and q.shorter_side is not None:
        reasons.append("the network has no batch norm, so there are no statistics to compare with")
    return WORDS[worst], reasons


# ------------------------------------------------------------------------------------------------ files


def assess(teacher: Teacher, dataset: SyntheticDataset) -> dict[str, Any]:
    """Figures and verdict of a whole dataset, stored in its folder; those of the same content are read again."""
    known = read(dataset)
    if known is not None:
        return known
    first, last = (
        [indices[i] for i in places(len(indices), most)]
        for indices, most in zip(dataset.split(), (MOST_SAMPLES, CALIBRATED_ON), strict=True)
    )
    kept, held_out = dataset.samples(first), dataset.without_padding(last)
    stored = dataset.tensors(names=("logits", "labels"))
    labels = stored["labels"] if "labels" in dataset.lists else None
    logits = None if labels is not None else stored.get("logits")
    found = measure(teacher, kept, logits, held_out, len(dataset), labels)
    word, reasons = verdict(found)
    content = {
        "format": "dfq.quality",
        "dfq_version": dfq.__version__,
        "dataset_sha256": dataset.sha256,
        "verdict": word,
        "reasons": reasons,
        "statistic_distance": found.statistic_distance,
        **asdict(found),
    }
    write_json(dataset.path / QUALITY, content)
    return content


def read(dataset: SyntheticDataset) -> dict[str, Any] | None:
    """What :func:`assess` has stored, if it is whole and of the content that is there now."""
    stored = dataset.stored_quality()
    return stored if stored is not None and {*KEYS} <= stored.keys() else None
