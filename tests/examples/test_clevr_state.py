import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from clevr_state import ClevrState
from common.engine import Predictions, run
from common.state_pictures import describe

pytestmark = pytest.mark.filterwarnings("default")

MINI = Path(__file__).parents[3] / "shared/data/clevr_mini"
SMALL = ["--quick", "--device", "cpu", "--backbone", "small", "--size", "32", "--latent", "16", "--width", "8"]


def start(out, cache, *arguments):
    run(ClevrState(), [*SMALL, "--cache", str(cache), "--out", str(out), *arguments])
    return json.loads((out / "result.json").read_text())


@pytest.mark.parametrize("decoder", ["idspn", "lstm"])
def test_quick_run_reports_and_draws(tmp_path, decoder, capsys):
    steps = ["--eval-steps", "2", "4"] if decoder == "idspn" else []
    result = start(tmp_path / "run", tmp_path, "--decoder", decoder, "--max-objects", "3", *steps)
    assert list(result["test"]) == (["2", "4"] if steps else ["-"])
    printed = capsys.readouterr().out
    assert "rendered scenes, not CLEVR (32x32, up to 3 objects)" in printed
    assert "AP0.125" in printed
    assert (tmp_path / "run/states.png").stat().st_size > 10_000


@pytest.mark.skipif(not MINI.is_dir(), reason="needs shared/data/clevr_mini")
def test_clevr_directory_is_taken(tmp_path):
    result = start(tmp_path / "run", tmp_path, "--decoder", "mlp", "--data", str(MINI))
    assert result["data"] == f"CLEVR files in {MINI}"


def test_objects_are_described():
    element = torch.zeros(18)
    element[:3] = torch.tensor([0.5, -0.25, 0.1])
    element[[4, 9, 13 + 1, 16 + 1]] = 1.0  # metal, red, cube, small
    words = {"position": " 1.50 -0.75  0.30", "size": "small", "color": "red", "material": "metal", "shape": "cube"}
    assert describe(element) == words


def test_perfect_predictions_score_1_and_a_wrong_colour_less():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 2, 18, generator=generator)
    mask = torch.ones(3, 2, dtype=torch.bool)
    scores = ClevrState().score(Predictions(target, mask.float(), target, mask))
    assert scores.pop("hungarian") == pytest.approx(0, abs=1e-7)
    assert list(scores.values()) == pytest.approx([1.0] * 6)
    wrong = target.clone()
    wrong[0, 0, 5:13] = wrong[0, 0, 5:13].roll(1)
    assert ClevrState().score(Predictions(wrong, mask.float(), target, mask))["mean AP"] < 1
