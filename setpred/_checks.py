"""Checks of what users pass in: one wording for every error.

An error names the argument, what was expected and what came. Only shapes, dtypes and Python values
are checked, but by `as_presence` and `check_range`: looking at tensor values waits for the device and
breaks `torch.compile`.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral, Real

import torch
from torch import Tensor


def in_transform() -> bool:
    """Whether code runs inside of vmap, grad or another transform of torch.func, where tensors show no values."""
    return torch._C._are_functorch_transforms_active()  # the only private name: there is no public one


def is_exporting() -> bool:
    """Whether `torch.export` runs; by the public name, before PyTorch 2.14, torch.compile says so of itself too."""
    return torch.compiler._is_exporting_flag


def explained(name: str, reason: str) -> AbstractContextManager[object]:
    """Where PyTorch refuses what is inside of this in a transform, name the function and say why."""
    return _explaining(name, reason) if in_transform() else nullcontext()


@contextmanager
def _explaining(name: str, reason: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"`{name}` cannot run inside of this transform of torch.func: {reason}") from error


def described(value: object) -> str:
    """What came, for an error: what holds tensors is not shown."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    text, kind = repr(value), type(value).__name__
    return f"{text} ({kind})" if len(text) <= 80 else kind


def check_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {described(value)}")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must have a floating dtype, got {described(value)}")


def check_real_tensor(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor of a floating or an integer dtype."""
    if isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_complex()):
        raise TypeError(f"`{name}` must have a floating or integer dtype, got {described(value)}")
    if not isinstance(value, Tensor) or value.is_floating_point():
        check_tensor(name, value)


def check_shape(name: str, value: Tensor, *shape: int | str) -> None:
    """Raise unless ``value`` is a floating tensor of ``shape``: ints are exact sizes, strings are free ones."""
    check_tensor(name, value)
    _check_sizes(name, value, shape)


def _check_sizes(name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
    if value.dim() != len(shape) or any(
        isinstance(size, int) and size != came for size, came in zip(shape, value.shape, strict=True)
    ):
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"`{name}` must have shape ({expected}), got {described(value)}")


def check_integers(name: str, value: object, *shape: int | str) -> None:
    """Raise unless ``value`` is an int64 tensor of ``shape``, given as to :func:`check_shape`."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"`{name}` must be a tensor of dtype int64, got {described(value)}")
    _check_sizes(name, value, shape)


def check_range(name: str, value: Tensor, end: int, used: Tensor) -> None:
    """Raise where what is used is not in [0, end), if values may be looked at."""
    if torch.compiler.is_compiling() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    wrong = ((value < 0) | (value >= end)) & used
    try:
        found = bool(wrong.any())
    except RuntimeError:  # vmap, make_fx, meta: no values are there to look at
        return
    if found:
        raise ValueError(f"`{name}` must lie in [0, {end}) where a prediction is matched, got {value[wrong][0].item()}")


def check_channels(name: str, value: Tensor, channels: int) -> None:
    """Raise unless ``value`` is a floating tensor of as many ``channels`` as a scaler has."""
    check_tensor(name, value)
    if value.shape[-1:] != (channels,):
        raise ValueError(f"`{name}` must have the scaler's {channels} channels, got {described(value)}")


def check_mask(name: str, mask: Tensor | None, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise unless ``mask`` is None, or bool or floating of exactly ``shape``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"`{name}` must be a tensor or None, got {described(mask)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"`{name}` must be bool or floating (1 = present), got {described(mask)}")
    if mask.shape != tuple(shape):
        raise ValueError(f"`{name}` must have shape {tuple(shape)}, got {described(mask)}")


def as_presence(name: str, mask: Tensor | None, elements: Tensor) -> Tensor:
    """Make a mask of elements (..., N, C) bool, all True if there is none; presence in between is an error.

    While compiling, and inside of torch.func's transforms, there are no values to see.
    """
    check_mask(name, mask, elements.shape[:-1])
    if mask is None:
        return torch.ones(elements.shape[:-1], dtype=torch.bool, device=elements.device)
    present = mask.bool()
    if not torch.compiler.is_compiling() and not in_transform() and bool((present != mask).any()):
        raise ValueError(f"`{name}` must be bool or hold only 0 and 1, got values between: compare with a threshold")
    return present


def check_soft_mask(name: str, mask: Tensor | None, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise unless ``mask``, a predicted one, is None or floating of exactly ``shape``."""
    check_mask(name, mask, shape)
    if mask is not None and mask.dtype == torch.bool:
        raise TypeError(
            f"`{name}` must be floating: a bool mask is a target's, for `target_mask`; got {described(mask)}"
        )


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_interval(name: str, value: object) -> None:
    """Raise unless ``value`` is None or an increasing pair of numbers."""
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(end, Real) for end in value)
    if value is not None and not (pair and value[0] < value[1]):  # type: ignore[index]
        raise ValueError(f"`{name}` must be an increasing pair of numbers or None, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number."""
    if not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {described(value)}")


def check_finite(name: str, value: object) -> None:
    """Raise unless ``value`` is a finite real number."""
    check_number(name, value)
    if not -math.inf < value < math.inf:  # type: ignore[operator]  # math.isfinite does not compile with dynamic=True
        raise ValueError(f"`{name}` must be finite, got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless ``value`` is an integer and ``value >= least``."""
    if not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer, got {described(value)}")
    check_at_least(name, int(value), least)


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise unless ``value >= least`` (NaN raises too)."""
    check_number(name, value)
    if not value >= least:
        raise ValueError(f"`{name}` must be at least {least}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value > 0`` (NaN raises too)."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value!r}")
