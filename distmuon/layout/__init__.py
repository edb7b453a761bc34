"""The rule that updates each parameter, and the place of each element. Integers only: no tensor, no process group."""
