"""Steps of a loop whose intermediate results are computed again in the backward pass instead of kept."""

import weakref
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

P = ParamSpec("P")
R = TypeVar("R")


class _Slot:
    """Stands in the graph for a tensor that a backward pass will ask for."""

    def __init__(self, tensor: Tensor, fill: Callable[[], None]) -> None:
        self.tensor: Tensor | None = tensor
        self.fill = fill


class Recompute(Generic[P, R]):
    """Calls the step of one loop so that at most one call's intermediate results are in memory.

    Why not `torch.utils.checkpoint`: a step takes a gradient itself, which counts there as the backward pass. It
    computes the step again at once, and keeps for good what that gradient did not ask for, so that memory grows.
    """

    def __init__(self, step: Callable[P, R]) -> None:
        self._step = step
        self._full: list[weakref.ref[_Slot]] = []

    def _empty(self) -> None:
        for reference in self._full:
            if (slot := reference()) is not None:
                slot.tensor = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step; running it again must do the same, with the same random numbers."""
        slots: list[weakref.ref[_Slot]] = []
        rng, (devices, states) = torch.get_rng_state(), get_device_states(*args)
        kind = "cuda" if devices else "cpu"
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

        def again() -> None:
            self._empty()
            seen = 0

            def refill(tensor: Tensor) -> Tensor:
                nonlocal seen
                slot = slots[seen]() if seen < len(slots) else None
                seen += 1
                if slot is not None:
                    slot.tensor = tensor.detach()
                return tensor.detach()

            with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad(), autocast:
                torch.set_rng_state(rng)
                set_device_states(devices, states, device_type=kind)
                with saved_tensors_hooks(refill, lambda tensor: tensor):
                    self._step(*args, **kwargs)
            if seen != len(slots):
                raise RuntimeError(
                    "`checkpoint` needs an objective that does the same when it is computed again: it kept "
                    f"{len(slots)} tensors for the backward pass at first, then {seen}"
                )
            self._full = slots

        def pack(tensor: Tensor) -> _Slot:
            slot = _Slot(tensor.detach(), again)
            slots.append(weakref.ref(slot))
            return slot

        def unpack(slot: _Slot) -> Tensor:
            if slot.tensor is None:
                slot.fill()
            assert slot.tensor is not None
            return slot.tensor

        with saved_tensors_hooks(pack, unpack):
            result = self._step(*args, **kwargs)
        self._full = slots
        self._empty()
        return result
