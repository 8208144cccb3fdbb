"""The straight line from a model to a file, with the error gate and the budget of bytes."""
