import gzip
import json
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from common.checkpoint import load
from common.engine import Predictions, run
from common.mnist import find_images, load_test_digits, load_training_digits, points_of
from mnist_sets import MnistSets

MNIST = Path(__file__).parents[3] / "shared/data/mnist10k"
pytestmark = pytest.mark.filterwarnings("default")  # of the libraries that a script uses


def start(out, *arguments):
    small = [] if "--evaluate" in arguments else ["--latent", "8", "--width", "8"]
    run(MnistSets(), ["--quick", "--device", "cpu", *small, "--out", str(out), *arguments])
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("decoder", ["recommended", "dspn", "idspn", "mlp", "lstm"])
def test_quick_run_reports_and_draws(tmp_path, decoder, capsys):
    steps = ["--eval-steps", "3", "5"] if decoder not in ("mlp", "lstm") else []
    result = start(tmp_path, "--decoder", decoder, *steps)
    assert list(result["test"]) == (["3", "5"] if steps else ["-"])
    printed = capsys.readouterr().out
    assert "Chamfer x 1000" in printed
    assert "scikit-learn's digits, not MNIST" in printed
    assert (tmp_path / "sets.png").stat().st_size > 10_000


def test_recipe_can_be_changed(tmp_path):
    start(tmp_path, "--decoder", "idspn", "--inner-steps", "2", "--momentum", "0", "--inner-lr", "3")


@pytest.mark.parametrize("decoder", ["recommended", "mlp"])
def test_run_that_was_stopped_ends_as_an_undisturbed_one(tmp_path, decoder):
    options = ["--decoder", decoder]
    start(tmp_path / "undisturbed", *options, "--steps", "9")
    start(tmp_path / "stopped", *options, "--steps", "5")
    start(tmp_path / "stopped", *options, "--steps", "9", "--resume")
    found, expected = (load(tmp_path / name / "last.pt")["model"] for name in ("stopped", "undisturbed"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert expected["decoder.scaler.scale"].tolist() != [1, 1]  # it was fitted, and the papers' recipes have none


def test_published_recipes_take_elements_as_they_are(tmp_path):
    for decoder in ("dspn", "idspn"):
        start(tmp_path / decoder, "--decoder", decoder)
        assert not [name for name in load(tmp_path / decoder / "best.pt")["model"] if "scaler" in name]


def test_metric_is_the_published_one():
    """Sum over both sides of the mean over all rows of the least mean over x, y, mask of the Huber loss."""
    generator = torch.Generator().manual_seed(0)
    elements, target = torch.rand(2, 4, 5, 2, generator=generator)
    mask, target_mask = torch.rand(4, 5, generator=generator), torch.rand(4, 5, generator=generator) < 0.6
    pred = torch.cat([elements, mask[..., None]], -1).unsqueeze(2)
    true = torch.cat([target * target_mask[..., None], target_mask[..., None]], -1).unsqueeze(1)
    cost = torch.nn.functional.smooth_l1_loss(*torch.broadcast_tensors(pred, true), reduction="none").mean(-1)
    expected = (cost.min(1).values + cost.min(2).values).mean()
    score = MnistSets().score(Predictions(elements, mask, target, target_mask))
    assert score["chamfer"] == pytest.approx(expected.item(), rel=1e-5)


def test_points_are_the_bright_pixels():
    images = torch.zeros(1, 28, 28, dtype=torch.uint8)
    images[0, 27, 0], images[0, 9, 18], images[0, 5, 5] = 255, 34, 33  # the mean pixel is 33.3
    batch = points_of(images)
    assert batch.elements.shape == (1, 342, 2)
    found = batch.elements[batch.mask].mul(27).round().int()
    assert sorted(found.tolist()) == [[0, 27], [18, 9]]


def write_mnist(root, **counts):
    """MNIST's files, black but for the first pixel."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        pixels = bytes([200] + [0] * 783) * count
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
    return raw


def test_mnist_files_are_read_and_split(tmp_path):
    raw = write_mnist(tmp_path, train=1002, t10k=3)
    test = load_test_digits(tmp_path, None)
    assert [len(part) for part in (*load_training_digits(tmp_path, None), test)] == [2, 1000, 3]
    assert [len(part) for part in load_training_digits(tmp_path, 1)] == [1, 1]
    assert test[0].elements[0].tolist() == [0, 0]
    plain = raw / "t10k-images-idx3-ubyte"
    plain.with_suffix(".gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert torch.equal(load_test_digits(tmp_path, None).data.elements, test.data.elements)
    with pytest.raises(SystemExit, match=r"--data: there is no file .*elsewhere/MNIST/raw/t10k-images-idx3-ubyte"):
        find_images(tmp_path / "elsewhere", "test")


@pytest.mark.skipif(not MNIST.is_dir(), reason="needs shared/data/mnist10k")
def test_real_digits_are_read():
    test = load_test_digits(MNIST, 100)
    counts = test.data.mask.sum(1)
    assert 20 < counts.min() < counts.float().mean() < counts.max() < 300
    middle = (test.data.elements * test.data.mask.unsqueeze(-1)).sum((0, 1)) / counts.sum()
    torch.testing.assert_close(middle, torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)  # digits are centred


@pytest.mark.parametrize(
    "content", [b"", b"text", struct.pack(">IIII", 2049, 1, 28, 28) + bytes(784), struct.pack(">IIII", 2051, 3, 28, 28)]
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_files_are_a_clear_error(tmp_path, content, suffix):
    write_mnist(tmp_path)
    (tmp_path / f"MNIST/raw/t10k-images-idx3-ubyte{suffix}").write_bytes(content)
    with pytest.raises(SystemExit, match=r"--data: .*t10k-images-idx3-ubyte.* is no whole file of MNIST's images"):
        load_test_digits(tmp_path, None)


def test_only_what_is_needed_is_read(tmp_path):
    """The test files alone to evaluate, the training files alone for --no-test; both otherwise, before anything."""
    write_mnist(tmp_path / "whole", train=1008, t10k=8)
    write_mnist(tmp_path / "test", t10k=8)
    write_mnist(tmp_path / "train", train=1008)
    mlp = ["--decoder", "mlp", "--data"]
    trained = start(tmp_path / "run", *mlp, str(tmp_path / "whole"))
    best = ["--evaluate", str(tmp_path / "run/best.pt")]
    found = start(tmp_path / "again", *best, "--data", str(tmp_path / "test"))
    assert found["test"] == trained["test"]
    assert found["data"] == f"MNIST files in {tmp_path / 'test'}"
    start(tmp_path / "tuning", *mlp, str(tmp_path / "train"), "--no-test")
    for out, given, part in [("run", best, "train"), ("new", mlp[:-1], "train"), ("new", mlp[:-1], "test")]:
        missing = "t10k" if part == "train" else "train"
        with pytest.raises(SystemExit, match=f"--data: there is no file .*{missing}-images"):
            start(tmp_path / out, *given, "--data", str(tmp_path / part))
    assert not (tmp_path / "new").exists()


def test_data_with_sets_of_another_size_is_refused(tmp_path):
    write_mnist(tmp_path, train=1008, t10k=8)
    start(tmp_path / "run", "--decoder", "mlp")
    with pytest.raises(SystemExit, match="--data: sets of 342 rows, where the checkpoint's have 32"):
        start(tmp_path / "again", "--evaluate", str(tmp_path / "run/best.pt"), "--data", str(tmp_path))
