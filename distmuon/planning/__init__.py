"""Planning: traffic, memory and time of a run, computed from its layout without a GPU or a process group."""
