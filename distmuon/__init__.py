"""The Muon optimizer under ZeRO-1 (arXiv 2502.16982)."""

from distmuon.checkpoint import torch_optim as interchange
from distmuon.checkpoint.folder import latest_checkpoint
from distmuon.checkpoint.load import load_checkpoint, verify_parameters
from distmuon.checkpoint.save import finish_saves, save_checkpoint
from distmuon.comm.agreement import shared_fate
from distmuon.comm.lost_ranks import LostRanks
from distmuon.integrations.grad_scaler import GradScaler
from distmuon.layout.routing import Route, route
from distmuon.optimizer import DistMuon
from distmuon.options import Precision, Sharding
from distmuon.planning.plan import Plan, plan

__version__ = "0.1.0"
__all__ = [
    "DistMuon",
    "GradScaler",
    "LostRanks",
    "Plan",
    "Precision",
    "Route",
    "Sharding",
    "finish_saves",
    "interchange",
    "latest_checkpoint",
    "load_checkpoint",
    "plan",
    "route",
    "save_checkpoint",
    "shared_fate",
    "verify_parameters",
]
