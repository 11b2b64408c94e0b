"""Training curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


def draw_curves(lines: Sequence[Mapping[str, Any]], score: str, title: str, path: Path) -> None:
    """Draw the training loss and the validation score, the latter once for each number of inner steps.

    Args:
        lines: The run's metrics.
        score: Name of the score.
        title: What the data is.
        path: Where to write the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    losses = [line for line in lines if "loss" in line]
    left.plot([line["step"] for line in losses], [line["loss"] for line in losses], color="0.3", linewidth=1)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    validations = [line for line in lines if "validation" in line]
    for steps in validations[-1]["validation"] if validations else ():
        values = [line["validation"][steps][score] for line in validations]
        label = None if steps == "-" else f"{steps} inner steps"
        right.plot([line["step"] for line in validations], values, marker="o", markersize=3, linewidth=1, label=label)
        if label:
            right.legend(fontsize=8, frameon=False)
    right.set(xlabel="step", ylabel=f"validation {score}")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_comparison(
    curves: Mapping[str, Sequence[Sequence[tuple[int, float, float]]]], score: str, title: str, path: Path
) -> None:
    """Draw the validation score of several decoders against training time and steps, a line for each run.

    Args:
        curves: Decoder -> its runs, each a list of (step, seconds, score).
        score: Name of the score.
        title: What the data is.
        path: Where to write the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for i, (decoder, runs) in enumerate(curves.items()):
        for k, points in enumerate(runs):
            steps, seconds, scores = zip(*points, strict=True)
            left.plot(seconds, scores, color=f"C{i}", linewidth=1, label=None if k else decoder)
            right.plot(steps, scores, color=f"C{i}", linewidth=1)
    left.set(xlabel="training seconds", ylabel=f"validation {score}", yscale="log")
    right.set(xlabel="training steps", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:,.0f}")
    right.xaxis.set_minor_formatter(NullFormatter())
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
