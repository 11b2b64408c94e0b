"""A small network and data for all of this folder."""

import torch
from torch import Tensor, nn

from setpred import DSPNDecoder, DSPNLoss, HungarianLoss, PooledEncoder, SetPrediction
from tests.rules import recipe

N, C, D = 4, 2, 16


class Network(nn.Module):
    """A backbone, a decoder, and the loss of the decoder's recipe."""

    def __init__(self, preset: str = "paper", **options: object) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, D))
        encoder = PooledEncoder(C, D, 16)
        settings = {"iters": 3, "set_size": N, "channels": C} | recipe(preset) | options
        self.decoder = getattr(DSPNDecoder, preset)(encoder, **settings)
        implicit = preset == "idspn"
        self.loss = DSPNLoss(
            encoder, HungarianLoss(), repr_weight=0.0 if implicit else 0.1, steps="last" if implicit else "all"
        )

    def forward(self, x: Tensor) -> SetPrediction:
        return self.decoder(self.backbone(x))

    def step(self, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        z = self.backbone(x)
        return self.loss(self.decoder(z), target, mask, z=z)


def make_batch(size: int = 6, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 3, generator=generator)
    return x, torch.rand(size, N, C, generator=generator), torch.rand(size, N, generator=generator) < 0.7


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
