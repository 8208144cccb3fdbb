"""Prove what a file computes, and how fast: outputs, layers, kernels and runtimes side by side."""
