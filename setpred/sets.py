"""Sets in batches: what a decoder returns, and the way between lists of sets and padded tensors."""

import math
from collections.abc import Iterable
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from setpred._checks import check_at_least, check_count, check_mask, check_shape, described, explained, in_transform


class Trajectory(NamedTuple):
    r"""Every step that made a prediction: inner steps, a transformer's layers, or slot attention's iterations.

    Attributes:
        elements: :math:`Y_0 \dots Y_T`, shape ``(T+1, B, N, C)``; step 0 is the initial set. Of L layers or
            iterations, the sets after each, shape ``(L, B, N, C)``.
        mask: Presence at each step, shape ``(T+1, B, N)`` or ``(L, B, N)``.
        repr_loss: What each sample minimises, before each step: the representation loss, and the anchor's term where
            there is one; shape ``(T, B)``. None of layers, which minimise nothing.
        grad_norm: Euclidean norm of each sample's inner gradient before clipping, shape ``(T, B)``; None of
            layers and iterations.

    Example:
        >>> from setpred import DSPNDecoder, PooledEncoder
        >>> decoder = DSPNDecoder(PooledEncoder(2, 16), iters=10, set_size=5, channels=2)
        >>> trajectory = decoder(torch.randn(3, 16), record=True).trajectory
        >>> trajectory.elements.shape, trajectory.repr_loss.shape
        (torch.Size([11, 3, 5, 2]), torch.Size([10, 3]))

    Source: Zhang et al., Deep Set Prediction Networks (NeurIPS 2019), Algorithm 1.
    """

    elements: Tensor
    mask: Tensor
    repr_loss: Tensor | None = None
    grad_norm: Tensor | None = None


class SetPrediction(NamedTuple):
    """A batch of predicted sets, as every decoder returns it.

    Attributes:
        elements: Set elements, shape ``(B, N, C)``.
        mask: Presence of each element in [0, 1], shape ``(B, N)``; ones where the decoder carries no mask.
        trajectory: The steps or layers that led to them, or None where nothing was recorded.

    Example:
        >>> prediction = SetPrediction(torch.rand(2, 5, 3), torch.ones(2, 5))
        >>> elements, mask, trajectory = prediction
        >>> elements.shape, mask.shape, trajectory
        (torch.Size([2, 5, 3]), torch.Size([2, 5]), None)
    """

    elements: Tensor
    mask: Tensor
    trajectory: Trajectory | None = None


def opened(
    names: tuple[str, str], elements: Tensor | SetPrediction, mask: Tensor | None, hint: str
) -> tuple[Tensor, Tensor | None]:
    """Elements and mask, given apart or as a decoder returns them; names are those of both arguments."""
    if isinstance(elements, Tensor):
        return elements, mask
    name, mask_name = names
    if not isinstance(elements, SetPrediction):
        raise TypeError(f"`{name}` must be a tensor or a SetPrediction, got {described(elements)}")
    if mask is not None:
        raise ValueError(
            f"`{mask_name}` must be None where `{name}` is a SetPrediction, which has a mask of its own: {hint}"
        )
    return elements.elements, elements.mask  # not [:2], which PyTorch 2.7 does not compile


def pad_sets(sets: Iterable[Tensor], size: int | None = None) -> tuple[Tensor, Tensor]:
    """Stack sets of different sizes into one zero-padded batch.

    Args:
        sets: B sets of shapes ``(n_i, C)``, one dtype and device; ``n_i`` may be 0.
        size: Number of rows N of the batch, by default the largest ``n_i``.

    Returns:
        Elements of shape ``(B, N, C)``, zero where absent, and a bool mask of shape ``(B, N)``, True where present.

    Raises:
        ValueError: If there is no set, one has another rank, C or device, or one is larger than ``size``.
        TypeError: If a set is not a floating tensor, their dtypes differ, or ``size`` is not an integer.

    Example:
        >>> elements, mask = pad_sets([torch.ones(1, 2), torch.ones(3, 2)])
        >>> elements.shape
        torch.Size([2, 3, 2])
        >>> mask
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    try:
        sets = list(sets)
    except TypeError as error:
        raise TypeError(f"`sets` must be a list of tensors, got {sets!r} ({type(sets).__name__})") from error
    if len(sets) == 0:
        raise ValueError("`sets` must hold at least one set, got none")
    check_shape("sets[0]", sets[0], "n", "C")
    for i, elements in enumerate(sets):
        check_shape(f"sets[{i}]", elements, "n", sets[0].shape[1])
        if elements.dtype != sets[0].dtype:
            raise TypeError(f"`sets` must have one dtype, got {sets[0].dtype} and {elements.dtype}")
        if elements.device != sets[0].device:
            raise ValueError(f"`sets` must lie on one device, got {sets[0].device} and {elements.device}")
    sizes = torch.tensor([len(elements) for elements in sets], device=sets[0].device)
    longest = max(len(elements) for elements in sets)
    size = longest if size is None else size
    check_count("size", size, 0)
    if longest > size:
        raise ValueError(f"`size` must be at least the largest set's {longest} elements, got {size}")
    if in_transform():  # pad_sequence has no batching rule
        padded = torch.stack([F.pad(elements, (0, 0, 0, size - len(elements))) for elements in sets])
    else:
        padded = F.pad(pad_sequence(sets, batch_first=True), (0, 0, 0, size - longest))
    return padded, torch.arange(size, device=sizes.device) < sizes.unsqueeze(1)


@overload
def unpad_sets(elements: SetPrediction, mask: None = None, threshold: float = 0.5) -> list[Tensor]: ...


@overload
def unpad_sets(elements: Tensor, mask: Tensor, threshold: float = 0.5) -> list[Tensor]: ...


def unpad_sets(elements: Tensor | SetPrediction, mask: Tensor | None = None, threshold: float = 0.5) -> list[Tensor]:
    """Cut a batch into its sets: the inverse of :func:`pad_sets`, up to the place of the padding.

    Args:
        elements: Shape ``(B, N, C)``, or a :class:`SetPrediction`, which brings its mask.
        mask: Bool or float in [0, 1], shape ``(B, N)``; None with a prediction.
        threshold: An element is present where its mask is greater than this.

    Returns:
        B tensors of shapes ``(n_i, C)``, rows in their old order.

    Raises:
        ValueError: If a shape is wrong, the mask is NaN somewhere, the threshold is, or a prediction comes with a mask.
        TypeError: If a dtype is wrong, or a tensor comes without a mask.
        RuntimeError: Under ``torch.func.vmap``, which has no shapes that depend on values.

    Example:
        >>> sets = [torch.ones(1, 2), torch.ones(3, 2)]
        >>> [tuple(s.shape) for s in unpad_sets(*pad_sets(sets))]
        [(1, 2), (3, 2)]
        >>> prediction = SetPrediction(torch.rand(2, 3, 2), torch.tensor([[0.9, 0.1, 0.8], [0.0, 0.2, 1.0]]))
        >>> [len(s) for s in unpad_sets(prediction)]
        [2, 1]
    """
    elements, mask = opened(("elements", "mask"), elements, mask, "`threshold` is given by its name")
    check_shape("elements", elements, "B", "N", "C")
    if mask is None:
        raise TypeError("`mask` must be a tensor, got None")
    check_mask("mask", mask, elements.shape[:2])
    check_at_least("threshold", threshold, -math.inf)
    with explained("unpad_sets", "the sizes of the sets depend on values"):
        broken = mask.isnan().any(1)
        if bool(broken.any()):  # sizes wait for the device anyway
            raise ValueError(f"`mask` must not be NaN: sample {int(broken.nonzero()[0])}")
        return [rows[present] for rows, present in zip(elements, mask > threshold, strict=True)]
