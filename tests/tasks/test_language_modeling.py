"""The language-modeling tasks: what is understood, and figures against independent computations."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.text import Perplexity as Torchmetrics

from dfq.errors import UserError
from dfq.settings import resolve

RNG = torch.Generator().manual_seed(0)
IDS = torch.randint(11, (5, 7), generator=RNG)
LOGITS = torch.randn(5, 7, 11, generator=RNG) * 3
OTHER = LOGITS + torch.randn(LOGITS.shape, generator=RNG)


@pytest.fixture(params=["language_modeling", "masked_language_modeling"])
def task(request):
    return resolve("task", request.param)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: {"logits": y, "past_key_values": None},
        lambda y: (y, None),
        lambda y: type("Output", (), {"logits": y})(),
    ],
)
def test_what_is_understood(task, wrap):
    assert task.raw_outputs(lambda ids: wrap(LOGITS[: len(ids)]), IDS) is not None
    assert torch.equal(task.raw_outputs(lambda ids: wrap(LOGITS), IDS), LOGITS)
    assert task.num_outputs(LOGITS) == 11


@pytest.mark.parametrize(
    "outputs, got",
    [
        (LOGITS[:, -1], r"a Tensor of shape \(5, 11\)"),
        (LOGITS[:, -1:], r"logits \[5, 1, 11\] of token ids \[5, 7\]"),
        ({"last_hidden_state": LOGITS}, "a dict"),
        (None, "a NoneType"),
    ],
)
def test_what_is_not(task, outputs, got):
    allowed = r"logits \[N, T, vocabulary\] of token ids \[N, T\] for a language model"
    with pytest.raises(UserError, match=f"^got {got} from the network; allowed: {allowed}$"):
        task.raw_outputs(lambda ids: outputs, IDS)


def test_distillation_loss_is_the_kl_of_a_token(task):
    p, log_q = LOGITS.double().softmax(-1), OTHER.double().log_softmax(-1)
    wanted = (p * (p.log() - log_q)).sum(-1).mean()
    assert float(task.distillation_loss(OTHER, LOGITS)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(task.distillation_loss(LOGITS, LOGITS)) == pytest.approx(0, abs=1e-6)


def test_agreement_counts_positions(task):
    changed = LOGITS.clone()
    changed[0, 0] = -changed[0, 0]
    assert float(task.agreement(changed, LOGITS)) == pytest.approx(34 / 35) and task.agreement(LOGITS, LOGITS) == 1


def measure(task, parts):
    metrics = task.metrics(11)
    for logits, labels in parts:
        metrics.update(logits, labels)
    return {name: float(value) for name, value in metrics.compute().items()}


def test_perplexity_against_torchmetrics(task):
    theirs = Torchmetrics(ignore_index=-100)
    labels = IDS.clone()
    labels[1, 4:] = -100  # padding
    if task.causal:
        theirs.update(LOGITS[:, :-1], labels[:, 1:])
    else:
        theirs.update(LOGITS, labels)
    # Batches of different sizes: a token counts the same in each.
    found = measure(task, [(LOGITS[:1], labels[:1]), (LOGITS[1:], labels[1:])])
    assert found == {"perplexity": pytest.approx(float(theirs.compute()), rel=1e-5)}


def test_perplexity_of_a_network_that_knows_nothing_or_everything():
    task = resolve("task", "language_modeling")
    assert measure(task, [(torch.zeros(5, 7, 11), IDS)])["perplexity"] == pytest.approx(11)
    following = 100 * F.one_hot(IDS.roll(-1, 1), 11).float()  # the last one predicts the first token: not looked at
    assert measure(task, [(following, IDS)])["perplexity"] == pytest.approx(1)
    assert measure(task, [(following.roll(1, 1), IDS)])["perplexity"] > 1e20  # no shift: wrong everywhere


def test_a_token_that_is_all_but_ruled_out_leaves_perplexity_finite():
    task = resolve("task", "language_modeling")
    logits = torch.zeros(1, 3, 2)
    logits[0, 0, 1] = 200.0  # float32 has no exp(-200)
    found = measure(task, [(logits, torch.tensor([[0, 0, 0]]))])["perplexity"]
    assert found == pytest.approx(math.exp((200 + math.log(2)) / 2), rel=1e-5)


def test_there_are_no_targets_to_pull_ids_toward(task):
    message = "^got a network that takes token ids, .*; allowed: a generator that makes token ids$"
    with pytest.raises(UserError, match=message):
        task.synthesis_targets(4, 11, torch.Generator(), 0.1)
    with pytest.raises(UserError, match=message):
        task.synthesis_loss(LOGITS, LOGITS)
