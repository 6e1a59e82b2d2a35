"""Teacher and InputSpec."""

import numpy as np
import pytest
import torch
from conftest import SPEC, language
from torch import nn

import dfq
from dfq.errors import UserError
from dfq.teacher import InputSpec, Teacher, hash_tensors, resolve_device


def test_normalize_against_numpy_and_back():
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = SPEC.normalize(pixels)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (SPEC.mean, SPEC.std))
    np.testing.assert_allclose(images, (pixels.numpy().astype(np.float32) / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert torch.equal(SPEC.to_pixels(images), pixels)  # every byte survives
    assert torch.equal(SPEC.to_pixels(torch.full((3, 1, 1), 99.0)), torch.full((3, 1, 1), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    "size, mean, std, message",
    [
        ((3, 8), (0.5,) * 3, (1,) * 3, r"got input_size=\[3, 8\]; allowed: \[channels, height, width\]"),
        ((3, 0, 8), (0.5,) * 3, (1,) * 3, "all at least 1"),
        ((3, 8, 8), (0.5,), (1,) * 3, "got mean with 1 entries for 3 input channels"),
        ((1, 8, 8), (0.5,), (1, 1), "got std with 2 entries for 1 input channels"),
        ((1, 8, 8), (0.5,), (0,), r"got std=\[0\.0\]; allowed: numbers above 0"),
    ],
)
def test_input_specs_that_cannot_be(size, mean, std, message):
    with pytest.raises(UserError, match=message):
        InputSpec(size, mean, std)


def test_to_dict_makes_it_again():
    assert InputSpec(**SPEC.to_dict()) == SPEC


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"b": t["a"], "c": t["c"]},
        lambda t: {**t, "a": t["a"].double()},
        lambda t: {**t, "a": t["a"].view(3, 2)},
        lambda t: {**t, "a": t["a"] + 1e-6},
        lambda t: {"a": t["a"]},
    ],
    ids=["name", "dtype", "shape", "value", "missing"],
)
def test_hash_changes_with_everything(change):
    tensors = {"a": torch.arange(6.0).view(2, 3), "c": torch.tensor(True)}
    assert hash_tensors(change(tensors)) != hash_tensors(tensors)


def test_hash_does_not_depend_on_order_or_layout():
    a = torch.randn(4, 3, 2, 2)
    first = hash_tensors({"a": a, "b": torch.zeros(0), "c": torch.tensor(1, dtype=torch.bfloat16)})
    second = hash_tensors(
        {"c": torch.tensor(1, dtype=torch.bfloat16), "b": torch.zeros(0), "a": a.to(memory_format=torch.channels_last)}
    )
    assert first == second


def test_a_teacher_is_frozen_and_in_evaluation_while_called(make_teacher):
    teacher = make_teacher("plain")
    assert not any(p.requires_grad for p in teacher.module.parameters())
    before = {k: v.clone() for k, v in teacher.module.state_dict().items()}
    teacher.module.train()  # somebody's Trainer did that
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    teacher(x).sum().backward()
    assert x.grad is not None and teacher.module.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.module.state_dict().items())


@pytest.mark.parametrize(
    "kind, names", [("plain", ["1", "4"]), ("residual", ["1", "3.bn1", "3.bn2"]), ("mlp", ["2"]), ("bare", [])]
)
def test_batch_norms(make_teacher, kind, names):
    assert list(make_teacher(kind).batch_norms) == names


def test_batch_norms_that_do_not_run_or_remember_nothing_are_left_out():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    net[0].spare = nn.BatchNorm2d(4)
    assert Teacher(net, "classification", SPEC).batch_norms == {}


def test_sizes(make_teacher):
    teacher = make_teacher("mlp")
    assert teacher.num_parameters == 192 * 24 + 24 + 48 + 250
    assert teacher.size_bytes == 4 * teacher.num_parameters + 2 * 24 * 4 + 8


def test_an_input_that_does_not_fit_is_the_users_mistake():
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "classification", SPEC, name="small")
    with pytest.raises(
        UserError,
        match=r"got an error from small on an input of \[2, 3, 8, 8\]: RuntimeError: .*; check teacher\.input_size",
    ) as error:
        _ = teacher.dataflow
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(form, tmp_path):
    """Transformers loads a checkpoint as it was saved: its values stay, and everything else runs on them."""
    module = language().module.to(form)
    weight = module.head.weight.detach().clone()
    teacher = dfq.load_teacher(module, "language_modeling", vocab_size=30, length=12, device="cpu")
    assert {t.dtype for t in module.state_dict().values()} == {torch.float32}
    assert torch.equal(module.head.weight, weight.float())
    dataset = dfq.generate(teacher, "random_tokens", num_samples=8, dataset_dir=tmp_path / "d")
    student = dfq.quantize(teacher, dataset, "w4a8", algorithm="round_to_nearest")
    assert dfq.evaluate(teacher, student, dataset=dataset)["fidelity"]["agreement"] > 0.5


def test_not_a_module():
    with pytest.raises(UserError, match=r"got a function as teacher; allowed: a torch\.nn\.Module"):
        Teacher(lambda x: x, "classification", SPEC)


@pytest.mark.parametrize(
    ("last", "name"), [(nn.LazyLinear(10), "2.weight"), (nn.Linear(3, 10, device="meta"), "2.weight")]
)
def test_a_network_whose_weights_are_not_there(last, name):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    with pytest.raises(UserError) as error:
        Teacher(network, "classification", SPEC)
    assert str(error.value) == (
        f"got Sequential, whose {name} has no values yet (2 such tensors); allowed: a trained network; load its "
        "weights (lazy layers: after one forward; the meta device: to_empty() first)"
    )
    assert Teacher(network[:2], "classification", SPEC).num_parameters == 0


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "", "cpu:0:1", "meta"])
def test_devices_that_are_not_there(device):
    with pytest.raises(UserError, match=r"got device=.*; allowed: auto \| .*cpu.* on this machine"):
        resolve_device(device)


def test_devices_that_are():
    assert resolve_device("cpu") == torch.device("cpu") and resolve_device("auto").type in ("cpu", "cuda", "mps")
