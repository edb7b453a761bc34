"""Training loops as users write them, each on two ranks, each beside the same training in one plain process."""
