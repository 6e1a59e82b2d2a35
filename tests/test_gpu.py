"""The same arrows on a GPU: what is made there is what is made on the CPU, up to rounding."""

import pytest
import torch
from conftest import NETS, as_teacher
from test_contracts import build, every, made_for

import dfq
from dfq.generators._base import batch_rng
from dfq.generators.deep_inversion import DeepInversion
from dfq.generators.gdfq import GDFQ
from dfq.generators.genie import Genie
from dfq.generators.spectrum import Spectrum
from dfq.generators.zeroq import ZeroQ
from dfq.settings import resolve
from dfq.testing import check_algorithm, check_exporter, check_generator

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_generate_quantize_save_load_on_the_gpu(tmp_path):
    teacher = dfq.load_teacher("digits", device="cuda")
    dataset = dfq.generate(teacher, num_samples=64, dataset_dir=tmp_path / "data", iterations=10)
    on_cpu = dfq.generate(
        dfq.load_teacher("digits", device="cpu"), num_samples=64, dataset_dir=tmp_path / "cpu", iterations=10
    )
    assert float((dataset.tensors()["images"] - on_cpu.tensors()["images"]).abs().mean()) < 0.1
    student = dfq.quantize(teacher, dataset, scheme="w4a4", max_steps=10, student_dir=tmp_path / "student")
    assert student.device.type == "cuda"
    images = dataset.tensors()["images"]
    loaded = dfq.load_student(tmp_path / "student", device="cuda")
    assert torch.equal(loaded(images), student(images))
    elsewhere = dfq.load_student(tmp_path / "student", device="cpu")
    assert (elsewhere(images).argmax(1) == student(images).cpu().argmax(1)).float().mean() > 0.95
    found = dfq.evaluate(teacher, student, evaluation="digits", dataset=dataset)
    assert found["teacher"]["top1"] > 0.98 and 0 <= found["fidelity"]["agreement"] <= 1
    if pytest.importorskip("onnxruntime"):
        assert dfq.export(student, tmp_path / "s.onnx", teacher=teacher)["size_bytes"] > 0


@pytest.mark.parametrize(
    "generator",
    [
        ZeroQ(iterations=6, flip=True, shift=1, class_weight=1.0, min_confidence=0.5, keep_best=True, emphasis=0.0),
        ZeroQ(iterations=6, statistics="image", emphasis=1.0, slack=0.5),
        Genie(iterations=6, num_channels=8),
        GDFQ(iterations=6, num_channels=8, train_batch_size=8),
        DeepInversion(iterations=6, shift=1),
        Spectrum(iterations=6),
    ],
    ids=lambda generator: type(generator).__name__,
)
def test_no_step_waits_for_the_gpu(generator):
    """PyTorch itself raises where an operation between the first step and the last but one would wait."""
    teacher, calls = dfq.load_teacher("digits", device="cuda"), []

    def advance(amount, note=""):
        calls.append(amount)
        torch.cuda.set_sync_debug_mode("error" if len(calls) < 5 else "default")

    try:
        generator.sample(teacher, 8, batch_rng(0, 0), advance)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 6


@every("generator")
def test_generator(name):
    """The same contract as on the CPU: the same bits twice, nothing left behind, a dataset that can go on."""
    generator = build("generator", name)
    check_generator(generator, made_for(generator).to("cuda"))


@every("algorithm")
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_algorithm(name, kind):
    algorithm = build("algorithm", name)
    if getattr(algorithm, "kind", "images") == "token ids":
        pytest.skip("for language models; below")
    teacher = as_teacher(NETS[kind]()).to("cuda")
    check_algorithm(algorithm, teacher, resolve("quantizer", "mse", num_candidates=10))


@every("exporter")
def test_exporter(name):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    exporter = build("exporter", name)
    if getattr(exporter, "kind", "images") == "token ids":
        pytest.skip("for networks of transformers; below")
    check_exporter(exporter, as_teacher(NETS["plain"]()).to("cuda"))


@every("algorithm")
def test_language_model(name, tmp_path):
    """Text by the network itself, a student by each algorithm; the file of compressed-tensors once."""
    tiny_language = pytest.importorskip("tiny_language")
    teacher = tiny_language.tiny_llama().to("cuda")
    texts = dfq.generate(teacher, "self_generation", 24, tmp_path / "texts", first="uniform", batch_size=8)
    algorithm = build("algorithm", name)
    made = [dfq.quantize(teacher, texts, "w4a8kv4", algorithm=algorithm, student_dir=tmp_path / n) for n in "ab"]
    ids = texts.tensors()["input_ids"]
    with torch.no_grad():
        first, again, wanted = made[0](ids).logits, made[1](ids).logits, teacher(ids).logits
    assert first.device.type == "cuda" and torch.equal(first, again) and not torch.equal(first, wanted)
    assert float((first - wanted).square().mean() / wanted.square().mean()) < 0.5
    if name == "gptq":
        file = dfq.export(made[0], tmp_path / "model" / "model.safetensors", exporter="compressed_tensors")
        assert file["size_bytes"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_callback_in_half_precision_takes_its_teacher_from_the_gpu_again():
    import pytorch_lightning as pl

    from dfq.lightning import QuantizationCallback, student_of

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

        def training_step(self, batch, _index):
            return self.network(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    rng = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 8, generator=rng))
    loader, module = torch.utils.data.DataLoader(data, batch_size=8), Plain()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="gpu",
        devices=1,
        precision="16-mixed",
        callbacks=[QuantizationCallback("w8a8", loader, distill=True)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    assert float(trainer.callback_metrics["distillation_loss"]) >= 0 and student_of(module).has_grids
    assert {p.device.type for p in module.float_networks["network"].network.parameters()} == {"cpu"}
