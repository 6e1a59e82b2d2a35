"""dfq plan: lines through trials, counts against counting by hand, what is shown, refused and left behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import NETS, as_teacher

from dfq import plan as plans
from dfq.algorithms.distillation import Distillation
from dfq.algorithms.round_to_nearest import RoundToNearest
from dfq.cli import main
from dfq.costs import Cost, Counts, Machine, count, counted_generation, counted_quantization, extrapolated
from dfq.errors import UserError
from dfq.generators.zeroq import ZeroQ
from dfq.pipeline import Experiment, generate, quantize
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import resolve
from dfq.teacher import InputSpec

W4 = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8))


def experiment(teacher, **changed):
    return Experiment(
        teacher, ZeroQ(batch_size=8, iterations=3), W4, RoundToNearest(16), resolve("quantizer", "min_max"),
        resolve("quantizer", "min_max"), num_samples=24, **changed,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_line_through_each_setting():
    def run(steps, samples):
        return Cost(3 + 2 * steps + 0.5 * samples, 1 + steps, 10 * samples, 7)

    found = extrapolated(run, {"steps": 1, "samples": 2}, {"steps": 3, "samples": 4}, {"steps": 100, "samples": 50})
    assert found == Cost(pytest.approx(3 + 200 + 25), pytest.approx(101), pytest.approx(500), 7)


def test_noise_never_gives_time_back():
    times = iter([5.0, 4.0])
    found = extrapolated(lambda steps: Cost(next(times)), {"steps": 1}, {"steps": 2}, {"steps": 1000})
    assert found.seconds == 5.0


def test_counts_are_those_of_counting_by_hand():
    _, counts = count(lambda: as_teacher_without_forward("plain"))
    macs = 8 * 3 * 9 * 64 + 12 * 8 * 9 * 9 + 12 * 10  # 8x8 places; stride 2 without padding leaves 3x3
    assert counts.macs == macs
    assert counts.num_parameters == 8 * 27 + 16 + 12 * 72 + 12 + 24 + 130
    assert counts.output_bytes == 40 and counts.activation_bytes > 4 * 2 * 8 * 64


def as_teacher_without_forward(kind):
    from dfq.teacher import Teacher

    return Teacher(NETS[kind](), "classification", InputSpec((3, 8, 8), (0, 0, 0), (1, 1, 1)))


def test_what_is_counted_follows_the_formulas():
    counts, machine = Counts(1000, 2e6, 4000, 40), Machine(1e9, 1e9)
    spec = InputSpec((3, 8, 8), (0, 0, 0), (1, 1, 1))
    cost = counted_generation(counts, machine, ZeroQ(batch_size=8, iterations=5), 24, 8, spec, 1)
    assert cost.seconds == pytest.approx(24 * 5 * 2 * 2e6 / 0.5e9) and cost.memory_bytes == 8 * 4000
    assert cost.disk_bytes == 24 * (4 * 192 + 40)
    assert counted_generation(counts, machine, ZeroQ(batch_size=8, iterations=5), 24, 8, spec, 2).seconds == (
        pytest.approx(cost.seconds * 2 / 3)  # three batches: one rank makes two of them
    )
    some = Distillation(max_steps=10, batch_size=4, checks=2, num_calibration_samples=16)
    cost = counted_quantization(counts, machine, some, 100, 4)
    assert cost.seconds == pytest.approx((2 * 16 + 4 * 40 + 2 * 10 * 3) * 2e6 / 0.5e9)
    assert cost.memory_bytes == 6 * 4000 + 2 * 4 * 4000 and cost.disk_bytes == 4 * 4000 + 500


def test_stages_that_are_there_cost_nothing_and_nothing_is_left(here):
    teacher = as_teacher(NETS["plain"]())
    found = plans.make(lambda: teacher, experiment, teacher.device)
    assert [(s.name, s.state) for s in found.stages] == [("generate", "to do"), ("quantize", "to do")]
    assert all(s.cost.seconds > 0 and s.cost.memory_bytes > 0 and s.cost.disk_bytes > 0 for s in found.stages)
    assert found.total.seconds == pytest.approx(sum(s.cost.seconds for s in found.stages))
    assert not list(here.iterdir()), "a plan has left something behind"
    e = experiment(teacher)
    dataset = generate(teacher, e.generator, 24)
    found = plans.make(lambda: teacher, experiment, teacher.device)
    assert [s.state for s in found.stages] == ["there already", "to do"] and found.stages[0].cost == Cost()
    quantize(teacher, dataset, e.scheme, e.algorithm, e.weight_quantizer, e.activation_quantizer)
    found = plans.make(lambda: teacher, experiment, teacher.device)
    assert [s.state for s in found.stages] == ["there already", "there already"]
    assert json.loads(json.dumps(plans.to_dict(found)))["fits"] is True


def test_what_will_not_fit_is_said(here):
    stage = plans.Stage("quantize", "", plans.ESTIMATED, Cost(memory_bytes=8e9, disk_bytes=3e9))
    found = plans.Plan([stage], "", torch.device("cpu"), 10**9, 4 * 10**9, 10**12)
    with pytest.raises(UserError) as error:
        plans.refuse(found)
    assert str(error.value) == (
        "got a run that will not fit: quantize takes 9 GB of memory, and 4 GB are there; lower generator.batch_size, "
        "algorithm.batch_size or num_samples, or take a device with more memory"
    )
    assert plans.Plan([stage], "", torch.device("cpu"), 10**9, 10**12, 10**9).lacks == [
        "files take 3 GB, and 1 GB are free"
    ]
    plans.refuse(replace(found, free_memory_bytes=None))  # nothing says how much there is


def test_weights_that_are_not_here_are_counted(here, capfd):
    """A folder with nothing but config.json, as one has of a network that is too large to be fetched."""
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    ).save_pretrained("llama")  # fmt: skip
    words = ["teacher=huggingface", "teacher.name=llama", "teacher.length=16", "device=cpu", "exporter=gguf"]
    assert main(["plan", *words, "generator=self_generation", "algorithm=gptq", "scheme=w4a16_g32"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "counted, not tried" in shown and "self_generation" in shown and "in all" in shown
    assert [path.name for path in Path().iterdir()] == ["llama"], "a plan has made something"
