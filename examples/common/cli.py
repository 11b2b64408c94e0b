"""The command line that all training scripts share: the options, and which of them go together.

An option that would not be used is an error, never ignored.
"""

import argparse
import inspect
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from common.arguments import changes, count, flags, not_negative, parse_given, positive, seed, whole
from common.checkpoint import load_best, load_origin
from common.decoders import DESCENT, EVAL_STEPS, PUBLISHED, add_decoder_arguments

BUDGET = ("epochs", "steps", "seconds")
# How a run is carried out, not what it computes: a run that is resumed or evaluated does not pass these on.
CARRIED_OUT = ("resume", "evaluate", "out", "device", "workers", "save_every", "tensorboard", "test")
# What may be given with --evaluate: how and where it is carried out, and, with options of the experiment, what is done.
EVALUATION = ("evaluate", "out", "device", "workers", "threads")
EVALUATED = ("quick", "eval_steps")
QUICK = {"batch_size": 4, "validations": 2, "epochs": None, "steps": 4}  # defaults of --quick
USED_BY = {  # the decoders that have a use for an option
    **dict.fromkeys(("inner_steps", "eval_steps", "set_encoder", "compile"), DESCENT),
    **dict.fromkeys(("inner_lr", "momentum"), tuple(PUBLISHED)),
}


class Described(Protocol):
    """What the command line is told about an experiment; the docstring of its module is the description."""

    name: str
    lr: float
    evaluated: Sequence[str]  # own options that may be given with --evaluate
    quick: Mapping[str, Any]  # defaults of own options with --quick

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the experiment's own options."""
        ...

    def check(self, options: argparse.Namespace, given: Mapping[str, Any]) -> None:
        """Refuse own options that would not be used, and data that is not there, of the parts that are needed."""
        ...

    def set_size(self, options: argparse.Namespace) -> int:
        """Rows of the sets."""
        ...


def make_parser(experiment: Described) -> argparse.ArgumentParser:
    """Make the parser of an experiment's script."""
    name = experiment.name
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=inspect.getdoc(inspect.getmodule(experiment)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to do")
    what.add_argument("--quick", action="store_true", help="a few steps on little data: shows that it runs")
    what.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out, if there is one; the options are those that the run began with",
    )
    what.add_argument(
        "--evaluate",
        type=Path,
        metavar="CHECKPOINT",
        help="evaluate it on the test split, with the options that it was trained with; only "
        f"{flags([*EVALUATION[1:], *EVALUATED, *experiment.evaluated])} may be given (default: train, then evaluate)",
    )
    budget = parser.add_argument_group("budget (one of them)").add_mutually_exclusive_group()
    budget.add_argument(
        "--epochs", type=positive, default=100.0, help="times through the training data (default, the papers': 100)"
    )
    budget.add_argument("--steps", type=count, help="training steps (default: by --epochs)")
    budget.add_argument(
        "--seconds",
        type=positive,
        help="training time without evaluation; with --threads 1 on the CPU, processor time, so that other work on the "
        "machine does not count (default: by --epochs)",
    )
    experiment.add_arguments(parser)
    add_decoder_arguments(parser)
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument(
        "--batch-size", type=count, default=32, metavar="B", help="of each process (default: %(default)s)"
    )
    optimisation.add_argument(
        "--lr", type=positive, default=experiment.lr, help="learning rate of Adam (default: %(default)s)"
    )
    optimisation.add_argument(
        "--schedule",
        choices=["constant", "cosine"],
        default="constant",
        help="of the learning rate, over the budget (default: %(default)s)",
    )
    optimisation.add_argument(
        "--seed", type=seed, default=0, help="of parameters and data order (default: %(default)s)"
    )
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--eval-steps",
        type=count,
        nargs="+",
        metavar="T",
        help="evaluate after these numbers of inner steps (default: "
        f"{'; '.join(f'{name} ' + ' '.join(map(str, steps)) for name, steps in EVAL_STEPS.items())})",
    )
    evaluation.add_argument(
        "--validations",
        type=count,
        metavar="K",
        help="how many over the budget (default: up to 20, as long as they are a tenth of the training's work)",
    )
    evaluation.add_argument(
        "--validate-on", type=count, metavar="N", help="only the first N of the validation split (default: all)"
    )
    evaluation.add_argument(
        "--no-test", dest="test", action="store_false", help="leave the test split alone, for tuning"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"what the run writes (default: out/{name}-DECODER-SEED; with --quick, out/{name}-DECODER-SEED-quick, "
        "which the next one writes over; with --evaluate, where the checkpoint is, or `evaluation` there if an option "
        "is given that changes what comes)",
    )
    output.add_argument(
        "--save-every",
        type=not_negative,
        default=60.0,
        metavar="SECONDS",
        help="time between checkpoints (default: %(default)g)",
    )
    output.add_argument("--tensorboard", action="store_true", help="write metrics for TensorBoard too, into --out")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto is CUDA where there is one (default: %(default)s)",
    )
    machine.add_argument(
        "--threads", type=count, metavar="N", help="CPU threads of a process (default: PyTorch's choice)"
    )
    machine.add_argument(
        "--workers", type=whole, default=0, metavar="N", help="processes that load data (default: %(default)s)"
    )
    machine.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the decoder (recommended, dspn, idspn; default: on CUDA)",
    )
    return parser


def parse(experiment: Described, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Parse a command line.

    Options come from the command line, then from the run that is resumed or evaluated, then from the defaults.

    Returns:
        The options, and with --evaluate the checkpoint.
    """
    parser = make_parser(experiment)
    given = parse_given(parser, arguments)
    checkpoint = None
    if "evaluate" in given:
        allowed = {*EVALUATION, *EVALUATED, *experiment.evaluated}
        if unused := [name for name in given if name not in allowed]:
            parser.error(f"--evaluate takes network and training from the checkpoint: leave out {flags(unused)}")
        checkpoint = load_best(given["evaluate"], experiment.name)
        _inherit(parser, checkpoint["options"], but=(*CARRIED_OUT, "quick"))
    if "quick" in given:
        parser.set_defaults(**QUICK, **experiment.quick)
    options = _complete(experiment, parser.parse_args(arguments), given)
    if "resume" in given and (options.out / "last.pt").exists():
        name, before = load_origin(options.out / "last.pt")
        if name != experiment.name:
            raise SystemExit(f"--resume: {options.out} holds a run of {name}, not {experiment.name}")
        _inherit(parser, before, but=CARRIED_OUT)
        options = _complete(experiment, parser.parse_args(arguments), given)
        fixed = {name: getattr(options, name) for name in given if name not in (*CARRIED_OUT, *BUDGET)}
        if changed := changes(before, fixed):
            raise SystemExit(f"--resume: the run in {options.out} was started with {changed}")
    for name, decoders in USED_BY.items():
        if given.get(name, False) is not False and options.decoder not in decoders:  # --no-compile is always true
            parser.error(f"{flags([name])} has no meaning with --decoder {options.decoder}")
    if options.tensorboard and find_spec("tensorboard") is None:
        raise SystemExit("--tensorboard: not installed: pip install tensorboard")
    experiment.check(options, given)
    if checkpoint is not None:
        size = experiment.set_size(argparse.Namespace(**checkpoint["options"]))
        if size != experiment.set_size(options):
            raise SystemExit(f"--data: sets of {experiment.set_size(options)} rows, where the checkpoint's have {size}")
    return options, checkpoint


def _inherit(parser: argparse.ArgumentParser, before: Mapping[str, Any], *, but: Sequence[str]) -> None:
    """Make the options of an earlier run the defaults; argparse turns text into paths again."""
    parser.set_defaults(**{name: value for name, value in before.items() if name not in but})


def _complete(experiment: Described, options: argparse.Namespace, given: Mapping[str, Any]) -> argparse.Namespace:
    """Fill in what depends on other options."""
    if any(name in given for name in BUDGET):
        vars(options).update({name: given.get(name) for name in BUDGET})
    options.eval_steps = sorted(set(options.eval_steps or EVAL_STEPS.get(options.decoder, ())))
    if options.out is None and options.evaluate is not None:
        options.out = options.evaluate.parent
        if given.keys() - set(EVALUATION):
            options.out /= "evaluation"
    elif options.out is None:
        quick = "-quick" if options.quick else ""
        options.out = Path("out") / f"{experiment.name}-{options.decoder}-{options.seed}{quick}"
    return options
