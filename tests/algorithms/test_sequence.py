"""Which algorithms go behind each other."""

import pytest

from dfq.algorithms.block_ap import BlockAP
from dfq.algorithms.gptq import GPTQ
from dfq.algorithms.quantease import QuantEase
from dfq.algorithms.sequence import Sequence
from dfq.cli import main
from dfq.errors import UserError


@pytest.mark.parametrize(
    ("steps", "second", "first"),
    [
        (("equalization", "quantease", "comq"), "COMQ", "QuantEase"),
        ((GPTQ(), "bias_correction", QuantEase()), "QuantEase", "GPTQ"),
        ((BlockAP(), {"_target_": "dfq.algorithms.gptq.GPTQ"}), "GPTQ", "BlockAP"),
    ],
)
def test_nothing_is_left_to_round_behind_what_rounds(steps, second, first):
    with pytest.raises(UserError) as error:
        Sequence(steps)
    assert str(error.value) == (
        f"got {second} behind {first} in algorithm.steps, and no weight left to round; allowed: one algorithm that "
        "rounds, behind those that prepare (equalization, awq, neuqi); leave out one of the two; distillation and "
        f"e2e_qp go on from {first}"
    )


@pytest.mark.parametrize(
    "steps",
    [
        ("awq", "neuqi", "quantease", "norm_tweaking"),
        ("equalization", "gptq", "distillation"),
        ("neuqi", "block_ap", "e2e_qp"),
        ("round_to_nearest", "gptq"),  # which leaves weights float
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
