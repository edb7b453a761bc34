"""The only callers of torch.distributed: the group, what its ranks agree on, and what is said when one is lost."""
