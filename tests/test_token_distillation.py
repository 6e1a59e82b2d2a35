"""Distillation of language models: divergences by their formulas, in chunks as in one piece, from a cache; training."""

import math

import numpy as np
import pytest
import torch
from conftest import language
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfq
from dfq.algorithms import distillation
from dfq.attention import AttentionRecord
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.generators.self_generation import SelfGeneration, teacher_cache
from dfq.lightning.tokens import (
    Head,
    TokenDistillationModule,
    chunked_divergence,
    find_head,
    hidden,
    next_tokens,
    teacher_nll,
)
from dfq.losses.token_divergence import buckets, divergence
from dfq.pipeline import generate
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.tasks.language_modeling import NO_LABEL

RNG = torch.Generator().manual_seed(0)
KINDS = ["forward", "reverse", "jensen_shannon", "cakld", "top_k"]
W3 = Scheme(TensorScheme(3, True, "per_channel"), FLOAT, skip=())
W2 = Scheme(TensorScheme(2, True, "per_channel"), FLOAT, skip=())


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
    mine, *_ = chunked_divergence(student, nn.Identity(), teacher, nn.Identity(), kind, 4, 3, 0.3)
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
            loss, agreement, _ = chunked_divergence(hidden_states, heads[0], theirs, heads[1], kind, size, 16)
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
        found, *_ = chunked_divergence(q, nn.Identity(), tuple(stored.values()), nn.Identity())
        assert float(found) <= exact + 2e-4
        errors.append(exact - float(found))
    assert errors[0] > errors[1] > abs(errors[2]) - 2e-4 and abs(errors[2]) < 2e-3 * max(exact, 1)
    assert torch.allclose(buckets(p, p.topk(5).indices).exp().sum(-1), torch.ones(48), atol=1e-5)


def test_top_k_of_a_larger_cache(tmp_path):
    """The same as of the teacher itself: what is beyond the k largest is one bucket."""
    teacher, ids = language(), torch.randint(30, (4, 12), generator=RNG)
    q = torch.randn(48, 30, generator=RNG).log_softmax(-1)
    with torch.no_grad():
        p = teacher.module(ids).flatten(0, 1).log_softmax(-1)
    cache = tuple(tensor.flatten(0, 1) for tensor in teacher_cache(teacher, ids, 12).values())
    exact = {k: float(chunked_divergence(q, nn.Identity(), p, nn.Identity(), "top_k", 7, k)[0]) for k in (2, 5, 12)}
    found = {k: float(chunked_divergence(q, nn.Identity(), cache, nn.Identity(), "top_k", 7, k)[0]) for k in exact}
    assert found == pytest.approx(exact, rel=5e-3) and exact[2] < 0.95 * exact[5] < 0.95 * exact[12]
    dataset = generate(teacher, SelfGeneration(cache_teacher=12, max_repetition=1.0), 32, 0, tmp_path / "d")
    assert message((teacher, dataset), divergence="top_k", top_k=13) == (
        "got algorithm.top_k=13 and a dataset with the teacher's 12 largest log-probabilities; allowed: "
        "algorithm.top_k from 1 to 12; give algorithm.top_k=12, or generate with generator.cache_teacher=13"
    )
    everything = generate(teacher, SelfGeneration(cache_teacher=99, max_repetition=1.0), 32, 0, tmp_path / "e")
    for data, top_k in ((dataset, 12), (everything, 64)):  # of all 30 tokens none is missing
        trained(teacher, data, max_steps=1, divergence="top_k", top_k=top_k)


def test_the_head_is_found_and_not_run(make_dataset, capsys):
    teacher = language()
    assert find_head(teacher) == Head("head")
    ids = teacher.example(3)
    with torch.no_grad():
        assert torch.equal(teacher.module.head(hidden(teacher.module, "head", ids)), teacher.module(ids))

    class Capped(type(teacher.module)):
        def forward(self, input_ids):
            return super().forward(input_ids).tanh()  # as Gemma 2 caps its logits

    capped = Capped()
    other = dfq.load_teacher(capped, "language_modeling", vocab_size=30, length=12, device="cpu")
    assert find_head(other) is None
    trained(other, make_dataset(other), max_steps=1)
    assert "distill: logits of Capped are no output of its last layer, so they stand whole" in capsys.readouterr().err


SHAPE = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
HEADS = {
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}, Head("lm_head", 0.125)),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}, Head("lm_head", 0.0625)),
    "gemma 2": ("Gemma2Config", {"final_logit_softcapping": 2.0, "head_dim": 8}, Head("lm_head", cap=2.0)),
}


@pytest.mark.parametrize("name", HEADS)
def test_logits_that_are_scaled_or_capped_do_not_stand_whole_either(name):
    from tiny_language import random_teacher, transformers

    kind, settings, wanted = HEADS[name]
    teacher = random_teacher(getattr(transformers, kind)(**SHAPE, num_key_value_heads=2, **settings))
    head = find_head(teacher)
    assert head is not None and (head.name, head.cap) == (wanted.name, wanted.cap)
    assert head.scale == pytest.approx(wanted.scale, rel=1e-5)
    ids = teacher.example(3)
    with torch.no_grad():
        logits = teacher(ids).logits
        found = head(teacher.module, hidden(teacher.module, head.name, ids))
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ training


def trained(teacher, dataset, path=None, scheme=W3, **settings):
    settings = {"max_steps": 40, "batch_size": 8, "checks": 2, "weight_lr": 0.05} | settings
    return dfq.quantize(teacher, dataset, scheme, algorithm="distillation", student_dir=path, seed=1, **settings)


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


@pytest.mark.parametrize("cache", [0, 8])
def test_with_a_cache_the_teacher_leaves_its_device(cache, tmp_path, monkeypatch):
    teacher, moves, seen = language(), [], []
    generator = SelfGeneration(cache_teacher=cache, max_repetition=1.0)
    dataset = generate(teacher, generator, 32, 0, tmp_path / "d")
    move, fit = nn.Module.to, distillation._fit

    def noted(module, *args, **kwargs):
        if module is teacher.module and args:
            moves.append(str(args[0]))
        return move(module, *args, **kwargs)

    def stopped(trainer, module, data, checkpoint):
        seen.append((list(moves), module.runs_teacher))
        fit(trainer, module, data, checkpoint)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "to", noted)
    monkeypatch.setattr(distillation, "_fit", stopped)
    trained(teacher, dataset, max_steps=2)
    assert seen == [(["cpu"], False) if cache else ([], True)]
    count = len(moves)
    teacher.device = torch.device("cpu", 0)  # where it has to come back to
    with pytest.raises(KeyboardInterrupt):
        trained(teacher, dataset, max_steps=2)
    assert moves[count:] == (["cpu", "cpu:0"] if cache else []), "back where it was, although the run was interrupted"


def test_with_a_cache_the_teacher_is_not_sharded(tmp_path, monkeypatch):
    from dfq.lightning import student_to_train

    class Mesh(dict):
        device_type = "cpu"
        get_local_rank, size = (lambda self: 0), (lambda self: 1)

    teacher, sharded = language(), []
    dataset = generate(teacher, SelfGeneration(cache_teacher=8, max_repetition=1.0), 32, 0, tmp_path / "d")
    module = TokenDistillationModule(student_to_train(teacher, dataset, W3), teacher)
    module.runs_teacher, module._device_mesh = False, Mesh(data_parallel=Mesh())
    monkeypatch.setattr("dfq.lightning.distillation.shard", lambda network, mesh: sharded.append(network))
    module.configure_model()
    assert sharded == [module.student_module] and module.fast_teacher == [teacher.module]
    assert teacher.module not in module.modules()


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


PADDED = {
    "calibration": {"algorithm": "round_to_nearest", "scheme": "w4a4"},
    "inputs": {"algorithm": "neuqi"},
    "gptq": {"algorithm": "gptq"},
    "blocks": {"algorithm": "block_ap", "iterations": 3, "batch_size": 8},
    "features": {"algorithm": "distillation", "max_steps": 3, "batch_size": 8, "feature_weight": 1.0},
    "affinity": {"algorithm": "distillation", "max_steps": 3, "feature_weight": 1.0, "feature_loss": "affinity"},
    "attention": {
        "algorithm": "distillation",
        "max_steps": 3,
        "attention_map_weight": 1.0,
        "attention_output_weight": 1,
    },
    "cakld": {"algorithm": "distillation", "max_steps": 3, "divergence": "cakld"},
    "whole": {
        "algorithm": "distillation",
        "max_steps": 3,
        "reverse_kl_weight": 1.0,
        "jensen_shannon_weight": 1.0,
        "logits_weight": 1.0,
        "label_weight": 1.0,
        "feature_weight": 1.0,
    },
    "whole_affinity": {
        "algorithm": "distillation",
        "max_steps": 3,
        "logits_weight": 1.0,
        "feature_weight": 1.0,
        "feature_loss": "affinity",
    },
}


@pytest.mark.parametrize("what", PADDED)
def test_padding_counts_nowhere(what, tmp_path):
    """Statistics of inputs, moments, outputs of blocks, every loss, and figures of fidelity."""
    teacher, found = attending(), []
    ids = torch.randint(3, 30, (40, 12), generator=torch.Generator().manual_seed(3))
    counts = torch.randint(4, 13, (40,), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():  # what stands there can't be overlooked
        teacher.module.tokens.weight[0] *= 5
    for padding in (0, 2):
        padded = torch.where(torch.arange(12) < counts[:, None], ids, padding)
        dataset = SyntheticDataset.create(tmp_path / str(padding), {"seed": 0}, {"pixels": False, "labels": False})
        dataset.write_shard(0, {"input_ids": padded, "num_tokens": counts}, 0.0)
        student = dfq.quantize(teacher, dataset, **{"scheme": W3, **PADDED[what]})
        figures = dfq.evaluate(teacher, student, dataset=dataset)["fidelity"]
        found.append((student.module.state_dict(), figures["kl"]))
    for name in found[0][0]:
        torch.testing.assert_close(found[0][0][name], found[1][0][name], msg=name)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


def test_texts_go_on_with_the_next_one_where_padding_would_be(tmp_path):
    dataset = SyntheticDataset.create(tmp_path / "d", {"seed": 0}, {"pixels": False, "labels": False})
    ids, counts = torch.arange(20).view(5, 4), torch.tensor([4, 2, 3, 1, 4])
    dataset.write_shard(0, {"input_ids": ids, "num_tokens": counts}, 0.0)
    assert dataset.without_padding([0, 4]).tolist() == [[0, 1, 2, 3], [16, 17, 18, 19]]
    assert dataset.without_padding([1, 2, 3]).tolist() == [[4, 5, 8, 9]], "10 and 12 are left over"
    assert dataset.without_padding([3, 1]).tolist() == [[12, 4, 5]], "less than a row in all"


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


# ------------------------------------------------------------------------------------------------ options


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [3, 100])
def test_scaled_tokens_and_the_text_itself_by_numpy(chunk):
    student, teacher = torch.randn(2, 7, 9, generator=RNG) * 2
    scales = torch.rand(7, generator=RNG)
    labels = torch.tensor([3, NO_LABEL, 0, 8, NO_LABEL, 2, 2])
    found, _, ntp = chunked_divergence(
        student, nn.Identity(), teacher, nn.Identity(), "forward", chunk, scales=scales, labels=labels
    )
    p, q = (log_softmax(x.double().numpy()) for x in (teacher, student))
    want = ((np.exp(p) * (p - q)).sum(-1) * scales.numpy()).sum() / 7
    assert float(found) == pytest.approx(want, rel=1e-5)
    there = [i for i, label in enumerate(labels.tolist()) if label != NO_LABEL]
    assert float(ntp) == pytest.approx(-np.mean([q[i, labels[i]] for i in there]), rel=1e-5)
    nll = teacher_nll(teacher, nn.Identity(), labels, chunk)
    expected = [-p[i, labels[i]] if i in there else 0 for i in range(7)]
    np.testing.assert_allclose(nll.numpy(), expected, rtol=1e-5)


def test_the_next_token_of_a_text_and_what_a_cache_says_of_it():
    ids = torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4]])
    known = torch.tensor([[True, True, True, False], [True] * 4])
    assert next_tokens(ids, known).tolist() == [[6, 7, NO_LABEL, NO_LABEL], [2, 3, 4, NO_LABEL]]
    stored = torch.tensor([[4, 1], [3, 0]]), torch.tensor([[-0.5, -1.5], [-0.1, -4.0]]), torch.tensor([-2.0, -3.0])
    found = teacher_nll(stored, nn.Identity(), torch.tensor([1, 2]), 8)
    assert found.tolist() == [1.5, 3.0], "the token's own, or that of all others together"


class Attending(nn.Module):
    """One layer of causal attention, fused or in two products."""

    def __init__(self, fused):
        super().__init__()
        self.tokens, self.qkv, self.head = nn.Embedding(30, 16), nn.Linear(16, 48), nn.Linear(16, 30)
        self.blocks, self.fused = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]), fused

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.mT / 8**0.5
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + y.transpose(1, 2).flatten(2)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


def attending(fused=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Attending(fused)
    for parameter in module.parameters():
        parameter.data.mul_(1.5)
    return dfq.load_teacher(module, "language_modeling", vocab_size=30, length=12, device="cpu")


def test_maps_and_outputs_of_attention_fused_or_not():
    records = []
    for fused in (True, False):
        teacher = attending(fused)
        with AttentionRecord() as record:
            teacher(teacher.example(3))
        records.append(record)
        assert [len(record.maps), len(record.outputs)] == [1, 1]
    for mine, other in zip(*((r.maps[0], r.outputs[0]) for r in records), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    assert torch.allclose(records[0].maps[0].sum(-1), torch.ones(3, 2, 12), atol=1e-5)
    assert records[0].maps[0].triu(1).abs().max() == 0


OPTIONS = {
    "tsld": {"token_tau": 1.0},
    "ntp": {"ntp_weight": 0.1},
    "attention": {"attention_map_weight": 1.0, "attention_output_weight": 1.0},
    "cosine": {"feature_loss": "cosine", "feature_places": "blocks", "feature_weight": 1.0},
    "low rank": {"low_rank": 4},
    "quantized layers alone": {"train_float": False},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A teacher with attention, text that it wrote for training, other text, and how far nearest rounding is off."""
    teacher, folder = attending(), tmp_path_factory.mktemp("written")
    dataset = generate(
        teacher, SelfGeneration(batch_size=128, greedy_tokens=(0,), max_repetition=1.0), 384, 0, folder / "d"
    )
    other = SelfGeneration(greedy_tokens=(0,), max_repetition=1.0)
    ids = generate(teacher, other, 64, 5, folder / "other").samples()
    nearest = dfq.quantize(teacher, dataset, W2, algorithm="round_to_nearest")
    return teacher, dataset, ids, far(teacher, nearest, ids)


@pytest.mark.parametrize("option", OPTIONS)
def test_students_come_closer_with_each_option(option, written):
    teacher, dataset, ids, before = written
    student = trained(teacher, dataset, scheme=W2, **{"feature_weight": 0.0, **OPTIONS[option]})
    assert far(teacher, student, ids) < 0.9 * before
    assert not any("low_rank" in name for name, _ in student.module.named_modules())


def test_layers_that_stay_float_are_left_alone_if_told(written):
    teacher, dataset, _, _ = written
    scheme = Scheme(W3.weight, FLOAT)  # embeddings and head stay float
    for trains in (True, False):
        student = dfq.quantize(
            teacher, dataset, scheme, algorithm="distillation", max_steps=3, batch_size=8, checks=1, train_float=trains
        )
        same = [torch.equal(getattr(student.module, name).weight, getattr(teacher.module, name).weight)
                for name in ("tokens", "head")]  # fmt: skip
        assert same == [not trains] * 2


def test_merged_weights_are_the_trained_forward(written):
    """W + B A on the grid that was trained, bit for bit; W itself never moves."""
    from dfq.algorithms.distillation import _add_low_rank, _merge_low_rank
    from dfq.student import Student

    teacher, dataset, ids, _ = written
    student = dfq.quantize(teacher, dataset, W3, algorithm="round_to_nearest")
    fresh = Student.from_teacher(teacher, W3)
    for name, layer in fresh.layers.items():
        layer.weight_quantizer.set_qparams(
            student.layers[name].weight_quantizer.scale, student.layers[name].weight_quantizer.zero_point
        )
        layer.input_quantizer.enabled = True
    _add_low_rank(fresh, 3, 0)
    plain = fresh(ids)
    for layer in fresh.layers.values():
        layer.low_rank.b.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    weights = {name: layer.weight.clone() for name, layer in fresh.layers.items()}
    pairs = {name: (layer.low_rank.b @ layer.low_rank.a).detach() for name, layer in fresh.layers.items()}
    running = fresh(ids)
    assert not torch.equal(running, plain)
    _merge_low_rank(fresh)
    assert torch.equal(fresh(ids), running)
    for name, layer in fresh.layers.items():
        assert torch.equal(layer.weight, weights[name] + pairs[name])
    assert torch.equal(fresh.freeze()(ids), running)


def test_no_backward_pass_with_zeroth_order(written, monkeypatch):
    teacher, dataset, ids, before = written
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass"))
    settings = {"zeroth_order": True, "max_steps": 80, "feature_weight": 0.0, "batch_size": 32, "checks": 2}
    students = [trained(teacher, dataset, scheme=W2, zeroth_rate=0.1, **settings) for _ in range(2)]
    assert far(teacher, students[0], ids) < 0.97 * before
    for name, layer in students[0].layers.items():
        assert torch.equal(layer.weight, students[1].layers[name].weight)


def message(written, **settings):
    teacher, dataset = written[:2]
    with pytest.raises(UserError) as error:
        trained(teacher, dataset, **settings)
    return str(error.value)


def test_what_does_not_go_together(written, make_teacher, make_dataset):
    assert message(written, ntp_weight=0.5, logits_weight=1.0) == (
        "got algorithm.ntp_weight=0.5 and Attending; allowed: a language model, and no loss of another kind "
        "(reverse_kl_weight, logits_weight, intervention, ...); leave algorithm.ntp_weight away"
    )
    assert message(written, low_rank=2, dampen=0.1) == (
        "got algorithm.low_rank=2 and algorithm.dampen=0.1; allowed: one of the two; weights stay what they are with "
        "low_rank"
    )
    assert message(written, zeroth_order=True, balance="learned") == (
        "got algorithm.zeroth_order=true and algorithm.balance=learned; allowed: losses and schedules that need no "
        "gradient; leave algorithm.balance away"
    )
    vision = make_teacher()
    assert message((vision, make_dataset(vision)), token_tau=10.0).startswith("got algorithm.token_tau=10.0 and plain")
    plain = language()
    dataset = make_dataset(plain, name="plain")
    assert message((plain, dataset), attention_map_weight=1.0).startswith(
        "got algorithm.attention_map_weight or attention_output_weight and language, in which 0 attention products were"
    )
    assert message((plain, dataset), feature_loss="cosine") == (
        "got algorithm.feature_loss=cosine and language without algorithm.feature_weight; "
        "allowed: algorithm.feature_weight above 0; of language models features are compared on request alone"
    )
    assert message((plain, dataset), feature_places="blocks", feature_weight=1.0).startswith(
        "got algorithm.feature_places=blocks and language, which has no list of blocks with outputs of one shape"
    )


CACHE_LACKS = {
    "temperature": (2.0, "distributions are stored at a temperature of 1"),
    "feature_weight": (1.0, "features are not stored"),
    "attention_output_weight": (1.0, "what attention does is not stored"),
}


@pytest.mark.parametrize("name", CACHE_LACKS)
def test_what_is_not_in_a_cache(name, tmp_path):
    """Dropped without a word, or taken from a distribution of another temperature, it would be another training."""
    teacher, (value, reason) = attending(), CACHE_LACKS[name]
    dataset = generate(teacher, SelfGeneration(cache_teacher=8, max_repetition=1.0), 32, 0, tmp_path / "d")
    assert message((teacher, dataset), **{name: value}) == (
        f"got algorithm.{name}={value} and a dataset with the teacher's cache; allowed: a dataset without it: {reason}"
        f"; leave algorithm.{name} away, or generate with generator.cache_teacher=0"
    )


def test_a_cache_asks_for_what_the_teacher_asks_for(tmp_path, monkeypatch):
    """With all but one token stored: the same loss, and nothing by default that a cache does not tell."""
    teacher, losses, step = language(), [], TokenDistillationModule.step_loss
    monkeypatch.setattr(
        TokenDistillationModule, "step_loss", lambda self, batch: (losses.append(step(self, batch)), losses[-1])[1]
    )
    for cache in (0, 29):
        generator = SelfGeneration(cache_teacher=cache, max_repetition=1.0)
        trained(teacher, generate(teacher, generator, 32, 0, tmp_path / str(cache)), max_steps=1)
    live, cached = (float(loss.detach()) for loss in losses)
    assert live > 1e-3 and cached == pytest.approx(live, rel=0.02)
