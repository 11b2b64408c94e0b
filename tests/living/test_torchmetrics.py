"""torchmetrics: the metric of this library as a Metric, in a MetricCollection."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from setpred.metrics import AveragePrecision
from tests.living.common import make_batch


# [docs: metric
class SetAveragePrecision(Metric):
    """Keeps what it is given as list states, which torchmetrics gathers from all processes."""

    full_state_update = False

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        for name in ("elements", "scores", "targets", "masks"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, elements: Tensor, scores: Tensor, targets: Tensor, masks: Tensor) -> None:
        for name, value in zip(
            ("elements", "scores", "targets", "masks"), (elements, scores, targets, masks), strict=True
        ):
            getattr(self, name).append(value)

    def compute(self) -> Tensor:
        metric = AveragePrecision(torch.cdist, thresholds=[self.threshold], largest=False)
        elements, scores, targets, masks = (
            torch.cat(list(part)) for part in (self.elements, self.scores, self.targets, self.masks)
        )
        metric.update(elements, scores, targets, target_mask=masks)
        return metric.compute()[0]

    # docs]


def test_as_a_metric_and_beside_one() -> None:
    batches = [make_batch(seed=seed) for seed in range(3)]
    metric, loss = SetAveragePrecision(0.5), MeanMetric()
    plain = AveragePrecision(torch.cdist, thresholds=[0.5], largest=False)
    for _, target, mask in batches:
        elements, scores = target + 0.05 * torch.randn_like(target), torch.rand(mask.shape)
        metric.update(elements, scores, target, mask)
        plain.update(elements, scores, target, target_mask=mask)
        loss.update((elements - target).square().mean())
    assert 0 < metric.compute() <= 1
    assert metric.compute() == plain.compute()[0]
    assert loss.compute() > 0
    metric.reset()
    assert metric.elements == []
