"""Detectors: adapters between what a network that finds boxes gives and what dfq reads of it. One family a file."""
