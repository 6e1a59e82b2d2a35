"""Language models: how fast text is generated, and what students lose, on the kit's 260,032-parameter Llama.

    python benchmarks/language.py --kit DIR --folder WORK              tokens per second; a table of perplexities
    python benchmarks/language.py --kit DIR --folder WORK --only speed
    python benchmarks/language.py --folder WORK --only memory          needs no kit; 12 GiB, some minutes of two cores

Speed: tokens per second of ``generator=self_generation`` beside a loop that writes one sample after the other with
transformers' ``generate()``, as published data pipelines do. Both draw from the whole vocabulary at temperature 1.

Perplexity: on real stories that nothing else reads. Rows differ in the text that students are made with: written by the
network itself, random tokens, and (as a bound) stories of the kit that are not among those of the evaluation. Seeds 0,
1, 2; mean and spread. The same settings in all rows, none chosen for this network. Texts are as long as those stories
(``--length 256``): positions that no text of a student reached lose more.

Memory: peak resident memory of a process that distils a Llama of 301.6 M parameters with random weights, a vocabulary
of 128,256 and texts of 512 tokens, one step of two texts: with logits of 128 tokens at a time and the teacher's cache,
and with a plain loop that holds the logits of teacher and student whole. One step, since memory does not grow after it.
``--shape small`` is a network of 16.5 M parameters with the same logits, for a machine without the time or the room.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import dfq
from dfq.dataset import SyntheticDataset
from dfq.scheme import FLOAT, Scheme, TensorScheme

G32 = {"granularity": "per_group", "group_size": 32}
ODD = {"*.down_proj": {"weight": {"group_size": 43}}}  # of its 172 inputs: no multiple of 32
KV4 = TensorScheme(4, False, "per_token")
KEYS4 = {"key_value": KV4, "key": TensorScheme(4, False, "per_channel", 32, dynamic=True)}
KV2 = {  # of its 8 values a token and head
    "key_value": TensorScheme(2, False, "per_group", 8, dynamic=True),
    "key": TensorScheme(2, False, "per_channel", 32, dynamic=True),
}
SCHEMES = {
    "w4a16_g32": Scheme(TensorScheme(4, False, **G32), FLOAT, overrides=ODD),
    "w4a16_g32_float_zero": Scheme(TensorScheme(4, False, **G32, zero_point="float"), FLOAT, overrides=ODD),
    "w4a8kv4": Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8, True, "per_token"), key_value=KV4),
    "w4a8kv4_k32": Scheme(TensorScheme(4, False, "per_channel"), TensorScheme(8, True, "per_token"), **KEYS4),
    "w4a8kv4_k32_float_zero": Scheme(
        TensorScheme(4, False, "per_channel", zero_point="float"), TensorScheme(8, True, "per_token"), **KEYS4
    ),
    "w4a16kv2_g32": Scheme(TensorScheme(4, False, **G32), FLOAT, overrides=ODD, **KV2),
    "w2a16_g32": Scheme(TensorScheme(2, False, **G32), FLOAT, overrides=ODD),
    "w2a16_g32_float_zero": Scheme(TensorScheme(2, False, **G32, zero_point="float"), FLOAT, overrides=ODD),
    "wternary_a16_g32": Scheme(TensorScheme(grid="ternary", **G32), FLOAT, overrides=ODD),
}
RECONSTRUCTION = {"_target_": "dfq.algorithms.reconstruction.Reconstruction", "iterations": 1500}  # of 1,024 samples
BLOCK_AP = {"_target_": "dfq.algorithms.block_ap.BlockAP", "iterations": 600, "num_samples": 512}
QUANTEASE = {"_target_": "dfq.algorithms.quantease.QuantEase", "propagate": 1.0}
YAQA = {"_target_": "dfq.algorithms.yaqa.YAQA", "propagate": 1.0}
DISTILLATION = {"max_steps": 600, "batch_size": 16, "weight_lr": 0.02}
LONG = {**DISTILLATION, "max_steps": 9000, "bias_lr": 0.005, "gradient": "stable", "patience": None}
ROUNDING = {"_target_": "dfq.algorithms.e2e_rounding.E2ERounding"}
FINE = {"max_steps": 800, "batch_size": 8, "bias_lr": 0.004, "gradient": "stable", "patience": None}  # of 256 tokens
AGAIN = {**LONG, "max_steps": 2000, "weight_lr": 0.01, "bias_lr": 0.003}  # rates rise once more, and fall
DISTILL = {"algorithm": "distillation", **DISTILLATION}
METHODS = {
    "nearest": {"algorithm": "round_to_nearest", "weight_quantizer": "min_max"},
    "hqq": {"algorithm": "hqq", "weight_quantizer": "min_max"},
    "clip_search": {"algorithm": "clip_search"},
    "neuqi": {"algorithm": "neuqi"},
    "awq": {"algorithm": "sequence", "steps": ["awq", "neuqi"]},
    "gptq": {"algorithm": "gptq"},
    "gptq_rsq": {"algorithm": "gptq", "token_weights": "attention"},
    "neuqi_gptq": {"algorithm": "sequence", "steps": ["neuqi", "gptq"]},
    "neuqi_quantease": {"algorithm": "sequence", "steps": ["neuqi", QUANTEASE]},
    "awq_quantease": {"algorithm": "sequence", "steps": ["awq", "neuqi", QUANTEASE]},
    "neuqi_yaqa": {"algorithm": "sequence", "steps": ["neuqi", YAQA]},
    "yaqa_e2e_rounding": {"algorithm": "sequence", "steps": ["neuqi", YAQA, ROUNDING]},
    "awq_yaqa_e2e_rounding": {"algorithm": "sequence", "steps": ["awq", "neuqi", YAQA, ROUNDING]},
    "gptq_norms": {"algorithm": "sequence", "steps": ["gptq", "norm_tweaking"]},
    "gptq_lqer": {"algorithm": "sequence", "steps": ["gptq", "lqer"]},
    "distillation": DISTILL,
    "tsld": {**DISTILL, "token_tau": 10.0},
    "off": {**DISTILL, "feature_weight": 1.0, "feature_loss": "cosine", "feature_places": "blocks"},
    "yaqa_distillation": {
        "algorithm": "sequence",
        "steps": ["neuqi", YAQA, {"_target_": "dfq.algorithms.distillation.Distillation", **FINE, "weight_lr": 0.01}],
    },
    "reconstruction": {"algorithm": "sequence", "steps": ["neuqi", RECONSTRUCTION]},
    "reconstruction_distillation": {
        "algorithm": "sequence",
        "steps": [
            "neuqi",
            RECONSTRUCTION,
            {"_target_": "dfq.algorithms.distillation.Distillation", **FINE, "weight_lr": 0.002},
        ],
    },
    "block_ap": {"algorithm": "sequence", "steps": ["neuqi", BLOCK_AP]},
    "block_ap_e2e_qp": {"algorithm": "sequence", "steps": ["neuqi", BLOCK_AP, "e2e_qp"]},
    "block_ap_distillation": {
        "algorithm": "sequence",
        "steps": ["neuqi", BLOCK_AP, {"_target_": "dfq.algorithms.distillation.Distillation", **DISTILLATION}],
    },
    "block_ap_distillation_long": {  # for --samples 32768
        "algorithm": "sequence",
        "steps": [
            "neuqi",
            BLOCK_AP,
            {"_target_": "dfq.algorithms.distillation.Distillation", **LONG},
            {"_target_": "dfq.algorithms.distillation.Distillation", **AGAIN},
        ],
    },
}
WITHOUT_TEXT = ("nearest", "hqq")
SOURCES = ("its own", "random", "sampled")


def speed(kit: Path, folder: Path, length: int, samples: int, batch_size: int, device: str) -> None:
    teacher = dfq.load_teacher("huggingface", name=str(kit / "stories260k"), length=length, device=device)
    settings = {"greedy_tokens": [0], "max_repetition": 1.0, "batch_size": batch_size}
    path = folder / f"speed_{length}_{samples}_{batch_size}_{os.getpid()}"
    dataset = dfq.generate(teacher, "self_generation", num_samples=samples, dataset_dir=path, **settings)
    mine = samples * length / dataset.seconds
    start, written = time.perf_counter(), 0
    torch.manual_seed(0)
    while written < 8 * length:  # eight samples say how fast it is
        first = torch.randint(3, teacher.input_spec.vocab_size, (1, 1)).to(teacher.device)
        ids = teacher.module.generate(
            torch.cat([torch.ones_like(first), first], 1),
            max_new_tokens=length - 2,
            min_new_tokens=length - 2,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=1,
        )
        written += ids.shape[1]
    loop = written / (time.perf_counter() - start)
    on = f"{torch.get_num_threads()} threads" if teacher.device.type == "cpu" else torch.cuda.get_device_name()
    print(f"{on}, samples of {length} tokens, batches of {batch_size}")
    print(f"  self_generation          {mine:10.0f} tokens per second")
    print(f"  one sample at a time     {loop:10.0f} tokens per second")
    print(f"  ratio                    {mine / loop:10.1f}")


def texts(teacher, kit: Path, folder: Path, seed: int, samples: int) -> dict[str, SyntheticDataset]:
    """Text of each kind, in the same store."""
    length = teacher.input_spec.length
    found = {
        "its own": dfq.generate(teacher, "self_generation", samples, folder / f"own_{samples}_{length}_{seed}", seed),
        "random": dfq.generate(teacher, "random_tokens", samples, folder / f"random_{samples}_{length}_{seed}", seed),
    }
    stories = json.loads((kit / "data/stories_sampled.json").read_text())["ids"]
    ids = torch.cat([torch.tensor(story) for story in stories])
    rows = ids[: len(ids) // length * length].view(-1, length)
    path = folder / f"sampled_{length}"
    real = SyntheticDataset.create(path, {"source": "stories_sampled"}, {"pixels": True, "labels": False})
    if not real.has_shard(0, len(rows)):
        real.write_shard(0, {"input_ids": rows}, 0.0)
    return found | {"sampled": real}


def key_of(scheme: str, method: str, source: str, samples: int, length: int, seed: int) -> str:
    """What a figure is remembered by: names, and a hash of what they stand for, so that none outlives its settings."""
    settings = json.dumps([SCHEMES[scheme].to_dict(), METHODS[method]], sort_keys=True)
    short = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return f"{scheme} {method} {source} {samples}x{length} {seed} {short}"


def perplexities(
    kit: Path,
    folder: Path,
    schemes: list[str],
    methods: list[str],
    sources: list[str],
    seeds: int,
    samples: int,
    length: int,
    device: str,
) -> None:
    teacher = dfq.load_teacher("huggingface", name=str(kit / "stories260k"), length=length, device=device)
    rows = json.loads((kit / "data/stories_tinystories.json").read_text())["ids"]
    padded = np.full((len(rows), max(map(len, rows))), -1)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "real_stories.npz"
    np.savez(path, input_ids=padded)
    known = folder / "perplexities.json"
    found: dict[str, list] = json.loads(known.read_text()) if known.exists() else {}

    def measured(key: str, make, prepare=lambda: None) -> None:
        if key not in found:
            prepare()  # writing texts is not what the minutes are of
            start = time.perf_counter()
            student = make()
            figures = dfq.evaluate(teacher, student, "tokens", path=str(path))
            role = "teacher" if student is None else "student"
            found[key] = [figures[role]["perplexity"], time.perf_counter() - start]
            known.write_text(json.dumps(found, indent=1))

    measured("float", lambda: None)
    base = found["float"][0]
    print(f"float: perplexity {base:.4f} on real stories")
    for scheme in schemes:
        for method in methods:
            for source in ["its own"] if method in WITHOUT_TEXT else sources:
                keys = []
                for seed in range(seeds if method not in WITHOUT_TEXT else 1):
                    keys.append(key_of(scheme, method, source, samples, length, seed))
                    written = partial(texts, teacher, kit, folder, seed, samples)
                    measured(
                        keys[-1],
                        lambda s=scheme, m=method, o=source, seed=seed, written=written: dfq.quantize(
                            teacher, written()[o], SCHEMES[s], seed=seed, **METHODS[m]
                        ),
                        written,
                    )
                values = [found[key][0] for key in keys]
                spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
                minutes = sum(found[key][1] for key in keys) / len(keys) / 60
                mean = statistics.fmean(values)
                print(
                    f"{scheme:18} {method:21} {source:9} {mean:9.4f}{spread}  ({100 * (mean / base - 1):+.1f} %)"
                    f"  {minutes:.1f} min"
                )


# ------------------------------------------------------------------------------------------------ memory

WAYS = {
    "chunks": "logits in chunks, teacher from its cache",
    "quantized": "the same, embeddings and head not trained",
    "low_rank": "the same, pairs of rank 16 trained in place of weights",
    "zeroth": "the same, no backward pass",
    "naive": "whole logits of teacher and student",
}
OPTIONS = {
    "chunks": {},
    "quantized": {"train_float": False},
    "low_rank": {"train_float": False, "low_rank": 16},
    "zeroth": {"train_float": False, "zeroth_order": True},
}
SHAPES = {
    "large": {"hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 14, "num_attention_heads": 12},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
VOCABULARY, LENGTH, TEXTS, CACHED = 128_256, 512, 2, 64


def memory(folder: Path, ways: list[str], shape: str) -> None:
    """One process for each way; figures of those measured before are read again."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / f"memory_{shape}.json"
    found = json.loads(known.read_text()) if known.exists() else {}
    for way in ways:
        if way not in found:
            command = [
                sys.executable,
                __file__,
                "--only",
                "memory",
                "--way",
                way,
                "--shape",
                shape,
                "--folder",
                str(folder),
            ]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[way] = json.loads(output.splitlines()[-1])
            known.write_text(json.dumps(found, indent=1))
        row = found[way]
        peak, before = row["peak_bytes"] / 2**30, row["before_bytes"] / 2**30
        minutes = row["seconds"] / 60
        print(f"{WAYS[way]:52} {peak:6.2f} GiB at most, {before:.2f} of them before  {minutes:.1f} min")


def memory_of(way: str, folder: Path, shape: str) -> None:
    """In a process of its own: prints peak and figures as json."""
    import transformers

    def peak() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=4, max_position_embeddings=LENGTH, **SHAPES[shape]
    )
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config)
    teacher = dfq.load_teacher(module, task="language_modeling", vocab_size=VOCABULARY, length=LENGTH, device="cpu")
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (TEXTS + 1, LENGTH), generator=rng)
    before, start = peak(), time.perf_counter()
    if way == "naive":
        naive_step(teacher, ids[:TEXTS])
    else:
        stored = torch.randn(TEXTS + 1, LENGTH, CACHED + 1, generator=rng).log_softmax(-1).sort(-1, descending=True)[0]
        first = torch.randint(VOCABULARY - CACHED, (TEXTS + 1, LENGTH, 1), generator=rng)
        shard = {"input_ids": ids, "teacher_ids": (first + torch.arange(CACHED)).int()}
        shard |= {"teacher_log_probs": stored[..., :CACHED].half(), "teacher_rest": stored[..., CACHED].half()}
        path = folder / f"memory_{way}_{os.getpid()}"
        dataset = SyntheticDataset.create(path, {"source": "random"}, {"pixels": False, "labels": False})
        dataset.write_shard(0, shard, 0.0)
        settings = {"max_steps": 1, "batch_size": TEXTS, "chunk_tokens": 128, "checks": 1, "patience": None}
        dfq.quantize(teacher, dataset, "w4a16_g32", algorithm="distillation", **settings, **OPTIONS[way])
    row = {"before_bytes": before, "peak_bytes": peak(), "seconds": time.perf_counter() - start}
    print(json.dumps(row))


def naive_step(teacher, ids: torch.Tensor) -> None:
    """A step as published loops have it: two forwards, KL of whole logits, AdamW on everything."""
    from torch.nn import functional as F

    from dfq.quantizers._observation import Observation
    from dfq.settings import resolve
    from dfq.student import Student

    student = Student.from_teacher(teacher, Scheme(TensorScheme(4, True, **G32), FLOAT))
    ranges = resolve("quantizer", "min_max")
    for layer in student.layers.values():
        quantizer = layer.weight_quantizer
        quantizer.set_qparams(*ranges.qparams(Observation.of_tensor(quantizer.rows(layer.weight), 0), quantizer.scheme))
    student.module.requires_grad_(True)
    optimizer = torch.optim.AdamW(student.module.parameters(), lr=2e-5)
    with torch.no_grad():
        target = F.log_softmax(teacher(ids).logits.flatten(0, 1), -1)
    output = F.log_softmax(student.module(ids).logits.flatten(0, 1), -1)
    F.kl_div(output, target, reduction="batchmean", log_target=True).backward()
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kit", type=Path, help="folder of the evaluation kit, with stories260k/ and data/")
    parser.add_argument("--folder", type=Path, default=Path("outputs/language"))
    parser.add_argument("--only", choices=["speed", "perplexity", "memory"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of distilling, with --only memory")
    parser.add_argument("--shape", choices=SHAPES, default="large", help="of the network, with --only memory")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=256, help="tokens of a text; the real stories have 256")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--device", default="cpu", help="of speed and perplexities: cpu | cuda | mps | auto")
    args = parser.parse_args()
    if args.only == "memory":
        if args.way:
            memory_of(args.way, args.folder, args.shape)
        else:
            memory(args.folder, args.ways, args.shape)
        return
    if args.kit is None or not (args.kit / "stories260k").is_dir():
        print("language.py: skipped, give --kit DIR with the evaluation kit (stories260k/ in it)")
        return
    if args.only != "perplexity":
        speed(args.kit, args.folder, args.length, args.samples, args.batch_size, args.device)
    if args.only != "speed":
        rows = (args.schemes, args.methods, args.sources, args.seeds, args.samples, args.length)
        perplexities(args.kit, args.folder, *rows, args.device)


if __name__ == "__main__":
    main()
