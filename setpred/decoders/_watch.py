"""A look at a few of a decoder's descents in training, and one warning if they do not descend."""

import warnings

import torch
from torch import Tensor

ENOUGH = 128  # Descents after which a decoder should move its sets; a fresh one may not.
LESS = 0.99  # Share of the loss at the start: a descent that does not come below has not moved.


class Watch:
    """Counts descents and looks at every one whose number is a power of two, since each look waits for the device.

    It is no part of the decoder's ``state_dict``, and is copied and pickled with the decoder.
    """

    def __init__(self) -> None:
        self.descents = 0
        self.warned = False

    def due(self) -> bool:
        """Count a descent, and say whether to look at it."""
        self.descents += 1
        return not self.warned and self.descents & (self.descents - 1) == 0

    @property
    def wants_loss(self) -> bool:
        """Whether the descent is late enough to be asked whether it lowers its loss."""
        return self.descents >= ENOUGH

    @torch.no_grad()
    def look(self, value: tuple[Tensor, ...], loss: Tensor | None, tol: float | None) -> None:
        """Warn if the point is not finite, or most samples' loss ``(T, B)``, if there is one, does not fall."""
        if value[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return
        broken = ~torch.stack([part.flatten(1).isfinite().all(1) for part in value]).all(0)
        still = torch.zeros_like(broken)
        if loss is not None and len(loss) > 1:
            still = ~(loss[-1] < LESS * loss[0]) & (loss[-1] > (0 if tol is None else tol))
        try:
            blown, stuck = torch.stack([broken.sum(), still.sum()]).tolist()
        except RuntimeError:  # fake tensors, make_fx, meta: no values are there to look at
            return
        if blown > 0:
            problem = f"blows up: {blown} of {len(broken)} sets are not finite"
        elif 2 * stuck > len(still):
            problem = (
                f"does not descend: of {stuck} of {len(still)} sets, the last step's representation loss is not below "
                f"{100 * LESS:.0f} % of the first's"
            )
        else:
            return
        self.warned = True
        warnings.warn(
            f"DSPNDecoder {problem} (training call {self.descents}). decoder.diagnose(z, target, target_mask), on a "
            "validation batch, says why. This warning comes once",
            RuntimeWarning,
            stacklevel=2,
        )
