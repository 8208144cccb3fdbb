"""State-dict-compatible PyTorch models of the public KAN families, one family per module.

Every module has a factory ``build(...) -> nn.Module``; on the command line ``examples.zoo.efficient_kan:build``.
The models stand on PyTorch alone and know nothing of the compiler: they are what a user brings.  All initial
weights come from a generator seeded by ``build(seed=...)``; the global random state is neither read nor advanced.
"""
