"""The command line that all training scripts share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common.decoders import DESCENT, add_decoder_arguments

# Options that say how a run is carried out, not what it computes; they may change when it is resumed.
CARRIED_OUT = ("resume", "evaluate", "out", "device", "workers", "save_every", "tensorboard", "test")
EVALUATED = ("eval_steps", "eval_inner_lr", "eval_momentum")  # may be given with --evaluate
BUDGET = ("epochs", "steps", "seconds")


def make_parser(name: str, description: str, *, eval_steps: Sequence[int], lr: float) -> argparse.ArgumentParser:
    """Make a parser with every option that does not depend on the experiment."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    budget = parser.add_argument_group("budget (one of them)").add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help="times through the training data; default: 100, the papers'")
    budget.add_argument("--steps", type=int, help="training steps")
    budget.add_argument(
        "--seconds",
        type=float,
        help="training time without evaluation; with --threads 1 on the CPU, processor time, so that other work on the "
        "machine does not count",
    )
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--batch-size", type=int, default=32, metavar="B", help="per process; default: 32")
    optimisation.add_argument("--lr", type=float, default=lr, help=f"learning rate of Adam; default: {lr}")
    optimisation.add_argument(
        "--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate, over the budget"
    )
    optimisation.add_argument("--seed", type=int, default=0, help="of parameters and data order; default: 0")
    add_decoder_arguments(parser, eval_steps=eval_steps)
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="DIR", help=f"what the run writes; default: out/{name}-DECODER-SEED")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, if there is one")
    run.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="evaluate it on the test split, train nothing")
    run.add_argument("--no-test", dest="test", action="store_false", help="leave the test split alone (tuning)")
    run.add_argument("--validate-on", type=int, metavar="N", help="only the first N of the validation split")
    run.add_argument("--validations", type=int, default=20, metavar="K", help="how many over the budget; default: 20")
    run.add_argument(
        "--save-every", type=float, default=60.0, metavar="SECONDS", help="between checkpoints; default: 60"
    )
    run.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: auto")
    run.add_argument("--threads", type=int, metavar="N", help="CPU threads of a process; default: PyTorch's")
    run.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load data; default: 0")
    run.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the decoder; default: on CUDA"
    )
    run.add_argument("--tensorboard", action="store_true", help="write metrics for TensorBoard too, into --out")
    run.add_argument("--quick", action="store_true", help="a few steps on little data: shows that it runs")
    return parser


def parse(parser: argparse.ArgumentParser, name: str, arguments: list[str] | None) -> argparse.Namespace:
    """Parse, check what argparse cannot, and fill in what depends on other options."""
    options = parser.parse_args(arguments)
    positive = ("batch_size", "lr", "validations", "validate_on", "threads")
    positive += ("inner_steps", "inner_lr", "eval_inner_lr", "persistent")
    for option in (*BUDGET, *positive):
        value = getattr(options, option)
        if value is not None and not value > 0:
            parser.error(f"--{option.replace('_', '-')} must be positive, got {value}")
    if min(options.eval_steps) < 1:
        parser.error(f"--eval-steps must be at least 1, got {options.eval_steps}")
    meaning = {
        "inner_steps": DESCENT,
        "inner_lr": DESCENT,
        "momentum": DESCENT,
        "eval_inner_lr": DESCENT,
        "eval_momentum": DESCENT,
        "anchor": ("idspn",),
        "persistent": ("idspn",),
        "loss_steps": ("dspn",),
    }
    for option, decoders in meaning.items():
        if getattr(options, option) is not None and options.decoder not in decoders:
            parser.error(f"--{option.replace('_', '-')} has no meaning with --decoder {options.decoder}")
    if options.decoder not in DESCENT and options.compile:
        parser.error(f"--compile has no meaning with --decoder {options.decoder}")
    options.eval_steps = sorted(set(options.eval_steps))
    if options.quick:
        options.batch_size, options.validations = 4, 2
        if all(getattr(options, budget) is None for budget in BUDGET):
            options.steps = 4
    if all(getattr(options, budget) is None for budget in BUDGET):
        options.epochs = 100.0
    if options.out is None:
        options.out = Path("out") / f"{name}-{options.decoder}-{options.seed}"
    return options
