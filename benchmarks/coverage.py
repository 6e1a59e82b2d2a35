"""Which networks go through the whole chain: build, swap, calibrate, save, load, export, run in ONNX Runtime.

    python benchmarks/coverage.py                         every classifier below, w8a8, policy all
    python benchmarks/coverage.py --only resnet18 vit_tiny_patch16_224
    python benchmarks/coverage.py --no-export             without ONNX
    python benchmarks/coverage.py --write                 and docs/coverage.md

No download: the weights are random, made so that the outputs depend on the input (:func:`enliven`), at a small size of
each architecture, so that a row takes seconds on one core. Random networks say nothing about accuracy: what a row says
is whether every step works, which layers stay float and why, and how close ONNX Runtime comes to the student. Its error
is given as a share of the quantization error (student against teacher; relative errors over the logits of the same
images). Beside it stands what is unavoidable: the student's own error, one image at a time against all at once. A sum
in another order moves a few values over the border of a code, and every such flip moves many more in the next layer.
A network that fails is a row with the error.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.algorithms._calibration import calibrate
from dfq.errors import UserError
from dfq.exporters.onnx_qdq import OnnxQDQ
from dfq.hooks import forward_hooks, tensors_in
from dfq.modules import BATCH_NORMS
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme
from dfq.student import Student
from dfq.teacher import InputSpec, Teacher

NUM_CLASSES = 10
NUM_IMAGES = 64  # for the comparisons; calibration takes 32 others
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"


@dataclass(frozen=True)
class Network:
    name: str
    source: str  # torchvision | timm
    pixels: int
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.source == "timm":
                import timm

                return timm.create_model(self.name, pretrained=False, num_classes=NUM_CLASSES, **self.settings)
            import torchvision

            if self.name in ("VisionTransformer", "SwinTransformer"):  # their named variants are large
                return getattr(torchvision.models, self.name)(num_classes=NUM_CLASSES, **self.settings)
            return torchvision.models.get_model(self.name, weights=None, num_classes=NUM_CLASSES, **self.settings)


VIT = {"image_size": 64, "patch_size": 8, "num_layers": 4, "num_heads": 3, "hidden_dim": 96, "mlp_dim": 384}
SWIN = {"embed_dim": 48, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16], "window_size": [4, 4]}
TIMM_SWIN = {"img_size": 64, "embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16), "window_size": 4}
NETWORKS = (
    Network("resnet18", "torchvision", 64),
    Network("resnet26d", "timm", 64),
    Network("resnext50_32x4d", "torchvision", 64),
    Network("seresnet18", "timm", 64),
    Network("regnet_x_400mf", "torchvision", 64),
    Network("regnety_002", "timm", 64),
    Network("mobilenet_v2", "torchvision", 64),
    Network("mobilenet_v3_small", "torchvision", 64),
    Network("mobilenetv3_small_050", "timm", 64),
    Network("mnasnet0_5", "torchvision", 64),
    Network("efficientnet_b0", "torchvision", 64),
    Network("tf_efficientnet_lite0", "timm", 64),
    Network("tf_efficientnetv2_b0", "timm", 64),
    Network("shufflenet_v2_x0_5", "torchvision", 64),
    Network("densenet121", "torchvision", 64),
    Network("inception_v3", "torchvision", 96, {"init_weights": False}),
    Network("googlenet", "torchvision", 64, {"init_weights": False}),
    Network("squeezenet1_1", "torchvision", 64),
    Network("vgg11_bn", "torchvision", 32),
    Network("convnext_atto", "timm", 64),
    Network("vit_tiny_patch16_224", "timm", 64, {"img_size": 64}),
    Network("VisionTransformer", "torchvision", 64, VIT),
    Network("deit_tiny_distilled_patch16_224", "timm", 64, {"img_size": 64}),
    Network("SwinTransformer", "torchvision", 64, {"patch_size": [4, 4], **SWIN}),
    Network("swin_tiny_patch4_window7_224", "timm", 64, TIMM_SWIN),
    Network("mobilevit_xxs", "timm", 64),
    Network("ghostnet_050", "timm", 64),
    Network("repvgg_a0", "timm", 64),
    Network("mixnet_s", "timm", 64),
    Network("hrnet_w18_small", "timm", 64),
    Network("res2net50_14w_8s", "timm", 64),
    Network("cspresnet50", "timm", 64),
    Network("fbnetc_100", "timm", 64),
    Network("lcnet_050", "timm", 64),
    Network("poolformer_s12", "timm", 64),
    Network("efficientformerv2_s0", "timm", 64, {"img_size": 64}),
    Network("maxvit_pico_rw_256", "timm", 64, {"img_size": 64}),
    Network("resnetv2_50", "timm", 64),
    Network("nf_resnet26", "timm", 64),
)


# -- networks whose outputs mean something ---------------------------------------------------------------------------


def smooth_images(num_images: int, pixels: int, seed: int) -> Tensor:
    """Random images [N, 3, H, W] with structure at every scale and a colour of their own."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.zeros(num_images, 3, pixels, pixels)
    for cells in (1, 2, 4, 8, 16):
        noise = torch.randn(num_images, 3, cells, cells, generator=rng)
        images += F.interpolate(noise, size=(pixels, pixels), mode="bicubic" if cells > 1 else "nearest")
    return images / images.std()


@torch.no_grad()
def enliven(network: nn.Module, pixels: int, seed: int = 0) -> None:
    """Random weights, in place, with which the outputs depend on the input as a trained network's do.

    Fresh networks are easier than trained ones: heads, layer scales and the last batch norm of a residual block begin
    at zero, which makes whole branches vanish. So: every matrix with unit gain, every scale away from zero, batch
    norms with the statistics of two batches, and logits that have mean 0 and deviation 1 over images, class by class.
    """
    torch.manual_seed(seed)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.dim() >= 2 and name.endswith("weight") and not isinstance(module, nn.Embedding):
                nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
            elif isinstance(module, BATCH_NORMS) and name == "weight":
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif isinstance(module, BATCH_NORMS) and name == "bias":
                nn.init.normal_(parameter, 0.5, 0.2)  # mostly above the kink of ReLU: less chaotic
            elif not name.endswith("bias") and parameter.abs().max() < 1e-3:  # layer scale, class token, gain
                nn.init.uniform_(parameter, 0.2, 0.5)
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in smooth_images(64, pixels, seed=1).split(32):
        network(batch)
    network.eval()
    heads = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == NUM_CLASSES
    ]
    seen: dict[str, Tensor] = {}
    with forward_hooks(heads, after=lambda name, _module, _inputs, output: seen.update({name: output})):
        network(smooth_images(64, pixels, seed=2))
    for name, head in heads:
        if name not in seen:
            continue  # an auxiliary head that does not run in evaluation mode
        logits = seen[name].transpose(1, -1).reshape(-1, NUM_CLASSES)
        deviation = logits.std(0).clamp_min(1e-12)
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros(NUM_CLASSES))
        head.bias.copy_((head.bias - logits.mean(0)) / deviation)
        head.weight.copy_(head.weight / deviation.view(-1, *[1] * (head.weight.dim() - 1)))


# -- one network -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    network: str
    source: str
    pixels: int
    parameters: int | None = None
    quantized: int | None = None
    kept_float: dict[str, str] = field(default_factory=dict)
    classes: int | None = None  # different answers of the teacher on the images
    swap: str = ""  # each step: empty = not reached, ok, or the error
    calibrate: str = ""
    bit_exact: str = ""
    onnx: str = ""
    size_ratio: float | None = None  # float state / student file
    quantization_error: float | None = None
    student_agreement: float | None = None
    runtime_error: float | None = None
    own_error: float | None = None  # of the student, one image at a time against all at once
    agreement: float | None = None
    parity: dict[str, Any] | None = None
    step_seconds: dict[str, float] = field(default_factory=dict)
    traceback: str = ""

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds.values())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def logits(network: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    with torch.no_grad():
        return next(tensors_in(network(images)))


def measure(network: Network, folder: Path, scheme: Scheme, export: bool) -> Row:
    """The whole chain; it ends at the first step that fails."""
    row = Row(network.name, network.source, network.pixels)
    step = ""

    def begin(name: str) -> None:
        nonlocal step, began
        now = time.perf_counter()
        if step:
            row.step_seconds[step] = round(now - began, 2)
        step, began = name, now

    began = 0.0
    try:
        begin("swap")
        module = network.build()
        enliven(module, network.pixels)
        spec = InputSpec((3, network.pixels, network.pixels), (0.5,) * 3, (0.25,) * 3)
        teacher = Teacher(module, "classification", spec, network.name)
        row.parameters = teacher.num_parameters
        images = smooth_images(NUM_IMAGES, network.pixels, seed=3)
        wanted = logits(teacher, images)
        row.classes = len(wanted.argmax(1).unique())
        student = Student.from_teacher(teacher, scheme)
        row.quantized, row.kept_float = len(student.layers), dict(student.swap.kept_float)
        folding = relative_error(logits(student, images), wanted)
        row.swap = "ok" if folding < 1e-4 else f"changed the outputs by {folding:.1e}"
        begin("calibrate")
        calibrate(student, smooth_images(32, network.pixels, seed=4), MinMax(), MinMax())
        student.freeze()
        found = logits(student, images)
        row.quantization_error = relative_error(found, wanted)
        row.student_agreement = float((found.argmax(1) == wanted.argmax(1)).float().mean())
        alone = torch.cat([logits(student, image) for image in images[:16].split(1)])
        row.own_error = relative_error(alone, found[:16])
        row.calibrate = "ok"
        begin("bit_exact")
        student.save(folder / "student")
        loaded = Student.load(folder / "student", teacher)
        same = torch.equal(logits(loaded, images), found) and loaded.sha256 == student.sha256
        row.bit_exact = "ok" if same else f"differs by {relative_error(logits(loaded, images), found):.1e}"
        row.size_ratio = teacher.size_bytes / (folder / "student" / "student.safetensors").stat().st_size
        if export:
            begin("onnx")  # without the teacher: its float file would double the time and tell nothing more
            row.parity = OnnxQDQ(latency=False).export(student, folder / "network.onnx", None, images)["parity"]
            row.runtime_error, row.agreement = row.parity["relative_error"], row.parity["argmax_agreement"]
            row.onnx = "ok"
    except Exception as error:  # whatever a network does is what this looks for
        text = str(error.got if isinstance(error, UserError) else error).strip().splitlines() or [""]
        setattr(row, step, f"{type(error).__name__}: {text[0][:300]}")
        row.traceback = traceback.format_exc()
    begin("")
    return row


# -- the table -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "network", "source", "px", "parameters", "quantized / float", "swap", "calibrate", "save → load bit exact",
    "size ratio", "ONNX", "runtime error", "student's own error", "argmax agreement", "seconds",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    def mark(text: str) -> str:
        return text if text in ("", "ok") else "**fails**" if "Error" in text else f"**{text}**"

    share = None
    if row.runtime_error is not None and row.quantization_error:
        share = row.runtime_error / row.quantization_error
    return [
        row.network,
        row.source,
        str(row.pixels),
        "" if row.parameters is None else f"{row.parameters / 1e6:.2f} M",
        "" if row.quantized is None else f"{row.quantized} / {len(row.kept_float)}",
        mark(row.swap),
        mark(row.calibrate),
        mark(row.bit_exact),
        "" if row.size_ratio is None else f"{row.size_ratio:.2f}",
        mark(row.onnx),
        "" if share is None else f"{share:.3f}",
        "" if not row.quantization_error else f"{row.own_error / row.quantization_error:.3f}",
        "" if row.agreement is None else f"{row.agreement:.3f}",
        f"{row.seconds:.0f}",
    ]


def kept_float_reasons(row: Row) -> str:
    """``3 × no quantized X yet (first.name, ...)``"""
    counts = Counter(row.kept_float.values())
    first = {reason: name for name, reason in reversed(row.kept_float.items())}
    return "; ".join(f"{count} × {reason} ({first[reason]})" for reason, count in counts.most_common())


def document(rows: list[Row], scheme: Scheme) -> str:
    """The table as markdown, then what stays float and what fails."""
    steps = ("swap", "calibrate", "bit_exact", "onnx")
    whole = sum(all(getattr(row, step) in ("", "ok") for step in steps) for row in rows)
    lines = [
        "# Coverage",
        "",
        "Made by `python benchmarks/coverage.py --write`; the networks are not trained, see there.",
        "",
        f"{whole} of {len(rows)} networks pass the whole chain at {scheme.name}, policy {scheme.policy}; in "
        f"{sum(not row.kept_float for row in rows if row.quantized)} of them no layer stays float.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    kept = [f"- {row.network}: {kept_float_reasons(row)}" for row in rows if row.kept_float]
    if kept:
        lines += ["", "## Layers that stay float", "", *kept]
    failed = [
        f"- {row.network}, {step}: {text}"
        for row in rows
        for step in steps
        if (text := getattr(row, step)) not in ("", "ok")
    ]
    if failed:
        lines += ["", "## Failures", "", *failed]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--no-export", action="store_true", help="leave ONNX out")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(DOCUMENT.parents[1])}")
    parser.add_argument("--json", type=Path, help="write all that was measured, tracebacks included")
    parser.add_argument("--policy", default="all")
    arguments = parser.parse_args()
    names = [network.name for network in NETWORKS]
    if unknown := set(arguments.only or ()) - set(names):
        parser.error(f"got {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    scheme = Scheme(policy=arguments.policy)
    rows = []
    for network in NETWORKS:
        if arguments.only and network.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = measure(network, Path(folder), scheme, not arguments.no_export)
        rows.append(row)
        print(" | ".join(cells(row)), flush=True)
        for step in ("swap", "calibrate", "bit_exact", "onnx"):
            if getattr(row, step) not in ("", "ok"):
                print(f"    {step}: {getattr(row, step)}", flush=True)
        if row.kept_float:
            print(f"    float: {kept_float_reasons(row)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1, default=str))
    text = document(rows, scheme)
    print("\n" + text)
    if arguments.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
