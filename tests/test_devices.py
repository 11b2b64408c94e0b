"""Everything public follows the device and the dtype of its inputs and parameters, whatever PyTorch's defaults are.

Without a GPU at hand: on `meta`, and on fake tensors of a device that is not the CPU, which have no values but refuse
to meet tensors of another device. With one, the tests of every folder run on it too (`tests/conftest.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import setpred
from setpred import (
    AttentionEncoder,
    ChamferLoss,
    DSPNDecoder,
    DSPNLoss,
    FSPool,
    FSUnpool,
    GradientDescent,
    HungarianLoss,
    LSTMDecoder,
    MLPDecoder,
    PolyakDescent,
    PooledEncoder,
    RelationEncoder,
    RepresentationLoss,
    SinkhornLoss,
    SlicedWassersteinLoss,
    SlotDecoder,
    StandardScaler,
    TransformerDecoder,
    functional,
    metrics,
    pad_sets,
    unpad_sets,
)
from tests.rules import paper_decoder

Call = tuple[partial[Any], tuple[Any, ...]]
Case = Callable[[], Call]  # makes modules and inputs

# A device of which nothing has to be there: fake tensors on "cuda" cannot go backward where PyTorch finds no GPU.
ELSEWHERE = "lazy"


def presence(*shape: int) -> Tensor:
    """A mask with holes in it."""
    return torch.arange(shape[0] * shape[1]).view(shape) % 3 != 1


def called(function: Callable[..., Any], *inputs: Any, **options: Any) -> Call:
    return partial(function, **options), inputs


def pool(*, relaxed: float | None = None) -> Case:
    return lambda: called(FSPool(3, relaxed=relaxed), torch.rand(2, 5, 3), presence(2, 5), return_permutation=True)


def unpool(vector: Tensor, elements: Tensor, weight: Tensor) -> Tensor:
    return functional.sort_unpool(vector, functional.sort_pool(elements, weight)[1], weight)


def encoder(cls: type[nn.Module], kind: str, **options: Any) -> Case:
    return lambda: called(cls(3, 8, 16, pool=kind, **options), torch.rand(2, 5, 3), torch.rand(2, 5))


def dspn(preset: str = "paper", **options: Any) -> Case:
    def make() -> Call:
        build = getattr(DSPNDecoder, preset)
        decoder = build(PooledEncoder(3, 8, 16), set_size=5, channels=3, **{"iters": 3, "lr": 1.0} | options)
        return called(decoder, torch.randn(2, 8), record=True)

    return make


def fitted(elements: Tensor, mask: Tensor) -> Tensor:
    return StandardScaler(3, device=elements.device, dtype=elements.dtype).fit(elements, mask)(elements)


def scaled() -> Call:
    """A decoder and losses with a scaler, which is set by hand: fitting looks at values."""
    scaler = StandardScaler(3)
    scaler.location.fill_(2)
    decoder = paper_decoder(
        PooledEncoder(3, 8, 16), 3, 1.0, set_size=5, channels=3, scaler=scaler, project=lambda x, mask: (x.relu(), mask)
    )
    loss = DSPNLoss(decoder.encoder, ChamferLoss(), scaler=scaler)
    return called(lambda z, y, m: loss(decoder(z), y, m, z=z), torch.randn(2, 8), torch.rand(2, 5, 3), presence(2, 5))


def sets() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.rand(2, 5, 3), torch.rand(2, 4, 3), torch.rand(2, 5), presence(2, 4)


def matched() -> tuple[Tensor, Tensor]:
    """Classes of targets (3, 4), and matchings (2, 3, 5) with them."""
    return torch.arange(12).view(3, 4) % 3, torch.arange(30).view(2, 3, 5) % 5 - 1


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        encoder = PooledEncoder(3, 8, 16)
        self.decoder, self.loss = (
            paper_decoder(encoder, 3, 1.0, set_size=5, channels=3),
            DSPNLoss(encoder, HungarianLoss()),
        )

    def forward(self, z: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
        return self.loss(self.decoder(z), target, target_mask, z=z)


def measured(make: Callable[[], metrics.AveragePrecision], channels: int) -> Call:
    def run(*batch: Tensor) -> tuple[Tensor, Tensor]:
        metric = make()
        before = metric.compute()
        *first, mask = batch
        metric.update(*first, target_mask=mask)
        return before, metric.compute()

    target = torch.rand(2, 4, channels)
    return called(run, torch.cat([target, target], 1), torch.rand(2, 8), target, presence(2, 4))


def of_coco() -> Call:
    def run(boxes: Tensor, score: Tensor, classes: Tensor) -> Tensor:
        metric = metrics.CocoAveragePrecision()
        metric.update(boxes, score, classes, boxes, classes)
        return torch.tensor(list(metric.compute().values()), dtype=torch.float64, device=boxes.device)

    classes = presence(2, 4).long()
    return called(run, torch.rand(2, 4, 4), torch.rand(2, 4), classes)


# By public name, and what is particular to the case after a comma.
CASES: dict[str, Case] = {
    "StandardScaler": lambda: called(StandardScaler(3), torch.rand(2, 5, 3), presence(2, 5)),
    "StandardScaler, inverse": lambda: called(StandardScaler(3).inverse, torch.rand(2, 5, 3), presence(2, 5)),
    "StandardScaler, fit": lambda: called(fitted, torch.rand(2, 5, 3), presence(2, 5)),
    "FSPool": pool(),
    "FSPool, relaxed": pool(relaxed=0.5),
    "FSUnpool": lambda: called(FSUnpool(3), torch.rand(2, 3), torch.rand(2, 5, 3).argsort(1)),
    **{f"PooledEncoder, {kind}": encoder(PooledEncoder, kind) for kind in ("fspool", "sum", "mean", "max")},
    "PooledEncoder, size": encoder(PooledEncoder, "fspool", size_feature=True),
    "PooledEncoder, no mask": lambda: called(PooledEncoder(3, 8, 16, size_feature=True), torch.rand(2, 5, 3)),
    "RelationEncoder": encoder(RelationEncoder, "fspool", size_feature=True),
    "AttentionEncoder": lambda: called(AttentionEncoder(3, 8, 16), torch.rand(2, 5, 3), torch.rand(2, 5)),
    "AttentionEncoder, points": lambda: called(
        AttentionEncoder(3, 8, 16, inducing_points=2, pool="attention"), torch.rand(2, 5, 3), presence(2, 5)
    ),
    "DSPNDecoder, paper": dspn(),
    "DSPNDecoder, idspn": dspn("idspn"),
    "DSPNDecoder, no mask": dspn(mask_clamp=None),
    "DSPNDecoder, random": dspn(init="random"),
    "DSPNDecoder, scaler": scaled,
    "DSPNDecoder, tol": dspn(tol=0.1),
    "DSPNDecoder, checkpoint": dspn(checkpoint=True),
    "DSPNDecoder, project": dspn(
        "idspn",
        differentiate="unrolled",
        lr=GradientDescent(1.0, 0.9, True, 0.1),
        project=lambda x, mask: (x.clamp(0, 1), mask),
    ),
    "MLPDecoder": lambda: called(MLPDecoder(8, 5, 3, 16), torch.randn(2, 8)),
    "MLPDecoder, no mask": lambda: called(MLPDecoder(8, 5, 3, 16, mask_clamp=None), torch.randn(2, 8)),
    "LSTMDecoder": lambda: called(LSTMDecoder(8, 5, 3, 16), torch.randn(2, 8)),
    **{
        f"TransformerDecoder, {queries}": lambda queries=queries: called(
            TransformerDecoder(8, 5, 3, 16, layers=2, queries=queries), torch.randn(2, 4, 8), presence(2, 4)
        )
        for queries in ("learned", "random", "top-n")
    },
    "TransformerDecoder, vector": lambda: called(TransformerDecoder(8, 5, 3, 16, layers=2), torch.randn(2, 8)),
    **{
        f"SlotDecoder, {attention}, {way}": lambda attention=attention, way=way: called(
            SlotDecoder(8, 5, 3, 16, attention=attention, differentiate=way), torch.randn(2, 6, 8), presence(2, 6)
        )
        for attention in ("softmax", "sinkhorn", "mesh")
        for way in ("unrolled", "implicit")
    },
    "SlotDecoder, vectors": lambda: called(SlotDecoder(8, 5, 3, 16, tokens=4), torch.randn(2, 8)),
    **{
        f"{name}, {kind}": lambda loss=loss, kind=kind: called(loss(presence=kind), *sets())
        for name, loss in {"HungarianLoss": HungarianLoss, "ChamferLoss": ChamferLoss}.items()
        for kind in ("feature", "bce", "logits", "none")
    },
    **{
        f"SinkhornLoss, {kind}": lambda kind=kind: called(SinkhornLoss(iters=5, presence=kind), *sets())
        for kind in ("feature", "none")
    },
    **{
        f"SlicedWassersteinLoss, {kind}": lambda kind=kind: called(
            SlicedWassersteinLoss(directions=torch.eye(4 if kind == "feature" else 3), presence=kind), *sets()
        )
        for kind in ("feature", "none")
    },
    "sliced_wasserstein_loss": lambda: called(setpred.sliced_wasserstein_loss, *sets(), directions=torch.eye(4)),
    "hungarian_loss": lambda: called(setpred.hungarian_loss, *sets(), return_matching=True),
    "chamfer_loss": lambda: called(setpred.chamfer_loss, *sets()[:2]),
    "earth_mover_distance": lambda: called(setpred.earth_mover_distance, *sets()[:2]),
    "sinkhorn_loss": lambda: called(setpred.sinkhorn_loss, *sets()[:2], debias=False, iters=5),
    "sinkhorn_loss, transport": lambda: called(setpred.sinkhorn_loss, *sets(), iters=5, return_transport=True),
    "RepresentationLoss": lambda: called(RepresentationLoss(), torch.rand(2, 8), torch.rand(2, 8)),
    "representation_loss": lambda: called(setpred.representation_loss, torch.rand(2, 8), torch.rand(2, 8), kind="mse"),
    "DSPNLoss": lambda: called(Outer(), torch.randn(2, 8), torch.rand(2, 5, 3), presence(2, 5)),
    **{
        type(rule).__name__: lambda rule=rule: called(
            functional.descend, lambda y: y.square().sum(1), torch.rand(2, 3), steps=3, lr=rule
        )
        for rule in (GradientDescent(0.1, momentum=0.5, grad_clip=0.5), PolyakDescent())
    },
    "pad_sets": lambda: called(lambda *some: pad_sets(some, 4), torch.rand(3, 2), torch.rand(1, 2)),
    "unpad_sets": lambda: called(unpad_sets, torch.rand(2, 5, 3), presence(2, 5)),
    "argsort_descending": lambda: called(functional.argsort_descending, torch.rand(2, 5)),
    "piecewise_linear": lambda: called(functional.piecewise_linear, torch.rand(3, 4), torch.rand(3, 5)),
    "sort_pool": lambda: called(functional.sort_pool, torch.rand(2, 5, 3), torch.rand(3, 4)),
    "sort_pool, soft": lambda: called(functional.sort_pool, torch.rand(2, 5, 3), torch.rand(3, 4), torch.rand(2, 5)),
    "sort_unpool": lambda: called(unpool, torch.rand(2, 3), torch.rand(2, 5, 3), torch.rand(3, 4)),
    **{
        f"pairwise_cost, {kind}": lambda kind=kind: called(setpred.functional.pairwise_cost, *sets()[:2], kind)
        for kind in ("huber", "mse", "l1")
    },
    "paired_cost": lambda: called(functional.paired_cost, torch.rand(2, 5, 3), torch.rand(2, 5, 3)),
    "sum_costs": lambda: called(functional.sum_costs("huber", "l1"), *sets()[:2]),
    "on_channels": lambda: called(functional.on_channels("huber", [0, 2], weight=2.0), *sets()[:2]),
    "cross_entropy_cost": lambda: called(functional.cross_entropy_cost, *sets()[:2]),
    **{
        name: lambda name=name: called(getattr(functional, name), torch.randn(2, 5, 3), torch.eye(3).expand(2, 3, 3))
        for name in ("probability_cost", "focal_cost")
    },
    "box_convert": lambda: called(functional.box_convert, torch.rand(2, 5, 4), "cxcywh", "xyxy"),
    **{
        name: lambda name=name: called(getattr(functional, name), torch.rand(2, 5, 4), torch.rand(2, 3, 4))
        for name in ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou", "box_cost")
    },
    **{
        name: lambda name=name: called(getattr(setpred, name), torch.rand(2, 3, 5, 4), *matched())
        for name in ("matched_cross_entropy", "matched_focal_loss")
    },
    "linear_assignment": lambda: called(functional.linear_assignment, torch.rand(2, 5, 4), col_mask=presence(2, 4)),
    "matched_indices": lambda: called(functional.matched_indices, torch.arange(6).view(2, 3) % 4 - 1),
    "matched_pairs": lambda: called(functional.matched_pairs, torch.arange(6).view(2, 3) % 4 - 1),
    "nearest_neighbours": lambda: called(functional.nearest_neighbours, *sets()[:2], y_mask=presence(2, 4)),
    "euclidean_cost": lambda: called(functional.euclidean_cost, *sets()[:2]),
    "exact_transport": lambda: called(functional.exact_transport, torch.rand(2, 5, 4), col_mask=presence(2, 4)),
    "entropic_transport": lambda: called(
        functional.entropic_transport, torch.rand(2, 5, 4), torch.full((2, 5), 0.2), torch.full((2, 4), 0.25), iters=5
    ),
    "entropic_transport, unbalanced": lambda: called(
        functional.entropic_transport,
        torch.rand(2, 5, 4),
        torch.full((2, 5), 0.2),
        torch.full((2, 4), 0.25),
        rho=0.5,
        tol=0.1,
    ),
    "descend": lambda: called(functional.descend, lambda y: y.square().sum(1), torch.rand(2, 3), steps=3, lr=0.1),
    "attribute_distance": lambda: called(
        metrics.attribute_distance, torch.rand(2, 5, 7), torch.rand(2, 3, 7), coordinates=2, groups=(2, 3)
    ),
    "point_f_score": lambda: called(metrics.point_f_score, *sets()[:2], threshold=0.3, target_mask=presence(2, 4)),
    "keypoint_similarity": lambda: called(
        metrics.keypoint_similarity, torch.rand(2, 5, 7), torch.rand(2, 3, 7), sigmas=(0.1, 0.2)
    ),
    "cardinality_error": lambda: called(metrics.cardinality_error, torch.rand(2, 5), presence(2, 4)),
    "matching_accuracy": lambda: called(metrics.matching_accuracy, torch.rand(2, 3, 5, 4), *matched()),
    "average_precision": lambda: called(
        metrics.average_precision, torch.rand(2, 5, 4), torch.rand(2, 5), torch.rand(2, 3, 4), recall_points=11
    ),
    "CocoAveragePrecision": of_coco,
    "AveragePrecision, boxes": lambda: measured(metrics.AveragePrecision.dspn_boxes, 4),
    "AveragePrecision, state": lambda: measured(metrics.AveragePrecision.dspn_state, 18),
    "AveragePrecision, idspn": lambda: measured(metrics.AveragePrecision.idspn_state, 18),
}
ALL = pytest.mark.parametrize("name", CASES)
# The shape of what these give depends on values, or they look at values, or states of random numbers, to go on.
NEED_VALUES = (
    "StandardScaler, fit",
    "DSPNDecoder, tol",
    "DSPNDecoder, checkpoint",
    "matched_pairs",
    "unpad_sets",
    "average_precision",
    "AveragePrecision",
    "point_f_score",
    "CocoAveragePrecision",
)
WITHOUT_VALUES = pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(NEED_VALUES)])


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, tuple | list):
        return [x for part in result for x in tensors(part)]
    return [result] if isinstance(result, Tensor) else []


def run(function: partial[Any], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Results, and the gradients of parameters and inputs where there are any."""
    torch.manual_seed(0)
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    leaves += function.func.parameters() if isinstance(function.func, nn.Module) else []
    results = tensors(function(*inputs))
    assert results
    total = sum(x.square().sum() for x in results if x.requires_grad)
    if isinstance(total, Tensor):
        results += torch.autograd.grad(total, [x for x in leaves if x.requires_grad], materialize_grads=True)
    return results


def test_every_public_name_is_here() -> None:
    without_tensors = {
        "SetPrediction",
        "Trajectory",
        "Diagnosis",
        "EncoderCheck",
        "check_encoder",  # it looks at values, of a module and of sets of its own
        "SetEncoder",
        "Transport",
        "Descent",
        "StepRule",
        "Gradient",
        "functional",
        "metrics",
    }
    public = {*setpred.__all__, *functional.__all__, *metrics.__all__} - without_tensors
    assert public == {name.split(",")[0] for name in CASES}


@ALL
def test_the_default_device_does_not_matter(name: str) -> None:
    call = CASES[name]()
    expected = run(*call)
    torch.set_default_device("meta")
    try:
        actual = run(*call)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)  # the device is compared too


@ALL
def test_the_default_dtype_does_not_matter(name: str) -> None:
    call = CASES[name]()
    expected = run(*call)
    torch.set_default_dtype(torch.float64)
    try:
        actual = run(*call)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)  # the dtype is compared too


@WITHOUT_VALUES
def test_on_meta_shapes_are_those_on_the_cpu(name: str) -> None:
    expected = run(*CASES[name]())
    with torch.device("meta"):
        call = CASES[name]()
    actual = run(*call)
    assert {x.device.type for x in actual} == {"meta"}
    assert [(x.shape, x.dtype) for x in actual] == [(x.shape, x.dtype) for x in expected]


@WITHOUT_VALUES
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_on_another_device_nothing_is_made_on_the_cpu(name: str, mode: Any) -> None:
    with FakeTensorMode():
        with torch.device(ELSEWHERE):
            call = CASES[name]()
        with mode():
            actual = run(*call)
    assert {x.device.type for x in actual} == {ELSEWHERE}
