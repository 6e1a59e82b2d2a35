"""Every yaml of a family against that family's contract, found by listing: a new file is tested without being named."""

import importlib.util
import inspect

import numpy as np
import pytest
import torch
from conftest import NETS, as_teacher, language, settle
from PIL import Image
from tiny_detectors import cell_teacher
from torch import nn

from dfq.errors import UserError
from dfq.generators._base import batch_rng
from dfq.pipeline import evaluate, generate, quantize
from dfq.scheme import Scheme, TensorScheme
from dfq.settings import MISSING, choices, load, resolve, signature, to_config
from dfq.student import Student
from dfq.teacher import TokenSpec
from dfq.testing import TinyTransformer, check_algorithm, check_exporter, check_generator, check_quantizer

FAMILIES = ["algorithm", "evaluation", "exporter", "generator", "quantizer", "task"]
UNIFORM = [TensorScheme(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]
OTHER_GRIDS = [TensorScheme(bits, True, grid="seq") for bits in (1, 2, 4)]
OTHER_GRIDS += [TensorScheme(grid="ternary", symmetric=symmetric) for symmetric in (True, False)]
OTHER_GRIDS += [TensorScheme(grid=name, symmetric=True) for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1")]
FAST = {
    "iterations": 3,
    "final_iterations": 2,
    "finish_iterations": 2,
    "max_steps": 6,
    "checks": 2,
    "batch_size": 8,
    "num_candidates": 10,
}
FAST["rungs"] = ["round_to_nearest", {**load("algorithm", "reconstruction"), "iterations": 3, "finish_iterations": 2}]
FAST["parts"] = [{**load("generator", name), "iterations": 3} for name in ("zeroq", "genie")]  # of a mixture


def build(family, name):
    """The method with its yaml's settings, those that cost time turned down."""
    config = load(family, name)
    known = signature(config["_target_"]) or {}
    return resolve(family, name, **{key: value for key, value in FAST.items() if key in known})


def word_tokenizer(folder):
    """The folder of a tokenizer of three words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def every(family):
    return pytest.mark.parametrize("name", choices(family))


@pytest.fixture
def teacher(make_teacher):
    return make_teacher("plain")


@pytest.mark.parametrize("family, name", [(family, name) for family in FAMILIES for name in choices(family)])
def test_methods_are_made_from_their_yaml_and_back(family, name):
    config = load(family, name)
    if MISSING in config.values() or (family == "exporter" and not importlib.util.find_spec("onnx")):
        pytest.skip("has settings that only a user can give")
    method = resolve(family, name)
    again = resolve(family, to_config(method))
    assert again == method and {**to_config(method), **config} == to_config(method)


# ------------------------------------------------------------------------------------------------ generators


def sample(generator, teacher, seed=0, index=0, num_samples=4, advance=lambda amount: None):
    made = generator.sample(teacher, num_samples, batch_rng(seed, index), advance)
    return made["images"] if isinstance(made, dict) else made


def made_for(generator):
    """A tiny teacher that has what the generator needs."""
    if generator.kind == "token ids":
        return language()
    if generator.needs_boxes:
        return cell_teacher()
    return as_teacher(TinyTransformer() if generator.needs_attention else NETS["plain"]())


@every("generator")
def test_generator(name):
    generator = build("generator", name)
    check_generator(generator, made_for(generator))


@every("generator")
def test_generator_for_a_detector(name, tmp_path):
    generator, teacher = build("generator", name), cell_teacher()
    if generator.needs_attention:
        lacks = "got a network without attention"
    elif generator.kind == "token ids":
        lacks = f"got generator={name}, which is for token ids, and cells, which takes images"
    elif getattr(generator, "class_weight", 0):
        lacks = "got a generator that pulls each image to one class, and a detector"
    else:
        made = generate(teacher, generator, 9, 0, tmp_path / "d")
        assert made.lists == {"boxes", "labels", "scores"} and len(made.tensors()["boxes"]) == 9
        return
    with pytest.raises(UserError, match=lacks):
        generate(teacher, generator, 9, 0, tmp_path / "d")


@every("generator")
@pytest.mark.parametrize("kind", ["residual", "mlp", "bare", "transformer"])
def test_generator_on_other_networks(name, kind):
    generator, teacher = build("generator", name), as_teacher({**NETS, "transformer": TinyTransformer}[kind]())
    if generator.kind == "token ids":
        pytest.skip("the networks take images")
    has = {"residual": {"batch norm", "normalization"}, "bare": set(), "transformer": {"normalization", "attention"}}
    has["mlp"] = has["residual"]
    needs = {"batch norm": "needs_batch_norm", "normalization": "needs_norm", "attention": "needs_attention"}
    needs["boxes"] = "needs_boxes"
    lacks = [what for what, need in needs.items() if getattr(generator, need) and what not in has[kind]]
    if lacks:
        with pytest.raises(UserError, match=f"without {lacks[0]} .*{name}.*; allowed: generator=") as error:
            sample(generator, teacher)
        assert f"generator={name}" not in str(error.value) and "generator=gaussian" in str(error.value)
    else:
        assert torch.isfinite(sample(generator, teacher, num_samples=1)).all()


# ------------------------------------------------------------------------------------------------ quantizers


@every("quantizer")
@pytest.mark.parametrize("scheme", [*UNIFORM, *OTHER_GRIDS], ids=lambda scheme: f"{scheme.label}-{scheme.symmetric}")
def test_quantizer(name, scheme):
    check_quantizer(build("quantizer", name), [scheme])


# ------------------------------------------------------------------------------------------------ schemes


def wide():
    """A network whose layers all groups divide."""
    hidden = [nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(128), *hidden, nn.Linear(128, 10))


@every("scheme")
def test_scheme(name, teacher, make_dataset, tmp_path):
    config = load("scheme", name)
    scheme = Scheme.from_dict(config)
    assert scheme.name == name and Scheme.from_dict(scheme.to_dict()) == scheme and scheme.policy == "all"
    if scheme.weight.group_size:
        with pytest.raises(UserError, match=rf"group_size={scheme.weight.group_size} and layer 0 with 27 values"):
            Student.from_teacher(teacher, scheme)
        teacher = as_teacher(wide())
    if not scheme.key.is_float:  # tests/test_language_models.py has networks for it
        with pytest.raises(UserError, match=r"got scheme\.key and a network in which no attention was seen"):
            Student.from_teacher(teacher, scheme)
        return
    methods = [resolve("quantizer", "mse", num_candidates=20)] * 2
    student, path = quantize(
        teacher, make_dataset(teacher), scheme, build("algorithm", "round_to_nearest"), *methods, 0, tmp_path / "s"
    )
    for name, layer in student.layers.items():
        weight, activation = student.scheme.for_layer(False, name)  # of a mixed scheme each layer has its own
        quantizer, bits = layer.weight_quantizer, weight.num_bits
        assert quantizer.scheme == weight and layer.input_quantizer.scheme == activation
        rows = quantizer.rows(layer.weight)  # each with a scale of its own
        assert len(rows) == quantizer.scale.numel() and rows.shape[1] == (weight.group_size or rows.shape[1])
        assert all(len(row.unique()) <= 2**bits for row in rows) and len(layer.weight.unique()) > 1
    assert path.joinpath("student.safetensors").stat().st_size < 4 * sum(p.numel() for p in teacher.module.parameters())
    x = settle_images()
    with torch.no_grad():
        outputs, wanted = student(x), teacher(x)
        assert torch.equal(Student.load(path, teacher)(x), outputs) and not torch.equal(outputs, wanted)
        assert float((outputs - wanted).square().sum() / wanted.square().sum()) < (0.1 if bits > 3 else 1)


def settle_images():
    return settle(NETS["bare"](), seed=8, num_samples=16)


# ------------------------------------------------------------------------------------------------ algorithms


@every("algorithm")
@pytest.mark.parametrize("kind", ["plain", "residual", "mlp", "bare"])
def test_algorithm(name, kind, make_teacher):
    if getattr(build("algorithm", name), "kind", "images") == "token ids":
        pytest.skip("for language models; tests/algorithms")
    quantizer = resolve("quantizer", "mse", num_candidates=10)
    check_algorithm(build("algorithm", name), make_teacher(kind), quantizer)


# ------------------------------------------------------------------------------------------------ tasks


@every("task")
def test_task(name, teacher):
    if name != "classification":
        pytest.skip("the tiny teachers classify")
    task = resolve("task", name)
    x = settle_images().requires_grad_()
    outputs = task.raw_outputs(teacher, x)
    num_outputs = task.num_outputs(outputs)
    assert outputs.shape == (16, 10) and num_outputs == 10
    targets = task.synthesis_targets(25, num_outputs, torch.Generator().manual_seed(0), 0.3)
    assert targets.shape == (25, 10) and torch.allclose(targets.sum(1), torch.ones(25))
    counts = targets.argmax(1).bincount(minlength=10)
    assert int(counts.max()) - int(counts.min()) <= 1
    task.synthesis_loss(outputs, targets[:16]).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    outputs = outputs.detach()
    assert float(task.distillation_loss(outputs, outputs)) == pytest.approx(0, abs=1e-6)
    assert float(task.distillation_loss(outputs + torch.eye(16, 10), outputs)) > 1e-4
    assert float(task.agreement(outputs, outputs)) == 1 and float(task.agreement(-outputs, outputs)) < 1
    metrics = task.metrics(num_outputs)
    metrics.update(outputs, outputs.argmax(1))
    assert {key: float(value) for key, value in metrics.compute().items()}["top1"] == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: {"logits": y, "aux": y + 1},
        lambda y: (y, y + 1),
        lambda y: [y],
        lambda y: type("Output", (), {"logits": y})(),
    ],
)
def test_classification_understands(wrap, teacher):
    task, x = resolve("task", "classification"), settle_images()
    assert torch.equal(task.raw_outputs(lambda images: wrap(teacher(images)), x), teacher(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y[0],
        lambda y: y[..., None],
        lambda y: {"scores": y},
        lambda y: None,
        lambda y: (),
        lambda y: [{"boxes": y}],
    ],
)
def test_classification_refuses(wrap, teacher):
    with pytest.raises(
        UserError, match=r"got a .* from the network; allowed: logits \[N, num_classes\] for task=classification"
    ):
        resolve("task", "classification").raw_outputs(lambda images: wrap(teacher(images)), settle_images())


# ------------------------------------------------------------------------------------------ evaluations, exporters


@every("evaluation")
def test_evaluation(name, teacher, tmp_path):
    config, options = load("evaluation", name), {}
    if "annotations" in config:
        pytest.skip("boxes, which the tiny teachers do not find; see tests/tasks/test_detection.py")
    if "tasks" in config:
        pytest.skip("questions that another package asks; see tests/test_lm_eval.py")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    spec = teacher.input_spec
    if config.get("path") == MISSING:
        if "folder" in name:
            for i, image in enumerate(pixels):
                (tmp_path / f"class{i % 3}").mkdir(exist_ok=True)
                Image.fromarray(image).save(tmp_path / f"class{i % 3}" / f"{i}.png")
            options["path"] = str(tmp_path)
        elif name == "text":
            (tmp_path / "a.txt").write_text("a b " * 20)
            options |= {"path": str(tmp_path / "a.txt"), "tokenizer": word_tokenizer(tmp_path / "tokenizer")}
        else:
            ids = np.arange(36).reshape(4, 9)
            np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(12) % 10, input_ids=ids)
            options["path"] = str(tmp_path / "a.npz")
        options["reference_path"] = options["path"]
    elif name == "digits":
        spec = type(spec)((1, 8, 8), (0.3,), (0.4,))
    evaluation = resolve("evaluation", name, **options)
    if getattr(evaluation, "kind", "images") == "token ids":
        spec = TokenSpec(64, 5)
    batches = list(evaluation.batches(spec))
    assert sum(len(labels) for _, labels in batches) == evaluation.num_samples
    if getattr(evaluation, "kind", "images") == "token ids":
        assert all(torch.equal(ids, labels) and ids.dtype == torch.int64 for ids, labels in batches)
        assert evaluation.reference_images(spec, 4).shape == (4, 5)
        return
    for images, labels in batches:
        assert images.dtype == torch.float32 and images.shape[1:] == spec.size and len(images) == len(labels)
        assert labels.dtype == torch.int64 and labels.dim() == 1
    assert all(
        torch.equal(a, b) for (a, _), (b, _) in zip(batches, evaluation.batches(spec), strict=True)
    )  # a second look
    if evaluation.reference_path:
        assert evaluation.reference_images(spec, 5).shape == (5, *spec.size)
    if spec == teacher.input_spec:
        found = evaluate(teacher, None, evaluation)["teacher"]
        assert all(0 <= value <= 1 for value in found.values()) and bool(found) == bool(batches)


@every("exporter")
def test_exporter(name, teacher):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    exporter = build("exporter", name)
    if getattr(exporter, "kind", "images") == "token ids":
        pytest.skip("for networks of transformers; tests/test_language_models.py, tests/exporters")
    check_exporter(exporter, teacher)


@pytest.mark.parametrize("family", ["algorithm", "exporter"])
def test_signatures_are_those_the_pipeline_calls(family):
    wanted = {
        "algorithm": (
            "quantize",
            ["student", "teacher", "dataset", "weight_quantizer", "activation_quantizer", "seed", "work_dir"],
        ),
        "exporter": ("export", ["student", "path", "teacher", "images"]),
    }
    method, names = wanted[family]
    for name in choices(family):
        parameters = list(inspect.signature(getattr(resolve(family, name), method)).parameters)
        assert parameters[: len(names)] == names, name
