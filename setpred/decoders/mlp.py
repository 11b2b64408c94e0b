"""MLPDecoder: the usual baseline, a list of outputs taken for a set."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_shape
from setpred.decoders.direct import DirectDecoder
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction


class MLPDecoder(DirectDecoder):
    """Decode vectors into sets by a three-layer MLP with one output per slot and feature.

    The order of its outputs is fixed by its weights, which is what makes it discontinuous as a predictor of sets (the
    responsibility problem). A baseline, not a recommendation.

    Args:
        in_channels: Size D of the vectors.
        set_size: Largest number of elements N.
        channels: Features C of an element, without the mask.
        hidden_channels: Width of the two hidden layers; the paper has 256 for MNIST, 512 for CLEVR.
        mask_clamp: Range of the predicted mask; None predicts no mask (sets of fixed size).
        scaler: Standardises elements: the decoder works in its coordinates, and returns elements in the users'; see
            :class:`setpred.StandardScaler`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range, or ``scaler`` has other channels.

    Example:
        >>> elements, mask, _ = MLPDecoder(64, set_size=30, channels=2)(torch.randn(8, 64))
        >>> elements.shape, mask.shape
        (torch.Size([8, 30, 2]), torch.Size([8, 30]))

    Source: Zhang et al. (NeurIPS 2019), Appendix B.
    """

    def __init__(
        self,
        in_channels: int,
        set_size: int,
        channels: int,
        hidden_channels: int = 512,
        *,
        mask_clamp: tuple[float, float] | None = (0.0, 1.0),
        scaler: StandardScaler | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, set_size, channels, hidden_channels, mask_clamp=mask_clamp, scaler=scaler)
        self.input = nn.Linear(in_channels, hidden_channels, device=device, dtype=dtype)
        self.hidden = nn.Linear(hidden_channels, hidden_channels, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_channels, set_size * self.out_channels, device=device, dtype=dtype)

    @override
    def reset_parameters(self) -> None:
        """Draw new parameters, as `nn.Linear` does."""
        for layer in (self.input, self.hidden, self.output):
            layer.reset_parameters()

    def forward(self, z: Tensor) -> SetPrediction:
        """Decode vectors into sets.

        Args:
            z: Shape ``(B, in_channels)``.

        Returns:
            The predicted sets; masks in ``mask_clamp``, no trajectory.

        Raises:
            ValueError: If the shape is wrong.
            TypeError: If the dtype is not floating.
        """
        check_shape("z", z, "B", self.in_channels)
        hidden = F.relu(self.hidden(F.relu(self.input(z))))
        output = self.output(hidden).unflatten(1, (self.set_size, -1))
        return self._as_prediction(output)
