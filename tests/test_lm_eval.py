"""lm-evaluation-harness as an evaluation: a stand-in of it, which asks the network itself."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

import dfq
from dfq.errors import UserError
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve

transformers = pytest.importorskip("transformers")


@pytest.fixture
def teacher(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config)
    transformers.utils.logging.disable_progress_bar()
    module.save_pretrained(tmp_path / "teacher")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "teacher")
    return dfq.load_teacher("huggingface", name=str(tmp_path / "teacher"), length=8, device="cpu")


@pytest.fixture
def harness(monkeypatch):
    """What dfq calls of the harness; the "score" is a logit of the network that was handed over."""
    asked = []

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def simple_evaluate(model, tasks, **settings):
        asked.append((tasks, settings, model.batch_size, model.model.training))
        ids = torch.tensor([model.tokenizer("w3 w4 w5")["input_ids"]])
        with torch.no_grad():
            score = float(model.model(ids).logits[0, -1, 7])
        values = {
            "acc,none": score,
            "acc_stderr,none": 0.1,
            "exact_match,strict": score / 2,
            "alias": "x",
            "samples": 9,
        }
        return {"results": {task: values for task in tasks}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    modules["lm_eval"].simple_evaluate, modules["lm_eval"].__version__ = simple_evaluate, "0.0"
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    return asked


def test_scores_of_teacher_and_student(teacher, harness, make_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = make_dataset(teacher, 8)
    student = dfq.quantize(
        teacher, dataset, Scheme(TensorScheme(2, True, "per_channel"), FLOAT), algorithm="round_to_nearest"
    )
    found = dfq.evaluate(teacher, student, "lm_eval", tasks=["quiz", "riddle"], limit=3, batch_size=2)
    ids = torch.tensor([[3, 4, 5]])
    for role, model in (("teacher", teacher), ("student", student)):
        score = float(model(ids).logits[0, -1, 7])
        wanted = {"quiz_acc": score, "quiz_exact_match_strict": score / 2}
        assert found[role] == pytest.approx(wanted | {k.replace("quiz", "riddle"): v for k, v in wanted.items()})
    settings = {"num_fewshot": None, "limit": 3, "bootstrap_iters": 0}
    assert harness == [(["quiz", "riddle"], settings, 2, False)] * 2
    assert dfq.evaluate(teacher, student, "lm_eval", tasks=["quiz", "riddle"], limit=3, batch_size=2) == found
    assert len(harness) == 2, "what was measured is read again"


def test_messages(teacher, make_teacher, harness, monkeypatch):
    with pytest.raises(UserError, match=r"got evaluation\.tasks='quiz'; allowed: a list \[x, \.\.\.\], each x text"):
        resolve("evaluation", "lm_eval", tasks="quiz")
    with pytest.raises(UserError, match=r"got evaluation\.tasks=\(\); allowed: a list of tasks, such as"):
        resolve("evaluation", "lm_eval", tasks=[])
    evaluation = resolve("evaluation", "lm_eval", tasks=["quiz"])
    teacher.config = None
    teacher.module.config._name_or_path = ""
    with pytest.raises(UserError) as error:
        evaluation.metrics_of(teacher, teacher)
    assert str(error.value) == (
        "got evaluation=lm_eval and teacher, which comes without a tokenizer; allowed: teacher=huggingface, or "
        "evaluation.tokenizer=FOLDER"
    )
    with pytest.raises(
        UserError, match="got evaluation=lm_eval, which is for token ids, and plain, which takes images"
    ):
        dfq.evaluate(make_teacher(), None, evaluation)
    monkeypatch.delitem(sys.modules, "lm_eval")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        resolve("evaluation", "lm_eval", tasks=["quiz"])
    assert str(error.value) == (
        "got evaluation=lm_eval, which needs lm_eval, not installed here; pip install 'dfq[lm_eval]'"
    )
