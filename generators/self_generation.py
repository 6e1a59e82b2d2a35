"""Self-generation: text that the language model writes itself, token by token, from nothing or from a few tokens.

LLM-QAT (Liu et al., 2023, arXiv 2305.17888, section 3.1): a first token from the vocabulary, a few greedy tokens, then
tokens drawn from the model's own distribution::

    x_1 ~ uniform(ordinary ids);   x_t = argmax p(. | x_<t)  for the next few;   x_t ~ p(. | x_<t)^(1 / temperature)

First tokens to choose from: each id once in turn, in an order shuffled by the seed (``uniform``); evenly spaced ones
(``stepped``); those of some scripts only (Norm Tweaking, Li et al., AAAI 2024, arXiv 2309.02784: ``scripts``); none
but the beginning of a text (Williams et al., NAACL 2025, arXiv 2410.17170: ``begin``); the user's own prompts, in a
chat template or not. In a template of which only the beginning is given, the network writes the user's words too; where
they end, what the template has up to the answer follows, and behind the answer another conversation. A list of
temperatures is a mixture: each sample has one of them.

Sample i depends on (seed, i) alone, not on what it is computed with. Rows of a batch have their own random numbers, and
begin side by side: nothing is padded on the left. Sums in a larger batch round differently, so where a token is decided
by less than :data:`TIE`, that row is looked at again by itself, in a forward of fixed shape.

Samples that a gate turns away (too short, too repetitive, too unlikely or too likely) are drawn again from other random
numbers, ``attempts`` times at most; what was turned away is counted in the manifest.

Differences from the papers: special, byte and unused ids never come first; a text that ends before the sample does is
followed by another (``at_end=restart``), or the rest is padding; a beginning-of-text token comes first if there is one;
ids are stored as they were drawn and never become text in between; LLM-QAT's 3 to 5 greedy tokens count the first one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dfq.dataset import SyntheticDataset
from dfq.decoding import Decoder
from dfq.errors import UserError
from dfq.generators._base import Independent, Sampler, sample_rng
from dfq.losses.token_divergence import LEAST
from dfq.precision import double, exact
from dfq.progress import Advance
from dfq.settings import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, resolve
from dfq.teacher import Teacher, TokenSpec
from dfq.tokenizer import end_ids, find_tokenizer, ordinary_ids, special_id, tokenizer_sha256

TIE = 1e-5  # of probabilities and logits; float32 sums in another order differ by a tenth of that
GATES = ("length", "repetition", "likelihood")
CACHED_TOKENS = 64  # whose probabilities over the vocabulary are held in float64 at a time
NGRAM = 4  # tokens of what must not come again and again


@dataclass(frozen=True)
class SelfGeneration(Independent):
    """Text of the teacher's own, as token ids."""

    batch_size: PositiveInt = 64  # samples made side by side, and in one file
    first: Literal["uniform", "stepped", "begin", "prompts"] = "uniform"  # what a sample begins with
    scripts: tuple[str, ...] = ()  # of first tokens, such as [LATIN,CJK]; empty: all
    prompts: str | None = None  # .txt (one a line) or .jsonl ({"text": ...} | {"messages": [...]}); with first=prompts
    chat: bool = (
        False  # in the tokenizer's chat template: prompts, or with first=begin words of a user it writes itself
    )
    thinking: bool | None = None  # handed to the chat template as enable_thinking; null: the template's own default
    begin: bool = True  # the beginning-of-text token comes first, if there is one
    greedy_tokens: tuple[NonNegativeInt, ...] = (2, 3, 4)  # likeliest tokens before drawing starts, one of the list
    temperature: tuple[PositiveFloat, ...] = (1.0,)  # of drawing; a sample has one of the list
    top_k: NonNegativeInt = 0  # the k likeliest tokens alone; 0: all
    top_p: Fraction = 1.0  # the likeliest tokens alone that have this share together; 1: all
    min_p: Fraction = 0.0  # tokens at least this likely, relative to the likeliest, alone; 0: all
    at_end: Literal["restart", "pad"] = "restart"  # a text that ends is followed by another, or by padding
    min_tokens: PositiveInt = 1  # gate: tokens of a sample, padding not counted; above 1 with at_end=pad
    max_repetition: Fraction = 0.5  # gate: share of its four-grams that it has had before
    min_likelihood: float | None = None  # gate: mean log-probability of its tokens, in nats; null: any
    max_likelihood: float | None = None  # gate: the same from above; null: any
    attempts: PositiveInt = 4  # draws of a sample until it is taken as it is
    cache_teacher: NonNegativeInt = 0  # teacher's largest log-probabilities stored with each token; 0: none
    tokenizer: str | None = None  # folder or hub id; null: the teacher's, and where it has none all ids are ordinary
    kind: ClassVar[str] = "token ids"
    files: ClassVar[tuple[str, ...]] = ("prompts", "tokenizer")

    def __post_init__(self):
        if (self.first == "prompts") != (self.prompts is not None):
            raise UserError(
                f"got generator.first={self.first} and generator.prompts={self.prompts or 'null'}",
                "generator.first=prompts together with generator.prompts=FILE",
                "give both or neither",
            )
        if self.chat and self.first not in ("begin", "prompts"):
            raise UserError(f"got generator.chat=true and generator.first={self.first}", "first=begin | prompts")
        for name in ("greedy_tokens", "temperature"):
            if not getattr(self, name):
                raise UserError(f"got generator.{name}=[]", "a list of at least one number")
        if self.min_tokens > 1 and self.at_end == "restart":  # samples are full then, and none would be turned away
            raise UserError(
                f"got generator.min_tokens={self.min_tokens} and generator.at_end=restart, with which every sample is "
                "as long as any",
                "generator.min_tokens above 1 together with generator.at_end=pad",
                "give generator.at_end=pad, or leave generator.min_tokens away",
            )
        low, high = self.min_likelihood, self.max_likelihood
        if low is not None and high is not None and low >= high:
            raise UserError(
                f"got generator.min_likelihood={low:g} and generator.max_likelihood={high:g}",
                "the first below the other",
            )

    def recorded(self, teacher: Teacher) -> dict[str, Any]:
        tokenizer = find_tokenizer(teacher, self.tokenizer, "generator.tokenizer")
        found: dict[str, Any] = {"tokenizer_sha256": None if tokenizer is None else tokenizer_sha256(tokenizer)}
        if self.prompts is not None:
            content = json.dumps(read_prompts(self.prompts)).encode()
            found["prompts_sha256"] = hashlib.sha256(content).hexdigest()
        return found

    def prepare(self, teacher: Teacher, rng: torch.Generator) -> Sampler:
        """The same with all that samples share looked up: beginnings, and the ids that end a text."""
        beginnings = _beginnings(self, teacher, rng)
        ready = copy.copy(self)
        object.__setattr__(ready, "_beginnings", beginnings)  # no setting: neither compared nor recorded
        return ready

    def make(self, teacher: Teacher, indices: Sequence[int], seed: int, advance: Advance) -> dict[str, Tensor]:
        """``input_ids`` [N, T], ``num_tokens`` [N], what gates turned away before ``rejected`` [N, 3]; of the teacher,
        on request, ``teacher_ids``, ``teacher_log_probs`` [N, T, K] and ``teacher_rest`` [N, T]."""
        beginnings = getattr(self, "_beginnings", None) or _beginnings(
            self, teacher, torch.Generator().manual_seed(seed)
        )
        writer = _Writer(self, teacher, beginnings)
        done: dict[int, _Text] = {}
        rejected = {index: [0] * len(GATES) for index in indices}
        waiting = list(indices)
        for attempt in range(self.attempts):
            texts = writer.write(waiting, seed, attempt)
            again = []
            for index, text in zip(waiting, texts, strict=True):
                failed = writer.failed_gate(text)
                if failed is not None:
                    rejected[index][failed] += 1
                if failed is None or attempt + 1 == self.attempts:
                    done[index] = text
                else:
                    again.append(index)
            advance(len(waiting) - len(again))
            waiting = again
            if not waiting:
                break
        made = {
            "input_ids": torch.stack([done[index].ids for index in indices]),
            "num_tokens": torch.tensor([done[index].num_tokens for index in indices]),
            "rejected": torch.tensor([rejected[index] for index in indices], dtype=torch.int32),
        }
        return made | (teacher_cache(teacher, made["input_ids"], self.cache_teacher) if self.cache_teacher else {})

    def facts(self, dataset: SyntheticDataset) -> dict[str, Any]:
        """Counts of what the gates turned away, and of samples that were taken although every draw was."""
        tensors = dataset.tensors(names=("rejected", "num_tokens"))
        rejected = tensors["rejected"]
        return {
            "tokens": int(tensors["num_tokens"].sum()),
            "rejected": dict(zip(GATES, rejected.sum(0).tolist(), strict=True)),
            "taken_as_they_are": int((rejected.sum(1) >= self.attempts).sum()),
        }


# ------------------------------------------------------------------------------------------------ beginnings


@dataclass(frozen=True)
class _Beginnings:
    """What samples begin with, by turns, and what ends a text."""

    rows: list[list[int]]  # ids of each beginning
    again: list[int]  # what begins another text in the same sample
    ends: frozenset[int]
    padding: int
    asks: bool = False  # rows are followed by words of a user
    answer: list[int] | None = None  # what stands between those and an answer; None: another text has neither


def _beginnings(settings: SelfGeneration, teacher: Teacher, rng: torch.Generator) -> _Beginnings:
    spec = teacher.input_spec
    if not isinstance(spec, TokenSpec):
        raise UserError(f"got {teacher.name}, which takes {spec.kind}, and a generator of text", "a language model")
    if teacher.task != "language_modeling":
        raise UserError(
            f"got {teacher.name} for task={teacher.task}, and generator=self_generation, which writes token by token",
            "a causal language model (task=language_modeling), or generator=random_tokens",
        )
    if settings.min_tokens > spec.length:
        raise UserError(
            f"got generator.min_tokens={settings.min_tokens} and samples of {spec.length}",
            f"a whole number from 1 to {spec.length}",
            "give teacher.length=... for longer samples",
        )
    tokenizer = find_tokenizer(teacher, settings.tokenizer, "generator.tokenizer")
    answer: list[int] | None = None
    begin = special_id(teacher, tokenizer, "bos_token_id") if settings.begin else None
    start = [] if begin is None else [begin]
    if tokenizer is None and (settings.scripts or settings.chat or settings.first == "prompts"):
        raise UserError(
            f"got {teacher.name}, which comes without a tokenizer, and settings that need one",
            "generator.first=uniform | stepped | begin without scripts and chat",
            "give generator.tokenizer=FOLDER",
        )
    if settings.first == "prompts":
        rows = [_prompt_ids(settings, tokenizer, start, prompt) for prompt in read_prompts(settings.prompts)]
    elif settings.first == "begin":
        if not start and not settings.chat:
            raise UserError(
                f"got generator.first=begin and {teacher.name}, which has no beginning-of-text token",
                "generator.first=uniform | stepped for such a network",
            )
        rows = [start]
    else:
        ids = list(range(spec.vocab_size))
        if tokenizer is not None:
            ids = ordinary_ids(tokenizer, spec.vocab_size, settings.scripts)
        if not ids:
            raise UserError(
                f"got generator.scripts={list(settings.scripts)}, in which {teacher.name} has no token",
                "first words of Unicode names of letters: LATIN, CYRILLIC, CJK, ARABIC, ...",
            )
        if settings.first == "uniform":
            order = torch.randperm(len(ids), generator=rng).tolist()
        else:
            order = [i * _stride(len(ids)) % len(ids) for i in range(len(ids))]
        rows = [[*start, ids[i]] for i in order]
    again = start
    if settings.chat:
        again, answer = _conversation(settings, tokenizer)
        rows = [again] if settings.first == "begin" else rows
    if not all(rows):
        raise UserError(
            f"got generator.first={settings.first} and {teacher.name}, and a beginning of no tokens: an empty prompt "
            "or template, and no beginning-of-text token",
            "at least one token to go on from",
        )
    largest = max(max(ids) for ids in (*rows, again, answer or []) if ids)
    if largest >= spec.vocab_size:
        raise UserError(
            f"got {teacher.name} with a vocabulary of {spec.vocab_size}, and id {largest} in a beginning",
            f"ids from 0 to {spec.vocab_size - 1}",
            "use the tokenizer of this network; where its beginning-of-text token is none, give generator.begin=false",
        )
    longest = max(map(len, rows))
    if longest >= spec.length:
        raise UserError(
            f"got a beginning of {longest} tokens and samples of {spec.length}",
            f"beginnings of at most {spec.length - 1} tokens",
            "give teacher.length=... for longer samples",
        )
    ends = frozenset(end_ids(teacher, tokenizer))
    padding = special_id(teacher, tokenizer, "pad_token_id")
    if padding is None or not 0 <= padding < spec.vocab_size:
        padding = min(ends, default=0)
    again = again if settings.chat else [token for token in again if token not in ends]
    return _Beginnings(rows, again, ends, padding, settings.first == "begin" and settings.chat, answer)


def _stride(count: int) -> int:
    """With steps of the golden ratio any number of first ones is spread evenly, however many samples there will be."""
    stride = max(1, round(count * 0.6180339887))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def read_prompts(path: str | None) -> list[Any]:
    """Texts, or lists of messages, from a file."""
    assert path is not None
    what = '.txt with a prompt a line, or .jsonl with {"text": ...} | {"messages": [...]}'
    try:
        # With or without a byte order mark. Not splitlines(): a prompt may hold other ends of lines as they are.
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"got generator.prompts={path}, which can't be read ({type(error).__name__})", what) from None
    if not lines:
        raise UserError(f"got generator.prompts={path}, which is empty", what)
    if Path(path).suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            prompt = entry["messages"] if "messages" in entry else entry["text"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"got generator.prompts={path}, whose line {number} has no text", what) from None
        if not (_are_messages(prompt) if "messages" in entry else isinstance(prompt, str)):
            raise UserError(
                f"got generator.prompts={path}, whose line {number} has {str(prompt)[:50]!r} for text or messages",
                'a string for text, [{"role": ..., "content": ...}, ...] for messages',
            )
        found.append(prompt)
    return found


def _are_messages(prompt: Any) -> bool:
    """At least one, each of somebody; what else is in them is between them and the template."""
    is_list = isinstance(prompt, list) and bool(prompt)
    return is_list and all(isinstance(entry, dict) and isinstance(entry.get("role"), str) for entry in prompt)


def _prompt_ids(settings: SelfGeneration, tokenizer: Any, start: list[int], prompt: Any) -> list[int]:
    if isinstance(prompt, str) and not settings.chat:
        return [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = _templated(settings, tokenizer, messages, add_generation_prompt=messages[-1].get("role") != "assistant")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _conversation(settings: SelfGeneration, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The chat template up to where the user's words begin, and from where they end to where an answer begins."""
    mark = "\u2063words of the user\u2063"
    text = _templated(settings, tokenizer, [{"role": "user", "content": mark}], add_generation_prompt=True)
    before, found, behind = text.partition(mark)
    if not found:
        raise UserError(
            "got generator.chat=true and a tokenizer whose chat template leaves the user's words out",
            "generator.chat=false for such a one",
        )
    before_ids, behind_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, behind))
    return before_ids, behind_ids


def _templated(settings: SelfGeneration, tokenizer: Any, messages: Any, add_generation_prompt: bool) -> str:
    options = {} if settings.thinking is None else {"enable_thinking": settings.thinking}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # a template is a program of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"got a tokenizer whose chat template can't be filled ({reason})", "generator.chat=false for such a one"
        ) from error


# ------------------------------------------------------------------------------------------------ writing


@dataclass
class _Text:
    """One sample as far as it is written."""

    prompt: list[int]
    num_greedy: int
    temperature: float
    numbers: Tensor  # [T] from 0 to 1, one for each token
    ids: Tensor  # [T]
    num_tokens: int = 0
    likelihood: float = 0.0  # summed over the tokens that the network chose
    chosen: list[int] = field(default_factory=list)  # their places
    forced: list[int] = field(default_factory=list)  # what comes next, whatever the network says
    asks: bool = False  # the words are a user's, an answer follows
    ended: bool = False


class _Writer:
    def __init__(self, settings: SelfGeneration, teacher: Teacher, beginnings: _Beginnings):
        self.settings, self.teacher, self.beginnings = settings, teacher, beginnings
        self.task = resolve("task", teacher.task)
        self.length = teacher.input_spec.size[0]

    def failed_gate(self, text: _Text) -> int | None:
        """The number of the first gate that turns it away."""
        s = self.settings
        if text.num_tokens < s.min_tokens:
            return 0
        if repetition(text.ids[: text.num_tokens]) > s.max_repetition:
            return 1
        mean = text.likelihood / max(len(text.chosen), 1)
        bounds = [bound for bound in (s.min_likelihood, s.max_likelihood) if bound is not None]
        if any(abs(mean - bound) < TIE for bound in bounds):
            mean = self._likelihood(text)
        low, high = s.min_likelihood, s.max_likelihood
        return 2 if (low is not None and mean < low) or (high is not None and mean > high) else None

    def _decoder(self, most: int | None = None) -> Decoder:
        teacher = self.teacher
        return Decoder(teacher.module, lambda ids: self.task.raw_outputs(teacher, ids), teacher.device, most)

    def write(self, indices: Sequence[int], seed: int, attempt: int) -> list[_Text]:
        texts = [self._start(index, seed, attempt) for index in indices]
        known = min(len(text.prompt) for text in texts)
        ids = torch.stack([text.ids for text in texts])
        ids[:, :known] = torch.tensor([text.prompt[:known] for text in texts])
        forward = self._decoder(self.length)
        logits = forward(ids[:, :known])
        for place in range(known, self.length):
            chosen = self._choose(logits, texts, ids, place)
            ids[:, place] = torch.tensor(chosen)
            if place + 1 == self.length or all(text.ended for text in texts):
                break
            logits = forward(ids[:, : place + 1], place)
        for text, row in zip(texts, ids, strict=True):
            text.ids = row
            text.num_tokens = text.num_tokens if text.ended else self.length
        return texts

    def _start(self, index: int, seed: int, attempt: int) -> _Text:
        s, rows = self.settings, self.beginnings.rows
        rng = sample_rng(seed, index, attempt)
        numbers = torch.rand(self.length + 2, generator=rng, dtype=torch.float64)
        prompt = list(rows[index % len(rows)])
        return _Text(
            prompt=prompt,
            num_greedy=len(prompt) + s.greedy_tokens[int(numbers[0] * len(s.greedy_tokens))],
            temperature=s.temperature[int(numbers[1] * len(s.temperature))],
            numbers=numbers[2:],
            ids=torch.full((self.length,), self.beginnings.padding),
            asks=self.beginnings.asks,
        )

    def _choose(self, logits: Tensor, texts: list[_Text], ids: Tensor, place: int) -> list[int]:
        """The next id of each row, from the logits [N, V] behind what it has."""
        temperatures = torch.tensor([text.temperature for text in texts], dtype=torch.float64)
        numbers = torch.stack([text.numbers[place] for text in texts])
        greedy = torch.tensor([place < text.num_greedy for text in texts])
        chosen, margins, likelihoods = self._decide(logits, numbers, temperatures, greedy)
        for row, text in enumerate(texts):
            if text.ended:
                chosen[row] = self.beginnings.padding
                continue
            if place < len(text.prompt):
                chosen[row] = text.prompt[place]
                continue
            if text.forced:
                chosen[row] = text.forced.pop(0)
                continue
            if margins[row] < TIE:
                part = slice(row, row + 1)
                alone = self._decoder()(ids[part, :place])
                found = self._decide(alone, numbers[part], temperatures[part], greedy[part])
                (chosen[row],), _, (likelihoods[row],) = found
            text.likelihood += likelihoods[row]
            text.chosen.append(place)
            if chosen[row] in self.beginnings.ends:
                self._end(text, place, chosen[row])
            elif text.asks and self._answers(ids[row, :place], chosen[row]):
                text.asks = False
        return chosen

    def _decide(
        self, logits: Tensor, numbers: Tensor, temperatures: Tensor, greedy: Tensor
    ) -> tuple[list[int], list[float], list[float]]:
        """The next id of each row, how clear it was, and its log-probability.

        Where the network runs: with a vocabulary of 128,256, logits of 64 rows are 33 MB, and what comes back is three
        numbers a row.
        """
        s, wide = self.settings, exact(logits)
        numbers, temperatures, greedy = (values.to(wide.device) for values in (numbers, temperatures, greedy))
        tokens, margins = decide(wide, numbers, temperatures, greedy, s.top_k, s.top_p, s.min_p)
        likelihoods = wide.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        found = torch.stack([tokens.double(), margins, likelihoods]).tolist()  # one wait for the device
        return [int(token) for token in found[0]], found[1], found[2]

    def _end(self, text: _Text, place: int, token: int) -> None:
        """The network has said with ``token`` that its text, or the words of its user, are over."""
        if not text.asks and self.settings.at_end == "pad":
            text.ended, text.num_tokens = True, place + 1
            return
        answer = self.beginnings.answer
        forced = answer if text.asks and answer is not None else self.beginnings.again
        text.forced = list(forced[1:] if forced[:1] == [token] else forced)
        text.asks = not text.asks and answer is not None

    def _answers(self, ids: Tensor, token: int) -> bool:
        """With ``token`` behind ids [t] the network has written what stands between a user's words and an answer."""
        answer = self.beginnings.answer or [-1]
        return answer[-1] == token and ids[len(ids) + 1 - len(answer) :].tolist() == answer[:-1]

    @torch.no_grad()
    def _likelihood(self, text: _Text) -> float:
        """Mean log-probability of the chosen tokens, whoever else was in the batch."""
        logits = double(self.task.raw_outputs(self.teacher, text.ids[None, : text.num_tokens])[0])
        places = torch.tensor(text.chosen)
        return float(logits[places - 1].log_softmax(-1).gather(1, text.ids[places, None]).mean())


def decide(
    logits: Tensor,
    numbers: Tensor,
    temperatures: Tensor,
    greedy: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The next token of each row, and how clear it was: what probabilities or logits may change by without another.

    A number u from 0 to 1 names the first token, in order of ids, up to which the probabilities add up to more than u.
    Shapes: ``logits`` [N, V]; all others, and both results, [N].
    """
    scaled = logits.double() / temperatures[:, None]
    kept = torch.ones_like(scaled, dtype=torch.bool)
    margin = torch.full_like(numbers, torch.inf)
    if 0 < top_k < scaled.shape[-1]:
        values = scaled.topk(top_k + 1, dim=-1).values
        kept &= scaled >= values[:, -2:-1]
        margin = torch.minimum(margin, values[:, -2] - values[:, -1])
    if min_p > 0:
        above = scaled - scaled.amax(-1, keepdim=True) - math.log(min_p)
        kept &= above >= 0
        margin = torch.minimum(margin, above.abs().amin(-1))
    probabilities = torch.where(kept, scaled, -torch.inf).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        inside = before < top_p
        inside[:, 0] = True
        last = inside.sum(-1, keepdim=True) - 1
        outside = ordered.gather(1, (last + 1).clamp(max=ordered.shape[-1] - 1))
        margin = torch.minimum(margin, (before - top_p).abs().amin(-1))
        gap = torch.where(last + 1 < ordered.shape[-1], ordered.gather(1, last) - outside, torch.inf)
        margin = torch.minimum(margin, gap[:, 0])
        kept = torch.zeros_like(kept).scatter(1, order, inside)
        probabilities = torch.where(kept, probabilities, 0.0)
    steps = probabilities.cumsum(-1)
    target = numbers[:, None] * steps[:, -1:]
    tokens = torch.searchsorted(steps, target, right=True).clamp(max=steps.shape[-1] - 1)
    found = probabilities.gather(1, tokens)
    above, below = steps.gather(1, tokens) - target, target - (steps.gather(1, tokens) - found)
    margin = torch.minimum(margin, torch.minimum(above, below)[:, 0])
    best = logits.topk(min(2, logits.shape[-1]), dim=-1)
    gap = (best.values[:, 0] - best.values[:, -1]).double()
    return torch.where(greedy, best.indices[:, 0], tokens[:, 0]), torch.where(greedy, gap, margin)


def repetition(ids: Tensor) -> float:
    """Share of the four-grams of ids [T] that stand further in front already."""
    if len(ids) < NGRAM + 1:
        return 0.0
    grams = ids.unfold(0, NGRAM, 1)
    return 1 - len(grams.unique(dim=0)) / len(grams)


@torch.no_grad()
def teacher_cache(teacher: Teacher, ids: Tensor, size: int) -> dict[str, Tensor]:
    """The teacher's ``size`` largest log-probabilities at each place, and that of all others together.

    Shapes: ``ids`` [N, T]; ``teacher_ids`` int32 and ``teacher_log_probs`` float16 [N, T, K], ``teacher_rest`` float16
    [N, T]. What stands at t is said of token t + 1.
    """
    task, size = resolve("task", teacher.task), min(size, teacher.input_spec.to_dict()["vocab_size"])
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for row in ids.split(1):  # a row by itself: what is stored does not depend on the batch
        for logits in task.raw_outputs(teacher, row)[0].split(CACHED_TOKENS):
            log_probs = exact(logits).log_softmax(-1)
            values, indices = log_probs.topk(size, dim=-1)
            rest = torch.log1p(-values.exp().sum(-1).clamp(max=1)).clamp(min=LEAST)
            parts.append((indices.int().cpu(), values.clamp(min=LEAST).half().cpu(), rest.half().cpu()))
    found = [torch.cat(tensors).unflatten(0, ids.shape) for tensors in zip(*parts, strict=True)]
    return dict(zip(("teacher_ids", "teacher_log_probs", "teacher_rest"), found, strict=True))
