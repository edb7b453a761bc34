"""distmuon: the Muon optimizer under ZeRO-1 (arXiv 2502.16982)."""

from distmuon.agreement import shared_fate
from distmuon.grad_scaler import GradScaler
from distmuon.loading import load_checkpoint, verify_parameters
from distmuon.optimizer import DistMuon
from distmuon.planner import Plan, plan
from distmuon.roll_call import LostRanks
from distmuon.routing import Route, route
from distmuon.saving import finish_saves, save_checkpoint
from distmuon.snapshot import latest_checkpoint

__version__ = "0.1.0"
__all__ = [
    "DistMuon",
    "GradScaler",
    "LostRanks",
    "Plan",
    "Route",
    "finish_saves",
    "latest_checkpoint",
    "load_checkpoint",
    "plan",
    "route",
    "save_checkpoint",
    "shared_fate",
    "verify_parameters",
]
