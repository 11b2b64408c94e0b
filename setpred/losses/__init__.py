"""Losses between predicted and target sets."""

from setpred.losses.chamfer import ChamferLoss, chamfer_loss
from setpred.losses.dspn import DSPNLoss
from setpred.losses.earth_mover import earth_mover_distance
from setpred.losses.hungarian import HungarianLoss, hungarian_loss
from setpred.losses.matched import matched_cross_entropy, matched_focal_loss
from setpred.losses.representation import RepresentationLoss, representation_loss
from setpred.losses.sinkhorn import SinkhornLoss, sinkhorn_loss
from setpred.losses.sliced import SlicedWassersteinLoss, sliced_wasserstein_loss

__all__ = [
    "HungarianLoss",
    "hungarian_loss",
    "ChamferLoss",
    "chamfer_loss",
    "SinkhornLoss",
    "sinkhorn_loss",
    "SlicedWassersteinLoss",
    "sliced_wasserstein_loss",
    "earth_mover_distance",
    "matched_cross_entropy",
    "matched_focal_loss",
    "RepresentationLoss",
    "representation_loss",
    "DSPNLoss",
]
