"""The loader of CLEVR's directory: right data or a clear error."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import clevr
from common.clevr import ClevrDataset
from PIL import Image
from torch.utils.data import DataLoader

MINI = Path(__file__).parents[3] / "shared" / "data" / "clevr_mini"


def thing(**changes: Any) -> dict[str, Any]:
    return {
        "shape": "sphere",
        "size": "small",
        "material": "metal",
        "color": "red",
        "3d_coords": [1.5, -0.6, 0.35],
        "pixel_coords": [240, 160, 10.0],
    } | changes


def write(root: Path, counts: tuple[int, ...] = (3, 1)) -> Path:
    """A train split in CLEVR's layout, one flat colour an image."""
    (root / "images/train").mkdir(parents=True)
    (root / "scenes").mkdir()
    scenes = []
    for i, count in enumerate(counts):
        name = f"CLEVR_train_{i:06d}.png"
        Image.new("RGB", (480, 320), (10 * i % 256, 100, 200)).save(root / "images/train" / name)
        directions = {"right": [1.0, 0.0, 0.0]}
        things = [thing() for _ in range(count)]
        scenes.append({"image_index": i, "image_filename": name, "directions": directions, "objects": things})
    (root / "scenes/CLEVR_train_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return root


def test_items(tmp_path: Path) -> None:
    data = ClevrDataset(write(tmp_path), "train", size=8, max_objects=4, cache=tmp_path / "cache")
    assert len(data) == 2
    image, boxes, states, mask = data[1]
    torch.testing.assert_close(image, (torch.tensor([10.0, 100.0, 200.0]) / 255).view(3, 1, 1).expand(3, 8, 8))
    assert mask.tolist() == [True, False, False, False]
    assert not boxes[1:].any()
    assert not states[1:].any()
    # material rubber, metal; eight colours, red the fifth; sphere first; large, small
    expected = [0.5, -0.2, 0.35 / 3, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    torch.testing.assert_close(states[0], torch.tensor(expected))
    # A sphere: half extent 6.9 z (15 - y) / 2 pixels about the centre of the image.
    half = 6.9 * 0.35 * 15.6 / 2
    around = torch.tensor([0.5 - half / 480, 0.5 - half / 320, 0.5 + half / 480, 0.5 + half / 320])
    torch.testing.assert_close(boxes[0], around)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("sphere", [0.421030, 0.381544, 0.578970, 0.618456]),
        ("cube", [0.389659, 0.334488, 0.610341, 0.665512]),
        ("cylinder", [0.406634, 0.326599, 0.593366, 0.690255]),
    ],
)
def test_boxes_are_those_of_the_published_code(tmp_path: Path, shape: str, expected: list[float]) -> None:
    """The expected values are what the published loader prints for this object."""
    root = write(tmp_path)
    file = root / "scenes/CLEVR_train_scenes.json"
    scenes = json.loads(file.read_text())
    scenes["scenes"][1]["directions"]["right"] = [0.6, 0.8, 0.0]
    scenes["scenes"][1]["objects"] = [thing(shape=shape, size="large", **{"3d_coords": [1.5, -0.6, 0.7]})]
    file.write_text(json.dumps(scenes))
    boxes = ClevrDataset(root, "train", size=8, cache=tmp_path / "cache")[1].boxes
    torch.testing.assert_close(boxes[0], torch.tensor(expected), atol=1e-6, rtol=0)


def test_many_images_are_decoded_by_processes(tmp_path: Path) -> None:
    count = clevr.FEW + 40
    root = write(tmp_path, (1,) * count)
    data = ClevrDataset(root, "train", size=4, cache=tmp_path / "cache")
    reds = [round(data[i].images[0, 0, 0].item() * 255) for i in range(count)]
    assert reds == [10 * i % 256 for i in range(count)]
    (root / "images/train/CLEVR_train_000270.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"expected a whole PNG file, got .*CLEVR_train_000270.png"):
        ClevrDataset(root, "train", size=4, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_images_are_not_pickled(tmp_path: Path) -> None:
    data = ClevrDataset(write(tmp_path), "train", size=256, cache=tmp_path / "cache")
    pickled = pickle.dumps(data)
    assert len(pickled) < data.images.nbytes / 10
    assert torch.equal(pickle.loads(pickled)[1].images, data[1].images)


def test_batches_by_worker_processes(tmp_path: Path) -> None:
    data = ClevrDataset(write(tmp_path, (3, 1, 0, 2)), "train", size=8, cache=tmp_path / "cache")
    (batch,) = DataLoader(data, batch_size=4, num_workers=2)
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.states.shape == (4, 10, 18)
    assert batch.mask.sum(1).tolist() == [3, 1, 0, 2]


def test_boxes_are_clipped_on_request(tmp_path: Path) -> None:
    root = write(tmp_path)
    file = root / "scenes/CLEVR_train_scenes.json"
    scenes = json.loads(file.read_text())
    scenes["scenes"][1]["objects"][0]["pixel_coords"] = [1, 1, 10.0]
    file.write_text(json.dumps(scenes))
    whole, clipped = (
        ClevrDataset(root, "train", size=8, cache=tmp_path / "cache", clip_boxes=clip)[1].boxes
        for clip in (False, True)
    )
    assert whole.min() < 0
    assert torch.equal(clipped, whole.clamp(0, 1))


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = write(tmp_path), tmp_path / "cache"
    first = ClevrDataset(root, "train", size=8, cache=cache)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]
    with monkeypatch.context() as patched:
        patched.setattr(clevr, "_read", None)  # decoding again would fail
        assert torch.equal(ClevrDataset(root, "train", size=8, cache=cache)[0].images, first[0].images)
    Image.new("RGB", (480, 320), (255, 255, 255)).save(root / "images/train/CLEVR_train_000000.png")
    assert ClevrDataset(root, "train", size=8, cache=cache)[0].images.min() == 1  # a changed file is seen


def test_errors(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def load(root: Path, split: str = "train") -> ClevrDataset:
        return ClevrDataset(root, split, size=8, cache=cache)

    with pytest.raises(ValueError, match=r"split: expected 'train' or 'val'.*got 'test'"):
        load(write(tmp_path / "a"), "test")
    with pytest.raises(
        FileNotFoundError, match=r"expected the directory images/val in .*a, found \['images', 'scenes'\]"
    ):
        load(tmp_path / "a", "val")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected at most 10 objects, got 11 in scene 1 \(CLEVR_train_000001.png\)"):
        load(write(tmp_path / "b", (1, 11)))

    missing = write(tmp_path / "c")
    (missing / "images/train/CLEVR_train_000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"found none for 1, the first .*CLEVR_train_000001.png"):
        load(missing)
    (missing / "scenes/CLEVR_train_scenes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected the scene file .*CLEVR_train_scenes.json"):
        load(missing)

    broken = write(tmp_path / "f")
    file = broken / "scenes/CLEVR_train_scenes.json"
    for text in (file.read_text()[:100], "[]", "{}"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"expected JSON with a list 'scenes' in .*CLEVR_train_scenes.json"):
            load(broken)

    truncated = write(tmp_path / "d")
    image = truncated / "images/train/CLEVR_train_000000.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (320, 480, 3), np.uint8)).save(image)
    image.write_bytes(image.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"expected a whole PNG file, got .*CLEVR_train_000000.png"):
        load(truncated)
    assert not list(cache.glob("*.tmp"))

    strange = write(tmp_path / "e")
    file = strange / "scenes/CLEVR_train_scenes.json"
    file.write_text(file.read_text().replace("metal", "glass"))
    with pytest.raises(ValueError, match="expected attributes among"):
        load(strange)


@pytest.mark.skipif(not MINI.is_dir(), reason="needs shared/data/clevr_mini")
def test_rendered_by_blender(tmp_path: Path) -> None:
    data = ClevrDataset(MINI, "val", size=32, cache=tmp_path)
    assert len(data) == 50
    counts = data.mask.sum(1)
    assert counts.min() >= 3
    assert counts.max() <= 10
    centre = (data.boxes[..., :2] + data.boxes[..., 2:]).div(2)[data.mask]
    assert ((centre > 0) & (centre < 1)).all()
    assert (data.states[..., 3:].sum(-1)[data.mask] == 4).all()
