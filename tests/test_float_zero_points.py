"""Uniform grids whose zero point is no whole number: formulas, what finds and trains them, storing, refusals."""

import numpy as np
import pytest
import torch
from conftest import as_teacher
from torch import nn

import dfq
from dfq.algorithms.hqq import HQQ
from dfq.algorithms.neuqi import NeUQI, real_zero_point
from dfq.quantization import choose_qparams, dequantize, fake_quantize, quantize, round_to_grid
from dfq.scheme import FLOAT, Scheme, TensorScheme

FLOATING = TensorScheme(2, False, "per_channel", zero_point="float")
WHOLE = TensorScheme(2, False, "per_channel")
GROUPS = Scheme(TensorScheme(2, False, "per_group", 16, zero_point="float"), FLOAT)


def rows(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(12, 40, generator=rng) + torch.linspace(-3, 3, 12)[:, None]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_runs_from_the_lowest_value_to_the_highest(bits):
    scheme, w = TensorScheme(bits, False, "per_channel", zero_point="float"), rows()
    scale, zero_point = choose_qparams(w.amin(1), w.amax(1), scheme)
    assert zero_point.dtype == torch.float32 and not torch.equal(zero_point, zero_point.round())
    s, z = scale.double().numpy()[:, None], zero_point.double().numpy()[:, None]
    codes = np.clip(np.round(w.double().numpy() / s + z), 0, 2**bits - 1)
    assert (codes.min(1) == 0).all() and (codes.max(1) == 2**bits - 1).all()
    found = quantize(w, scale, zero_point, scheme, 0)
    assert np.array_equal(found.numpy(), codes)
    values = dequantize(found, scale, zero_point, scheme, 0)
    np.testing.assert_allclose(values.numpy(), (codes - z) * s, rtol=1e-4, atol=1e-5)
    for other in (fake_quantize, round_to_grid):
        torch.testing.assert_close(other(w, scale, zero_point, scheme, 0), values, rtol=1e-5, atol=1e-5)
    same = torch.full((2, 5), 0.7)
    grid = choose_qparams(same.amin(1), same.amax(1), scheme)
    torch.testing.assert_close(fake_quantize(same, *grid, scheme, 0), same)


def test_gradients_are_those_of_the_formula():
    w = rows().double().requires_grad_()
    scale, zero_point = (t.double() for t in choose_qparams(w.detach().amin(1) / 2, w.detach().amax(1) / 2, FLOATING))
    scale.requires_grad_(), zero_point.requires_grad_()
    g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).double()
    (fake_quantize(w, scale, zero_point, FLOATING, 0) * g).sum().backward()
    found = [t.grad.clone() for t in (w, scale, zero_point)]
    for t in (w, scale, zero_point):
        t.grad = None
    s, z = scale[:, None], zero_point[:, None]
    v = w / s + z
    inside = (v >= -0.5) & (v <= 3.5)
    clipped = torch.where(inside, v + (torch.round(v) - v).detach(), v.detach().clamp(0, 3).round())
    ((clipped - z) * s * g).sum().backward()
    for mine, t in zip(found, (w, scale, zero_point), strict=True):
        torch.testing.assert_close(mine, t.grad, rtol=1e-6, atol=1e-8)


def error(w, scale, zero_point, scheme):
    return (fake_quantize(w, scale, zero_point, scheme, 0) - w).square().sum(1)


def test_neuqi_and_hqq_find_better_ones_than_whole_ones():
    w, ones = rows(), torch.ones(12, 40)
    least = error(w, *choose_qparams(w.amin(1), w.amax(1), FLOATING), FLOATING)
    whole, real = NeUQI().fit(w, ones, WHOLE), NeUQI().fit(w, ones, FLOATING)
    assert (error(w, *real, FLOATING) <= error(w, *whole, WHOLE) * (1 + 1e-4)).all()
    assert error(w, *real, FLOATING).sum() < 0.95 * least.sum()
    scale = real[0].double()[:, None]
    best = real_zero_point(w.double() / scale, ones.double(), 3)
    torch.testing.assert_close(real[1].double(), best, rtol=1e-5, atol=1e-5)
    found = HQQ().fit(w, *choose_qparams(w.amin(1), w.amax(1), FLOATING), FLOATING)
    assert found[1].dtype == torch.float32 and not torch.equal(found[1], found[1].round())
    assert error(w, *found, FLOATING).sum() < least.sum()


@pytest.mark.parametrize("algorithm", ["round_to_nearest", "neuqi", "gptq", "block_ap", "squant"])
def test_students_keep_them(algorithm, make_dataset, tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    teacher = as_teacher(network)
    settings = {"iterations": 20, "batch_size": 8} if algorithm == "block_ap" else {}
    student = dfq.quantize(
        teacher, make_dataset(teacher), GROUPS, algorithm=algorithm, student_dir=tmp_path / "s", **settings
    )
    zero_point = student.layers["2"].weight_quantizer.zero_point
    assert zero_point.dtype == torch.float32 and not torch.equal(zero_point, zero_point.round())
    images = make_dataset(teacher, 20, name="other").samples()
    again = dfq.load_student(tmp_path / "s", teacher)
    with torch.no_grad():
        assert torch.equal(again(images), student(images))
    assert again.scheme.weight.zero_point == "float"


@pytest.mark.parametrize("algorithm", ["neuqi", "block_ap", "reconstruction", "e2e_qp", "distillation"])
def test_with_float16_scales_offsets_are_float16_too(algorithm, make_dataset, tmp_path):
    """Found or trained, scale * zero_point is a float16 number; weights are what codes and offsets say."""
    teacher = as_teacher(nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(64), nn.Linear(64, 64), nn.ReLU(),
                                       nn.Linear(64, 10)))  # fmt: skip
    scheme = Scheme(TensorScheme(4, False, "per_group", 16, zero_point="float", scale_format="float16"), FLOAT)
    settings = {
        "block_ap": {"iterations": 20, "batch_size": 8},
        "reconstruction": {"iterations": 20},
        "e2e_qp": {"max_steps": 10, "batch_size": 8, "step_lr": 0.05},
        "distillation": {"max_steps": 10, "batch_size": 8},
    }.get(algorithm, {})
    student = dfq.quantize(
        teacher, make_dataset(teacher), scheme, algorithm=algorithm, student_dir=tmp_path / "s", **settings
    )
    again = dfq.load_student(tmp_path / "s", teacher)
    for name, layer in student.layers.items():
        scale, zero_point = layer.weight_quantizer.scale, layer.weight_quantizer.zero_point
        offset = (scale.double() * zero_point.double()).half().double()
        assert (zero_point != zero_point.round()).any()
        torch.testing.assert_close(scale.double() * zero_point.double(), offset, rtol=3e-7, atol=0)
        codes = student.integer_weight(name).view(len(layer.weight), -1, 16)
        values = codes * scale.double()[..., None] - offset[..., None]
        error = (values.flatten(1) - layer.weight).abs() / layer.weight_quantizer.steps_of(layer.weight)
        assert float(error.max()) < 1e-5
        assert torch.equal(again.layers[name].weight, layer.weight)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"zero_point": "real"}, "got zero_point='real'; allowed: integer | float"),
        (
            {"zero_point": "float", "symmetric": True},
            "got zero_point=float, grid=uniform and symmetric=true; allowed: ",
        ),
        (
            {"zero_point": "float", "grid": "ternary"},
            "got zero_point=float, grid=ternary and symmetric=false; allowed: ",
        ),
    ],
)
def test_refused(settings, message):
    with pytest.raises(dfq.UserError) as caught:
        TensorScheme(2, **{"symmetric": False, **settings})
    assert str(caught.value).startswith(message)


def test_refused_elsewhere(make_dataset, tmp_path):
    with pytest.raises(dfq.UserError, match=r"got scheme\.activation\.zero_point=float; allowed: zero_point=integer"):
        Scheme(WHOLE, TensorScheme(8, zero_point="float"))
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_attention_heads=4))
    teacher = dfq.load_teacher(module, "language_modeling", vocab_size=48, length=12, device="cpu")
    student = dfq.quantize(teacher, make_dataset(teacher), GROUPS, algorithm="neuqi")
    with pytest.raises(dfq.UserError, match=r"scheme\.weight\.zero_point=float; allowed: zero_point=integer"):
        dfq.export(student, tmp_path / "model.safetensors", "compressed_tensors", teacher=teacher)
