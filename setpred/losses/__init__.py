"""Losses between predicted and target sets."""

from setpred.losses.dspn import DSPNLoss
from setpred.losses.representation import RepresentationLoss, representation_loss

__all__ = ["RepresentationLoss", "representation_loss", "DSPNLoss"]
