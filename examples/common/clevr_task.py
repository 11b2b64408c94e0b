"""What predicting CLEVR's boxes and states has in common: data, options, network and loss."""

import argparse
import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from common.batches import Batch, InMemory, Splits
from common.clevr import ClevrDataset
from common.decoders import Loss, evaluation_descent, make_decoder, make_loss
from common.files import cache_directory, replacing
from common.models import BACKBONES, EncodedImage, SetPredictor
from common.scenes import Scenes, render_scenes
from setpred import HungarianLoss, PooledEncoder, RelationEncoder

Target = Literal["boxes", "states"]
CHANNELS = {"boxes": 4, "states": 18}
SET_ENCODERS = {"relation": RelationEncoder, "pooled": PooledEncoder}
# Where the seeds of each part's scenes begin, whatever the training's seed; of a seed a CPU generator takes 32 bits.
SEEDS = {"train": 0, "validation": 1 << 24, "test": 2 << 24}
STREAM = 1 << 31  # new scenes for every batch
RENDERED_AT_ONCE = 100


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
        return _batch(_render(self.options, self.options.batch_size, STREAM + k, device), self.target)


def _render(options: argparse.Namespace, count: int, seed: int, device: torch.device) -> Scenes:
    most = options.max_objects
    return render_scenes(
        count,
        size=options.size,
        objects=(min(3, most), most),
        max_objects=most,
        generator=torch.Generator(device).manual_seed(seed),
    )


def _rendered(options: argparse.Namespace, target: Target) -> Splits:
    train, test = (8, 8) if options.quick else (options.scenes, options.test_scenes)
    counts = {"train": train, "validation": max(test // 2, 1), "test": test}
    parts: dict[str, InMemory | SceneStream] = {
        part: InMemory(_batch(_kept(options, part, count), target)) for part, count in counts.items() if count > 0
    }
    parts.setdefault("train", SceneStream(options, target))
    return Splits(**parts)  # type: ignore[arg-type]


def _kept(options: argparse.Namespace, part: str, count: int) -> Scenes:
    """Render a part of the data once; later runs, and others at the same time, map the file into memory."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("scene*.py"))))
    name = f"{part}-{count}-{options.size}px-{options.max_objects}objects-{code.hexdigest()[:8]}.pt"
    path = cache_directory(options.cache) / "rendered" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        device = torch.device("cuda" if torch.cuda.is_available() and options.device != "cpu" else "cpu")
        pieces = []
        with tqdm(total=count, desc=f"rendering scenes ({part})", unit="scene", leave=False) as bar:
            for k, start in enumerate(range(0, count, RENDERED_AT_ONCE)):
                size = min(RENDERED_AT_ONCE, count - start)
                scenes = _render(options, size, SEEDS[part] + k, device)
                images = (scenes.images * 255).round().to(torch.uint8)
                pieces.append([piece.cpu() for piece in scenes._replace(images=images)])
                bar.update(size)
        with replacing(path, shared=True) as unfinished:
            torch.save(dict(zip(Scenes._fields, map(torch.cat, zip(*pieces, strict=True)), strict=True)), unfinished)
    return Scenes(**torch.load(path, weights_only=True, mmap=True))


class ClevrExperiment:
    """What the engine is told about predicting boxes or states; the rest is in the scripts."""

    target: Target
    eval_steps = (10, 20, 30)
    lr = 3e-4
    selection = "mean AP"
    largest = True

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of data and network."""
        data = parser.add_argument_group("data")
        data.add_argument("--data", type=Path, metavar="DIR", help="CLEVR v1.0; default: rendered scenes, not CLEVR")
        data.add_argument("--size", type=int, default=128, metavar="S", help="width and height of images; default: 128")
        data.add_argument("--max-objects", type=int, default=10, metavar="N", help="size of the sets; default: 10")
        data.add_argument(
            "--scenes",
            type=int,
            default=20_000,
            metavar="N",
            help="rendered scenes to train on, kept on disk; 0 renders new ones for each batch; default: 20000",
        )
        data.add_argument(
            "--test-scenes", type=int, default=2000, metavar="N", help="half as many validate; default: 2000"
        )
        data.add_argument(
            "--cache", type=Path, metavar="DIR", help="default: $XDG_CACHE_HOME/setpred or ~/.cache/setpred"
        )
        data.add_argument(
            "--clip-boxes", action="store_true", help="clip CLEVR's boxes to the image; default: not, as published"
        )
        network = parser.add_argument_group("network")
        network.add_argument("--backbone", choices=list(BACKBONES), default="resnet34", help="default: resnet34")
        network.add_argument(
            "--set-encoder", choices=list(SET_ENCODERS), default="relation", help="of dspn, idspn; default: relation"
        )
        network.add_argument("--latent", type=int, default=512, help="size of the vector; default: 512")
        network.add_argument(
            "--width", type=int, default=512, help="hidden units of set encoder, baselines; default: 512"
        )
        network.add_argument(
            "--bf16", action=argparse.BooleanOptionalAction, help="backbone in bfloat16; default: on CUDA"
        )

    def data(self, options: argparse.Namespace) -> Splits:
        """Load CLEVR or rendered scenes with one kind of target.

        Of CLEVR, the end of the training scenes is kept for validation, and results come from its "val" split, as
        published: the truth of its test split is not public.
        """
        if options.data is None:
            return _rendered(options, self.target)
        train, val = (
            _View(
                ClevrDataset(
                    options.data,
                    part,
                    size=options.size,
                    max_objects=options.max_objects,
                    cache=options.cache,
                    clip_boxes=options.clip_boxes,
                ),
                self.target,
            )
            for part in ("train", "val")
        )
        kept = min(1000, len(train) // 10)
        first = len(train) - kept
        if options.quick:
            first, kept, val = min(first, 8), min(kept, 8), Subset(val, range(min(len(val), 8)))
        return Splits(Subset(train, range(first)), Subset(train, range(first, first + kept)), val)

    def build(self, options: argparse.Namespace) -> tuple[SetPredictor, Loss]:
        """Make the network, image -> backbone -> vector -> decoder, and its loss: Hungarian + 0.1 representation."""
        encoder = SET_ENCODERS[options.set_encoder](CHANNELS[self.target], options.latent, options.width)
        decoder = make_decoder(
            options,
            encoder,
            latent=options.latent,
            set_size=options.max_objects,
            channels=CHANNELS[self.target],
            width=options.width,
        )
        bf16 = torch.cuda.is_available() and options.device != "cpu" if options.bf16 is None else options.bf16
        source = EncodedImage(BACKBONES[options.backbone](options.latent), bf16=bf16)
        model = SetPredictor(source, decoder, evaluation_descent(options))
        return model, make_loss(options, encoder, HungarianLoss(), repr_weight=0.1)

    def source(self, options: argparse.Namespace) -> str:
        """Name the data, in tables and pictures."""
        if options.data is not None:
            return f"CLEVR files in {options.data}"
        return f"rendered scenes, not CLEVR ({options.size}x{options.size}, up to {options.max_objects} objects)"
