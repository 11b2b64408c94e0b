import json

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from clevr_boxes import ClevrBoxes
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


def start(out, cache, *arguments):
    run(ClevrBoxes(), [*SMALL, "--cache", str(cache), "--out", str(out), *arguments])
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("decoder", ["dspn", "mlp"])
def test_quick_run_reports_and_draws(tmp_path, decoder, capsys):
    steps = ["--eval-steps", "2", "4"] if decoder == "dspn" else []
    result = start(tmp_path / "run", tmp_path, "--decoder", decoder, *steps)
    assert list(result["test"]) == (["2", "4"] if steps else ["-"])
    printed = capsys.readouterr().out
    assert "rendered scenes, not CLEVR (32x32, up to 3 objects)" in printed
    assert "AP99" in printed
    assert (tmp_path / "run/boxes.png").stat().st_size > 10_000


def test_fresh_scenes_for_every_batch_resume_alike(tmp_path):
    options = ["--decoder", "mlp", "--scenes", "0", "--no-test"]
    start(tmp_path / "a", tmp_path, *options, "--steps", "3")
    start(tmp_path / "b", tmp_path, *options, "--steps", "2")
    start(tmp_path / "b", tmp_path, *options, "--steps", "3", "--resume")
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in "ab")
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_scenes_are_rendered_once_and_splits_are_disjoint(tmp_path):
    start(tmp_path / "a", tmp_path, "--decoder", "mlp", "--no-test")
    files = sorted((tmp_path / "rendered").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    assert [file.name.split("-")[0] for file in files] == ["test", "train", "validation"]
    start(tmp_path / "b", tmp_path, "--decoder", "mlp", "--no-test", "--seed", "1")
    assert [file.stat().st_mtime_ns for file in sorted((tmp_path / "rendered").iterdir())] == times
    boxes = torch.cat([torch.load(file, weights_only=True)["boxes"] for file in files]).flatten(1)
    assert len(boxes.unique(dim=0)) == len(boxes) == 20


def test_perfect_predictions_score_1():
    target = torch.tensor([[[0.1, 0.1, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.0, 0.0, 0.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    scores = ClevrBoxes().score(Predictions(target, mask.float(), target, mask))
    assert scores.pop("hungarian") == 0
    assert list(scores.values()) == pytest.approx([1.0] * 11)
