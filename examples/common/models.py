"""Networks around a set decoder: what makes the vector that it decodes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.batches import Batch
from setpred import DSPNDecoder, SetPrediction, StandardScaler


class SetPredictor(nn.Module):
    """Something that makes a vector of a batch, and a decoder; DSPN's holds the set encoder.

    Args:
        source: Makes vectors of batches.
        decoder: Makes sets of vectors.
    """

    def __init__(self, source: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.source, self.decoder = source, decoder

    def forward(self, batch: Batch, **options: object) -> tuple[SetPrediction, Tensor]:
        """Predict the sets of a batch; options go to the decoder. Returns the vectors too."""
        z = self.source(batch)
        return self.decoder(z, **options), z

    def after(self, batch: Batch, steps: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Predict elements and masks after each of these numbers of inner steps; one descent passes through all."""
        trajectory = self(batch, iters=max(steps), record=True)[0].trajectory
        return {t: (trajectory.elements[t], trajectory.mask[t]) for t in steps}

    def count_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


class Refined(nn.Module):
    """A decoder, and a descent that starts at its sets; in training it returns both, stacked, for a loss of both.

    The descent is differentiated implicitly, which tells its start nothing: that has a loss of its own.

    Args:
        start: Makes sets of vectors.
        descent: Makes better ones of them.
    """

    def __init__(self, start: nn.Module, descent: DSPNDecoder) -> None:
        super().__init__()
        self.start, self.descent = start, descent

    def forward(self, z: Tensor, *, refine: bool = True) -> SetPrediction:
        """Decode vectors (B, D); without ``refine``, by the first decoder alone."""
        start: SetPrediction = self.start(z)
        if not refine:
            return start
        end: SetPrediction = self.descent(z, init=start)
        if not self.training:
            return end
        elements, mask = (torch.stack(pair) for pair in zip(start[:2], end[:2], strict=True))
        return SetPrediction(elements, mask)


class EncodedTarget(nn.Module):
    """The target set's own representation, so that the whole is an autoencoder; standardised first, if at all."""

    def __init__(self, encoder: nn.Module, scaler: StandardScaler | None = None) -> None:
        super().__init__()
        self.encoder, self.scaler = encoder, scaler

    def forward(self, batch: Batch) -> Tensor:
        """Encode the target sets."""
        elements = batch.elements if self.scaler is None else self.scaler(batch.elements, batch.mask)
        z: Tensor = self.encoder(elements, batch.mask)
        return z


class EncodedImage(nn.Module):
    """The vector of an image by a backbone, which alone may run in bfloat16."""

    def __init__(self, backbone: nn.Module, *, bf16: bool = False) -> None:
        super().__init__()
        self.backbone, self.bf16 = backbone, bf16

    def forward(self, batch: Batch) -> Tensor:
        """Encode the images."""
        images = batch.images
        if images is None:
            raise ValueError("`batch.images` must be images, got None")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if images.device.type == "cuda":
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            z: Tensor = self.backbone(images)
        return z.float()


SMALL_CHANNELS, SMALL_SIDE = 128, 4  # of the small backbone's feature map


def _small_convolutions() -> nn.Sequential:
    """Five convolutions, for CPUs."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((32, 2), (64, 2), (96, 2), (SMALL_CHANNELS, 2), (SMALL_CHANNELS, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(SMALL_SIDE))


def small_backbone(out_channels: int) -> nn.Module:
    """A vector of an image, which the places of the small feature map enter one by one."""
    return nn.Sequential(*_small_convolutions(), nn.Flatten(), nn.Linear(SMALL_SIDE**2 * SMALL_CHANNELS, out_channels))


class SmallTokens(nn.Module):
    """Tokens of an image, (B, 16, out_channels): the places of the small feature map, to which each adds its own."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.convolutions = _small_convolutions()
        self.linear = nn.Linear(SMALL_CHANNELS, out_channels)
        self.place = nn.Parameter(torch.randn(SMALL_SIDE**2, out_channels))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        tokens: Tensor = self.linear(self.convolutions(images).flatten(2).mT) + self.place
        return tokens


class _Residual(nn.Module):
    """Two convolutions, added to what goes into them: the block of the smaller ResNets."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convolutions(x) + self.shortcut(x))


def resnet34() -> nn.Sequential:
    """ResNet-34 without pooling and classifier (He et al., CVPR 2016): images to 512 channels, a 32nd as wide."""
    layers = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for channels, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            layers.append(_Residual(before, channels, stride=1 if before == channels else 2))
            before = channels
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet34_backbone(out_channels: int) -> nn.Module:
    """The paper's: ResNet-34 from scratch, and two convolutions down to one position."""
    return nn.Sequential(
        *resnet34(),
        nn.Conv2d(512, 512, 3, stride=2, padding=1),
        nn.BatchNorm2d(512),
        nn.AdaptiveAvgPool2d(2),  # 2x2 already from images of 128x128
        nn.Conv2d(512, out_channels, 2),
        nn.Flatten(),
    )


BACKBONES = {"resnet34": resnet34_backbone, "small": small_backbone}
