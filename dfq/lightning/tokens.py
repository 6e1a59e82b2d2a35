"""TokenDistillationModule: distillation of language models without the logits of a whole batch in memory.

Logits of N x T tokens over a vocabulary V take N T V numbers, several times with gradients, of student and teacher:
more than either network. The networks run up to the input of their heads [N, T, H]; the heads and the divergence run
over ``chunk_tokens`` tokens at a time, and once more in the backward pass (gradient checkpointing, Chen et al., 2016,
arXiv 1604.06174), so that logits of one chunk are all there ever is.

A dataset with the teacher's largest log-probabilities takes the teacher's place: it does not run then. Padding does not
count. Beside the divergence: weights of tokens (:mod:`dfq.losses.token_scaling`), cross-entropy to the text itself,
features, and what attention does (:mod:`dfq.losses.attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfq.attention import AttentionRecord
from dfq.dataset import samples_of
from dfq.errors import UserError
from dfq.hooks import capture_outputs, evaluation_mode, forward_hooks, tensors_in
from dfq.lightning.distillation import LOG_STEPS, DistillationModule
from dfq.losses.attention import attention_map_loss, attention_output_loss
from dfq.losses.token_divergence import buckets, divergence
from dfq.losses.token_scaling import token_scales
from dfq.precision import exact, exact_device
from dfq.progress import say
from dfq.tasks.language_modeling import NO_LABEL, known_tokens, of_tokens
from dfq.teacher import Teacher, TokenSpec

CACHE = ("teacher_ids", "teacher_log_probs", "teacher_rest")


def has_cache(entries: Container[str]) -> bool:
    """Whether the teacher's log-probabilities are among the entries of a sample or a batch: it need not run then."""
    return all(name in entries for name in CACHE)


class TokenDistillationModule(DistillationModule):
    """A divergence of each token's distribution (:class:`DistillationSettings` says which), and what has a weight."""

    confidence = 0.5  # the teacher's, on average: what cakld weighs its two parts with

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        teacher, student = self._teacher[0], self._student[0]
        self.head = find_head(teacher)
        if self.head is None:
            say(f"distill: logits of {teacher.name} are no output of its last layer, so they stand whole in memory")
        self.student_head = self.head if student.network is None else None  # None: of another network
        if "feature" in self.terms:
            head_name = None if self.head is None else self.head.name
            telling = _telling(teacher, [name for name in self.features.values() if name != head_name])  # it is not run
            self.features = {mine: theirs for mine, theirs in self.features.items() if theirs in telling}
            if not self.features:
                del self.terms["feature"]

    # -- one step ----------------------------------------------------------------------------------------------------

    def step_loss(self, batch: dict[str, Tensor]) -> Tensor:
        s, others = self.settings, []
        loss = self._token_loss(batch, s.divergence, training=True)
        if self._seen:
            others.append(
                self.terms["feature"] * torch.stack([self._feature_loss(*seen) for seen in self._seen]).mean()
            )
        if self._attention is not None:
            mine, theirs = self._attention
            if s.attention_map_weight:
                maps = [attention_map_loss(*pair) for pair in zip(mine.maps, theirs.maps, strict=True)]
                others.append(s.attention_map_weight * torch.stack(maps).mean())
            if s.attention_output_weight:
                others.append(s.attention_output_weight * attention_output_loss(mine.outputs, theirs.outputs))
        for other in others:
            loss = loss + other
        step = self.trainer.global_step + 1
        if step % LOG_STEPS == 0 or step == s.max_steps:
            self.log("loss", loss)
        return self.with_penalty(loss)

    def look(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._token_loss(batch, "forward"), self._agreement

    def _token_loss(self, batch: dict[str, Tensor], kind: Any, training: bool = False) -> Tensor:
        """Mean over the tokens that are no padding; ``training``: with all terms, weighted, and features noted."""
        s = self.settings
        ids = samples_of(batch).to(next(self.student_module.parameters()).device)
        known = known_tokens(batch, ids)
        cached = has_cache(batch)
        if cached:
            self._check_cached(batch["teacher_ids"].shape[-1])
        wants_features = training and "feature" in self.terms
        wants_attention = training and bool(s.attention_map_weight or s.attention_output_weight)
        with (
            capture_outputs(self.student_module, list(self.features) if wants_features else []) as got,
            self._recording(wants_attention) as mine_seen,
        ):
            mine = self._outputs(self.student_module, ids, self.student_head)
        theirs: Any
        theirs_seen = None
        if cached:
            theirs = tuple(batch[name].to(ids.device)[known] for name in CACHE)
        else:
            places = list(self.features.values()) if wants_features else []
            with (
                torch.no_grad(),
                capture_outputs(self.fast_teacher[0], places) as wanted,
                self._recording(wants_attention) as theirs_seen,
            ):
                theirs = self._outputs(self.fast_teacher[0], ids, self.head)[known]
        pairs = self.features.items() if wants_features else ()
        whole = s.feature_loss == "affinity"
        self._seen = [
            (name, of_tokens(got[name], known, whole), of_tokens(wanted[other], known, whole)) for name, other in pairs
        ]
        self._attention = self._checked(mine_seen, theirs_seen) if wants_attention else None
        for record in self._attention or ():
            for values in (record.maps, record.outputs):  # [N, H, T, ...]
                values[:] = [of_tokens(x.transpose(1, 2), known) for x in values]
        student_head = self._head_of(self.student_module, self.student_head)
        head = self._head_of(self.fast_teacher[0], None if cached else self.head)
        labels = next_tokens(ids, known)
        scales = None
        if training and s.token_tau is not None:
            nll = torch.zeros(ids.shape, device=ids.device)
            nll[known] = teacher_nll(theirs, head, labels[known], s.chunk_tokens)
            scales = token_scales(nll, labels != NO_LABEL, s.token_tau)[known]
        loss, self._agreement, ntp = chunked_divergence(
            mine[known],
            student_head,
            theirs,
            head,
            kind,
            s.chunk_tokens,
            s.top_k,
            self.confidence,
            s.temperature,
            scales,
            labels[known] if training and s.ntp_weight else None,
        )
        return loss * self.terms.get("kl", 0.0) + s.ntp_weight * ntp if training else loss

    def _check_cached(self, size: int) -> None:
        """A UserError for what a cache of ``size`` entries a token does not tell."""
        s, spec = self.settings, self._teacher[0].input_spec
        assert isinstance(spec, TokenSpec)
        if s.divergence == "top_k" and s.top_k > size < spec.vocab_size:
            raise UserError(
                f"got algorithm.top_k={s.top_k} and a dataset with the teacher's {size} largest log-probabilities",
                f"algorithm.top_k from 1 to {size}",
                f"give algorithm.top_k={size}, or generate with generator.cache_teacher={s.top_k}",
            )
        reasons = {
            "temperature": (s.temperature != 1, "distributions are stored at a temperature of 1"),
            "feature_weight": ("feature" in self.terms, "features are not stored"),
            "attention_map_weight": (s.attention_map_weight > 0, "what attention does is not stored"),
            "attention_output_weight": (s.attention_output_weight > 0, "what attention does is not stored"),
        }
        for name, (wanted, reason) in reasons.items():
            if wanted:
                raise UserError(
                    f"got algorithm.{name}={getattr(s, name)} and a dataset with the teacher's cache",
                    f"a dataset without it: {reason}",
                    f"leave algorithm.{name} away, or generate with generator.cache_teacher=0",
                )

    @contextmanager
    def _recording(self, wanted: bool) -> Iterator[AttentionRecord | None]:
        if not wanted:
            yield None
            return
        with AttentionRecord(bool(self.settings.attention_map_weight)) as record:
            yield record

    def _checked(
        self, mine: AttentionRecord | None, theirs: AttentionRecord | None
    ) -> tuple[AttentionRecord, AttentionRecord]:
        assert mine is not None and theirs is not None
        found = [(len(record.maps), len(record.outputs)) for record in (mine, theirs)]
        if not found[0][1] or found[0] != found[1]:
            raise UserError(
                f"got algorithm.attention_map_weight or attention_output_weight and {self._teacher[0].name}, in which "
                f"{found[1][1]} attention products were seen, and {found[0][1]} in the student",
                "a network with torch's scaled_dot_product_attention, or softmax and a product",
                "leave these weights away for such a network",
            )
        return mine, theirs

    def _outputs(self, module: nn.Module, ids: Tensor, head: Head | None) -> Tensor:
        """[N, T, H] in front of the head, or logits [N, T, V] of a network whose head is not known."""
        return self.task.raw_outputs(module, ids) if head is None else hidden(module, head.name, ids)

    @staticmethod
    def _head_of(module: nn.Module, head: Head | None) -> Callable[[Tensor], Tensor]:
        return (lambda x: x) if head is None else partial(head, module)

    # -- before training ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.settings.divergence == "cakld":
            self.confidence = self._confidence()

    def _confidence(self) -> float:
        """The teacher's largest probability, on average over samples that are trained on."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = [data.dataset[i] for i in data.train_indices[: 10 * data.batch_size]]
        if has_cache(rows[0]):
            stored = [row["teacher_log_probs"][: row.get("num_tokens"), 0] for row in rows]
            return float(torch.stack([values.float().exp().mean() for values in stored]).mean())
        teacher, head = self._teacher[0], self._head_of(self.fast_teacher[0], self.head)
        found = []
        for row in rows:
            ids = samples_of(row)[: int(row.get("num_tokens", len(samples_of(row))))]
            x = self._outputs(self.fast_teacher[0], ids[None].to(teacher.device), self.head)[0]
            found.append(
                torch.cat([head(part).softmax(-1).amax(-1) for part in x.split(self.settings.chunk_tokens)]).mean()
            )
        return float(torch.stack(found).mean())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["distillation"]["confidence"] = self.confidence

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.confidence = checkpoint["distillation"]["confidence"]


# ------------------------------------------------------------------------------------------------ the head


class _Reached(Exception):
    """Ends a forward in front of the head."""


@torch.no_grad()
def _telling(teacher: Teacher, names: list[str]) -> set[str]:
    """Those of ``names`` whose output depends on the text: positions, as rotary embeddings have them, do not."""
    with capture_outputs(teacher.module, names) as found:
        teacher(teacher.example())
    return {name for name, rows in found.items() if not torch.equal(rows[0], rows[-1])}


@dataclass(frozen=True)
class Head:
    """The last layer of a network and what makes logits of its output y: scale y, or cap tanh(y / cap)."""

    name: str
    scale: float = 1.0  # Granite and Cohere have another
    cap: float | None = None  # Gemma 2 has one

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """Logits [..., V] of x [..., H], of a network that has such a head."""
        found = module.get_submodule(self.name)(x)
        found = found if self.scale == 1 else found * self.scale
        return found if self.cap is None else torch.tanh(found / self.cap) * self.cap


def find_head(teacher: Teacher) -> Head | None:
    """The last layer, if the network's logits are its output, scaled or capped at most; else None."""
    flow, example = teacher.dataflow, teacher.example()
    called = [call.name for call in flow.calls if call.name]
    layers = [name for name in called if not list(teacher.module.get_submodule(name).children())]
    if not layers or len(flow.calls_of(layers[-1])) != 1:
        return None
    with torch.no_grad():
        logits, x = next(tensors_in(teacher(example))), hidden(teacher.module, layers[-1], example)
        plain = Head(layers[-1])
        found = plain(teacher.module, x)
        if not isinstance(found, Tensor) or found.shape != logits.shape:
            return None
        narrow = found.to(exact_device(found.device))  # float64 of all logits, of one at a time, takes memory enough
        ratio = float((exact(logits) * narrow).sum() / narrow.double().square().sum().clamp(min=1e-30))
        config: Any = getattr(teacher.module, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        cap = getattr(text, "final_logit_softcapping", None)
        for head in (plain, Head(layers[-1], ratio), *([] if cap is None else [Head(layers[-1], cap=cap)])):
            if torch.allclose(head(teacher.module, x), logits, 1e-4, 1e-5 * float(logits.std().clamp(max=1))):
                return head
    return None


def hidden(module: nn.Module, head: str, ids: Tensor) -> Tensor:
    """What goes into the head [N, T, H]; the head does not run."""
    found: list[Tensor] = []

    def stop(_name: str, _module: nn.Module, inputs: tuple) -> None:
        found.append(inputs[0])
        raise _Reached

    try:
        with evaluation_mode(module), forward_hooks([(head, module.get_submodule(head))], before=stop):
            module(ids)
    except _Reached:
        return found[0]
    raise RuntimeError(f"{head} was not called")


def next_tokens(ids: Tensor, known: Tensor) -> Tensor:
    """What follows each token [N, T]; behind the last of a text, and of padding, :data:`NO_LABEL`."""
    follows = torch.where(known[:, 1:], ids[:, 1:], NO_LABEL)
    return nn.functional.pad(follows, (0, 1), value=NO_LABEL)


@torch.no_grad()
def teacher_nll(
    teacher: Tensor | tuple[Tensor, ...], head: Callable[[Tensor], Tensor], labels: Tensor, chunk_tokens: int
) -> Tensor:
    """The teacher's negative log-likelihood of ``labels`` [M], in nats; 0 where there is none.

    Args:
        teacher: [M, H'], or its cache, as :func:`chunked_divergence` takes them.
    """
    if isinstance(teacher, tuple):
        ids, log_p, rest = teacher
        is_it = ids.long() == labels[:, None]
        stored = (torch.where(is_it, log_p.float(), 0.0)).sum(-1)
        found = torch.where(is_it.any(-1), stored, rest.float())
    else:
        parts = zip(teacher.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        found = torch.cat(
            [head(x).float().log_softmax(-1).gather(-1, part.clamp(min=0)[:, None])[:, 0] for x, part in parts]
        )
    return torch.where(labels == NO_LABEL, 0.0, -found)


def chunked_divergence(
    student: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher: Tensor | tuple[Tensor, Tensor, Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    kind: Any = "forward",
    chunk_tokens: int = 1024,
    top_k: int = 64,
    confidence: float = 0.5,
    temperature: float = 1.0,
    scales: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean divergence of a token; the share of tokens for which both name the same one (no gradient); and the student's
    mean cross-entropy to ``labels``.

    Args:
        student: [M, H], what goes into the student's head.
        teacher: [M, H'], or its cache: ids [M, K], log-probabilities [M, K] from the largest on, and the logarithm of
            the rest [M].
        top_k: of ``kind=top_k``; of a cache K at most.
        temperature: of both distributions; the loss is multiplied by its square. A cache has that of 1.
        scales: [M], what each token's divergence is multiplied by; None: 1.
        labels: [M], next tokens, :data:`NO_LABEL` where there is none; None: not asked for, 0 is returned.
    """
    cached = isinstance(teacher, tuple)
    scales = torch.ones(len(student), device=student.device) if scales is None else scales

    def of_chunk(x: Tensor, scale: Tensor, follows: Tensor | None, *theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = student_head(x).float()
        ntp = logits.new_zeros(())
        if follows is not None:
            ntp = nn.functional.cross_entropy(logits, follows, ignore_index=NO_LABEL, reduction="sum")
        log_q = (logits / temperature if temperature != 1 else logits).log_softmax(-1)
        if cached:
            ids = theirs[0].long()
            log_p = torch.cat([theirs[1], theirs[2][:, None]], -1).float()
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)  # half precision does not add up to one
            best, mine = ids[:, 0], log_q.argmax(-1)
            if kind == "top_k" and top_k < ids.shape[-1]:  # the others join the rest
                ids, others = ids[:, :top_k], log_p[:, top_k:].logsumexp(-1, keepdim=True)
                log_p = torch.cat([log_p[:, :top_k], others], -1)
            log_q = buckets(log_q, ids)
        else:
            with torch.no_grad():
                log_p = (teacher_head(theirs[0]).float() / temperature).log_softmax(-1)
            best, mine = log_p.argmax(-1), log_q.argmax(-1)
            if kind == "top_k":
                ids = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1).indices
                log_p, log_q = buckets(log_p, ids), buckets(log_q, ids)
        return (divergence(log_q, log_p, kind, confidence) * scale).sum(), (best == mine).sum(), ntp

    total = same = ntp = torch.zeros((), device=student.device)
    for start in range(0, len(student), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        theirs = [t[part] for t in teacher] if isinstance(teacher, tuple) else [teacher[part]]
        follows = None if labels is None else labels[part]
        loss, agreed, entropy = checkpoint(of_chunk, student[part], scales[part], follows, *theirs, use_reentrant=False)
        total, same, ntp = total + loss, same + agreed, ntp + entropy
    num_labels = 1 if labels is None else (labels != NO_LABEL).sum().clamp(min=1)
    return total / len(student) * temperature**2, same / len(student), ntp / num_labels
