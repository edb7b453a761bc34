"""`distmuon.newton_schulz.orthogonalize`, the name that users import; the iteration is in `math/newton_schulz.py`."""

from distmuon.math.newton_schulz import orthogonalize

__all__ = ["orthogonalize"]
