"""The CLEVR v1.0 directory: images and scene files as released, or in the same layout."""

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from common.files import cache_directory, replacing
from common.scenes import ATTRIBUTES, Scenes

WIDTH, HEIGHT = 480, 320
FEW = 256  # so many images are decoded before other processes have started


def find_scenes(root: Path, split: str) -> Path:
    """Find the scene file of a split, or say what is missing."""
    if split not in ("train", "val"):
        raise ValueError(f"split: expected 'train' or 'val' (CLEVR's 'test' has no scene file), got {split!r}")
    for part in (root / "images" / split, root / "scenes"):
        if not part.is_dir():
            found = sorted(path.name for path in root.iterdir())[:10] if root.is_dir() else "no such directory"
            raise FileNotFoundError(f"root: expected the directory {part.relative_to(root)} in {root}, found {found}")
    scene_file = root / "scenes" / f"CLEVR_{split}_scenes.json"
    if not scene_file.is_file():
        raise FileNotFoundError(f"root: expected the scene file {scene_file}, found none")
    return scene_file


class ClevrDataset(Dataset[Scenes]):
    """Images of a split with boxes and states; item i is a `Scenes` without the batch dimension.

    The default collation of a `DataLoader` gives `Scenes` with it. Images are decoded and resized once, by several
    processes, into one array on disk that every later use maps into memory.

    Args:
        root: Directory that holds `images/SPLIT/*.png` and `scenes/CLEVR_SPLIT_scenes.json`.
        split: "train" or "val"; the released "test" split has no scene file.
        size: Width and height S of the images in pixels.
        max_objects: Rows N of boxes, states and mask; a scene with more objects is an error.
        cache: Directory of the resized images; None is `$XDG_CACHE_HOME/setpred`, or `~/.cache/setpred`.
        clip_boxes: Clip boxes to the image; the published ones are not.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        split: str,
        *,
        size: int = 128,
        max_objects: int = 10,
        cache: str | PathLike[str] | None = None,
        clip_boxes: bool = False,
    ) -> None:
        root = Path(root)
        scene_file = find_scenes(root, split)
        try:
            scenes = json.loads(scene_file.read_text())["scenes"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"root: expected JSON with a list 'scenes' in {scene_file}, got what cannot be read so: {error!r}"
            ) from None
        for scene in scenes:
            if len(scene["objects"]) > max_objects:
                raise ValueError(
                    f"max_objects: expected at most {max_objects} objects, got {len(scene['objects'])} in scene "
                    f"{scene['image_index']} ({scene['image_filename']}) of {scene_file}"
                )
        files = [root / "images" / split / scene["image_filename"] for scene in scenes]
        if missing := [path for path in files if not path.is_file()]:
            raise FileNotFoundError(
                f"root: expected an image for each scene of {scene_file}, found none for {len(missing)}, "
                f"the first {missing[0]}"
            )
        self.file = _resized(files, size, cache_directory(cache))
        self.images = np.load(self.file, mmap_mode="r")

        boxes = [torch.tensor([_box(thing, scene) for thing in scene["objects"]]).view(-1, 4) for scene in scenes]
        states = [torch.tensor([_state(thing) for thing in scene["objects"]]).view(-1, 18) for scene in scenes]
        self.boxes, self.states = (
            torch.stack([torch.cat([x, x.new_zeros(max_objects - len(x), x.shape[1])]) for x in rows])
            for rows in (boxes, states)
        )
        if clip_boxes:
            self.boxes = self.boxes.clamp(0, 1)
        self.mask = torch.tensor([[i < len(x) for i in range(max_objects)] for x in boxes])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the images out: worker processes map the file themselves."""
        return {name: value for name, value in vars(self).items() if name != "images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the images."""
        vars(self).update(state)
        self.images = np.load(self.file, mmap_mode="r")

    def __len__(self) -> int:
        """Count the scenes."""
        return len(self.mask)

    def __getitem__(self, index: int) -> Scenes:
        """Read one scene."""
        image = torch.from_numpy(self.images[index].copy()).permute(2, 0, 1).float() / 255
        return Scenes(image, self.boxes[index], self.states[index], self.mask[index])


def _state(thing: dict[str, Any]) -> list[float]:
    one_hots = [float(thing[name] == value) for name, values in ATTRIBUTES.items() for value in values]
    if sum(one_hots) != len(ATTRIBUTES):
        raise ValueError(f"scene file: expected attributes among {ATTRIBUTES}, got {thing}")
    return [x / 3 for x in thing["3d_coords"]] + one_hots


def _box(thing: dict[str, Any], scene: dict[str, Any]) -> list[float]:
    """Approximate the box x1, y1, x2, y2 from the scene's geometry, as published.

    The centre in the image is known; the extents are fitted to each shape's size and distance. The axis "right" turns
    the coordinates, the second one by the already turned first, as published.
    """
    x, y, z = thing["3d_coords"]
    cos, sin, _ = scene["directions"]["right"]
    x = x * cos + y * sin
    y = -x * sin + y * cos
    up = down = side = 6.9 * z * (15 - y) / 2
    if thing["shape"] == "cylinder":
        far, near = 9.4 + y, 6.4
        top = z * (near / far + 1)
        up *= top / (top - z * (near - z) / far)
        down = up * (near - z + far) / (near + z + far)
        side *= 11 / (10 + y)
    elif thing["shape"] == "cube":
        up = down = side = up * 1.3 * 10 / (10 + y)
    u, v, _ = thing["pixel_coords"]
    return [(u - side) / WIDTH, (v - down) / HEIGHT, (u + side) / WIDTH, (v + up) / HEIGHT]


def _read(path: Path, size: int) -> np.ndarray[Any, Any]:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"image: expected a whole PNG file, got {path}, which cannot be decoded: {error}") from None


def _resized(files: list[Path], size: int, cache: Path) -> Path:
    """File that holds the array (files, S, S, 3) of resized images; made first if it is not there."""
    stamps = [f"{path.resolve()} {path.stat().st_mtime_ns}" for path in files]
    key = hashlib.sha256("\n".join([str(size), *stamps]).encode()).hexdigest()[:16]
    file = cache / f"clevr-{size}-{key}.npy"
    if file.exists():
        return file
    cache.mkdir(parents=True, exist_ok=True)
    read = partial(_read, size=size)
    with replacing(file, shared=True) as unfinished, ExitStack() as stack:
        array = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (len(files), size, size, 3))
        images: Iterable[np.ndarray[Any, Any]] = map(read, files)
        if len(files) > FEW:
            # Not by fork: PyTorch has threads.
            pool = ProcessPoolExecutor(
                mp_context=multiprocessing.get_context("spawn"),
                initializer=signal.signal,
                initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for this process
            )
            stack.callback(pool.shutdown, cancel_futures=True)
            images = pool.map(read, files, chunksize=32)
        progress = tqdm(images, f"Resizing to {file}", len(files), unit="image", disable=len(files) <= FEW)
        for i, image in enumerate(progress):
            array[i] = image
        array.flush()
    return file
