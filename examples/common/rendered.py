"""Rendered scenes that are kept on disk: drawn once, and mapped into memory by every later run."""

import hashlib
from os import PathLike
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import cache_directory, replacing
from common.scenes import Scenes, render_scenes

# Where the seeds of each part's scenes begin, whatever the training's seed; of a seed a CPU generator takes 32 bits.
SEEDS = {"train": 0, "validation": 1 << 24, "test": 2 << 24}
RENDERED_AT_ONCE = 100


def draw_scenes(count: int, seed: int, *, size: int, max_objects: int, device: torch.device) -> Scenes:
    """Render scenes of 3 objects, or `max_objects` if they are fewer, up to `max_objects`."""
    return render_scenes(
        count,
        size=size,
        objects=(min(3, max_objects), max_objects),
        max_objects=max_objects,
        generator=torch.Generator(device).manual_seed(seed),
    )


def kept_scenes(
    part: str,
    count: int,
    *,
    size: int,
    max_objects: int,
    cache: str | PathLike[str] | None = None,
    device: torch.device | None = None,
) -> Scenes:
    """Render a part of the data once; later runs, and others at the same time, map the file into memory.

    Args:
        part: "train", "validation" or "test".
        count: Number of scenes; each takes 3 x size x size bytes.
        size: Width and height of the images in pixels.
        max_objects: Size of the sets.
        cache: Directory; None is `$XDG_CACHE_HOME/setpred`, or `~/.cache/setpred`.
        device: Where to render; None is the CPU.

    Returns:
        Scenes whose images are uint8.
    """
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("scene*.py"))))
    name = f"{part}-{count}-{size}px-{max_objects}objects-{code.hexdigest()[:8]}.pt"
    path = cache_directory(cache) / "rendered" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        device = device or torch.device("cpu")
        pieces = []
        with tqdm(total=count, desc=f"rendering scenes ({part})", unit="scene", leave=False) as bar:
            for k, start in enumerate(range(0, count, RENDERED_AT_ONCE)):
                number = min(RENDERED_AT_ONCE, count - start)
                scenes = draw_scenes(number, SEEDS[part] + k, size=size, max_objects=max_objects, device=device)
                images = (scenes.images * 255).round().to(torch.uint8)
                pieces.append([piece.cpu() for piece in scenes._replace(images=images)])
                bar.update(number)
        with replacing(path, shared=True) as unfinished:
            torch.save(dict(zip(Scenes._fields, map(torch.cat, zip(*pieces, strict=True)), strict=True)), unfinished)
    return Scenes(**torch.load(path, weights_only=True, mmap=True))
