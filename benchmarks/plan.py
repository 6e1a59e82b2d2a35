"""`dfq plan` against what it plans: seconds and peak memory, predicted and measured, for small configurations.

    python benchmarks/plan.py                          all configurations, one after the other
    python benchmarks/plan.py --only digits_gptq,...   some of them
    python benchmarks/plan.py --write docs/plan_measured.md

Each prediction and each run is a process of its own. Seconds are those of making the dataset and the student, on the
wall and of the process; the bound is 25 % of the latter, which a busy machine bends less. Memory is the largest
resident size of the process that made both. Runs do not stop early (`patience: null`), which no plan can know.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BOUND = 0.25
DIGITS = {"teacher": {"_target_": "dfq.teachers.digits.load"}}
LLAMA = {"teacher": "llama", "scheme": "w4a16_g32", "generator": "self_generation"}
TRAINS = {"patience": None}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "digits_distillation": {**DIGITS, "num_samples": 1024, "algorithm": ("distillation", {"max_steps": 200, **TRAINS})},
    "digits_reconstruction": {
        **DIGITS, "num_samples": 512, "algorithm": ("reconstruction", {"iterations": 100, "finish_iterations": 50}),
    },
    "digits_gptq": {**DIGITS, "num_samples": 1024, "algorithm": ("gptq", {})},
    "llama_distillation": {
        **LLAMA, "num_samples": 128, "algorithm": ("distillation", {"max_steps": 40, "batch_size": 16, **TRAINS}),
    },
    "llama_gptq": {**LLAMA, "num_samples": 128, "algorithm": ("gptq", {})},
    "resnet18_64px": {
        "teacher": {
            "_target_": "dfq.teachers.timm.load", "name": "resnet18", "pretrained": False, "input_size": [3, 64, 64],
        },
        "num_samples": 64, "generator": ("zeroq", {"iterations": 20, "batch_size": 32}),
        "algorithm": ("round_to_nearest", {}),
    },
    "mobilenetv3_64px_distillation": {
        "teacher": {
            "_target_": "dfq.teachers.timm.load", "name": "mobilenetv3_small_050", "pretrained": False,
            "input_size": [3, 64, 64],
        },
        "num_samples": 128, "generator": ("zeroq", {"iterations": 10, "batch_size": 32}),
        "algorithm": ("distillation", {"max_steps": 30, "batch_size": 16, **TRAINS}),
    },
}  # fmt: skip


def experiment(name: str) -> Any:
    """The objects of a configuration."""
    from dfq.pipeline import Experiment
    from dfq.scheme import Scheme
    from dfq.settings import build, load, resolve

    given = CONFIGURATIONS[name]

    def method(family: str, default: str) -> Any:
        value = given.get(family, default)
        word, settings = (value, {}) if isinstance(value, str) else value
        return resolve(family, word, **settings)

    teacher = llama() if given["teacher"] == "llama" else build(given["teacher"], "teacher")
    quantizers = [resolve("quantizer", "mse")] * 2
    scheme = Scheme.from_dict(load("scheme", given.get("scheme", "w4a4")))
    return Experiment(
        teacher, method("generator", "zeroq"), scheme, method("algorithm", ""), *quantizers,
        num_samples=given["num_samples"], references=(),
    )  # fmt: skip


def llama() -> Any:
    """A Llama of four layers with random weights."""
    import torch
    import transformers

    from dfq.teacher import Teacher, TokenSpec

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Teacher(module, "language_modeling", TokenSpec(1024, 64), name="llama")


def planned(name: str) -> dict[str, Any]:
    from dfq import plan

    e = experiment(name)
    start = time.process_time()
    found = plan.make(lambda: e.teacher, lambda _: e, e.teacher.device)
    stages = plan.to_dict(found)["stages"]
    return {
        "seconds": sum(stage["seconds"] for stage in stages),
        "cpu_seconds": sum(stage["cpu_seconds"] for stage in stages),
        "memory_bytes": max(stage["memory_bytes"] for stage in stages),
        "planning": time.process_time() - start,
    }


def measured(name: str) -> dict[str, Any]:
    from dfq.pipeline import generate, quantize

    e = experiment(name)
    wall, cpu = time.perf_counter(), time.process_time()
    dataset = generate(e.teacher, e.generator, e.num_samples)
    quantize(e.teacher, dataset, e.scheme, e.algorithm, e.weight_quantizer, e.activation_quantizer)
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def in_a_process(what: str, name: str) -> dict[str, Any]:
    """``planned`` or ``measured`` in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, str(Path(__file__).resolve()), f"--{what}", name]
        path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        finished = subprocess.run(
            line, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
        )
    if finished.returncode:
        sys.exit(f"{what} {name} ended with {finished.returncode}")
    return json.loads(finished.stdout.splitlines()[-1])


HEAD = """| configuration | CPU s, plan | measured | off | s, plan | measured | MB, plan | measured | off | planning |
|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CONFIGURATIONS))
    parser.add_argument("--write", type=Path)
    parser.add_argument("--planned")
    parser.add_argument("--measured")
    options = parser.parse_args()
    if options.planned or options.measured:
        found = planned(options.planned) if options.planned else measured(options.measured)
        print(json.dumps(found))
        return
    lines, inside = [HEAD], 0
    print(HEAD, flush=True)
    names = options.only.split(",")
    for name in names:
        told, was = in_a_process("planned", name), in_a_process("measured", name)
        time_off = told["cpu_seconds"] / was["cpu_seconds"] - 1
        memory_off = told["memory_bytes"] / was["memory_bytes"] - 1
        inside += abs(time_off) <= BOUND and abs(memory_off) <= BOUND
        lines.append(
            f"| {name} | {told['cpu_seconds']:.1f} | {was['cpu_seconds']:.1f} | {time_off:+.0%} "
            f"| {told['seconds']:.1f} | {was['seconds']:.1f} "
            f"| {told['memory_bytes'] / 1e6:.0f} | {was['memory_bytes'] / 1e6:.0f} "
            f"| {memory_off:+.0%} | {told['planning']:.1f} |"
        )
        print(lines[-1], flush=True)
    print(f"within {BOUND:.0%} in time and memory: {inside} of {len(names)}")
    if options.write:
        options.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
