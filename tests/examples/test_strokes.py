import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import strokes
from common.hanzi import load_characters, stroke_distance

SCRIPT = Path(__file__).parents[2] / "examples/strokes.py"
HANZI = SCRIPT.parents[2] / "shared/data/hanzi"
OUTLINE = {  # of hanzi-writer-data: 1024 wide, y upwards, the top at 900
    "strokes": ["M 0 388 L 1024 388 L 1024 900 L 0 900 Z", "M 0 -124 Q 512 100 1024 -124 Z"],
    "medians": [[[0, 900], [0, 388], [1024, 388]], [[512, -124], [512, 388]]],
}


def write_package(folder, count):
    folder.mkdir()
    for k in range(count):
        (folder / f"{chr(0x4E00 + k)}.json").write_text(json.dumps(OUTLINE))
    many = {"strokes": [OUTLINE["strokes"][0]] * 13, "medians": [OUTLINE["medians"][0]] * 13}
    (folder / "\u9f98.json").write_text(json.dumps(many))
    (folder / "package.json").write_text("{}")
    return folder


def test_outlines_of_the_package_are_read(tmp_path):
    characters = strokes.load_characters(write_package(tmp_path / "package", 3))
    assert characters.images.shape == (3, 1, 64, 64)  # not the one of 13 strokes
    assert characters.mask.sum(1).tolist() == [2, 2, 2]
    assert characters.images[0, 0, 1:31].min() == 1  # the upper half is ink
    assert characters.images[0, 0, 34:50].max() == 0
    # Half of its length down the left side, then twice as far to the right.
    expected = [[0, 0], [0, 0.375], [0.25, 0.5], [0.625, 0.5], [1, 0.5]]
    torch.testing.assert_close(characters.strokes[0, 0].view(5, 2), torch.tensor(expected))
    assert characters.strokes[0, 1].tolist() == [0.5, 1, 0.5, 0.875, 0.5, 0.75, 0.5, 0.625, 0.5, 0.5]
    assert characters.strokes[0, 2:].abs().max() == 0


@pytest.mark.filterwarnings("default")  # of a copied file, with nothing beside it
def test_quick_run_prints_the_table_and_draws(tmp_path):
    write_package(tmp_path / "package", 40)
    copy = shutil.copy(SCRIPT, tmp_path / "mine.py")
    few = tmp_path / "few.py"  # splits of few characters
    few.write_text(Path(copy).read_text().replace("TESTED = 500", "TESTED = 4"))
    command = [sys.executable, str(few), "--quick", "--data", "package", "--seconds", "0.01", "--seeds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row for row in rows if row.strip("-")] == ["decoder", "DSPN", "MLP", "LSTM"]
    assert "±" in done.stdout
    for picture in ("strokes.png", "steps.png"):
        assert (tmp_path / "out/strokes-quick" / picture).stat().st_size > 10_000


def test_mistakes_are_said_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(strokes, "side_by_side", lambda runs: pytest.fail("a training has begun"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="npm pack hanzi-writer-data"):
        strokes.main(["--data", str(tmp_path), "--out", str(tmp_path)])
    for arguments in (["--seeds", "0"], ["--seconds", "nan"], ["--out", str(tmp_path / "file")]):
        with pytest.raises(SystemExit):
            strokes.main(arguments)
        assert capsys.readouterr().err


def test_distance_is_that_of_the_panel():
    pred, target = torch.rand(2, 3, 10), torch.rand(2, 4, 10)
    assert torch.equal(strokes.stroke_distance(pred, target), stroke_distance(pred, target))


@pytest.mark.skipif(not HANZI.is_dir(), reason="needs shared/data/hanzi")
def test_characters_are_those_of_the_panel():
    mine, theirs = strokes.load_characters(HANZI), load_characters(HANZI.parent)
    assert torch.equal(mine.strokes, theirs.elements)
    assert torch.equal(mine.mask, theirs.mask)
    assert torch.equal((255 * mine.images[:50, 0]).round().byte(), theirs.images[:50, 0])
    with np.load(HANZI / "strokes.npz") as file:
        assert len(file["characters"]) == len(mine.mask)
