"""Measurements of speed, accuracy and cost; each script runs as ``python -m benchmarks.NAME`` and writes JSON."""
