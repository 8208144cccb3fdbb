"""From PyTorch to core ATen operators: tracing, decompositions, and the user's lines."""
