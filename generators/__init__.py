"""Generators: synthetic samples out of a teacher. One file each."""
