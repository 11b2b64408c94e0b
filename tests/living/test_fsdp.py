"""FSDP2: the whole network sharded over two processes learns as one process with the whole batch."""

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.living.common import Network, make_batch
from tests.processes import run_in_two_processes

RECIPES = ["paper", "idspn"]


def learned(model: Network, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def make_model(recipe: str) -> Network:
    torch.manual_seed(0)
    model = Network(recipe, lr=1.0).double()
    # The loss runs inside of the sharded module's forward, where all parameters are whole.
    model.forward = model.step
    return model


def work(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    batch = [part[3 * rank : 3 * rank + 3] for part in double_batch()]
    for recipe in RECIPES:
        model = make_model(recipe)
        # [docs: fsdp
        fully_shard(model.backbone, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # docs]
        whole = {name: p.full_tensor() for name, p in learned(model, *batch).items()}
        if rank == 0:
            torch.save(whole, folder / f"{recipe}.pt")


def double_batch() -> list[torch.Tensor]:
    return [part.double() if part.is_floating_point() else part for part in make_batch(6)]


def test_two_shards_learn_as_one(tmp_path: Path) -> None:
    run_in_two_processes(work, tmp_path)
    for recipe in RECIPES:
        expected = learned(make_model(recipe), *double_batch())
        torch.testing.assert_close(torch.load(tmp_path / f"{recipe}.pt"), expected, rtol=1e-9, atol=1e-9)
