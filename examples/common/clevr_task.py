"""What predicting CLEVR's boxes and states has in common: data, options, network and loss."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import Dataset, Subset

from common.arguments import count, flags, whole
from common.batches import Batch, InMemory, Stream
from common.clevr import ClevrDataset, find_scenes
from common.decoders import Loss, make_decoder, make_encoder, make_loss, make_scaler
from common.files import cache_directory
from common.models import BACKBONES, EncodedImage, SetPredictor
from common.rendered import draw_scenes, kept_scenes
from common.scenes import Scenes
from setpred import HungarianLoss

Target = Literal["boxes", "states"]
CHANNELS = {"boxes": 4, "states": 18}
STREAM = 1 << 31  # where the seeds of new scenes for every batch begin, beyond those that are kept
FEW = 8  # of a split, with --quick


class _View(Dataset[Batch]):
    """CLEVR's items as batches of images and one kind of target."""

    def __init__(self, data: ClevrDataset, target: Target) -> None:
        self.data, self.target = data, target

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Batch:
        return _batch(self.data[index], self.target)


def _batch(scenes: Scenes, target: Target) -> Batch:
    return Batch(scenes.boxes if target == "boxes" else scenes.states, scenes.mask, scenes.images)


class SceneStream:
    """New scenes for every batch, rendered where the training runs."""

    def __init__(self, options: argparse.Namespace, target: Target) -> None:
        self.options, self.target = options, target

    def batch(self, k: int, device: torch.device) -> Batch:
        """Render batch k."""
        size, most = self.options.size, self.options.max_objects
        scenes = draw_scenes(self.options.batch_size, STREAM + k, size=size, max_objects=most, device=device)
        return _batch(scenes, self.target)


class ClevrExperiment:
    """What the engine is told about predicting boxes or states; the rest is in the scripts."""

    target: Target
    lr = 3e-4
    selection = "mean AP"
    largest = True
    evaluated: Sequence[str] = ("data", "test_scenes", "cache", "bf16")
    quick: ClassVar = {"scenes": FEW, "test_scenes": FEW}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of data and network."""
        data = parser.add_argument_group("data")
        data.add_argument("--data", type=Path, metavar="DIR", help="CLEVR v1.0 (default: rendered scenes, not CLEVR)")
        data.add_argument(
            "--size", type=count, default=128, metavar="S", help="width and height of images (default: %(default)s)"
        )
        data.add_argument(
            "--max-objects", type=count, default=10, metavar="N", help="size of the sets (default: %(default)s)"
        )
        data.add_argument(
            "--scenes",
            type=whole,
            default=20_000,
            metavar="N",
            help="rendered scenes to train on, kept on disk; 0 renders new ones for each batch (default: %(default)s)",
        )
        data.add_argument(
            "--test-scenes",
            type=count,
            default=2000,
            metavar="N",
            help="rendered scenes to test on; half as many validate (default: %(default)s)",
        )
        data.add_argument(
            "--cache",
            type=Path,
            metavar="DIR",
            help="where resized and rendered images are kept (default: $XDG_CACHE_HOME/setpred or ~/.cache/setpred)",
        )
        if self.target == "boxes":
            data.add_argument(
                "--clip-boxes", action="store_true", help="clip CLEVR's boxes to the image (default: not, as published)"
            )
        network = parser.add_argument_group("network")
        network.add_argument(
            "--backbone",
            choices=list(BACKBONES),
            default="resnet34",
            help="from image to vector (default: %(default)s)",
        )
        network.add_argument(
            "--set-encoder",
            choices=["pooled", "relation"],
            help="what is descended through (recommended, idspn, default: pooled; dspn, default: relation)",
        )
        network.add_argument("--latent", type=count, default=512, help="size of the vector (default: %(default)s)")
        network.add_argument(
            "--width", type=count, default=512, help="hidden units of set encoder, baselines (default: %(default)s)"
        )
        network.add_argument(
            "--bf16", action=argparse.BooleanOptionalAction, help="backbone in bfloat16 (default: on CUDA)"
        )

    def check(self, options: argparse.Namespace, given: Mapping[str, Any]) -> None:
        """Refuse options that the data has no use for, and a directory without the splits that are needed."""
        rendered = options.data is None
        if unused := [name for name in (("clip_boxes",) if rendered else ("scenes", "test_scenes")) if name in given]:
            raise SystemExit(f"{flags(unused)} has no meaning {'without' if rendered else 'with'} --data")
        if rendered and options.scenes == 0 and options.epochs is not None:
            raise SystemExit("--scenes 0 has no epochs: give --steps or --seconds")
        needed = [split for split, used in (("train", options.evaluate is None), ("val", options.test)) if used]
        try:
            for split in () if rendered else needed:
                find_scenes(options.data, split)
        except OSError as error:
            raise SystemExit(f"--data: {str(error).removeprefix('root: ')}") from None
        try:
            cache_directory(options.cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"--cache: {error}") from None

    def set_size(self, options: argparse.Namespace) -> int:
        """Rows of the sets."""
        size: int = options.max_objects
        return size

    def training_data(self, options: argparse.Namespace) -> tuple[Dataset[Batch] | Stream, Dataset[Batch]]:
        """Load CLEVR's training scenes, of which the end is kept for validation, or rendered scenes."""
        if options.data is None:
            validation = self._rendered(options, "validation", max(options.test_scenes // 2, 1))
            if options.scenes == 0:
                return SceneStream(options, self.target), validation
            return self._rendered(options, "train", options.scenes), validation
        data = self._clevr(options, "train")
        kept = min(1000, max(len(data) // 10, 1))
        first = len(data) - kept
        parts = (range(first), range(first, len(data)))
        train, validation = (Subset(data, part[:FEW] if options.quick else part) for part in parts)
        return train, validation

    def test_data(self, options: argparse.Namespace) -> Dataset[Batch]:
        """Load CLEVR's "val" split, as published: the truth of its test split is not public. Or rendered scenes."""
        if options.data is None:
            return self._rendered(options, "test", options.test_scenes)
        data = self._clevr(options, "val")
        return Subset(data, range(min(len(data), FEW))) if options.quick else data

    def _rendered(self, options: argparse.Namespace, part: str, scenes: int) -> InMemory:
        cuda = torch.cuda.is_available() and options.device != "cpu"
        kept = kept_scenes(
            part,
            scenes,
            size=options.size,
            max_objects=options.max_objects,
            cache=options.cache,
            device=torch.device("cuda" if cuda else "cpu"),
        )
        return InMemory(_batch(kept, self.target))

    def _clevr(self, options: argparse.Namespace, split: str) -> _View:
        try:
            data = ClevrDataset(
                options.data,
                split,
                size=options.size,
                max_objects=options.max_objects,
                cache=options.cache,
                clip_boxes=self.target == "boxes" and options.clip_boxes,
            )
        except (OSError, ValueError) as error:
            raise SystemExit(f"--data: {str(error).removeprefix('root: ')}") from None
        return _View(data, self.target)

    def build(self, options: argparse.Namespace) -> tuple[SetPredictor, Loss]:
        """Make the network, image -> backbone -> vector -> decoder, and its loss.

        The published DSPN has 0.1 of the representation loss too.
        """
        channels = CHANNELS[self.target]
        kind = options.set_encoder or ("relation" if options.decoder == "dspn" else "pooled")
        encoder = make_encoder(options, kind, channels)
        scaler = make_scaler(options, channels)
        decoder = make_decoder(options, encoder, scaler, set_size=self.set_size(options), channels=channels)
        bf16 = torch.cuda.is_available() and options.device != "cpu" if options.bf16 is None else options.bf16
        source = EncodedImage(BACKBONES[options.backbone](options.latent), bf16=bf16)
        model = SetPredictor(source, decoder)
        return model, make_loss(options, encoder, HungarianLoss(), scaler, repr_weight=0.1)

    def source(self, options: argparse.Namespace) -> str:
        """Name the data, in tables and pictures."""
        if options.data is not None:
            return f"CLEVR files in {options.data}"
        return f"rendered scenes, not CLEVR ({options.size}x{options.size}, up to {options.max_objects} objects)"
