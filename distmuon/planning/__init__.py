"""What a run will take, computed from the layout without a GPU or a process group."""
