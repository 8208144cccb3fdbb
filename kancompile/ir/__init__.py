"""What a file computes: programs, the nodes and operators they consist of, their law, and their text."""
