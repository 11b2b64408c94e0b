"""What part c measures: the two shapes of `tests.benchmarks`, small ones for `--quick`, and the step from images."""

import sys

import torch
from torch import nn

from tests.benchmarks.work import Clevr, Function, Mnist
from tests.cuda.part import ROOT

WORKS = ("Clevr", "Mnist")
HOW = ("default", "reduce-overhead")  # modes of torch.compile
QUICK = {"batch": 2, "size": 3, "channels": 2, "width": 8, "latent": 8, "iters": 2}
IMAGE, QUICK_IMAGE = 128, 32  # pixels


def work_classes(quick: bool) -> dict[str, type[Clevr | Mnist]]:
    """Both shapes, or the same on little data."""
    classes: dict[str, type[Clevr | Mnist]] = {"Clevr": Clevr, "Mnist": Mnist}
    return {name: type(name, (cls,), QUICK) if quick else cls for name, cls in classes.items()}


def backbone(latent: int, quick: bool) -> tuple[nn.Module, str]:
    """The paper's ResNet-34, and its name; or what stands in for it."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.insert(0, str(ROOT / "examples"))
    from common.models import BACKBONES

    if not quick:
        try:
            return BACKBONES["resnet34"](latent), "ResNet-34"
        except SystemExit as error:  # it needs a torchvision that is not there
            print(error, flush=True)
    return BACKBONES["small"](latent), "five convolutions (in place of ResNet-34)"


def image_step(decoder: nn.Module, work: Clevr, *, bf16: bool, quick: bool, device: str) -> Function:
    """Make a training step from images: backbone, decoder, the work's loss, backward, Adam.

    The decoder is the work's own, or the MLP, whose loss has no representation term.
    """
    network, _ = backbone(work.latent, quick)
    network.to(device, memory_format=torch.channels_last)
    pixels = QUICK_IMAGE if quick else IMAGE
    images = torch.rand(work.batch, 3, pixels, pixels, device=device).contiguous(memory_format=torch.channels_last)
    parameters = [*network.parameters(), *(p for p in decoder.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            z = network(images)
        z = z.float()
        if decoder is work.decoder:
            loss = work.loss(decoder(z, record=False), work.target, work.mask, z=z)
        else:
            loss = work.loss(decoder(z), work.target, work.mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
