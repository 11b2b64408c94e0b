"""Steps of a loop whose intermediate results are computed again in the backward pass instead of kept."""

import weakref
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
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

    What PyTorch lets differ between the two passes is put back: random numbers, autocast, the kernels that attention
    may use. Whatever else differs (parameters, modes, buffers) is an error, not a wrong gradient.

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
        return uncompiled(self._call)(*args, **kwargs)  # hooks on saved tensors do not compile

    def _call(self, *args: P.args, **kwargs: P.kwargs) -> R:
        slots: list[weakref.ref[_Slot]] = []
        parameters: dict[Tensor, int] = {}  # and their versions
        rng, (devices, states) = torch.get_rng_state(), get_device_states(*args)
        kind = "cuda" if devices else "cpu"
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        kernels = _attention_kernels()

        def again() -> None:
            self._empty()
            check_versions(parameters)
            seen = 0

            def refill(tensor: Tensor) -> Tensor:
                nonlocal seen
                slot = slots[seen]() if seen < len(slots) else None
                seen += 1
                if slot is not None:
                    slot.tensor = tensor.detach()
                return tensor.detach()

            with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad(), autocast, sdpa_kernel(kernels):
                torch.set_rng_state(rng)
                set_device_states(devices, states, device_type=kind)
                with saved_tensors_hooks(refill, lambda tensor: tensor):
                    repeated = _tensors(self._step(*args, **kwargs))
            if seen != len(slots) or not all(map(_close, repeated, results)):
                raise RuntimeError(
                    "`checkpoint` needs an objective that does the same when it is computed again in the backward "
                    "pass: did its parameters, buffers or mode (training, evaluation) change since, or does it change "
                    "what it computes with at each call, as spectral_norm does in training?"
                )
            self._full = slots

        def pack(tensor: Tensor) -> _Slot:
            base = tensor if tensor._base is None else tensor._base
            if base.is_leaf and base.requires_grad:
                parameters[base] = base._version
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
        results = [part.detach() for part in _tensors(result)]
        self._full = slots
        self._empty()
        return result


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, with types: a graph break around the call."""
    disabled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


def check_versions(parameters: dict[Tensor, int]) -> None:
    """Raise if a parameter is not of the version any more that it had."""
    if any(parameter._version != version for parameter, version in parameters.items()):
        raise RuntimeError(
            "`checkpoint` needs parameters that stay as they are until the backward pass, where steps are computed "
            "again, but one was changed in place: call the optimizer after it"
        )


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _close(again: Tensor, before: Tensor) -> bool:
    """Whether two results are one but for rounding, which may differ on a GPU."""
    if before.numel() == 0 or not before.is_floating_point():
        return torch.equal(again, before)
    tolerance = torch.finfo(before.dtype).eps ** 0.5
    size = before.abs().nan_to_num(posinf=0).amax()
    return torch.allclose(again, before, rtol=tolerance, atol=float(tolerance * size), equal_nan=True)


def _attention_kernels() -> list[SDPBackend]:
    """The kernels that are switched on, on every device."""
    cuda: Any = torch.backends.cuda  # untyped functions
    on = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, enabled in on.items() if enabled]
