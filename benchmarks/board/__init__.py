"""The board: methods by bits by networks, each cell the accuracy of an emitted file; ``python -m benchmarks.board``."""
