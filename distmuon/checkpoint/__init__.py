"""Save, load and find checkpoints: DCP's files in full-parameter coordinates, so that any number of ranks loads them."""
