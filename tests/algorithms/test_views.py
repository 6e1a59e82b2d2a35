"""Algorithms in a sequence see each image several times, mirrored and moved."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import language

from dfq.algorithms._base import Algorithm
from dfq.algorithms.quantease import QuantEase
from dfq.algorithms.sequence import Sequence
from dfq.cli import main
from dfq.errors import UserError
from dfq.lightning.augmentation import Views
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.student import Student

W4A8 = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8))


@dataclass(frozen=True)
class Watcher(Algorithm):
    """Changes nothing; keeps the images that it is given."""

    seen: ClassVar[list[torch.Tensor]] = []
    goes_on: ClassVar[bool] = True

    def run(self, work):
        self.seen.append(work.images(5))


WATCHER = {"_target_": f"{__name__}.Watcher"}


def candidates(image: np.ndarray, shift: int) -> dict[tuple[bool, int, int], np.ndarray]:
    """(mirrored, down, right) → [C, H, W], by NumPy: padded with a reflection and cut out."""
    _, height, width = image.shape
    found = {}
    for mirrored in (False, True):
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="reflect")
        for down in range(2 * shift + 1):
            for right in range(2 * shift + 1):
                cut = padded[:, down : down + height, right : right + width]
                found[mirrored, down, right] = cut[:, :, ::-1] if mirrored else cut
    return found


def test_views_are_the_images_and_moved_copies():
    images = torch.randn(12, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    views = Views(4, shift=2).of(images, seed=1)
    assert views.shape == (48, 3, 6, 7) and torch.equal(views[:12], images)
    moves = []
    for index in range(12, 48):
        of_image = candidates(images[index % 12].numpy(), 2)
        fits = [move for move, wanted in of_image.items() if np.array_equal(wanted, views[index].numpy())]
        assert len(fits) == 1, f"copy {index} is no moved or mirrored image {index % 12}"
        moves += fits
    mirrored, down, right = (set(each) for each in zip(*moves, strict=True))
    assert mirrored == {False, True} and down == right == {0, 1, 2, 3, 4}
    assert torch.equal(Views(4, shift=2).of(images, seed=1), views)
    assert not torch.equal(Views(4, shift=2).of(images, seed=2), views)
    assert torch.equal(Views(3, flip=False).of(images, seed=1), images.repeat(3, 1, 1, 1))
    assert Views().of(images, seed=1) is images


def quantized(sequence, teacher, dataset, folder):
    student = Student.from_teacher(teacher, W4A8)
    folder.mkdir()
    sequence.quantize(student, teacher, dataset, MinMax(), MinMax(), 7, folder)
    return student


def test_every_step_of_a_sequence_sees_them_nested_ones_too(make_teacher, make_dataset, tmp_path):
    Watcher.seen.clear()
    teacher = make_teacher("bare")
    dataset = make_dataset(teacher, 40)
    inner = {"_target_": "dfq.algorithms.sequence.Sequence", "steps": [WATCHER, "round_to_nearest"]}
    quantized(Sequence((WATCHER, inner), views=3, shift=1), teacher, dataset, tmp_path / "views")
    outer, nested = Watcher.seen
    assert torch.equal(outer, nested) and len(outer) == 15
    quantized(Sequence((WATCHER,)), teacher, dataset, tmp_path / "plain")
    plain = Watcher.seen[-1]
    assert torch.equal(Views(3, shift=1).of(plain, seed=7), outer)


def test_rounding_looks_at_all_of_them(make_teacher, make_dataset, tmp_path):
    """A student of three views is not that of the images alone, and ranges cover what only the copies reach."""
    teacher = make_teacher("bare")
    dataset = make_dataset(teacher, 40)
    steps = (QuantEase(num_samples=24),)
    one = quantized(Sequence(steps), teacher, dataset, tmp_path / "one")
    three = quantized(Sequence(steps, views=3, shift=2), teacher, dataset, tmp_path / "three")
    again = quantized(Sequence(steps, views=3, shift=2), teacher, dataset, tmp_path / "again")
    states = (student.module.state_dict().values() for student in (three, again))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    differ = 0
    for name, layer in one.layers.items():
        other = three.layers[name]
        few, many = (float(each.input_quantizer.scale) for each in (layer, other))
        assert many >= few * (1 - 1e-6), "min-max ranges of more images are no smaller"
        differ += not torch.equal(layer.weight, other.weight)
    assert differ


def test_texts_have_no_views(make_dataset, tmp_path):
    teacher = language()
    sequence = Sequence(("round_to_nearest",), views=2)
    with pytest.raises(UserError) as error:
        quantized(sequence, teacher, make_dataset(teacher, 8), tmp_path / "s")
    got, allowed = r"got algorithm.views=2 and samples of torch.int64 \[12\]", r"views of images \[C, H, W\]"
    assert re.fullmatch(rf"{got}; allowed: {allowed}; algorithm.views=1", str(error.value))


@pytest.mark.parametrize(("word", "least"), [("views=0", 1), ("shift=-1", 0)])
def test_what_is_no_number_of_views_is_refused(word, least, tmp_path, capsys):
    words = ["quantize", "teacher=digits", "algorithm=sequence", f"algorithm.{word}", f"dataset_dir={tmp_path}"]
    assert main(words) == 2
    assert capsys.readouterr().err == f"dfq: got algorithm.{word}; allowed: a whole number >= {least}\n"


def test_a_shift_of_no_copies_is_refused():
    with pytest.raises(UserError) as error:
        Sequence(("round_to_nearest",), shift=16)
    allowed = "a shift of the copies that algorithm.views=2 or more makes; algorithm.views=4, or algorithm.shift=0"
    assert str(error.value) == f"got algorithm.shift=16 and algorithm.views=1; allowed: {allowed}"
