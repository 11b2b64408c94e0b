"""What decoders share whose network emits elements and masks itself."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_count, check_interval
from setpred.scaler import StandardScaler, check_scaler, unscaled
from setpred.sets import SetPrediction


def as_prediction(
    output: Tensor, channels: int, mask_clamp: tuple[float, float] | None, scaler: StandardScaler | None = None
) -> SetPrediction:
    """Split a network's output (..., N, C[+1]) into elements and mask.

    As published, 1 is added to the mask: without it, outputs get stuck at zero. The value is clamped but the derivative
    is that of the unclamped output, since a clamp would leave an output that starts above 1 there for good.
    """
    elements = unscaled(output[..., :channels], scaler)
    if mask_clamp is None:
        return SetPrediction(elements, torch.ones_like(output[..., 0]))
    mask = output[..., channels] + 1
    # In this order the value is exactly the clamped one: what is added is 0.
    return SetPrediction(elements, mask.clamp(*mask_clamp).detach() + (mask - mask.detach()))


class DirectDecoder(nn.Module, ABC):
    """A decoder whose network emits C features an element, and a mask where one is predicted."""

    def __init__(
        self,
        in_channels: int,
        set_size: int,
        channels: int,
        hidden_channels: int,
        *,
        mask_clamp: tuple[float, float] | None,
        scaler: StandardScaler | None,
    ) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        check_count("set_size", set_size)
        check_count("channels", channels)
        check_count("hidden_channels", hidden_channels)
        check_interval("mask_clamp", mask_clamp)
        check_scaler(scaler, channels)
        self.in_channels, self.set_size, self.channels = in_channels, set_size, channels
        self.mask_clamp, self.scaler = mask_clamp, scaler
        self.out_channels = channels + int(mask_clamp is not None)  # of the network, for an element

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new parameters."""

    def _as_prediction(self, output: Tensor) -> SetPrediction:
        """Split the network's output (..., N, out_channels) into elements and mask."""
        return as_prediction(output, self.channels, self.mask_clamp, self.scaler)

    @override
    def extra_repr(self) -> str:
        return f"set_size={self.set_size}, channels={self.channels}, mask_clamp={self.mask_clamp}"


def relative(weight: Tensor) -> Tensor:
    """Weights of tokens (B, S), the largest of a sample 1: ratios count, and products of tiny ones would be 0."""
    return weight / weight.amax(1, keepdim=True).detach()
