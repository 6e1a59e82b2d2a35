"""Exported students in real runtimes: what runs on integers, how fast beside float, and with which answers.

    python benchmarks/runtime.py                  torchvision's ResNet-18 with random weights, 224 px
    python benchmarks/runtime.py --kit DIR        and the CIFAR-10 ResNet-20 of DIR with its 10,000 test images

W8A8, `policy=hardware`, no data: ranges from synthetic images (Gaussian noise for random weights). Float and quantized
file run in turns in one process; the ratio is float time over quantized time, its median and its range over rounds.
Exact: with the session option that the artifact records; default: without, where u8 x s8 products may saturate.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision

import dfq
from dfq.exporters._runtime import run, session
from dfq.exporters.onnx_qdq import export_float
from dfq.scheme import Scheme, TensorScheme
from dfq.teacher import Teacher

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SCHEMES = {
    "w8a8": Scheme(policy="hardware"),
    "w8a8, 7-bit weights": Scheme(TensorScheme(8, True, "per_channel", range="7bit"), policy="hardware"),
    "w8a8_po2": Scheme(
        TensorScheme(8, True, "per_channel", scale_format="e8m0"), TensorScheme(8, scale_format="e8m0"), "hardware"
    ),
}
ROUNDS, SECONDS = 7, 0.5


def resnet18() -> Teacher:
    """Random weights, batch norms settled on noise, so that activations have the scale of a trained network's."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.randn(8, 3, 224, 224))
    return dfq.load_teacher(network, input_size=(3, 224, 224), **IMAGENET)


def ratios(content: bytes, float_content: bytes, images: torch.Tensor, options: dict[str, str]) -> list[float]:
    """Float time over quantized time, once a round; each round gives both the same time, in turns."""
    sessions = {"float": session(float_content, {}), "quantized": session(content, options)}
    found = []
    for _ in range(ROUNDS):
        times: dict[str, list[float]] = {name: [] for name in sessions}
        start = time.perf_counter()
        while time.perf_counter() - start < SECONDS or len(times["quantized"]) < 3:
            for name, opened in sessions.items():
                began = time.perf_counter()
                run(opened, images)
                times[name].append(time.perf_counter() - began)
        found.append(statistics.median(times["float"]) / statistics.median(times["quantized"]))
    return found


def measure(name: str, teacher: Teacher, generator: str, folder: Path, evaluation: Path | None, **settings) -> None:
    dataset = dfq.generate(teacher, generator, 128, dataset_dir=folder / name, **settings)
    for label, scheme in SCHEMES.items():
        student = dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest")
        path = folder / f"{name}_{label}.onnx"
        found = dfq.export(student, path, teacher=teacher, dataset=dataset)
        parity, integer, content = found["parity"], found["integer"], path.read_bytes()
        float_content = export_float(teacher)
        print(f"\n{name} {label}: {len(content):,} bytes, float {len(float_content):,}")
        print(f"  multiply-accumulates on integers {integer['integer_mac_fraction']:.4f}  {integer['nodes']}")
        for mode, options in (("exact", found["session_options"]), ("default", {})):
            for batch in (1, 8):
                images = teacher.input_spec.example(batch, torch.Generator().manual_seed(0))
                each = ratios(content, float_content, images, options)
                print(
                    f"  {mode:8} batch {batch}: float time / quantized time {statistics.median(each):.2f} "
                    f"({min(each):.2f} to {max(each):.2f} over {len(each)} rounds, {torch.get_num_threads()} threads)"
                )
        for runtime, figures in (("onnxruntime", parity), ("openvino", parity["openvino"])):
            shown = {k: v for k, v in (figures or {"not installed": True}).items() if k not in ("integer", "openvino")}
            print(f"  {runtime}: {shown}")
        if evaluation is not None:
            _accuracy(teacher, student, content, found["session_options"], evaluation)


def _accuracy(teacher, student, content: bytes, options: dict[str, str], evaluation: Path) -> None:
    """Top-1 of teacher, student and file on labelled images; of the file in each session."""
    with np.load(evaluation) as arrays:
        pixels, labels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["labels"])
    images = teacher.input_spec.normalize(pixels)
    exact, default = session(content, options), session(content, {})
    runs = {
        "float teacher": teacher,
        "student in torch": student,
        "onnxruntime, exact": lambda x: run(exact, x)[0],
        "onnxruntime, default": lambda x: run(default, x)[0],
    }
    answers = {}
    for name, network in runs.items():
        with torch.no_grad():
            answers[name] = torch.cat([network(batch).argmax(1) for batch in images.split(250)])
        top1 = float((answers[name] == labels).float().mean())
        same = float((answers[name] == answers.get("student in torch", answers[name])).float().mean())
        print(f"  {name:22} top-1 {top1:.4f} on {len(labels):,} images, the student's answer in {same:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, help="folder with resnet20.py and prepare.py")
    parser.add_argument("--only-kit", action="store_true", help="leave ResNet-18 out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not arguments.only_kit:
            measure("resnet18", resnet18(), "gaussian", folder, None)
        if arguments.kit is None or not (arguments.kit / "resnet20.py").exists():
            print("\nno ResNet-20 rows: give --kit DIR with resnet20.py and prepare.py")
            return
        kit = arguments.kit.resolve()
        subprocess.run([sys.executable, "-B", "prepare.py", str(folder / "kit")], cwd=kit, check=True)
        sys.path.insert(0, str(kit))
        sys.dont_write_bytecode = True
        import resnet20

        teacher = dfq.load_teacher(resnet20.load(), input_size=(3, 32, 32), **IMAGENET)
        measure("resnet20", teacher, "zeroq", folder, folder / "kit" / "cifar10_test.npz", iterations=50)


if __name__ == "__main__":
    main()
