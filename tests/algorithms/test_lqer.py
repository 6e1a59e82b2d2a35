"""LQER: the best pair of its rank, saved, loaded, exported or refused."""

import numpy as np
import pytest
import torch
from conftest import as_teacher
from torch import nn
from torch.nn import functional as F

import dfq
from dfq.algorithms.lqer import low_rank
from dfq.exporters.compressed_tensors import CompressedTensors
from dfq.exporters.gguf import GGUF
from dfq.exporters.pt2 import PT2
from dfq.scheme import FLOAT, Scheme, TensorScheme

W2 = Scheme(TensorScheme(2, False, "per_channel"), FLOAT)
W3A8 = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(8))


def test_the_pair_is_the_best_of_its_rank():
    rng = torch.Generator().manual_seed(0)
    error, size = torch.randn(12, 20, generator=rng).double(), torch.rand(20, generator=rng).double() * 5
    down, up = low_rank(error, size, 4)
    assert down.shape == (4, 20) and up.shape == (12, 4)
    left = float(((error - up @ down) * size).square().sum())
    singular = np.linalg.svd((error * size).numpy(), compute_uv=False)
    assert left == pytest.approx((singular[4:] ** 2).sum())
    for _ in range(20):
        other = up + 0.01 * torch.randn(up.shape, generator=rng), down + 0.01 * torch.randn(down.shape, generator=rng)
        assert float(((error - other[0] @ other[1]) * size).square().sum()) > left
    zero = low_rank(torch.zeros(4, 6).double(), torch.zeros(6).double(), 2)
    assert all(torch.isfinite(t).all() for t in zero)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.head = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(128, 32), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(F.relu(self.first(F.relu(self.stem(x)).flatten(1))))


@pytest.mark.parametrize("scheme", [W2, W3A8], ids=lambda s: s.name)
def test_outputs_are_nearer_and_travel_with_the_student(scheme, make_dataset, tmp_path):
    teacher = as_teacher(Network())
    dataset, images = make_dataset(teacher), make_dataset(teacher, 32, name="other").samples()
    with torch.no_grad():
        wanted, errors = teacher(images), {}
        for name, settings in (
            ("round_to_nearest", {}),
            ("lqer", {"rank": 4}),
            ("sequence", {"steps": ["gptq", "lqer"]}),
        ):
            student = dfq.quantize(teacher, dataset, scheme, algorithm=name, student_dir=tmp_path / name, **settings)
            errors[name] = float((student(images) - wanted).square().mean())
            again = dfq.load_student(tmp_path / name, teacher)
            assert torch.equal(again(images), student(images))
        assert errors["lqer"] < 0.7 * errors["round_to_nearest"] and errors["sequence"] < errors["round_to_nearest"]
    assert student.surgery.corrections == {"first": (8, "float16"), "head": (5, "float16")}
    layer = again.layers["first"]
    assert layer.correction.down.dtype == torch.float16 and layer.correction.up.shape == (32, 8)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept, layer.correction = layer.correction, None
        without = layer(x)
        layer.correction = kept
        down, up = (t.float().numpy() for t in (kept.down, kept.up))
        rounded = layer.input_quantizer(x).numpy()
        np.testing.assert_allclose((layer(x) - without).numpy(), rounded @ down.T @ up.T, rtol=1e-3, atol=1e-4)


def test_all_of_the_error_at_full_rank(make_dataset):
    teacher = as_teacher(nn.Sequential(nn.Flatten(), nn.Linear(192, 6)))
    student = dfq.quantize(
        teacher, make_dataset(teacher), W2, algorithm="lqer", rank=3, scaled=False, storage="float32"
    )
    layer, weight = student.layers["1"], teacher.module[1].weight.detach()
    error = (weight - layer.weight).numpy()
    singular = np.linalg.svd(error, compute_uv=False)
    left = error - (layer.correction.up @ layer.correction.down).numpy()
    assert float((left**2).sum()) == pytest.approx((singular[3:] ** 2).sum(), rel=1e-3)


@pytest.mark.parametrize("factor", [2.0**-24, 2.0**20])
def test_inputs_of_any_size(factor, make_dataset):
    """1 / size and size are beyond float16: the pair was infinite times zero."""

    def made(factor):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher = as_teacher(Network())
        network = teacher.module
        network.first.weight *= factor
        network.first.bias *= factor
        network.head.weight /= factor
        dataset = make_dataset(teacher, 32, name=f"d{factor}")
        student = dfq.quantize(teacher, dataset, W2, algorithm="lqer", rank=4)
        with torch.no_grad():
            return student(dataset.samples())

    found, wanted = made(factor), made(1.0)
    assert torch.allclose(found, wanted, atol=1e-2 * float(wanted.abs().max()))


def test_pt2_carries_the_pairs(make_dataset, tmp_path):
    teacher = as_teacher(Network())
    student = dfq.quantize(teacher, make_dataset(teacher), W3A8, algorithm="lqer", rank=4)
    found = PT2().export(student, tmp_path / "a.pt2", teacher, make_dataset(teacher, 20, name="other").samples())
    assert found["parity"]["max_abs_error"] < 1e-4


def test_formats_without_a_place_for_pairs_say_so(make_dataset, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_attention_heads=4))
    teacher = dfq.load_teacher(module, "language_modeling", vocab_size=48, length=12, device="cpu")
    scheme = Scheme(TensorScheme(4, True, "per_group", 32), FLOAT)
    student = dfq.quantize(teacher, make_dataset(teacher), scheme, algorithm="lqer", rank=2)
    for exporter, name in ((CompressedTensors(), "model.safetensors"), (GGUF(), "a.gguf")):
        with pytest.raises(dfq.UserError, match=r"low-rank corrections .*allowed: exporter=pt2 \| onnx_qdq"):
            exporter.export(student, tmp_path / name, teacher)
        assert not (tmp_path / name).exists()
