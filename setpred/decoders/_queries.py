"""What a transformer makes elements of: N vectors a sample, learned, random, or chosen among reference points."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from setpred.functional._random import standard_normal

ANGLES = 4  # dimensions of an angle; the published code has 3 and 4
REFERENCES = 2  # reference points for each element


class LearnedQueries(nn.Module):
    """The same N points for every sample."""

    def __init__(
        self, size: int, channels: int, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.empty(size, channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw new points, standard normal."""
        nn.init.normal_(self.points)

    @override
    def forward(self, vector: Tensor, generator: torch.Generator | None) -> Tensor:
        """Shape (B, N, channels), for vectors (B, channels)."""
        return self.points.expand(len(vector), -1, -1)


class RandomQueries(nn.Module):
    """Standard normal points, drawn at each call."""

    def __init__(self, size: int, channels: int, **_: object) -> None:
        super().__init__()
        self.size = size

    def reset_parameters(self) -> None:
        """There are none."""

    @override
    def forward(self, vector: Tensor, generator: torch.Generator | None) -> Tensor:
        """Shape (B, N, channels), for vectors (B, channels)."""
        return standard_normal((len(vector), self.size, vector.shape[1]), vector, generator)


class TopNQueries(nn.Module):
    """The N of 2 N reference points whose angles are nearest to the vector's, modulated by the cosines.

    The choice has no gradient; angles learn by the modulation.
    """

    def __init__(
        self, size: int, channels: int, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.size = size
        self.points = nn.Parameter(torch.empty(REFERENCES * size, channels, device=device, dtype=dtype))
        self.angles = nn.Parameter(torch.empty(REFERENCES * size, ANGLES, device=device, dtype=dtype))
        self.angle = nn.Linear(channels, ANGLES, device=device, dtype=dtype)
        self.modulation = nn.Linear(1, 2 * channels, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw new points and angles, standard normal, and new layers, as `nn.Linear` does."""
        nn.init.normal_(self.points)
        nn.init.normal_(self.angles)
        self.angle.reset_parameters()
        self.modulation.reset_parameters()

    @override
    def forward(self, vector: Tensor, generator: torch.Generator | None) -> Tensor:
        """Shape (B, N, channels), for vectors (B, channels)."""
        cosine, chosen = (F.normalize(self.angle(vector), dim=1) @ F.normalize(self.angles, dim=1).T).topk(self.size)
        modulation: Tensor = self.modulation(cosine.unsqueeze(-1))
        factor, summand = modulation.chunk(2, -1)
        return factor * self.points[chosen] + summand


QUERIES = {"learned": LearnedQueries, "random": RandomQueries, "top-n": TopNQueries}
