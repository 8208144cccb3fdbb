"""Runtimes that a compiled file is validated in, one file each."""
