"""Student: saved and loaded bit for bit, small on disk, and exact words for everything that is wrong with a folder."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import NETS, SPEC, as_teacher, settle
from safetensors.torch import load_file
from torch import nn

from dfq.calibration import calibrate
from dfq.errors import UserError
from dfq.modules import Swap
from dfq.quantization import fake_quantize
from dfq.quantizers.min_max import MinMax
from dfq.quantizers.mse import MSE
from dfq.scheme import FLOAT, Scheme, TensorScheme
from dfq.student import Student, read_manifest
from dfq.teacher import Teacher


def scheme(bits, policy="all", symmetric=True, granularity="per_channel"):
    return Scheme(TensorScheme(bits, symmetric, granularity), TensorScheme(bits), policy=policy)


def images(num_samples=32):
    return settle(NETS["bare"](), seed=3, num_samples=num_samples)


def quantized(teacher, scheme, method=None):
    student = Student.from_teacher(teacher, scheme)
    method = method or MinMax()
    calibrate(student, images(), method, method)
    return student


class Aliased(nn.Module):
    """One convolution under two names, a tied weight, a batch norm that cannot be folded, a buffer, odd layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.same = self.first
        self.pre = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.register_buffer("gain", torch.tensor(1.7))
        self.odd = nn.Bilinear(4, 4, 4)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.up(torch.relu(self.pre(torch.relu(self.same(x)))))
        x = self.b(torch.relu(self.a(x))).mean((2, 3)) * self.gain
        return self.head(self.odd(x, x))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("policy", ["all", "edges_8bit"])
@pytest.mark.parametrize("kind", ["residual", "mlp", "bare", "aliased"])
def test_saved_and_loaded_bit_for_bit(tmp_path, make_teacher, bits, policy, kind):
    teacher = as_teacher(Aliased()) if kind == "aliased" else make_teacher(kind)
    student = quantized(teacher, scheme(bits, policy), MSE(num_candidates=10))
    x = images(16)
    with torch.no_grad():
        before_freezing = student(x)
        wanted = student.freeze()(x)
        assert torch.equal(wanted, before_freezing)
        student.settings, student.seconds = {"seed": 3}, 1.5
        student.save(tmp_path / "s")
        again = Student.load(tmp_path / "s", teacher)
        assert torch.equal(again(x), wanted)
    assert again.settings == {"seed": 3} and again.seconds == 1.5 and again.scheme == student.scheme
    assert again.swap == student.swap and again.surgery == student.surgery
    assert again.mean_weight_bits == student.mean_weight_bits and list(again.layers) == list(student.layers)
    assert not any(p.requires_grad for p in again.module.parameters())
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "student.safetensors").read_bytes() == (
        tmp_path / "s" / "student.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_every_weight_grid_survives(tmp_path, make_teacher, symmetric, granularity):
    teacher = make_teacher("plain")
    student = quantized(teacher, scheme(3, symmetric=symmetric, granularity=granularity)).freeze()
    student.save(tmp_path / "s")
    again = Student.load(tmp_path / "s", teacher)
    with torch.no_grad():
        assert torch.equal(again(images()), student(images()))
    for name, layer in student.layers.items():
        codes = again.integer_weight(name)
        assert torch.equal(codes, student.integer_weight(name))
        quantizer = layer.weight_quantizer
        assert codes.min() >= quantizer.scheme.quant_min and codes.max() <= quantizer.scheme.quant_max
        shape = (-1, *[1] * (codes.dim() - 1)) if granularity == "per_channel" else ()
        values = (codes - quantizer.zero_point.view(shape)).float() * quantizer.scale.view(shape)
        assert torch.equal(values, layer.weight)


class Normalizes(nn.Module):
    """Takes pictures as bytes would be, and has two layers that read them."""

    def __init__(self):
        super().__init__()
        self.first, self.beside = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4, 10)

    def forward(self, x):
        x = torch.nn.functional.pad(x, (1, 1, 1, 1)) * 2 - 1
        return self.last((self.first(x) + self.beside(x).relu()).mean((2, 3)))


@pytest.mark.parametrize("policy", ["all", "edges_8bit", "hardware"])
def test_input_bits_are_those_of_what_multiplies_the_networks_input(policy):
    narrow = replace(scheme(3, policy), activation=TensorScheme(3))
    last = 8 if policy == "edges_8bit" else 3
    bits = {"first": 6, "beside": 6, "last": last}
    student = Student.from_teacher(as_teacher(Normalizes()), replace(narrow, input_bits=6))
    assert {name: activation.num_bits for name, (_, activation) in student.swap.layers.items()} == bits
    assert {name: layer.input_quantizer.scheme.num_bits for name, layer in student.layers.items()} == bits
    sites = {path: site.num_bits for path, site in student.surgery.sites.quantizers.items()}
    if policy == "hardware":  # the input, and what pad and arithmetic make of it; then conv, add, mean, linear
        assert sites["input_0"] == sites["sub_0_output"] == 6 and sites["add_0_output"] == 3
        first, beside = student.layers["first"], student.layers["beside"]
        assert first.input_quantizer is beside.input_quantizer  # one grid, as without input_bits
    weights = {name: weight.num_bits for name, (weight, _) in student.swap.layers.items()}
    assert weights == {name: 8 if policy == "edges_8bit" and name != "beside" else 3 for name in bits}
    overridden = replace(narrow, input_bits=6, overrides={"first": {"activation": {"num_bits": 5}}})
    if policy != "hardware":
        assert Student.from_teacher(as_teacher(Normalizes()), overridden).swap.layers["first"][1].num_bits == 5


def test_input_bits_of_tokens_and_of_float_inputs_are_nobodys(make_teacher):
    floats = Scheme(scheme(4).weight, FLOAT, input_bits=8)
    student = Student.from_teacher(make_teacher("plain"), floats)
    assert all(activation.is_float for _, activation in student.swap.layers.values())


FP4 = {"grid": "fp4_e2m1", "symmetric": True}
GRIDS = [
    {"num_bits": 1, "grid": "seq", "symmetric": True},
    {"num_bits": 5, "grid": "seq", "symmetric": True},
    {"grid": "ternary", "symmetric": True},
    {"grid": "ternary"},
    {"grid": "ternary", "scale_format": "e8m0"},
    {"num_bits": 3, "scale_format": "e8m0"},
    {"num_bits": 8, "symmetric": True, "range": "7bit"},
    {"grid": "fp8_e4m3", "symmetric": True},
    {"grid": "fp8_e5m2", "symmetric": True, "scale_format": "e8m0"},
    {"grid": "fp8_e5m2", "symmetric": True, "scale_format": "e4m3"},
    {**FP4, "scale_format": "e8m0"},
    {**FP4, "scale_format": "e4m3"},
    {"grid": "float"},
]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(map(str, grid.values())))
def test_any_weight_grid_survives(tmp_path, grid, granularity):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4), nn.Flatten(), nn.Linear(216, 10)
    )
    teacher = as_teacher(net)
    teacher.module[0].weight.data[2] = 0.0  # a channel, and groups, of nothing
    size = {"group_size": 8} if granularity == "per_group" else {}
    weight = TensorScheme(granularity=granularity, **size, **grid)
    student = quantized(teacher, Scheme(weight, TensorScheme(8), policy="all"))
    with torch.no_grad():
        before = student(images(8))
        student.freeze()
        assert torch.isfinite(before).all() and torch.equal(student(images(8)), before)
        again = Student.load(student.save(tmp_path / "s"), teacher)
        assert torch.equal(again(images(8)), before) and again.scheme == student.scheme
    tensors = load_file(tmp_path / "s" / "student.safetensors")
    formats = {"float32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}
    for name, layer in student.layers.items():
        if weight.is_float:
            assert torch.equal(tensors[f"{name}.weight"], teacher.module.get_submodule(name).weight)
            continue
        quantizer = layer.weight_quantizer
        scale = tensors[f"{name}.weight_quantizer.scale"]
        channels = layer.weight.shape[layer.channel_axis]
        wanted = {"per_tensor": 1, "per_channel": channels, "per_group": layer.weight.numel() // 8}[granularity]
        assert scale.dtype == formats[weight.scale_format] and scale.numel() == wanted
        assert torch.equal(again.integer_weight(name), student.integer_weight(name))
        # The stored codes are those of the float weights on the stored grid, each row with its own entry of the scale.
        rows = quantizer.rows(teacher.module.get_submodule(name).weight.detach())
        s, z = quantizer.scale.reshape(-1), quantizer.zero_point.reshape(-1)
        values = fake_quantize(rows, s, z, weight, axis=0)
        assert torch.equal(quantizer.rows(layer.weight), values)
    assert again.sha256 == student.sha256


def test_a_channel_of_zeros_survives(tmp_path):
    net = NETS["bare"]()
    settle(net)
    net[2].weight.data[1] = 0
    net[2].bias.data[:] = 0
    net[0].weight.data[:] = 0
    net[0].bias.data[:] = -1  # all that the second convolution sees is zero
    teacher = Teacher(net, "classification", SPEC)
    student = quantized(teacher, scheme(4)).freeze()
    student.save(tmp_path / "s")
    with torch.no_grad():
        out = Student.load(tmp_path / "s", teacher)(images())
        assert torch.isfinite(out).all() and torch.equal(out, student(images()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_size_on_disk_is_bits_times_weights(tmp_path, bits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 301), nn.ReLU(), nn.Linear(301, 10))
    student = quantized(as_teacher(net), scheme(bits))
    student.save(tmp_path / "s")
    tensors = load_file(tmp_path / "s" / "student.safetensors")
    for name, layer in student.layers.items():
        packed = tensors[f"{name}.weight_codes"]
        assert packed.dtype == torch.uint8 and packed.numel() == -(-layer.weight.numel() * bits // 8)
        assert f"{name}.weight" not in tensors
    size, num_weights = (tmp_path / "s" / "student.safetensors").stat().st_size, 192 * 301 + 3010
    rest = sum(t.numel() * t.element_size() for n, t in tensors.items() if not n.endswith("weight_codes"))
    assert num_weights * bits / 8 <= size <= num_weights * bits / 8 + rest + 3000  # 3000: names in the header
    assert rest <= 4 * 3 * 311
    assert read_manifest(tmp_path / "s")["size_bytes"] == size


def test_a_layer_under_two_names_is_stored_once(tmp_path):
    student = quantized(as_teacher(Aliased()), scheme(4))
    tensors = student.save(tmp_path / "s") and load_file(tmp_path / "s" / "student.safetensors")
    floats = [name for name, t in tensors.items() if t.dim() > 1 and t.is_floating_point()]
    assert floats == ["odd.weight"]  # the one weight that has no quantized class
    assert [name for name in tensors if name.endswith("weight_codes")] == [
        f"{name}.weight_codes" for name in ("a", "first", "head", "up")
    ]


def test_mean_weight_bits(make_teacher):
    student = Student.from_teacher(make_teacher("bare"), scheme(4, "edges_8bit"))
    assert student.mean_weight_bits == pytest.approx((216 * 8 + 576 * 4 + 80 * 8) / (216 + 576 + 80))


def test_a_student_without_a_grid_is_not_saved(tmp_path, make_teacher):
    with pytest.raises(UserError, match="got a student whose layer 0 has no grid yet; run an algorithm on it"):
        Student.from_teacher(make_teacher("bare"), scheme(4)).save(tmp_path / "s")
    assert not (tmp_path / "s" / "student.json").exists()


# ------------------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path, make_teacher):
    return quantized(make_teacher("plain"), scheme(4)).save(tmp_path / "s")


def edited(**changes):
    def edit(path):
        manifest = json.loads((path / "student.json").read_text()) | changes
        (path / "student.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))

    return edit


def truncate(path):
    (path / "student.safetensors").write_bytes((path / "student.safetensors").read_bytes()[:-5])


def flip(path):
    content = bytearray((path / "student.safetensors").read_bytes())
    content[-1] ^= 16
    (path / "student.safetensors").write_bytes(content)


CHECKSUM = (
    r"^got .*student\.safetensors, whose content does not match its checksum; "
    r"run the same quantize command again with another student_dir$"
)


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, CHECKSUM),
        (flip, CHECKSUM),
        (lambda p: (p / "student.safetensors").unlink(), CHECKSUM),
        (lambda p: (p / "student.json").unlink(), r"^got .*, which has no student\.json; allowed: a student folder$"),
        (
            lambda p: (p / "student.json").write_text("{"),
            r"student\.json, which can't be read as json \(.*\); allowed: a student folder$",
        ),
        (
            edited(schema_version=3),
            r"^got a student of schema version 3; allowed: at most 2; install a newer dfq to read it$",
        ),
        (
            edited(format="dfq.synthetic_dataset"),
            r"which is a dfq\.synthetic_dataset folder; allowed: a student folder$",
        ),
        (edited(schema_version=...), r"student\.json"),
        (edited(sha256=...), r"student\.json"),
        (edited(layers=...), r"student\.json"),
    ],
)
def test_what_is_wrong_with_a_folder(folder, make_teacher, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        Student.load(folder, make_teacher("plain"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["residual", "mlp", "bare"])
def test_the_wrong_teacher(folder, make_teacher, kind):
    with pytest.raises(
        UserError,
        match=rf"^got a student of plain and the teacher {kind}, whose layers differ \(.*\); load it with the teacher",
    ) as error:
        Student.load(folder, make_teacher(kind))
    assert "\n" not in str(error.value)


def test_a_teacher_with_another_number_of_classes(folder):
    net = NETS["plain"]()
    net[8] = nn.Linear(12, 11)
    with pytest.raises(UserError, match="whose layers differ"):
        Student.load(folder, as_teacher(net, name="plain"))


def test_only_the_teachers_structure_is_used(folder, make_teacher):
    first, other = make_teacher("plain"), make_teacher("plain", seed=9)
    before = other.sha256
    with torch.no_grad():
        assert torch.equal(Student.load(folder, first)(images()), Student.load(folder, other)(images()))
    assert Teacher(other.module, "classification", SPEC).sha256 == before


def test_a_failed_save_leaves_no_whole_folder(folder, make_teacher, monkeypatch):
    """student.json goes first and comes last: what is there is never a mixture of two students."""
    import dfq.student

    monkeypatch.setattr(dfq.student, "write_json", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        quantized(make_teacher("plain"), scheme(2)).save(folder)
    with pytest.raises(UserError, match=r"has no student\.json"):
        read_manifest(folder)


def test_freezing_twice_changes_nothing(make_teacher):
    student = quantized(make_teacher("residual"), scheme(3))
    first = {k: v.clone() for k, v in student.freeze().module.state_dict().items()}
    assert all(torch.equal(v, first[k]) for k, v in student.freeze().module.state_dict().items())
    assert isinstance(student.swap, Swap)
