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
from dfq.algorithms.sequence import Sequence
from dfq.cli import main
from dfq.costs import (
    Cost,
    Counts,
    Machine,
    count,
    counted_generation,
    counted_quantization,
    extrapolated,
    in_processes,
)
from dfq.errors import UserError
from dfq.generators.zeroq import ZeroQ
from dfq.lightning.trainer import SINGLE, Training
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
    # Beside the teacher's 4 P, which are there: 20 P of docs/plan.md.
    assert cost.memory_bytes == 5 * 4000 + 2 * 4 * 4000 and cost.disk_bytes == 4 * 4000 + 500
    assert counted_quantization(counts, machine, RoundToNearest(16), 100, 4).memory_bytes == 4000 + 4 * 4000
    thrice = counted_quantization(counts, machine, Sequence((RoundToNearest(16),), views=3), 100, 4)
    assert thrice.seconds == pytest.approx(2 * 3 * 16 * 2e6 / 0.5e9)
    blocks = counted_quantization(counts, machine, resolve("algorithm", "reconstruction"), 100, 4)
    assert blocks.disk_bytes == 4000 + 500 and blocks.memory_bytes < 2 * 4000 + (4 + 100) * 4000 + 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processes_hold_what_the_documentation_says(device):
    """docs/plan.md: all of it in each with ddp, (24 P) / W with fsdp; without GPUs one memory for all."""
    p, has_gpus = 4000, device == "cuda"
    held, alone = p, Cost(1.0, 1.0, 5 * p)  # the teacher's weights, and what training needs beside them

    def of(strategy, devices, nodes=1):
        return in_processes(alone, Training(strategy, devices, nodes), torch.device(device), p, 0, held)

    assert in_processes(alone, SINGLE, torch.device(device), p, 0, held) == alone
    each = held + of("ddp", 8).memory_bytes
    assert each == (7 * p if has_gpus else 8 * 7 * p)
    each = held + of("fsdp", 8).memory_bytes
    assert each == (6 * p / 8 if has_gpus else 8 * (6 * p / 8 + 2 * p))
    if has_gpus:
        assert of("ddp", 8).seconds == 1.0 and held + of("fsdp", 4, 8).memory_bytes == 6 * p / 32
    else:
        assert of("ddp", 8).cpu_seconds == 8.0
        assert of("ddp", 2, 4).memory_bytes < of("ddp", 8).memory_bytes, "other computers have memory of their own"


def test_a_plan_knows_the_trainer(here, monkeypatch):
    """Told by trials, and counted: ddp takes more than one process, and fsdp of what is large less than ddp."""
    monkeypatch.setattr(plans, "allocated_bytes", lambda device: 2**28)  # what tests before have left differs
    teacher, found = as_teacher(NETS["mlp"]()), {}
    for strategy, devices in (("single", 1), ("ddp", 8), ("fsdp", 8)):
        training = Training(strategy, devices)
        algorithm = Distillation(max_steps=4, batch_size=4, checks=1, num_calibration_samples=8)
        for has_weights in (True, False) if strategy != "fsdp" else (False,):
            plan = plans.make(
                lambda weights=True: as_teacher_without_forward("mlp") if not weights else teacher,
                lambda t, algorithm=algorithm, training=training: replace(
                    experiment(t, training=training), algorithm=algorithm
                ),
                teacher.device,
                has_weights=has_weights,
            )
            [stage] = [stage for stage in plan.stages if stage.name == "quantize"]
            found[strategy, has_weights] = plan.memory_bytes(stage)
            assert ("8 processes of" in stage.what) == (strategy != "single")
    assert all(found["ddp", has_weights] > 7 * found["single", has_weights] for has_weights in (True, False))
    assert 7 * found["single", False] < found["fsdp", False] < found["ddp", False]


def test_what_is_counted_has_the_same_stages_as_what_is_tried(here):
    class Judged:
        num_samples, reference_path = 50, "real"

    def judged(teacher, **changed):
        return replace(experiment(teacher, **changed), evaluation=Judged(), references=("gaussian", "real"))

    teacher = as_teacher(NETS["plain"]())
    counted = plans.make(lambda weights: as_teacher_without_forward("plain"), judged, teacher.device, has_weights=False)
    tried = plans.make(lambda: teacher, judged, teacher.device)
    assert [(s.name, s.state) for s in counted.stages] == [(s.name, s.state) for s in tried.stages]
    assert [s.name for s in counted.stages] == ["generate", "quantize", "evaluate", "reference", "reference"]
    e = experiment(teacher)
    dataset = generate(teacher, e.generator, 24, dataset_dir=here / "data")
    methods = e.scheme, e.algorithm, e.weight_quantizer, e.activation_quantizer
    quantize(teacher, dataset, *methods, student_dir=here / "student")
    folders = {"dataset_dir": here / "data", "student_dir": here / "student"}
    for build, has_weights in ((lambda weights: as_teacher_without_forward("plain"), False), (lambda: teacher, True)):
        found = plans.make(build, lambda t: experiment(t, **folders), teacher.device, has_weights=has_weights)
        assert [s.state for s in found.stages] == ["there already"] * 2


def test_a_time_limit_is_one_of_the_wall(make_teacher, tmp_path):
    """Two threads use two seconds of processor a second."""
    from dfq import costs

    limited = Distillation(max_steps=4, batch_size=4, checks=1, num_calibration_samples=8, time_limit_s=1e-3)
    teacher = make_teacher()
    data = generate(teacher, ZeroQ(batch_size=8, iterations=1), 24, dataset_dir=tmp_path)
    quantizers = resolve("quantizer", "min_max"), resolve("quantizer", "min_max")
    with plans.quietly(), pytest.MonkeyPatch.context() as patch:
        clock = costs.timed
        patch.setattr(costs, "timed", lambda *a: (c := clock(*a)) and replace(c, cpu_seconds=2 * c.seconds))
        cost, _ = costs.of_quantization(teacher, data, 24, W4, limited, *quantizers)
    assert cost.seconds == pytest.approx(1e-3) and cost.cpu_seconds == pytest.approx(2e-3, rel=0.01)


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
