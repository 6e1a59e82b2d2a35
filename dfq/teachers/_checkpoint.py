"""Weights from a file a user hands over: safetensors, or .pt / .pth without unpickling objects."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dfq.errors import UserError

WRAPPERS = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel; torch.compile


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Name → tensor; wrappers (``state_dict``, ``model``) are opened."""
    allowed = "a .safetensors, .pt or .pth file"
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"got teacher.checkpoint={path}, which does not exist", allowed) from None
    except Exception as error:  # torch's reader of a file that is none of its own raises nearly anything
        if re.search(r"unsupported (global|class)", str(error), re.I) or _is_pickle(path):
            raise UserError(
                f"got teacher.checkpoint={path}, which holds pickled objects, and dfq never unpickles",
                "tensors only",
                "save it with torch.save(model.state_dict(), path) or as safetensors",
            ) from None
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise UserError(f"got teacher.checkpoint={path}, which can't be read ({reason})", allowed) from None
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        what = f"a {type(content).__name__}" if not isinstance(content, Mapping) else "a mapping that is no state dict"
        raise UserError(f"got teacher.checkpoint={path}, which holds {what}", "a state dict (name → tensor)")
    return dict(content)


def _is_pickle(path: Path) -> bool:
    """Whether the file is a pickle of its own (its opcodes are looked at, none is executed)."""
    try:
        with open(path, "rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 0
    except Exception:  # anything but a pickle
        return False


def strip_prefixes(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Take wrappers' prefixes off until an entry is one of ``names`` (a network's own may start like that)."""
    while state and not names & state.keys():
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Load weights into ``module``; a missing, unexpected or differently shaped entry is an error that names it."""
    own = module.state_dict()
    state = strip_prefixes(read_state_dict(path), set(own))
    # Counters that older checkpoints lack and that inference does not read.
    for name in own:
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, own[name])
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [
            f"lacks {some(missing)}" if missing else "",
            f"has unexpected {some(unexpected)}" if unexpected else "",
        ]
        raise UserError(
            f"got teacher.checkpoint={path}, which {' and '.join(p for p in parts if p)}",
            "exactly the entries of the network",
            "check that the checkpoint belongs to this network",
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"got teacher.checkpoint={path}, whose {name} is {list(tensor.shape)}",
                f"{list(own[name].shape)} as in the network",
            )
    module.load_state_dict(state)


def some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
