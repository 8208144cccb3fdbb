"""Examples: the model zoo, training scripts and a small trained checkpoint."""
