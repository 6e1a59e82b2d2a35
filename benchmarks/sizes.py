"""Bytes on disk of students at every width, beside the bits that their weights hold.

    python benchmarks/sizes.py

Of torchvision's ResNet-18 (random weights): packed codes against the exact count, what scales and the rest take, the
file, and whether the codes come back bit for bit.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
import torchvision

from dfq.calibration import calibrate
from dfq.quantization import pack, unpack
from dfq.quantizers.min_max import MinMax
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import CODES, Student
from dfq.teacher import InputSpec, Teacher

SCHEMES = {
    "w8": TensorScheme(8, True, "per_channel"),
    "w4": TensorScheme(4, True, "per_channel"),
    "w4, groups of 64": TensorScheme(4, True, "per_group", 64),
    "w3": TensorScheme(3, True, "per_channel"),
    "w2": TensorScheme(2, True, "per_channel"),
    "w2 seq": TensorScheme(2, True, "per_channel", grid="seq"),
    "ternary": TensorScheme(symmetric=True, granularity="per_channel", grid="ternary"),
    "w1 seq": TensorScheme(1, True, "per_channel", grid="seq"),
    "fp8": TensorScheme(symmetric=True, granularity="per_channel", grid="fp8_e4m3"),
    "fp4": TensorScheme(symmetric=True, granularity="per_channel", grid="fp4_e2m1"),
}


def main() -> None:
    torch.manual_seed(0)
    teacher = Teacher(torchvision.models.resnet18(), "classification", InputSpec((3, 64, 64), (0,) * 3, (1,) * 3))
    print(f"{'weights':16} {'exact bits / 8':>14} {'codes':>12} {'scales':>9} {'the rest':>9} {'file':>12}  round trip")
    for name, weight in SCHEMES.items():
        # The stem's 3 x 7 x 7 values are no multiple of 64.
        overrides = {"conv1": {"weight": {"granularity": "per_channel"}}} if weight.group_size else {}
        student = Student.from_teacher(teacher, Scheme(weight, FLOAT, overrides=overrides))
        calibrate(student, teacher.example(4), MinMax(), MinMax())
        student.freeze()
        tensors = student.tensors()
        codes = sum(t.numel() for key, t in tensors.items() if key.endswith(CODES))
        scales = sum(t.numel() * t.element_size() for key, t in tensors.items() if "quantizer" in key)
        rest = sum(t.numel() * t.element_size() for t in tensors.values()) - codes - scales
        exact = sum(
            layer.weight.numel() * (math.log2(3) if weight.grid == "ternary" else weight.num_bits) / 8
            for layer in student.layers.values()
        )
        same = all(
            torch.equal(unpack(pack(found, kind), kind, tuple(found.shape)), found)
            for key, (kind, _) in student.swap.layers.items()
            for found in [student.integer_weight(key)]
        )
        with tempfile.TemporaryDirectory() as folder:
            student.save(folder)
            loaded = Student.load(folder, teacher)
            images = teacher.example(2)
            same &= torch.equal(loaded(images), student(images)) and loaded.sha256 == student.sha256
            size = (Path(folder) / "student.safetensors").stat().st_size
        verdict = "bit for bit" if same else "DIFFERS"
        print(f"{name:16} {exact:14,.0f} {codes:12,} {scales:9,} {rest:9,} {size:12,}  {verdict}")


if __name__ == "__main__":
    main()
