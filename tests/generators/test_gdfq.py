"""GDFQ: a network trained once for a dataset, that follows labels; and Qimera's images between classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NETS, as_teacher
from torch import nn
from torch.nn import functional as F

from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.evaluation import batch_norm_match
from dfq.generators._base import batch_rng, dataset_rng
from dfq.generators._network import ConditionalBatchNorm, GeneratorNetwork
from dfq.generators.gaussian import Gaussian
from dfq.generators.gdfq import GDFQ, ClassSource, class_mixtures, classifier_rows, draw
from dfq.pipeline import generate
from dfq.teacher import InputSpec
from dfq.teachers.digits import load

SMALL = GDFQ(batch_size=8, iterations=2, train_batch_size=4, num_channels=8, num_latents=16)
QUICK = GDFQ(iterations=80, train_batch_size=32, num_channels=16, num_latents=32, learning_rate=0.02, class_weight=0.5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def train(generator, teacher):
    return generator.train(teacher, rng(), lambda share, note="": None)


def drawn(source, teacher, num_samples=200):
    """Images of a trained network, what they were meant for, and the teacher's logits."""
    with torch.no_grad():
        images, mixtures = draw(source.network, num_samples, rng(7))
        return images, mixtures, teacher(images)


# ------------------------------------------------------------------------------------------------ training


def test_labels_are_followed_and_the_loss_falls():
    teacher, losses, accuracies = load(), [], []
    for iterations in (1, QUICK.iterations):
        images, mixtures, logits = drawn(train(replace(QUICK, iterations=iterations), teacher), teacher)
        distances = batch_norm_match(teacher, images)
        losses.append(
            sum(distances.values()) / len(distances) + QUICK.class_weight * float(F.cross_entropy(logits, mixtures))
        )
        accuracies.append(float((logits.argmax(1) == mixtures.argmax(1)).float().mean()))
    assert losses[1] < losses[0] / 2
    assert accuracies[1] > 0.6 > accuracies[0], accuracies  # chance is 0.1


def test_superposed_images_lie_between_their_two_classes():
    teacher = load()
    source = train(replace(QUICK, superposed=0.7, embedding="classifier"), teacher)
    _, mixtures, logits = drawn(source, teacher, 400)
    mixed = mixtures.max(1).values < 1
    first_two, meant = (values.topk(2, 1).indices.sort(1).values[mixed] for values in (logits, mixtures))
    assert float((first_two == meant).all(1).float().mean()) > 0.06  # chance: 1 in 45, 0.022 +- 0.009
    confidence = logits.softmax(1).max(1).values
    assert confidence[mixed].mean() < confidence[~mixed].mean()
    assert float((logits.argmax(1) == mixtures.argmax(1))[~mixed].float().mean()) > 0.4


# ------------------------------------------------------------------------------------------------ one network a dataset


def test_a_dataset_has_one_network_and_goes_on_bit_for_bit(make_teacher, tmp_path, monkeypatch):
    teacher, trained, made = make_teacher("plain"), [], []
    train, sample = GDFQ.train, ClassSource.sample
    monkeypatch.setattr(GDFQ, "train", lambda self, *args: trained.append(self) or train(self, *args))
    whole = generate(teacher, SMALL, 20, 3, tmp_path / "whole")
    assert len(trained) == 1
    generate(teacher, SMALL, 20, 3, tmp_path / "whole")
    assert len(trained) == 1, "nothing is missing, nothing is trained"

    def killed(self, *args):
        if made:
            raise KeyboardInterrupt
        made.append(self)
        return sample(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ClassSource, "sample", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(teacher, SMALL, 20, 3, tmp_path / "killed")
    assert len(SyntheticDataset(tmp_path / "killed")) == 8
    torch.manual_seed(1)
    assert generate(teacher, SMALL, 20, 3, tmp_path / "killed").sha256 == whole.sha256
    assert len(trained) == 2, "what was trained is stored"
    first = generate(teacher, replace(SMALL, batch_size=128), 8, 3, tmp_path / "grown")  # all of a smaller first order
    assert len(first) == 8
    assert generate(teacher, replace(SMALL, batch_size=128), 20, 3, tmp_path / "grown").sha256 == whole.sha256
    other = generate(teacher, SMALL, 8, 4, tmp_path / "other")
    assert not torch.equal(other.tensors()["images"], whole.tensors(8)["images"])


def test_the_stored_network_is_the_trained_one(make_teacher, tmp_path):
    teacher = make_teacher("plain")
    settings = replace(SMALL, embedding="classifier", low_pass=0.3)
    dataset = generate(teacher, settings, 8, 3, tmp_path / "whole")
    source = settings.restored(teacher, dataset.source())
    assert torch.equal(source.sample(teacher, 8, batch_rng(3, 0), None), dataset.samples())
    fresh = source.fresh(teacher, 8, 3, 0)  # of step 0 of a run with the dataset's seed: not its images
    others = [source.fresh(teacher, 8, *numbers) for numbers in ((3, 1), (4, 0), (3, 0, 1))]
    assert torch.equal(fresh, source.fresh(teacher, 8, 3, 0))
    assert not any(torch.equal(fresh, other) for other in (dataset.samples(), *others))
    with pytest.raises(UserError, match="got a stored network of gdfq that does not fit"):
        replace(SMALL, num_channels=4).restored(teacher, dataset.source())


def test_a_network_comes_with_its_part_and_is_checked(make_teacher, tmp_path, monkeypatch):
    teacher = make_teacher("plain")
    part = generate(teacher, SMALL, 20, 3, tmp_path / "part")
    monkeypatch.setattr(GDFQ, "train", lambda *_: pytest.fail("nothing is missing"))
    whole = generate(teacher, SMALL, 20, 3, tmp_path / "whole", parts=[part.path])
    assert all(map(torch.equal, whole.source().values(), part.source().values())) and whole.source()
    file = whole.path / "source.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"source.safetensors, whose content does not match its checksum"):
        whole.verify()
    with pytest.raises(UserError, match="does not match"):
        generate(teacher, SMALL, 28, 3, whole.path)
    file.unlink()
    with pytest.raises(UserError, match=r"source.safetensors, which is missing; generate the dataset into a new fold"):
        whole.verify()


def test_a_generator_that_prepares_nothing_is_its_own_source(make_teacher):
    gaussian = Gaussian()
    assert gaussian.prepare(make_teacher("plain"), dataset_rng(0)) is gaussian
    numbers = [dataset_rng(seed) for seed in range(9)] + [batch_rng(seed, 0) for seed in range(9)]
    assert len({torch.rand((), generator=one).item() for one in numbers}) == 18


def test_an_image_depends_on_its_own_numbers_alone(make_teacher):
    network = train(SMALL, make_teacher("plain")).network
    latents, mixtures = torch.randn(5, *network.layers.latent_shape, generator=rng(1)), class_mixtures(5, 10, rng(2))
    with torch.no_grad():
        torch.testing.assert_close(network(latents[:1], mixtures[:1]), network(latents, mixtures)[:1])
        assert not torch.allclose(network(latents[:1], mixtures[1:2]), network(latents[:1], mixtures[:1]))
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("size", [(1, 7, 9), (3, 8, 8), (3, 70, 65), (3, 224, 224)])
def test_any_size_and_legal_pixels(size):
    net = nn.Sequential(nn.Conv2d(size[0], 4, 3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    spec = InputSpec(size, (0.4,) * size[0], (0.2,) * size[0])
    teacher = as_teacher(net, spec)
    generator = replace(SMALL, iterations=1, train_batch_size=2, low_pass=0.4)
    images = generator.sample(teacher, 3, rng(), lambda amount: None)
    assert images.shape == (3, *size) and torch.isfinite(images).all() and float(images.std()) > 0.1
    low, high = spec.limits(images.device)
    assert (images >= low).all() and (images <= high).all()
    free = replace(generator, clip=False).sample(teacher, 3, rng(), lambda amount: None)
    assert ((free < low) | (free > high)).any()


# ------------------------------------------------------------------------------------------------ formulas


def test_conditional_batch_norm():
    norm = ConditionalBatchNorm(4, 6)
    x, conditions = torch.randn(5, 4, 3, 2, generator=rng()), torch.randn(5, 6, generator=rng(1))
    p = {name: value.detach().numpy() for name, value in norm.named_parameters()}
    scale, shift = (
        (conditions.numpy() @ p[f"{name}.weight"].T + p[f"{name}.bias"])[..., None, None] for name in ("scale", "shift")
    )
    a = x.numpy()
    normed = (a - a.mean((0, 2, 3), keepdims=True)) / np.sqrt(a.var((0, 2, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x, conditions).detach().numpy(), normed * (1 + scale) + shift, rtol=1e-4, atol=1e-5)


def test_a_network_with_conditions_has_under_ten_million_parameters():
    network = GeneratorNetwork((3, 224, 224), 256, 128, rng(), num_conditions=2048)
    assert sum(p.numel() for p in network.parameters()) < 1e7


def test_mixtures_are_those_of_the_formula():
    mixtures = class_mixtures(40, 7, rng(), superposed=1.0, num_superposed=3).numpy()
    numbers = rng()  # the same numbers in the same order
    labels = torch.randperm(7, generator=numbers).numpy()[np.arange(40) % 7]
    others = torch.rand(40, 7, generator=numbers).numpy()
    p = torch.randn(40, 3, generator=numbers).numpy().astype(float)
    shares = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    for i, row in enumerate(mixtures):
        rest = [c for c in np.argsort(-others[i]) if c != labels[i]]
        wanted = np.zeros(7)
        wanted[[labels[i], *rest[:2]]] = shares[i]
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("superposed", [0.0, 0.4])
def test_mixtures_are_balanced(superposed):
    mixtures = class_mixtures(1000, 10, rng(), superposed)
    assert torch.allclose(mixtures.sum(1), torch.ones(1000))
    assert float((mixtures.max(1).values < 1).float().mean()) == pytest.approx(superposed, abs=0.06)
    assert mixtures.sum(0).numpy() == pytest.approx(100, abs=20 * superposed + 1e-3)
    few = torch.cat([class_mixtures(4, 10, rng(seed)) for seed in range(100)])  # batches smaller than the classes
    assert (few.sum(0) > 20).all()


def test_classifier_rows(make_teacher):
    teacher = make_teacher("plain")
    rows = teacher.module[-1].weight.numpy().astype(float)
    rows = rows - rows.mean(0)
    np.testing.assert_allclose(classifier_rows(teacher, 10), rows / rows.std(ddof=1), rtol=1e-4, atol=1e-6)
    source = train(replace(SMALL, embedding="classifier", learning_rate=1e-9), teacher)
    torch.testing.assert_close(source.network.embedding.data, classifier_rows(teacher, 10), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ messages


def test_more_classes_to_mix_than_there_are(make_teacher, tmp_path):
    with pytest.raises(UserError, match=r"num_superposed=11 for 10 classes; allowed: from 2 to 10"):
        generate(make_teacher("plain"), replace(SMALL, superposed=0.5, num_superposed=11), 8, 0, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_no_classifier_to_start_from():
    teacher = as_teacher(nn.Sequential(*list(NETS["plain"]())[:-1], nn.Linear(12, 20), nn.GLU()), name="gated")
    with pytest.raises(
        UserError, match=r"embedding=classifier for gated, which has no layer of 10 outputs; allowed: r"
    ):
        train(replace(SMALL, embedding="classifier"), teacher)
    assert train(SMALL, teacher).network.embedding.shape == (10, 16)
