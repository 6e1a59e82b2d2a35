"""What a scheme says, derives and refuses, in the words that a user reads."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq.errors import UserError
from dfq.scheme import FLOAT, FLOAT_FORMATS, GRANULARITIES, GRIDS, POLICIES, RANGES, SCALE_FORMATS, Scheme, TensorScheme
from dfq.settings import choices, load

INT4, INT8 = TensorScheme(4, True, "per_channel"), TensorScheme(8)
OPTIONS = [
    "num_bits",
    "symmetric",
    "granularity",
    "group_size",
    "grid",
    "dynamic",
    "scale_format",
    "range",
    "zero_point",
]
GROUPS = {"granularity": "per_group", "group_size": 32}
PO2 = {"scale_format": "e8m0"}
MXFP4 = {"grid": "fp4_e2m1", "scale_format": "e8m0", **GROUPS}
NVFP4 = {"grid": "fp4_e2m1", "scale_format": "e4m3", "granularity": "per_group", "group_size": 16}


def message(function, *arguments, **keywords):
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ one tensor


BITS = "a whole number: weights 1 to 8, activations 2 to 16; give a bit width in that range"
TOGETHER = "granularity=per_group together with a group_size; give both or neither"
LOG2 = "its levels are 1, 1/2, 1/4, ...: all positive, and the 16th is small enough for any softmax"
REFUSED = [
    ({"grid": "uniforn"}, f"got grid='uniforn'; allowed: {' | '.join(GRIDS)}; did you mean 'uniform'?"),
    ({"grid": None}, f"got grid=None; allowed: {' | '.join(GRIDS)}"),
    *(({"num_bits": bad}, f"got num_bits={bad!r}; allowed: {BITS}") for bad in (0, -4, 17, 4.0, "4", True, None)),
    ({"symmetric": 1}, "got symmetric=1; allowed: true | false"),
    ({"dynamic": "yes"}, "got dynamic='yes'; allowed: true | false"),
    (
        {"granularity": "per_chanel"},
        f"got granularity='per_chanel'; allowed: {' | '.join(GRANULARITIES)}; did you mean 'per_channel'?",
    ),
    (
        {"scale_format": "float"},
        f"got scale_format='float'; allowed: {' | '.join(SCALE_FORMATS)}; did you mean 'float32'?",
    ),
    ({"range": "8bit"}, f"got range='8bit'; allowed: {' | '.join(RANGES)}; did you mean '7bit'?"),
    *(
        ({"granularity": "per_group", "group_size": bad}, f"got group_size={bad!r}; allowed: a whole number >= 1")
        for bad in (0, -32, 32.0, "32", True)
    ),
    ({"granularity": "per_group"}, f"got granularity=per_group and group_size=null; allowed: {TOGETHER}"),
    ({"group_size": 32}, f"got granularity=per_tensor and group_size=32; allowed: {TOGETHER}"),
    (
        {"num_bits": 1, "symmetric": True},
        "got num_bits=1 and grid=uniform; allowed: grid=seq for 1 bit; a uniform grid of 1 bit has no positive level",
    ),
    ({"num_bits": 9, "grid": "seq", "symmetric": True}, "got num_bits=9 and grid=seq; allowed: 1 to 8 bits"),
    *(
        ({"grid": grid}, f"got grid={grid} and symmetric=false; allowed: symmetric=true; its levels are symmetric")
        for grid in ("seq", *FLOAT_FORMATS)
    ),
    (
        {"grid": "log2", "num_bits": 5},
        f"got grid=log2, symmetric=false and num_bits=5; allowed: symmetric=false and at most 4 bits; {LOG2}",
    ),
    (
        {"grid": "log2", "num_bits": 4, "symmetric": True},
        f"got grid=log2, symmetric=true and num_bits=4; allowed: symmetric=false and at most 4 bits; {LOG2}",
    ),
    ({"range": "narrow"}, "got range=narrow; allowed: full; only symmetric uniform grids can be narrower"),
    (
        {"range": "7bit", "grid": "seq", "symmetric": True},
        "got range=7bit; allowed: full; only symmetric uniform grids can be narrower",
    ),
    (
        {"range": "7bit", "num_bits": 4, "symmetric": True},
        "got range=7bit and num_bits=4; allowed: num_bits=8",
    ),
    (
        {"scale_format": "e4m3"},
        "got scale_format=e4m3 and grid=uniform; allowed: float32 | float16 | e8m0, or a grid of fp8_e4m3, fp8_e5m2, "
        "fp4_e2m1",
    ),
]


@pytest.mark.parametrize("values, expected", REFUSED, ids=lambda value: str(value)[:60])
def test_what_a_tensor_cannot_have(values, expected):
    assert message(TensorScheme, **values) == expected
    if "symmetric" in values or "symmetric=true; its" not in expected:  # a mapping may leave out what a grid implies
        where = expected.replace("got ", "got scheme.attention.", 1)
        assert message(Scheme.from_dict, {"attention": values}) == where


@pytest.mark.parametrize(
    "scheme, low, high",
    [
        (TensorScheme(8), 0, 255),
        (TensorScheme(8, True), -128, 127),
        (TensorScheme(8, True, range="narrow"), -127, 127),
        (TensorScheme(8, True, range="7bit"), -64, 63),
        (TensorScheme(2, True), -2, 1),
        (TensorScheme(2, True, range="narrow"), -1, 1),
        (TensorScheme(16), 0, 65535),
        (TensorScheme(1, True, grid="seq"), -1, 0),
        (TensorScheme(3, True, grid="seq"), -4, 3),
        (TensorScheme(grid="ternary"), -1, 1),
        (TensorScheme(grid="fp8_e4m3", symmetric=True), 0, 255),
        (TensorScheme(grid="fp4_e2m1", symmetric=True), 0, 15),
        (TensorScheme(4, grid="log2"), 0, 15),
    ],
    ids=str,
)
def test_codes_lie_between(scheme, low, high):
    assert (scheme.quant_min, scheme.quant_max) == (low, high)


def test_what_a_grid_is():
    integers = [TensorScheme(8), TensorScheme(4, True), TensorScheme(grid="ternary", symmetric=True)]
    others = [TensorScheme(4, True, grid="seq"), TensorScheme(grid="ternary"), TensorScheme(4, grid="log2"), FLOAT]
    others += [TensorScheme(grid=grid, symmetric=True) for grid in FLOAT_FORMATS]
    assert all(scheme.has_integer_codes for scheme in integers)
    assert not any(scheme.has_integer_codes for scheme in others)
    assert [scheme for scheme in integers + others if scheme.has_float_zero_point] == [TensorScheme(grid="ternary")]
    assert [scheme for scheme in integers + others if scheme.is_float] == [FLOAT]
    assert [scheme.bits_per_value for scheme in integers] == [8, 4, 1.6]
    assert TensorScheme(granularity="per_token").dynamic  # each token has a range of its own: of this very batch
    # Bits of their own.
    widths = {grid: TensorScheme(3, True, grid=grid).num_bits for grid in GRIDS if grid != "log2"}
    assert widths == {"uniform": 3, "seq": 3, "ternary": 2, "fp8_e4m3": 8, "fp8_e5m2": 8, "fp4_e2m1": 4, "float": 16}


# ------------------------------------------------------------------------------------------------ a scheme


WEIGHT_GRIDS = " | ".join(grid for grid in GRIDS if grid != "log2")
STILL = "per_tensor | per_channel | per_group and dynamic=false; weights have no tokens and do not change"
BATCHES = (
    "got scheme.activation.granularity=per_group and dynamic=false; allowed: dynamic=true; groups have ranges of each"
)
INPUTS = "uniform | fp8_e4m3 | fp8_e5m2 | fp4_e2m1 | float, 2 to 16 bits; grid=ternary and grid=seq are for weights"
NO_CHANNELS = (
    "per_tensor | per_token | per_group; no integer runtime multiplies activations that have a scale per channel"
)
MAPPING = "{weight: {num_bits: 8}, activation: {...}}"
INTEGERS = "grid=uniform and granularity=per_tensor | per_channel; use scheme.policy=all for other grids"
STATIC = (
    "grid=uniform, granularity=per_tensor and dynamic=false; integer runtimes know every activation's grid beforehand; "
    "use scheme.policy=all for others"
)
KEYS = (
    "scheme.weight, scheme.activation, scheme.policy, scheme.name, scheme.overrides, scheme.attention, scheme.softmax"
    ", scheme.key_value, scheme.skip, scheme.input_bits, scheme.key"
)


def listed(where):
    return ", ".join(f"{where}.{option}" for option in OPTIONS)


SCHEMES_REFUSED = [
    ({"input_bits": 1}, "got scheme.input_bits=1; allowed: a whole number from 2 to 16, or null"),
    ({"input_bits": True}, "got scheme.input_bits=True; allowed: a whole number from 2 to 16, or null"),
    ({"input_bits": "8"}, "got scheme.input_bits='8'; allowed: a whole number from 2 to 16, or null"),
    (
        {"policy": "edges"},
        "got scheme.policy='edges'; allowed: all | edges_8bit | hardware; did you mean 'edges_8bit'?",
    ),
    (
        {"policy": "hardwar"},
        "got scheme.policy='hardwar'; allowed: " + f"{' | '.join(POLICIES)}; did you mean 'hardware'?",
    ),
    ({"polcy": "all"}, f"got scheme.polcy; allowed: {KEYS}; did you mean 'scheme.policy'?"),
    ({"bits": 4}, f"got scheme.bits; allowed: {KEYS}"),
    (
        {"attention": {"gird": "uniform"}},
        f"got scheme.attention.gird; allowed: {listed('scheme.attention')}; did you mean 'scheme.attention.grid'?",
    ),
    ({"weight": 4}, f"got scheme.weight=4; allowed: a mapping with {', '.join(OPTIONS)}"),
    (
        {"weight": {"num_bits": 9}},
        "got scheme.weight.num_bits=9; allowed: 1 to 8; or grid=float for float weights",
    ),
    (
        {"weight": {"granularity": "per_token"}},
        f"got scheme.weight.granularity=per_token and dynamic=true; allowed: {STILL}",
    ),
    ({"weight": {"dynamic": True}}, f"got scheme.weight.granularity=per_tensor and dynamic=true; allowed: {STILL}"),
    ({"weight": {"grid": "log2"}}, f"got scheme.weight.grid=log2; allowed: {WEIGHT_GRIDS}; it has no sign"),
    (
        {"activation": {"granularity": "per_channel"}},
        f"got scheme.activation.granularity=per_channel; allowed: {NO_CHANNELS}",
    ),
    ({"activation": GROUPS}, f"{BATCHES} batch"),
    (
        {"activation": {"grid": "ternary"}},
        f"got scheme.activation.grid=ternary and num_bits=2; allowed: {INPUTS}",
    ),
    ({"softmax": {"grid": "seq"}}, f"got scheme.softmax.grid=seq and num_bits=8; allowed: {INPUTS}"),
    (
        {"activation": {"grid": "log2"}},
        "got scheme.activation.grid=log2; allowed: another grid; it is for scheme.softmax",
    ),
    (
        {"attention": {**GROUPS, "dynamic": True}},
        "got scheme.attention.granularity=per_group; allowed: per_tensor | per_token",
    ),
    (
        {"softmax": {**GROUPS, "dynamic": True}},
        "got scheme.softmax.granularity=per_group; allowed: per_tensor | per_token",
    ),
    (
        {"policy": "hardware", "weight": {"grid": "seq"}},
        f"got scheme.policy=hardware, scheme.weight.grid=seq and granularity=per_tensor; allowed: {INTEGERS}",
    ),
    (
        {"policy": "hardware", "weight": GROUPS},
        f"got scheme.policy=hardware, scheme.weight.grid=uniform and granularity=per_group; allowed: {INTEGERS}",
    ),
    (
        {"policy": "hardware", "activation": {"grid": "float"}},
        "got scheme.policy=hardware, scheme.activation.grid=float, granularity=per_tensor and dynamic=false; "
        f"allowed: {STATIC}",
    ),
    (
        {"policy": "hardware", "activation": {"granularity": "per_token"}},
        "got scheme.policy=hardware, scheme.activation.grid=uniform, granularity=per_token and dynamic=true; "
        f"allowed: {STATIC}",
    ),
    # Overrides, each checked by itself.
    ({"overrides": ["head"]}, "got scheme.overrides=['head']; allowed: {layer.*: {weight: {num_bits: 8}}}"),
    ({"overrides": {"head": 8}}, f"got scheme.overrides['head']=8; allowed: {MAPPING}"),
    ({"overrides": {"head": {}}}, f"got scheme.overrides['head']={{}}; allowed: {MAPPING}"),
    (
        {"overrides": {"head": {"weights": {}}}},
        f"got scheme.overrides['head']={{'weights': {{}}}}; allowed: {MAPPING}",
    ),
    (
        {"overrides": {"head": {"weight": {"bits": 8}}}},
        f"got scheme.overrides['head'].weight.bits; allowed: {listed(chr(0))}".replace(
            chr(0), "scheme.overrides['head'].weight"
        )
        + "; did you mean 'scheme.overrides['head'].weight.num_bits'?",
    ),
    (
        {"overrides": {"head": {"weight": 8}}},
        f"got scheme.overrides['head'].weight=8; allowed: a mapping with {', '.join(OPTIONS)}",
    ),
    (
        {"overrides": {"head": {"weight": {"num_bits": 0}}}},
        f"got scheme.overrides['head']: num_bits=0; allowed: {BITS}",
    ),
    (
        {"overrides": {"head": {"weight": {"num_bits": 16}}}},
        "got scheme.overrides['head'].weight.num_bits=16; allowed: 1 to 8; or grid=float for float weights",
    ),
    (
        {"overrides": {"head": {"activation": {"granularity": "per_channel"}}}},
        f"got scheme.overrides['head'].activation.granularity=per_channel; allowed: {NO_CHANNELS}",
    ),
    (
        {"overrides": {"head": {"activation": {"grid": "log2"}}}},
        "got scheme.overrides['head'].activation.grid=log2; allowed: another grid; it is for scheme.softmax",
    ),
    (
        {"policy": "hardware", "overrides": {"a": {"weight": GROUPS}}},
        "got scheme.policy=hardware, scheme.overrides['a'].weight.grid=uniform and granularity=per_group; "
        f"allowed: {INTEGERS}",
    ),
    (
        {"policy": "hardware", "overrides": {"a": {"activation": {"dynamic": True}}}},
        "got scheme.policy=hardware, scheme.overrides['a'].activation.grid=uniform, granularity=per_tensor and "
        f"dynamic=true; allowed: {STATIC}",
    ),
]


@pytest.mark.parametrize("config, expected", SCHEMES_REFUSED, ids=lambda value: re.sub(r"\W+", "-", str(value))[:70])
def test_what_a_scheme_cannot_have(config, expected):
    assert message(Scheme.from_dict, config) == expected
    assert "\n" not in expected


def test_a_mapping_may_leave_out_what_its_grid_implies():
    scheme = Scheme.from_dict(
        {
            "weight": {"grid": "ternary", "granularity": "per_channel"},
            "activation": {"grid": "fp8_e4m3"},
            "attention": {"grid": "float"},
            "softmax": {"grid": "log2"},
        }
    )
    assert scheme.weight == TensorScheme(2, True, "per_channel", grid="ternary")
    assert scheme.activation == TensorScheme(8, True, grid="fp8_e4m3")
    assert scheme.attention == FLOAT and scheme.softmax == TensorScheme(4, grid="log2")
    shifted = Scheme.from_dict({"weight": {"grid": "ternary", "symmetric": False}}).weight
    assert shifted.has_float_zero_point


def test_quotes_of_a_value_stay_what_they_are():
    expected = f"got scheme.weight.grid='got 4'; allowed: {' | '.join(GRIDS)}"
    assert message(Scheme.from_dict, {"weight": {"grid": "got 4"}}) == expected


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", choices("scheme"))
def test_a_yaml_is_called_what_it_says(name):
    assert Scheme.from_dict(load("scheme", name)).name == name
    assert re.fullmatch(r"mixed|w[a-z0-9]+(_?a[a-z0-9]+)(_g\d+)?(_k\d+)?(_po2)?", name)


@pytest.mark.parametrize(
    "weight, activation, name",
    [
        ({"num_bits": 4}, {"num_bits": 8}, "w4a8"),
        ({"num_bits": 4}, {"grid": "float"}, "w4a16"),
        ({"grid": "float"}, {"num_bits": 8}, "w16a8"),
        ({"num_bits": 4, "granularity": "per_group", "group_size": 128}, {"grid": "float"}, "w4a16_g128"),
        ({"num_bits": 1, "grid": "seq"}, {"num_bits": 8}, "w1seq_a8"),
        ({"grid": "ternary"}, {"num_bits": 16}, "wternary_a16"),
        ({"grid": "ternary", **GROUPS}, {"num_bits": 8}, "wternary_a8_g32"),
        ({"grid": "fp8_e4m3"}, {"grid": "fp8_e5m2"}, "wfp8_afp8e5m2"),
        ({"grid": "fp4_e2m1"}, {"grid": "fp4_e2m1"}, "wfp4_afp4"),
        ({"num_bits": 4, **PO2}, {"num_bits": 8, **PO2}, "w4a8_po2"),
        ({"num_bits": 4, **PO2}, {"num_bits": 8}, "w4a8"),
        (MXFP4, {"grid": "float"}, "wmxfp4_a16"),
        ({**MXFP4, "group_size": 64}, {"grid": "float"}, "wmxfp4_a16_g64"),
        (NVFP4, {**MXFP4, "dynamic": True}, "wnvfp4_amxfp4"),
    ],
)
def test_names_are_made_of_the_bits(weight, activation, name):
    config = {"weight": weight, "activation": activation}
    assert Scheme.from_dict(config).name == name
    assert Scheme.from_dict({**config, "name": None}).name == name
    assert Scheme.from_dict(config, "mine").name == "mine" == Scheme.from_dict({**config, "name": "mine"}, "other").name


# ------------------------------------------------------------------------------------------------ layers


def test_edges_at_8_bits():
    """Both ends of the network at 8 bits on a uniform grid, everything else as stated; what is float stays float."""
    scheme = Scheme.from_dict({"policy": "edges_8bit", "weight": NVFP4, "activation": {"grid": "float"}})
    assert scheme.for_layer(False) == (scheme.weight, FLOAT)
    assert scheme.for_layer(True) == (TensorScheme(8, True, "per_group", 16), FLOAT)
    scheme = Scheme(TensorScheme(2, True, "per_channel", grid="seq"), TensorScheme(4), "edges_8bit")
    assert scheme.for_layer(True, "head") == (TensorScheme(8, True, "per_channel"), TensorScheme(8))
    assert Scheme(INT4, INT8).for_layer(True) == (INT4, INT8)


OVERRIDES = [  # of w4a8 unless the case says otherwise: overrides, layer, weight, activation
    ({"head": {"weight": {"num_bits": 8}}}, "head", TensorScheme(8, True, "per_channel"), INT8),
    ({"head": {"weight": {"num_bits": 8}}}, "head.0", INT4, INT8),
    ({"layer1.*": {"activation": {"num_bits": 4}}}, "layer1.0.conv1", INT4, TensorScheme(4)),
    ({"layer[13].*": {"activation": {"num_bits": 4}}}, "layer2.0.conv1", INT4, INT8),
    ({"Head": {"weight": {"num_bits": 8}}}, "head", INT4, INT8),  # as the network spells it
    # The last one that matches wins, where both say something.
    (
        {"*": {"weight": {"num_bits": 2}, "activation": {"num_bits": 4}}, "a.*": {"weight": {"num_bits": 6}}},
        "a.b",
        TensorScheme(6, True, "per_channel"),
        TensorScheme(4),
    ),
    (
        {"a.*": {"weight": {"num_bits": 6}}, "*": {"weight": {"num_bits": 2}}},
        "a.b",
        TensorScheme(2, True, "per_channel"),
        INT8,
    ),
    # Other grids.
    ({"a": {"weight": {"grid": "float"}}}, "a", TensorScheme(16, True, "per_channel", grid="float"), INT8),
    ({"a": {"activation": {"grid": "float"}}}, "a", INT4, FLOAT),
    ({"a": {"weight": {"grid": "ternary"}}}, "a", TensorScheme(2, True, "per_channel", grid="ternary"), INT8),
    ({"a": {"activation": {"grid": "fp8_e4m3"}}}, "a", INT4, TensorScheme(8, True, grid="fp8_e4m3")),
    (
        {"a": {"weight": {"granularity": "per_group", "group_size": 4}}},
        "a",
        TensorScheme(4, True, "per_group", 4),
        INT8,
    ),
    ({"a": {"activation": {"granularity": "per_token"}}}, "a", INT4, TensorScheme(8, granularity="per_token")),
]


@pytest.mark.parametrize("overrides, layer, weight, activation", OVERRIDES, ids=str)
def test_overrides(overrides, layer, weight, activation):
    scheme = Scheme(INT4, INT8, overrides=overrides)
    assert scheme.for_layer(False, layer) == (weight, activation)
    assert Scheme.from_dict(scheme.to_dict()) == scheme and scheme.name == "w4a8"
    json.dumps(scheme.to_dict())


@pytest.mark.parametrize(
    "weight, changes, expected",
    [
        (NVFP4, {"granularity": "per_channel"}, TensorScheme(4, True, "per_channel", None, "fp4_e2m1", False, "e4m3")),
        (NVFP4, {"num_bits": 8}, TensorScheme(8, True, "per_group", 16)),  # other bits than the grid has
        (NVFP4, {"num_bits": 4}, TensorScheme(4, True, "per_group", 16, "fp4_e2m1", False, "e4m3")),
        (NVFP4, {"grid": "ternary"}, TensorScheme(2, True, "per_group", 16, "ternary")),
        (MXFP4, {"grid": "uniform"}, TensorScheme(4, True, "per_group", 32, scale_format="e8m0")),
        ({"grid": "ternary"}, {"num_bits": 4}, TensorScheme(4, True)),
        ({"grid": "float"}, {"num_bits": 4}, TensorScheme(4, True)),
        ({"num_bits": 2, "grid": "seq"}, {"num_bits": 4}, TensorScheme(4, True, grid="seq")),
        ({"symmetric": True, "range": "7bit"}, {"grid": "seq", "num_bits": 2}, TensorScheme(2, True, grid="seq")),
        ({"symmetric": True, "range": "narrow"}, {"grid": "float"}, FLOAT),
    ],
)
def test_an_override_wins_over_what_it_does_not_go_with(weight, changes, expected):
    scheme = Scheme.from_dict({"weight": weight, "overrides": {"a": {"weight": changes}}})
    assert scheme.for_layer(False, "a")[0] == expected
    assert scheme.for_layer(False, "b")[0] == scheme.weight


def test_an_override_of_an_edge_starts_from_its_8_bits():
    scheme = Scheme(INT4, TensorScheme(4), "edges_8bit", overrides={"head": {"activation": {"symmetric": True}}})
    assert scheme.for_layer(True, "head") == (TensorScheme(8, True, "per_channel"), TensorScheme(8, True))
    assert scheme.for_layer(False, "head") == (INT4, TensorScheme(4, True))


def test_hardware_lets_a_layer_stay_float():
    parts = {"weight": {"grid": "float"}, "activation": {"grid": "float"}}
    scheme = Scheme(INT4, INT8, "hardware", overrides={"head": parts})
    assert all(part.is_float for part in scheme.for_layer(True, "head"))


def test_two_overrides_that_do_not_go_together():
    """Each is fine by itself; what they make together is said with the name of the last."""
    overrides = {"a": {"weight": {"num_bits": 8, "range": "7bit"}}, "*": {"weight": {"num_bits": 4}}}
    scheme = Scheme(INT4, INT8, overrides=overrides)
    expected = "got scheme.overrides['*']: range=7bit and num_bits=4; allowed: num_bits=8"
    assert message(scheme.for_layer, False, "a") == expected


# ------------------------------------------------------------------------------------------------ all of them


TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.integers(0, 17),
        "symmetric": st.booleans(),
        "granularity": st.sampled_from(GRANULARITIES),
        "group_size": st.sampled_from([None, 0, 1, 32]),
        "grid": st.sampled_from(GRIDS),
        "dynamic": st.booleans(),
        "scale_format": st.sampled_from(SCALE_FORMATS),
        "range": st.sampled_from(RANGES),
    },
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["weight", "activation", "attention", "softmax"]), TENSORS),
    st.sampled_from(POLICIES),
    st.dictionaries(st.sampled_from(["*", "a"]), st.dictionaries(st.sampled_from(["weight", "activation"]), TENSORS)),
)
def test_any_mapping_is_a_scheme_or_one_line(parts, policy, overrides):
    """A scheme comes back from its own mapping, as a file stores it, and hands every layer a pair of tensor schemes."""
    try:
        scheme = Scheme.from_dict({**parts, "policy": policy, "overrides": overrides})
        pairs = [scheme.for_layer(is_edge, name) for is_edge in (False, True) for name in ("a", "b")]
    except UserError as error:
        assert str(error).startswith("got scheme.") and "; " in str(error) and "\n" not in str(error)
        return
    again = Scheme.from_dict(json.loads(json.dumps(scheme.to_dict())))
    assert again == scheme
    assert [again.for_layer(is_edge, name) for is_edge in (False, True) for name in ("a", "b")] == pairs
    for weight, activation in pairs:
        assert weight.quant_min < weight.quant_max and activation.quant_min < activation.quant_max
        assert not weight.dynamic or weight.is_float
