"""Classification: the targets that generators pull images toward."""

import numpy as np
import pytest
import torch
from torch import nn

import dfq
from dfq.exporters._artifact import Comparison
from dfq.settings import resolve
from tests.conftest import NETS, as_teacher


@pytest.mark.parametrize("num_samples, num_classes", [(20, 3), (7, 7), (5, 40)])
def test_targets_are_balanced_whatever_the_number_of_classes(num_samples, num_classes):
    task, seen = resolve("task", "classification"), set()
    for seed in range(30):
        targets = task.synthesis_targets(num_samples, num_classes, torch.Generator().manual_seed(seed), 0.2)
        counts = targets.argmax(1).bincount(minlength=num_classes)
        assert int(counts.max() - counts.min()) <= 1
        torch.testing.assert_close(targets.sum(1), torch.ones(num_samples))
        seen.update(targets.argmax(1).tolist())
    assert seen == set(range(num_classes))  # a batch smaller than the number of classes draws from all of them


def test_one_logit_is_that_of_the_second_of_two_classes(tmp_path):
    task, z = resolve("task", "classification"), torch.tensor([[-2.0], [0.5], [3.0]])
    other = torch.tensor([[-1.0], [-0.5], [3.0]])
    mine, theirs = (task.raw_outputs(lambda _, v=v: v, z) for v in (other, z))
    p, q = theirs.softmax(1)[:, 1], mine.softmax(1)[:, 1]
    torch.testing.assert_close(p, z[:, 0].sigmoid())
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(task.distillation_loss(mine, theirs), kl.mean())
    assert float(task.agreement(mine, theirs)) == pytest.approx(2 / 3) and task.num_outputs(mine) == 2
    compared = Comparison()
    compared.add([z], [other])
    assert compared.agreement == pytest.approx(2 / 3)


def test_a_binary_classifier_of_one_logit_through_all_arrows(tmp_path):
    net = NETS["plain"]()
    net.append(nn.ReLU()).append(nn.Linear(10, 1))
    teacher = as_teacher(net)
    with torch.no_grad():
        net[-1].bias -= teacher(teacher.example(64)).mean()
    dataset = dfq.generate(teacher, "zeroq", num_samples=64, dataset_dir=tmp_path / "d", iterations=5, class_weight=0.5)
    logits = dataset.tensors()["logits"]
    assert logits.shape == (64, 2) and (logits[:, 0] == 0).all() and 0 < (logits[:, 1] > 0).float().mean() < 1
    student = dfq.quantize(teacher, dataset, "w3a3", algorithm="distillation", max_steps=20, student_dir=tmp_path / "s")
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(teacher.input_spec.mean)[:, None, None]
    with torch.no_grad():
        labels = (teacher(pixels / torch.tensor(teacher.input_spec.std)[:, None, None])[:, 0] > 0).long()
    np.savez(tmp_path / "e.npz", images=images, labels=labels.numpy())
    report = dfq.evaluate(teacher, student, evaluation="arrays", path=str(tmp_path / "e.npz"), dataset=dataset)
    assert report["teacher"] == {"top1": 1.0}
    assert report["fidelity"]["kl"] > 1e-6 and report["fidelity"]["agreement"] > 0.5
