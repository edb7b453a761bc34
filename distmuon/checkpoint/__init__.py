"""Saving, loading and finding checkpoints: DCP's files in full-parameter coordinates, for any number of ranks."""
