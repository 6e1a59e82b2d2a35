"""Text that a network writes itself: against a plain loop, whatever the batches are; beginnings, gates, mistakes."""

import json
import math
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfq
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.generators._base import dataset_rng, sample_rng
from dfq.generators.self_generation import (
    SelfGeneration,
    _beginnings,
    decide,
    read_prompts,
    repetition,
    teacher_cache,
)
from dfq.pipeline import generate
from dfq.settings import resolve
from dfq.teacher import Teacher, TokenSpec

transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama():
    """Random weights, large enough that the next token is not just any."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        module = transformers.LlamaForCausalLM(config)
        for parameter in module.parameters():
            parameter.data.mul_(4)
    return Teacher(module, "language_modeling", TokenSpec(64, 20), name="llama")


@pytest.fixture
def named(llama, tmp_path):
    """The same with a tokenizer of its own: id 5 is a byte, 6 and 7 are free, 8 is Cyrillic, 9 half a letter."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "<s>", "</s>", "▁a", "▁b", "<0x41>", "<unused3>", "<|reserved_special_token_7|>", "▁жар"]
    words += [f"▁w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(64 - len(words) - 4)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}▁wa▁wb {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}▁wc{% endif %}{% if enable_thinking %}▁wd{% endif %}"
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def made(teacher, indices, seed=3, **settings):
    return SelfGeneration(**settings).make(teacher, indices, seed, lambda amount: None)


def plainly(teacher, index, seed, first, greedy=(2, 3, 4), temperature=1.0):
    """One sample, written token by token without a cache and without a batch."""
    length = teacher.input_spec.length
    numbers = torch.rand(length + 2, generator=sample_rng(seed, index), dtype=torch.float64).tolist()
    num_greedy = greedy[int(numbers[0] * len(greedy))]
    ids, forced = [1, first], []
    while len(ids) < length:
        if forced:
            ids.append(forced.pop())
            continue
        with torch.no_grad():
            logits = teacher.module(torch.tensor([ids])).logits[0, -1].double()
        if len(ids) < 2 + num_greedy:
            ids.append(int(logits.argmax()))
        else:
            u, total, token = numbers[2 + len(ids)], 0.0, -1
            for p in (logits / temperature).softmax(-1).tolist():
                total, token = total + p, token + 1
                if u < total:
                    break
            ids.append(token)
        if ids[-1] == 2:
            forced = [1]
    return ids


def test_against_a_loop_that_writes_one_sample_at_a_time(llama):
    found = made(llama, range(12), max_repetition=1.0)["input_ids"]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3)).tolist()
    assert found.tolist() == [plainly(llama, i, 3, order[i]) for i in range(12)]


def test_a_sample_is_the_same_in_any_batch(llama, tmp_path):
    whole = generate(llama, SelfGeneration(batch_size=16), 24, 5, tmp_path / "whole")
    small = generate(llama, SelfGeneration(batch_size=5), 24, 5, tmp_path / "small")
    assert all(torch.equal(t, small.tensors()[name]) for name, t in whole.tensors().items())
    ready = SelfGeneration().prepare(llama, dataset_rng(5))
    alone = ready.make(llama, [17], 5, lambda amount: None)
    assert torch.equal(alone["input_ids"][0], whole[17]["input_ids"])
    assert whole.manifest["rejected"] == small.manifest["rejected"] and whole.manifest["tokens"] == 24 * 20


def test_a_killed_run_goes_on_bit_for_bit(llama, tmp_path, monkeypatch):
    generator = SelfGeneration(batch_size=4, cache_teacher=3, at_end="pad")
    whole = generate(llama, generator, 10, 3, tmp_path / "whole")
    make, calls = SelfGeneration.make, []

    def killed(self, teacher, indices, seed, advance):
        calls.append(indices)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(self, teacher, indices, seed, advance)

    with monkeypatch.context() as patch:
        patch.setattr(SelfGeneration, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(llama, generator, 10, 3, tmp_path / "killed")
    assert len(SyntheticDataset(tmp_path / "killed")) == 4
    again = generate(llama, generator, 10, 3, tmp_path / "killed")
    assert again.sha256 == whole.sha256 and again.manifest["rejected"] == whole.manifest["rejected"]


def test_what_a_row_by_itself_would_say_decides_where_it_is_close(llama, monkeypatch):
    """With a tie everywhere each token comes from a forward of one row: the same tokens."""
    found = made(llama, range(6))["input_ids"]
    monkeypatch.setattr("dfq.generators.self_generation.TIE", 10.0)
    assert torch.equal(made(llama, range(6))["input_ids"], found)


# ------------------------------------------------------------------------------------------------ drawing


def filtered(logits, temperature, top_k, top_p, min_p):
    """The probabilities that are left, by sorting and counting."""
    p = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = set(order[: top_k or len(p)]) & {i for i in order if p[i] >= min_p * p[order[0]]}
    mass = sum(p[i] for i in kept)
    before, left = 0.0, set()
    for i in order:
        if i in kept and (before < top_p or not left):
            left.add(i)
            before += p[i] / mass
    total = sum(p[i] for i in left)
    return [p[i] / total if i in left else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize(
    "top_k, top_p, min_p", [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (6, 0.7, 0.1)]
)
def test_drawing_has_the_probabilities_that_are_left(temperature, top_k, top_p, min_p):
    logits = [0.3, 2.0, -1.0, 1.1, 0.0, 1.7, -2.5, 0.9]
    wanted = filtered(logits, temperature, top_k, top_p, min_p)
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    rows = torch.tensor(logits).expand(4000, -1)
    tokens, margins = decide(
        rows, numbers, torch.full((4000,), temperature, dtype=torch.float64), torch.zeros(4000, dtype=torch.bool),
        top_k, top_p, min_p,
    )  # fmt: skip
    shares = torch.bincount(tokens, minlength=8) / 4000
    assert shares.tolist() == pytest.approx(wanted, abs=5e-4)
    assert (margins >= 0).all() and float(margins.max()) > 1e-3


def test_the_margin_says_how_far_another_token_is():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(200, -1)
    numbers = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones, greedy = torch.ones(200, dtype=torch.float64), torch.zeros(200, dtype=torch.bool)
    tokens, margins = decide(logits, numbers, ones, greedy)
    for shift in (-0.999, 0.999):
        moved = numbers + shift * margins
        assert torch.equal(decide(logits, moved.clamp(0, 1 - 1e-12), ones, greedy)[0], tokens)
    likeliest, gap = decide(logits, numbers, ones, ~greedy)
    assert likeliest.unique().tolist() == [2] and gap.unique().tolist() == [1.0]


def test_mixtures(llama):
    settings = {"greedy_tokens": (0, 6), "temperature": (0.01, 5.0), "max_repetition": 1.0}
    cold = made(llama, range(40), greedy_tokens=(19,), max_repetition=1.0)["input_ids"]
    found = made(llama, range(40), **settings)["input_ids"]
    same = (found == cold).sum(1)  # one in two is cold, and of the rest one in two has six greedy tokens
    assert 8 <= int((same == 20).sum()) <= 32 and int((same >= 8).sum()) < 40


# ------------------------------------------------------------------------------------------------ beginnings


def test_first_tokens(llama, named):
    uniform = made(llama, range(128), tokenizer=named, max_repetition=1.0)["input_ids"]
    counts = uniform[:, 1].bincount(minlength=64)
    ordinary = {3, 4, *range(8, 60)}
    assert (uniform[:, 0] == 1).all() and {i for i in range(64) if counts[i]} == ordinary
    assert set(counts[list(ordinary)].tolist()) <= {2, 3}, "each once in turn"
    stepped = made(llama, range(9), tokenizer=named, first="stepped")["input_ids"][:, 1].sort().values
    assert int(stepped.diff().min()) >= 3 and int(stepped.diff().max()) <= 13, "evenly spread"
    assert made(llama, range(3), tokenizer=named, scripts=("CYRILLIC",))["input_ids"][:, 1].tolist() == [8] * 3
    assert 8 not in made(llama, range(60), tokenizer=named, scripts=("latin",))["input_ids"][:, 1]
    assert made(llama, [0], tokenizer=named, first="begin", greedy_tokens=(0,))["input_ids"][0, 0] == 1
    assert made(llama, range(64), begin=False)["input_ids"][:, 0].sort().values.tolist() == list(range(64))


def test_prompts(llama, named, tmp_path):
    (tmp_path / "p.txt").write_text("▁a\n\n▁b\n")
    found = made(llama, range(4), tokenizer=named, first="prompts", prompts=str(tmp_path / "p.txt"))
    assert found["input_ids"][:, :2].tolist() == [[1, 3], [1, 4]] * 2


def test_prompts_with_other_ends_of_lines_in_them(tmp_path):
    prompts = ["a\u2028b", "c\x0cd"]
    (tmp_path / "p.txt").write_text("\ufeff" + "\r\n".join(prompts), encoding="utf-8", newline="")
    assert read_prompts(str(tmp_path / "p.txt")) == prompts
    lines = [json.dumps({"text": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.jsonl")) == prompts


def test_files_that_were_moved_are_the_same_files(llama, named, tmp_path):
    (tmp_path / "p.txt").write_text("▁a\n▁b\n")
    settings = {"first": "prompts", "prompts": str(tmp_path / "p.txt"), "tokenizer": named}
    written = generate(llama, SelfGeneration(batch_size=2, **settings), 2, 0, tmp_path / "d")
    manifest = (tmp_path / "d/manifest.json").read_text()
    assert (
        str(tmp_path) not in json.dumps(written.manifest["settings"])
        and r"\u2581a" not in manifest
        and "▁a" not in manifest
    )
    shutil.copytree(named, tmp_path / "moved/tokenizer")
    (tmp_path / "p.txt").rename(tmp_path / "moved/q.txt")
    moved = {"prompts": str(tmp_path / "moved/q.txt"), "tokenizer": str(tmp_path / "moved/tokenizer")}
    grown = generate(llama, SelfGeneration(batch_size=2, **settings | moved), 4, 0, tmp_path / "d")
    assert len(grown) == 4
    (tmp_path / "moved/q.txt").write_text("▁a\n▁w9\n")
    with pytest.raises(UserError, match=r"a dataset made with other settings \(prompts_sha256: there "):
        generate(llama, SelfGeneration(batch_size=2, **settings | moved), 6, 0, tmp_path / "d")


CHAT = "{% for m in messages %}<s> ▁w0 {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}▁w1 ▁w2"
CHAT += "{% if enable_thinking is defined and not enable_thinking %} ▁w3{% endif %}{% endif %}"


@pytest.fixture
def chatty(llama, tmp_path):
    """``chatty(template)``: settings of a tokenizer whose words ▁w0 to ▁w60 are the ids from 3 on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    def settings(template, **others):
        words = ["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(61))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        fast.chat_template = template
        fast.save_pretrained(tmp_path / "chatty")
        return {"tokenizer": str(tmp_path / "chatty"), "chat": True, "max_repetition": 1.0, **others}

    return settings


@pytest.mark.parametrize("thinking, behind", [(None, []), (True, []), (False, [6])])
def test_prompts_in_a_chat_template(thinking, behind, llama, chatty, tmp_path):
    lines = [{"messages": [{"role": "user", "content": "▁w7 ▁w8"}]}, {"text": "▁w9"}]
    asked = [{"role": "user", "content": "▁w7"}, {"role": "assistant", "content": "▁w8"}]
    lines.append({"messages": asked})  # an answer that goes on: no other is asked for
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = chatty(CHAT, first="prompts", prompts=str(tmp_path / "p.jsonl"), thinking=thinking)
    wanted = [[1, 3, 10, 11, 2, 4, 5, *behind], [1, 3, 12, 2, 4, 5, *behind], [1, 3, 10, 2, 1, 3, 11, 2]]
    assert _beginnings(SelfGeneration(**settings), llama, dataset_rng(0)).rows == wanted
    found = made(llama, range(6), **settings)["input_ids"].tolist()
    assert [row[: len(ids)] for row, ids in zip(found, wanted * 2, strict=True)] == wanted * 2


def turns_of(ids, prefix, answer, starts_in_answer=False):
    """How many words of users and answers there are in a row, if it is put together as the template has it."""
    ids, count, place, asks = list(ids), 0, 0 if starts_in_answer else len(prefix), not starts_in_answer
    assert ids[:place] == prefix[:place]
    while place < len(ids):
        end = next((i for i in range(place, len(ids)) if ids[i] == 2), len(ids))
        own = next((i for i in range(place, end) if asks and ids[i + 1 - len(answer) : i + 1] == answer), None)
        place = end + 1 if own is None else own + 1
        follows = ([] if own is not None else answer[answer[0] == 2 :]) if asks else prefix
        seen = ids[place : place + len(follows)]
        assert seen == follows[: len(seen)], (ids, place)
        place, count, asks = place + len(follows), count + 1, not asks
    return count


def test_conversations_that_the_network_writes_both_sides_of(llama, chatty):
    wide = Teacher(llama.module, "language_modeling", TokenSpec(64, 120), name="llama")
    settings = chatty(CHAT, first="begin")
    whole = made(wide, range(12), **settings)
    counts = [turns_of(row, [1, 3], [2, 4, 5]) for row in whole["input_ids"].tolist()]
    assert max(counts) >= 4 and (whole["num_tokens"] == 120).all()
    quiet = made(wide, range(12), **settings, thinking=False)["input_ids"].tolist()
    assert max(turns_of(row, [1, 3], [2, 4, 5, 6]) for row in quiet) >= 4
    padded = made(wide, range(12), **settings, at_end="pad")
    for row, part, count in zip(whole["input_ids"], padded["input_ids"].tolist(), padded["num_tokens"], strict=True):
        assert part[:count] == row[:count].tolist()
        assert count == 120 or turns_of(part[:count], [1, 3], [2, 4, 5]) == 2, "an answer, and the text is over"
    assert int(padded["num_tokens"].min()) < 120


def test_users_words_that_end_without_a_token_for_it(llama, chatty):
    """As between [INST] and [/INST]: the network writes the mark itself, or ends and it is written for it."""
    wide = Teacher(llama.module, "language_modeling", TokenSpec(64, 120), name="llama")
    template = "{% for m in messages %}<s> ▁w0 {{ m['content'] }} ▁w9{% endfor %}"
    rows = made(wide, range(16), **chatty(template, first="begin"))["input_ids"].tolist()
    assert max(turns_of(row, [1, 3], [12]) for row in rows) >= 4
    assert any(12 in row and 2 not in row[: row.index(12)] for row in rows), "one wrote the mark itself"


def test_behind_an_answer_to_a_prompt_another_conversation_begins(llama, chatty, tmp_path):
    (tmp_path / "p.txt").write_text("▁w7 ▁w8\n")
    wide = Teacher(llama.module, "language_modeling", TokenSpec(64, 120), name="llama")
    settings = chatty(CHAT, first="prompts", prompts=str(tmp_path / "p.txt"))
    for row in made(wide, range(8), **settings)["input_ids"].tolist():
        assert row[:7] == [1, 3, 10, 11, 2, 4, 5]
        turns_of(row[7:], [1, 3], [2, 4, 5], starts_in_answer=True)


def test_templates_without_the_users_words(llama, chatty):
    for template, told in (("▁w0", "leaves the user's words out"), ("{{ messages[0]['content'] }}", "no tokens")):
        with pytest.raises(UserError, match=told):
            made(llama, [0], **chatty(template, first="begin"))


@pytest.mark.parametrize(
    "line", ['{"text": 5}', '{"text": null}', '{"messages": []}', '{"messages": ["a"]}', '{"messages": "a"}',
             '{"messages": [{"content": "a"}]}', '{"messages": {"role": "user"}}']
)  # fmt: skip
def test_prompts_that_are_neither_text_nor_messages(line, llama, named, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "▁a"}\n' + line)
    with pytest.raises(UserError) as error:
        made(llama, range(2), tokenizer=named, first="prompts", prompts=str(path))
    assert str(error.value).startswith(f"got generator.prompts={path}, whose line 2 has ")
    assert str(error.value).endswith(
        ' for text or messages; allowed: a string for text, [{"role": ..., "content": ...}, ...] for messages'
    )


def test_an_empty_prompt(llama, named, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": ""}')
    settings = {"tokenizer": named, "first": "prompts", "prompts": str(tmp_path / "p.jsonl")}
    assert made(llama, [0], **settings)["input_ids"][0, 0] == 1
    with pytest.raises(UserError, match="a beginning of no tokens: an empty prompt or template, and no beginning-of-t"):
        made(llama, [0], **settings, begin=False)


def test_ids_that_the_network_does_not_have(llama, named, tmp_path):
    """A tokenizer to which tokens were added that the network was not, and a configuration's id from elsewhere."""
    small = Teacher(llama.module, "language_modeling", TokenSpec(40, 20), name="small")
    (tmp_path / "p.txt").write_text("▁a\n▁wyb\n")
    with pytest.raises(UserError) as error:
        made(small, [0], tokenizer=named, first="prompts", prompts=str(tmp_path / "p.txt"))
    last = "use the tokenizer of this network; where its beginning-of-text token is none, give generator.begin=false"
    assert str(error.value) == (
        f"got small with a vocabulary of 40, and id 59 in a beginning; allowed: ids from 0 to 39; {last}"
    )
    module = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1, n_positions=20)
    )
    other = Teacher(module, "language_modeling", TokenSpec(40, 20), name="gpt2")
    with pytest.raises(UserError, match="got gpt2 with a vocabulary of 40, and id 50256 in a beginning; "):
        made(other, [0])
    assert made(other, [0], begin=False)["input_ids"].shape == (1, 20)


def test_plain_words_are_no_free_places(llama, tmp_path):
    from tokenizers import Tokenizer, models

    from dfq.tokenizer import ordinary_ids

    words = ["special", "padding", "reserved", "pad", "Placeholder"]
    words += [
        "<pad>",
        "[unused12]",
        "<|reserved_special_token_7|>",
        "<extra_id_0>",
        "<special_3>",
        "[PAD]",
        "<unused9>",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="special"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert ordinary_ids(fast, len(words)) == [0, 1, 2, 3, 4]


def test_texts_that_end(llama):
    wide = Teacher(llama.module, "language_modeling", TokenSpec(64, 40))
    restarted = made(wide, range(30), max_repetition=1.0)
    padded = made(wide, range(30), max_repetition=1.0, at_end="pad")
    assert (restarted["num_tokens"] == 40).all() and int(padded["num_tokens"].min()) < 40
    for whole, part, count in zip(restarted["input_ids"], padded["input_ids"], padded["num_tokens"], strict=True):
        assert torch.equal(whole[:count], part[:count]) and (part[count:] == 0).all()
        if count < 40:
            assert part[count - 1] == 2 and whole[count] == 1, "another text begins"


# ------------------------------------------------------------------------------------------------ gates


def test_repetition():
    assert repetition(torch.arange(50)) == 0 and repetition(torch.tensor([1, 2, 3, 4])) == 0
    assert repetition(torch.tensor([7] * 13)) == pytest.approx(9 / 10)
    assert repetition(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)


def test_gates_turn_samples_away_and_count_them(llama, tmp_path):
    free = made(llama, range(20), max_repetition=1.0)
    with torch.no_grad():
        log_probs = llama.module(free["input_ids"]).logits.double().log_softmax(-1)
    each = log_probs[:, 1:-1].gather(2, free["input_ids"][:, 2:, None])[..., 0]
    mean = [float(each[i].mean()) if 2 not in row else math.nan for i, row in enumerate(free["input_ids"])]
    known = sorted(value for value in mean if not math.isnan(value))
    limit = (known[len(known) // 2] + known[len(known) // 2 - 1]) / 2
    gated = made(llama, range(20), max_repetition=1.0, min_likelihood=limit)
    for i in range(20):
        if not math.isnan(mean[i]):
            assert (gated["rejected"][i, 2] > 0) == (mean[i] < limit)
            assert torch.equal(gated["input_ids"][i], free["input_ids"][i]) == (mean[i] >= limit)
    dataset = generate(llama, SelfGeneration(max_likelihood=-50.0, attempts=2), 3, 0, tmp_path / "none")
    assert dataset.manifest["rejected"] == {"length": 0, "repetition": 0, "likelihood": 6}
    assert dataset.manifest["taken_as_they_are"] == 3


def test_short_texts_are_drawn_again(llama):
    wide = Teacher(llama.module, "language_modeling", TokenSpec(64, 40))
    settings = {"max_repetition": 1.0, "at_end": "pad", "attempts": 40, "greedy_tokens": (0,)}
    free, gated = made(wide, range(30), **settings), made(wide, range(30), **settings, min_tokens=20)
    short = free["num_tokens"] < 20
    assert 3 <= int(short.sum()) <= 27 and int(free["rejected"].sum()) == 0
    assert torch.equal(gated["rejected"][:, 0] > 0, short) and int(gated["rejected"][:, 1:].sum()) == 0
    assert int(gated["num_tokens"].min()) >= 20, "until one is long enough"
    assert torch.equal(gated["input_ids"][~short], free["input_ids"][~short])
    least = int(free["num_tokens"].min())
    assert int(made(wide, range(30), **settings, min_tokens=least)["rejected"].sum()) == 0, "as long as that is enough"


def test_texts_that_repeat_themselves_are_drawn_again(llama):
    wide = Teacher(llama.module, "language_modeling", TokenSpec(64, 40))
    cold = {"temperature": (0.3,), "attempts": 40}
    free = made(wide, range(30), **cold, max_repetition=1.0)
    shares = [repetition(row) for row in free["input_ids"]]
    limit = sorted(shares)[15]  # taken itself
    gated = made(wide, range(30), **cold, max_repetition=limit)
    repeats = torch.tensor([share > limit for share in shares])
    assert 3 <= int(repeats.sum()) <= 27
    assert torch.equal(gated["rejected"][:, 1] > 0, repeats)
    assert max(repetition(row) for row in gated["input_ids"]) <= limit
    assert torch.equal(gated["input_ids"][~repeats], free["input_ids"][~repeats])


def test_the_teachers_largest_log_probabilities(llama):
    found = made(llama, range(5), cache_teacher=6)
    with torch.no_grad():
        log_probs = llama.module(found["input_ids"]).logits.log_softmax(-1)
    values, indices = log_probs.topk(6)
    assert torch.equal(found["teacher_ids"].long(), indices)
    torch.testing.assert_close(found["teacher_log_probs"].float(), values, rtol=1e-3, atol=2e-3)
    rest = (1 - values.exp().sum(-1)).clamp(min=1e-9).log()
    torch.testing.assert_close(found["teacher_rest"].float(), rest, rtol=1e-2, atol=1e-2)
    everything = teacher_cache(llama, found["input_ids"], 1000)
    assert everything["teacher_ids"].shape == (5, 20, 64) and (everything["teacher_rest"] <= -20).all()


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_what_is_cached_is_found_for_some_tokens_at_a_time(tokens, llama, monkeypatch):
    """The same bits, and no more float64 than is said."""
    ids = llama.input_spec.example(3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = [llama.module(row).logits[0].double().log_softmax(-1) for row in ids.split(1)]
    values, indices = torch.stack(rows).topk(6, dim=-1)
    widths = []

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            widths.extend(t.numel() for t in tree_leaves(result) if getattr(t, "dtype", None) == torch.float64)
            return result

    monkeypatch.setattr("dfq.generators.self_generation.CACHED_TOKENS", tokens)
    with Widths():
        found = teacher_cache(llama, ids, 6)
    assert torch.equal(found["teacher_ids"], indices.int()) and torch.equal(found["teacher_log_probs"], values.half())
    assert torch.equal(found["teacher_rest"], torch.log1p(-values.exp().sum(-1)).half())
    assert max(widths) == tokens * 64


# ------------------------------------------------------------------------------------------------ tokenizers

ORDINARY = "all ids are taken as ordinary text; give generator.tokenizer=FOLDER of one with tokenizer.json"


def test_a_network_in_memory_whose_place_is_gone(llama, tmp_path, capsys, monkeypatch):
    gone = str(tmp_path / "gone")
    monkeypatch.setattr(llama.module.config, "_name_or_path", gone)
    dataset = generate(llama, SelfGeneration(), 4, 0, tmp_path / "d")
    line = f"llama: no tokenizer at {gone}, where its network says it is from: {ORDINARY}"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert dataset.manifest["settings"]["tokenizer_sha256"] is None
    with pytest.raises(UserError, match="got llama, which comes without a tokenizer, and settings that need one"):
        made(llama, range(2), scripts=("LATIN",))
    config = {"_target_": "dfq.teachers.huggingface.load", "name": gone}
    given = Teacher(llama.module, "language_modeling", llama.input_spec, "given", config)
    with pytest.raises(UserError, match=f"got generator.tokenizer={gone}, from which no tokenizer can be loaded"):
        made(given, range(2))


@pytest.mark.parametrize("file", ["tekken.json", "spiece.model", "sentencepiece.bpe.model"])
def test_a_tokenizer_of_another_kind_is_told_of(file, llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llama.module.config, "_name_or_path", str(tmp_path))
    assert made(llama, range(64), begin=False)["input_ids"][:, 0].unique().numel() == 64
    assert "tokenizer" not in capsys.readouterr().err, "of a folder without any nothing is said"
    (tmp_path / file).write_bytes(b"")
    assert made(llama, range(64), begin=False)["input_ids"][:, 0].unique().numel() == 64
    assert f"llama: {tmp_path} has {file} and no tokenizer.json: {ORDINARY}\n" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ mistakes

WRONG = [
    ({"first": "end"}, "got generator.first='end'; allowed: uniform | stepped | begin | prompts"),
    ({"temperature": [0.0]}, "got generator.temperature=[0.0]; allowed: a list [x, ...], each x a number > 0"),
    ({"temperature": []}, "got generator.temperature=[]; allowed: a list of at least one number"),
    ({"top_p": 2}, "got generator.top_p=2; allowed: a number from 0 to 1"),
    ({"top_k": -1}, "got generator.top_k=-1; allowed: a whole number >= 0"),
    ({"attempts": 0}, "got generator.attempts=0; allowed: a whole number >= 1"),
    (
        {"prompts": "p.txt"},
        "got generator.first=uniform and generator.prompts=p.txt; allowed: generator.first=prompts together with "
        "generator.prompts=FILE; give both or neither",
    ),
    ({"chat": True}, "got generator.chat=true and generator.first=uniform; allowed: first=begin | prompts"),
    (
        {"min_tokens": 64},
        "got generator.min_tokens=64 and generator.at_end=restart, with which every sample is as long as any; allowed: "
        "generator.min_tokens above 1 together with generator.at_end=pad; give generator.at_end=pad, or leave "
        "generator.min_tokens away",
    ),
    (
        {"min_likelihood": -1.0, "max_likelihood": -2.0},
        "got generator.min_likelihood=-1 and generator.max_likelihood=-2; allowed: the first below the other",
    ),
]


@pytest.mark.parametrize("settings, message", WRONG)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError) as error:
        resolve("generator", "self_generation", **settings)
    assert str(error.value) == message


def test_networks_it_can_do_nothing_with(llama, make_teacher, named, tmp_path):
    def message(teacher, **settings):
        with pytest.raises(UserError) as error:
            generate(teacher, SelfGeneration(**settings), 2, 0, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        return str(error.value)

    assert message(make_teacher()).startswith(
        "got generator=self_generation, which is for token ids, and plain, which takes images; allowed: "
    )
    masked = Teacher(llama.module, "masked_language_modeling", TokenSpec(64, 20), name="masked")
    assert message(masked) == (
        "got masked for task=masked_language_modeling, and generator=self_generation, which writes token by token; "
        "allowed: a causal language model (task=language_modeling), or generator=random_tokens"
    )
    assert message(llama, scripts=("LATIN",)) == (
        "got llama, which comes without a tokenizer, and settings that need one; allowed: generator.first=uniform | "
        "stepped | begin without scripts and chat; give generator.tokenizer=FOLDER"
    )
    assert message(llama, scripts=("KLINGON",), tokenizer=named) == (
        "got generator.scripts=['KLINGON'], in which llama has no token; allowed: first words of Unicode names of "
        "letters: LATIN, CYRILLIC, CJK, ARABIC, ..."
    )
    assert message(llama, tokenizer=str(tmp_path)).startswith(
        f"got generator.tokenizer={tmp_path}, from which no tokenizer can be loaded ("
    )
    assert message(llama, min_tokens=21, at_end="pad") == (
        "got generator.min_tokens=21 and samples of 20; allowed: a whole number from 1 to 20; "
        "give teacher.length=... for longer samples"
    )
    short = Teacher(llama.module, "language_modeling", TokenSpec(64, 2), name="short")
    assert message(short) == (
        "got a beginning of 2 tokens and samples of 2; allowed: beginnings of at most 1 tokens; "
        "give teacher.length=... for longer samples"
    )


def test_from_the_network_to_a_dataset_that_the_command_reads(llama, tmp_path):
    dataset = dfq.generate(llama, "self_generation", num_samples=6, dataset_dir=tmp_path / "d", batch_size=4)
    settings = dataset.manifest["settings"]
    assert settings["generator"]["temperature"] == [1.0] and settings["tokenizer_sha256"] is None
    assert dataset.samples().shape == (6, 20) and dataset.samples().dtype == torch.int64
    assert dataset.provenance["pixels"] is False


def test_other_tools_read_it(llama, tmp_path, monkeypatch):
    dataset = generate(llama, SelfGeneration(at_end="pad", max_repetition=1.0), 8, 1, tmp_path / "d")
    rows = [row["input_ids"][: row["num_tokens"]].tolist() for row in dataset]
    lines = dataset.to_jsonl(tmp_path / "d.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"input_ids": row} for row in rows]
    lines = dataset.to_jsonl(tmp_path / "t.jsonl", lambda ids: " ".join(map(str, ids))).read_text().splitlines()
    assert json.loads(lines[3])["text"] == " ".join(map(str, rows[3]))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError) as error:
        dataset.to_huggingface()
    assert str(error.value) == (
        "got to_huggingface(), which needs datasets, not installed here; allowed: to_jsonl(path), which needs nothing; "
        "pip install datasets"
    )


def test_what_other_tools_cannot_read(llama, make_teacher, tmp_path):
    images = generate(make_teacher(), resolve("generator", "gaussian"), 2, 0, tmp_path / "images")
    with pytest.raises(UserError) as error:
        images.to_jsonl(tmp_path / "a.jsonl")
    assert str(error.value) == f"got {tmp_path}/images, a dataset of images; allowed: a dataset of token ids"
    empty = SyntheticDataset.create(tmp_path / "empty", {"seed": 0}, {"pixels": False, "labels": False})
    with pytest.raises(UserError, match="a dataset without samples; generate into it first"):
        empty.to_jsonl(tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()
    texts = generate(llama, SelfGeneration(max_repetition=1.0), 2, 0, tmp_path / "texts")
    with pytest.raises(UserError, match="which can't be written"):
        texts.to_jsonl(tmp_path)
