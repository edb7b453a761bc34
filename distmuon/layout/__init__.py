"""Which rule updates a parameter and where each of its elements lies: integers only, no tensor is made, no rank is asked."""
