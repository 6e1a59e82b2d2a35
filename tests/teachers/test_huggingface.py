"""The loader of transformers' networks, on tiny ones that the tests save. The import alone takes seconds: one file."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import dfq
from dfq.cli import main
from dfq.errors import UserError
from dfq.settings import resolve
from dfq.student import Student
from dfq.teacher import TokenSpec
from dfq.teachers import huggingface

transformers = pytest.importorskip("transformers")

ROOT = Path(dfq.__file__).parents[1]
ALLOWED = "allowed: a folder with config.json and *.safetensors, or an id on the Hugging Face hub"
TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": 32}
IMAGE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE |= {"image_size": 16, "patch_size": 8, "num_labels": 5}


def llama(**options):
    return transformers.LlamaConfig(**TEXT, num_key_value_heads=2, **options)


NETWORKS = {
    "llama": lambda: transformers.LlamaForCausalLM(llama()),
    "tied": lambda: transformers.LlamaForCausalLM(llama(tie_word_embeddings=True)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)),
    "bert_base": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "sentiment": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved("llama")``: the folder of a network with random weights, the same in every test."""
    root = tmp_path_factory.mktemp("networks")

    def save(name):
        if not (root / name).exists():
            transformers.utils.logging.disable_progress_bar()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                NETWORKS[name]().save_pretrained(root / name)
        return root / name

    return save


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return lambda name: Path(shutil.copytree(saved(name), tmp_path / name))


def error_of(*args, **options):
    with pytest.raises(UserError) as error:
        huggingface.load(*map(str, args), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, task, shape",
    [
        ("llama", "language_modeling", (2, 32, 64)),
        ("tied", "language_modeling", (2, 32, 64)),
        ("bert", "masked_language_modeling", (2, 32, 64)),
        ("sentiment", "classification", (2, 3)),
    ],
)
def test_networks_that_take_token_ids(saved, name, task, shape):
    teacher = huggingface.load(str(saved(name)))
    assert (teacher.name, teacher.task, teacher.input_spec) == (name, task, TokenSpec(64, 32))
    outputs = resolve("task", task).raw_outputs(teacher, teacher.example())
    assert outputs.shape == shape and outputs.dtype == torch.float32
    assert teacher.dataflow.calls and teacher.module.config.use_cache is False
    own = type(teacher.module).from_pretrained(saved(name)).eval()
    with torch.no_grad():
        assert torch.equal(own(teacher.example()).logits, outputs)
    assert huggingface.load(str(saved(name)), length=5).input_spec.length == 5


def test_image_classifiers(folder):
    path = folder("vit")
    assert error_of(path) == (
        f"got teacher.name={path}, whose config.json and preprocessor_config.json do not say how images come in; "
        "give teacher.mean=[...] teacher.std=[...]"
    )
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3}))
    teacher = huggingface.load(str(path))
    assert teacher.task == "classification" and teacher(teacher.example()).logits.shape == (2, 5)
    assert teacher.input_spec.to_dict() == {"size": [3, 16, 16], "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3}
    assert huggingface.load(str(path), mean=[0] * 3).input_spec.mean == (0, 0, 0)


@pytest.mark.parametrize(
    "preprocessor, size, mean, std",
    [
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}}, (3, 32, 24), 0.5, 0.25),
        ({"size": {"shortest_edge": 32}}, (3, 32, 32), 0.5, 0.25),
        ({"size": 32, "do_normalize": False}, (3, 32, 32), 0, 1),
        ({"size": 32, "rescale_factor": 1 / 127.5}, (3, 32, 32), 0.25, 0.125),  # 2 byte / 255 is what is normalized
    ],
)
def test_what_a_preprocessor_says(folder, preprocessor, size, mean, std):
    path = folder("resnet")  # convolutions: its config says no size, and it has no attention to choose
    written = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3} | preprocessor
    (path / "preprocessor_config.json").write_text(json.dumps(written))
    spec = huggingface.load(str(path)).input_spec
    assert spec.size == size and spec.mean == pytest.approx((mean,) * 3) and spec.std == pytest.approx((std,) * 3)


@pytest.mark.parametrize("name", ["llama", "tied", "bert", "sentiment"])
def test_the_structure_alone_needs_no_weights(folder, name):
    path = folder(name)
    teacher = huggingface.load(str(path))
    for file in path.glob("*.safetensors"):
        file.unlink()
    state = torch.get_rng_state()
    structure = huggingface.load(str(path), weights=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert structure.sha256 != teacher.sha256 and structure.input_spec == teacher.input_spec
    shapes = [{key: t.shape for key, t in one.module.state_dict().items()} for one in (teacher, structure)]
    assert shapes[0] == shapes[1] and structure.num_parameters == teacher.num_parameters
    assert structure.module.config._attn_implementation == teacher.module.config._attn_implementation == "sdpa"


def test_the_same_folder_has_the_same_hash(saved):
    first = huggingface.load(str(saved("llama")))
    torch.manual_seed(5)
    assert huggingface.load(str(saved("llama")), attn_implementation="eager").sha256 == first.sha256
    assert huggingface.load(str(saved("tied"))).sha256 != first.sha256


def test_half_precision_is_loaded_as_float32(saved, tmp_path):
    module = transformers.LlamaForCausalLM.from_pretrained(saved("llama"), dtype=torch.bfloat16)
    module.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    for weights in (True, False):
        teacher = huggingface.load(str(tmp_path / "half"), weights=weights)
        assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_student_is_rebuilt_from_what_its_folder_records(saved, name, make_dataset, tmp_path):
    teacher = dfq.load_teacher("huggingface", name=str(saved(name)), length=8, device="cpu")
    student = dfq.quantize(
        teacher, make_dataset(teacher), "w8a8", algorithm="round_to_nearest", student_dir=tmp_path / "s"
    )
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"} <= student.layers.keys()
    assert "lm_head" in student.swap.kept_float
    ids = teacher.input_spec.example(4, torch.Generator().manual_seed(2))
    again = dfq.load_student(tmp_path / "s", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)
        assert again(ids[:, :3]).logits.shape == (4, 3, 64)
    assert isinstance(again, Student) and again.input_spec == TokenSpec(64, 8)


# ------------------------------------------------------------------------------------------------ mistakes


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c", "nowhere/"):
        assert error_of(name) == f"got teacher.name={name}, which does not exist; {ALLOWED}"
    Path("file").write_text("")
    assert error_of("file") == f"got teacher.name=file, which is a file; {ALLOWED}; name the folder it lies in"
    Path("empty").mkdir()
    assert error_of("empty") == f"got teacher.name=empty, a folder without config.json; {ALLOWED}"


def test_a_hub_that_is_out_of_reach():  # the tests run with HF_HUB_OFFLINE=1
    message = error_of("someone/something")
    assert message.startswith(
        "got teacher.name=someone/something, which is no folder here and does not come from the Hugging Face hub ("
    )
    assert message.endswith(f"); {ALLOWED}; check the name and the connection")


def test_pickled_weights_are_not_read(folder):
    path = folder("llama")
    (path / "model.safetensors").unlink()
    save = "save it with model.save_pretrained(folder)"
    assert error_of(path) == f"got teacher.name={path}, a folder without *.safetensors; {ALLOWED}; {save}"
    torch.save(huggingface.load(str(path), weights=False).module.state_dict(), path / "pytorch_model.bin")
    assert error_of(path) == (
        f"got teacher.name={path}, a folder without *.safetensors (it has pytorch_model.bin, and dfq never unpickles); "
        f"{ALLOWED}; {save}"
    )


def test_a_network_that_would_be_part_random_is_refused(folder, saved):
    do = "allowed: weights for every layer of the network; choose a network trained for this, or another teacher.task"
    path = saved("bert_base")
    assert error_of(path, task="classification") == (
        f"got teacher.name={path}, which lacks classifier.bias, classifier.weight; {do}"
    )
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))
    assert error_of(path) == (
        f"got teacher.name={path}, which has lm_head.weight, model.embed_tokens.weight in another shape; {do}"
    )


def test_a_detector_comes_behind_its_adapter(tmp_path):
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=16, num_detection_tokens=3, num_labels=2,
    )  # fmt: skip
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path)
    teacher = huggingface.load(name=str(tmp_path), mean=[0.5] * 3, std=[0.5] * 3)
    assert teacher.task == "detection" and teacher.input_spec.size == (3, 32, 32)
    assert teacher(teacher.example(2))["logits"].shape == (2, 3, 3)
    own = huggingface.load(name=str(tmp_path), mean=[0.5] * 3, std=[0.5] * 3, adapter="tiny_detectors:Cells")
    assert type(own.module).__name__ == "Cells"


def test_an_adapter_is_one_of_a_detector(saved):
    assert error_of(saved("vit"), mean=[0.5] * 3, std=[0.5] * 3, adapter="tiny_detectors:Cells") == (
        "got teacher.adapter=tiny_detectors:Cells and teacher.task=classification; allowed: a detector"
    )


def test_networks_of_another_kind(saved, folder):
    kinds = "allowed: *ForCausalLM, *ForMaskedLM, *ForImageClassification, *ForSequenceClassification, "
    kinds += "*ForObjectDetection"
    assert error_of(saved("t5")) == (
        f"got teacher.name={saved('t5')} of type t5 with architectures=['T5ForConditionalGeneration'] in its "
        f"config.json; {kinds}; give teacher.task=classification"
    )
    assert error_of(saved("vit"), task="language_modeling") == (
        f"got teacher.name={saved('vit')} of type vit and teacher.task=language_modeling; {kinds}; "
        "give teacher.task=classification"
    )
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert error_of(path) == (f"got teacher.name={path}, whose weights are quantized already; allowed: a float network")


@pytest.mark.parametrize(
    "file, content",
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}'),
        ("model.safetensors", "no tensors"),
    ],
)
def test_broken_folders(folder, file, content):
    path = folder("llama")
    (path / file).write_text(content)
    (path / "evil.py").write_text("raise SystemExit('code from a folder was run')")
    message = error_of(path)
    assert message.startswith(f"got teacher.name={path}, which transformers can't load (")
    assert message.endswith(f"); {ALLOWED}")


@pytest.mark.parametrize("word", ["teacher.name=nowhere/", "teacher.name=empty", "teacher.length=0"])
def test_the_command_line_sees_it_before_anything_is_imported(word, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    monkeypatch.setattr(huggingface, "load", None)
    name = [] if word.startswith("teacher.name") else ["teacher.name=a/b"]
    assert main(["run", "teacher=huggingface", *name, word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dfq: got {word}") and error.count("\n") == 1
    assert sorted(Path().iterdir()) == [Path("empty")]


def test_a_generator_of_images_on_the_command_line(saved, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["teacher=huggingface", f"teacher.name={saved('llama')}", "dataset_dir=data", "device=cpu"]
    assert main(["generate", *words]) == 2
    assert capsys.readouterr().err.startswith(
        "dfq: got generator=zeroq, which is for images, and llama, which takes token ids; allowed: "
    )
    assert not Path("data").exists()


# ------------------------------------------------------------------------------------------------ a real one


def test_perplexity_of_a_real_network():
    """Against the kit's own figure (its README), in the first 64 tokens of a few stories that it told itself."""
    kit = ROOT.parent / "shared" / "kit"
    if not (kit / "stories260k").is_dir():
        pytest.skip(f"no evaluation kit in {kit}")
    teacher = huggingface.load(str(kit / "stories260k"), length=64)
    stories = json.loads((kit / "data" / "stories_sampled.json").read_text())["ids"]
    ids = torch.tensor([story[:64] for story in stories if len(story) >= 64][:40])
    found = dfq.evaluate(teacher, None, [(part, part) for part in ids.split(8)])["teacher"]["perplexity"]
    with torch.no_grad():
        loss = teacher.module(ids, labels=ids).loss  # transformers' own shift and mean
    assert found == pytest.approx(float(loss.exp()), rel=1e-5) and 2.5 < found < 5.5
