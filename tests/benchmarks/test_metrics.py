"""COCO's numbers beside pycocotools and torchmetrics: pytest tests/benchmarks/test_metrics.py -s

Processor time of one core, and medians of ratios over rounds in which all run one after the other.
"""

import contextlib
import io
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from setpred.metrics import CocoAveragePrecision
from tests.benchmarks.work import Function
from tests.metrics.test_coco import as_coco, random_images

IMAGES, PREDICTIONS, TARGETS, BATCH, ROUNDS = 200, 100, 8, 32, 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def processor_seconds(function: Function) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


@pytest.mark.parametrize("classes", [1, 80])
def test_coco_beside_pycocotools_and_torchmetrics(classes: int) -> None:
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    images = random_images(IMAGES, PREDICTIONS, TARGETS, classes, ties=False)
    batches = [{name: x[part] for name, x in images.items()} for part in torch.arange(IMAGES).split(BATCH)]
    truth, results = as_coco(images)
    numbers: dict[str, float] = {}

    def ours() -> None:
        metric = CocoAveragePrecision()
        for batch in batches:
            metric.update(**batch)
        numbers["ours"] = metric.compute()["AP"]

    def pycocotools() -> None:
        """The evaluation alone: its dictionaries have been made before."""
        with contextlib.redirect_stdout(io.StringIO()):
            run = evaluation.COCOeval(truth, results, "bbox")
            run.evaluate()
            run.accumulate()
            run.summarize()
        numbers["pycocotools"] = run.stats[0]

    def torchmetrics() -> None:
        detection = pytest.importorskip("torchmetrics.detection.mean_ap")
        metric = detection.MeanAveragePrecision()
        for b in range(IMAGES):
            found, there = images["pred_mask"][b], images["target_mask"][b]
            names = {"boxes": "pred", "scores": "score", "labels": "pred_class"}
            preds = {name: images[of][b][found] for name, of in names.items()}
            names = {"boxes": "target", "labels": "target_class", "area": "target_size", "iscrowd": "target_crowd"}
            metric.update([preds], [{name: images[of][b][there] for name, of in names.items()}])
        numbers["torchmetrics"] = metric.compute()["map"].item()

    others = {"pycocotools": pycocotools}
    with contextlib.suppress(ImportError):  # torchmetrics wants torchvision for it
        from torchmetrics.detection import MeanAveragePrecision  # noqa: F401

        others["torchmetrics"] = torchmetrics
    ours()
    times = np.array([[processor_seconds(run) for run in (ours, *others.values())] for _ in range(ROUNDS)])
    print(f"\n{IMAGES} images, {PREDICTIONS} predictions, {TARGETS} targets, {classes} classes, batches of {BATCH}:")
    print(f"  setpred {np.median(times[:, 0]):.3f} s")
    for k, name in enumerate(others, 1):
        low, middle, high = np.quantile(times[:, k] / times[:, 0], [0.1, 0.5, 0.9])
        print(f"  {name} {np.median(times[:, k]):.3f} s; ratio {middle:.2f} (10 % to 90 %: {low:.2f} to {high:.2f})")
        # torchmetrics makes its thresholds and recalls in single precision.
        assert numbers[name] == pytest.approx(numbers["ours"], abs=1e-9 if name == "pycocotools" else 1e-3)
        assert middle > 2
