"""The only callers of torch.distributed: the group, agreement between its ranks, and the report of a lost rank."""
