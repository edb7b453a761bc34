"""Which rule updates a parameter, and where each of its elements lies. Integers only: no tensor, no process group."""
