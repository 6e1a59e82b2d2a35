"""Which networks go through the whole chain: build, swap, calibrate, save, load, export, run in ONNX Runtime.

    python benchmarks/coverage.py                         30 classifiers, 9 more without ONNX, 4 language models: w8a8
    python benchmarks/coverage.py --only resnet18 vit_tiny_patch16_224
    python benchmarks/coverage.py --no-export             without ONNX
    python benchmarks/coverage.py --write                 and docs/coverage.md

No download: the weights are random, made so that the outputs depend on the input (:func:`enliven`), at a small size of
each architecture, so that a row takes seconds on one core. Random networks say nothing about accuracy: what a row says
is whether every step works, which layers stay float and why, and how close ONNX Runtime comes to the student. Its error
is given as a share of the quantization error (student against teacher; relative errors over the logits of the same
images). Beside it stands what is unavoidable: the student's own error, one image at a time against all at once. A sum
in another order moves a few values over the border of a code, and every such flip moves many more in the next layer;
in random networks they multiply. With scales that are powers of two all sums are exact, and there is nothing to flip.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.exporters.onnx_qdq import OnnxQDQ
from dfq.hooks import forward_hooks, tensors_in
from dfq.modules import BATCH_NORMS
from dfq.quantizers.min_max import MinMax
from dfq.scheme import Scheme, TensorScheme
from dfq.student import Student
from dfq.teacher import InputSpec, Teacher, TokenSpec

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
)
MORE = (  # not exported
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


LANGUAGE_MODELS = {  # tiny configurations with random weights
    "LlamaForCausalLM": ("LlamaConfig", {"num_key_value_heads": 2}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "GPT2LMHeadModel": ("GPT2Config", {}),
    "BertForSequenceClassification": ("BertConfig", {}),
}
SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
POWERS_OF_TWO = Scheme(
    TensorScheme(8, True, "per_channel", scale_format="e8m0"), TensorScheme(8, scale_format="e8m0"), "hardware"
)


@dataclass
class Export:
    """A student in ONNX Runtime, with the session options that its artifact records."""

    error: str = ""
    runtime_error: float | None = None  # as a share of the quantization error
    own_error: float | None = None  # the student's, one sample at a time against all at once, likewise
    agreement: float | None = None
    integer: float | None = None  # share of the multiply-accumulates

    @property
    def passes(self) -> bool:
        """An error below 5 % of the quantization error's own size, or the same answer in 99 % of the samples."""
        return self.agreement is not None and (self.runtime_error < 0.05 or self.agreement >= 0.99)

    def cell(self) -> str:
        if self.error:
            return "**fails**"
        if self.agreement is None:
            return ""
        return f"{self.runtime_error:.3f} ({self.own_error:.3f}), {self.agreement:.3f}"


@dataclass
class Row:
    network: str
    source: str
    size: str
    parameters: int = 0
    quantized: int = 0
    kept_float: dict[str, str] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)  # policy: ok, or what went wrong
    exports: dict[str, Export] = field(default_factory=dict)
    quantization_error: float | None = None
    size_ratio: float | None = None  # float state / student file
    seconds: float = 0.0
    traceback: str = ""

    @property
    def passes(self) -> bool:
        return all(step == "ok" for step in self.steps.values())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def logits(network: Callable[[Tensor], Any], inputs: Tensor) -> Tensor:
    """Of a language model: those of every position."""
    with torch.no_grad():
        outputs = next(tensors_in(network(inputs)))
    return outputs.flatten(0, -2) if outputs.dim() == 3 else outputs


def say(error: Exception) -> str:
    text = str(error.got if isinstance(error, UserError) else error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]}"


def chain(row: Row, teacher: Teacher, scheme: Scheme, inputs: Tensor, calibration: Tensor, folder: Path) -> Student:
    """Swap, calibrate, save, load; the student that came back, or an exception that says which step failed."""
    wanted = logits(teacher, inputs)
    student = Student.from_teacher(teacher, scheme)
    if (changed := relative_error(logits(student, inputs), wanted)) > 1e-4:
        raise ValueError(f"swapping changed the outputs by {changed:.1e}")
    calibrate(student, calibration, MinMax(), MinMax())
    student.freeze()
    found = logits(student, inputs)
    student.save(folder / "student")
    loaded = Student.load(folder / "student", teacher)
    if not torch.equal(logits(loaded, inputs), found) or loaded.sha256 != student.sha256:
        raise ValueError(f"the loaded student differs by {relative_error(logits(loaded, inputs), found):.1e}")
    row.quantization_error = row.quantization_error or relative_error(found, wanted)
    row.quantized, row.kept_float = len(student.layers), dict(student.swap.kept_float)
    row.size_ratio = teacher.size_bytes / (folder / "student" / "student.safetensors").stat().st_size
    return student


def export(student: Student, teacher: Teacher, inputs: Tensor, folder: Path) -> Export:
    found, wanted = logits(student, inputs), logits(teacher, inputs)
    reference = relative_error(found, wanted)
    alone = torch.cat([logits(student, each) for each in inputs[:16].split(1)])
    together = logits(student, inputs[:16]) if len(inputs) < 16 else found[: len(alone)]
    # Without the teacher: its float file would double the time and tell nothing more.
    parity = OnnxQDQ(latency=False).export(student, folder / "network.onnx", None, inputs)["parity"]
    return Export(
        "",
        parity["relative_error"] / reference,
        relative_error(alone, together) / reference,
        parity["argmax_agreement"],
        parity["integer"]["integer_mac_fraction"],
    )


def measure(row: Row, teacher: Teacher, inputs: Tensor, calibration: Tensor, wanted: dict[str, Scheme]) -> Row:
    """All of ``wanted``: label → scheme; labels that start with "onnx" are exported too."""
    start = time.perf_counter()
    row.parameters = teacher.num_parameters
    for label, scheme in wanted.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                student = chain(row, teacher, scheme, inputs, calibration, Path(folder))
                row.steps[label] = "ok"
            except Exception as error:  # whatever a network does is what this looks for
                row.steps[label], row.traceback = say(error), traceback.format_exc()
                continue
            if label.startswith("onnx"):
                try:
                    row.exports[label] = export(student, teacher, inputs, Path(folder))
                except Exception as error:
                    row.exports[label], row.traceback = Export(say(error)), traceback.format_exc()
    row.seconds = time.perf_counter() - start
    return row


def classifier(network: Network, wanted: dict[str, Scheme]) -> Row:
    row = Row(network.name, network.source, f"{network.pixels} px")
    try:
        module = network.build()
        enliven(module, network.pixels)
    except Exception as error:
        row.steps["build"] = say(error)
        return row
    spec = InputSpec((3, network.pixels, network.pixels), (0.5,) * 3, (0.25,) * 3)
    teacher = Teacher(module, "classification", spec, network.name)
    images = smooth_images(NUM_IMAGES, network.pixels, seed=3)
    return measure(row, teacher, images, smooth_images(32, network.pixels, seed=4), wanted)


def language_model(name: str, wanted: dict[str, Scheme]) -> Row:
    import transformers

    row = Row(name, "transformers", "16 tokens")
    kind, settings = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES, **settings)
    if kind == "GPT2Config":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=200, **settings)
    task = "classification" if "Classification" in name else "language_modeling"
    teacher = Teacher(getattr(transformers, name)(config).eval(), task, TokenSpec(200, 16), name)
    ids = teacher.input_spec.example(NUM_IMAGES, torch.Generator().manual_seed(3))
    return measure(row, teacher, ids, teacher.input_spec.example(32, torch.Generator().manual_seed(4)), wanted)


# -- the table -------------------------------------------------------------------------------------------------------

ALL, HARDWARE, EXACT = "policy=all", "onnx, policy=hardware", "onnx, policy=hardware, w8a8_po2"
COLUMNS = (
    "network", "source", "input", "parameters", "quantized / float", "swap → calibrate → save → load bit exact",
    "size ratio", "MACs on integers", "ONNX Runtime, w8a8", "ONNX Runtime, w8a8_po2",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    integers = [f"{100 * e.integer:.0f} %" for e in row.exports.values() if e.integer is not None]
    first = [label for label in row.exports if label != EXACT]
    return [
        row.network,
        row.source,
        row.size,
        f"{row.parameters / 1e6:.2f} M",
        f"{row.quantized} / {len(row.kept_float)}",
        "ok" if row.passes else "**fails**",
        "" if row.size_ratio is None else f"{row.size_ratio:.2f}",
        integers[0] if integers else "",
        row.exports[first[0]].cell() if first else "",
        row.exports[EXACT].cell() if EXACT in row.exports else "",
    ]


def kept_float_reasons(row: Row) -> str:
    """``3 × no quantized X yet (first.name, ...)``"""
    counts = Counter(row.kept_float.values())
    first = {reason: name for name, reason in reversed(row.kept_float.items())}
    return "; ".join(f"{count} × {reason} ({first[reason]})" for reason, count in counts.most_common())


def document(rows: list[Row]) -> str:
    """The table as markdown, then what stays float and what fails."""
    vision = [row for row in rows if row.source != "transformers"]
    exported = [row for row in vision if row.exports]
    text = [row for row in rows if row.source == "transformers"]
    counts = {
        label: sum(row.exports[label].passes for row in exported if label in row.exports) for label in (HARDWARE, EXACT)
    }
    either = sum(any(found.passes for found in row.exports.values()) for row in exported)
    lines = [
        "# Coverage",
        "",
        "Made by `python benchmarks/coverage.py --write` on one thread; the networks are not trained, see there.",
        "",
        f"- {sum(row.passes for row in vision)} of {len(vision)} classifiers and {sum(row.passes for row in text)} of "
        f"{len(text)} language models pass swap → calibrate → save → load, bit exact, at w8a8 with every policy shown.",
        f"- {len(exported)} classifiers were exported with `scheme.policy=hardware`. ONNX Runtime's error is below 5 % "
        f"of the quantization error, or its answer the student's in at least 99 % of {NUM_IMAGES} images, for "
        f"{counts[EXACT]} of them with scales that are powers of two (`scheme=w8a8_po2`), for {counts[HARDWARE]} with "
        f"free scales, for {either} with either.",
        "",
        "ONNX Runtime columns: its error as a share of the quantization error (in brackets the student's own, one "
        "image at a time against all at once), then the share of equal answers. Language models: `policy=all`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    kept = [f"- {row.network}: {kept_float_reasons(row)}" for row in rows if row.kept_float]
    if kept:
        lines += ["", "## Layers that stay float", "", *kept]
    failed = [f"- {row.network}, {step}: {text}" for row in rows for step, text in row.steps.items() if text != "ok"]
    failed += [
        f"- {row.network}, {label}: {found.error}"
        for row in rows
        for label, found in row.exports.items()
        if found.error
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
    arguments = parser.parse_args()
    names = [*(network.name for network in (*NETWORKS, *MORE)), *LANGUAGE_MODELS]
    if unknown := set(arguments.only or ()) - set(names):
        parser.error(f"got {', '.join(sorted(unknown))}; allowed: {', '.join(names)}")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    schemes = {ALL: Scheme(), HARDWARE: Scheme(policy="hardware"), EXACT: POWERS_OF_TWO}
    chains = {label.removeprefix("onnx, "): scheme for label, scheme in schemes.items()}
    rows = []
    for name in names:
        if arguments.only and name not in arguments.only:
            continue
        if name in LANGUAGE_MODELS:
            wanted = chains if arguments.no_export else {**chains, f"onnx, {ALL}": Scheme()}
            row = language_model(name, wanted)
        else:
            network = next(network for network in (*NETWORKS, *MORE) if network.name == name)
            row = classifier(network, chains if arguments.no_export or network in MORE else schemes)
        rows.append(row)
        print(" | ".join(cells(row)), f"| {row.seconds:.0f} s", flush=True)
        for what, text in [*row.steps.items(), *((label, found.error) for label, found in row.exports.items())]:
            if text not in ("ok", ""):
                print(f"    {what}: {text}", flush=True)
        if row.kept_float:
            print(f"    float: {kept_float_reasons(row)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1, default=str))
    text = document(rows)
    print("\n" + text)
    if arguments.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
