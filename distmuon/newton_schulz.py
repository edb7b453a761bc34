"""The public name `distmuon.newton_schulz.orthogonalize`; the iteration is in `math/newton_schulz.py`."""

from distmuon.math.newton_schulz import orthogonalize

__all__ = ["orthogonalize"]
