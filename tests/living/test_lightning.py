"""Lightning: fit and validate, with the Trainer's default inference mode in validation."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from setpred.metrics import AveragePrecision
from tests.living.common import Network, make_batch


# [docs: module
class SetModule(L.LightningModule):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.metric = AveragePrecision(torch.cdist, thresholds=[0.5], largest=False)

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        return self.network.step(*batch)

    def validation_step(self, batch: tuple[Tensor, ...]) -> None:
        x, target, mask = batch
        prediction = self.network(x)  # under inference_mode
        self.metric.update(prediction.elements, prediction.mask, target, target_mask=mask)

    def on_validation_epoch_end(self) -> None:
        self.log("ap", self.metric.compute()[0])
        self.metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    # docs]


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # Lightning's use of PyTorch's pytrees
@pytest.mark.parametrize("recipe", ["paper", "idspn"])
def test_fit_and_validate(recipe: str, tmp_path: Path) -> None:
    module = SetModule(Network(recipe))
    seen = []
    module.network.decoder.register_forward_hook(
        lambda decoder, _, output: seen.append((decoder.training, torch.is_inference_mode_enabled()))
    )
    before = {name: p.clone() for name, p in module.named_parameters()}
    data = DataLoader(TensorDataset(*make_batch(12)), batch_size=6)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, data, data)
    assert seen == [(True, False)] * 2 + [(False, False)] * 2  # validation inside of fit runs under no_grad
    assert 0 <= trainer.callback_metrics["ap"] <= 1
    for name, p in module.named_parameters():
        assert p.requires_grad != torch.equal(p, before[name]), name
    ap = trainer.validate(module, data, verbose=False)[0]["ap"]
    assert seen[4:] == [(False, True)] * 2  # its default inference mode
    torch.testing.assert_close(torch.tensor(ap), trainer.callback_metrics["ap"], check_dtype=False)
