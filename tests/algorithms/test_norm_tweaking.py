"""Norm Tweaking: its loss by its formula, norms alone move, outputs are distributed more as before."""

import numpy as np
import pytest
import torch
from test_block_ap import W2, dataset, run, teacher  # noqa: F401  (fixtures)

from dfq.algorithms._reconstruction import magnitude
from dfq.algorithms.norm_tweaking import NormTweaking
from dfq.settings import resolve
from dfq.student import Student


def test_the_loss_is_that_of_the_paper():
    rng = torch.Generator().manual_seed(0)
    for shape, axes in (((3, 5, 7), (0, 1)), ((3, 4, 5, 6), (0, 2, 3))):
        got, wanted = torch.randn(2, *shape, generator=rng).double()
        found = NormTweaking().error(got, wanted).numpy()
        a, b = got.numpy(), wanted.numpy()
        plain = np.abs(a.mean(axes) - b.mean(axes)) + np.abs(a.var(axes) - b.var(axes))
        np.testing.assert_allclose(found, plain, rtol=1e-4)


def test_norms_alone_move_and_outputs_are_distributed_as_before(teacher, dataset, tmp_path):  # noqa: F811
    student = Student.from_teacher(teacher, W2)
    run(resolve("algorithm", "gptq"), student, teacher, dataset, tmp_path / "a")
    before = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}

    def distance():
        ids, layer = dataset.samples(32), "model.layers.1"
        found = []
        for module in (student.module, teacher.module):
            kept = []
            handle = module.get_submodule(layer).register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out))
            with torch.no_grad():
                module(ids)
            handle.remove()
            found.append(kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0])
        return float(NormTweaking().error(*found).mean())

    start = distance()
    run(NormTweaking(iterations=40, batch_size=8, norm_lr=3e-3), student, teacher, dataset, tmp_path / "b")
    after = student.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = [f"model.layers.{i}.{name}_layernorm.weight" for i in (0, 1) for name in ("input", "post_attention")]
    assert moved == set(layers) and distance() < 0.9 * start
    assert not any(p.requires_grad for p in student.module.parameters())


def test_wrong_settings():
    from dfq.errors import UserError

    with pytest.raises(UserError, match=r"got algorithm\.norm_lr=0; allowed: a number > 0"):
        resolve("algorithm", "norm_tweaking", norm_lr=0)


@pytest.mark.parametrize("name", ["norm_tweaking", "block_ap"])
def test_gains_that_are_zero_throughout_are_trained(name, teacher, dataset, tmp_path):  # noqa: F811
    """Gemma's gains are what is added to one; a rate in units of their own magnitude would be none."""
    from tiny_language import TEXT, random_teacher, transformers

    config = transformers.GemmaConfig(**TEXT, num_key_value_heads=2, head_dim=8)
    gemma = random_teacher(config, length=16, norms=False)
    student = Student.from_teacher(gemma, W2)
    run(resolve("algorithm", "round_to_nearest"), student, gemma, dataset, tmp_path / "a")
    gain = student.module.get_parameter("model.layers.0.input_layernorm.weight")
    assert not gain.any()
    run(resolve("algorithm", name, iterations=3, batch_size=4), student, gemma, dataset, tmp_path / "b")
    assert gain.all()
    assert 0 < float(gain.detach().abs().max()) < 0.1


def test_units_of_rates():
    zero, two = torch.zeros(3), torch.tensor([-1.0, 3.0])
    found = [float(magnitude(*tensors)) for tensors in ((two, zero), (zero, two), (zero,), (zero, zero))]
    assert found == [2.0, 2.0, 1.0, 1.0]
