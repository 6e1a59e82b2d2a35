"""Losses: pure functions of tensors. One file each."""
