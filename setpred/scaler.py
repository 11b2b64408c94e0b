"""StandardScaler: between the users' coordinates of elements and those in which every channel has one scale."""

from collections.abc import Iterable
from typing import Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import as_presence, check_channels, check_count, check_mask
from setpred.functional._precision import common_dtype

Batch = tuple[Tensor, Tensor | None]


class StandardScaler(nn.Module):
    r"""Give every channel of the elements mean 0 and standard deviation 1, and map predictions back.

    .. math:: x \mapsto \frac{x - \mu_c}{\sigma_c}, \qquad
        \mu_c = \frac{1}{n}\sum_i x_{ic}, \quad \sigma_c^2 = \frac{1}{n}\sum_i (x_{ic} - \mu_c)^2

    over the n present elements that :meth:`fit` has seen. Encoders, decoders and losses learn best from elements of
    such a scale: a decoder and a loss that are given the scaler work in its coordinates, and their users keep their
    own. Until it is fitted it is the identity. ``location`` and ``scale`` are buffers: they move, are saved and are
    exported with the model, and are not trained.

    Two kinds of channels have no scale to learn:

    - one that holds only 0 and 1, as of one-hots and flags, stays as it is (location 0, scale 1);
    - one that is constant, to the precision of the buffers, has scale 1: only its location moves.

    Others that shall stay as they are get it by hand: ``scaler.location[3:] = 0``, ``scaler.scale[3:] = 1``. Channels
    are not made independent of each other (whitened).

    Results are float32 at least, under autocast too, so that in the users' coordinates nothing is lost beside a large
    location.

    Args:
        channels: Features C of an element, without the mask.
        device: Device of the buffers.
        dtype: Dtype of the buffers.

    Raises:
        ValueError: If ``channels`` is less than 1.

    Example:
        >>> from setpred import StandardScaler, pad_sets
        >>> elements, mask = pad_sets([torch.tensor([[100.0], [120.0]]), torch.tensor([[110.0]])])
        >>> scaler = StandardScaler(1).fit(elements, mask)
        >>> scaler.location, scaler.scale
        (tensor([110.]), tensor([8.1650]))
        >>> scaled = scaler(elements, mask)
        >>> scaled[0].T, scaled[1].T
        (tensor([[-1.2247,  1.2247]]), tensor([[0., 0.]]))
        >>> scaler.inverse(scaled)[0].T
        tensor([[100., 120.]])

    Source: LeCun et al., Efficient BackProp (1998), section 4.3, of a network's inputs.
    """

    location: Tensor
    scale: Tensor

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_count("channels", channels)
        self.channels = channels
        self.register_buffer("location", torch.empty(channels, device=device, dtype=dtype))
        self.register_buffer("scale", torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Become the identity, as before any :meth:`fit`."""
        self.location.zero_()
        self.scale.fill_(1)

    @torch.no_grad()
    def fit(self, elements: Tensor | Iterable[Batch], mask: Tensor | None = None) -> Self:
        """Learn location and scale from the target sets of the training data, anew at each call.

        Moments are taken in float64, and merged over batches: a stream of them gives what all at once do. Values are
        looked at, which waits for the device.

        Args:
            elements: All target sets, shape ``(..., N, C)``; or an iterable of pairs ``(elements, mask)`` of such, as
                of a data loader, whose sizes may differ.
            mask: Bool or float {0, 1}, shape ``(..., N)``; None means that all are present. Values of absent elements
                are not seen.

        Returns:
            The scaler itself.

        Raises:
            ValueError: If no element is present, a present one is not finite, the moments do not fit into the buffers'
                dtype, or a shape is wrong.
            TypeError: If a dtype is wrong, or what is iterated over are no pairs.

        Example:
            >>> loader = [(torch.randn(8, 5, 2), torch.rand(8, 5) < 0.5) for _ in range(10)]
            >>> StandardScaler(2).fit(loader)
            StandardScaler(2)

        Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances (1979).
        """
        if not isinstance(elements, Tensor) and mask is not None:
            raise ValueError("`mask` must be None where `elements` is an iterable of pairs (elements, mask)")
        count, mean, squares = 0, self._double(0), self._double(0)
        low, high, binary = self._double(torch.inf), self._double(-torch.inf), self.location == self.location
        for rows in map(self._present, [(elements, mask)] if isinstance(elements, Tensor) else elements):
            if len(rows) == 0:
                continue
            total = count + len(rows)
            center = rows.mean(0)
            shift = center - mean
            squares += (rows - center).square().sum(0) + shift.square() * (count * len(rows) / total)
            mean += shift * (len(rows) / total)
            low, high = torch.minimum(low, rows.amin(0)), torch.maximum(high, rows.amax(0))
            binary &= ((rows == 0) | (rows == 1)).all(0)
            count = total
        if count == 0:
            raise ValueError("`elements` must have a present element to learn from, got none")
        resolution = torch.finfo(self.location.dtype).eps * torch.maximum(low.abs(), high.abs())
        location = mean.masked_fill(binary, 0).to(self.location.dtype)
        scale = (squares / count).sqrt().masked_fill(binary | (high - low <= resolution), 1).to(self.scale.dtype)
        held = location.isfinite() & scale.isfinite() & (scale > 0)
        if not bool(held.all()):
            channel = int(held.logical_not().nonzero()[0])
            raise ValueError(
                f"`elements` must have moments that {str(scale.dtype).removeprefix('torch.')} holds, got mean "
                f"{mean[channel].item()} and standard deviation {(squares / count).sqrt()[channel].item()} in channel "
                f"{channel}"
            )
        self.location.copy_(location)
        self.scale.copy_(scale)
        return self

    def _double(self, value: float) -> Tensor:
        return self.location.new_full((self.channels,), value, dtype=torch.float64)

    def _present(self, batch: object) -> Tensor:
        """Present elements of a batch as rows (n, C), in float64."""
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                "`elements` must be a tensor or an iterable of pairs (elements, mask), got one of "
                f"{type(batch).__name__}: fit(elements, mask), fit((target, mask) for ... in loader)"
            )
        elements, mask = cast(Batch, tuple(batch))
        check_channels("elements", elements, self.channels)
        rows = elements[as_presence("mask", mask, elements)].to(self.location.device, torch.float64)
        finite = rows.isfinite().all(0)
        if not bool(finite.all()):
            raise ValueError(
                "`elements` must be finite where they are present, got NaN or infinity in channel "
                f"{int(finite.logical_not().nonzero()[0])}"
            )
        return rows

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map elements from the users' coordinates to standardised ones.

        Args:
            elements: Shape ``(..., N, C)``.
            mask: Bool or floating, shape ``(..., N)``. Where it is 0, elements become 0, whatever they hold; None maps
                all.

        Returns:
            Elements of the same shape; of the dtype that elements and buffers promote to, float32 at least.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype is wrong.
        """
        return self._masked((self._entered(elements, mask) - self.location) / self.scale, mask)

    def inverse(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map standardised elements back to the users' coordinates.

        Args:
            elements: Shape ``(..., N, C)``.
            mask: Bool or floating, shape ``(..., N)``. Where it is 0, elements become 0, whatever they hold; None maps
                all.

        Returns:
            Elements of the same shape; of the dtype that elements and buffers promote to, float32 at least.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If a dtype is wrong.
        """
        return self._masked(self._entered(elements, mask) * self.scale + self.location, mask)

    def _entered(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        check_channels("elements", elements, self.channels)
        check_mask("mask", mask, elements.shape[:-1])
        return elements.to(common_dtype(elements, self.location))

    @staticmethod
    def _masked(elements: Tensor, mask: Tensor | None) -> Tensor:
        return elements if mask is None else elements.masked_fill((mask == 0).unsqueeze(-1), 0)

    @override
    def extra_repr(self) -> str:
        return str(self.channels)
