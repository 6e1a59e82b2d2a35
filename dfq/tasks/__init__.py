"""Tasks: what a network's outputs mean. One file each."""
