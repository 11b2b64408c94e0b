"""All that the library makes can be carried elsewhere: pickled, saved, copied, sent to another process."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
    SetPrediction,
    SinkhornLoss,
    SlicedWassersteinLoss,
    SlotDecoder,
    StandardScaler,
    Trajectory,
    TransformerDecoder,
    check_encoder,
    functional,
    hungarian_loss,
    metrics,
    on_channels,
    sum_costs,
)
from setpred.functional import StepRule, cross_entropy_cost, descend, entropic_transport
from setpred.metrics import AveragePrecision, attribute_distance
from tests.rules import paper_decoder

B, N, C, D = 2, 5, 4, 6


class Case(NamedTuple):
    """Something made, and what it says of itself when it is used: equal for all copies."""

    thing: object
    use: Callable[[object], object] = lambda thing: thing


class LearnedCost(nn.Module):
    """A cost with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * torch.cdist(x, y)


def in_the_unit_box(elements: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A projection of a user's."""
    return elements.clamp(0, 1), mask


def half_square(y: Tensor) -> Tensor:
    return 0.5 * y.square().sum(1)


def inputs(*shapes: tuple[int, ...]) -> Iterator[Tensor]:
    """The same numbers in every process."""
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(shape, generator=generator) for shape in shapes)


def fitted_scaler() -> StandardScaler:
    (elements,) = inputs((9, C))
    return StandardScaler(C).fit(3 + 2 * elements)


def encode(encoder: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    elements, mask = inputs((B, N, C), (B, N))
    return encoder(elements, mask)


def pool(module: nn.Module) -> Tensor:
    elements, mask = inputs((B, N, C), (B, N))
    return module(elements, mask > 0.5)


def unpool(module: nn.Module) -> Tensor:
    (vector,) = inputs((B, C))
    return module(vector, torch.arange(N).view(1, N, 1).expand(B, N, C))


def decode(decoder: nn.Module) -> SetPrediction:
    (z,) = inputs((B, D))
    torch.manual_seed(1)  # for random initial sets
    return decoder(z)


def decode_tokens(decoder: nn.Module) -> SetPrediction:
    z, mask = inputs((B, 3, D), (B, 3))
    torch.manual_seed(1)  # for random slots
    return decoder(z, mask > 0.3)


def charge(loss: nn.Module) -> Tensor:
    pred, target, pred_mask, target_mask = inputs((B, N, C), (B, N, C), (B, N), (B, N))
    return loss(pred, target, pred_mask, target_mask > 0.5)


def charge_prediction(loss: nn.Module) -> Tensor:
    elements, mask, z, target = inputs((B, N, C), (B, N), (B, D), (B, N, C))
    return loss(SetPrediction(elements, mask), target, mask > 0.5, z=z)


def compare_vectors(loss: nn.Module) -> Tensor:
    return loss(*inputs((B, D), (B, D)))


def compare_all_pairs(cost: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return cost(*inputs((B, N, C), (B, 3, C)))


def compute(metric: AveragePrecision) -> Tensor:
    return metric.compute()


def judge_more(metric: AveragePrecision, channels: int = 4) -> Tensor:
    pred, score, target = inputs((B, N, channels), (B, N), (B, N, channels))
    metric = copy.deepcopy(metric)
    metric.update(pred, score, target, target_mask=score > 0.5)
    return metric.compute()


def numbers(metric: metrics.CocoAveragePrecision) -> Tensor:
    return torch.tensor(list(metric.compute().values()))


def judge_images(metric: metrics.CocoAveragePrecision) -> Tensor:
    pred, score, target = inputs((B, N, 4), (B, N), (B, N, 4))
    classes = torch.arange(B * N).view(B, N) % 2
    metric.reset()
    metric.update(pred, score, classes, target, classes)
    return numbers(metric)


def steps_of(rule: StepRule) -> object:
    (y,) = inputs((B, N))
    return descend(lambda y: y.square().sum(1), y, steps=3, lr=rule, record=True)


def things() -> Iterator[tuple[str, Case]]:
    for (name, encoder), pooling in product(
        {"PooledEncoder": PooledEncoder, "RelationEncoder": RelationEncoder}.items(),
        ("fspool", "sum", "mean", "max", FSPool(D - 1, relaxed=0.5)),
    ):
        yield f"{name}:{pooling}", Case(encoder(C, D, 8, pool=pooling, size_feature=True), encode)
    for points, pooling in product((None, 3), ("fspool", "attention")):
        attention = AttentionEncoder(C, D, 8, inducing_points=points, pool=pooling)
        yield f"AttentionEncoder:{points} {pooling}", Case(attention, encode)
    yield "EncoderCheck", Case(check_encoder(PooledEncoder(C, D, 8), C))
    yield "FSPool", Case(FSPool(C, 7), pool)
    yield "FSPool:relaxed", Case(FSPool(C, relaxed=0.3), pool)
    yield "FSUnpool", Case(FSUnpool(C), unpool)
    yield "GradientDescent", Case(GradientDescent(0.1, momentum=0.5, grad_clip=2.0), steps_of)
    yield "PolyakDescent", Case(PolyakDescent(max_lr=0.2, momentum=0.5), steps_of)

    encoder = PooledEncoder(C, D, 8)
    options: list[dict[str, object]] = [
        {},
        {"init": "random", "lr": GradientDescent(1.0, 0.9, True, 1.0), "tol": 1e-3},
        {"init": nn.Sequential(nn.Linear(D, N * C), nn.Unflatten(1, (N, C))), "checkpoint": True},
        {"project": in_the_unit_box, "mask_clamp": None, "repr_loss": "mse"},
        {"differentiate": "implicit", "anchor": 0.1},
        {"scaler": fitted_scaler(), "project": in_the_unit_box},
    ]
    for number, option in enumerate(options):
        decoder = paper_decoder(encoder, 3, **({"lr": 1.0, "set_size": N, "channels": C} | option))
        yield f"DSPNDecoder:{number}", Case(decoder, decode)
    for name in ("paper", "idspn"):
        recipe = getattr(DSPNDecoder, name)(RelationEncoder(C, D, 8), set_size=N, channels=C, iters=3)
        yield f"DSPNDecoder:{name}", Case(recipe, decode)
    for clamp in ((0.0, 1.0), None):
        yield f"MLPDecoder:{clamp}", Case(MLPDecoder(D, N, C, 8, mask_clamp=clamp), decode)
        yield f"LSTMDecoder:{clamp}", Case(LSTMDecoder(D, N, C, 8, mask_clamp=clamp), decode)
    yield "MLPDecoder:scaler", Case(MLPDecoder(D, N, C, 8, scaler=fitted_scaler()), decode)
    yield "LSTMDecoder:scaler", Case(LSTMDecoder(D, N, C, 8, scaler=fitted_scaler()), decode)
    for queries in ("learned", "random", "top-n"):
        transformer = TransformerDecoder(D, N, C, 8, layers=2, queries=queries, scaler=fitted_scaler())
        yield f"TransformerDecoder:{queries}", Case(transformer, decode)
    for attention, way in product(("softmax", "sinkhorn", "mesh"), ("unrolled", "implicit")):
        slots = SlotDecoder(D, N, C, 8, attention=attention, differentiate=way)
        yield f"SlotDecoder:{attention}, {way}", Case(slots, decode_tokens)
    yield "SlotDecoder:vectors", Case(SlotDecoder(D, N, C, 8, tokens=3, scaler=fitted_scaler()), decode)

    # With presence="feature", the mask is the last channel.
    composed = sum_costs(on_channels("l1", slice(0, 2), weight=5.0), on_channels(cross_entropy_cost, [2, -1]))
    costs = {"name": "l1", "composed": composed, "function": torch.cdist, "module": LearnedCost()}
    for (name, loss), (kind, cost) in product(
        {"HungarianLoss": HungarianLoss, "ChamferLoss": ChamferLoss}.items(), costs.items()
    ):
        yield f"{name}:{kind}", Case(loss(cost), charge)
        yield f"{name}:matching, {kind}", Case(loss(matching_cost=cost, presence="bce"), charge)
    yield "HungarianLoss:solver", Case(HungarianLoss(solver=setpred.linear_assignment), charge)
    yield "SlicedWassersteinLoss", Case(SlicedWassersteinLoss(directions=torch.eye(C + 1)), charge)
    yield "SinkhornLoss", Case(SinkhornLoss(iters=5), charge)
    yield "SinkhornLoss:composed", Case(SinkhornLoss(sum_costs("mse", on_channels("huber", [-1])), iters=5), charge)
    for kind in ("huber", "mse"):
        yield f"RepresentationLoss:{kind}", Case(RepresentationLoss(kind, reduction="none"), compare_vectors)
    for kind, set_loss in (("module", HungarianLoss(composed)), ("function", hungarian_loss)):
        yield f"DSPNLoss:{kind}", Case(DSPNLoss(encoder, set_loss, steps="last"), charge_prediction)

    yield "StandardScaler", Case(fitted_scaler(), encode)
    for name, loss in {
        "HungarianLoss": HungarianLoss,
        "ChamferLoss": ChamferLoss,
        "SinkhornLoss": SinkhornLoss,
        "SlicedWassersteinLoss": partial(SlicedWassersteinLoss, directions=torch.eye(C + 1)),
    }.items():
        yield f"{name}:scaler", Case(loss(scaler=fitted_scaler()), charge)
    yield (
        "DSPNLoss:scaler",
        Case(DSPNLoss(encoder, hungarian_loss, steps="last", scaler=fitted_scaler()), charge_prediction),
    )

    yield "on_channels", Case(on_channels("mse", range(2), weight=0.5), compare_all_pairs)
    box = on_channels(partial(functional.box_cost, kind="diou", fmt="cxcywh"), slice(0, 4))
    yield "on_channels:options", Case(box, compare_all_pairs)
    yield "sum_costs", Case(sum_costs("l1", on_channels(cross_entropy_cost, [0, -1])), compare_all_pairs)

    presets = {
        "options": (AveragePrecision(thresholds=(0.1, 0.5), matching="best free", recall_points=11), 4),
        "rule": (AveragePrecision(partial(attribute_distance, coordinates=2, groups=(2,)), largest=False), 4),
        "dspn_boxes": (AveragePrecision.dspn_boxes(), 4),
        "dspn_state": (AveragePrecision.dspn_state(), 18),
        "idspn_state": (AveragePrecision.idspn_state(), 18),
    }
    for name, (metric, channels) in presets.items():
        yield f"AveragePrecision:{name}", Case(metric, partial(judge_more, channels=channels))
        used = copy.deepcopy(metric)
        used.update(*inputs((B, N, channels), (B, N), (B, N, channels)))
        yield f"AveragePrecision:{name}, used", Case(used, compute)

    coco = metrics.CocoAveragePrecision(max_predictions=(1, 5))
    yield "CocoAveragePrecision", Case(coco, judge_images)
    coco = copy.deepcopy(coco)
    judge_images(coco)
    yield "CocoAveragePrecision:used", Case(coco, numbers)

    elements, mask, more = inputs((B, N, C), (B, N), (3, B, N, C))
    trajectory = Trajectory(more, more[..., 0], more[:2, :, 0, 0], more[:2, :, 0, 1])
    yield "SetPrediction", Case(SetPrediction(elements, mask, trajectory))
    yield (
        "SetPrediction:of a decoder",
        Case(decode(paper_decoder(encoder, 2, set_size=N, channels=C).requires_grad_(False))),
    )
    yield "Trajectory", Case(trajectory)
    decoder = DSPNDecoder(encoder, 2, set_size=N, channels=C)
    yield "Diagnosis", Case(decoder.diagnose(next(inputs((B, D))), elements))
    yield "Transport", Case(entropic_transport(elements, mask.softmax(1), more[0, :, 0].softmax(1)))
    yield "Descent", Case(descend(half_square, elements[:, 0], steps=2, lr=0.1, record=True), tuple)

    for module in (setpred, functional, metrics):
        for name in module.__all__:
            public = getattr(module, name)
            if name not in ("functional", "metrics"):  # modules
                yield f"{name}:{module.__name__}", Case(public)


torch.manual_seed(0)
CASES = dict(things())


def by_save(thing: object) -> object:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def assert_same(actual: object, expected: object) -> None:
    assert type(actual) is type(expected)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


@pytest.mark.parametrize(
    "carry",
    [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), by_save],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("name", CASES)
def test_copies_do_the_same(name: str, carry: Callable[[object], object]) -> None:
    thing, use = CASES[name]
    expected = use(thing)
    carried = carry(thing)
    assert type(carried) is type(thing)
    assert repr(carried) == repr(thing) or "at 0x" in repr(thing)
    if isinstance(thing, nn.Module):
        assert carried is not thing
        assert_same(carried.state_dict(), thing.state_dict())
    assert_same(use(carried), expected)


def test_every_public_class_has_a_case() -> None:
    classes = {name for name in setpred.__all__ if isinstance(getattr(setpred, name), type)} - {"SetEncoder"}
    classes |= {"Transport", "Descent", "AveragePrecision", "on_channels", "sum_costs"}
    made = {name.split(":")[0] for name, case in CASES.items() if not isinstance(case.thing, type)}
    assert classes <= made


def test_what_is_shared_stays_shared() -> None:
    encoder, cost, scaler = PooledEncoder(C, D, 8), LearnedCost(), fitted_scaler()
    decoder = paper_decoder(encoder, 2, set_size=N, channels=C, scaler=scaler)
    set_loss = HungarianLoss(sum_costs(cost, on_channels(cost, [-1])))
    loss = DSPNLoss(encoder, set_loss, steps="last", scaler=scaler)
    for carry in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing)), by_save):
        one, other = carry((decoder, loss))
        assert other._encoder[0] is one.encoder is not encoder
        assert other.scaler is one.scaler is not scaler
        first, second = other.set_loss.cost.costs
        assert first is second.cost is not cost


def _use_all(folder: Path, things: dict[str, object]) -> None:
    torch.set_num_threads(1)
    torch.save({name: CASES[name].use(thing) for name, thing in things.items()}, folder / "results.pt")


def test_another_process_does_the_same(tmp_path: Path) -> None:
    """Things travel as arguments, as to the workers of a data loader or of distributed training."""
    things = {name: case.thing for name, case in CASES.items()}
    process = torch.multiprocessing.get_context("spawn").Process(target=_use_all, args=(tmp_path, things))
    process.start()
    process.join()
    assert process.exitcode == 0
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    for name, (thing, use) in CASES.items():
        assert_same(results[name], use(thing))
