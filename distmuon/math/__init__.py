"""Formulas on plain tensors: update rules, Newton-Schulz and its coefficients, and the formats of state."""
