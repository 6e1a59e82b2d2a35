"""Algorithms: from a teacher and samples to a quantized student. One file each."""
