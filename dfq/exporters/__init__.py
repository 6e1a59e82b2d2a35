"""Exporters: from a student to a file that a runtime loads. One file each."""
