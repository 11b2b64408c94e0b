"""Descents that go on from one training step to a later one."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.batches import Batch
from setpred import SetPrediction


class PersistentDescents:
    """Batches to train on, whose inner descents are taken up again and again.

    Evaluation descends for hundreds of steps, training for a few, and implicit differentiation trains what is at the
    end of those few. So that training gets to where evaluation does, `count` descents are under way. They take turns;
    each is taken up `count` times where it was left, with the encoder as it is by then, before a new batch replaces
    it. One is the usual training. The same are persistent chains in training energy-based models (Tieleman, 2008).
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.left: dict[int, tuple[Batch, tuple[Tensor, Tensor]]] = {}  # batches, elements and masks by turn

    def is_new(self, step: int) -> bool:
        """Whether a training step has a new batch: one in `count` steps, so that all ages are trained alike."""
        round_, turn = divmod(step, self.count)
        return round_ == 0 or (round_ + turn) % self.count == 0

    def batches_before(self, step: int) -> int:
        """Count the batches that were taken in the steps before."""
        return sum(map(self.is_new, range(step)))

    def take(self, step: int, batches: Iterator[Batch]) -> tuple[Batch, dict[str, Any]]:
        """Take a batch, with the decoder's argument that makes its descent go on."""
        if self.is_new(step):
            return next(batches), {}
        batch, init = self.left[step % self.count]
        return batch, {"init": init}

    def leave(self, step: int, batch: Batch, prediction: SetPrediction) -> None:
        """Keep what the descent of this training step came to."""
        if self.count > 1:
            self.left[step % self.count] = batch, (prediction.elements.detach(), prediction.mask.detach())

    def state_dict(self) -> dict[int, Any]:
        """Plain values on the CPU, for a checkpoint."""
        return {turn: (_to(batch, "cpu"), _to(init, "cpu")) for turn, (batch, init) in self.left.items()}

    def load_state_dict(self, state: dict[int, Any], device: torch.device) -> None:
        """Go on from a checkpoint."""
        self.left = {turn: (Batch(*_to(batch, device)), _to(init, device)) for turn, (batch, init) in state.items()}


def _to(parts: tuple[Tensor | None, ...], device: torch.device | str) -> tuple[Any, ...]:
    return tuple(None if part is None else part.to(device) for part in parts)
