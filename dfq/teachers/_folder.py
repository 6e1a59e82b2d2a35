"""What a folder of transformers has to hold, seen without transformers or torch: the command line asks before both."""

from __future__ import annotations

from pathlib import Path

from dfq.errors import UserError

ALLOWED = "a folder with config.json and *.safetensors, or an id on the Hugging Face hub"


def check_folder(name: str, weights: bool = True) -> bool:
    """Whether ``name`` is a folder rather than an id on the hub; a folder that can't be loaded is a UserError.

    Args:
        weights: whether there have to be weights too.
    """
    folder = Path(name)
    if folder.is_file():
        raise UserError(f"got teacher.name={name}, which is a file", ALLOWED, "name the folder it lies in")
    if not folder.is_dir():
        if name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1:  # no id looks like that
            raise UserError(f"got teacher.name={name}, which does not exist", ALLOWED)
        return False
    if not (folder / "config.json").is_file():
        raise UserError(f"got teacher.name={name}, a folder without config.json", ALLOWED)
    if weights and not any(folder.glob("*.safetensors")):
        others = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{suffix}"))
        has = f" (it has {others[0]}, and dfq never unpickles)" if others else ""
        raise UserError(
            f"got teacher.name={name}, a folder without *.safetensors{has}",
            ALLOWED,
            "save it with model.save_pretrained(folder)",
        )
    return True
