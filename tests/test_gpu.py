"""The same arrows on a GPU: what is made there is what is made on the CPU, up to rounding."""

import pytest
import torch

import dfq

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
