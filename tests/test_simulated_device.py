"""What takes a device, on one that is not there (:mod:`simulated_device`): no tensor is forgotten, none is doubled."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import NETS, as_teacher
from launching import environment

import dfq
from dfq.scheme import Scheme

SCRIPT = Path(__file__).parent / "simulated_device.py"
DEVICE = "simulated"


def run(*scenarios):
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices that are written in Python")
    words = [sys.executable, str(SCRIPT), *scenarios]
    result = subprocess.run(words, env=environment(), capture_output=True, text=True)
    done = [line.removeprefix("done ") for line in result.stdout.splitlines() if line.startswith("done ")]
    assert result.returncode == 0 and done == list(scenarios), result.stderr[-3000:]


def test_some_of_each():
    pytest.importorskip("transformers")
    run("refuses", "generators:zeroq,gaussian", "images:gptq,hqq", "writes", "text:awq,neuqi,lqer")


@pytest.mark.slow
def test_all_generators():
    run("generators:gaussian,zeroq,deep_inversion,genie,gdfq,spectrum,mixture")


@pytest.mark.slow
def test_all_algorithms_of_images():
    named = "round_to_nearest equalization bias_correction gptq quantease comq squant hqq neuqi clip_search yaqa"
    run("images:" + named.replace(" ", ","), "images:adaround,brecq,genie_m,qdrop,reconstruction")


@pytest.mark.slow
def test_all_algorithms_of_text():
    pytest.importorskip("transformers")
    run("text:round_to_nearest,gptq,hqq,neuqi,lqer,norm_tweaking,block_ap", "text:rotation,awq,yaqa,clip_search")


@pytest.mark.slow
def test_detectors():
    run("detectors:one,two")


# ------------------------------------------------------------------------------------------------ scenarios

BLOCKWISE = ("adaround", "brecq", "genie_m", "qdrop", "reconstruction", "block_ap")
BRIEF = {  # settings of what would take long, where each operation is looked at
    **{name: {"iterations": 2} for name in ("zeroq", "deep_inversion", "genie", "spectrum", *BLOCKWISE)},
    "gdfq": {"iterations": 2},
    "neuqi": {"num_scales": 3},
    "awq": {"num_alphas": 2},
    "hqq": {"iterations": 2},
}


def scratch():
    return Path(tempfile.mkdtemp())


def refuses():
    """The device is one: it has no float64, and no operation for tensors of two devices."""
    x = torch.randn(3).to(DEVICE)
    assert x.device.type == DEVICE and torch.equal((x + 1).cpu(), x.cpu() + 1)
    for wrong, kind in [(x.double, TypeError), (lambda: x + torch.zeros(3), RuntimeError), (x.numpy, Exception)]:
        with pytest.raises(kind):
            wrong()


def on_both(make):
    """What ``make(teacher)`` gives on the CPU and there."""
    return make("cpu"), make(DEVICE)


def generators(*names):
    for name in names:
        found = on_both(
            lambda device, name=name: dfq.generate(
                as_teacher(NETS["plain"]()).to(device), name, 8, scratch() / "data", **BRIEF.get(name, {})
            )
        )
        images = [dataset.tensors()["images"] for dataset in found]
        torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def images(*algorithms):
    teachers = on_both(lambda device: as_teacher(NETS["residual"]()).to(device))
    dataset = dfq.generate(teachers[0], "gaussian", 24, scratch() / "data")
    for name in algorithms:
        students = [quantized(t, dataset, "w4a8", name) for t in teachers]
        agree(students, dataset.tensors()["images"])
        pairs = zip(teachers, students, strict=True)
        found = [dfq.evaluate(*pair, dataset=dataset)["fidelity"]["kl"] for pair in pairs]
        assert found[1] == pytest.approx(found[0], rel=0.05, abs=2e-4), name  # training goes apart in the last digits


def writes():
    """The same tokens, with what a teacher says of them, through every setting that looks at probabilities."""
    from tiny_language import tiny_llama

    drawn = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "temperature": (0.8, 1.2), "min_likelihood": -9.0}
    found = on_both(
        lambda device: dfq.generate(
            tiny_llama().to(device), "self_generation", 8, scratch() / "data", cache_teacher=4, **drawn
        )
    )
    tensors = [dataset.tensors() for dataset in found]
    assert torch.equal(tensors[0]["input_ids"], tensors[1]["input_ids"])
    torch.testing.assert_close(tensors[0]["teacher_log_probs"], tensors[1]["teacher_log_probs"])


def text(*algorithms):
    import numpy as np
    from tiny_language import tiny_llama

    teachers = on_both(lambda device: tiny_llama().to(device))
    dataset, path = dfq.generate(teachers[0], "random_tokens", 24, scratch() / "data"), scratch() / "x.npz"
    ids = teachers[0].example(4)
    np.savez(path, input_ids=ids.numpy())
    for name in algorithms:
        scheme = "w4a8kv4" if name == "rotation" else "w4a8kv4_k32"
        students = [quantized(t, dataset, scheme, name) for t in teachers]
        agree(students, ids)
        figures = [dfq.evaluate(*pair, "tokens", path=str(path)) for pair in zip(teachers, students, strict=True)]
        assert figures[0]["student"]["perplexity"] == pytest.approx(figures[1]["student"]["perplexity"], rel=0.02)
    for scheme, quantizer in [("wnvfp4_a16", "percentile"), (Scheme.from_dict(TERNARY), "twn")]:
        for teacher in teachers:
            dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest", weight_quantizer=quantizer)


TERNARY = {
    "weight": {"grid": "ternary", "granularity": "per_channel"},
    "activation": {"num_bits": 16, "grid": "float"},
}


def detectors(*names):
    import tiny_detectors

    for name in names:
        make = {"one": tiny_detectors.one_stage, "two": tiny_detectors.two_stages}[name]
        teachers = on_both(lambda device, make=make: make().to(device))
        settings = {"iterations": 2, "final_iterations": 2, "batch_size": 2}
        made = [dfq.generate(teacher, "box_sampling", 4, scratch() / "data", **settings) for teacher in teachers]
        torch.testing.assert_close(*(dataset.tensors()["images"] for dataset in made), rtol=1e-3, atol=1e-3)
        students = [dfq.quantize(teacher, made[0], "w8a8", algorithm="gptq") for teacher in teachers]
        pairs = zip(teachers, students, strict=True)
        found = [dfq.evaluate(*pair, dataset=made[0])["fidelity"]["agreement"] for pair in pairs]
        assert found[1] == pytest.approx(found[0], abs=0.05) and found[1] > 0.5


def quantized(teacher, dataset, scheme, name):
    quantizers = dict.fromkeys(("weight_quantizer", "activation_quantizer"), "min_max")  # others try many ranges
    return dfq.quantize(teacher, dataset, scheme, algorithm=name, **quantizers, **BRIEF.get(name, {}))


def agree(students, samples):
    with torch.no_grad():
        here, there = (student(samples) for student in students)
    here, there = (getattr(outputs, "logits", outputs) for outputs in (here, there))
    assert there.device.type == DEVICE
    error = (there.cpu() - here).square().mean() / here.square().mean()
    assert float(error) < 1e-3, f"{float(error):.2e} apart"
