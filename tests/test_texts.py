"""Real text: files of token ids and of words against independent counts; how long a continuation stays the same."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import _Language, language

import dfq
from dfq import quality
from dfq.dataset import SyntheticDataset
from dfq.decoding import Decoder, greedy
from dfq.errors import UserError
from dfq.evaluation import Text, Tokens, continuation
from dfq.settings import resolve
from dfq.teacher import Teacher, TokenSpec

RNG = np.random.default_rng(0)
ROWS = [RNG.integers(0, 30, n) for n in (12, 3, 9, 1, 7)]


@pytest.fixture
def file(tmp_path):
    padded = np.full((len(ROWS), 12), -1)
    for row, ids in zip(padded, ROWS, strict=True):
        row[: len(ids)] = ids
    np.savez(tmp_path / "rows.npz", input_ids=padded)
    return str(tmp_path / "rows.npz")


def plainly(teacher, rows):
    """exp of the mean negative log-likelihood, row by row and token by token."""
    total = count = 0
    for row in rows:
        for t in range(1, len(row)):
            with torch.no_grad():
                log_probs = teacher.module(torch.tensor(np.array([row[:t]])))[0, -1].double().log_softmax(-1)
            total, count = total - float(log_probs[row[t]]), count + 1
    return math.exp(total / count)


def test_perplexity_of_rows_of_any_length(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    teacher = language()
    evaluation = Tokens(file, batch_size=2)
    assert evaluation.num_samples == 4, "a row of one token says nothing"
    found = dfq.evaluate(teacher, evaluation=evaluation)["teacher"]
    assert found == {"perplexity": pytest.approx(plainly(teacher, ROWS), rel=1e-5)}
    cut = dfq.evaluate(teacher, evaluation="tokens", path=file, length=4)["teacher"]["perplexity"]
    pieces = [row[i : i + 4] for row in ROWS for i in range(0, len(row), 4)]
    assert cut == pytest.approx(plainly(teacher, pieces), rel=1e-5)
    rows = evaluation.__class__(file, reference_path=file).reference_images(TokenSpec(30, 6), 3)
    whole = np.concatenate([row for row in ROWS if len(row) > 1])
    assert rows.shape == (3, 6) and rows[0].tolist() == whole[:6].tolist()


def test_text_is_read_with_the_networks_own_tokenizer(tmp_path, monkeypatch):
    from test_contracts import word_tokenizer

    monkeypatch.chdir(tmp_path)
    folder = word_tokenizer(tmp_path / "tokenizer")
    teacher = language()
    (tmp_path / "a.txt").write_text("a b a b b a " * 5)
    with pytest.raises(UserError) as error:
        dfq.evaluate(teacher, evaluation="text", path="a.txt")
    assert str(error.value) == (
        "got evaluation=text and language, which comes without a tokenizer; allowed: evaluation=tokens, or "
        "evaluation.tokenizer=FOLDER"
    )
    ids = np.array([1, 2, 1, 2, 2, 1] * 5)
    found = dfq.evaluate(teacher, evaluation="text", path="a.txt", tokenizer=folder)["teacher"]["perplexity"]
    assert found == pytest.approx(plainly(teacher, [ids[:12], ids[12:24], ids[24:]]), rel=1e-5)
    lines = [{"text": "a b a"}, {"text": "b b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = dfq.evaluate(teacher, evaluation="text", path="a.jsonl", tokenizer=folder)["teacher"]["perplexity"]
    assert found == pytest.approx(plainly(teacher, [np.array([1, 2, 1]), np.array([2, 2])]), rel=1e-5)
    teacher.module.config = type("Config", (), {"_name_or_path": folder})()
    own = Text(path="a.txt").for_teacher(teacher)
    assert own.tokenizer == folder and own.length == 12


def test_a_text_goes_on_the_same_until_the_first_other_token():
    teacher, student = language(), language()
    task = resolve("task", "language_modeling")
    ids = teacher.input_spec.example(20, torch.Generator().manual_seed(0))
    assert continuation(teacher, teacher, task, ids) == {"match_length": 9.0, "num_tokens": 9}
    with torch.no_grad():
        student.module.head.bias[:15] += 0.5
    found = continuation(teacher, student, task, ids)
    texts = []
    for model in (teacher, student):
        rows = ids[:, :3]
        for _ in range(9):
            with torch.no_grad():
                rows = torch.cat([rows, model.module(rows)[:, -1].argmax(-1)[:, None]], 1)
        texts.append(rows[:, 3:].tolist())
    same = [next((i for i in range(9) if a[i] != b[i]), 9) for a, b in zip(*texts, strict=True)]
    assert found["match_length"] == pytest.approx(sum(same) / 20) and 0 < found["match_length"] < 9


def test_keys_and_values_that_are_kept_change_nothing():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    teacher = Teacher(transformers.LlamaForCausalLM(config), "language_modeling", TokenSpec(30, 12))
    task, ids = resolve("task", "language_modeling"), torch.randint(30, (5, 4))
    decoder = Decoder(teacher.module, lambda x: task.raw_outputs(teacher, x), teacher.device)
    assert decoder.keeps
    kept = greedy(decoder, ids, 8)
    plain = Decoder(teacher.module, lambda x: task.raw_outputs(teacher, x), teacher.device)
    plain.keeps = False
    assert torch.equal(greedy(plain, ids, 8), kept)


@pytest.mark.parametrize("answer", [lambda logits: logits, lambda logits: (logits, None)])
def test_a_network_with_arguments_of_these_names_and_answers_of_its_own(answer):
    class Own(_Language):
        def forward(self, ids, past_key_values=None, use_cache=False):
            return answer(super().forward(ids))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Teacher(Own(), "language_modeling", TokenSpec(30, 12), name="own")
    task, ids = resolve("task", "language_modeling"), teacher.example()[:, :4]
    wanted = ids
    with torch.no_grad():
        for _ in range(3):
            wanted = torch.cat([wanted, task.raw_outputs(teacher, wanted)[:, -1:].argmax(-1)], 1)
    found = greedy(Decoder(teacher.module, lambda x: task.raw_outputs(teacher, x), teacher.device), ids, 3)
    assert torch.equal(found, wanted[:, 4:])


def test_keys_and_values_are_written_behind_those_that_are_there():
    """The same numbers as transformers' own cache: over a border of the memory, with rows and tokens left out."""
    transformers = pytest.importorskip("transformers")
    from dfq._growing import LEAST, GrowingLayer, make_room

    torch.manual_seed(0)
    caches = plain, growing = transformers.DynamicCache(), transformers.DynamicCache()
    memory = []
    for _ in range(LEAST + 10):
        step(caches, 4)
        make_room(growing)
        assert [type(layer) for layer in growing.layers] == [GrowingLayer] * 2
        memory.append(growing.layers[0].keys.data_ptr())
    assert len(set(memory[1:])) == 2  # one border, and no new memory at any other token
    for cache in caches:
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        cache.crop(-10)
        assert cache.get_seq_length() == LEAST
    held = plain.layers[0].keys.clone()
    for rows in (held, growing.layers[0].keys):
        step(caches, 3)  # in the place of the ten
        assert torch.equal(rows, held)


def test_as_much_room_as_there_will_be():
    transformers = pytest.importorskip("transformers")
    from dfq._growing import make_room

    caches, memory = (transformers.DynamicCache(), transformers.DynamicCache()), []
    for _ in range(8):
        step(caches, 2)
        make_room(caches[1], 6)
        memory.append(caches[1].layers[0].keys)
    assert len({keys.data_ptr() for keys in memory[1:6]}) == 1
    assert memory[5].untyped_storage().nbytes() == memory[5].nbytes, "no more than that"
    assert memory[6].data_ptr() == memory[7].data_ptr() != memory[5].data_ptr()  # and yet no end


def step(caches, rows):
    """One token more in two layers; what both caches hold is the same."""
    keys, values = torch.randn(2, rows, 2, 1, 8)
    for layer in (0, 1):
        wanted, found = (cache.update(keys * (layer + 1), values, layer) for cache in caches)
        assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))


def test_layers_with_a_window_keep_their_own_cache():
    transformers = pytest.importorskip("transformers")
    from dfq._growing import make_room

    cache = transformers.DynamicCache(config=transformers.MistralConfig(sliding_window=4, num_hidden_layers=1))
    cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
    before = cache.layers[0]
    make_room(cache)
    assert cache.layers[0] is before


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_of_json_with_other_ends_of_lines_in_them(mark, tmp_path):
    """U+2028 and the like are written as they are by json.dumps(ensure_ascii=False), pandas and datasets."""
    from test_contracts import word_tokenizer

    folder = word_tokenizer(tmp_path / "tokenizer")
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ("a\u2028b\x85a", "b b"))
    (tmp_path / "a.jsonl").write_text(mark + content, encoding="utf-8")
    rows = Text(path=str(tmp_path / "a.jsonl"), tokenizer=folder)._rows(str(tmp_path / "a.jsonl"))
    assert [row.tolist() for row in rows] == [[1, 2, 1], [2, 2]]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a b"}\n{"text": null}', "with 'None' for text; allowed: a string for text"),
        ('{"text": ["a", "b"]}', "with \"['a', 'b']\" for text; allowed: a string for text"),
        ('{"text": "a"}', "in which no row has a token to predict; allowed: rows of at least two tokens"),
    ],
)
def test_text_that_is_none(content, message, tmp_path, monkeypatch):
    from test_contracts import word_tokenizer

    monkeypatch.chdir(tmp_path)
    folder = word_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        dfq.evaluate(language(), evaluation="text", path="a.jsonl", tokenizer=folder)
    assert str(error.value).replace("a.jsonl, in", "a.jsonl in") == f"got a.jsonl {message}"


WRONG = [
    (
        {"labels": RNG.integers(0, 9, (2, 3))},
        "without input_ids; allowed: a .npz file with input_ids",
    ),
    ({"input_ids": np.zeros((2, 3))}, "with input_ids float64 [2, 3]; allowed: a .npz file"),
    ({"input_ids": np.zeros(3, int)}, "with input_ids int64 [3]; allowed: a .npz file"),
    ({"input_ids": np.array([[1, -1, 2]])}, "with rows that go on behind a negative number; allowed: a .npz file"),
    ({"input_ids": np.array([[1, 30]])}, "with id 30 and a network with a vocabulary of 30; allowed: ids from 0 to 29"),
]


@pytest.mark.parametrize("arrays, message", WRONG)
def test_files_that_do_not_fit(arrays, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **arrays)
    with pytest.raises(UserError) as error:
        dfq.evaluate(language(), evaluation="tokens", path="x.npz")
    assert str(error.value).startswith(f"got x.npz {message}")


def run_of_everything(teacher, dataset, path):
    """Figures of all that looks at whole logits of texts."""
    found = {"quality": quality.assess(teacher, dataset)["agreement"]}
    for algorithm, settings in {
        "hqq": {},
        "neuqi": {},
        "auto": {"rungs": ["round_to_nearest"], "budget": "60s"},
        "reconstruction": {"iterations": 2, "finish_iterations": 2, "bias_lr": 1e-3},
    }.items():
        student = dfq.quantize(teacher, dataset, "w4a8", algorithm=algorithm, **settings)
        report = dfq.evaluate(teacher, student, "tokens", dataset=dataset, path=path)
        found |= {f"{algorithm} kl": report["fidelity"]["kl"]} | report["student"]
    return found


def test_logits_of_a_few_texts_at_a_time(tmp_path, monkeypatch):
    """Those of a large vocabulary, for a batch of 16 to 64 texts, would take more memory than the network."""
    rows = torch.randint(30, (40, 12), generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "rows.npz", input_ids=rows.numpy())
    largest, found = [], []
    for most in (dfq.teacher.MOST_LOGITS, 30 * 12 * 2):  # of two texts
        teacher = language()
        monkeypatch.setattr(dfq.teacher, "MOST_LOGITS", most)
        dataset = SyntheticDataset.create(tmp_path / str(most), {"seed": 0}, {"pixels": False, "labels": False})
        dataset.write_shard(0, {"input_ids": rows}, 0.0)
        plain, seen = _Language.forward, []

        def noted(self, ids, plain=plain, seen=seen):
            logits = plain(self, ids)
            seen.append(logits.numel())
            return logits

        monkeypatch.setattr(_Language, "forward", noted)
        found.append(run_of_everything(teacher, dataset, str(tmp_path / "rows.npz")))
        largest.append(max(seen))
    assert largest[0] >= 16 * 12 * 30 and largest[1] == 2 * 12 * 30
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-3), name
