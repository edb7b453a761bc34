"""The formulas, on plain tensors: update rules, Newton-Schulz, its coefficients, and the bits that state is kept in."""
