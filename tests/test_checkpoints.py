"""Checkpoints of a training go to their file, whole or not at all, and never stand in memory once more."""

import io

import pytest
import torch

import dfq
from dfq.lightning.checkpoints import FileCheckpointIO


def test_a_file_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path, saver = tmp_path / "deep/last.ckpt", FileCheckpointIO()
    saver.save_checkpoint({"state_dict": {"a": torch.arange(3)}, "step": 1}, path)
    assert torch.equal(saver.load_checkpoint(path, weights_only=True)["state_dict"]["a"], torch.arange(3))

    def half(checkpoint, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        saver.save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert saver.load_checkpoint(path, weights_only=True)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(TypeError, match=r"got storage_options=\{\}; allowed: None"):
        saver.save_checkpoint({}, path, storage_options={})


def test_a_distillation_puts_no_checkpoint_together_in_memory(make_dataset, make_teacher, monkeypatch):
    saved, real = [], torch.save
    monkeypatch.setattr(torch, "save", lambda checkpoint, target: saved.append(target) or real(checkpoint, target))
    teacher = make_teacher("plain")
    dfq.quantize(teacher, make_dataset(teacher, 24), "w4a8", algorithm="distillation", max_steps=4, batch_size=8)
    assert saved and not any(isinstance(target, io.IOBase) for target in saved)
