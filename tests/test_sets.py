"""pad_sets, unpad_sets and the prediction tuples."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from setpred import SetPrediction, earth_mover_distance, pad_sets, unpad_sets


def random_sets(sizes: list[int], channels: int) -> list[Tensor]:
    return [torch.randn(n, channels, dtype=torch.float64) for n in sizes]


@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    channels=st.integers(1, 3),
    extra=st.none() | st.integers(0, 3),
)
def test_padding_and_cutting_give_the_sets_back(sizes: list[int], channels: int, extra: int | None) -> None:
    sets = random_sets(sizes, channels)
    elements, mask = pad_sets(sets, None if extra is None else max(sizes) + extra)
    assert elements.shape == (len(sizes), max(sizes) + (extra or 0), channels)
    assert elements.dtype == torch.float64
    assert mask.tolist() == [[i < n for i in range(elements.shape[1])] for n in sizes]
    assert not elements[~mask].any()
    for came, went in zip(unpad_sets(elements, mask), sets, strict=True):
        assert torch.equal(came, went)


def test_absent_elements_may_stand_anywhere() -> None:
    elements = torch.arange(8.0).view(1, 4, 2)
    (rows,) = unpad_sets(elements, torch.tensor([[False, True, False, True]]))
    assert torch.equal(rows, elements[0, [1, 3]])


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, [2]), (0.4, [1, 2]), (0.0, [1, 2]), (1.0, [])])
def test_an_element_is_present_above_the_threshold(threshold: float, kept: list[int]) -> None:
    elements = torch.rand(1, 3, 2)
    (rows,) = unpad_sets(elements, torch.tensor([[0.0, 0.5, 0.9]]), threshold)
    assert torch.equal(rows, elements[0, kept])


def test_gradients_pass_through() -> None:
    sets = [torch.rand(2, 3, requires_grad=True), torch.rand(1, 3, requires_grad=True)]
    (2 * torch.cat(unpad_sets(*pad_sets(sets)))).sum().backward()
    assert all(torch.equal(s.grad, torch.full_like(s, 2)) for s in sets)


def test_device_follows_the_sets() -> None:
    elements, mask = pad_sets([torch.rand(2, 3, device="meta"), torch.rand(1, 3, device="meta")])
    assert elements.device.type == mask.device.type == "meta"


def test_a_prediction_unpacks_and_has_no_trajectory_by_default() -> None:
    elements, mask, trajectory = SetPrediction(torch.rand(1, 2, 3), torch.ones(1, 2))
    assert elements.shape == (1, 2, 3)
    assert mask.shape == (1, 2)
    assert trajectory is None


@pytest.mark.parametrize(
    ("error", "message", "sets", "size"),
    [
        (ValueError, "`sets` must hold at least one", [], None),
        (ValueError, r"`sets\[1\]` must have shape \(n, 3\), got float32 of shape \(2, 4\)", [(1, 3), (2, 4)], None),
        (ValueError, r"`sets\[0\]` must have shape \(n, C\), got float32 of shape \(3,\)", [(3,)], None),
        (ValueError, "`size` must be at least the largest set's 2 elements, got 1", [(2, 3)], 1),
        (ValueError, "`size` must be at least 0, got -1", [(0, 3)], -1),
        (TypeError, r"`size` must be an integer, got 2.5 \(float\)", [(2, 3)], 2.5),
        (TypeError, "`size` must be an integer, got '3'", [(2, 3)], "3"),
    ],
)
def test_pad_sets_refuses(error: type[Exception], message: str, sets: list[tuple[int, ...]], size: int | None) -> None:
    with pytest.raises(error, match=message):
        pad_sets([torch.rand(shape) for shape in sets], size)


@pytest.mark.parametrize(
    ("message", "sets"),
    [
        (r"`sets\[0\]` must be a tensor, got \[1.0\] \(list\)", [[1.0]]),
        (r"`sets\[0\]` must have a floating dtype, got int64 of shape \(1, 1\)", [torch.ones(1, 1).long()]),
        (
            "`sets` must have one dtype, got .*float32 and .*float64",
            [torch.ones(1, 1), torch.ones(1, 1).double()],
        ),
    ],
)
def test_pad_sets_refuses_types(message: str, sets: list[Tensor]) -> None:
    with pytest.raises(TypeError, match=message):
        pad_sets(sets)


@pytest.mark.parametrize("sets", [None, 3, torch.tensor(1.0)])
def test_pad_sets_refuses_what_is_no_list(sets: object) -> None:
    with pytest.raises(TypeError, match="`sets` must be a list of tensors, got"):
        pad_sets(sets)


def test_pad_sets_refuses_more_than_one_device() -> None:
    with pytest.raises(ValueError, match="`sets` must lie on one device, got cpu and meta"):
        pad_sets([torch.rand(1, 2), torch.rand(1, 2, device="meta")])


def test_sets_may_come_one_by_one() -> None:
    sets = random_sets([1, 3], 2)
    for one, other in zip(pad_sets(iter(sets), 4), pad_sets(sets, 4), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("error", "message", "elements", "mask"),
    [
        (ValueError, r"`elements` must have shape \(B, N, C\), got .*\(4, 3\)", torch.rand(4, 3), torch.ones(4)),
        (ValueError, r"`mask` must have shape \(2, 4\), got .*\(2, 3\)", torch.rand(2, 4, 3), torch.ones(2, 3)),
        (TypeError, "`mask` must be bool or floating.* got int64", torch.rand(2, 4, 3), torch.ones(2, 4).long()),
        (TypeError, "`mask` must be a tensor", torch.rand(2, 4, 3), None),
        (TypeError, "`mask` must be a tensor", torch.rand(2, 4, 3), [[1.0]]),
    ],
)
def test_unpad_sets_refuses(error: type[Exception], message: str, elements: Tensor, mask: Tensor) -> None:
    with pytest.raises(error, match=message):
        unpad_sets(elements, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_unpad_sets_does_not_take_nan_for_absent(dtype: torch.dtype) -> None:
    mask = torch.rand(3, 4).to(dtype)
    mask[2, 1] = torch.nan
    with pytest.raises(ValueError, match="`mask` must not be NaN: sample 2"):
        unpad_sets(torch.rand(3, 4, 2), mask)


@pytest.mark.parametrize(
    ("error", "message", "threshold"),
    [(ValueError, "`threshold` must be at least -inf, got nan", torch.nan), (TypeError, "`threshold` must be", "0.5")],
)
def test_unpad_sets_refuses_thresholds(error: type[Exception], message: str, threshold: object) -> None:
    with pytest.raises(error, match=message):
        unpad_sets(torch.rand(3, 4, 2), torch.rand(3, 4), threshold)


def test_unpad_sets_takes_a_prediction() -> None:
    prediction = SetPrediction(torch.rand(2, 4, 3), torch.rand(2, 4))
    for threshold in (0.3, 0.5):
        expected = unpad_sets(prediction.elements, prediction.mask, threshold)
        torch.testing.assert_close(unpad_sets(prediction, threshold=threshold), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="`mask` must be None where `elements` is a SetPrediction"):
        unpad_sets(prediction, prediction.mask)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="`elements` must be a tensor or a SetPrediction, got tuple"):
        unpad_sets(tuple(prediction))  # type: ignore[call-overload]


def test_a_prediction_in_place_of_elements_is_named_and_not_shown() -> None:
    prediction = SetPrediction(torch.rand(2, 4, 3), torch.rand(2, 4))
    with pytest.raises(TypeError, match=r"^`pred` must be a tensor, got SetPrediction$"):
        earth_mover_distance(prediction, prediction.elements)  # type: ignore[arg-type]
