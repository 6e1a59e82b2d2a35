"""Weights from files and networks from names: what is understood, what is refused, and in which words."""

import os
import pickle

import pytest
import torch
from conftest import NETS, SPEC
from safetensors.torch import save_file
from torch import nn

from dfq.errors import UserError
from dfq.teacher import hash_tensors
from dfq.teachers import factory, timm, torchvision
from dfq.teachers._checkpoint import load_checkpoint, read_state_dict

PLACE = {"input_size": SPEC.size, "mean": SPEC.mean, "std": SPEC.std}


def net(seed=0):
    torch.manual_seed(seed)
    return NETS["plain"]()


def bare_network():
    return net(0)


def not_a_network():
    return {"weights": 1}


def picky(width):
    return nn.Conv2d(3, width, 1)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "bare": lambda s: s,
    "module.": lambda s: prefixed(s, "module."),
    "_orig_mod.": lambda s: prefixed(s, "_orig_mod."),
    "module._orig_mod.": lambda s: prefixed(s, "module._orig_mod."),
    "_orig_mod.module.": lambda s: prefixed(s, "_orig_mod.module."),  # torch.compile(DistributedDataParallel(net))
    "module.module.": lambda s: prefixed(s, "module.module."),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1}},
    "nested": lambda s: {"model": {"state_dict": prefixed(s, "module.")}, "args": ["x"]},
    "no counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "half": lambda s: {k: v.half().float() if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_what_is_understood(tmp_path, wrapping, suffix):
    state = WRAPPED[wrapping](net(1).state_dict())
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        if not all(isinstance(v, torch.Tensor) for v in state.values()):
            pytest.skip("safetensors holds tensors only")
        save_file(state, path)
    else:
        torch.save(state, path)
    target = net(2)
    load_checkpoint(target, path)
    wanted = WRAPPED["half"](net(1).state_dict()) if wrapping == "half" else net(1).state_dict()
    assert hash_tensors(target.state_dict()) == hash_tensors(wanted)


def test_a_network_whose_own_names_start_with_module(tmp_path):
    """``self.module = net`` is a common wrapper; its checkpoint fits it exactly as it is."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = net(1)

    source = Wrapper()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    target = Wrapper()
    nn.init.zeros_(target.module[0].weight)
    load_checkpoint(target, tmp_path / "w.pt")
    assert torch.equal(target.module[0].weight, source.module[0].weight)


def without(name):
    return lambda s: {k: v for k, v in s.items() if k != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (without("0.weight"), r"which lacks 0\.weight; allowed: exactly the entries of the network"),
        (lambda s: {**s, "fc.weight": torch.zeros(1)}, r"which has unexpected fc\.weight; allowed"),
        (
            lambda s: {**without("8.bias")(s), "fc.bias": torch.zeros(10)},
            r"which lacks 8\.bias and has unexpected fc\.bias",
        ),
        (
            lambda s: {**s, "8.weight": torch.zeros(7, 12)},
            r"whose 8\.weight is \[7, 12\]; allowed: \[10, 12\] as in the network",
        ),
        (
            lambda s: {f"x{i}": torch.zeros(1) for i in range(5)},
            r"lacks 0\.weight, 1\.bias, 1\.running_mean and \d+ more",
        ),
        (lambda s: torch.zeros(3), r"which holds a Tensor; allowed: a state dict"),
        (lambda s: [1, 2], r"which holds a list; allowed"),
        (lambda s: {"epoch": 3}, r"which holds a mapping that is no state dict"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    torch.save(change(net(1).state_dict()), tmp_path / "w.pt")
    target = net(2)
    before = hash_tensors(target.state_dict())
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(target, tmp_path / "w.pt")
    assert "\n" not in str(error.value) and str(tmp_path / "w.pt") in str(error.value)
    assert hash_tensors(target.state_dict()) == before


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy", "in a state dict"])
def test_objects_are_never_unpickled(tmp_path, how):
    bomb, path = Bomb(tmp_path / "executed"), tmp_path / "w.pt"
    content = {**net(1).state_dict(), "extra": bomb} if how == "in a state dict" else bomb
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(UserError, match="holds pickled objects, and dfq never unpickles"):
        read_state_dict(path)
    assert not (tmp_path / "executed").exists()


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(net(1), tmp_path / "w.pt")
    with pytest.raises(
        UserError,
        match=r"never unpickles; allowed: tensors only; save it with torch\.save\(model\.state_dict\(\), path\)",
    ):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"hello, I am a text file\n", b"PK\x03\x04 no zip", b"\x80\x02", b"\xff" * 100],
    ids=["empty", "text", "zip", "pickle", "bytes"],
)
def test_files_that_are_something_else(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"which can't be read \(.+\); allowed: a \.safetensors, \.pt or \.pth file"
    ) as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_missing_truncated_and_folders(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    with pytest.raises(UserError, match="which does not exist"):
        read_state_dict(path)
    save = save_file if suffix == ".safetensors" else torch.save
    save(net(1).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="can't be read"):
        read_state_dict(path)
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(UserError):
        read_state_dict(tmp_path / f"folder{suffix}")


# ------------------------------------------------------------------------------------------------ factory


def test_factory_with_a_checkpoint(tmp_path):
    torch.save({"state_dict": prefixed(net(5).state_dict(), "module.")}, tmp_path / "w.pt")
    teacher = factory.load(f"{__name__}:bare_network", "classification", checkpoint=str(tmp_path / "w.pt"), **PLACE)
    assert torch.equal(teacher.module[0].weight, net(5)[0].weight)
    structure = factory.load(
        f"{__name__}:bare_network", "classification", checkpoint="nowhere.pt", weights=False, **PLACE
    )
    assert structure.num_parameters == teacher.num_parameters
    assert factory.load(f"{__name__}:picky", "classification", kwargs={"width": 4}, **PLACE).module.out_channels == 4


@pytest.mark.parametrize(
    "name, message",
    [
        ("not_a_network", r"got a dict from teacher\.factory=.*; allowed: a function that returns a torch\.nn\.Module"),
        ("bare_netwrok", r"has no bare_netwrok; did you mean 'bare_network'\?"),
        ("picky", r"got teacher\.factory=.*picky.*width"),  # called without what it needs
    ],
)
def test_factories_that_do_not_work(name, message):
    with pytest.raises(UserError, match=message):
        factory.load(f"{__name__}:{name}", "classification", **PLACE)


@pytest.mark.parametrize(
    "name",
    [
        "os:getcwd",
        "subprocess:run",
        "nothing",
        "a:",
        ":load",
        ".relative:load",
        "no_such_module_at_all:load",
        "a..b:load",
    ],
)
def test_factories_that_are_none(name):
    with pytest.raises(UserError, match=r"got teacher\.factory="):
        factory.load(name, "classification", **PLACE)


# ------------------------------------------------------------------------------------------------ timm, torchvision


def test_timm_takes_the_models_own_input():
    teacher = timm.load("resnet10t", pretrained=False, num_classes=4)
    own = teacher.module.default_cfg
    assert teacher.input_spec.size == tuple(own["input_size"]) and teacher.input_spec.mean == tuple(own["mean"])
    assert timm.load("resnet10t", pretrained=False, input_size=[3, 32, 32]).input_spec.size == (3, 32, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "resnet10tt", "pretrained": False}, r"got teacher\.name=resnet10tt, which timm can't load"),
        (
            {"name": "resnet10t", "pretrained": True, "checkpoint": "x.pt"},
            r"got teacher\.checkpoint and teacher\.pretrained=true",
        ),
        ({"name": "resnet10t", "checkpoint": "nowhere.pt"}, r"nowhere\.pt, which does not exist"),
    ],
)
def test_timms_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        timm.load(**options)


def test_torchvision_takes_a_checkpoint(tmp_path):
    first = torchvision.load("squeezenet1_1", num_classes=4)
    torch.save(first.module.state_dict(), tmp_path / "w.pt")
    second = torchvision.load("squeezenet1_1", num_classes=4, checkpoint=str(tmp_path / "w.pt"), input_size=(3, 64, 64))
    assert second.sha256 == first.sha256 and second.input_spec.size == (3, 64, 64)
    assert first.input_spec.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"name": "resnet81"},
            r"got teacher\.name=resnet81; allowed: a classifier or detector of torchvision\.models; "
            r"did you mean 'resnet18'\?",
        ),
        (
            {"name": "resnet18", "weights": "DEFUALT"},
            r"got teacher\.weights=DEFUALT; allowed: IMAGENET1K_V1 \| DEFAULT",
        ),
        (
            {"name": "resnet18", "weights": "DEFAULT", "checkpoint": "x.pt"},
            r"got teacher\.checkpoint and teacher\.weights",
        ),
        ({"name": "resnet18", "weights": "DEFAULT", "num_classes": 7}, r"num_classes"),
    ],
)
def test_torchvisions_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        torchvision.load(**options)
