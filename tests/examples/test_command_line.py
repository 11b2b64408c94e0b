"""The command lines of the training scripts: nothing that is given is ignored, and what is wrong is said at once."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import torch
from clevr_boxes import ClevrBoxes
from clevr_state import ClevrState
from common import requirements
from common.checkpoint import save
from common.cli import make_parser, parse
from common.decoders import make_decoder
from mnist_sets import MnistSets

from setpred import PooledEncoder

EXPERIMENTS = {experiment.name: experiment for experiment in (MnistSets(), ClevrState(), ClevrBoxes())}
ROOT = Path(__file__).parents[2]
MINI = ROOT.parent / "shared/data/clevr_mini"
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
PACKAGES = ("accelerate", "matplotlib", "sklearn", "tqdm")
NEEDED = {"quickstart": PACKAGES[1:], "losses_in_detr": PACKAGES[3:], "strokes": PACKAGES[1::2]}  # by the others, all
OPTIONS = {  # each with a value
    option.split()[0]: option.split()[1:]
    for option in """
        quick; resume; evaluate CHECKPOINT; epochs 7; steps 7; seconds 7; data DATA; size 7; max-objects 7; scenes 7
        test-scenes 7; cache CACHE; clip-boxes; backbone small; set-encoder pooled; latent 7; width 7; bf16
        decoder idspn; inner-steps 7; inner-lr 7; momentum 0.7; batch-size 7
        lr 7; schedule cosine; seed 7; eval-steps 7 8; validations 7; validate-on 7
        no-test; out OUT; save-every 7; tensorboard; device cpu; threads 7; workers 7; compile
    """.replace("\n", ";").split(";")
    if option.strip()
}
HONOURED = {  # with --evaluate
    *("evaluate", "out", "device", "workers", "threads", "quick", "eval-steps"),
    *("data", "test-scenes", "cache", "clip-boxes", "bf16"),
}


def actions(experiment):
    found = make_parser(experiment)._actions
    return {action.option_strings[0].removeprefix("--"): action for action in found if action.dest != "help"}


def checkpoint(experiment, path, *arguments):
    """A checkpoint with the options of a training."""
    options, _ = parse(experiment, list(arguments))
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    save(path, {"experiment": experiment.name, "options": plain, "model": {}})
    return ["--evaluate", str(path)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


each = pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)


@each
def test_evaluate_refuses_what_it_does_not_use_and_uses_the_rest(experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(experiment), "check", lambda *_: None)
    monkeypatch.setattr(type(experiment), "set_size", lambda *_: 1)
    evaluate = checkpoint(experiment, tmp_path / "best.pt")
    capsys.readouterr()
    for name, action in actions(experiment).items():
        given = [f"--{name}", *OPTIONS[name]]
        if name not in HONOURED:
            with pytest.raises(SystemExit):
                parse(experiment, [*evaluate, *given])
            assert f"leave out --{name}\n" in capsys.readouterr().err
        elif name != "evaluate":
            value = getattr(parse(experiment, [*evaluate, *given])[0], action.dest)
            assert value != action.default or name == "workers"
            expected = getattr(make_parser(experiment).parse_args(given), action.dest)
            assert value == expected
    with pytest.raises(SystemExit):
        parse(experiment, [*evaluate, "--lr", "7", "--data", "DATA", "--epochs", "7"])
    assert "leave out --lr, --epochs\n" in capsys.readouterr().err


@each
def test_evaluate_has_the_options_of_the_training(experiment, tmp_path):
    training = ["--decoder", "dspn", "--inner-lr", "3", "--latent", "7", "--steps", "9", "--threads", "2", "--no-test"]
    training += ["--eval-steps", "4", "6", "--quick", "--out", "run", "--workers", "3"]
    options, found = parse(experiment, checkpoint(experiment, tmp_path / "best.pt", *training))
    assert found["experiment"] == experiment.name
    assert (options.inner_lr, options.latent, options.threads, options.eval_steps) == (3, 7, 2, [4, 6])
    # But not how it was carried out.
    assert (options.out, options.workers, options.quick, options.test) == (tmp_path, 0, False, True)


def test_data_of_the_checkpoint_is_a_path_again(tmp_path, monkeypatch):
    monkeypatch.setattr(MnistSets, "check", lambda *_: None)
    options, _ = parse(
        EXPERIMENTS["mnist_sets"], checkpoint(EXPERIMENTS["mnist_sets"], tmp_path / "c.pt", "--data", "d")
    )
    assert options.data == Path("d")


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04 and more", None, {"weight": torch.ones(2)}, torch.ones(2)]
)
def test_file_that_is_no_checkpoint_is_a_clear_error(content, tmp_path):
    path = tmp_path / "best.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit, match=rf"--evaluate: .*{path}") as error:
        parse(EXPERIMENTS["mnist_sets"], ["--evaluate", str(path)])
    assert "\n" not in str(error.value)


def test_run_of_another_experiment_is_not_resumed(tmp_path):
    checkpoint(EXPERIMENTS["mnist_sets"], tmp_path / "last.pt")
    with pytest.raises(SystemExit, match=r"--resume: .* holds a run of mnist_sets, not clevr_boxes"):
        parse(EXPERIMENTS["clevr_boxes"], ["--resume", "--out", str(tmp_path)])


@each
def test_quick_is_small_unless_told_otherwise(experiment):
    options, _ = parse(experiment, ["--quick"])
    assert (options.batch_size, options.steps, options.epochs, options.validations) == (4, 4, None, 2)
    assert options.out == Path(f"out/{experiment.name}-recommended-0-quick")
    options, _ = parse(experiment, ["--quick", "--batch-size", "5", "--seconds", "3", "--validations", "7"])
    assert (options.batch_size, options.steps, options.seconds, options.validations) == (5, None, 3, 7)
    assert parse(experiment, [])[0].out == Path(f"out/{experiment.name}-recommended-0")
    if "scenes" in actions(experiment):
        options, _ = parse(experiment, ["--quick"])
        assert (options.scenes, options.test_scenes) == (8, 8)
        options, _ = parse(experiment, ["--quick", "--scenes", "0", "--test-scenes", "5"])
        assert (options.scenes, options.test_scenes) == (0, 5)


PAPERS = ("inner-lr", "momentum")
BASELINE = (*PAPERS, "inner-steps", "set-encoder", "compile", "eval-steps")


@pytest.mark.parametrize(
    ("decoder", "unused"), [("recommended", PAPERS), ("dspn", ()), ("idspn", ()), ("mlp", BASELINE), ("lstm", BASELINE)]
)
def test_options_that_a_decoder_has_no_use_for_are_refused(decoder, unused, capsys):
    experiment = EXPERIMENTS["clevr_boxes"]
    for name in actions(experiment):
        if name in ("evaluate", "decoder", "tensorboard", "data", "clip-boxes"):
            continue
        arguments = ["--decoder", decoder, f"--{name}", *OPTIONS[name]]
        if name in unused:
            with pytest.raises(SystemExit):
                parse(experiment, arguments)
            assert f"--{name} has no meaning with --decoder {decoder}\n" in capsys.readouterr().err
        else:
            parse(experiment, arguments)
    parse(experiment, ["--decoder", decoder, "--no-compile"])  # true of all


@pytest.mark.parametrize("name", ["clevr_boxes", "clevr_state"])
def test_options_of_other_data_are_refused(name, tmp_path):
    for part in ("images/train", "images/val", "scenes"):
        (tmp_path / part).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"scenes/CLEVR_{split}_scenes.json").touch()
    experiment, data = EXPERIMENTS[name], ["--data", str(tmp_path)]
    parse(experiment, data)
    for option in ("scenes", "test-scenes"):
        with pytest.raises(SystemExit, match=f"--{option} has no meaning with --data"):
            parse(experiment, [*data, f"--{option}", "7"])
    with pytest.raises(SystemExit, match="--scenes 0 has no epochs: give --steps or --seconds"):
        parse(experiment, ["--scenes", "0"])
    parse(experiment, ["--scenes", "0", "--steps", "3"])
    if name == "clevr_boxes":
        with pytest.raises(SystemExit, match="--clip-boxes has no meaning without --data"):
            parse(experiment, ["--clip-boxes"])
        assert parse(experiment, [*data, "--clip-boxes"])[0].clip_boxes
    else:
        assert "clip-boxes" not in actions(experiment)


@pytest.mark.parametrize("name", ["clevr_boxes", "clevr_state"])
def test_clevr_directory_is_looked_at_before_anything_else(name, tmp_path):
    experiment, data = EXPERIMENTS[name], tmp_path / "clevr"
    (data / "images/val").mkdir(parents=True)
    (data / "scenes").mkdir()
    (data / "scenes/CLEVR_val_scenes.json").touch()
    evaluate = checkpoint(experiment, tmp_path / "best.pt")
    parse(experiment, [*evaluate, "--data", str(data)])  # only "val" is needed
    with pytest.raises(SystemExit, match=r"^--data: expected the directory images/train in "):
        parse(experiment, ["--data", str(data)])
    with pytest.raises(SystemExit, match=r"--data: .*expected the directory images/train in .*no such directory"):
        parse(experiment, ["--data", "nowhere"])
    (data / "images/val").rename(data / "images/train")
    (data / "scenes/CLEVR_val_scenes.json").rename(data / "scenes/CLEVR_train_scenes.json")
    parse(experiment, ["--data", str(data), "--no-test"])
    for arguments in ([*evaluate, "--data", str(data)], ["--data", str(data)]):
        with pytest.raises(SystemExit, match=r"--data: .*expected the directory images/val in "):
            parse(experiment, arguments)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"--cache: .*file"):
        parse(experiment, ["--cache", str(tmp_path / "file")])


def test_tensorboard_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(SystemExit, match="--tensorboard: not installed: pip install tensorboard"):
        parse(EXPERIMENTS["mnist_sets"], ["--tensorboard"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_does_and_every_default(script):
    command = [sys.executable, str(ROOT / f"examples/{script}.py"), "--help"]
    environment = os.environ | {"COLUMNS": "1000"}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    module = importlib.util.spec_from_file_location(script, command[1])
    docstring = module.loader.get_source(script).split('"""')[1]
    usage, description = shown.split("\n\n", 1)
    assert len(usage.splitlines()) == 1
    assert description.startswith(docstring.splitlines()[0])
    assert f"python examples/{script}.py" in description
    options = [text.split("\n\n")[0] for text in re.split(r"\n  (?=-)", description[len(docstring) :])[1:]]
    assert len(options) >= 4
    for option in options:
        flag = re.match(r"(-h, )?--[a-z0-9-]+(?!, )(  |\n)", option)  # without a value: off
        assert flag or re.search(r"default(: |, )|\(required\)", option), option
        assert "None" not in option


def test_defaults_of_the_recipes_in_the_help_are_true():
    shown = {name: action.help for name, action in actions(EXPERIMENTS["mnist_sets"]).items()}
    for decoder in ("recommended", "dspn", "idspn"):
        options = argparse.Namespace(decoder=decoder, inner_steps=None, inner_lr=None, momentum=None)
        made = make_decoder(options, PooledEncoder(2, 4, 4), None, set_size=3, channels=2)
        true = {"inner-steps": made.iters}
        if decoder != "recommended":
            true |= {"inner-lr": made.lr.lr, "momentum": made.lr.momentum}
        for name, value in true.items():
            assert re.search(rf"\b{decoder}( and idspn)?(, Nesterov's)?, default: {value:g}\b", shown[name]) or (
                decoder == "idspn" and f"and idspn, default: {value:g})" in shown[name]
            ), name


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("package", [*PACKAGES, "torch"])
def test_missing_package_is_one_line_at_once(script, package, tmp_path):
    """Together with torch, which takes the longest: so it has not been imported before."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{package}'] = sys.modules['torch'] = None\n")
    command = [sys.executable, str(ROOT / f"examples/{script}.py"), "--quick"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    missing = {"torch", *({package} & {*NEEDED.get(script, PACKAGES)})}
    assert done.returncode == 1
    assert done.stderr.startswith(f"not installed: {', '.join(sorted(missing))};")
    assert 'pip install -e ".[examples]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_packages_are_those_of_the_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "setpred[plot]" in extras["examples"]
    extra = {*extras["examples"], *extras["plot"]} - {"setpred[plot]"}
    names = {re.split(r"\W*>=", package)[0].replace("scikit-learn", "sklearn") for package in extra}
    assert {"setpred", "torch", *names} == set(requirements.PACKAGES) == {"setpred", "torch", *PACKAGES}
