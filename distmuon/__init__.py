"""distmuon: the Muon optimizer under ZeRO-1 (arXiv 2502.16982)."""

from distmuon.grad_scaler import GradScaler
from distmuon.optimizer import DistMuon
from distmuon.planner import Plan, plan
from distmuon.routing import Route, route

__version__ = "0.1.0"
__all__ = ["DistMuon", "GradScaler", "Plan", "Route", "plan", "route"]
