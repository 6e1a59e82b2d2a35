"""What each rank of tests/test_trainer.py runs: ``python training_in_ranks.py FOLDER STRATEGY KIND [RANK STEP]``.

With RANK and STEP images are mirrored at random, and rank RANK (none for -1) is killed behind step STEP.
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from conftest import NETS, as_teacher

from dfq.algorithms.distillation import Distillation
from dfq.dataset import SyntheticDataset
from dfq.generators.self_generation import teacher_cache
from dfq.lightning.distillation import DistillationModule
from dfq.lightning.trainer import Training
from dfq.pipeline import quantize
from dfq.quantizers.min_max import MinMax
from dfq.ranks import from_environment
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student
from dfq.teacher import Teacher, TokenSpec

W3A8 = Scheme(TensorScheme(3, True, "per_channel"), TensorScheme(8))
W3 = Scheme(TensorScheme(3, True, "per_channel"), FLOAT, skip=())
SETTINGS = {"max_steps": 6, "checks": 2, "patience": None, "num_calibration_samples": 16, "flip": False}
SAMPLES = 44  # 39 to train on: two steps of 16, and a rest that waits


def llama():
    """Two layers, random weights."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=False,
        )  # fmt: skip
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return Teacher(module, "language_modeling", TokenSpec(50, 12), name="llama")


def teacher_of(kind):
    return as_teacher(NETS["plain"]()) if kind == "plain" else llama()


def dataset_of(folder, kind):
    """Made once, by whoever comes before the ranks; ``cached``: with what the teacher says, so that it need not run."""
    path = folder / f"{kind}_data"
    if path.exists():
        return SyntheticDataset(path)
    dataset = SyntheticDataset.create(path, {"seed": 0}, {"pixels": False, "labels": False})
    spec = teacher_of(kind).input_spec
    samples = spec.example(SAMPLES, torch.Generator().manual_seed(1))
    name = "input_ids" if isinstance(spec, TokenSpec) else "images"
    tensors = {name: samples}
    if name == "images":
        with torch.no_grad():
            tensors["logits"] = teacher_of(kind)(samples)
    if kind == "cached":
        tensors |= teacher_cache(teacher_of(kind), samples, 49)
    dataset.write_shard(0, tensors, 0.0)
    return SyntheticDataset(path)


def train(folder, strategy, kind, batch_size, **settings):
    """The student, as saved, and its state before its weights are rounded, which each rank also leaves in a file."""
    settings = {**SETTINGS, "feature_weight": 0.0, "batch_size": batch_size, **settings}
    training = Training(strategy, 1 if strategy == "single" else 2)
    states, freeze = [], Student.freeze

    def keep(student):
        states.append({k: v.clone() for k, v in student.module.state_dict().items() if v.is_floating_point()})
        torch.save(states[0], folder / f"{kind}_{strategy}_{from_environment()[0]}.pt")
        return freeze(student)

    with mock.patch.object(Student, "freeze", keep):
        student, _ = quantize(
            teacher_of(kind),
            dataset_of(folder, kind),
            W3A8 if kind == "plain" else W3,
            Distillation(**settings),
            MinMax(),
            MinMax(),
            0,
            folder / f"{kind}_{strategy}",
            training,
        )
    return student, states[0]


def killed_behind(step):
    """Of this process's training."""
    end = DistillationModule.on_train_batch_start

    def start(module, *args):
        if module.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return end(module, *args)

    return mock.patch.object(DistillationModule, "on_train_batch_start", start)


if __name__ == "__main__":
    folder, strategy, kind, *killed = sys.argv[1:]
    with killed_behind(int(killed[1])) if int(killed[0] if killed else -1) == from_environment()[0] else nullcontext():
        train(Path(folder), strategy, kind, 8, flip=bool(killed))
