"""Which algorithms go behind each other."""

from dataclasses import dataclass, field

import pytest

import dfq
from dfq.algorithms._base import Algorithm
from dfq.algorithms.gptq import GPTQ
from dfq.algorithms.quantease import QuantEase
from dfq.algorithms.sequence import Sequence
from dfq.cli import main
from dfq.errors import UserError
from dfq.settings import resolve


@pytest.mark.parametrize(
    ("steps", "second", "first"),
    [
        (("equalization", "quantease", "comq"), "COMQ", "QuantEase"),
        (("yaqa", "gptq"), "GPTQ", "YAQA"),
        ((GPTQ(), "bias_correction", QuantEase()), "QuantEase", "GPTQ"),
        (("reconstruction", {"_target_": "dfq.algorithms.gptq.GPTQ"}), "GPTQ", "Reconstruction"),
        (("squant", "gptq"), "GPTQ", "SQuant"),
        ((Sequence(("equalization", "yaqa")), "gptq"), "GPTQ", "YAQA"),
        (("yaqa", Sequence(("equalization", "gptq"))), "GPTQ", "YAQA"),
    ],
)
def test_nothing_is_left_to_round_behind_what_rounds(steps, second, first):
    with pytest.raises(UserError) as error:
        Sequence(steps)
    assert str(error.value) == (
        f"got {second} behind {first} in algorithm.steps, and no weight left to round; allowed: one algorithm that "
        "rounds, behind those that prepare (equalization, awq, neuqi); leave out one of the two; distillation, "
        f"e2e_rounding and e2e_qp go on from {first}"
    )


@pytest.mark.parametrize(
    "steps",
    [
        ("awq", "neuqi", "quantease", "norm_tweaking"),
        ("equalization", "gptq", "distillation"),
        ("neuqi", "block_ap", "e2e_qp"),
        ("neuqi", "yaqa", "e2e_rounding", "distillation"),
        ("round_to_nearest", "gptq"),  # which leaves weights float
        ("block_ap", "gptq"),  # as this does
    ],
)
def test_what_prepares_and_what_goes_on_is_taken(steps):
    assert Sequence(steps).steps == steps


def test_the_command_line_says_so_before_it_begins(tmp_path, capsys):
    words = [
        "run",
        "teacher=digits",
        "algorithm=sequence",
        "algorithm.steps=[gptq,quantease]",
        f"dataset_dir={tmp_path}/d",
    ]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("dfq: got QuantEase behind GPTQ in algorithm.steps, and no weight left")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Watcher(Algorithm):
    """Notes how far the weights are from their levels, in steps, where it stands."""

    seen: list[float] = field(default_factory=list)

    def run(self, work):
        for layer in work.student.layers.values():
            weight = layer.weight.detach()
            steps = (weight - layer.weight_quantizer(weight)) / layer.weight_quantizer.steps_of(weight)
            self.seen.append(float(steps.detach().abs().max()))


@pytest.mark.parametrize(
    ("name", "settings", "leaves_some"),
    [
        ("gptq", {}, False),
        ("quantease", {}, False),
        ("comq", {}, False),
        ("yaqa", {}, False),
        ("squant", {}, False),
        ("reconstruction", {"iterations": 3, "finish_iterations": 0}, False),
        ("block_ap", {"iterations": 3}, True),
        ("distillation", {"max_steps": 2}, True),
    ],
)
def test_what_is_left_to_round(name, settings, leaves_some, tmp_path):
    teacher, watcher = dfq.load_teacher("digits", device="cpu"), Watcher()
    dataset = dfq.generate(teacher, "gaussian", 32, tmp_path / "data")
    algorithm = resolve("algorithm", name, **settings)
    dfq.quantize(teacher, dataset, "w4a4", algorithm=Sequence((algorithm, watcher)))
    assert algorithm.rounds_weights is not leaves_some
    assert (max(watcher.seen) > 0.1) is leaves_some
    assert leaves_some or max(watcher.seen) < 1e-3


@pytest.mark.parametrize("step", [1, None, ["yaqa"], True], ids=str)
def test_a_step_that_is_no_algorithm(step):
    with pytest.raises(UserError, match=r"got .* in algorithm.steps; allowed: adaround \| .*yaqa, or mappings with"):
        Sequence(("yaqa", step))


def test_no_steps():
    with pytest.raises(UserError, match=r"got algorithm.steps=\[\]; allowed: one or more algorithms"):
        Sequence(())
