"""Classification: the targets that generators pull images toward."""

import pytest
import torch

from dfq.settings import resolve


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
