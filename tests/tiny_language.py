"""Language models of transformers with random weights, large enough that their outputs depend on their inputs."""

import pytest
import torch

import dfq
from dfq.generators.self_generation import SelfGeneration
from dfq.pipeline import generate
from dfq.quantizers.min_max import MinMax

transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def random_teacher(config, seed=0, length=12, norms=True):
    """A teacher of ``config``; ``norms``: gains of norms are not all one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.AutoModelForCausalLM.from_config(config)
        for key, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(4)
            elif norms and "norm" in key:
                parameter.data.add_(torch.rand(parameter.shape) - 0.5)
    return dfq.load_teacher(module, "language_modeling", vocab_size=config.vocab_size, length=length, device="cpu")


def tiny_llama():
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    return random_teacher(config, length=16, norms=False)


def own_text(teacher, path):
    """64 texts that it has written itself, stored in ``path``."""
    return generate(teacher, SelfGeneration(max_repetition=1.0), 64, 0, path)


def run(algorithm, student, teacher, dataset, work_dir):
    """The student, when the algorithm has done its part in a folder that it goes on from."""
    work_dir.mkdir(exist_ok=True)
    algorithm.quantize(student, teacher, dataset, MinMax(), MinMax(), 0, work_dir)
    return student


def kl(teacher, student):
    """The student's divergence on 16 random texts."""
    task = dfq.settings.resolve("task", "language_modeling")
    ids = teacher.input_spec.example(16, torch.Generator().manual_seed(7))
    with torch.no_grad():
        return float(task.distillation_loss(task.raw_outputs(student, ids), task.raw_outputs(teacher, ids)))
