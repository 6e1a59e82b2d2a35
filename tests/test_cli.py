"""The command line, without torch: mistakes and their answers, help, completion, sweeps, exit statuses.

What a command does is tested elsewhere; here ``dfq.api`` is a stub that remembers what it was called with.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import pytest

import dfq
from dfq import checks, commands, settings, source
from dfq.cli import main
from dfq.errors import UserError
from dfq.scheme import FLOAT, Scheme, TensorScheme

ROOT = Path(dfq.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
HEAVY = {"torch", "torchvision", "timm", "kornia", "pytorch_lightning", "lightning", "torchmetrics", "numpy"}


@pytest.fixture
def api(monkeypatch, tmp_path):
    """A stub of dfq.api in a working folder with a few files to point at; its ``calls`` are (command, config)."""
    stub = types.ModuleType("dfq.api")
    stub.calls = []
    stub.command = lambda name, config: stub.calls.append((name, {**config, "argv": list(sys.argv)}))
    monkeypatch.setitem(sys.modules, "dfq.api", stub)
    monkeypatch.setattr(dfq, "api", stub, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/manifest.json").write_text("{}")
    Path("student").mkdir()
    Path("student/student.json").write_text('{"teacher": {"config": {"_target_": "dfq.teachers.digits.load"}}}')
    Path("my_student").mkdir()
    Path("my_student/student.json").write_text('{"teacher": {"config": {"_target_": "dfq.teachers.factory.load"}}}')
    Path("empty").mkdir()
    Path("weights.pt").write_bytes(b"")
    Path("no_archive.npz").write_bytes(b"not a zip file")
    with zipfile.ZipFile("test.npz", "w") as archive:
        archive.writestr("images.npy", b"")
        archive.writestr("labels.npy", b"")
    with zipfile.ZipFile("unlabelled.npz", "w") as archive:
        archive.writestr("images.npy", b"")
    Path("my_networks.py").write_text("raise RuntimeError('read, never imported')\ndef load(): ...\n")
    return stub


def answer(capsys, line):
    """(exit status, stderr) of one command line."""
    status = main(shlex.split(line))
    return status, capsys.readouterr().err


def listed(family):
    return " | ".join(settings.choices(family))


def options(group, name):
    return ", ".join(f"{group}.{option}" for option in commands.group_options(group, name))


def parts(where):
    return ", ".join(f"scheme.{where}.{option}" for option in source.signature("dfq.scheme.TensorScheme"))


SCHEME_OPTIONS = ", ".join(f"scheme.{option}" for option in source.signature("dfq.scheme.Scheme"))
RUN = ", ".join(commands.COMMANDS["run"].options)
FACTORY = "run teacher=factory teacher.factory=my_networks:load teacher.input_size=[3,8,8]"
STATS = "teacher.mean=[0,0,0] teacher.std=[1,1,1]"
QUOTE = "quote it for the shell if it holds spaces or brackets"
NPZ = "a .npz file with images uint8 [N, H, W, C] and labels int64 [N]"

# What was typed, and the one line that answers it (behind "dfq: ").
MISTAKES = {
    # words
    "quantise": f"got the command quantise; allowed: {', '.join(commands.COMMANDS)}; did you mean 'quantize'?",
    "--foo": "got --foo; allowed: --help, -h, --version, --completion bash|zsh, COMMAND --help",
    "--completion fish": "got --completion fish; allowed: bash | zsh",
    "seed=1": f"got seed=1 before a command; allowed: {', '.join(commands.COMMANDS)}; write dfq run seed=1",
    "run --multi": f"got --multi; allowed: {', '.join(commands.FLAGS)}; did you mean '--multirun'?",
    "run --cfg foo": "got --cfg foo; allowed: job | hydra | all",
    "run --config-dir nowhere": "got --config-dir nowhere; allowed: a folder with yaml files in the layout of conf/",
    "run num_samples 5": "got num_samples; allowed: option=value; write num_samples=VALUE",
    "run =3": f"got =3; allowed: option=value; {QUOTE}",
    "run seed=[": f"got seed=[; allowed: option=value with a plain value, [a,b] or {{k: v}}; {QUOTE}",
    # options and choices
    "run generatr=zeroq": f"got generatr; allowed: {RUN}; did you mean 'generator'?",
    "run iterations=5": f"got iterations; allowed: {RUN}; did you mean 'generator.iterations'?",
    "run quantizer=mse": f"got quantizer; allowed: {RUN}; did you mean 'weight_quantizer'?",
    "run seed.x=1": f"got seed.x, which dfq run does not use; allowed: {RUN}; did you mean 'seed'?",
    "run ~generator": "got ~generator, and generator can't be left out; allowed: option=value",
    "generate algorithm=distillation": (
        "got algorithm, which dfq generate does not use; allowed: "
        "teacher, generator, num_samples, seed, device, dataset_dir, rank, world_size, processes, "
        "parts, name, experiment; "
        "dfq run takes it"
    ),
    "run generator=zeroqq": f"got generator=zeroqq; allowed: {listed('generator')}; did you mean 'zeroq'?",
    "run weight_quantizer=msee": f"got weight_quantizer=msee; allowed: {listed('quantizer')}; did you mean 'mse'?",
    "run experiment=no_such": f"got experiment=no_such; allowed: {listed('experiment')}",
    "run evaluation=null": f"got evaluation=null; allowed: {listed('evaluation')}",
    "run generator.iteration=5": (
        f"got generator.iteration; allowed: {options('generator', 'zeroq')}; did you mean 'generator.iterations'?"
    ),
    "run generator=gaussian generator.learning_rate=1": (
        f"got generator.learning_rate; allowed: {options('generator', 'gaussian')}; generator=box_sampling takes it"
    ),
    "run teacher.weights=false": (
        "got teacher.weights; allowed: nothing, teacher=digits has no options; teacher=torchvision takes it"
    ),
    "run generator=zeroq,gaussian": (
        "got generator=zeroq,gaussian without --multirun; allowed: one value; "
        "add --multirun for a run with each of them"
    ),
    "run hydra/launcher=no_such": (
        f"got hydra/launcher=no_such; allowed: {' | '.join(['basic', *commands.plugins('launcher')])}; "
        "pip install 'dfq[launch]' for joblib and submitit"
    ),
    "run hydra.foo=1": "got hydra.foo=1; Could not override 'hydra.foo'. To append to your config use +hydra.foo=1",
    # types and ranges
    "run num_samples=many": "got num_samples='many'; allowed: a whole number >= 1",
    "run num_samples=0": "got num_samples=0; allowed: a whole number >= 1",
    "run seed=x": "got seed='x'; allowed: a whole number >= 0",
    "run device=gpu": "got device=gpu; allowed: auto | cpu | cuda | cuda:N | mps",
    "run device=null": "got device=null; allowed: auto | cpu | cuda | cuda:N | mps",
    "run references=[foo]": "got references=['foo']; allowed: a list [x, ...], each x gaussian | real",
    "run generator.iterations=0.5": "got generator.iterations=0.5; allowed: a whole number >= 1",
    "run generator.label_smoothing=2": "got generator.label_smoothing=2; allowed: a number from 0 to 1",
    "run algorithm.flip=1": "got algorithm.flip=1; allowed: true | false",
    "run scheme.policy=edges": (
        "got scheme.policy='edges'; allowed: all | edges_8bit | hardware; did you mean 'edges_8bit'?"
    ),
    "run scheme.polcy=all": f"got scheme.polcy; allowed: {SCHEME_OPTIONS}; did you mean 'scheme.policy'?",
    "run scheme.attentoin.num_bits=8": (
        f"got scheme.attentoin; allowed: {SCHEME_OPTIONS}; did you mean 'scheme.attention'?"
    ),
    "run scheme.weight.gird=seq": (
        f"got scheme.weight.gird; allowed: {parts('weight')}; did you mean 'scheme.weight.grid'?"
    ),
    "run scheme.softmax=log2": (
        f"got scheme.softmax='log2'; allowed: a mapping with {parts('X').replace('scheme.X.', '')}"
    ),
    "run scheme.weight.num_bits=11": (
        "got scheme.weight.num_bits=11; allowed: 1 to 8; or grid=float for float weights"
    ),
    "run scheme.weight.num_bits=0": (
        "got scheme.weight.num_bits=0; allowed: a whole number: weights 1 to 8, activations 2 to 16; "
        "give a bit width in that range"
    ),
    "run scheme=w4a4 scheme.weight.range=7bit": ("got scheme.weight.range=7bit and num_bits=4; allowed: num_bits=8"),
    "run scheme=w4a16 scheme.policy=hardware": (
        "got scheme.policy=hardware, scheme.activation.grid=float, granularity=per_tensor and dynamic=false; allowed: "
        "grid=uniform, granularity=per_tensor and dynamic=false; "
        "integer runtimes know every activation's grid beforehand; use scheme.policy=all for others"
    ),
    "run 'scheme.overrides={head: {wieght: {num_bits: 8}}}'": (
        "got scheme.overrides['head']={'wieght': {'num_bits': 8}}; allowed: {weight: {num_bits: 8}, activation: {...}}"
    ),
    "run 'scheme.overrides={head.*: {weight: {bits: 8}}}'": (
        "got scheme.overrides['head.*'].weight.bits; allowed: "
        f"{parts('overrides[' + repr('head.*') + '].weight')}; "  # as python writes it
        "did you mean 'scheme.overrides['head.*'].weight.num_bits'?"
    ),
    "run 'scheme.overrides={head, tail: 8}'": (
        "got scheme.overrides={head, tail: 8}; allowed: option=value with a plain value, [a,b] or {k: v}; "
        "quote it for the shell if it holds spaces or brackets"
    ),
    "run \"scheme.overrides={'head.*': {weight: {num_bits: 8}}}\"": (
        "got scheme.overrides={'head.*': {weight: {num_bits: 8}}}; "
        "allowed: option=value with a plain value, [a,b] or {k: v}; write 'head.*': without the quotes"
    ),
    "run generator._target_=os.system": (
        "got generator._target_='os.system'; allowed: a method of dfq or of an installed package; "
        "nothing of Python's standard library"
    ),
    "run --multirun num_samples=8,0": "got num_samples=0; allowed: a whole number >= 1",
    "run -m generator=zeroq,gausian seed=1,2": (
        f"got generator=gausian; allowed: {listed('generator')}; did you mean 'gaussian'?"
    ),
    # teachers
    "run teacher=factory": (
        "got no teacher.factory; allowed: package.module:function, called without arguments (or with kwargs); "
        "returns the network; give teacher.factory=..."
    ),
    f"{FACTORY} teacher.std=[1,1,1]": (
        "got no teacher.mean; allowed: of the normalization (byte / 255 - mean) / std, one a channel "
        "(a list [x, ...], each x a number); give teacher.mean=..."
    ),
    f"{FACTORY} teacher.mean=[0] teacher.std=[1,1,1]": (
        "got teacher.mean=[0] and teacher.input_size=[3,8,8]; allowed: one number a channel, and 3 channels"
    ),
    f"{FACTORY} {STATS} teacher.input_size=[3,8]": (
        "got teacher.input_size=[3,8]; allowed: [channels, height, width], whole numbers >= 1"
    ),
    f"{FACTORY} {STATS} teacher.factory=my_networks.load": (
        "got teacher.factory=my_networks.load; allowed: package.module:function"
    ),
    f"{FACTORY} {STATS} teacher.factory=nomodule:load": (
        "got teacher.factory=nomodule:load, and no module nomodule was found; "
        "allowed: a module that python can import; put its folder on PYTHONPATH, or run dfq in that folder"
    ),
    f"{FACTORY} {STATS} teacher.factory=my_networks:laod": (
        "got teacher.factory=my_networks:laod, and my_networks has no laod; allowed: a function of that module; "
        "did you mean 'load'?"
    ),
    f"{FACTORY} {STATS} teacher.checkpoint=nothere.pt": (
        "got teacher.checkpoint=nothere.pt, which does not exist; allowed: weights as .safetensors, .pt or .pth"
    ),
    f"{FACTORY} {STATS} teacher.checkpoint=weihgts.pt": (
        "got teacher.checkpoint=weihgts.pt, which does not exist; allowed: weights as .safetensors, .pt or .pth; "
        "did you mean 'weights.pt'?"
    ),
    f"{FACTORY} {STATS} teacher.adapter=my_networks.load": (
        "got teacher.adapter=my_networks.load; allowed: package.module:class"
    ),
    f"{FACTORY} {STATS} teacher.adapter=my_networks:Load": (
        "got teacher.adapter=my_networks:Load, and my_networks has no Load; allowed: a class of that module; "
        "did you mean 'load'?"
    ),
    f"{FACTORY} {STATS} teacher.task=detection +teacher.task_settings.least_scor=0.5": (
        "got teacher.task_settings.least_scor; allowed: teacher.task_settings.box_weight, "
        "teacher.task_settings.least_score; did you mean 'teacher.task_settings.least_score'?"
    ),
    f"{FACTORY} {STATS} teacher.task=detection teacher.task_settings={{box_weight:-1}}": (
        "got teacher.task_settings.box_weight=-1; allowed: a number >= 0"
    ),
    "run teacher=timm teacher.name=resnet18 teacher.checkpoint=weights.pt teacher.pretrained=true": (
        "got teacher.checkpoint and teacher.pretrained=true; allowed: one of the two; leave one away"
    ),
    "run teacher=torchvision teacher.name=resnet18 teacher.checkpoint=weights.pt teacher.weights=DEFAULT": (
        "got teacher.checkpoint and teacher.weights=DEFAULT; allowed: one of the two; leave one away"
    ),
    # files
    "run evaluation=coco": "got no evaluation.images; allowed: DIR with the images; give evaluation.images=...",
    "run evaluation=coco evaluation.images=empty": (
        "got no evaluation.annotations; allowed: FILE.json with images, annotations and categories; "
        "give evaluation.annotations=..."
    ),
    "run evaluation=coco evaluation.images=nothere evaluation.annotations=boxes.json": (
        "got evaluation.images=nothere, which does not exist; allowed: a folder of images"
    ),
    "run evaluation=coco evaluation.images=empty evaluation.annotations=weights.pt": (
        "got evaluation.annotations=weights.pt; allowed: boxes in COCO's format, a .json file"
    ),
    "run evaluation=coco evaluation.images=empty evaluation.annotations=boxes.json evaluation.fit=crop": (
        "got evaluation.fit='crop'; allowed: stretch | pad"
    ),
    "run evaluation=arrays": (
        "got no evaluation.path; allowed: .npz with images uint8 [N, H, W, C] or [N, H, W], labels int64 [N]; "
        "give evaluation.path=..."
    ),
    "run evaluation=arrays evaluation.path=nothere/test.npz": (
        f"got evaluation.path=nothere/test.npz, which does not exist; allowed: {NPZ}; there is no folder nothere either"
    ),
    "run evaluation=arrays evaluation.path=data": (
        f"got evaluation.path=data, which is a folder; allowed: {NPZ}; name the file in it"
    ),
    "run evaluation=arrays evaluation.path=weights.pt": f"got evaluation.path=weights.pt; allowed: {NPZ}",
    "run evaluation=arrays evaluation.path=no_archive.npz": (
        "got evaluation.path=no_archive.npz, which is no .npz file (File is not a zip file); "
        f"allowed: {NPZ}; write it with numpy.savez"
    ),
    "run evaluation=arrays evaluation.path=unlabelled.npz": (
        f"got evaluation.path=unlabelled.npz without labels; allowed: {NPZ}; it holds images"
    ),
    "run evaluation=imagefolder evaluation.path=empty": (
        "got evaluation.path=empty, which has no folders in it; allowed: one folder of images per class"
    ),
    "quantize": (
        "got no dataset_dir; allowed: folder of the synthetic dataset; give dataset_dir=DIR; dfq generate makes one"
    ),
    "quantize dataset_dir=nothere": (
        "got dataset_dir=nothere, which does not exist; allowed: a dataset's folder; dfq generate makes one"
    ),
    "quantize dataset_dir=empty": (
        "got dataset_dir=empty, which has no manifest.json; allowed: a dataset's folder; dfq generate makes one"
    ),
    "evaluate": "got no student_dir; allowed: folder of the student; give student_dir=DIR; dfq quantize makes one",
    "export student_dir=weights.pt": (
        "got student_dir=weights.pt, which is a file; allowed: a student's folder; dfq quantize makes one"
    ),
    "generate dataset_dir=weights.pt": (
        "got dataset_dir=weights.pt, and weights.pt is a file; allowed: a folder that is there or can be made"
    ),
    "report output_dir=": "got no output_dir; allowed: dfq report output_dir=DIR",
    "inspect": "got no folder; allowed: dfq inspect DIR",
    "inspect data student": "got data student; allowed: dfq inspect DIR",
    "inspect nothere": "got nothere, which does not exist; allowed: dfq inspect DIR",
    "report data": "got data; allowed: dfq report output_dir=DIR",
    "report output_dir=data": (
        "got output_dir=data, which has no report.json; allowed: the folder of a run; dfq run makes one"
    ),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_in_one_line_and_leaves_nothing_behind(api, capsys, line):
    before = sorted(Path().iterdir())
    assert answer(capsys, line) == (2, f"dfq: {MISTAKES[line]}\n")
    assert not api.calls
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("package, name", [("timm", "resnet81.a1_in1k"), ("torchvision", "resnet81")])
def test_a_model_that_the_package_does_not_have(api, capsys, package, name):
    status, error = answer(capsys, f"run teacher={package} teacher.name={name}")
    assert status == 2
    assert error.startswith(f"dfq: got teacher.name={name}, and {package} has no such model; allowed: one of its ")
    assert error.endswith("did you mean 'resnet18'?\n")


def test_weights_that_timm_does_not_have(api, capsys):
    status, error = answer(capsys, "run teacher=timm teacher.name=resnet18.a9_in1k")
    assert status == 2
    assert "and timm has no such weights; allowed: resnet18 | resnet18.a1_in1k" in error
    for name in ("resnet18.a1_in1k", "resnet18", "hf-hub:someone/something"):
        assert answer(capsys, f"run teacher=timm teacher.name={name}") == (0, "")


@pytest.mark.slow  # imports timm and torchvision
def test_every_model_of_the_packages_passes():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    assert set(timm.list_models()) <= checks.registered_models("timm")
    for name in timm.list_models("*resnet*", pretrained=True):
        listed = checks.registered_weights(name.partition(".")[0])
        assert not listed or "." not in name or name in listed
    known = checks.registered_models("torchvision")
    assert set(torchvision.models.list_models(module=torchvision.models)) <= known


def test_a_package_that_is_not_installed(api, capsys, monkeypatch):
    Path("my_exporter.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nimport os\nimport not_installed_a.part\n"
        "if TYPE_CHECKING:\n    import only_for_types\ntry:\n    import optional\nexcept ImportError: ...\n"
        "class Exporter:\n    suffix = '.bin'\n"
    )
    line = "run exporter._target_=my_exporter.Exporter artifact_path="
    got = "dfq: got exporter=onnx_qdq, which needs "
    assert answer(capsys, f"{line}a.bin") == (
        2,
        f"{got}not_installed_a, not installed here; pip install 'not_installed_a'\n",
    )
    requirements = ["torch>=2", 'not-installed-a>=1; extra == "fast"', 'not_installed_b>=1; extra == "fast"']
    monkeypatch.setattr(checks.metadata, "requires", lambda name: requirements)
    assert answer(capsys, f"{line}a.bin") == (
        2,
        f"{got}not_installed_a and not_installed_b, not installed here; pip install 'dfq[fast]'\n",
    )
    got = "dfq: got artifact_path=a.onnx; allowed: a file name that ends in .bin; give artifact_path=a.bin\n"
    assert answer(capsys, f"{line}a.onnx") == (2, got)


def test_the_shipped_exporter_without_its_packages(api, capsys, monkeypatch):
    find_spec = source.find_spec
    monkeypatch.setattr(source, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    requirements = [f'{name}>=1; extra == "onnx"' for name in ("onnx", "onnxscript", "onnxruntime")]
    monkeypatch.setattr(checks.metadata, "requires", lambda name: requirements)
    assert answer(capsys, "run") == (
        2,
        "dfq: got exporter=onnx_qdq, which needs onnxscript, not installed here; pip install 'dfq[onnx]'\n",
    )
    assert answer(capsys, "quantize dataset_dir=data")[0] == 0  # which exports nothing


def test_nothing_heavy_is_imported_for_help_completion_and_mistakes(tmp_path):
    code = f"""
        import os, sys
        from dfq.cli import main
        os.environ["COMP_LINE"] = "dfq run generator.iter"
        for line in [
            "--help", "run --help", "quantize generator", "run generator=x", "run seed=x", "--complete",
            "run --cfg job", "run generator.iterations=x", "run -m scheme=w4a4,w8a8 num_samples=0",
            "run teacher=timm teacher.name=resnet81", "quantize dataset_dir=nothere", "inspect nothere",
        ]:
            main(line.split())
        found = {HEAVY!r} & set(sys.modules)
        assert not found, found
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ schemes


W4, A4 = TensorScheme(4, True, "per_channel"), TensorScheme(4)
HEAD = {"head.*": {"weight": {"num_bits": 8}}}


@pytest.mark.parametrize(
    "words, expected",
    [
        ("scheme=w4a4 scheme.policy=hardware", Scheme(W4, A4, "hardware")),
        ("scheme=w4a4 scheme.attention.num_bits=8", Scheme(W4, A4, attention=TensorScheme(8))),
        ("scheme=w4a4 scheme.softmax.grid=log2", Scheme(W4, A4, softmax=TensorScheme(4, grid="log2"))),
        ("scheme=w4a4 scheme.weight.grid=seq", Scheme(TensorScheme(4, True, "per_channel", grid="seq"), A4)),
        ("scheme=w4a4 scheme.weight.grid=ternary", Scheme(TensorScheme(2, True, "per_channel", grid="ternary"), A4)),
        ("scheme=w8a8 scheme.weight.range=7bit", Scheme(TensorScheme(8, True, "per_channel", range="7bit"))),
        (
            "scheme=w4a4 scheme.weight.granularity=per_group scheme.weight.group_size=16",
            Scheme(TensorScheme(4, True, "per_group", 16), A4),
        ),
        (
            "scheme=w4a16_g128 scheme.weight.group_size=64 scheme.weight.scale_format=e8m0",
            Scheme(TensorScheme(4, True, "per_group", 64, scale_format="e8m0"), FLOAT),
        ),
        ("scheme=w4a4 scheme.activation.granularity=per_token", Scheme(W4, TensorScheme(4, granularity="per_token"))),
        ("scheme=w4a16 scheme.name=mine", Scheme(W4, FLOAT, name="mine")),
        ("scheme=w4a4 'scheme.overrides={head.*: {weight: {num_bits: 8}}}'", Scheme(W4, A4, overrides=HEAD)),
        (
            "scheme=w4a4 'scheme.overrides={layer1.0.conv*: {weight: {grid: float}}, *: {activation: {num_bits: 8}}}'",
            Scheme(
                W4,
                A4,
                overrides={"layer1.0.conv*": {"weight": {"grid": "float"}}, "*": {"activation": {"num_bits": 8}}},
            ),
        ),
        ("scheme=w4a4 scheme.overrides.head.weight.num_bits=8", Scheme(W4, A4, overrides={"head": HEAD["head.*"]})),
        (
            "scheme=w4a4 'scheme.overrides={0: {weight: {num_bits: 8}}}'",
            Scheme(W4, A4, overrides={"0": HEAD["head.*"]}),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_a_scheme_is_told_on_the_command_line(api, capsys, words, expected):
    assert answer(capsys, f"quantize dataset_dir=data {words}") == (0, "")
    [(_, config)] = api.calls
    found = Scheme.from_dict(config["scheme"])
    assert found == expected and list(found.overrides) == list(expected.overrides)
    assert f"_{expected.name}_" in config["output_dir"]


def test_the_example_in_the_help_of_overrides_works(api, capsys):
    example = re.search("'(.*)'", source.signature("dfq.scheme.Scheme")["overrides"].doc)[0]
    assert answer(capsys, f"quantize dataset_dir=data scheme.overrides={example}") == (0, "")
    [(_, config)] = api.calls
    assert config["scheme"]["overrides"] == HEAD


def test_a_sweep_over_a_schemes_settings(api, capsys):
    line = "quantize dataset_dir=data -m scheme=w4a4 scheme.policy=all,hardware scheme.weight.grid=uniform,seq"
    status, error = answer(capsys, line)  # every combination is checked before the first one runs
    assert (status, api.calls) == (2, []) and "scheme.policy=hardware, scheme.weight.grid=seq" in error
    assert answer(capsys, line.replace("hardware", "edges_8bit"))[0] == 0
    found = [(config["scheme"]["policy"], config["scheme"]["weight"]["grid"]) for _, config in api.calls]
    assert found == [("all", "uniform"), ("all", "seq"), ("edges_8bit", "uniform"), ("edges_8bit", "seq")]


# ------------------------------------------------------------------------------------------------ runs


def test_run_hands_over_the_resolved_configuration(api, capsys):
    line = "run num_samples=64 generator.iterations=3 weight_quantizer=min_max 'dataset_dir=2024' evaluation=none"
    assert answer(capsys, line) == (0, "")
    [(command, config)] = api.calls
    assert command == "run"
    assert config["num_samples"] == 64
    assert config["generator"]["iterations"] == 3
    assert config["weight_quantizer"]["_target_"] == settings.load("quantizer", "min_max")["_target_"]
    assert config["dataset_dir"] == "2024"  # text, although it looks like a number
    assert config["references"] == ["gaussian", "real"]
    assert config["command"] == f"dfq {line.replace(chr(39), '')}"
    assert config["teacher_given"] is False
    assert config["name"] == "digits_zeroq_w4a4_distillation"
    output_dir = Path(config["output_dir"])
    assert output_dir.is_dir() and output_dir.parent == Path("outputs/digits_zeroq_w4a4_distillation").absolute()
    assert sorted(path.name for path in output_dir.iterdir()) == [".hydra"]
    # What a process that Lightning starts beside this one is given: the command, not Hydra's arguments.
    assert config["argv"][1:] == shlex.split(line)
    assert "hydra" not in config and "experiment" not in config


@pytest.mark.parametrize(
    "line, name, evaluation",
    [
        ("run", "digits_zeroq_w4a4_distillation", "digits"),
        ("run evaluation=none", "digits_zeroq_w4a4_distillation", "none"),
        ("run evaluation=arrays evaluation.path=test.npz", "digits_zeroq_w4a4_distillation", "arrays"),
        (f"{FACTORY} {STATS}", "my_networks_zeroq_w4a4_distillation", "none"),
        (
            "run teacher=timm teacher.name=resnet18.a1_in1k scheme=w8a8",
            "resnet18.a1_in1k_zeroq_w8a8_distillation",
            "none",
        ),
        ("run name=mine", "mine", "digits"),
        ("generate generator=gaussian", "digits_gaussian", None),
        ("quantize dataset_dir=data algorithm=round_to_nearest", "digits_w4a4_round_to_nearest", None),
        ("evaluate student_dir=student", "evaluate_student", "digits"),
        ("evaluate student_dir=my_student", "evaluate_my_student", "none"),
        ("evaluate student_dir=my_student teacher=digits", "evaluate_my_student", "digits"),
        ("evaluate student_dir=student evaluation=none", "evaluate_student", "none"),
        ("export student_dir=student", "export_student", None),
    ],
)
def test_names_of_folders_and_the_evaluation_that_a_teacher_chooses(api, capsys, line, name, evaluation):
    assert answer(capsys, line) == (0, "")
    [(command, config)] = api.calls
    assert config["name"] == name
    assert Path(config["output_dir"]).parent.name == name
    assert set(config) - {"command", "output_dir", "teacher_given", "argv"} <= set(commands.COMMANDS[command].options)
    if evaluation is not None:
        assert config["evaluation"]["_target_"] == settings.load("evaluation", evaluation)["_target_"]


def test_whether_the_teacher_was_given(api, capsys):
    main(["evaluate", "student_dir=student"])
    main(["evaluate", "student_dir=student", "teacher=digits"])
    assert [config["teacher_given"] for _, config in api.calls] == [False, True]
    # a student's folder knows its teacher, so that one is not asked for what it would need elsewhere
    capsys.readouterr()
    assert answer(capsys, "export student_dir=student teacher=factory")[1].startswith("dfq: got no teacher.factory")


def test_inspect_and_report_leave_no_folder(api, capsys):
    Path("data/report.json").write_text("{}")
    assert answer(capsys, "inspect data") == (0, "")
    assert answer(capsys, "report output_dir=data") == (0, "")
    assert [(name, config.get("path", config.get("output_dir"))) for name, config in api.calls] == [
        ("inspect", "data"),
        ("report", "data"),
    ]
    assert not Path("outputs").exists()


def test_experiment_and_config_dir_of_the_users_own(api, capsys):
    Path("my_conf/experiment").mkdir(parents=True)
    Path("my_conf/generator").mkdir()
    Path("my_conf/experiment/row.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /teacher: digits\n  - override /generator: mine\n"
        "  - override /quantizer@weight_quantizer: lsq\nnum_samples: 32\ngenerator:\n  batch_size: 16\n"
    )
    Path("my_conf/generator/mine.yaml").write_text("_target_: dfq.generators.gaussian.Gaussian\n")
    assert answer(capsys, "run --config-dir my_conf experiment=row seed=7") == (0, "")
    [(_, config)] = api.calls
    assert (config["num_samples"], config["seed"], config["name"], config["teacher_given"]) == (32, 7, "row", True)
    assert config["generator"] == {"_target_": "dfq.generators.gaussian.Gaussian", "batch_size": 16}
    assert config["weight_quantizer"]["_target_"] == settings.load("quantizer", "lsq")["_target_"]
    assert answer(capsys, "run experiment=row")[0] == 2  # the folder counts for its own command line only
    Path("my_conf/experiment/row.yaml").write_text("# @package _global_\ngenerator:\n  iteration: 16\n")
    assert "got generator.iteration;" in answer(capsys, "run --config-dir my_conf experiment=row")[1]
    Path("my_conf/experiment/row.yaml").write_text("# @package _global_\nnum_sample: 16\n")
    assert "got num_sample;" in (error := answer(capsys, "run --config-dir my_conf experiment=row")[1])
    assert error.endswith("did you mean 'num_samples'?\n")


def test_every_experiment_that_is_shipped_composes(api, capsys):
    for name in settings.choices("experiment"):
        main(["run", f"experiment={name}", "--cfg", "job"])
        output = capsys.readouterr()
        assert f"name: {name}" in output.out and not output.err


def test_the_configuration_can_be_looked_at_before_it_is_complete(api, capsys):
    assert main(["quantize", "teacher=factory", "algorithm.max_steps=5", "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    assert "factory: ???" in text and "max_steps: 5" in text and "hydra" not in text
    assert main(["quantize", "algorithm.max_step=5", "--cfg", "job"]) == 2
    assert not Path("outputs").exists()


def test_a_folder_for_the_run_that_cannot_be_made(api, capsys):
    Path("outputs").write_text("")
    got = "dfq: got hydra.run.dir=outputs, and outputs is a file; allowed: a folder that is there or can be made\n"
    assert answer(capsys, "run") == (2, got)
    assert answer(capsys, "run hydra.run.dir=elsewhere") == (0, "")
    assert api.calls[0][1]["output_dir"] == str(Path("elsewhere").absolute())


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "models/Qwen3-0.6B", "../models/Qwen3-0.6B/", "Qwen3-0.6B"])
def test_a_run_is_named_after_its_network_not_after_where_that_lies(api, name):
    Path("empty/x").mkdir()
    Path("models/Qwen3-0.6B").mkdir(parents=True)
    Path("models/Qwen3-0.6B/config.json").write_text("{}")
    Path("models/Qwen3-0.6B/model.safetensors").write_bytes(b"")
    os.chdir("empty" if name.startswith("..") else ".")
    line = f"generate teacher=huggingface teacher.name={name} generator=self_generation"
    assert main(shlex.split(line)) == 0
    assert api.calls[0][1]["name"] == "Qwen3-0.6B_self_generation"


def test_runs_that_start_within_a_second_have_folders_of_their_own(api):
    for _ in range(4):  # each takes some 0.1 s
        assert main(["run", "name=mine"]) == 0
    folders = [Path(config["output_dir"]) for _, config in api.calls]
    assert len(set(folders)) == 4 and {folder.parent.name for folder in folders} == {"mine"}
    assert folders == sorted(folders)


def test_multirun_runs_every_combination(api, capsys):
    line = "run --multirun scheme=w4a4,w8a8 generator.iterations=1,2 algorithm=round_to_nearest"
    assert main(shlex.split(line)) == 0
    output = capsys.readouterr()
    assert not output.err
    assert output.out.splitlines()[0] == "job 0: scheme=w4a4 generator.iterations=1"
    assert [(config["scheme"]["weight"]["num_bits"], config["generator"]["iterations"]) for _, config in api.calls] == [
        (4, 1),
        (4, 2),
        (8, 1),
        (8, 2),
    ]
    folders = [Path(config["output_dir"]) for _, config in api.calls]
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    assert folders[0].parent.parent == Path("outputs/digits_zeroq_round_to_nearest").absolute()  # what the jobs share
    # Each job's own command line runs that job alone, in a process of Lightning's and for who repeats it.
    assert "--multirun" not in api.calls[3][1]["argv"]
    repeated = api.calls[3][1]["argv"][1:]
    api.calls.clear()
    assert main(repeated) == 0
    assert [(config["scheme"]["weight"]["num_bits"], config["generator"]["iterations"]) for _, config in api.calls] == [
        (8, 2)
    ]


def test_a_large_sweep_is_checked_value_by_value(api, capsys):
    seeds = ",".join(map(str, range(30)))
    assert answer(capsys, f"run -m seed={seeds},x scheme=w4a4,w8a8") == (
        2,
        "dfq: got seed='x'; allowed: a whole number >= 0\n",
    )


def test_a_mistake_found_while_running(api, capsys):
    def command(name, config):
        raise UserError("got a checkpoint without conv.weight", "all keys of the network")

    api.command = command
    line = "dfq: got a checkpoint without conv.weight; allowed: all keys of the network\n"
    assert answer(capsys, "run") == (2, line)
    assert answer(capsys, "run -m seed=0,1") == (2, line * 2)  # the second job is tried all the same


def test_a_bug_keeps_its_traceback(api):
    def command(name, config):
        raise ZeroDivisionError("ours")

    api.command = command
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["run"])


def test_exit_statuses_pass_through(api, capsys):
    api.command = lambda name, config: sys.exit(3)
    for line in ("run", "run -m seed=0,1"):
        with pytest.raises(SystemExit) as caught:
            main(shlex.split(line))
        assert caught.value.code == 3

    def interrupted(name, config):  # what Lightning's Trainer makes of Ctrl-C
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    api.command = interrupted
    assert answer(capsys, "run") == (
        130,
        "dfq: interrupted: everything finished so far is kept; run the same command to go on\n",
    )


@pytest.mark.parametrize("words", [["run"], ["run", "-m", "seed=0,1"], ["inspect", "."]], ids=" ".join)
def test_ctrl_c_is_one_line_and_130(tmp_path, words):
    code = """
        import signal, sys, time, types
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
        api = sys.modules["dfq.api"] = types.ModuleType("dfq.api")
        def command(name, config):
            print("ready", flush=True)
            time.sleep(60)
        api.command = command
        from dfq.cli import main
        sys.exit(main(sys.argv[1:]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words],
        env=ENVIRONMENT,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "dfq: interrupted: everything finished so far is kept; run the same command to go on\n"


def test_the_process_is_left_as_it_was(api):
    before = (list(sys.argv), list(sys.path), list(settings.search_path), dict(os.environ))
    main(["run", "seed=3"])
    main(["run", "seed=x"])
    assert (sys.argv, sys.path, settings.search_path, dict(os.environ)) == before


# ------------------------------------------------------------------------------------------------ help


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0 and main([]) == 0
    text = capsys.readouterr().out
    for name, command in commands.COMMANDS.items():
        assert f"  {name:<10}{command.summary}" in text


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_every_command(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    command = commands.COMMANDS[name]
    assert command.example in text and command.summary in text
    groups, _ = commands.root()
    for option in command.options:
        assert f"  {option}=" in text
        if option in groups:
            assert " | ".join(settings.choices(groups[option].family)) in text


def test_help_shows_all_of_a_scheme(capsys):
    main(["quantize", "scheme=wternary_a8", "--help"])
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split("=")[0].strip(): line for line in lines if line.startswith("      scheme.")}
    for part in ("weight", "activation"):
        for option, parameter in source.signature("dfq.scheme.TensorScheme").items():
            assert parameter.doc and parameter.doc in shown[f"scheme.{part}.{option}"]
    for option in ("policy", "name", "overrides"):
        assert source.signature("dfq.scheme.Scheme")[option].doc in shown[f"scheme.{option}"]
    # What the yaml sets, what its grid implies, and what it leaves at its default.
    for value in ("weight.grid=ternary ", "weight.num_bits=2 ", "activation.num_bits=8 ", "weight.range=full "):
        assert f"scheme.{value}" in "".join(shown.values())
    assert [name for name in shown if "attention" in name or "softmax" in name] == [
        "scheme.attention.grid",
        "scheme.softmax.grid",
    ]
    assert "scheme.softmax.grid=float" in shown["scheme.softmax.grid"]


def test_help_of_a_scheme_with_quantized_attention(capsys, tmp_path):
    (tmp_path / "scheme").mkdir()
    (tmp_path / "scheme" / "mine.yaml").write_text("attention: {num_bits: 6}\n")
    main(["quantize", "--config-dir", str(tmp_path), "scheme=mine", "--help"])
    text = capsys.readouterr().out
    assert "scheme.attention.num_bits=6 " in text and "scheme.attention.dynamic=false " in text
    assert "scheme.softmax.num_bits" not in text and "scheme.weight.num_bits=8 " in text


def test_help_describes_the_groups_that_are_chosen(capsys):
    main(["run", "generator=zeroq", "--help"])
    assert "generator.iterations=50" in (text := capsys.readouterr().out)
    assert source.signature("dfq.generators.zeroq.ZeroQ")["iterations"].doc in text
    main(["run", "generator=gaussian", "teacher=factory", "--help"])
    text = capsys.readouterr().out
    assert "generator.iterations" not in text and "teacher.factory=..." in text
    assert main(["run", "generator=zeroqq", "--help"]) == 2


def test_the_groups_and_options_of_the_commands_are_those_of_the_configuration():
    groups, plain = commands.root()
    assert {"teacher", "generator", "scheme", "weight_quantizer"} <= set(groups)
    assert all(group.doc for group in groups.values()) and all(option.doc for option in plain.values())
    for name, command in commands.COMMANDS.items():
        if name != "report":
            assert set(command.options) <= {*groups, *plain}
    of_a_part = {"rank", "world_size", "processes", "parts"}  # of a dataset: a run needs the whole of it
    assert set(commands.COMMANDS["run"].options) == {*groups, *plain} - of_a_part


# ------------------------------------------------------------------------------------------------ completion


@pytest.mark.parametrize(
    "line, expected",
    [
        ("dfq qu", ["quantize"]),
        ("dfq --comp", ["--completion"]),
        ("dfq --completion b", ["bash"]),
        ("dfq run generator=zer", ["generator=zeroq"]),
        ("dfq run generator=zeroq,gau", ["generator=zeroq,gaussian"]),
        ("dfq run generator.it", ["generator.iterations="]),
        ("dfq run generator=gaussian generator.", ["generator.batch_size=", "generator.memory_bytes="]),
        ("dfq run weight_quantizer=m", [f"weight_quantizer={name}" for name in ("min_max", "moving_average", "mse")]),
        ("dfq run scheme.weight.g", [f"scheme.weight.{name}=" for name in ("granularity", "group_size", "grid")]),
        ("dfq run scheme.softmax.grid=l", ["scheme.softmax.grid=log2"]),
        ("dfq run scheme.weight.range=", [f"scheme.weight.range={name}" for name in ("full", "narrow", "7bit")]),
        ("dfq run scheme.weight.scale_format=e", [f"scheme.weight.scale_format={name}" for name in ("e8m0", "e4m3")]),
        ("dfq run scheme.activation.dynamic=t", ["scheme.activation.dynamic=true"]),
        ("dfq run scheme=wmx", ["scheme=wmxfp4_a16", "scheme=wmxfp4_amxfp4"]),
        ("dfq run seed=1 scheme.pol", ["scheme.policy="]),
        ("dfq run scheme.policy=e", ["scheme.policy=edges_8bit"]),
        ("dfq run scheme.policy=h", ["scheme.policy=hardware"]),
        ("dfq run algorithm.flip=", ["algorithm.flip=true", "algorithm.flip=false"]),
        ("dfq run device=c", ["device=cpu", "device=cuda"]),
        ("dfq run hydra/launcher=b", ["hydra/launcher=basic"]),
        ("dfq run --mul", ["--multirun"]),
        ("dfq generate algo", []),
        ("dfq quantize dataset_dir=da", ["dataset_dir=data/"]),
        ("dfq evaluate evaluation=arrays evaluation.path=te", ["evaluation.path=test.npz"]),
        ("dfq inspect stu", ["student/"]),
        ("dfq report output_dir=data/m", ["output_dir=data/manifest.json"]),
        ("dfq nonsense ", []),
    ],
)
def test_completion(api, capsys, monkeypatch, line, expected):
    monkeypatch.setenv("COMP_LINE", f"{line} seed=1")  # the cursor is before what stands behind it
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert main(["--complete"]) == 0
    assert capsys.readouterr().out.split() == expected


@pytest.mark.parametrize("word_breaks, expected", [("' \t\n=:'", "zeroq"), ("' \t\n'", "generator=zeroq")])
def test_completion_in_bash(tmp_path, word_breaks, expected):
    script = f"""
        dfq() {{ {shlex.quote(sys.executable)} -m dfq "$@"; }}
        eval "$(dfq --completion bash)"
        COMP_WORDBREAKS=$'{word_breaks[1:-1]}'
        COMP_LINE='dfq run generator=zer' COMP_POINT=21 COMP_WORDS=(dfq run generator=zer)
        _dfq
        echo "${{COMPREPLY[@]}}"
        complete -p dfq
    """
    result = subprocess.run(["bash", "-c", script], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines() == [expected, "complete -F _dfq dfq"], result.stderr
