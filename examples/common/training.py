"""Training of set autoencoders, and their evaluation."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.digits import Sets
from setpred import SetPrediction

Loss = Callable[[SetPrediction, Tensor, Tensor], Tensor]  # (prediction, target, target_mask) -> scalar


class Autoencoder(nn.Module):
    """A set encoder and a decoder; in DSPN the decoder holds the same encoder."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, elements: Tensor, mask: Tensor, **options: object) -> SetPrediction:
        """Encode and decode sets; options go to the decoder."""
        prediction: SetPrediction = self.decoder(self.encoder(elements, mask), **options)
        return prediction

    def count_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def train(
    model: Autoencoder,
    data: Sets,
    loss: Loss,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    name: str,
    bar_position: int = 0,
) -> float:
    """Train with Adam, its learning rate decayed along a cosine, on batches drawn without replacement.

    Shows a progress bar with loss and speed; returns the seconds that it took.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches: list[Tensor] = []
    model.train()
    start = time.perf_counter()
    with tqdm(range(steps), desc=name, unit="step", position=bar_position) as bar:
        for _ in bar:
            if not batches:
                batches = list(torch.randperm(len(data.elements), generator=generator).split(batch_size))
            rows = batches.pop()
            elements, mask = data.elements[rows], data.mask[rows]
            value = loss(model(elements, mask), elements, mask)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{value.item():.5f}", refresh=False)
    return time.perf_counter() - start


@torch.inference_mode()
def evaluate(model: Autoencoder, data: Sets, loss: Loss, **options: object) -> float:
    """Mean loss over a data set; options go to the decoder."""
    model.eval()
    return loss(model(data.elements, data.mask, **options), data.elements, data.mask).item()
