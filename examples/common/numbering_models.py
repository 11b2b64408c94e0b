"""Networks that number the elements of multisets: by descent, by attention, and one after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.batches import Batch
from common.models import SetPredictor
from common.numbering import channels
from setpred import DSPNDecoder, FSPool, PooledEncoder, SetPrediction

LATENT = 256  # features of the descents' encoders
WIDTH = 64  # hidden units of the transformers and of the LSTMs
START = 0.1  # standard deviation of the numbers that a descent starts from, before they are probabilities


def to_simplex(rows: Tensor) -> Tensor:
    """Nearest rows of probabilities: a number is subtracted from each row, and what is negative is 0."""

    def subtracted(support: Tensor) -> Tensor:
        return ((rows * support).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)

    support, before = torch.ones_like(rows), torch.zeros_like(rows)
    while not torch.equal(support, before):  # it shrinks until it is that of the answer, whatever rounding says
        support, before = support * (rows > subtracted(support)), support
    return (rows - subtracted(support)) * support


class BesideClasses(nn.Module):
    """A set encoder of numbers and classes (B, N, N + K), whose gradient leaves the classes as they are."""

    def __init__(self, encoder: PooledEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode sets."""
        numbers, classes = (elements[..., part] for part in channels(elements))
        vector: Tensor = self.encoder(torch.cat([numbers, classes.detach()], -1))
        return vector


class Given(nn.Module):
    """The classes of a batch, which are what is given of its elements."""

    def forward(self, batch: Batch) -> Tensor:
        """Shape (B, N, K)."""
        return batch.elements[..., channels(batch.elements)[1]]


class Numberer(SetPredictor):
    """Number elements by descent, until their encoding is a vector that was made of their classes alone.

    Args:
        size: Elements of a multiset, N.
        classes: Number of classes, K.
        make: Makes a decoder of its encoder and the options that it shares with others.
    """

    def __init__(self, size: int, classes: int, make: Callable[..., DSPNDecoder]) -> None:
        def encoder(features: int) -> PooledEncoder:
            # A weight for each rank: the 20 pieces of pool="fspool" cannot tell the first of 64 from the second.
            return PooledEncoder(features, LATENT, layers=1, pool=FSPool(LATENT, pieces=size - 1))

        both = size + classes
        decoder = make(
            BesideClasses(encoder(both)), set_size=size, channels=both, mask_clamp=None, project=_to_probabilities
        )
        super().__init__(nn.Sequential(Given(), encoder(classes)), decoder)

    def forward(self, batch: Batch, **options: Any) -> tuple[SetPrediction, Tensor]:
        """Number the elements of a batch; options go to the decoder."""
        z = self.source(batch)
        start = batch.elements.clone()
        numbers, _ = channels(start)
        start[..., numbers] = to_simplex(START * torch.randn_like(start[..., numbers]))
        return self.decoder(z, init=start, **options), z


def _to_probabilities(elements: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    numbers, classes = (elements[..., part] for part in channels(elements))
    return torch.cat([to_simplex(numbers), classes], -1), mask


class Attended(nn.Module):
    """Elements (B, N, K) after layers in which they attend to each other, without positions: (B, N, WIDTH)."""

    def __init__(self, classes: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(classes, WIDTH)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, elements: Tensor) -> Tensor:
        """See the class."""
        tokens: Tensor = self.layers(self.embed(elements))
        return tokens


class InOrder(nn.Module):
    """Elements (B, N, K) after two bidirectional LSTMs, in the order in which the rows come: (B, N, 2 * WIDTH)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(classes, WIDTH)
        self.layers = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, elements: Tensor) -> Tensor:
        """See the class."""
        tokens: Tensor = self.layers(self.embed(elements))[0]
        return tokens


class EachNumbered(nn.Module):
    """Number each element (B, N, K) in its place: logits of the number, and the class that was given, (B, N, N + K)."""

    def __init__(self, layers: nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.layers, self.output = layers, nn.Linear(width, size)

    def forward(self, elements: Tensor) -> SetPrediction:
        """See the class."""
        numbers = self.output(self.layers(elements))
        return SetPrediction(torch.cat([numbers, elements], -1), elements.new_ones(elements.shape[:2]))
