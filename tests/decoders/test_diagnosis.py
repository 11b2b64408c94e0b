"""What a diagnosis finds on descents of which it is known what is wrong, and the warning in training."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import hessian

from setpred import (
    ChamferLoss,
    Diagnosis,
    DSPNDecoder,
    DSPNLoss,
    GradientDescent,
    HungarianLoss,
    PolyakDescent,
    PooledEncoder,
    RelationEncoder,
    SetPrediction,
    StandardScaler,
)
from setpred.decoders.diagnosis import _limit
from setpred.functional import descend
from tests import devices

B, N, C = 8, 4, 2
DOUBLE = torch.float64


def listed(elements: Tensor, mask: Tensor | None) -> Tensor:
    """An encoder of lists, whose inner problem is a quadratic of curvature 1 / D in every direction."""
    rows = elements if mask is None else torch.cat([elements, mask.unsqueeze(-1)], -1)
    return rows.flatten(1)


D = N * (C + 1)


def targets(size: int = N) -> tuple[Tensor, Tensor]:
    elements = torch.randn(B, size, C, dtype=DOUBLE)
    mask = torch.arange(size) < torch.arange(B).remainder(size).unsqueeze(1) + 1
    return elements * mask.unsqueeze(-1), mask


def make(encoder: Callable[..., Tensor] = listed, **options: Any) -> DSPNDecoder:
    settings = {"iters": 10, "lr": float(D), "repr_loss": "mse", "dtype": DOUBLE} | options
    return DSPNDecoder(encoder, set_size=N, channels=C, **settings)


def autoencoded(decoder: DSPNDecoder, **options: Any) -> Diagnosis:
    target, mask = targets()
    with torch.no_grad():
        z = decoder.encoder(target, mask.to(DOUBLE))
    return decoder.diagnose(z, target, mask, **options)


def says(diagnosis: Diagnosis, *beginnings: str) -> None:
    assert len(diagnosis.verdicts) == len(beginnings), diagnosis
    for verdict, beginning in zip(diagnosis.verdicts, beginnings, strict=True):
        assert verdict.startswith(beginning), verdict
        assert " ".join(verdict.split()) in " ".join(str(diagnosis).split())


def test_nothing_is_wrong() -> None:
    found = autoencoded(make(lr=0.5 * D))
    says(found, "Nothing is wrong")
    assert found.samples == B
    assert found.steps == (0, 10, 20, 40)
    assert found.loss.shape == (11,)
    assert found.set_error[0] > 0.1 > 1e-4 > found.set_error[1]
    assert found.rising == 0
    assert found.size_error == 0
    assert found.predicted_size == found.target_size == 2.5


def test_numbers_are_those_of_the_decoder() -> None:
    decoder = make(lr=0.1 * D, init="random", mask_clamp=(0.0, 1.0))
    target, mask = targets()
    z = listed(target, mask.to(DOUBLE)) + 0.1
    found = decoder.diagnose(z, target, mask, generator=devices.generator(0))
    decoder.eval()
    for k, (steps, error) in enumerate(zip(found.steps, found.set_error, strict=True)):
        if steps > 0:
            prediction = decoder(z, iters=steps, record=True, generator=devices.generator(0))
        else:
            prediction = decoder(z, record=True, generator=devices.generator(0))
            prediction = prediction._replace(
                elements=prediction.trajectory.elements[0], mask=prediction.trajectory.mask[0]
            )
        assert error == pytest.approx(HungarianLoss()(prediction.elements, target, prediction.mask, mask).item())
        if k < 2:
            loss = decoder.representation_loss(prediction, z).median()
            torch.testing.assert_close(found.loss[steps], loss.cpu())
    representation = DSPNLoss(listed, HungarianLoss(), repr_weight=1.0, repr_loss="mse", steps="last")
    means = [
        representation(prediction, t[None], m[None], z=v[None]) - representation(prediction, t[None], m[None])
        for t, m, v in zip(target, mask, z, strict=True)
        for prediction in [SetPrediction(t[None], m[None].to(DOUBLE))]
    ]
    assert found.target_loss == pytest.approx(torch.stack(means).median().item())
    start = decoder(z, init=(target, mask))
    assert found.target_error[0] == 0
    assert found.target_error[1] == pytest.approx(HungarianLoss()(start.elements, target, start.mask, mask).item())


def test_steps_too_small() -> None:
    found = autoencoded(make(lr=1e-6))
    says(found, "The descent does not move the set: ")
    assert "raise `lr` to 10." in found.verdicts[0]  # half of 2 / (1 / 12), to one digit
    assert "raise `max_lr`" in autoencoded(make(lr=PolyakDescent(max_lr=1e-6))).verdicts[0]
    advised = autoencoded(make(lr=10.0))
    says(advised, "Nothing is wrong")


@pytest.mark.parametrize("rule", [GradientDescent(2.5 * D), GradientDescent(2.5 * D, 0.5, nesterov=True)])
def test_steps_too_large(rule: GradientDescent) -> None:
    found = autoencoded(make(lr=rule, mask_clamp=None, encoder=listed_elements))
    says(found, "It blows up: ")
    assert f"above {found.limit:.3g}: use PolyakDescent, or lower `lr` to " in found.verdicts[0]


def test_polyak_steps_too_large_where_the_loss_has_a_floor() -> None:
    def out_of_reach(elements: Tensor, mask: Tensor | None) -> Tensor:
        return torch.cat([elements.flatten(1), 100 * torch.ones_like(elements[:, 0])], 1)  # z: zeros there

    decoder = make(lr=PolyakDescent(max_lr=100.0), mask_clamp=None, encoder=out_of_reach)
    target, _ = targets()
    found = decoder.diagnose(out_of_reach(target, None) * torch.tensor([1.0] * N * C + [0.0] * C), target)
    says(found, "It blows up: ")
    assert found.verdicts[0].endswith("Lower `max_lr`, which is 100, or train with a smaller learning rate.")


def listed_elements(elements: Tensor, mask: Tensor | None) -> Tensor:
    return elements.flatten(1)


def test_steps_somewhat_too_large_under_huber() -> None:
    """Huber's gradient is bounded: the set goes to and fro."""
    found = autoencoded(make(lr=3.0 * D, repr_loss="huber"))
    says(found, "It is unstable: ")
    assert found.rising > 0


def test_numbers_beyond_all_bounds_are_no_error() -> None:
    found = autoencoded(make(lr=1e12))
    says(found, "It blows up: ")
    assert found.set_error[1] > 1e10
    found = autoencoded(make(lr=1e300))
    says(found, "It blows up: ")
    assert found.set_error[1] == float("inf")


def test_too_few_steps() -> None:
    found = autoencoded(make(lr=0.1 * D))
    says(found, "It has not arrived: four times the steps lower the set error by ")


def test_an_encoder_that_does_not_see_positions() -> None:
    def sizes(elements: Tensor, mask: Tensor) -> Tensor:
        return 0 * elements.mean(1) + mask.mean(1, keepdim=True)

    decoder = make(sizes, lr=1.0)
    with torch.no_grad():
        decoder.initial_elements.mul_(10)  # positions are what is wrong
    found = autoencoded(decoder, set_loss=HungarianLoss("mse"))
    says(found, "The descent does not lower the set error: ")
    assert found.loss[-1] < 0.1 * found.loss[0]


def test_a_saturated_encoder() -> None:
    def saturated(elements: Tensor, mask: Tensor) -> Tensor:
        return torch.tanh(100 + listed(elements, mask))

    found = autoencoded(make(saturated))
    says(found, "The descent does not move the set: ")
    decoder = make(lambda elements, mask: 1e-4 * listed(elements, mask).tanh())
    target, mask = targets()
    found = decoder.diagnose(torch.ones(B, D, dtype=DOUBLE), target, mask)
    assert "saturated" in found.verdicts[0]


def test_an_attentive_encoder_is_looked_at_too() -> None:
    attention = nn.MultiheadAttention(C + 1, 1, batch_first=True, dtype=DOUBLE)

    def attentive(elements: Tensor, mask: Tensor) -> Tensor:
        rows = torch.cat([elements, mask.unsqueeze(-1)], -1)
        return attention(rows, rows, rows, need_weights=False)[0].amax(1)

    found = autoencoded(make(attentive, lr=1.0))
    assert found.curvature.gt(0).all()
    assert not found.verdicts[0].startswith("Nothing")


def test_more_steps_lead_past_the_target() -> None:
    """The vector is that of a set which lies beyond the target, seen from the start."""
    decoder = make(lr=0.02 * D)
    target, mask = targets()
    with torch.no_grad():
        start = decoder(torch.zeros(B, D, dtype=DOUBLE), record=True).trajectory
        target, mask = target, mask.to(DOUBLE)
        beyond = [t + 4 * (t - s[0]) for t, s in ((target, start.elements), (mask, start.mask))]
    found = decoder.diagnose(listed(*beyond), target, mask)
    assert any(verdict.startswith("More steps make the set worse: ") for verdict in found.verdicts), found


def test_a_vector_far_from_any_encoding() -> None:
    encoder = PooledEncoder(C, 32, 32, dtype=DOUBLE)
    decoder = make(encoder, iters=40, lr=PolyakDescent())
    target, mask = targets()
    found = decoder.diagnose(10 * torch.randn(B, 32, dtype=DOUBLE), target, mask)
    assert any(verdict.startswith("The target is no minimum: ") for verdict in found.verdicts), found


def test_another_minimum() -> None:
    """Of the square, there are two for each coordinate."""
    target = torch.rand(B, N, C, dtype=DOUBLE) + 0.5
    target[::2, 0] *= -1
    decoder = make(lambda elements, _: elements.square().flatten(1), mask_clamp=None, lr=0.1, iters=1000)
    found = decoder.diagnose(target.square().flatten(1), target)
    says(found, "It ends elsewhere: ")


def test_sizes_that_are_off() -> None:
    target, mask = targets()
    z = listed(target, torch.ones_like(mask, dtype=DOUBLE))
    found = make(iters=40).diagnose(z, target, mask, set_loss=HungarianLoss(presence="none"))
    sizes = "Sizes are off: 4 elements are predicted where 2.5 are true, with a mean difference of 1.5."
    says(found, f"{sizes} Give the encoder size_feature=True")
    found = make(listed_elements, iters=40, mask_clamp=None).diagnose(
        target.flatten(1), target, mask, set_loss=HungarianLoss(presence="none")
    )
    says(found, f"{sizes} This decoder carries no mask")


@pytest.mark.parametrize("name", ["z", "target"])
def test_what_is_not_finite_is_named_and_left_out(name: str) -> None:
    decoder = make(lr=0.5 * D)
    target, mask = targets()
    given = {"z": listed(target, mask.to(DOUBLE)), "target": target}
    whole = decoder.diagnose(**given, target_mask=mask)
    given[name] = given[name].clone()
    given[name][1, 0] = torch.nan
    found = decoder.diagnose(**given, target_mask=mask)
    says(found, f"NaN or infinity in `{name}` of 1 of 8 samples: ")
    assert found.samples == 7
    torch.testing.assert_close(found.curvature, whole.curvature[1:])
    given[name][:] = torch.inf
    says(decoder.diagnose(**given, target_mask=mask), f"NaN or infinity in `{name}` of 8 of 8 ")


def test_values_of_absent_elements_are_not_seen() -> None:
    decoder = make()
    target, mask = targets()
    z = listed(target, mask.to(DOUBLE))
    broken = target.masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert str(decoder.diagnose(z, broken, mask)) == str(decoder.diagnose(z, target, mask))


def test_parameters_that_are_not_finite() -> None:
    encoder = PooledEncoder(C, D, 8, dtype=DOUBLE)
    decoder = make(encoder)
    target, mask = targets()
    nn.init.constant_(encoder.layers[0].weight, torch.nan)
    found = decoder.diagnose(torch.randn(B, D, dtype=DOUBLE), target, mask)
    says(found, "NaN or infinity in `encoder.layers.0.weight`: ")
    assert found.samples == 0


@pytest.mark.parametrize(
    "rule",
    [
        GradientDescent(1.0),
        GradientDescent(1.0, 0.5),
        GradientDescent(1.0, 0.9),
        GradientDescent(1.0, 0.5, nesterov=True),
        GradientDescent(1.0, 0.9, nesterov=True),
    ],
)
def test_a_step_is_stable_up_to_the_limit(rule: GradientDescent) -> None:
    curvature = _limit(rule) * torch.tensor([[0.98], [1.02]], dtype=DOUBLE)
    start = torch.ones(2, 1, dtype=DOUBLE)
    end = descend(lambda y: 0.5 * (curvature * y.square()).sum(1), start, steps=2000, lr=rule).value
    assert end[0].abs() < 1e-3
    assert end[1].abs() > 1e3


@pytest.mark.parametrize("anchor", [0.0, 3.0])
@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
@pytest.mark.parametrize("encoder", [PooledEncoder, RelationEncoder])
def test_curvature_is_the_largest_eigenvalue_of_the_hessian(encoder: Any, mask_clamp: Any, anchor: float) -> None:
    decoder = make(encoder(C, 7, 16, dtype=DOUBLE), lr=0.5, mask_clamp=mask_clamp, anchor=anchor)
    target, mask = targets()
    z = torch.randn(B, 7, dtype=DOUBLE)
    found = decoder.diagnose(z, target, mask)
    path = decoder.eval()(z, record=True).trajectory
    losses = [decoder.representation_loss(SetPrediction(*at), z) for at in zip(path.elements, path.mask, strict=True)]
    best = torch.stack(losses).argmin(0), torch.arange(B)
    elements, masks = path.elements[best].detach(), path.mask[best].detach()

    def loss(y: Tensor, z: Tensor) -> Tensor:
        elements = y[: N * C].view(1, N, C)
        mask = None if mask_clamp is None else y[N * C :].view(1, N)
        pull = 0.5 * anchor * (elements - path.elements[0, 0].detach()).square().mean()
        return 0.5 * (decoder.encoder(elements, mask)[0] - z).square().mean() + pull

    for b in range(B):
        y = torch.cat([elements[b].flatten()] + ([] if mask_clamp is None else [masks[b]]))
        largest = torch.linalg.eigvalsh(hessian(lambda y, b=b: loss(y, z[b]), y))[-1]
        torch.testing.assert_close(found.curvature[b], largest.detach().cpu(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.stability, 0.5 * found.curvature)
    assert found.limit == 2


def test_curvature_in_many_dimensions() -> None:
    encoder = PooledEncoder(C, 64, 64)
    decoder = DSPNDecoder(encoder, set_size=40, channels=C, lr=0.1, repr_loss="mse", mask_clamp=None)
    z, target = torch.randn(2, 64), torch.randn(2, 40, C)
    found = decoder.diagnose(z, target, iters=1)
    elements = decoder.eval()(z, iters=1).elements.detach()
    for b in range(2):
        exact = torch.linalg.eigvalsh(
            hessian(lambda y, b=b: 0.5 * (encoder(y[None], None)[0] - z[b]).square().mean(), elements[b]).view(80, 80)
        )[-1]
        torch.testing.assert_close(found.curvature[b], exact.detach().cpu(), rtol=0.02, atol=0)


def test_an_own_step_rule_has_a_curvature_alone() -> None:
    found = autoencoded(make(lr=PolyakDescent(100.0)))
    assert found.stability is None
    assert found.limit is None
    assert "no fixed lr" in str(found)


class Careful(nn.Module):
    """Would be seen to run in training mode, or to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = PooledEncoder(C, 16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)

    def forward(self, elements: Tensor, mask: Tensor | None) -> Tensor:
        return self.drop(self.norm(self.inner(elements, mask)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(mode: Any, training: bool) -> None:
    decoder = DSPNDecoder.idspn(Careful(), set_size=N, channels=C).train(training)
    decoder.encoder.norm.eval()  # by itself, as when fine-tuned
    decoder(torch.randn(B, 16)).elements.sum().backward()
    state = copy.deepcopy(decoder.state_dict())
    grads = [p.grad.clone() for p in decoder.parameters() if p.grad is not None]
    assert grads
    watched = vars(decoder._watch).copy()
    random = torch.get_rng_state()
    with mode():
        z, target = torch.randn(B, 16), torch.randn(B, N, C)
        torch.set_rng_state(random)
        found = decoder.diagnose(z, target, set_loss=ChamferLoss())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in decoder.state_dict().items())
    kept = [p.grad for p in decoder.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))
    modes = {name: module.training for name, module in decoder.named_modules()}
    assert modes == {name: training and name != "encoder.norm" for name in modes}
    assert vars(decoder._watch) == watched
    assert all(not part.requires_grad for part in found if isinstance(part, Tensor))
    decoder(z.clone()).elements.sum().backward()  # and training goes on


def test_the_mode_is_put_back_after_an_error() -> None:
    decoder = make()
    with pytest.raises(ValueError, match="set_loss"):
        autoencoded(decoder, set_loss=HungarianLoss(reduction="none"))
    assert decoder.training


def test_is_measured_in_the_scalers_coordinates() -> None:
    target, mask = targets()
    present = mask.to(DOUBLE)
    scaler = StandardScaler(C, dtype=DOUBLE)
    scaler.location += torch.tensor([100.0, -3.0])
    scaler.scale *= torch.tensor([5.0, 0.1])
    plain, scaled = make(lr=0.1 * D), make(lr=0.1 * D, scaler=scaler)
    scaled.load_state_dict(plain.state_dict() | {f"scaler.{k}": v for k, v in scaler.state_dict().items()})
    z = listed(target, present) + 0.1
    expected = plain.diagnose(z, target, mask)
    for loss in (None, HungarianLoss(), HungarianLoss(scaler=scaler)):
        found = scaled.diagnose(z, scaler.inverse(target), mask, set_loss=loss)
        assert str(found) == str(expected)
    # Of fewer rows than the decoder has, too.
    short = slice(0, N - 1)
    expected = plain.diagnose(z, target[:, short], mask[:, short])
    assert str(scaled.diagnose(z, scaler.inverse(target[:, short]), mask[:, short])) == str(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"tol": 1e-3}, {"starts": 3}, {"mask_clamp": None}, {"scaler": True}])
def test_with_every_option_and_dtype(dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = options | ({"scaler": StandardScaler(C)} if "scaler" in options else {})
    decoder = DSPNDecoder(PooledEncoder(C, 16, 16, dtype=dtype), set_size=N, channels=C, dtype=dtype, **options)
    target, mask = targets()
    found = decoder.diagnose(torch.randn(B, 16), target.float(), mask)
    assert found.curvature.isfinite().all()
    assert found.curvature.dtype == torch.float32
    assert all(map(torch.isfinite, map(torch.tensor, found.set_error)))


@pytest.mark.parametrize(
    ("z", "target", "match"),
    [
        (torch.randn(0, D), torch.randn(0, N, C), "`z` must hold a sample"),
        (torch.randn(B, D), torch.randn(B, N + 1, C), "`target` must have at most the decoder's 4 rows"),
        (torch.randn(B, D), torch.randn(B - 1, N, C), "`target` must have shape"),
        (torch.randn(B), torch.randn(B, N, C), "`z` must have shape"),
    ],
)
def test_wrong_shapes(z: Tensor, target: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(dtype=None).diagnose(z, target)


def train(decoder: DSPNDecoder, calls: int, **options: Any) -> list[str]:
    z = torch.randn(B, D)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            decoder(z, **options)
    return [str(warning.message) for warning in caught]


def small(**options: Any) -> DSPNDecoder:
    settings = {"iters": 2, "lr": 1e-6, "differentiate": "implicit"} | options
    return DSPNDecoder(listed, set_size=N, channels=C, **settings)


@pytest.mark.parametrize(
    "options",
    [{}, {"differentiate": "unrolled"}, {"starts": 2}, {"tol": 1e-9}, {"tol": 1e-9, "starts": 2}, {"init": "random"}],
)
def test_a_descent_that_does_not_move_is_warned_of_once(options: dict[str, Any]) -> None:
    decoder = small(**options)
    assert train(decoder, 127) == []
    (message,) = train(decoder, 1)
    assert message.startswith("DSPNDecoder does not descend: of 8 of 8 sets")
    assert "decoder.diagnose(z, target, target_mask)" in message
    assert train(decoder, 900) == []


def test_a_descent_that_blows_up_is_warned_of_once() -> None:
    decoder = small(lr=1e38, repr_loss="mse", iters=4, mask_clamp=None)
    decoder.encoder = listed_elements
    z = torch.randn(B, N * C)
    with pytest.warns(RuntimeWarning, match=r"^DSPNDecoder blows up: 8 of 8 sets are not finite \(training call 1\)"):
        decoder(z)
    decoder(z)  # warnings are errors here


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1.0, "iters": 10},  # moves
        {"iters": 1},  # one step has no loss after it
        {"tol": 1e9},  # all have arrived
    ],
)
def test_where_nothing_is_wrong_there_is_no_warning(options: dict[str, Any]) -> None:
    assert train(small(**options), 300) == []


def test_a_start_that_is_made_for_the_vector_may_be_the_end() -> None:
    assert train(small(), 300, init=torch.rand(B, N, C)) == []  # goes on where another ended
    assert train(small(init=nn.Sequential(nn.Linear(D, N * C), nn.Unflatten(1, (N, C)))), 300) == []


def test_evaluation_is_not_watched() -> None:
    decoder = small().eval()
    assert train(decoder, 300) == []
    assert decoder._watch.descents == 0


def test_the_count_is_carried_along_but_not_in_the_state() -> None:
    decoder = small(init="random")
    assert train(decoder, 100) == []
    assert decoder.state_dict() == {}
    for carried in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert train(carried, 27) == []
        assert len(train(carried, 1)) == 1
    assert not decoder._watch.warned


def test_looking_changes_no_result() -> None:
    for differentiate in ("implicit", "unrolled"):
        decoder, late = small(lr=1.0, differentiate=differentiate), small(lr=1.0, differentiate=differentiate)
        late.load_state_dict(decoder.state_dict())
        late._watch.descents = 1023
        z = torch.randn(B, D)
        for expected, actual in zip(decoder(z), late(z), strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)
            else:
                assert (actual is None) == (expected is None)


@pytest.mark.cpu_only("what compiles there compiles here")
def test_nothing_is_looked_at_where_there_are_no_values() -> None:
    decoder = small()
    decoder._watch.descents = 127
    z = torch.randn(B, D)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.compile(decoder, backend="eager", fullgraph=True)(z)
        torch.func.vmap(lambda z: decoder(z)[:2])(z.unsqueeze(0))
        assert decoder._watch.descents == 127
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            copy.deepcopy(decoder)(mode.from_tensor(z))
        copy.deepcopy(decoder).to("meta")(z.to("meta"))
        with pytest.raises(RuntimeWarning, match="does not descend"):  # but where there are
            decoder(z)
