"""GGUF files: packed by the specification, read by others, the trained codes and scales in them."""

import json
import struct

import pytest
import torch

import dfq
from dfq.errors import UserError
from dfq.exporters.gguf import read_weights
from dfq.pipeline import export
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.settings import resolve

transformers = pytest.importorskip("transformers")
TEXT = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "tied": lambda: transformers.LlamaConfig(**TEXT, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**TEXT, head_dim=8),
    "qwen2": lambda: transformers.Qwen2Config(**TEXT),
    "wide": lambda: transformers.LlamaConfig(
        **{**TEXT, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=4, n_positions=32),
}


def scheme(bits, granularity="per_group", scale_format="float16"):
    size = 32 if granularity == "per_group" else None
    return Scheme(TensorScheme(bits, True, granularity, size, scale_format=scale_format), FLOAT)


@pytest.fixture
def teacher(request, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
        for parameter in module.parameters():
            parameter.data.mul_(3) if parameter.dim() > 1 else parameter.data.add_(0.1)
        transformers.utils.logging.disable_progress_bar()
        module.save_pretrained(tmp_path / "teacher")
    vocabulary = {f"t{i}": i for i in range(46)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["t1", "t2"]], "unk_token": None}
    (tmp_path / "teacher/tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    return dfq.load_teacher("huggingface", name=str(tmp_path / "teacher"), length=12, device="cpu")


def made(teacher, make_dataset, tmp_path, chosen):
    student = dfq.quantize(teacher, make_dataset(teacher, 8), chosen, algorithm="round_to_nearest")
    path = tmp_path / "out" / "model.gguf"
    return student, path, export(student, resolve("exporter", "gguf"), path, teacher)


def of(*names):
    return pytest.mark.parametrize("teacher", names, indirect=True)


@of("llama")
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_byte_by_byte(teacher, bits, make_dataset, tmp_path):
    student, path, found = made(teacher, make_dataset, tmp_path, scheme(bits))
    assert found["parity"]["max_abs_error_of_weights"] == 0.0
    content, name = path.read_bytes(), "model.layers.1.mlp.up_proj"
    codes, scale = student.integer_weight(name)[3].tolist(), student.layers[name].weight_quantizer.scale[3]
    if bits == 4:
        quants = bytes((codes[j] + 8) | ((codes[j + 16] + 8) << 4) for j in range(16))
    else:
        quants = bytes(code % 256 for code in codes)
    assert struct.pack("<e", float(scale)) + quants in content
    assert path.with_name("model.gguf.json").exists() and found["size_bytes"] == len(content)


@of("llama", "tied", "mistral", "qwen2")
@pytest.mark.parametrize("chosen", [scheme(4), scheme(8, "per_channel")], ids=["q4_0", "q8_0"])
def test_what_others_read(teacher, chosen, make_dataset, tmp_path):
    gguf = pytest.importorskip("gguf")
    student, path, _ = made(teacher, make_dataset, tmp_path, chosen)
    mine = read_weights(path.read_bytes())
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert read.keys() == mine.keys()
    for name, tensor in read.items():
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(mine[name].shape)
        assert (theirs == mine[name]).all()
    pytest.importorskip("accelerate")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = teacher.example(3)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, student(ids).logits, rtol=0, atol=1e-5)


@of("llama")
def test_scales_that_are_no_float16_are_rounded_and_told(teacher, make_dataset, tmp_path):
    _, _, found = made(teacher, make_dataset, tmp_path, scheme(4, scale_format="float32"))
    assert 0 < found["parity"]["max_abs_error_of_weights"] < 1e-3


@of("llama", "gpt2")
def test_what_gguf_cannot_hold(teacher, make_dataset, tmp_path):
    for bits, size in ((3, 32), (4, 16)):
        with pytest.raises(UserError) as error:
            made(teacher, make_dataset, tmp_path, Scheme(TensorScheme(bits, True, "per_group", size), FLOAT))
        if "gpt2" in type(teacher.module).__module__:
            assert str(error.value) == (
                "got exporter=gguf and teacher of type gpt2; allowed: llama | mistral | qwen2 | qwen3; "
                "exporter=compressed_tensors takes others"
            )
        else:
            assert str(error.value) == (
                f"got exporter=gguf and layer model.layers.0.self_attn.q_proj with {bits} bits, symmetric=true, "
                f"group_size={size}; allowed: grid=uniform, symmetric=true, 4 or 8 bits, groups of a multiple of 32 "
                "(grid=ternary: of 256), and inputs that stay float; use scheme=w4a16_g32 "
                "scheme.weight.scale_format=float16"
            )


@of("wide")
@pytest.mark.parametrize("group_size", [None, 256])
def test_ternary_weights_in_blocks_of_256(teacher, group_size, make_dataset, tmp_path):
    """Codes byte by byte, and what the gguf package makes of them."""
    granularity = "per_channel" if group_size is None else "per_group"
    ternary = TensorScheme(grid="ternary", symmetric=True, granularity=granularity, group_size=group_size,
                           scale_format="float16")  # fmt: skip
    student, path, found = made(teacher, make_dataset, tmp_path, Scheme(ternary, FLOAT))
    assert found["parity"]["max_abs_error_of_weights"] == 0.0
    name = "model.layers.0.mlp.down_proj"
    codes = student.integer_weight(name)[5].tolist()
    scale = student.layers[name].weight_quantizer.scale[5].flatten()[0]
    quants = bytes(
        sum((codes[128 * half + 32 * part + j] + 1) << (2 * part) for part in range(4))
        for half in (0, 1)
        for j in range(32)
    )
    assert quants + struct.pack("<e", float(scale)) in path.read_bytes()
    count = sum(layer.weight.numel() for layer in student.layers.values())
    assert found["exact_bits"]["codes"] == pytest.approx(count * 1.5849625)
    gguf = pytest.importorskip("gguf")
    mine = read_weights(path.read_bytes())
    for tensor in gguf.GGUFReader(path).tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(mine[tensor.name].shape)
        assert (theirs == mine[tensor.name]).all()
        assert (tensor.tensor_type.name == "TQ2_0") == (mine[tensor.name].ndim == 2 and "blk" in tensor.name)


@of("llama")
def test_ternary_weights_that_fill_no_block(teacher, make_dataset, tmp_path):
    with pytest.raises(UserError, match=r"q_proj with 32 inputs; allowed: a multiple of 256; give scheme\.skip="):
        made(teacher, make_dataset, tmp_path, Scheme(TensorScheme(grid="ternary", symmetric=True,
             granularity="per_channel"), FLOAT))  # fmt: skip
