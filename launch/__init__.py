"""Training recipes on top of `distmuon`: run from the repository root with `torchrun -m launch.pretrain`."""
