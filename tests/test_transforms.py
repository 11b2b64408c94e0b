"""torch.func's transforms over all that is public: vmap gives what a loop gives, gradients are those of autograd."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

import setpred
from setpred import (
    AttentionEncoder,
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
    SlotDecoder,
    StandardScaler,
    TransformerDecoder,
    chamfer_loss,
    earth_mover_distance,
    functional,
    hungarian_loss,
    matched_cross_entropy,
    matched_focal_loss,
    metrics,
    on_channels,
    pad_sets,
    representation_loss,
    sinkhorn_loss,
    sliced_wasserstein_loss,
    sum_costs,
    unpad_sets,
)
from setpred.functional import (
    StepRule,
    argsort_descending,
    cross_entropy_cost,
    descend,
    entropic_transport,
    euclidean_cost,
    exact_transport,
    focal_cost,
    linear_assignment,
    matched_indices,
    matched_pairs,
    nearest_neighbours,
    paired_cost,
    pairwise_cost,
    piecewise_linear,
    probability_cost,
    sort_pool,
    sort_unpool,
)
from setpred.metrics import AveragePrecision, attribute_distance, average_precision
from tests.rules import paper_decoder, recipe

# One untrained decoder is called more than a hundred times.
pytestmark = pytest.mark.filterwarnings("ignore:DSPNDecoder does not descend:RuntimeWarning")

V, B, N, M, C, D = 3, 2, 5, 4, 3, 6  # V: what is mapped over
DOUBLE = {"dtype": torch.float64}


class Case(NamedTuple):
    """A function, and V of each of its arguments."""

    call: Callable[..., object]
    args: tuple[Tensor, ...]
    differentiable: bool = True
    forward_mode: bool = True  # whether PyTorch differentiates forward what it is made of


def normal(*shape: int) -> Tensor:
    return torch.randn(V, *shape, **DOUBLE)


def soft(*shape: int) -> Tensor:
    return torch.rand(V, *shape, **DOUBLE)


def bools(*shape: int) -> Tensor:
    return torch.rand(V, *shape) < 0.6


def plain_solver(cost: Tensor) -> Tensor:
    """A user's solver, which looks at values."""
    assigned = torch.full(cost.shape[:2], -1)
    for s, problem in enumerate(cost):
        row, col = linear_sum_assignment(problem.numpy())
        assigned[s, torch.from_numpy(row)] = torch.from_numpy(col)
    return assigned


def of_losses() -> Iterator[tuple[str, Case]]:
    sets = (normal(B, N, C), normal(B, M, C), soft(B, N), bools(B, M))
    composed = sum_costs(on_channels("l1", [0]), on_channels("huber", slice(1, None), weight=2.0))
    losses = {"hungarian_loss": hungarian_loss, "chamfer_loss": chamfer_loss, "sinkhorn_loss": sinkhorn_loss}
    for (name, loss), cost in product(losses.items(), ("huber", "mse", "l1", composed)):
        options = {"iters": 8, "epsilon": 0.1} if name == "sinkhorn_loss" else {}
        for presence in ("feature", "none") if name == "sinkhorn_loss" else ("feature", "bce", "logits", "none"):

            def call(*args: Tensor, loss: Callable = loss, **options: object) -> object:
                return loss(*args, **options)

            options = options | {"cost": cost, "presence": presence, "reduction": "none"}
            yield f"{name}:{presence}, {cost}", Case(lambda *a, c=call, o=options: c(*a, **o), sets)
    for name, loss in losses.items():
        yield f"{name}:mean", Case(loss, sets)
        yield f"{name}:no masks", Case(loss, sets[:2])
        steps = (normal(2, B, N, C), sets[1], soft(2, B, N), sets[3])
        yield f"{name}:steps", Case(lambda *a, f=loss: f(*a, reduction="none"), steps)
        large = (normal(B, 40, 2), normal(B, 30, 2), soft(B, 40), bools(B, 30))
        yield f"{name}:large", Case(loss, large, differentiable=False)
    for presence in ("feature", "bce"):
        yield (
            f"hungarian_loss:solver, {presence}",
            Case(lambda *a, p=presence: hungarian_loss(*a, presence=p, solver=plain_solver), sets),
        )
    yield (
        "sliced_wasserstein_loss",
        Case(
            lambda *a: sliced_wasserstein_loss(*a, directions=torch.eye(C, dtype=torch.float64), presence="none"), sets
        ),
    )
    yield (
        "sinkhorn_loss:transport",
        Case(lambda *a: sinkhorn_loss(*a, presence="none", iters=9, rho=0.5, return_transport=True), sets),
    )
    yield "hungarian_loss:matching", Case(lambda *a: hungarian_loss(*a, return_matching=True), sets)
    yield "hungarian_loss:single precision", Case(hungarian_loss, tuple(x.float() for x in sets[:3]))
    points = (normal(B, N, C), normal(B, M, C), bools(B, N), bools(B, M))
    yield (
        "point_f_score",
        Case(lambda x, y, a, b: metrics.point_f_score(x, y, threshold=0.5, pred_mask=a, target_mask=b), points, False),
    )
    yield "earth_mover_distance", Case(earth_mover_distance, points)
    yield "earth_mover_distance:huber", Case(lambda *a: earth_mover_distance(*a, cost="huber"), points[:2])
    classes, matching = torch.randint(C - 1, (V, B, M)), torch.randint(-1, M, (V, 2, B, N))
    for loss, reduction in product((matched_cross_entropy, matched_focal_loss), ("mean", "none")):
        yield (
            f"{loss.__name__}:{reduction}",
            Case(lambda *a, f=loss, r=reduction: f(*a, reduction=r), (normal(2, B, N, C), classes, matching)),
        )
    for kind, reduction in product(("huber", "mse"), ("mean", "none")):
        yield (
            f"representation_loss:{kind}, {reduction}",
            Case(
                lambda x, y, k=kind, r=reduction: representation_loss(x, y, kind=k, reduction=r),
                (normal(B, D), normal(B, D)),
            ),
        )


def of_functions() -> Iterator[tuple[str, Case]]:
    x, y, x_mask, y_mask = normal(B, N, C), normal(B, M, C), bools(B, N), bools(B, M)
    for name, values in (("float32", torch.randn(V, B, N)), ("float64", normal(B, N))):
        yield f"argsort_descending:{name}", Case(argsort_descending, (values.round(),), differentiable=False)
    yield "piecewise_linear", Case(piecewise_linear, (normal(C, 4), soft(C, N)))
    yield "sort_pool", Case(lambda x, w, m: sort_pool(x, w, m)[0], (x, normal(C, 4), x_mask))
    yield "sort_pool:soft", Case(lambda x, w, m: sort_pool(x, w, m)[0], (x, normal(C, 4), soft(B, N)))
    yield "sort_pool:relaxed", Case(lambda x, w, m: sort_pool(x, w, m, relaxed=0.5)[0], (x, normal(C, 4), x_mask))
    order = torch.rand(V, B, N, C).argsort(2)
    yield "sort_unpool", Case(sort_unpool, (normal(B, C), order, normal(C, 4), x_mask))
    for cost in ("huber", "mse", "l1", torch.cdist, on_channels("mse", [0, 2])):
        forward = cost is not torch.cdist
        name = "on_channels" if callable(cost) and forward else "pairwise_cost"
        yield f"{name}:{cost}", Case(lambda x, y, c=cost: pairwise_cost(x, y, c), (x, y), forward_mode=forward)
        yield (
            f"paired_cost:{cost}",
            Case(lambda x, y, c=cost: paired_cost(x, y, c), (x, normal(B, N, C)), forward_mode=forward),
        )
        yield (
            f"nearest_neighbours:{cost}",
            Case(
                lambda x, y, a, b, c=cost: nearest_neighbours(x, y, c, x_mask=a, y_mask=b),
                (x, y, x_mask, y_mask),
                False,
            ),
        )
    far = (torch.rand(V, 1, 400, 2, **DOUBLE), torch.rand(V, 1, 300, 2, **DOUBLE))
    for cost in ("huber", "mse", "l1"):
        yield f"pairwise_cost:large, {cost}", Case(lambda x, y, c=cost: pairwise_cost(x, y, c), far, False)
        yield f"nearest_neighbours:large, {cost}", Case(lambda x, y, c=cost: nearest_neighbours(x, y, c), far, False)
    yield "cross_entropy_cost", Case(cross_entropy_cost, (x, y.softmax(-1)))
    yield "probability_cost", Case(probability_cost, (x, y.softmax(-1)))
    yield "focal_cost", Case(focal_cost, (x, y.softmax(-1)))
    yield "sum_costs", Case(sum_costs("mse", on_channels("l1", [0])), (x, y))
    cost = normal(B, N, M)
    yield (
        "linear_assignment",
        Case(lambda c, a, b: linear_assignment(c, row_mask=a, col_mask=b), (cost, x_mask, y_mask), False),
    )
    yield (
        "linear_assignment:solver",
        Case(
            lambda c, a, b: linear_assignment(c, row_mask=a, col_mask=b, solver=plain_solver),
            (cost, x_mask, y_mask),
            False,
        ),
    )
    yield (
        "linear_assignment:options",
        Case(lambda c: linear_assignment(c, maximize=True, rows_per_column=2), (cost,), False),
    )
    yield "matched_indices", Case(lambda c: matched_indices(linear_assignment(c)), (cost,), False)
    yield "linear_assignment:leading dimensions", Case(linear_assignment, (normal(2, B, N, M),), False)
    yield "euclidean_cost", Case(euclidean_cost, (x, y))
    yield (
        "exact_transport",
        Case(lambda c, a, b: exact_transport(c, row_mask=a, col_mask=b), (cost, x_mask, y_mask), False),
    )
    weights = (soft(B, N).softmax(-1), soft(B, M).softmax(-1))
    yield (
        "entropic_transport",
        Case(lambda c, a, b: entropic_transport(c, a, b, epsilon=0.1, iters=8), (cost.square(), *weights)),
    )
    yield (
        "entropic_transport:unbalanced, tol",
        Case(
            lambda c, a, b: entropic_transport(c, a, b, epsilon=0.1, iters=90, tol=0.01, rho=0.5),
            (cost.square(), *weights),
        ),
    )

    def descent(y: Tensor, target: Tensor, differentiate: str = "unrolled", rule: StepRule | None = None) -> object:
        result = descend(
            lambda y, target: (y - target).square().sum(1),
            y,
            args=(target,),
            steps=3,
            lr=rule or GradientDescent(0.1, momentum=0.5, grad_clip=1.0),
            tol=0.5,
            differentiate=differentiate,
            record=True,
        )
        return tuple(result) if differentiate == "unrolled" else result.value

    polyak = PolyakDescent(max_lr=0.3, momentum=0.5)
    yield "PolyakDescent", Case(lambda y, t: descent(y, t, rule=polyak), (normal(B, D), normal(B, D)))
    yield "GradientDescent", Case(descent, (normal(B, D), normal(B, D)))
    yield "descend", Case(descent, (normal(B, D), normal(B, D)))
    yield "descend:implicit", Case(lambda y, t: descent(y, t, "implicit"), (normal(B, D), normal(B, D)))
    yield "pad_sets", Case(lambda *sets: pad_sets(sets), (normal(2, C), normal(4, C), normal(0, C)))
    yield "pad_sets:size", Case(lambda *sets: pad_sets(sets, 7), (normal(2, C), normal(4, C)))
    boxes = torch.cat([soft(B, N, 2), 1 + soft(B, N, 2)], -1)
    others = torch.cat([soft(B, M, 2), 1 + soft(B, M, 2)], -1)
    yield "box_convert", Case(lambda x: functional.box_convert(x, "xyxy", "cxcywh"), (boxes,))
    for name in ("box_iou", "generalized_box_iou", "distance_box_iou", "complete_box_iou", "box_cost"):
        yield name, Case(getattr(functional, name), (boxes, others))
    points, others = normal(B, N, 7), normal(B, M, 7).abs()
    yield (
        "keypoint_similarity",
        Case(lambda x, y: metrics.keypoint_similarity(x, y, sigmas=(0.2, 0.3)), (points, others)),
    )
    yield "cardinality_error", Case(metrics.cardinality_error, (soft(2, B, N), y_mask), differentiable=False)
    classes, matching = torch.randint(C, (V, B, M)), torch.randint(0, M, (V, 2, B, N))
    yield "matching_accuracy", Case(metrics.matching_accuracy, (normal(2, B, N, C), classes, matching), False)
    yield (
        "attribute_distance",
        Case(
            lambda x, y: attribute_distance(x, y, coordinates=1, groups=(2,)).nan_to_num(posinf=9.0),
            (x, y),
            forward_mode=False,
        ),
    )


def fitted_scaler() -> StandardScaler:
    return StandardScaler(C).fit(3 + 2 * torch.randn(99, C))


ENCODERS = {
    "PooledEncoder": lambda **options: PooledEncoder(C, D, 8, **options),
    "RelationEncoder": lambda **options: RelationEncoder(C, D, 8, **options),
    "AttentionEncoder": lambda **options: AttentionEncoder(C, D, 8, **options),
}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "DSPNDecoder": lambda: DSPNDecoder.paper(PooledEncoder(C, D, 8), set_size=N, channels=C, iters=3, lr=1.0),
    "DSPNDecoder:implicit": lambda: DSPNDecoder.idspn(
        PooledEncoder(C, D, 8), set_size=N, channels=C, iters=3, **recipe("idspn")
    ),
    "DSPNDecoder:recommended": lambda: DSPNDecoder.recommended(
        PooledEncoder(C, D, 8), set_size=N, channels=C, iters=3, init="learned"
    ),
    "DSPNDecoder:no mask": lambda: paper_decoder(
        RelationEncoder(C, D, 8), 3, GradientDescent(1.0, 0.5, True, 1.0), None, set_size=N, channels=C
    ),
    "DSPNDecoder:tol": lambda: paper_decoder(
        PooledEncoder(C, D, 8, pool="mean"), 3, 1.0, set_size=N, channels=C, tol=0.1, repr_loss="mse"
    ),
    "DSPNDecoder:scaler": lambda: DSPNDecoder.idspn(
        PooledEncoder(C, D, 8),
        set_size=N,
        channels=C,
        iters=3,
        scaler=fitted_scaler(),
        **recipe("idspn"),
        project=lambda elements, mask: (elements.clamp(max=5), mask),
    ),
    "MLPDecoder": lambda: MLPDecoder(D, N, C, 8),
    "MLPDecoder:scaler": lambda: MLPDecoder(D, N, C, 8, scaler=fitted_scaler()),
    "TransformerDecoder": lambda: TransformerDecoder(D, N, C, 8, layers=2, heads=2),
    "TransformerDecoder:top-n": lambda: TransformerDecoder(D, N, C, 8, layers=1, heads=2, queries="top-n"),
}


def of_modules() -> Iterator[tuple[str, Case]]:
    x, mask, hard = torch.randn(V, B, N, C), torch.rand(V, B, N), bools(B, N)
    for name, make in ENCODERS.items():
        attends = name == "AttentionEncoder"
        for pooling in ("fspool", "sum", "mean", "max", FSPool(D, relaxed=0.5), *["attention"] * attends):
            yield f"{name}:{pooling}", Case(make(pool=pooling), (x, mask))
        if attends:
            yield f"{name}:points", Case(make(inducing_points=2), (x, mask))
        yield f"{name}:no mask", Case(make(), (x,))
        options = {} if attends else {"size_feature": True}
        yield f"{name}:hard", Case(make(**options), (x, hard))
        yield f"{name}:double", Case(make(**DOUBLE), (x.double(), mask.double()))
    pool, relaxed, unpool = FSPool(C), FSPool(C, relaxed=0.5), FSUnpool(C)
    for name, m in (("no mask", ()), ("hard", (hard,)), ("soft", (mask,))):
        yield f"FSPool:{name}", Case(pool, (x, *m))
    yield "FSPool:relaxed", Case(relaxed, (x, hard))
    for name, way in (("exact", pool), ("relaxed", relaxed)):
        yield (
            f"FSUnpool:{name}",
            Case(lambda x, mask, way=way: unpool(*way(x, mask, return_permutation=True), mask), (x, hard)),
        )
    scaler = fitted_scaler()
    for name, m in (("no mask", ()), ("hard", (hard,)), ("soft", (mask.round(decimals=1),))):
        yield f"StandardScaler:{name}", Case(scaler, (x, *m), differentiable=name != "soft")
        yield f"StandardScaler:inverse, {name}", Case(scaler.inverse, (x, *m), differentiable=name != "soft")
    z, target = torch.randn(V, B, D), torch.rand(V, B, N, C)
    for name, make in DECODERS.items():
        decoder = make()
        yield name, Case(lambda z, d=decoder: tuple(d(z)), (z,))
    transformer = DECODERS["TransformerDecoder"]()
    yield "TransformerDecoder:tokens", Case(lambda z, m: tuple(transformer(z, m)), (torch.randn(V, B, N, D), mask))
    tokens, slots, present = normal(B, M, D), normal(B, N, 8), bools(B, M)
    for attention, way in product(("softmax", "sinkhorn", "mesh"), ("unrolled", "implicit")):
        decoder = SlotDecoder(D, N, C, 8, attention=attention, differentiate=way, **DOUBLE)
        yield (
            f"SlotDecoder:{attention}, {way}",
            Case(lambda z, m, y, d=decoder: tuple(d(z, m, init=y)), (tokens, present, slots)),
        )
    decoder = SlotDecoder(D, N, C, 8, tokens=M, scaler=scaler)
    yield "SlotDecoder:vectors", Case(lambda z, y, d=decoder: tuple(d(z, init=y)), (z, slots.float()))
    decoder = DECODERS["DSPNDecoder"]()
    yield "DSPNDecoder:init", Case(lambda z, y, m: decoder(z, init=(y, m)), (z, target, mask))
    loss = DSPNLoss(decoder.encoder, HungarianLoss())
    yield "DSPNLoss", Case(lambda z, y, m: loss(decoder(z), y, m, z=z), (z, target, hard))
    unit = DSPNLoss(decoder.encoder, HungarianLoss(), scaler=scaler)
    yield "DSPNLoss:scaler", Case(lambda z, y, m: unit(decoder(z), y, m, z=z), (z, target, hard))


torch.manual_seed(0)
CASES = dict([*of_losses(), *of_functions(), *of_modules()])
every = pytest.mark.parametrize("name", CASES)
differentiable = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differentiable])
# PyTorch's own: it defines operators by scripts when forward mode is first used.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def test_nothing_public_is_forgotten() -> None:
    public = {*setpred.__all__, *functional.__all__, *metrics.__all__} - {"functional", "metrics"}
    types = {
        "SetPrediction",
        "Trajectory",
        "Diagnosis",
        "EncoderCheck",
        "SetEncoder",
        "Transport",
        "Descent",
        "StepRule",
        "Gradient",
    }
    functions_as_modules = {
        "HungarianLoss",
        "ChamferLoss",
        "SinkhornLoss",
        "SlicedWassersteinLoss",
        "RepresentationLoss",
    }
    refused = {"unpad_sets", "matched_pairs", "LSTMDecoder", "check_encoder"}
    refused |= {"AveragePrecision", "CocoAveragePrecision", "average_precision"}
    assert {name.split(":")[0] for name in CASES} == public - types - functions_as_modules - refused


def assert_close(actual: object, expected: object) -> None:
    """Alike but for rounding; of forward mode, PyTorch gives some tangents of scalars in float64."""
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(a, Tensor):
            exact = b.dtype == torch.float64 or not b.is_floating_point()
            tolerance = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(a, b, check_dtype=False, **tolerance)
        else:
            assert a == b


def tensors(result: object) -> tuple[Tensor, ...]:
    """What a function returns as a tuple of tensors: vmap takes no None."""
    return tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def by_loop(case: Case, in_dims: tuple[int | None, ...], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    results = [
        tensors(case.call(*(x if dim is None else x.select(dim, v) for x, dim in zip(args, in_dims, strict=True))))
        for v in range(V)
    ]
    return tuple(map(torch.stack, zip(*results, strict=True)))


@every
def test_vmap_is_a_loop(name: str) -> None:
    case = CASES[name]
    count = len(case.args)
    ways = [(0,) * count, (1,) * count, (-1,) * count]
    if count > 1:  # each argument the same for all, in turn, and then all but it
        ways += [tuple(None if i == k else 0 for i in range(count)) for k in range(count)]
        ways += [tuple(0 if i == k else None for i in range(count)) for k in range(count)]
    for in_dims in ways:
        args = tuple(x[0] if d is None else x.movedim(0, d) for x, d in zip(case.args, in_dims, strict=True))
        actual = vmap(lambda *args: tensors(case.call(*args)), in_dims=in_dims)(*args)
        assert_close(actual, by_loop(case, in_dims, args))


@every
def test_vmap_of_vmap(name: str) -> None:
    case = CASES[name]
    call = lambda *args: tensors(case.call(*args))  # noqa: E731
    args = tuple(torch.stack([x, x.flip(0)]) for x in case.args)
    expected = by_loop(case, (0,) * len(args), case.args)
    assert_close(vmap(vmap(call))(*args), tuple(torch.stack([x, x.flip(0)]) for x in expected))
    if len(args) > 1:  # one argument for the outer, the others for the inner
        actual = vmap(vmap(call, in_dims=(None, *[0] * (len(args) - 1))), in_dims=(0, *[None] * (len(args) - 1)))
        expected = [by_loop(case, (None, *[0] * (len(args) - 1)), (x, *case.args[1:])) for x in case.args[0]]
        assert_close(actual(*case.args), tuple(map(torch.stack, zip(*expected, strict=True))))


def scalar(case: Case, *args: Tensor) -> Tensor:
    """The sum of all that a function returns, each number with another weight."""
    total = torch.zeros(())
    for result in tensors(case.call(*args)):
        if result.is_floating_point():
            weight = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
            total = total + (result * weight).sum()
    return total


def by_autograd(case: Case, places: tuple[int, ...], args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    args = tuple(x.clone().requires_grad_() if i in places else x for i, x in enumerate(args))
    wanted = [args[i] for i in places]
    return torch.autograd.grad(scalar(case, *args), wanted, materialize_grads=True)


def floating(case: Case) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(case.args) if x.is_floating_point())


@differentiable
def test_gradients_are_those_of_autograd(name: str) -> None:
    case = CASES[name]
    places = floating(case)
    expected = [by_autograd(case, places, tuple(x[v] for x in case.args)) for v in range(V)]
    each = tuple(map(torch.stack, zip(*expected, strict=True)))
    one = tuple(x[0] for x in case.args)
    function = lambda *args: scalar(case, *args)  # noqa: E731
    total = lambda *args: vmap(function)(*args).sum()  # noqa: E731
    assert any(part.any() for part in each)
    assert_close(grad(function, argnums=places)(*one), expected[0])
    assert_close(jacrev(function, argnums=places)(*one), expected[0])
    assert_close(vmap(grad(function, argnums=places))(*case.args), each)  # of each sample
    assert_close(grad(total, argnums=places)(*case.args), each)
    args = tuple(x.clone().requires_grad_() if i in places else x for i, x in enumerate(case.args))
    wanted = [args[i] for i in places]
    assert_close(torch.autograd.grad(total(*args), wanted, materialize_grads=True), each)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differentiable and case.forward_mode])
@forward_mode
def test_forward_mode_is_the_transpose(name: str) -> None:
    case = CASES[name]
    places, one = floating(case), tuple(x[0] for x in case.args)
    expected = by_autograd(case, places, one)

    def function(*moved: Tensor) -> Tensor:
        args = list(one)
        for i, x in zip(places, moved, strict=True):
            args[i] = x
        return scalar(case, *args)

    point = tuple(one[i] for i in places)
    tangent = tuple(torch.randn_like(x) for x in point)
    slope = sum((a * b).sum() for a, b in zip(tangent, expected, strict=True))
    assert_close(jvp(function, point, tangent)[1], slope)
    if sum(x.numel() for x in point) < 200:
        assert_close(jacfwd(function, argnums=tuple(range(len(point))))(*point), expected)


@forward_mode
@pytest.mark.parametrize("name", ["hungarian_loss:mean", "chamfer_loss:mean", "PooledEncoder:double"])
def test_hessian(name: str) -> None:
    case = CASES[name]
    one = tuple(x[0] for x in case.args)
    expected = torch.autograd.functional.hessian(lambda x: scalar(case, x, *one[1:]), one[0])
    assert_close(hessian(lambda x: scalar(case, x, *one[1:]))(one[0]), expected)


@forward_mode
def test_second_derivative_where_two_elements_are_equal() -> None:
    x = torch.rand(1, 2, 2, **DOUBLE)
    actual = hessian(lambda y: paired_cost(x, y).sum())(x).view(4, 4)
    assert_close(actual, torch.eye(4, **DOUBLE) / 2)


def test_neighbours_where_costs_are_not_numbers() -> None:
    x, y = torch.rand(V, B, N, C), torch.rand(V, B, M, C)
    x[0, 0, 1], x[1, 1], y[2, 0, 2], y[2, 1, 3] = torch.nan, torch.inf, torch.nan, torch.inf
    for cost in ("mse", on_channels("mse", slice(None))):
        case = Case(lambda x, y, c=cost: nearest_neighbours(x, y, c), (x, y))
        assert_close(vmap(case.call)(x, y), by_loop(case, (0, 0), (x, y)))


def module_cases() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    pools = {"FSPool": lambda: FSPool(C)}
    return {name: (make, (B, N, C)) for name, make in (ENCODERS | pools).items()} | {
        name: (make, (B, D)) for name, make in DECODERS.items()
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", module_cases())
def test_stacked_parameters(name: str, shared: bool) -> None:
    """An ensemble: V modules on one batch, or on one each; values, and gradients of each member's parameters."""
    make, shape = module_cases()[name]
    modules = [make() for _ in range(V)]
    trained, buffers = stack_module_state(modules)
    parameters = {name: p.detach() for name, p in (trained | buffers).items()}
    x = torch.randn(*shape) if shared else torch.randn(V, *shape)

    def call(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        return tensors(functional_call(modules[0], parameters, (x,)))

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return sum(result.square().sum() for result in call(parameters, x))

    in_dims = (0, None if shared else 0)
    results, gradients = vmap(call, in_dims)(parameters, x), vmap(grad(total), in_dims)(parameters, x)
    for v, module in enumerate(modules):
        own = x if shared else x[v]
        assert_close(tuple(result[v] for result in results), tensors(module(own)))
        sum(result.square().sum() for result in tensors(module(own))).backward()
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                assert_close(gradients[key][v], parameter.grad)


def test_errors_name_the_sample() -> None:
    cost = torch.rand(V, B, N, M)
    cost[2, 1, 0, 0] = torch.nan
    for solver in ("auto", plain_solver):
        with pytest.raises(ValueError, match=r"`cost` must not be NaN or -inf: sample \(2, 1\)"):
            vmap(lambda cost, s=solver: linear_assignment(cost, solver=s))(cost)
        with pytest.raises(ValueError, match=r"sample \(2, 1, 0\)"):  # it has leading dimensions of its own
            vmap(lambda cost, s=solver: linear_assignment(cost, solver=s), in_dims=3)(cost.unsqueeze(2).movedim(0, 3))
    pred, target = torch.rand(V, B, 2, C), torch.rand(V, B, 3, C)
    mask = torch.ones(V, B, 3, dtype=torch.bool)
    mask[:, :, 2] = False
    mask[1, 0, 2] = True
    with pytest.raises(ValueError, match=r"sample \(1, 0\) has 3 columns, all to be matched, but only 2 rows"):
        vmap(lambda p, t, m: hungarian_loss(p, t, None, m, presence="none"))(pred, target, mask)


LSTM = LSTMDecoder(D, N, C, 8)


@pytest.mark.parametrize(
    ("name", "call", "arg"),
    [
        ("matched_pairs", matched_pairs, torch.zeros(V, B, N, dtype=torch.long)),
        ("unpad_sets", lambda x: unpad_sets(x, x[..., 0]), torch.rand(V, B, N, C)),
        ("AveragePrecision", lambda x: average_precision(x, x[..., 0], x), torch.rand(V, B, N, 4)),
        ("AveragePrecision", lambda x: AveragePrecision().update(x, x[..., 0], x), torch.rand(V, B, N, 4)),
        ("LSTMDecoder", lambda z: LSTM(z).elements, torch.randn(V, B, D)),
    ],
)
def test_what_pytorch_refuses_says_which_function(name: str, call: Callable[[Tensor], object], arg: Tensor) -> None:
    with pytest.raises(RuntimeError, match=f"`{name}` cannot run inside of"):
        vmap(call)(arg)
    with pytest.raises(RuntimeError, match=f"`{name}` cannot run inside of"):
        vmap(vmap(call))(arg.unsqueeze(0))


def test_checkpoint_is_refused() -> None:
    decoder = paper_decoder(PooledEncoder(C, D, 8), set_size=N, channels=C, checkpoint=True)
    with pytest.raises(RuntimeError, match="`checkpoint` must be False"):
        vmap(lambda z: decoder(z).elements)(torch.randn(V, B, D))


def test_what_is_refused_in_vmap_alone_works_in_grad() -> None:
    z, target = torch.randn(B, D), torch.rand(B, N, C)

    def pairs_loss(pred: Tensor) -> Tensor:
        sample, row, col = matched_pairs(linear_assignment(pairwise_cost(pred, target)))
        return (pred[sample, row] - target[sample, col]).square().sum()

    pred = torch.rand(B, N, C, requires_grad=True)
    assert_close(grad(pairs_loss)(pred.detach()), torch.autograd.grad(pairs_loss(pred), pred)[0])
    lstm_loss = lambda z: LSTM(z).elements.square().sum()  # noqa: E731
    leaf = z.clone().requires_grad_()
    assert_close(grad(lstm_loss)(z), torch.autograd.grad(lstm_loss(leaf), leaf)[0])


def test_empty() -> None:
    for batch, n, m in ((0, 3, 2), (2, 3, 0), (2, 0, 0)):
        x, y = torch.rand(V, batch, n, C), torch.rand(V, batch, m, C)
        of_x, of_y = vmap(nearest_neighbours)(x, y)
        assert of_x.shape == (V, batch, n)
        assert of_y.shape == (V, batch, m)
        assert vmap(linear_assignment)(torch.rand(V, batch, n, m)).shape == (V, batch, n)
        for presence in ("feature", "none"):
            assert not vmap(lambda x, y, p=presence: hungarian_loss(x, y, presence=p))(x, y[:, :, :n]).isnan().any()
