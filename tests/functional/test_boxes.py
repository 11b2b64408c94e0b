"""Boxes: against the formulas, torchvision where it is installed, and what has no area."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred import hungarian_loss, on_channels, sum_costs
from setpred.functional.boxes import (
    KINDS,
    box_convert,
    box_cost,
    box_iou,
    complete_box_iou,
    distance_box_iou,
    generalized_box_iou,
)
from setpred.functional.pairwise import paired_cost, pairwise_cost
from tests import devices, oracles
from tests.devices import gradcheck, gradgradcheck

DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FORMATS = ["xyxy", "xywh", "cxcywh"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def random_boxes(*shape: int, size: float = 1.0) -> Tensor:
    corner = torch.rand(*shape, 2, **DOUBLE)
    return torch.cat([corner, corner + 0.05 + size * torch.rand(*shape, 2, **DOUBLE)], -1)


@every_kind
@given(
    batch=st.integers(0, 2),
    n=st.integers(0, 4),
    m=st.integers(0, 4),
    size=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(kind: str, batch: int, n: int, m: int, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = random_boxes(batch, n, size=size).requires_grad_(), random_boxes(batch, m, size=size).requires_grad_()
    expected = torch.zeros(batch, n, m, **DOUBLE)
    for b in range(batch):
        for i in range(n):
            for j in range(m):
                expected[b, i, j] = oracles.box_overlap(x[b, i], y[b, j], kind)
    actual = KINDS[kind](x, y)
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(pairwise_cost(x, y, partial(box_cost, kind=kind)), 1 - expected, **EXACT)
    if expected.requires_grad:
        weight = torch.rand_like(expected)
        for a, e in zip(*(torch.autograd.grad(weight.mul(v).sum(), (x, y)) for v in (actual, expected)), strict=True):
            torch.testing.assert_close(a, e, **EXACT)


@every_kind
def test_equals_torchvision(kind: str) -> None:
    ops = pytest.importorskip("torchvision.ops")
    theirs = {
        "iou": ops.box_iou,
        "giou": ops.generalized_box_iou,
        "diou": partial(ops.distance_box_iou, eps=0),
        "ciou": partial(ops.complete_box_iou, eps=0),
    }[kind]
    x, y = random_boxes(2, 7).requires_grad_(), random_boxes(2, 6).requires_grad_()
    actual, expected = KINDS[kind](x, y), torch.stack([theirs(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(actual, expected, **EXACT)
    for a, e in zip(*(torch.autograd.grad(v.square().sum(), (x, y)) for v in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e, **EXACT)


@pytest.mark.parametrize("out_fmt", FORMATS)
@pytest.mark.parametrize("in_fmt", FORMATS)
def test_convert(in_fmt: str, out_fmt: str) -> None:
    forms = {"xyxy": [1.0, 2.0, 5.0, 10.0], "xywh": [1.0, 2.0, 4.0, 8.0], "cxcywh": [3.0, 6.0, 4.0, 8.0]}
    forms = {fmt: torch.tensor(form, **DOUBLE) for fmt, form in forms.items()}
    assert torch.equal(box_convert(forms[in_fmt], in_fmt, out_fmt), forms[out_fmt])
    some = random_boxes(2, 3, 4).requires_grad_()
    there = box_convert(some, in_fmt, out_fmt)
    torch.testing.assert_close(box_convert(there, out_fmt, in_fmt), some, **EXACT)
    assert gradcheck(lambda x: box_convert(x, in_fmt, out_fmt), (some,))
    assert box_convert(torch.zeros(0, 4), in_fmt, out_fmt).shape == (0, 4)


def test_convert_equals_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    boxes = random_boxes(50)
    for in_fmt in FORMATS:
        for out_fmt in FORMATS:
            torch.testing.assert_close(
                box_convert(boxes, in_fmt, out_fmt), ops.box_convert(boxes, in_fmt, out_fmt), **EXACT
            )


@pytest.mark.parametrize("fmt", FORMATS)
@every_kind
def test_cost_of_every_form(kind: str, fmt: str) -> None:
    x, y = random_boxes(2, 4), random_boxes(2, 4)
    cost = partial(box_cost, kind=kind, fmt=fmt)
    a, b = (box_convert(side, "xyxy", fmt) for side in (x, y))
    torch.testing.assert_close(cost(a, b), 1 - KINDS[kind](x, y), **EXACT)
    assert paired_cost(a, a, cost).abs().max() < 1e-12
    composed = sum_costs("l1", on_channels(cost, slice(0, 4), weight=2.0))
    expected = pairwise_cost(a, b, "l1") + 2 * cost(a, b)
    torch.testing.assert_close(pairwise_cost(a, b, composed), expected, **EXACT)
    torch.testing.assert_close(paired_cost(a, b, composed), expected.diagonal(dim1=1, dim2=2), **EXACT)


@every_kind
def test_gradients(kind: str) -> None:
    x, y = random_boxes(2, 3).requires_grad_(), random_boxes(2, 3).requires_grad_()
    if kind != "ciou":  # one part of it has no gradient, as published: compared with the formula above
        assert gradcheck(KINDS[kind], (x, y))
        assert gradgradcheck(KINDS[kind], (x, y))


POINT, LINE, UNIT, FAR = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5], [0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]
INVERTED = [0.8, 0.9, 0.2, 0.1]
DEGENERATE = [
    [0.0] * 4,
    POINT,
    LINE,
    LINE[1::-1] + LINE[:1:-1],
    UNIT,
    FAR,
    INVERTED,
    *([s] * 2 + [2 * s] * 2 for s in (1e-18, 1e-20, 1e-30)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_without_area_all_is_finite(kind: str, dtype: torch.dtype) -> None:
    x = torch.tensor([DEGENERATE], dtype=dtype, requires_grad=True)
    y = torch.tensor([DEGENERATE], dtype=dtype, requires_grad=True)
    value = KINDS[kind](x, y)
    assert value.isfinite().all()
    boxes = [box is not INVERTED for box in DEGENERATE]
    assert (value[0, boxes][:, boxes].abs() <= 1 + 1e-6).all() or kind == "ciou"
    for i in range(len(DEGENERATE)):
        for j in range(len(DEGENERATE)):
            for gradient in torch.autograd.grad(value[0, i, j], (x, y), retain_graph=True):
                assert gradient.isfinite().all(), (DEGENERATE[i], DEGENERATE[j])


def test_without_area_values() -> None:
    boxes = torch.tensor([[POINT, LINE, UNIT, FAR]])
    assert box_iou(boxes, boxes).tolist() == [[[0.0] * 4, [0.0] * 4, [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]]
    assert generalized_box_iou(boxes[:, :2], boxes[:, :2]).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]
    assert generalized_box_iou(boxes[:, :1], boxes[:, 2:3]).item() == 0
    assert distance_box_iou(boxes[:, :1], boxes[:, :1]).item() == 0
    assert complete_box_iou(boxes[:, 2:], boxes[:, 2:]).diagonal(dim1=1, dim2=2).tolist() == [[1.0, 1.0]]


@every_kind
def test_nan_stays(kind: str) -> None:
    x = torch.rand(1, 1, 4).expand(4, 4, 4).clone()
    x[:, range(4), range(4)] = torch.nan
    assert KINDS[kind](x, torch.rand(4, 2, 4)).isnan().all()
    with pytest.raises(ValueError, match="NaN"):
        hungarian_loss(x, torch.rand(4, 2, 4), cost=partial(box_cost, kind=kind), presence="none")


@every_kind
def test_low_precision_is_computed_in_float32(kind: str) -> None:
    x, y = random_boxes(2, 5).to(torch.bfloat16), random_boxes(2, 3).half()
    for cost in (KINDS[kind], partial(box_cost, kind=kind, fmt="cxcywh")):
        value = cost(x, y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, cost(x.float(), y.float()), rtol=0, atol=0)
        with devices.autocast(torch.bfloat16):
            torch.testing.assert_close(cost(x.float(), y.float()), value, rtol=0, atol=0)


@every_kind
def test_compiles_whole(kind: str) -> None:
    x, y = random_boxes(2, 5).requires_grad_(), random_boxes(2, 3)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    cost = on_channels(partial(box_cost, kind=kind, fmt="cxcywh"), slice(0, 4))

    def loss(x: Tensor) -> Tensor:
        return pairwise_cost(x, y, cost).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [(value, *torch.autograd.grad(value, x)) for value in (compiled(x), loss(x))]
    torch.testing.assert_close(*results)
    torch._dynamo.reset()
    assert hungarian_loss(x, y, target_mask=mask, cost=partial(box_cost, kind=kind), presence="none").isfinite()


def test_matched_pairs_alone_are_charged() -> None:
    """The graph is over pairs: the cost sees all pairs once, without a gradient, and then N sets of one box each."""
    seen = []

    def cost(x: Tensor, y: Tensor) -> Tensor:
        seen.append((tuple(x.shape), tuple(y.shape), torch.is_grad_enabled()))
        return box_cost(x, y)

    x = random_boxes(2, 5).requires_grad_()
    hungarian_loss(x, random_boxes(2, 3), cost=cost, presence="none").backward()
    assert seen == [((2, 5, 4), (2, 3, 4), False), ((10, 1, 4), (10, 1, 4), True)]


@pytest.mark.parametrize("function", [*KINDS.values(), box_cost])
def test_refuses_shapes(function: object) -> None:
    with pytest.raises(ValueError, match=r"`x` must have shape \(B, N, 4\), got float32 of shape \(2, 3, 5\)"):
        function(torch.rand(2, 3, 5), torch.rand(2, 3, 4))
    with pytest.raises(ValueError, match=r"`y` must have shape \(2, M, 4\)"):
        function(torch.rand(2, 3, 4), torch.rand(1, 3, 4))
    with pytest.raises(TypeError, match="`y` must have a floating dtype"):
        function(torch.rand(2, 3, 4), torch.ones(2, 3, 4).long())


def test_refuses_choices() -> None:
    boxes = torch.rand(1, 2, 4)
    with pytest.raises(ValueError, match="`kind` must be one of 'iou', 'giou', 'diou', 'ciou', got 'eiou'"):
        box_cost(boxes, boxes, kind="eiou")
    with pytest.raises(ValueError, match="`in_fmt` must be one of 'xyxy', 'xywh', 'cxcywh', got 'yxyx'"):
        box_cost(boxes, boxes, fmt="yxyx")
    with pytest.raises(ValueError, match="`out_fmt` must be one of"):
        box_convert(boxes, "xyxy", "yxyx")
    with pytest.raises(ValueError, match=r"`boxes` must have shape \(..., 4\), got shape \(2, 5\)"):
        box_convert(torch.rand(2, 5), "xyxy", "xywh")
    with pytest.raises(TypeError, match="`boxes` must have a floating dtype"):
        box_convert(torch.ones(2, 4).long(), "xyxy", "xywh")
