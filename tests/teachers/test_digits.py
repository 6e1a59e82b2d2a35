"""The shipped digits teacher: what it is made of, what it scores, and that its held-out images were held out."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfq.teachers.digits import DATA, INPUT_SIZE, MEAN, STD, digits_net

SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits.py"


def arrays(name):
    with np.load(DATA / name) as file:
        return file["images"], file["labels"]


def test_weights_are_small():
    assert (DATA / "weights.safetensors").stat().st_size < 1_000_000


def test_shipped_weights_score_at_least_98_percent_on_held_out_images():
    images, labels = arrays("heldout.npz")
    x = (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - MEAN[0]) / STD[0]
    with torch.no_grad():
        logits = digits_net()(torch.from_numpy(x)).numpy()
    assert logits.shape == (797, 10)
    assert np.mean(np.argmax(logits, axis=1) == labels) >= 0.98


def test_weights_false_gives_an_untrained_network():
    trained, fresh = digits_net().state_dict(), digits_net(weights=False).state_dict()
    assert trained.keys() == fresh.keys()
    assert not torch.equal(trained["classifier.weight"], fresh["classifier.weight"])


@pytest.mark.parametrize(("name", "num_images"), [("train.npz", 1000), ("heldout.npz", 797)])
def test_images_are_stratified_bytes(name, num_images):
    images, labels = arrays(name)
    assert images.shape == (num_images, 8, 8, 1) and images.dtype == np.uint8
    assert labels.shape == (num_images,) and labels.dtype == np.int64
    assert set(np.unique(images)) <= set(np.rint(np.arange(17) * 255 / 16).astype(int))
    count = np.bincount(labels, minlength=10)
    assert len(count) == 10 and count.max() - count.min() < 0.1 * num_images / 10


def test_normalization_is_that_of_the_training_images():
    images, _ = arrays("train.npz")
    assert np.mean(images / 255) == pytest.approx(MEAN[0], abs=1e-4)
    assert np.std(images / 255) == pytest.approx(STD[0], abs=1e-4)


def test_no_held_out_image_was_trained_on():
    train, held_out = ({image.tobytes() for image in arrays(name)[0]} for name in ("train.npz", "heldout.npz"))
    assert not train & held_out


def test_has_what_makes_it_hard_to_quantize():
    net = digits_net()
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert any(conv.groups == conv.in_channels > 1 for conv in convs)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == len(convs)
    assert sum(parameter.numel() for parameter in net.parameters()) <= 80_000


@pytest.mark.parametrize("batch_size", [1, 7])
def test_forward_gives_ten_logits_in_eval_mode(batch_size):
    net = digits_net()
    assert not any(module.training for module in net.modules())
    x = torch.randn(batch_size, *INPUT_SIZE)
    assert net(x).shape == (batch_size, 10)


def test_images_are_those_of_scikit_learn_under_the_scripts_split():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    scaled = np.rint(digits.images * 255 / 16).astype(np.uint8)
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    indices = script.split(digits.target, script.NUM_TRAIN, script.SEED)
    assert sorted(np.concatenate(indices)) == list(range(len(digits.target)))  # disjoint, and nothing left out
    for name, index in zip(("train.npz", "heldout.npz"), indices, strict=True):
        images, labels = arrays(name)
        assert np.array_equal(images[..., 0], scaled[index])
        assert np.array_equal(labels, digits.target[index])
