import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from clevr_boxes import ClevrBoxes
from common import engine
from common.clevr import ClevrDataset
from common.clevr_task import SceneStream
from common.engine import Predictions, run

pytestmark = pytest.mark.filterwarnings("default")

SMALL = [
    "--quick",
    "--device",
    "cpu",
    "--backbone",
    "small",
    "--size",
    "32",
    "--max-objects",
    "3",
    "--latent",
    "16",
    "--width",
    "8",
]


MINI = Path(__file__).parents[3] / "shared/data/clevr_mini"


def start(out, cache, *arguments):
    small = ["--quick", "--device", "cpu"] if "--evaluate" in arguments else SMALL
    run(ClevrBoxes(), [*small, "--cache", str(cache), "--out", str(out), *arguments])
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("decoder", ["recommended", "dspn", "mlp"])
def test_quick_run_reports_and_draws(tmp_path, decoder, capsys):
    steps = ["--eval-steps", "2", "4"] if decoder != "mlp" else []
    result = start(tmp_path / "run", tmp_path, "--decoder", decoder, *steps)
    assert list(result["test"]) == (["2", "4"] if steps else ["-"])
    printed = capsys.readouterr().out
    assert "rendered scenes, not CLEVR (32x32, up to 3 objects)" in printed
    assert "AP99" in printed
    assert (tmp_path / "run/boxes.png").stat().st_size > 10_000


def test_fresh_scenes_for_every_batch_resume_alike(tmp_path, monkeypatch):
    options = ["--decoder", "mlp", "--scenes", "0", "--no-test"]
    asked = []
    batch = SceneStream.batch
    monkeypatch.setattr(SceneStream, "batch", lambda self, k, device: asked.append(k) or batch(self, k, device))
    monkeypatch.setattr(engine, "FITTED_ON", 8)  # in batches of 4
    start(tmp_path / "a", tmp_path, *options, "--steps", "3")
    assert asked == [0, 1, 0, 1, 2]  # first those that the scaler sees
    start(tmp_path / "b", tmp_path, *options, "--steps", "2")
    start(tmp_path / "b", tmp_path, *options, "--steps", "3", "--resume")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_scenes_are_rendered_once_and_splits_are_disjoint(tmp_path):
    start(tmp_path / "a", tmp_path, "--decoder", "mlp", "--no-test")
    assert [file.name.split("-")[0] for file in (tmp_path / "rendered").iterdir()].count("test") == 0  # --no-test
    start(tmp_path / "tested", tmp_path, "--decoder", "mlp")
    files = sorted((tmp_path / "rendered").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    assert [file.name.split("-")[0] for file in files] == ["test", "train", "validation"]
    start(tmp_path / "b", tmp_path, "--decoder", "mlp", "--seed", "1")
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "rendered").iterdir())] == times
    boxes = torch.cat([torch.load(file, weights_only=True)["boxes"] for file in files]).flatten(1)
    assert len(boxes.unique(dim=0)) == len(boxes) == 20


def test_the_papers_network_needs_nothing_that_the_extra_does_not_bring(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    run(ClevrBoxes(), ["--quick", "--device", "cpu", "--cache", str(tmp_path), "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/config.json").read_text())["options"]["backbone"] == "resnet34"


@pytest.mark.skipif(not MINI.is_dir(), reason="needs shared/data/clevr_mini")
def test_checkpoint_is_evaluated_on_a_directory_with_only_val(tmp_path):
    trained = start(tmp_path / "run", tmp_path / "a", "--decoder", "mlp", "--max-objects", "10")
    evaluate = ["--evaluate", str(tmp_path / "run/best.pt")]
    val = tmp_path / "clevr"
    shutil.copytree(MINI / "images/val", val / "images/val")
    (val / "scenes").mkdir()
    shutil.copy(MINI / "scenes/CLEVR_val_scenes.json", val / "scenes")
    found = start(tmp_path / "other", tmp_path / "b", *evaluate, "--data", str(val))
    assert found["data"] == f"CLEVR files in {val}"
    assert found["test"] != trained["test"]
    more = start(tmp_path / "more", tmp_path / "c", *evaluate, "--test-scenes", "12")
    assert [file.name.split("-")[:2] for file in (tmp_path / "c/rendered").iterdir()] == [["test", "12"]]
    assert more["test"] != trained["test"]


@pytest.mark.skipif(not MINI.is_dir(), reason="needs shared/data/clevr_mini")
def test_data_with_more_objects_than_the_network_predicts_is_one_line(tmp_path):
    start(tmp_path / "run", tmp_path, "--decoder", "mlp")
    with pytest.raises(SystemExit, match=r"--data: max_objects: expected at most 3 objects, got \d+ in scene"):
        start(tmp_path / "other", tmp_path, "--evaluate", str(tmp_path / "run/best.pt"), "--data", str(MINI))


@pytest.mark.skipif(not MINI.is_dir(), reason="needs shared/data/clevr_mini")
def test_boxes_are_clipped_if_asked(tmp_path, monkeypatch):
    taken = []

    def take(*arguments, **options):
        taken.append((arguments[1], options["clip_boxes"]))
        return ClevrDataset(*arguments, **options)

    monkeypatch.setattr("common.clevr_task.ClevrDataset", take)
    data = ["--max-objects", "10", "--data", str(MINI)]
    start(tmp_path / "plain", tmp_path, "--decoder", "mlp", *data)
    start(tmp_path / "clipped", tmp_path, "--decoder", "mlp", *data, "--clip-boxes")
    start(tmp_path / "again", tmp_path, "--evaluate", str(tmp_path / "plain/best.pt"), "--clip-boxes")
    assert taken == [("train", False), ("val", False), ("train", True), ("val", True), ("val", True)]


def test_perfect_predictions_score_1():
    target = torch.tensor([[[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 0.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    scores = ClevrBoxes().score(Predictions(target, mask.float(), target, mask))
    assert scores.pop("hungarian") == 0
    assert list(scores.values()) == pytest.approx([1.0] * 11)
