"""Evaluation by EleutherAI's lm-evaluation-harness; a file of its own, since only this one needs that package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, ClassVar

from dfq.errors import UserError
from dfq.hooks import evaluation_mode
from dfq.settings import Bound, PositiveInt
from dfq.student import Student
from dfq.teacher import Teacher
from dfq.tokenizer import folder_of, load_tokenizer


@dataclass(frozen=True)
class LMEval:
    """Tasks of EleutherAI's lm-evaluation-harness, which reads their data itself, usually from the hub."""

    tasks: tuple[str, ...]  # as the harness calls them: [lambada_openai,hellaswag]
    num_fewshot: Annotated[int, Bound(at_least=0)] | None = None  # examples before each question; null: the task's own
    limit: PositiveInt | None = None  # questions of a task; null: all
    batch_size: PositiveInt = 8  # questions at a time
    tokenizer: str | None = None  # folder or hub id; null: the teacher's

    kind: ClassVar[str] = "token ids"
    num_samples: ClassVar[int] = 1  # there is something to measure
    reference_path: ClassVar[str | None] = None

    def __post_init__(self):
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                "got evaluation=lm_eval, which needs lm_eval, not installed here", do="pip install 'dfq[lm_eval]'"
            )
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise UserError(f"got evaluation.tasks={self.tasks!r}", "a list of tasks, such as [lambada_openai]")

    def fingerprint(self) -> str:
        """Changes when the harness does; it keeps its data by versions of its own."""
        import lm_eval

        return str(getattr(lm_eval, "__version__", ""))

    def metrics_of(self, model: Teacher | Student, teacher: Teacher) -> dict[str, float]:
        """Task and metric → its value; errors of the mean are left out."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        name = self.tokenizer or folder_of(teacher)
        if name is None or not hasattr(teacher.module, "config"):
            raise UserError(
                f"got evaluation=lm_eval and {teacher.name}, which "
                + ("is no network of transformers" if name else "comes without a tokenizer"),
                "teacher=huggingface, or evaluation.tokenizer=FOLDER",
            )
        tokenizer = load_tokenizer(name, "evaluation.tokenizer")
        with evaluation_mode(model.module):
            wrapped = HFLM(pretrained=model.module, tokenizer=tokenizer, batch_size=self.batch_size)
            found = simple_evaluate(
                model=wrapped, tasks=list(self.tasks), num_fewshot=self.num_fewshot, limit=self.limit, bootstrap_iters=0
            )
        metrics = {}
        for task, values in found["results"].items():
            for key, value in values.items():
                metric, _, how = key.partition(",")
                is_metric = "," in key and "_stderr" not in metric  # the others are counts and settings
                if is_metric and isinstance(value, int | float):
                    metrics["_".join([task, metric, *([how] if how not in ("none", "") else [])])] = float(value)
        return metrics
