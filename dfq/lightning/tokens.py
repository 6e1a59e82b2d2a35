"""TokenDistillationModule: distillation of language models without the logits of a whole batch in memory.

Logits of N x T tokens over a vocabulary V take N T V numbers, several times with gradients, of student and teacher:
more than either network. The networks run up to the input of their heads [N, T, H]; the heads and the divergence run
over ``chunk_tokens`` tokens at a time, and once more in the backward pass (gradient checkpointing, Chen et al., 2016,
arXiv 1604.06174), so that logits of one chunk are all there ever is.

A dataset with the teacher's largest log-probabilities takes the teacher's place: it does not run then, and features are
not compared. Padding does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfq.dataset import samples_of
from dfq.hooks import capture_outputs, evaluation_mode, forward_hooks, tensors_in
from dfq.lightning.distillation import LOG_STEPS, DistillationModule
from dfq.losses.token_divergence import buckets, divergence
from dfq.teacher import Teacher

CACHE = ("teacher_ids", "teacher_log_probs", "teacher_rest")


class TokenDistillationModule(DistillationModule):
    """A divergence of each token's distribution (:class:`DistillationSettings` says which), and features."""

    confidence = 0.5  # the teacher's, on average: what cakld weighs its two parts with

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        teacher, student = self._teacher[0], self._student[0]
        self.head = find_head(teacher)
        student_head = self.head
        if student_head is not None and student.network is not None:
            student_head = None  # another network
        self.student_head = student_head
        self.features = {mine: theirs for mine, theirs in self.features.items() if theirs != self.head}  # it is not run
        if not self.features:
            self.terms.pop("feature", None)

    # -- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], _index: int) -> Tensor:
        loss = self._token_loss(batch, self.settings.divergence) * self.terms["kl"] if "kl" in self.terms else 0.0
        if self._seen is not None and "feature" in self.terms:
            distances = [self._feature_loss(got, wanted) for got, wanted in self._seen]
            loss = loss + self.terms["feature"] * torch.stack(distances).mean()
        step = self.trainer.global_step + 1
        if step % LOG_STEPS == 0 or step == self.settings.max_steps:
            self.log("loss", loss)
        return loss  # type: ignore[return-value]

    def look(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._token_loss(batch, "forward"), self._agreement

    def _token_loss(self, batch: dict[str, Tensor], kind: Any) -> Tensor:
        """Mean over the tokens that are no padding."""
        ids = samples_of(batch).to(self._teacher[0].device)
        known = (
            torch.arange(ids.shape[1], device=ids.device)
            < batch.get("num_tokens", torch.full((len(ids),), ids.shape[1], device=ids.device)).to(ids.device)[:, None]
        )
        cached = all(name in batch for name in CACHE)
        wants_features = not cached and "feature" in self.terms and kind == self.settings.divergence
        with capture_outputs(self.student_module, list(self.features) if wants_features else []) as got:
            mine = self._outputs(self.student_module, ids, self.student_head)
        theirs: Any
        if cached:
            theirs = tuple(batch[name].to(ids.device)[known] for name in CACHE)
        else:
            places = list(self.features.values()) if wants_features else []
            with torch.no_grad(), capture_outputs(self.fast_teacher[0], places) as wanted:
                theirs = self._outputs(self.fast_teacher[0], ids, self.head)[known]
        self._seen = [(got[name], wanted[other]) for name, other in self.features.items()] if wants_features else None
        loss, self._agreement = chunked_divergence(
            mine[known],
            self._head_of(self.student_module, self.student_head),
            theirs,
            self._head_of(self.fast_teacher[0], self.head),
            kind,
            self.settings.chunk_tokens,
            self.settings.top_k,
            self.confidence,
            self.settings.temperature,
        )
        return loss

    def _outputs(self, module: nn.Module, ids: Tensor, head: str | None) -> Tensor:
        """[N, T, H] in front of the head, or logits [N, T, V] of a network whose head is not known."""
        return self.task.raw_outputs(module, ids) if head is None else hidden(module, head, ids)

    @staticmethod
    def _head_of(module: nn.Module, head: str | None) -> Callable[[Tensor], Tensor]:
        return (lambda x: x) if head is None else module.get_submodule(head)

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
        if all(name in rows[0] for name in CACHE):
            return float(torch.stack([row["teacher_log_probs"][:, 0].float().exp().mean() for row in rows]).mean())
        teacher, head = self._teacher[0], self._head_of(self.fast_teacher[0], self.head)
        found = []
        for row in rows:
            x = self._outputs(self.fast_teacher[0], samples_of(row)[None].to(teacher.device), self.head)[0]
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


def find_head(teacher: Teacher) -> str | None:
    """The last layer, if the network's logits are its output and nothing more is done to them; else None."""
    flow, example = teacher.dataflow, teacher.example()
    called = [call.name for call in flow.calls if call.name]
    layers = [name for name in called if not list(teacher.module.get_submodule(name).children())]
    if not layers or len(flow.calls_of(layers[-1])) != 1:
        return None
    with torch.no_grad():
        logits = next(tensors_in(teacher(example)))
        found = teacher.module.get_submodule(layers[-1])(hidden(teacher.module, layers[-1], example))
    same = isinstance(found, Tensor) and found.shape == logits.shape and torch.allclose(found, logits, 1e-4, 1e-5)
    return layers[-1] if same else None


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
) -> tuple[Tensor, Tensor]:
    """Mean divergence of a token, and the share of tokens for which both name the same one (no gradient).

    Args:
        student: [M, H], what goes into the student's head.
        teacher: [M, H'], or its cache: ids [M, K], log-probabilities [M, K] and the logarithm of the rest [M].
        top_k: of ``kind=top_k``.
        temperature: of both distributions; the loss is multiplied by its square. A cache has that of 1.
    """

    def of_chunk(x: Tensor, *theirs: Tensor) -> tuple[Tensor, Tensor]:
        log_q = (student_head(x).float() / temperature).log_softmax(-1)
        if len(theirs) == 3:
            ids = theirs[0].long()
            log_p = torch.cat([theirs[1], theirs[2][:, None]], -1).float()
            log_p = log_p - log_p.logsumexp(-1, keepdim=True)  # half precision does not add up to one
            best, mine = ids[:, 0], log_q.argmax(-1)
            log_q = buckets(log_q, ids)
        else:
            with torch.no_grad():
                log_p = (teacher_head(theirs[0]).float() / temperature).log_softmax(-1)
            best, mine = log_p.argmax(-1), log_q.argmax(-1)
            if kind == "top_k":
                ids = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1).indices
                log_p, log_q = buckets(log_p, ids), buckets(log_q, ids)
        return divergence(log_q, log_p, kind, confidence).sum(), (best == mine).sum()

    total = same = torch.zeros((), device=student.device)
    for start in range(0, len(student), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        theirs = [t[part] for t in teacher] if isinstance(teacher, tuple) else [teacher[part]]
        loss, agreed = checkpoint(of_chunk, student[part], *theirs, use_reentrant=False)
        total, same = total + loss, same + agreed
    return total / len(student) * temperature**2, same / len(student)
