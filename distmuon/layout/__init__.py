"""Which rule updates a parameter and where each of its elements lies: integers only, no tensors and no ranks."""
