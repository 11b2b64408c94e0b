"""DistributedDataParallel: two processes with half a batch each learn as one with the whole batch."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from setpred import DSPNDecoder, PooledEncoder, SetPrediction, StandardScaler
from tests.processes import run_in_two_processes
from tests.rules import recipe

STEPS = 2  # a parameter that got no gradient in the first fails the second


class Model(nn.Module):
    """A backbone and a decoder, the same in every process."""

    def __init__(self, preset: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(5, 8)
        encoder = PooledEncoder(2, 8, 16)
        scaler = StandardScaler(2).fit(0.5 + 0.3 * torch.randn(9, 2))
        self.decoder = getattr(DSPNDecoder, preset)(
            encoder, iters=4, set_size=4, channels=2, scaler=scaler, **recipe(preset)
        )
        self.double()

    def forward(self, x: Tensor) -> SetPrediction:
        return self.decoder(self.backbone(x))


def loss_of(prediction: SetPrediction, target: Tensor) -> Tensor:
    steps = prediction if prediction.trajectory is None else prediction.trajectory
    return (steps.elements - target).square().mean() + steps.mask.square().mean()


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(shape, dtype=torch.float64, generator=generator) for shape in [(6, 5), (6, 4, 2)])


def learned(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Gradients of the first step, and parameters after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(x), target).backward()
        if step == 0:
            results |= {f"{k} gradient": p.grad.clone() for k, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    results |= {k: p.detach().clone() for k, p in model.named_parameters()}
    return {k.removeprefix("module."): v for k, v in results.items()}


def work(rank: int, folder: Path, presets: list[str]) -> None:
    x, target = (part[3 * rank : 3 * rank + 3] for part in make_data())
    for preset in presets:
        torch.save(learned(DistributedDataParallel(Model(preset)), x, target), folder / f"{preset}{rank}.pt")


def test_two_processes_learn_as_one(tmp_path: Path) -> None:
    presets = ["paper", "idspn"]  # unrolled and implicit
    run_in_two_processes(work, tmp_path, presets)
    for preset in presets:
        expected = learned(Model(preset), *make_data())
        assert all(value.any() for name, value in expected.items() if name.endswith("gradient"))
        assert "decoder.initial_elements gradient" in expected
        for rank in range(2):
            actual = torch.load(tmp_path / f"{preset}{rank}.pt")
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
