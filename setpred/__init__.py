"""PyTorch layers for predicting sets.

A backbone gives a vector, a decoder makes a set of it, a loss compares it with the target set:

    vector (B, D) -> DSPNDecoder(encoder) -> elements (B, N, C) and mask (B, N) -> HungarianLoss
"""

from setpred import functional, metrics
from setpred.decoders import Diagnosis, DSPNDecoder, LSTMDecoder, MLPDecoder, SlotDecoder, TransformerDecoder
from setpred.encoders import (
    AttentionEncoder,
    EncoderCheck,
    FSPool,
    FSUnpool,
    PooledEncoder,
    RelationEncoder,
    SetEncoder,
    check_encoder,
)
from setpred.functional import linear_assignment, on_channels, sum_costs
from setpred.functional.step import GradientDescent, PolyakDescent
from setpred.losses import (
    ChamferLoss,
    DSPNLoss,
    HungarianLoss,
    RepresentationLoss,
    SinkhornLoss,
    SlicedWassersteinLoss,
    chamfer_loss,
    earth_mover_distance,
    hungarian_loss,
    matched_cross_entropy,
    matched_focal_loss,
    representation_loss,
    sinkhorn_loss,
    sliced_wasserstein_loss,
)
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction, Trajectory, pad_sets, unpad_sets

__version__ = "0.1.0"

__all__ = [
    "SetPrediction",
    "Trajectory",
    "pad_sets",
    "unpad_sets",
    "StandardScaler",
    "SetEncoder",
    "FSPool",
    "FSUnpool",
    "PooledEncoder",
    "RelationEncoder",
    "AttentionEncoder",
    "check_encoder",
    "EncoderCheck",
    "DSPNDecoder",
    "Diagnosis",
    "GradientDescent",
    "PolyakDescent",
    "MLPDecoder",
    "LSTMDecoder",
    "TransformerDecoder",
    "SlotDecoder",
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
    "linear_assignment",
    "sum_costs",
    "on_channels",
    "metrics",
    "functional",
]
