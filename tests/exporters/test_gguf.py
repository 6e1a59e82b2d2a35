"""GGUF files: packed by the specification, read by others, the trained codes and scales in them."""

import json
import shutil
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
    "qwen3": lambda: transformers.Qwen3Config(**TEXT, head_dim=16),
    "linear": lambda: scaled("linear", factor=4.0),
    "llama3": lambda: scaled(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": lambda: scaled("yarn", factor=4.0, original_max_position_embeddings=8),
    "yarn_factor": lambda: scaled("yarn", factor=4.0, original_max_position_embeddings=8, attention_factor=1.5),
    "yarn_exact": lambda: scaled("yarn", factor=4.0, original_max_position_embeddings=8, truncate=False),
    "yarn_bounds": lambda: scaled("yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=4.0),
    "dynamic": lambda: scaled("dynamic", factor=4.0),
    "llama3_qwen": lambda: transformers.Qwen2Config(**TEXT, rope_parameters=CONFIGS["llama3"]().rope_parameters),
}


def scaled(kind, **settings):
    """A Llama whose rotary embedding is scaled, with heads wide enough to have slow and fast frequencies."""
    rope = {"rope_type": kind, "rope_theta": 100.0, **settings}
    return transformers.LlamaConfig(**{**TEXT, "hidden_size": 64, "num_attention_heads": 2}, rope_parameters=rope)


def scheme(bits, granularity="per_group", scale_format="float16", zero_point=None):
    """Symmetric without a ``zero_point``."""
    size, has_zero = 32 if granularity == "per_group" else None, zero_point is not None
    weight = TensorScheme(bits, not has_zero, granularity, size, scale_format=scale_format,
                          zero_point=zero_point or "integer")  # fmt: skip
    return Scheme(weight, FLOAT)


ZERO_POINTS = pytest.mark.parametrize("zero_point", ["integer", "float"])


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
    return dfq.load_teacher("huggingface", name=str(tmp_path / "teacher"), length=32, device="cpu")


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
    student, path, found = made(teacher, make_dataset, tmp_path, chosen)
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
        assert torch.equal(loaded.eval()(ids).logits, student(ids).logits)
    assert found["parity"]["max_abs_error"] == 0.0 and "warning" not in found["parity"]


@of("llama")
@ZERO_POINTS
def test_blocks_with_an_offset_byte_by_byte(zero_point, make_dataset, tmp_path, teacher):
    """d, m, and the student's codes as they are; codes, scales and offsets take as much as the student says."""
    student, path, found = made(teacher, make_dataset, tmp_path, scheme(4, zero_point=zero_point))
    content, name = path.read_bytes(), "model.layers.1.mlp.up_proj"
    quantizer, codes = student.layers[name].weight_quantizer, student.integer_weight(name)[3].tolist()
    scale, zero = float(quantizer.scale[3]), float(quantizer.zero_point[3])
    assert (zero == round(zero)) == (zero_point == "integer") and min(codes) == 0
    quants = bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
    assert struct.pack("<ee", scale, -scale * zero) + quants in content
    count = sum(layer.weight.numel() for layer in student.layers.values())
    exact, width = found["exact_bits"], {"integer": 4, "float": 16}[zero_point]
    assert (exact["codes"], exact["scales"], exact["zero_points"]) == (count * 4, count / 2, count / 32 * width)
    floats = sum(tensor.size * 4 for tensor in read_weights(content).values()) - 4 * count
    blocks = count // 32 * 20
    assert blocks + floats < found["size_bytes"] == len(content) < blocks + floats + 6000, "and names of tensors"


@of("llama", "tied", "mistral", "qwen2")
@pytest.mark.parametrize("granularity", ["per_group", "per_channel", "per_tensor"])
@ZERO_POINTS
def test_what_others_read_of_offsets(teacher, granularity, zero_point, make_dataset, tmp_path):
    """The file's numbers are the same to all; with float zero points they are the student's but for a float's end."""
    gguf = pytest.importorskip("gguf")
    student, path, found = made(teacher, make_dataset, tmp_path, scheme(4, granularity, zero_point=zero_point))
    mine, kinds = read_weights(path.read_bytes()), set()
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    for tensor in reader.tensors:
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(mine[tensor.name].shape)
        assert (theirs == mine[tensor.name]).all()
        kinds.add(tensor.tensor_type.name)
    assert kinds == {"Q4_1", "F32"}
    in_steps = found["parity"]["max_error_of_weights_in_steps"]
    assert in_steps < (1e-5 if zero_point == "float" else 16 * 2**-11)
    up = student.layers["model.layers.1.mlp.up_proj"]
    differs = torch.from_numpy(mine["blk.1.ffn_up.weight"]) - up.weight
    assert float((differs / up.weight_quantizer.steps_of(up.weight)).abs().max()) <= in_steps * 1.0001
    pytest.importorskip("accelerate")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = teacher.example(3)
    with torch.no_grad():
        found_logits, wanted = loaded.eval()(ids).logits, student(ids).logits
    largest = float((found_logits - wanted).abs().max())
    assert largest < float(wanted.abs().max()) * (1e-5 if zero_point == "float" else 0.02)
    assert found["parity"]["max_abs_error"] < float(wanted.abs().max()) * (1e-5 if zero_point == "float" else 0.02)


@of("llama")
def test_whole_zero_points_cost_a_little_and_that_is_told(teacher, make_dataset, tmp_path):
    _, _, found = made(teacher, make_dataset, tmp_path, scheme(4, zero_point="integer"))
    assert 1e-4 < found["parity"]["max_error_of_weights_in_steps"] < 16 * 2**-11
    assert found["parity"]["max_abs_error_of_weights"] > 0


@of("llama")
def test_scales_that_are_no_float16_are_rounded_and_told(teacher, make_dataset, tmp_path):
    _, _, found = made(teacher, make_dataset, tmp_path, scheme(4, scale_format="float32"))
    assert "key_value" not in found
    assert 0 < found["parity"]["max_abs_error_of_weights"] < 1e-3


@of("llama", "gpt2")
def test_what_gguf_cannot_hold(teacher, make_dataset, tmp_path):
    for bits, size, symmetric in ((3, 32, True), (4, 16, True), (4, 16, False), (2, 32, False), (8, 32, False)):
        with pytest.raises(UserError) as error:
            made(teacher, make_dataset, tmp_path, Scheme(TensorScheme(bits, symmetric, "per_group", size), FLOAT))
        if "gpt2" in type(teacher.module).__module__:
            assert str(error.value) == (
                "got exporter=gguf and teacher of type gpt2; allowed: llama | mistral | qwen2 | qwen3; "
                "exporter=compressed_tensors takes others"
            )
        else:
            assert str(error.value) == (
                f"got exporter=gguf and layer model.layers.0.self_attn.q_proj with {bits} bits, symmetric="
                f"{str(symmetric).lower()}, group_size={size}; allowed: grid=uniform with 4 bits, or with 8 and "
                "symmetric=true, groups of a multiple of 32 (grid=ternary with symmetric=true: of 256), and inputs "
                "that stay float; use scheme=w4a16_g32 scheme.weight.scale_format=float16"
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


# ------------------------------------------------------------------------------------------------ beside the weights


def metadata(path):
    gguf = pytest.importorskip("gguf")
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def in_llama_cpp(path, length=32):
    """The file in llama.cpp; of its logits it keeps those of every token."""
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, n_threads=1, logits_all=True, verbose=False)


def assert_same_in_llama_cpp(path, student, ids):
    """Its kernels round inputs of 4 and 8 bit weights to 8 bits: the same predictions but for near ties."""
    model = in_llama_cpp(path, ids.shape[1])
    model.eval(ids[0].tolist())
    found = torch.from_numpy(model.scores[: ids.shape[1]])
    with torch.no_grad():
        wanted = student(ids[:1]).logits[0]
    assert float((found - wanted).norm() / wanted.norm()) < 0.03


@of("linear", "llama3", "yarn", "yarn_factor")
def test_scaled_rotary_embeddings(teacher, make_dataset, tmp_path):
    """The frequencies and the factor of attention that the file says, by llama.cpp's formulas, are the network's."""
    student, path, found = made(teacher, make_dataset, tmp_path, scheme(8))
    told = {key.removeprefix("llama.rope."): value for key, value in metadata(path).items() if "llama.rope." in key}
    i = torch.arange(0, 32, 2, dtype=torch.float64)
    plain, factor = told["freq_base"] ** (-i / 32), told.get("scaling.factor", 1.0)
    attention = 1.0
    if told.get("scaling.type") == "yarn":
        low, high = (
            32 * torch.log(torch.tensor(told["scaling.original_context_length"] / (beta * 2 * torch.pi)))
            / (2 * torch.log(torch.tensor(told["freq_base"])))
            for beta in (32, 1)
        )  # fmt: skip
        low, high = max(float(low.floor()), 0), min(float(high.ceil()), 31)
        mix = 1 - ((i / 2 - low) / max(0.001, high - low)).clamp(0, 1)
        wanted = plain / factor * (1 - mix) + plain * mix
        attention = told["scaling.attn_factor"] * (1 + 0.1 * float(torch.log(torch.tensor(factor))))
    else:
        wanted = plain / factor / torch.tensor(read_weights(path.read_bytes()).get("rope_freqs.weight", 1.0))
    rotary = student.module.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq.double(), torch.as_tensor(wanted), rtol=1e-5, atol=0)
    assert rotary.attention_scaling == pytest.approx(attention, rel=1e-6)
    assert float((rotary.inv_freq.double() / plain - 1).abs().max()) > 0.3, "not the plain ones"
    assert found["parity"]["max_abs_error"] == 0.0 and found["parity"]["argmax_agreement"] == 1.0
    assert found["parity"]["warning"].startswith("gguf_file= of transformers does not read rope_parameters: ")


@of("linear", "llama3", "yarn", "yarn_factor", "llama", "tied", "qwen2", "qwen3")
@pytest.mark.parametrize(
    "chosen", [scheme(4), scheme(8), scheme(4, zero_point="integer"), scheme(4, zero_point="float")],
    ids=["q4_0", "q8_0", "q4_1", "q4_1_float"],
)  # fmt: skip
def test_logits_in_llama_cpp(teacher, chosen, make_dataset, tmp_path):
    pytest.importorskip("llama_cpp")
    student, path, _ = made(teacher, make_dataset, tmp_path, chosen)
    assert_same_in_llama_cpp(path, student, teacher.example(1))


@of("wide")
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_ternary_weights_in_llama_cpp(granularity, teacher, make_dataset, tmp_path):
    pytest.importorskip("llama_cpp")
    size = 256 if granularity == "per_group" else None
    ternary = TensorScheme(grid="ternary", symmetric=True, granularity=granularity, group_size=size,
                           scale_format="float16")  # fmt: skip
    student, path, _ = made(teacher, make_dataset, tmp_path, Scheme(ternary, FLOAT))
    assert_same_in_llama_cpp(path, student, teacher.example(1))


@of("dynamic", "yarn_exact", "yarn_bounds", "llama3_qwen")
def test_rotary_embeddings_that_the_format_has_no_words_for(teacher, make_dataset, tmp_path):
    told = (
        r"got exporter=gguf and teacher .*rope_type=(dynamic|yarn and truncate=False|yarn and beta_fast=4.0|llama3); "
    )
    with pytest.raises(UserError, match=told):
        made(teacher, make_dataset, tmp_path, scheme(8))
    assert not (tmp_path / "out").exists()


@of("llama")
def test_keys_and_values_that_are_rounded_are_told_of(teacher, make_dataset, tmp_path):
    rounded = Scheme(scheme(8).weight, FLOAT, key_value=TensorScheme(4, False, "per_token"))
    _, _, found = made(teacher, make_dataset, tmp_path, rounded)
    assert found["key_value"] == "not stored: the format has no such grid"
    assert found["parity"]["max_abs_error"] > 1e-3 and found["parity"]["max_abs_error_of_weights"] == 0.0


@of("qwen3")
def test_heads_of_a_width_that_is_not_the_default(teacher, make_dataset, tmp_path):
    _, _, found = made(teacher, make_dataset, tmp_path, scheme(8))
    assert found["parity"]["max_abs_error"] == 0.0
    assert found["parity"]["warning"].startswith("gguf_file= of transformers does not read head_dim: ")


# ------------------------------------------------------------------------------------------------ tokenizers

SENTENCE = "the cat sat on 1234 mats,\n\nisn't it?  THE end"
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA_3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace("{1,3}", "")


def byte_level(folder, regex, ignore_merges, begins, **settings):
    """A byte-level tokenizer trained on a few words, with ``regex`` before it, in place of the teacher's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|begin|>", "<|eot|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([SENTENCE, "the cat isn't the end"] * 4, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {"bos_token": "<|begin|>", "eos_token": {"content": "<|eot|>"}, "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.fixture
def spoken(make_dataset, tmp_path):
    """``spoken(write)``: a student whose teacher has a vocabulary of 320, exported with what ``write(folder)`` made."""
    folder = tmp_path / "spoken"
    config = transformers.LlamaConfig(**{**TEXT, "vocab_size": 320, "num_hidden_layers": 1, "eos_token_id": [7, 8]})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)

    def export_with(write):
        tokenizer = write(folder)
        teacher = dfq.load_teacher("huggingface", name=str(folder), length=12, device="cpu")
        _, path, found = made(teacher, make_dataset, tmp_path, scheme(8))
        return tokenizer, path, found

    return export_with


@pytest.mark.parametrize(
    "regex, ignore_merges, begins, name",
    [(LLAMA_3, True, True, "llama-bpe"), (QWEN_2, False, False, "qwen2"), (None, False, False, "gpt-2")],
)
def test_how_text_is_split_before_byte_pairs(regex, ignore_merges, begins, name, spoken):
    template = "{{ messages[0]['content'] }}"
    tokenizer, path, found = spoken(lambda to: byte_level(to, regex, ignore_merges, begins, chat_template=template))
    told = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata(path).items()}
    assert (told["model"], told["pre"]) == ("gpt2", name) and found["tokenizer"].endswith(f"text split as in {name}")
    assert (told["add_bos_token"], told["add_eos_token"]) == (begins, False)
    assert (told["bos_token_id"], told["eos_token_id"]) == (0, 1), "the tokenizer's, not the network's list"
    assert told["tokenizer.chat_template"] == template
    assert told["tokens"][:2] == ["<|begin|>", "<|eot|>"] and told["token_type"][:3] == [3, 3, 1]
    model = in_llama_cpp(path)
    assert model.tokenize(SENTENCE.encode(), add_bos=True, special=True) == tokenizer.encode(SENTENCE).ids


def test_a_template_in_a_file_of_its_own_and_settings_that_say_how_texts_begin(spoken):
    def write(folder):
        byte_level(folder, QWEN_2, False, False, add_bos_token=True, add_eos_token=True, chat_template="old")
        (folder / "chat_template.jinja").write_text("new")

    told = metadata(spoken(write)[1])
    assert told["tokenizer.chat_template"] == "new"
    assert told["tokenizer.ggml.add_bos_token"] is True and told["tokenizer.ggml.add_eos_token"] is True


@pytest.mark.parametrize("regex, ignore_merges", [(r"\p{L}+|\s+", False), (QWEN_2, True)])
def test_splits_without_a_name_are_told_of(regex, ignore_merges, spoken):
    _, path, found = spoken(lambda folder: byte_level(folder, regex, ignore_merges, False))
    assert metadata(path)["tokenizer.ggml.pre"] == "default"
    assert found["tokenizer"].endswith("no name in llama.cpp that is known here: other tokens there")


def test_byte_pairs_as_in_sentencepiece(spoken):
    def write(folder):
        from tokenizers import Tokenizer, models, normalizers, processors

        words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdefghi"]
        merges = [("a", "b"), ("\u2581", "c"), ("ab", "c"), ("\u2581c", "ab")]
        words += ["".join(pair) for pair in merges]
        model = models.BPE(
            {word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
        return tokenizer

    tokenizer, path, found = spoken(write)
    told = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata(path).items()}
    assert told["model"] == "llama" and told["add_space_prefix"] is True and told["add_bos_token"] is True
    assert found["tokenizer"] == "byte-pair encoding as sentencepiece has it"
    model = in_llama_cpp(path)
    for text in ("cab abc", "xyz \u00e9 ccabab", "  a"):
        assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text).ids, text


def test_ids_of_special_tokens_that_are_none(spoken):
    """Configurations of older networks have -1 for padding that there is none of."""

    def write(folder):
        byte_level(folder, QWEN_2, False, False)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": -1}))

    told = metadata(spoken(write)[1])
    assert "tokenizer.ggml.padding_token_id" not in told and told["tokenizer.ggml.bos_token_id"] == 0


WORDS = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "added_tokens": []}


@of("llama")
@pytest.mark.parametrize(
    "content, told",
    [
        (json.dumps(WORDS), "not stored: tokenizers of type BPE alone are, its tokenizer.json is of WordLevel"),
        (None, "not stored: the teacher came without a tokenizer.json, or its folder can't be read from here"),
    ],
)
def test_tokenizers_that_the_file_cannot_hold(content, told, teacher, make_dataset, tmp_path):
    """The file loads without a vocabulary, and its description says that there is none."""
    path = tmp_path / "teacher/tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    student, file, found = made(teacher, make_dataset, tmp_path, scheme(8))
    assert found["tokenizer"] == told
    assert metadata(file)["tokenizer.ggml.model"] == "none"
    assert_same_in_llama_cpp(file, student, teacher.example(1))


@of("llama")
@pytest.mark.parametrize("exporter", ["gguf", "compressed_tensors"])
def test_a_tokenizer_from_the_hub_travels_along(teacher, exporter, make_dataset, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cached = tmp_path / "hub/models--someone--something"
    shutil.copytree(tmp_path / "teacher", cached / "snapshots/c0ffee")
    (cached / "snapshots/c0ffee/tokenizer_config.json").write_text('{"chat_template": "hello"}')
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    module.config._name_or_path = "someone/something"
    teacher = dfq.load_teacher(module, "language_modeling", vocab_size=48, length=12, device="cpu")
    student = dfq.quantize(teacher, make_dataset(teacher, 8), scheme(8), algorithm="round_to_nearest")
    folder = tmp_path / "out"
    if exporter == "gguf":
        found = export(student, resolve("exporter", exporter), folder / "model.gguf", teacher)
        assert metadata(folder / "model.gguf")["tokenizer.ggml.tokens"][3] == "t3"
        assert found["tokenizer"].startswith("byte-pair encoding")
    else:
        found = export(student, resolve("exporter", exporter), folder / "model.safetensors", teacher)
        assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "teacher/tokenizer.json").read_bytes()
        assert json.loads((folder / "tokenizer_config.json").read_text()) == {"chat_template": "hello"}
        assert "tokenizer" not in found
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    name = "model.gguf" if exporter == "gguf" else "model.safetensors"
    found = export(student, resolve("exporter", exporter), tmp_path / "other" / name, teacher)
    assert found["tokenizer"].startswith("not stored: the teacher came without ")
