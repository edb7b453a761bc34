"""Save, load and find checkpoints: DCP's files in full-parameter coordinates, which load at any number of ranks."""
