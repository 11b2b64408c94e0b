"""How far an encoded set is from its target vector, and the gradient of that."""

from typing import Literal

from torch import Tensor

from setpred.functional._precision import common_dtype
from setpred.functional.pairwise import huber

Kind = Literal["huber", "mse"]
KINDS = ("huber", "mse")


def distance(representation: Tensor, target: Tensor, kind: Kind) -> Tensor:
    """Mean over the features (B, D) of half the squared difference, or of its Huber form: shape (B,)."""
    dtype = common_dtype(representation, target)
    representation, target = representation.to(dtype), target.to(dtype)
    value = huber(representation, target) if kind == "huber" else 0.5 * (representation - target).square()
    return value.mean(-1) if value.shape[-1] > 0 else value.sum(-1)


def distance_grad(representation: Tensor, target: Tensor, kind: Kind) -> Tensor:
    """Gradient of :func:`distance` with respect to the representation, (B, D)."""
    difference = representation.to(common_dtype(representation, target)) - target
    if kind == "huber":
        difference = difference.clamp(-1, 1)
    return (difference / difference.shape[-1]).to(representation.dtype)
