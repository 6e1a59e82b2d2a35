"""Distillation of language models: divergences by their formulas, in chunks as in one piece, from a cache; training."""

import math

import pytest
import torch
from conftest import language
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfq
from dfq.dataset import SyntheticDataset
from dfq.generators.self_generation import SelfGeneration, teacher_cache
from dfq.lightning.tokens import TokenDistillationModule, chunked_divergence, find_head, hidden
from dfq.losses.token_divergence import buckets, divergence
from dfq.pipeline import generate
from dfq.scheme import FLOAT, Scheme, TensorScheme

RNG = torch.Generator().manual_seed(0)
KINDS = ["forward", "reverse", "jensen_shannon", "cakld", "top_k"]
W3 = Scheme(TensorScheme(3, True, "per_channel"), FLOAT, skip=())


def plainly(kind, p, q, b=0.3, k=3):
    """One token, entry by entry."""

    def kl(first, second):
        return sum(x * math.log(x / y) for x, y in zip(first, second, strict=True))

    if kind == "top_k":
        best = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        p, q = ([d[i] for i in best] + [sum(d) - sum(d[i] for i in best)] for d in (p, q))
    if kind in ("forward", "top_k"):
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    if kind == "cakld":
        return b * kl(q, p) + (1 - b) * kl(p, q)
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_by_their_formulas(kind):
    student, teacher = torch.randn(2, 6, 11, generator=RNG).double() * 2
    mine, _ = chunked_divergence(student, nn.Identity(), teacher, nn.Identity(), kind, 4, 3, 0.3)
    rows = zip(teacher.softmax(-1).tolist(), student.softmax(-1).tolist(), strict=True)
    assert float(mine) == pytest.approx(sum(plainly(kind, p, q) for p, q in rows) / 6, rel=1e-4)
    same = chunked_divergence(teacher, nn.Identity(), teacher, nn.Identity(), kind, 4, 3, 0.3)
    assert float(same[0]) == pytest.approx(0, abs=1e-6) and float(same[1]) == 1


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_in_chunks_as_in_one_piece_and_logits_never_stand_whole(kind, cached):
    """The same loss and gradients; no tensor is as large as the logits of more than a chunk."""
    tokens, width, vocabulary, chunk = 96, 8, 700, 12
    heads = [nn.Linear(width, vocabulary) for _ in range(2)]
    x, y = torch.randn(2, tokens, width, generator=RNG)
    theirs = y
    if cached:
        log_p = heads[1](y).detach().log_softmax(-1)
        values, ids = log_p.topk(16, dim=-1)
        theirs = (ids.int(), values.half(), torch.log1p(-values.exp().sum(-1)).half())
    found = []
    for size in (chunk, tokens):
        hidden_states = x.clone().requires_grad_()
        heads[0].zero_grad()
        with Sizes() as sizes:
            loss, agreement = chunked_divergence(hidden_states, heads[0], theirs, heads[1], kind, size, 16)
            loss.backward()
        found.append((loss.detach(), agreement, hidden_states.grad, heads[0].weight.grad.clone(), sizes.largest))
    for mine, whole in zip(found[0][:4], found[1][:4], strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-6)
    assert found[0][4] == chunk * vocabulary and found[1][4] == tokens * vocabulary


def test_a_cache_tells_the_same_as_the_teacher_up_to_what_is_within_the_rest():
    teacher, ids = language(), torch.randint(30, (4, 12), generator=RNG)
    student = language()
    with torch.no_grad():
        student.module.head.weight.add_(torch.randn(student.module.head.weight.shape, generator=RNG) * 0.2)
        p, q = (model.module(ids).flatten(0, 1).log_softmax(-1) for model in (teacher, student))
    exact = float(divergence(q, p).mean())
    errors = []
    for size in (4, 12, 29):
        stored = {name: tensor.flatten(0, 1) for name, tensor in teacher_cache(teacher, ids, size).items()}
        found, _ = chunked_divergence(q, nn.Identity(), tuple(stored.values()), nn.Identity())
        assert float(found) <= exact + 2e-4
        errors.append(exact - float(found))
    assert errors[0] > errors[1] > abs(errors[2]) - 2e-4 and abs(errors[2]) < 2e-3 * max(exact, 1)
    assert torch.allclose(buckets(p, p.topk(5).indices).exp().sum(-1), torch.ones(48), atol=1e-5)


def test_the_head_is_found_and_not_run():
    teacher = language()
    assert find_head(teacher) == "head"
    ids = teacher.example(3)
    with torch.no_grad():
        assert torch.equal(teacher.module.head(hidden(teacher.module, "head", ids)), teacher.module(ids))

    class Capped(type(teacher.module)):
        def forward(self, input_ids):
            return super().forward(input_ids).tanh()  # as Gemma 2 caps its logits

    capped = Capped()
    other = dfq.load_teacher(capped, "language_modeling", vocab_size=30, length=12, device="cpu")
    assert find_head(other) is None


# ------------------------------------------------------------------------------------------------ training


def trained(teacher, dataset, path=None, **settings):
    settings = {"max_steps": 40, "batch_size": 8, "checks": 2, "weight_lr": 0.05} | settings
    return dfq.quantize(teacher, dataset, W3, algorithm="distillation", student_dir=path, seed=1, **settings)


def far(teacher, student, ids):
    with torch.no_grad():
        return float(divergence(student(ids).log_softmax(-1), teacher(ids).log_softmax(-1)).mean())


@pytest.mark.parametrize("kind, cache", [(kind, 0) for kind in KINDS] + [("forward", 16)])
def test_students_come_closer(kind, cache, tmp_path):
    teacher = language()
    for parameter in teacher.module.parameters():
        parameter.data.mul_(2.5)  # not all tokens alike
    generator = SelfGeneration(batch_size=32, cache_teacher=cache, max_repetition=1.0)
    dataset = generate(teacher, generator, 64, 0, tmp_path / "d")
    ids = generate(teacher, SelfGeneration(max_repetition=1.0), 32, 5, tmp_path / "other").samples()
    nearest = dfq.quantize(teacher, dataset, W3, algorithm="round_to_nearest")
    student = trained(teacher, dataset, divergence=kind, top_k=8, chunk_tokens=200, feature_weight=0.0)
    assert far(teacher, student, ids) < 0.85 * far(teacher, nearest, ids)


def test_with_a_cache_the_teacher_does_not_run(tmp_path, monkeypatch):
    teacher = language()
    dataset = generate(teacher, SelfGeneration(cache_teacher=8, max_repetition=1.0), 32, 0, tmp_path / "d")
    _ = teacher.dataflow
    forward, calls = type(teacher.module).forward, []
    monkeypatch.setattr(
        type(teacher.module), "forward", lambda self, ids: (calls.append(self is teacher.module), forward(self, ids))[1]
    )
    trained(teacher, dataset, max_steps=5)
    assert calls.count(True) <= 2, "to find its head, and no more"


def test_padding_does_not_count(tmp_path):
    """What stands behind the end of a text changes nothing."""
    teacher, students = language(), []
    ids = torch.randint(3, 30, (24, 12), generator=torch.Generator().manual_seed(3))
    counts = torch.randint(4, 13, (24,), generator=torch.Generator().manual_seed(4))
    for padding in (0, 2):
        padded = torch.where(torch.arange(12) < counts[:, None], ids, padding)
        dataset = SyntheticDataset.create(tmp_path / str(padding), {"seed": 0}, {"pixels": False, "labels": False})
        dataset.write_shard(0, {"input_ids": padded, "num_tokens": counts}, 0.0)
        students.append(trained(teacher, dataset, max_steps=6, feature_weight=0.0))
    for name, layer in students[0].layers.items():
        torch.testing.assert_close(layer.weight, students[1].layers[name].weight)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    teacher = language()
    dataset = generate(teacher, SelfGeneration(max_repetition=1.0), 48, 0, tmp_path / "d")
    settings = {"max_steps": 12, "checks": 3, "divergence": "cakld"}
    whole = trained(teacher, dataset, tmp_path / "whole", **settings)
    step, calls = TokenDistillationModule.training_step, []

    def killed(self, batch, index):
        calls.append(index)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(TokenDistillationModule, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(teacher, dataset, tmp_path / "killed", **settings)
    again = trained(teacher, dataset, tmp_path / "killed", **settings)
    for name, layer in whole.layers.items():
        assert torch.equal(layer.weight, again.layers[name].weight)
