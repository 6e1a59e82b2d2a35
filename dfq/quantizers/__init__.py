"""Quantizers: from a tensor's values to its scale and zero point. One file each."""
