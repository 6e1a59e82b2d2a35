"""Networks that take token ids, along the arrows: made in Python, without transformers."""

import pytest
import torch
from conftest import SPEC
from torch import nn

import dfq
from dfq.dataset import SyntheticDataset
from dfq.errors import UserError
from dfq.settings import resolve
from dfq.teacher import TokenSpec, input_spec_from_dict

VOCABULARY, LENGTH = 13, 6
SPECS = [SPEC, TokenSpec(VOCABULARY, LENGTH)]


class Language(nn.Module):
    """Each token predicts the next from itself and its position; logits in a dict, as transformers gives them."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 16), nn.Embedding(LENGTH, 16)
        self.hidden, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids):
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        return {"logits": self.head(self.norm(x + self.hidden(x).relu()))}


class Sentiment(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Language(), nn.Linear(VOCABULARY, 3)

    def forward(self, input_ids):
        return self.head(self.body(input_ids)["logits"].mean(1))


def language(tied=False, seed=0, **options):
    torch.manual_seed(seed)
    given = {"task": "language_modeling", "vocab_size": VOCABULARY, "length": LENGTH, "device": "cpu"}
    return dfq.load_teacher(Language(tied), **{**given, **options})


# ------------------------------------------------------------------------------------------------ the spec


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_specs_have_one_interface(spec):
    first, again = (spec.example(3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == spec.batch_shape(3) == (3, *spec.size) and torch.equal(first, again)
    assert not torch.equal(spec.example(3, torch.Generator().manual_seed(8)), first)
    assert input_spec_from_dict(spec.to_dict()) == spec


def test_examples():
    ids = TokenSpec(VOCABULARY, 100).example(50, torch.Generator().manual_seed(0))
    assert ids.dtype == torch.int64 and ids.unique().tolist() == list(range(VOCABULARY))
    noise = SPEC.example(2, torch.Generator().manual_seed(0))
    assert torch.equal(noise, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("values", [{}, {"size": [1, 2, 3]}, {**SPEC.to_dict(), "length": 3}, {"vocab_size": 3}])
def test_what_is_no_spec(values):
    with pytest.raises(
        UserError,
        match=r"^got an input spec of .*; allowed: size, mean, std \(images\) \| vocab_size, length \(token ids\)$",
    ):
        input_spec_from_dict(values)


@pytest.mark.parametrize("name", ["vocab_size", "length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "8"])
def test_token_specs_that_cannot_be(name, value):
    with pytest.raises(UserError, match=rf"^got {name}={value}; allowed: a whole number >= 1$"):
        TokenSpec(**{"vocab_size": 8, "length": 8, name: value})


# ------------------------------------------------------------------------------------------------ the teacher


def test_a_network_in_memory():
    teacher = language()
    assert teacher.input_spec == TokenSpec(VOCABULARY, LENGTH) and teacher.example().shape == (2, LENGTH)
    assert teacher(teacher.example())["logits"].shape == (2, LENGTH, VOCABULARY)
    assert [call.name for call in teacher.dataflow.calls] == ["tokens", "positions", "hidden", "norm", "head", ""]
    assert teacher.batch_norms == {}


def test_tied_weights_count_once():
    assert language(tied=True).size_bytes == 4 * language(tied=True).num_parameters
    assert language().size_bytes == language(tied=True).size_bytes + 4 * VOCABULARY * 16


def test_a_cache_of_keys_and_values_is_turned_off():
    network = Language()
    network.config = type("Config", (), {"use_cache": True})()
    dfq.load_teacher(network, "language_modeling", vocab_size=VOCABULARY, length=LENGTH)
    assert network.config.use_cache is False


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"task": "language_modeling"},
            "got no vocab_size, length for a network in memory; allowed: task, vocab_size, length, device; "
            "give exactly these",
        ),
        (
            {"vocab_size": 5},
            "got no length for a network in memory; allowed: task, vocab_size, length, device; give exactly these",
        ),
        (
            {"vocab_size": 5, "length": 3, "mean": (0,), "nmae": 1},
            "got nmae, mean for a network in memory; allowed: task, vocab_size, length, device; give exactly these",
        ),
        (
            {"mean": (0,) * 3},
            "got no input_size, std for a network in memory; allowed: task, input_size=(C, H, W), mean, std, device; "
            "give exactly these",
        ),
        ({"vocab_size": 0, "length": 3}, "got vocab_size=0; allowed: a whole number >= 1"),
    ],
)
def test_mistakes_about_a_network_in_memory(options, message):
    with pytest.raises(UserError) as error:
        dfq.load_teacher(Language(), **options)
    assert str(error.value) == message


def test_a_task_that_the_loader_does_not_have():
    assert dfq.load_teacher("digits", task="classification", device="cpu").task == "classification"
    with pytest.raises(UserError) as error:
        dfq.load_teacher("digits", task="language_modeling", device="cpu")
    assert str(error.value) == (
        "got task=language_modeling for teacher=digits, whose networks are for task=classification"
    )


def test_ids_that_do_not_fit_are_the_users_mistake():
    with pytest.raises(UserError) as error:
        _ = language(length=LENGTH + 1).dataflow
    assert str(error.value).startswith("got an error from Language on token ids of [2, 7]: IndexError: ")
    assert str(error.value).endswith("; check vocab_size and length against what the network takes")


# ------------------------------------------------------------------------------------------------ the arrows


@pytest.mark.parametrize("generator", ["zeroq", "gaussian"])
def test_a_generator_of_images_is_refused_at_once(generator, tmp_path):
    with pytest.raises(UserError) as error:
        dfq.generate(language(), generator, num_samples=4, dataset_dir=tmp_path / "new")
    assert str(error.value).startswith(
        f"got generator={generator}, which is for images, and Language, which takes token ids; allowed: "
    )
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_evaluation_of_images_is_refused_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        dfq.evaluate(language(), evaluation="digits")
    message = str(error.value)
    assert message.startswith(
        "got evaluation=digits, which is for images, and Language, which takes token ids; allowed: "
    )
    assert "evaluation=none" in message and "evaluation=arrays" not in message and not list(tmp_path.iterdir())


def test_a_generator_of_ids_is_refused_for_images(make_teacher):
    generator = resolve("generator", "gaussian")
    object.__setattr__(generator, "kind", "token ids")
    with pytest.raises(UserError, match=r"which is for token ids, and plain, which takes images; allowed: .*zeroq"):
        dfq.generate(make_teacher(), generator, num_samples=4)


@pytest.mark.parametrize("tied", [False, True])
def test_from_ids_to_a_saved_student(tied, make_dataset, tmp_path):
    teacher = language(tied)
    dataset = make_dataset(teacher)
    student = dfq.quantize(
        teacher, dataset, "w8a8", algorithm="round_to_nearest", student_dir=tmp_path / "student", seed=0
    )
    assert student.input_spec == teacher.input_spec and "hidden" in student.layers
    task = resolve("task", "language_modeling")
    ids = teacher.input_spec.example(9, torch.Generator().manual_seed(2))
    with torch.no_grad():
        target, output = task.raw_outputs(teacher, ids), task.raw_outputs(student, ids)
        assert 0 < float(task.distillation_loss(output, target)) < 0.01 and task.agreement(output, target) > 0.9
        again = dfq.load_student(tmp_path / "student", teacher=language(tied, seed=3))
        assert torch.equal(task.raw_outputs(again, ids), output)
    figures = dfq.evaluate(teacher, student, [(ids, ids)], dataset)
    assert figures["teacher"]["perplexity"] == pytest.approx(
        float(nn.functional.cross_entropy(target[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()), rel=1e-5
    )
    assert figures["student"]["perplexity"] == pytest.approx(figures["teacher"]["perplexity"], rel=0.02)
    assert figures["fidelity"]["agreement"] > 0.8 and figures["fidelity"]["kl"] < 0.01


def test_a_classifier_of_token_sequences(make_dataset):
    torch.manual_seed(0)
    teacher = dfq.load_teacher(Sentiment(), vocab_size=VOCABULARY, length=LENGTH, device="cpu")
    assert teacher.task == "classification"
    student = dfq.quantize(teacher, make_dataset(teacher), "w8a8", algorithm="round_to_nearest")
    ids = teacher.example(40)
    with torch.no_grad():
        labels = teacher(ids).argmax(1)
    assert dfq.evaluate(teacher, student, [(ids, labels)])["student"]["top1"] > 0.9


def test_a_student_of_images_and_a_teacher_of_ids(make_teacher, make_dataset, tmp_path):
    images = make_dataset(make_teacher())
    settings = images.manifest["settings"] | {"input_spec": SPEC.to_dict()}
    other = SyntheticDataset.create(tmp_path / "other", settings, {"pixels": False, "labels": False})
    other.write_shard(0, images.tensors(), 0.0)
    with pytest.raises(UserError, match="made for another input than that of Language"):
        dfq.quantize(language(), other)
