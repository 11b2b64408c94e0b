"""LSTMDecoder: the recurrent baseline, a sequence of outputs taken for a set."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from setpred._checks import check_shape, explained
from setpred.decoders.direct import DirectDecoder
from setpred.scaler import StandardScaler
from setpred.sets import SetPrediction


class LSTMDecoder(DirectDecoder):
    """Decode vectors into sets by an LSTM that emits one element a step.

    The vector, mapped to the cell's width, is the initial cell state; the hidden state and the inputs are zeros. Each
    step's hidden state is mapped to one element. A baseline, not a recommendation.
    `torch.compile` does not trace an LSTM: it breaks the graph there, and refuses with ``fullgraph=True``. Of the
    transforms of `torch.func`, PyTorch's LSTM takes `grad` only.

    Args:
        in_channels: Size D of the vectors.
        set_size: Largest number of elements N, the number of steps.
        channels: Features C of an element, without the mask.
        hidden_channels: Width of the cell; the paper has 256 for MNIST, 512 for CLEVR.
        mask_clamp: Range of the predicted mask; None predicts no mask (sets of fixed size).
        scaler: Standardises elements: the decoder works in its coordinates, and returns elements in the users'; see
            :class:`setpred.StandardScaler`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is out of its range, or ``scaler`` has other channels.

    Example:
        >>> elements, mask, _ = LSTMDecoder(64, set_size=30, channels=2)(torch.randn(8, 64))
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
        self.cell = nn.Linear(in_channels, hidden_channels, device=device, dtype=dtype)
        self.lstm = nn.LSTM(1, hidden_channels, batch_first=True, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_channels, self.out_channels, device=device, dtype=dtype)

    @override
    def reset_parameters(self) -> None:
        """Draw new parameters, as `nn.Linear` and `nn.LSTM` do."""
        for layer in (self.cell, self.lstm, self.output):
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
            RuntimeError: Under ``torch.func.vmap`` and forward-mode differentiation.
        """
        check_shape("z", z, "B", self.in_channels)
        cell = self.cell(z).unsqueeze(0)
        with explained("LSTMDecoder", "PyTorch has rules for an LSTM in torch.func.grad only"):
            steps, _ = self.lstm(cell.new_zeros(len(z), self.set_size, 1), (torch.zeros_like(cell), cell))
        return self._as_prediction(self.output(steps))
