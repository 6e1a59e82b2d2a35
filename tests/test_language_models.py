"""Tiny networks of transformers with random weights through all arrows; students of language models."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dfq
from dfq.calibration import _lend
from dfq.dataset import SyntheticDataset
from dfq.decoding import Decoder
from dfq.errors import UserError
from dfq.exporters import compressed_tensors
from dfq.exporters._transformers import keys_and_values, tensors
from dfq.exporters.compressed_tensors import pack_to_int32, reads_one_group
from dfq.hooks import forward_hooks
from dfq.modules import Quantizer
from dfq.pipeline import export, generate
from dfq.quantizers._observation import Histogram
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import load, resolve
from dfq.student import Student
from dfq.teacher import Teacher, TokenSpec
from dfq.teachers import huggingface

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=8),
    "phi": lambda: transformers.PhiConfig(**TEXT),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
EXPERTS = ("mixtral", "qwen3_moe")
W4_G16 = Scheme(TensorScheme(4, True, "per_group", 16), FLOAT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``folder("llama")``: a network with random weights, the same in every test."""
    root = tmp_path_factory.mktemp("networks")

    def save(name, **options):
        path = root / name
        if not path.exists():
            transformers.utils.logging.disable_progress_bar()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
                for parameter in module.parameters():
                    if parameter.dim() > 1:
                        parameter.data.mul_(3)
                module.save_pretrained(path)
            (path / "tokenizer_config.json").write_text("{}")
        return str(path)

    return save


def teacher_of(path, **options):
    return dfq.load_teacher("huggingface", name=path, length=16, device="cpu", **options)


def nearest(teacher, dataset, scheme, path=None):
    ranges = {"weight_quantizer": "min_max", "activation_quantizer": "min_max"}
    return dfq.quantize(teacher, dataset, scheme, algorithm="round_to_nearest", student_dir=path, **ranges)


def linears(teacher):
    return {name for name, part in teacher.module.named_modules() if isinstance(part, nn.Linear)}


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_quantize_evaluate_export_load(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teacher_of(folder(name))
    dataset = generate(teacher, resolve("generator", "self_generation", max_repetition=1.0), 12, 0, tmp_path / "d")
    assert dataset.samples().shape == (12, 16) and dataset.manifest["rejected"]["repetition"] == 0
    student = nearest(teacher, dataset, Scheme.from_dict(load("scheme", "w4a8kv4")), tmp_path / "kv")
    blocks = linears(teacher) - {"lm_head"}
    if name == "gpt2":
        blocks = {f"transformer.h.{i}.{part}" for i in (0, 1) for part in
                  ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}  # fmt: skip
    elif name in EXPERTS:
        blocks |= {f"model.layers.{i}.mlp.experts.{e}.{part}_proj" for i in (0, 1) for e in range(4) for part in
                   ("gate_up", "down")}  # fmt: skip
    assert blocks == set(student.layers) and "scheme.skip leaves head float" in student.swap.kept_float.values()
    assert len(student.surgery.sites.quantizers) == 4, "keys and values of two layers"
    found = dfq.evaluate(teacher, student, [(ids, ids) for ids in dataset.samples().split(4)], dataset)
    assert found["student"]["perplexity"] > 0 and 0 <= found["fidelity"]["continuation"]["match_length"] <= 12
    plain = nearest(teacher, dataset, W4_G16, tmp_path / "g16")
    path = tmp_path / "artifact" / "model.safetensors"
    description = export(plain, resolve("exporter", "compressed_tensors"), path, teacher, dataset)
    config = json.loads((path.parent / "config.json").read_text())
    if name == "gpt2":  # none of its layers is an nn.Linear
        assert "quantization_config" not in config and len(description["stored_float"]) == 8
    else:
        assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 16
        assert description["stored_float"] == []
    assert (path.parent / "tokenizer_config.json").exists() and (path.parent / "generation_config.json").exists()
    if description["parity"]["runtime"] is None:
        pytest.skip("compressed-tensors is not installed: what was exported is not loaded again")
    assert description["parity"]["max_abs_error"] == 0.0


@pytest.mark.parametrize("other", [{"group_size": 8}, {"num_bits": 8}, {"granularity": "per_channel"}], ids=str)
def test_layers_with_grids_of_their_own_in_compressed_tensors(other, folder, make_dataset, tmp_path):
    """transformers 5.24 reads all layers by the first config group: it fails or gets numbers wrong, and it is said."""
    pytest.importorskip("compressed_tensors")
    teacher = teacher_of(folder("llama"))
    dataset = make_dataset(teacher, 4)
    mixed = Scheme(W4_G16.weight, FLOAT, overrides={"*.down_proj": {"weight": other}})
    student = nearest(teacher, dataset, mixed, tmp_path / "s")
    found = export(
        student, resolve("exporter", "compressed_tensors"), tmp_path / "a/model.safetensors", teacher, dataset
    )
    parity = found["parity"]
    assert parity["max_abs_error"] == 0.0 and parity["argmax_agreement"] == 1.0 and found["stored_float"] == []
    if reads_one_group():
        assert parity["runtime"].startswith("compressed-tensors ")
        assert "reads all layers by the first of 2 config groups" in parity["warning"]
    else:
        assert parity["runtime"].startswith("transformers ")


# ------------------------------------------------------------------------------------------------ keys and values


def per_token(x, num_bits, dim):
    """Asymmetric min-max rounding of each token's values, by the formula."""
    low, high = x.amin(dim, keepdim=True).clamp(max=0), x.amax(dim, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**num_bits - 1)).clamp(min=1e-30)
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 2**num_bits - 1) - zero) * scale


@torch.no_grad()
def assert_attends_as(own, path, attention, ids, difference):
    """A student's module as the float network with its weights and an attention function of that name, not without."""
    other = huggingface.load(path, length=16)
    for name, parameter in other.module.named_parameters():
        parameter.copy_(dict(own.named_parameters())[name])
    other.module.config._attn_implementation = attention
    torch.testing.assert_close(own(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)
    other.module.config._attn_implementation = "sdpa"
    assert (own(ids).logits - other(ids).logits).abs().max() > difference


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma", "phi"])
def test_keys_and_values_are_rounded_token_by_token(name, attention, folder, make_dataset, monkeypatch):
    """Against the network with an attention function of our own that rounds what it is given."""
    teacher = teacher_of(folder(name), attn_implementation=attention)
    scheme = Scheme(FLOAT, FLOAT, key_value=TensorScheme(4, False, "per_token"), overrides={"*q_proj": EIGHT})
    student = nearest(teacher, make_dataset(teacher, 4), scheme)
    for layer in student.layers.values():
        layer.weight_quantizer.enabled = False
    ids = teacher.example(3)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS.register(
        "rounded", lambda module, q, k, v, *rest, **options:
        plain(module, q, per_token(k, 4, -1), per_token(v, 4, -1), *rest, **options)
    )  # fmt: skip
    assert_attends_as(student.module, folder(name), "rounded", ids, 1e-2)


def one_query_after_the_other(plain, size, num_bits):
    """An attention function that rounds keys as a text is written: of query t those of full groups before its own."""

    def attend(module, q, k, v, mask, *rest, **options):
        offset, outputs = k.shape[2] - q.shape[2], []
        for t in range(q.shape[2]):
            full = (offset + t) // size * size
            parts = [per_token(part, num_bits, 2) for part in k[:, :, :full].split(size, 2) if full]
            keys = torch.cat([*parts, k[:, :, full:]], 2)
            seen = offset + t + 1
            output, _ = plain(
                module, q[:, :, t : t + 1], keys[:, :, :seen], v[:, :, :seen], None, *rest, **(options | NOT_CAUSAL)
            )
            outputs.append(output)
        return torch.cat(outputs, 1), None

    return attend


NOT_CAUSAL = {"is_causal": False}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_are_rounded_channel_by_channel_over_groups_of_tokens(attention, folder, make_dataset):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    teacher = teacher_of(folder("llama"), attn_implementation=attention)
    key = TensorScheme(2, False, "per_channel", 4, dynamic=True)
    student = nearest(teacher, make_dataset(teacher, 4), Scheme(FLOAT, FLOAT, key=key, overrides={"*q_proj": EIGHT}))
    for layer in student.layers.values():
        layer.weight_quantizer.enabled = False
    assert len(student.surgery.sites.quantizers) == 2
    ids = teacher.example(3)[:, :14]
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS.register("in_turn", one_query_after_the_other(plain, 4, 2))
    assert_attends_as(student.module, folder("llama"), "in_turn", ids, 2e-3)


def test_generate_with_keys_per_channel_and_values_per_group(folder, make_dataset):
    """Token by token from a cache as in one piece, over the borders of groups."""
    teacher = teacher_of(folder("llama"))
    values = TensorScheme(2, False, "per_group", 4, dynamic=True)
    scheme = Scheme(W4_G16.weight, FLOAT, key_value=values, key=TensorScheme(2, False, "per_channel", 4, dynamic=True))
    assert scheme.name == "w4a16kv2_g16_k4" and Scheme.from_dict(scheme.to_dict()) == scheme
    student = nearest(teacher, make_dataset(teacher, 8), scheme)
    ids = teacher.example(2)[:, :14]
    decoder, places = Decoder(student.module, student, student.device), []
    with torch.no_grad():
        whole = student(ids).logits
        for seen in range(5, 14):
            places.append(decoder(ids[:, : seen + 1], seen if places else 0))
        for seen, logits in zip(range(5, 14), places, strict=True):
            torch.testing.assert_close(logits, whole[:, seen], rtol=1e-4, atol=1e-4)
    written = student.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, use_cache=True)
    assert written.shape[1] > 14


def test_a_scheme_of_keys():
    scheme = Scheme.from_dict(load("scheme", "w4a16kv2_g32"))
    assert scheme.key == TensorScheme(2, False, "per_channel", 32, dynamic=True)
    scheme = Scheme.from_dict(load("scheme", "w4a8kv4_k32"))
    assert scheme.key == TensorScheme(4, False, "per_channel", 32, dynamic=True)
    assert scheme.key_value == Scheme.from_dict(load("scheme", "w4a8kv4")).key_value
    with pytest.raises(UserError) as error:
        Scheme(key=TensorScheme(4, False, "per_token"))
    assert str(error.value) == (
        "got scheme.key.granularity=per_token, group_size=None and grid=uniform; allowed: granularity=per_channel, "
        "grid=uniform and a group_size, the tokens that share a channel's range; scheme.key_value rounds keys and "
        "values per token"
    )
    from conftest import language

    with pytest.raises(UserError, match=r"got scheme\.key and a network in which no attention was seen; allowed: a "):
        Student.from_teacher(language(), Scheme(W4_G16.weight, FLOAT, key=scheme.key))


EIGHT = {"weight": {"num_bits": 8, "grid": "uniform", "granularity": "per_channel"}}


def test_generate_goes_on_from_rounded_keys_and_values(folder, make_dataset, tmp_path):
    teacher = teacher_of(folder("llama"))
    student = nearest(teacher, make_dataset(teacher, 8), Scheme.from_dict(load("scheme", "w4a8kv4")), tmp_path / "s")
    ids = teacher.example(2)[:, :5]
    module = student.module
    written = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=True
    )
    plain = ids
    for _ in range(8):
        with torch.no_grad():
            plain = torch.cat([plain, module(plain).logits[:, -1].argmax(-1)[:, None]], 1)
    ended = [(row == 2).nonzero().flatten().tolist() for row in plain[:, 5:]]
    stop = [5 + (places[0] + 1 if places else 8) for places in ended]
    assert all(torch.equal(a[:n], b[:n]) for a, b, n in zip(written, plain, stop, strict=True))
    again = dfq.load_student(tmp_path / "s", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)
        whole = module(plain, use_cache=False).logits[:, -1]
        decoder = Decoder(module, student, student.device)
        decoder(plain[:, :-1])
        assert decoder.cache is not None
        kept = decoder(plain, plain.shape[1] - 1)
    torch.testing.assert_close(kept, whole, rtol=1e-4, atol=1e-4)


def test_grids_without_a_tensor_tell_students_apart(folder, make_dataset, tmp_path, monkeypatch):
    """Students of the same weights, rounded otherwise per token: figures of one are not read again for the other."""
    monkeypatch.chdir(tmp_path)
    teacher = teacher_of(folder("llama"))
    dataset, weight = make_dataset(teacher, 8), TensorScheme(8, True, "per_channel")
    per_token = {"key_value": TensorScheme(3, False, "per_token")}
    schemes = [
        Scheme(weight, FLOAT),
        Scheme(weight, TensorScheme(4, True, "per_token")),
        Scheme(weight, FLOAT, **per_token),
    ]
    students = [nearest(teacher, dataset, scheme, tmp_path / str(i)) for i, scheme in enumerate(schemes)]
    np.savez(tmp_path / "text.npz", input_ids=teacher.example(4).numpy())
    found = [dfq.evaluate(teacher, student, "tokens", path="text.npz")["student"] for student in students]
    assert len({figures["perplexity"] for figures in found}) == 3
    assert len({student.sha256 for student in students}) == 3
    loaded = [dfq.load_student(tmp_path / str(i), device="cpu").sha256 for i in range(3)]
    assert loaded == [student.sha256 for student in students]


# ------------------------------------------------------------------------------------------------ what is skipped


def test_embeddings_and_head_stay_float_unless_an_override_names_them(folder):
    teacher = teacher_of(folder("llama"))
    scheme = Scheme(TensorScheme(4, True, "per_channel"), FLOAT)
    student = Student.from_teacher(teacher, scheme)
    assert student.swap.kept_float == {
        "model.embed_tokens": "scheme.skip leaves embeddings float",
        "lm_head": "scheme.skip leaves head float",
    }
    named = Scheme(scheme.weight, FLOAT, overrides={"lm_head": {"weight": {"num_bits": 8}}})
    assert Student.from_teacher(teacher, named).layers["lm_head"].weight_quantizer.scheme.num_bits == 8
    everything = Student.from_teacher(teacher, Scheme(scheme.weight, FLOAT, skip=()))
    assert {"lm_head", "model.embed_tokens"} <= everything.layers.keys() and not everything.swap.kept_float
    less = Student.from_teacher(teacher, Scheme(scheme.weight, FLOAT, skip=("head", "*.mlp.*")))
    assert {name.rpartition(".")[2] for name in less.layers} == {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert Scheme.from_dict(Scheme(scheme.weight, FLOAT, skip=()).to_dict()).skip == ()
    with pytest.raises(UserError) as error:
        Student.from_teacher(teacher, Scheme(scheme.weight, FLOAT, skip=("lm_haed",)))
    assert str(error.value).startswith("got scheme.skip with 'lm_haed', which is the name of no layer; allowed: model.")


def test_a_scheme_of_keys_and_values():
    scheme = Scheme.from_dict(load("scheme", "w4a8kv4"))
    assert scheme.name == "w4a8kv4" and scheme.key_value == TensorScheme(4, False, "per_token", dynamic=True)
    with pytest.raises(UserError, match=r"got scheme\.key_value\.granularity=per_channel; allowed: "):
        Scheme(key_value=TensorScheme(4, True, "per_channel"))
    with pytest.raises(UserError, match=r"got scheme\.skip='lm_head'; allowed: a list of names of layers"):
        Scheme(skip="lm_head")


# ------------------------------------------------------------------------------------------------ compressed-tensors


@pytest.mark.parametrize("num_bits", range(1, 9))
def test_packing_bit_by_bit(num_bits):
    rng = torch.Generator().manual_seed(num_bits)
    values = torch.randint(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), (3, 37), generator=rng)
    packed = pack_to_int32(values, num_bits)
    assert packed.shape == (3, -(-37 * num_bits // 32)) and packed.dtype == torch.int32
    for row, words in zip(values.tolist(), packed.tolist(), strict=True):
        stream = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
        got = [(stream >> (i * num_bits)) % 2**num_bits - 2 ** (num_bits - 1) for i in range(37)]
        assert got == row


def test_packing_some_rows_at_a_time(monkeypatch):
    """Bits that are apart take 64 times their room."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor))
            return found

    values = torch.randint(-4, 4, (64, 40), generator=torch.Generator().manual_seed(0))
    whole = pack_to_int32(values, 3)
    monkeypatch.setattr(compressed_tensors, "PACKED_AT_ONCE", 1000, raising=False)
    with Sizes():
        assert torch.equal(pack_to_int32(values, 3), whole)
    assert max(largest) <= max(1024, values.numel())


@pytest.mark.parametrize(
    "weight, activation",
    [
        (TensorScheme(4, True, "per_channel"), FLOAT),
        (TensorScheme(4, False, "per_group", 16), FLOAT),
        (TensorScheme(2, False, "per_group", 16), FLOAT),
        (TensorScheme(3, True, "per_group", 32), FLOAT),
        (TensorScheme(8, True, "per_tensor"), FLOAT),
        (TensorScheme(grid="ternary", symmetric=True, granularity="per_channel"), FLOAT),
        (TensorScheme(8, True, "per_channel"), TensorScheme(8, True, "per_token")),
        (TensorScheme(8, True, "per_group", 16), TensorScheme(8, True, "per_token")),
        (TensorScheme(8, False, "per_channel"), TensorScheme(8, True, "per_token")),
        (TensorScheme(4, True, "per_channel"), TensorScheme(8, True, "per_token")),
    ],
    ids=lambda scheme: f"{scheme.label}{scheme.granularity}{scheme.symmetric}",
)
def test_logits_of_what_was_exported(weight, activation, folder, make_dataset, tmp_path):
    teacher = teacher_of(folder("llama"))
    dataset = make_dataset(teacher, 8)
    student = nearest(teacher, dataset, Scheme(weight, activation), tmp_path / "s")
    path = tmp_path / "a" / "model.safetensors"
    found = export(student, resolve("exporter", "compressed_tensors"), path, teacher, dataset)
    if found["parity"]["runtime"] is None:
        pytest.skip("compressed-tensors is not installed")
    assert found["parity"]["max_abs_error"] == 0.0 if activation.is_float else found["parity"]["relative_error"] < 0.05
    assert found["stored_float"] == []


@pytest.mark.parametrize("name, targets", [("llama", ["Linear", "lm_head"]), ("tied", ["Linear"])])
def test_a_head_that_is_rounded_too(name, targets, folder, make_dataset, tmp_path):
    """vLLM finds a head by its name; one with the embedding's weight has that one's floats, on the grid of both."""
    pytest.importorskip("compressed_tensors")
    teacher = teacher_of(folder(name))
    dataset, path = make_dataset(teacher, 8), tmp_path / "a" / "model.safetensors"
    student = nearest(teacher, dataset, Scheme(W4_G16.weight, FLOAT, skip=()))
    found = export(student, resolve("exporter", "compressed_tensors"), path, teacher, dataset)
    settings = json.loads((path.parent / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["targets"] == targets
    assert settings["ignore"] == ["lm_head"][: name == "tied"]
    assert found["stored_float"] == ["model.embed_tokens", *settings["ignore"]]
    assert found["parity"]["max_abs_error"] == 0.0 and "warning" not in found["parity"]
    if name == "tied":
        student = nearest(teacher, dataset, Scheme(TensorScheme(8, True), PER_TOKEN, skip=()))
        with pytest.raises(UserError, match="layer lm_head with quantized inputs, which shares the embedding's weight"):
            export(student, resolve("exporter", "compressed_tensors"), path, teacher, dataset)


def test_a_folder_that_is_not_to_be_written_to(folder, make_dataset, tmp_path):
    """The float network's own, in several parts so that no file is in the way; and what is no folder."""
    source = tmp_path / "source"
    shutil.copytree(folder("llama"), source)
    module = transformers.AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    module.save_pretrained(source, max_shard_size="20KB")
    assert not (source / "model.safetensors").exists()
    before = (source / "config.json").read_text()
    teacher = teacher_of(str(source))
    student = nearest(teacher, make_dataset(teacher, 4), W4_G16)
    with pytest.raises(UserError) as error:
        export(student, resolve("exporter", "compressed_tensors"), source / "model.safetensors", teacher)
    assert str(error.value) == (
        f"got artifact_path={source}/model.safetensors, in the folder that the float network was read from; allowed: "
        "a folder of its own, since config.json is written beside the file; choose another folder"
    )
    assert (source / "config.json").read_text() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"beside which config\.json can't be written"):
        export(student, resolve("exporter", "compressed_tensors"), tmp_path / "file/model.safetensors", teacher)


@pytest.mark.parametrize("exporter", ["compressed_tensors", "gguf"])
def test_a_vocabulary_that_has_grown_in_memory(exporter, folder, make_dataset, tmp_path):
    """config.json is that of the network as it is, not as it was when it was read."""
    module = transformers.AutoModelForCausalLM.from_pretrained(folder("llama"))
    module.resize_token_embeddings(80, mean_resizing=False)
    teacher = dfq.load_teacher(module, "language_modeling", vocab_size=80, length=16, device="cpu")
    scheme = W4_G16 if exporter == "compressed_tensors" else Scheme(TensorScheme(4, True, "per_group", 32), FLOAT)
    student = nearest(teacher, make_dataset(teacher, 4), scheme)
    path = tmp_path / "a" / ("model.safetensors" if exporter == "compressed_tensors" else "model.gguf")
    found = export(student, resolve("exporter", exporter), path, teacher)
    if found["parity"]["runtime"] is not None:
        assert found["parity"]["argmax_agreement"] == 1.0
    if exporter == "compressed_tensors":
        config = json.loads((path.parent / "config.json").read_text())
        was = json.loads((Path(folder("llama")) / "config.json").read_text())
        assert config["vocab_size"] == 80
        assert {key for key in was if config.get(key) != was[key]} <= {"vocab_size", "dtype"}


def test_what_compressed_tensors_cannot_hold(folder, make_dataset, make_teacher, tmp_path):
    teacher = teacher_of(folder("llama"))
    dataset = make_dataset(teacher, 8)

    def message(scheme, path="x/model.safetensors", of=teacher, data=dataset):
        student = nearest(of, data, scheme)
        with pytest.raises(UserError) as error:
            export(student, resolve("exporter", "compressed_tensors"), tmp_path / path, of, data)
        return str(error.value)

    w4 = TensorScheme(4, True, "per_channel")
    assert message(Scheme(w4, FLOAT), "x.safetensors") == (
        f"got artifact_path={tmp_path}/x.safetensors; allowed: DIR/model.safetensors, the name that transformers looks "
        f"for; give {tmp_path}/model.safetensors"
    )
    assert message(Scheme(w4, TensorScheme(8))).startswith(
        "got exporter=compressed_tensors and layer model.layers.0.self_attn.q_proj with scheme.activation.granularity="
        "per_tensor and symmetric=false; allowed: granularity=per_token and symmetric=true for inputs, or grid=float"
    )
    seq = Scheme(TensorScheme(2, True, "per_channel", grid="seq"), FLOAT)
    assert "with scheme.weight.grid=seq of 2 bits; allowed: grid=uniform" in message(seq)
    vision = make_teacher()
    assert message(Scheme(w4, FLOAT), of=vision, data=make_dataset(vision, name="images")).startswith(
        "got exporter=compressed_tensors and plain, which is no network of transformers; allowed: "
    )


@pytest.mark.parametrize("grid, num_bits", [("uniform", 8), ("uniform", 4), ("fp8_e4m3", 8)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_grids_of_keys_and_values_are_written_and_read(
    grid, num_bits, attention, folder, make_dataset, tmp_path
):
    pytest.importorskip("compressed_tensors")
    teacher = teacher_of(folder("llama"), attn_implementation=attention)
    dataset = make_dataset(teacher, 8)
    scheme = Scheme(W4_G16.weight, FLOAT, key_value=TensorScheme(num_bits, True, grid=grid))
    student, path = nearest(teacher, dataset, scheme), tmp_path / "a" / "model.safetensors"
    found = export(student, resolve("exporter", "compressed_tensors"), path, teacher, dataset)
    config = json.loads((path.parent / "config.json").read_text())["quantization_config"]
    kind = "int" if grid == "uniform" else "float"
    assert config["kv_cache_scheme"]["type"] == kind and config["kv_cache_scheme"]["strategy"] == "tensor"
    assert found["key_value"] == config["kv_cache_scheme"]
    # What its reader makes of them; transformers 5.24 renamed the cache, and compressed-tensors 0.20 does not find it.
    ids = dataset.samples()
    with torch.no_grad():
        rounded = student(ids).logits
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from safetensors import safe_open

    arguments, x = QuantizationArgs(**config["kv_cache_scheme"]), torch.randn(2, 2, 9, 8) * 3
    with safe_open(path, "pt") as file:
        for owner, pair in keys_and_values(student).items():
            for part, quantizer in pair.items():
                scale = file.get_tensor(f"{owner}.{part}_scale")
                assert scale.shape == (1,) and float(scale) == float(quantizer.scale)
                theirs = fake_quantize(x, scale, torch.zeros(1), arguments)
                torch.testing.assert_close(theirs, quantizer(x), rtol=1e-6, atol=1e-6)
    assert set(keys_and_values(student)) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for pair in keys_and_values(student).values():
        for quantizer in pair.values():
            quantizer.enabled = False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, attn_implementation=attention).eval()
    with torch.no_grad():
        floats, read = student(ids).logits, loaded(ids).logits
    assert torch.equal(read, floats) or torch.allclose(read, rounded, atol=1e-5), "weights are what they were"


W2A16 = "reads packed weights with zero points at 4 and 8 bits, at 2 in new versions (0.32)"
PER_TENSOR = "reads packed weights per channel or group, not per tensor"
A8 = "rounds inputs of packed weights in its Humming kernels alone (0.32), elsewhere they stay float"
KV = "has keys and values in floats of 8 bits (grid=fp8_e4m3), not in integers of 4"
FUSED = "needs one grid for {}, which it computes as one layer"
PER_TOKEN = TensorScheme(8, True, "per_token")


def mixed(skip=("embeddings", "head"), **others):
    """Groups of 16, and others where ``others`` say so."""
    return Scheme(
        W4_G16.weight, FLOAT, skip=skip, overrides={f"*.{k}": {"weight": {"group_size": g}} for k, g in others.items()}
    )


@pytest.mark.parametrize(
    "scheme, warning",
    [
        (W4_G16, None),
        (Scheme(TensorScheme(4, False, "per_group", 16), FLOAT), None),
        (Scheme(TensorScheme(2, True, "per_group", 16), FLOAT), None),
        (Scheme(TensorScheme(2, False, "per_group", 16), FLOAT), W2A16),
        (Scheme(TensorScheme(8, True, "per_tensor"), FLOAT), PER_TENSOR),
        (Scheme(TensorScheme(8, True, "per_tensor"), PER_TOKEN), None),
        (Scheme(TensorScheme(8, True, "per_channel"), PER_TOKEN), None),
        (Scheme(TensorScheme(8, False, "per_channel"), PER_TOKEN), A8),
        (Scheme(TensorScheme(8, True, "per_group", 16), PER_TOKEN), A8),
        (Scheme(TensorScheme(4, True, "per_channel"), PER_TOKEN), A8),
        (Scheme(TensorScheme(4, True, "per_tensor"), PER_TOKEN), PER_TENSOR),
        (Scheme(TensorScheme(4, False, "per_channel"), PER_TOKEN), A8),
        (Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(4, True, "per_token")), A8),
        (
            Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(6, True, "per_token")),
            "reads inputs of packed weights at 4 and 8 bits, not at 6",
        ),
        (Scheme(W4_G16.weight, FLOAT, key_value=TensorScheme(8, True, grid="fp8_e4m3")), None),
        (Scheme(W4_G16.weight, FLOAT, key_value=TensorScheme(4, True)), KV),
        (Scheme(TensorScheme(2, False, "per_group", 16), FLOAT, key_value=TensorScheme(4, True)), f"{W2A16}; {KV}"),
        (mixed(down_proj=32), None),
        (mixed(q_proj=32, k_proj=32, v_proj=32), None),
        (mixed(q_proj=32), FUSED.format("q_proj, k_proj, v_proj")),
        (mixed(q_proj=32, up_proj=8), FUSED.format("q_proj, k_proj, v_proj and gate_proj, up_proj")),
        (mixed(("embeddings", "head", "*.mlp.*")), None),
        (mixed(("embeddings", "head", "*.gate_proj")), FUSED.format("gate_proj, up_proj")),
    ],
    ids=lambda value: value.name if isinstance(value, Scheme) else "",
)
def test_what_is_beyond_vllm_is_a_warning(scheme, warning, folder, make_dataset, tmp_path):
    teacher = teacher_of(folder("llama"))
    student = nearest(teacher, make_dataset(teacher, 8), scheme)
    found = export(student, resolve("exporter", "compressed_tensors"), tmp_path / "model.safetensors")
    told = found["parity"].get("warning", "")
    assert told.partition("vLLM ")[2] == (warning or ""), "behind what is said of transformers"


def test_grids_per_token_are_told_to_be_left_out(folder, make_dataset, tmp_path):
    teacher = teacher_of(folder("llama"))
    dataset = make_dataset(teacher, 8)
    student = nearest(teacher, dataset, Scheme(W4_G16.weight, FLOAT, key_value=TensorScheme(4, False, "per_token")))
    found = export(student, resolve("exporter", "compressed_tensors"), tmp_path / "model.safetensors", teacher, dataset)
    assert found["key_value"] == "not stored: no reader has such a grid"
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"] is None


def test_tokenizer_and_generation_settings_travel_with_onnx(folder, make_dataset, tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from dfq.exporters import onnx_qdq

    made = []

    def once(*given, real=onnx_qdq._to_onnx):
        """The second time the network is the same."""
        made.extend([] if made else [real(*given)])
        return copy.deepcopy(made[0])

    monkeypatch.setattr(onnx_qdq, "_to_onnx", once)
    source = tmp_path / "source"
    shutil.copytree(folder("llama"), source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer.json").write_text("its own")
    teacher = teacher_of(str(source))
    student = nearest(teacher, make_dataset(teacher, 8), W4_G16)
    exporter, path = resolve("exporter", "onnx_qdq", latency=False), tmp_path / "a" / "net.onnx"
    found = export(student, exporter, path)
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert {file.name for file in path.parent.iterdir()} == {"net.onnx", "net.onnx.json", *names}
    assert all((path.parent / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert "tokenizer" not in found
    (source / "chat_template.jinja").write_text("{{ messages[0] }}")
    path.unlink()
    export(student, exporter, path)  # again: what came with the one before goes
    assert (path.parent / "chat_template.jinja").read_text() == "{{ messages[0] }}"
    with pytest.raises(UserError) as error:
        (path.parent / "tokenizer.json").write_text("another")
        export(student, exporter, tmp_path / "a" / "other.onnx")
    assert str(error.value) == (
        f"got artifact_path={tmp_path}/a/other.onnx, beside which tokenizer.json of another network lies; allowed: a "
        "folder of its own, since the tokenizer is written beside the file; choose another folder"
    )
    assert (path.parent / "tokenizer.json").read_text() == "another" and not (tmp_path / "a/other.onnx").exists()


def test_exact_bits_beside_the_size(folder, make_dataset, tmp_path):
    teacher = teacher_of(folder("tied"))
    student = nearest(teacher, make_dataset(teacher, 8), W4_G16)
    found = export(student, resolve("exporter", "compressed_tensors"), tmp_path / "model.safetensors", teacher)
    count = sum(layer.weight.numel() for layer in student.layers.values())
    floats = sum(p.numel() for p in teacher.module.parameters()) - count  # tied ones are there once
    floats += sum(buffer.numel() for _, buffer in teacher.module.named_buffers() if "inv_freq" not in _)
    bits = found["exact_bits"]
    assert bits == {
        "codes": 4 * count, "scales": 32 * count / 16, "zero_points": 0, "float": 32 * floats,
        "bytes": (4 * count + 2 * count + 32 * floats) / 8,
    }  # fmt: skip
    assert bits["bytes"] < found["size_bytes"] < bits["bytes"] + 12000, "names and shapes beside it"


# ------------------------------------------------------------------------------------------------ mixtures of experts

MIXTURES = {
    "mixtral": CONFIGS["mixtral"],
    "qwen3_moe": CONFIGS["qwen3_moe"],
    "gpt_oss": lambda: transformers.GptOssConfig(  # weights transposed, with biases, gates and others in turn
        **{**GROUPED, "max_position_embeddings": 8192}, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_taken_apart_and_put_together_again(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(MIXTURES[name]())
        for key, parameter in module.named_parameters():
            if key.endswith("bias"):
                parameter.data.normal_()
    teacher = Teacher(module, "language_modeling", TokenSpec(64, 16))
    student = Student.from_teacher(teacher, Scheme(TensorScheme(4, True, "per_channel"), FLOAT))
    assert len([layer for layer in student.layers if ".experts." in layer]) == 2 * 4 * 2
    ids = teacher.example(3)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-5, atol=1e-5)
    own = module.state_dict()
    for key, tensor in tensors(student, teacher).items():
        assert torch.equal(tensor, own[key]), key
    assert all(any(key.endswith(router) for router in (".gate.weight", ".router.weight")) or "skip" in why
               for key, why in student.swap.kept_float.items())  # fmt: skip


@pytest.fixture(scope="module")
def same_token(folder, tmp_path_factory):
    """A mixture and samples of one token each, which few experts are chosen for; and which those are."""
    teacher = teacher_of(folder("mixtral"))
    ids = torch.full((12, 16), 7)
    dataset = SyntheticDataset.create(
        tmp_path_factory.mktemp("same") / "d", {"seed": 0}, {"pixels": False, "labels": False}
    )
    dataset.write_shard(0, {"input_ids": ids}, 0.0)
    chosen = {}

    def note(name, _module, _inputs, output):
        chosen[name.replace(".gate", ".experts")] = set(output[2].flatten().tolist())

    gates = [(name, part) for name, part in teacher.module.named_modules() if name.endswith("mlp.gate")]
    with torch.no_grad(), forward_hooks(gates, after=note):
        teacher(ids)
    return teacher, dataset, chosen


def test_experts_that_calibration_never_reached(same_token, tmp_path):
    teacher, dataset, chosen = same_token
    student = nearest(teacher, dataset, Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8)), tmp_path / "s")
    expected = [
        f"{owner}.{expert}.{part}"
        for owner, reached in chosen.items()
        for expert in range(4)
        for part in ("gate_up_proj", "down_proj")
        if expert not in reached
    ]
    assert expected and student.unreached == expected
    for name in student.unreached:
        owner, _, part = name.rsplit(".", 2)
        kin = [student.layers[f"{owner}.{e}.{part}"].input_quantizer for e in chosen[owner]]
        mine = student.layers[name].input_quantizer
        low = min(float(-q.zero_point * q.scale) for q in kin)
        high = max(float((255 - q.zero_point) * q.scale) for q in kin)
        assert float(-mine.zero_point * mine.scale) == pytest.approx(low, abs=1.5 * float(mine.scale))
        assert float((255 - mine.zero_point) * mine.scale) == pytest.approx(high, abs=1.5 * float(mine.scale))
    again = dfq.load_student(tmp_path / "s", device="cpu")
    assert again.unreached == expected
    ids = teacher.example(4)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)
    assert dfq.evaluate(teacher, student, dataset=dataset)["fidelity"]["layers"]


@pytest.mark.parametrize("algorithm, options", [
    ("gptq", {"num_samples": 8}), ("distillation", {"max_steps": 2, "batch_size": 4, "checks": 1})
])  # fmt: skip
def test_algorithms_pass_by_experts_without_tokens(algorithm, options, same_token):
    teacher, dataset, _ = same_token
    scheme = Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8))
    student = dfq.quantize(teacher, dataset, scheme, algorithm=algorithm, **options)
    plain = nearest(teacher, dataset, scheme)
    assert student.unreached == plain.unreached != []
    same = {name for name in plain.layers if torch.equal(student.layers[name].weight, plain.layers[name].weight)}
    assert torch.isfinite(student(teacher.example(2)).logits).all()
    if algorithm == "gptq":
        kin = {"weight_quantizer": "min_max"}
        student = dfq.quantize(teacher, dataset, scheme, algorithm=algorithm, **options, **kin)
        same = {name for name in plain.layers if torch.equal(student.layers[name].weight, plain.layers[name].weight)}
        assert set(plain.unreached) <= same and any(name not in same for name in plain.expert_layers)


def test_nobody_reached_is_an_error(folder, tmp_path):
    teacher = teacher_of(folder("mixtral"))
    student = Student.from_teacher(teacher, Scheme(TensorScheme(4, True, "per_channel"), TensorScheme(8)))
    kin = student.expert_layers
    with pytest.raises(UserError) as error:
        _lend({f"{name}.input_quantizer": Histogram() for name in kin}, kin, kin)
    assert str(error.value) == (
        "got calibration samples of which no token chose any of model.layers.0.mlp.experts.*.gate_up_proj; calibrate "
        "with more samples, or leave the layers' inputs float"
    )


def test_no_quantizer_is_left_without_a_grid(folder, make_dataset):
    teacher = teacher_of(folder("mixtral"))
    student = nearest(teacher, make_dataset(teacher, 8), W4_G16)
    assert all(part.enabled for part in student.module.modules() if isinstance(part, Quantizer))
