import json
import struct
import sys
from unittest import mock

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from common.checkpoint import load
from common.engine import Predictions, run
from common.mnist import load_mnist, points_of
from mnist_sets import MnistSets

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries that a script uses


def start(out, *arguments):
    run(MnistSets(), ["--quick", "--device", "cpu", "--latent", "8", "--width", "8", "--out", str(out), *arguments])
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("decoder", ["dspn", "idspn", "mlp", "lstm"])
def test_quick_run_reports_and_draws(tmp_path, decoder, capsys):
    steps = ["--eval-steps", "3", "5"] if decoder.endswith("dspn") else []
    result = start(tmp_path, "--decoder", decoder, *steps)
    assert list(result["test"]) == (["3", "5"] if steps else ["-"])
    printed = capsys.readouterr().out
    assert "Chamfer x 1000" in printed
    assert "scikit-learn's digits, not MNIST" in printed
    assert (tmp_path / "sets.png").stat().st_size > 10_000


def test_recipe_can_be_changed(tmp_path):
    start(tmp_path, "--decoder", "idspn", "--inner-steps", "2", "--momentum", "0", "--anchor", "0", "--inner-lr", "3")


def test_descent_can_be_changed_in_evaluation_alone(tmp_path):
    plain = ["--decoder", "idspn", "--momentum", "0.5", "--inner-lr", "3", "--eval-steps", "4"]
    trained = start(tmp_path / "plain", *plain)
    again = ["--evaluate", str(tmp_path / "plain/best.pt"), "--out", str(tmp_path / "again")]
    assert start(tmp_path / "again", *again)["test"] == trained["test"]
    changed = start(tmp_path / "again", *again, "--eval-momentum", "0.9", "--eval-inner-lr", "6")
    assert changed["test"] != trained["test"]
    other = start(tmp_path / "other", *plain, "--eval-momentum", "0.9", "--eval-inner-lr", "6")
    assert other["test"] == changed["test"]  # the training was the same


@pytest.mark.parametrize("count", [1, 3])
def test_persistent_descents_go_on_after_a_stop(tmp_path, count):
    options = ["--decoder", "idspn", "--inner-steps", "2", "--inner-lr", "3", "--persistent", str(count)]
    start(tmp_path / "undisturbed", *options, "--steps", "9")
    start(tmp_path / "stopped", *options, "--steps", "5")
    start(tmp_path / "stopped", *options, "--steps", "9", "--resume")
    found, expected = (load(tmp_path / name / "last.pt") for name in ("stopped", "undisturbed"))
    torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=0)
    assert len(expected["descents"][0]) == (count if count > 1 else 0)


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


def test_mnist_files_are_read_and_split(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 1002), ("t10k", 3)):
        pixels = bytes([200] + [0] * 783) * count
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(count))
    splits = load_mnist(tmp_path)
    assert [len(part) for part in splits] == [2, 1000, 3]
    assert splits.test[0].elements[0].tolist() == [0, 0]
    with pytest.raises(SystemExit, match="expected MNIST's files in"):
        load_mnist(tmp_path / "elsewhere")


def test_data_without_torchvision_is_a_clear_error(tmp_path):
    absent = mock.patch.dict(sys.modules, {"torchvision": None, "torchvision.datasets": None})
    with absent, pytest.raises(SystemExit, match="needs a torchvision"):
        load_mnist(tmp_path)
