"""DSPNDecoder: its numbers, its derivatives, its initial sets and its settings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from setpred import (
    DSPNDecoder,
    GradientDescent,
    MLPDecoder,
    PolyakDescent,
    PooledEncoder,
    SetPrediction,
    SlotDecoder,
)
from tests import devices, oracles
from tests.rules import paper_decoder, with_rule

EXACT = {"rtol": 1e-9, "atol": 1e-9}
N, C, D = 4, 2, 6

OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "mse": {"repr_loss": "mse"},
    "no mask": {"mask_clamp": None},
    "another clamp": {"mask_clamp": (0.3, 0.6)},
    "momentum": {"momentum": 0.8},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "clip": {"grad_clip": 0.1},
    "anchor": {"anchor": 0.5},
    "project": {"project": lambda elements, mask: (elements.clamp(0, 0.6) * mask.unsqueeze(-1), mask / 2)},
    "tol": {"tol": 0.4},
    "idspn": {"momentum": 0.9, "nesterov": True, "repr_loss": "mse", "anchor": 0.1, "grad_clip": 0.1, "tol": 0.5},
    "idspn, no mask": {"momentum": 0.9, "nesterov": True, "repr_loss": "mse", "anchor": 0.1, "mask_clamp": None},
}
EVERY_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
BOTH_DERIVATIVES = pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])


def make_decoder(iters: int = 5, lr: float = 1.0, **options: Any) -> DSPNDecoder:
    encoder = PooledEncoder(C, D, 8, size_feature=True, dtype=torch.float64)
    options = {"iters": iters, "lr": lr, "set_size": N, "channels": C, "dtype": torch.float64} | options
    return paper_decoder(encoder, **with_rule(options))


def make_z(batch: int = 3) -> Tensor:
    return torch.randn(batch, D, dtype=torch.float64, requires_grad=True)


def literally(decoder: DSPNDecoder, z: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
    lr = decoder.lr.lr if isinstance(decoder.lr, GradientDescent) else decoder.lr
    elements = decoder.initial_elements.expand(len(z), N, C)
    mask = torch.full((len(z), N), 0.5, dtype=z.dtype) if decoder.mask_clamp is not None else None
    return oracles.decode(decoder.encoder, z, elements, mask, iters=decoder.iters, lr=lr, **options)


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a value's random but fixed projection; zeros where it does not depend on an input."""
    if not value.requires_grad:
        return [torch.zeros_like(part) for part in inputs]
    weight = torch.randn(value.shape, dtype=value.dtype, generator=devices.generator(1))
    return list(torch.autograd.grad((value * weight).sum(), inputs, retain_graph=True, materialize_grads=True))


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, **EXACT)


# Steps


@EVERY_OPTION
@given(batch=st.integers(1, 3), iters=st.integers(1, 6), lr=st.floats(0.2, 2), seed=st.integers(0, 2**31))
@settings(max_examples=8)
def test_steps_equal_the_formula(options: dict[str, Any], batch: int, iters: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    decoder, z = make_decoder(iters, lr, **options), make_z(batch)
    elements, mask, trajectory = decoder(z)
    expected = literally(decoder, z, options)
    assert_close(tuple(trajectory), expected)
    assert_close((elements, mask), (expected[0][-1], expected[1][-1]))
    assert [tuple(part.shape) for part in trajectory] == [
        (iters + 1, batch, N, C),
        (iters + 1, batch, N),
        (iters, batch),
        (iters, batch),
    ]


@EVERY_OPTION
def test_unrolled_gradients_equal_those_of_the_literal_loop(options: dict[str, Any]) -> None:
    decoder, z = make_decoder(**options), make_z()
    inputs = [z, *decoder.parameters()]
    for actual, expected in zip(decoder(z).trajectory, literally(decoder, z, options), strict=True):
        assert_close(gradients(actual, inputs), gradients(expected, inputs))


def test_masks_are_cut_off_in_some_steps_and_not_in_others() -> None:
    mask = make_decoder()(make_z(8)).mask
    assert (mask == 0).any()
    assert ((mask > 0) & (mask < 1)).any()


@pytest.mark.parametrize("name", ["tol", "idspn"])
def test_some_samples_stop_early_and_others_do_not(name: str) -> None:
    elements = make_decoder(**OPTIONS[name])(make_z(32)).trajectory.elements
    stopped = (elements[-1] == elements[-2]).all(2).all(1)
    assert stopped.any()
    assert not stopped.all()
    assert not (elements[1] == elements[0]).all(2).all(1).all()


def test_lr_25_is_the_published_800_for_a_loss_averaged_over_a_batch_of_32() -> None:
    decoder, z, batch = make_decoder(10, 25.0), make_z(32), 32
    elements = decoder.initial_elements.expand(batch, N, C)
    mask = torch.full((batch, N), 0.5, dtype=torch.float64, requires_grad=True)
    for _ in range(10):
        loss = F.smooth_l1_loss(decoder.encoder(elements, mask), z, reduction="mean")
        of_elements, of_mask = torch.autograd.grad(loss, (elements, mask), create_graph=True)
        elements, mask = elements - 800 * of_elements, (mask - 800 * of_mask).clamp(0, 1)
    actual, inputs = decoder(z), [z, *decoder.parameters()]
    assert_close((actual.elements, actual.mask), (elements, mask))
    assert_close(gradients(actual.elements, inputs), gradients(elements, inputs))


def test_idspn_steps_are_those_of_torch_sgd() -> None:
    encoder = PooledEncoder(C, D, 8, dtype=torch.float64)
    options = {"mask_clamp": None, "dtype": torch.float64}
    decoder = DSPNDecoder.idspn(encoder, set_size=N, channels=C, init="learned", anchor=0.1, **options)
    z = make_z()
    start = decoder.initial_elements.detach().expand(3, N, C)
    y = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([y], lr=1.0, momentum=0.9, nesterov=True)
    for _ in range(20):
        optimizer.zero_grad()
        loss = 0.5 * F.mse_loss(encoder(y, None), z, reduction="none").sum(0).mean()
        (loss + 0.1 * 0.5 * F.mse_loss(y, start, reduction="none").sum(0).mean()).backward()
        optimizer.step()
    assert_close(decoder(z).elements, y)


# Implicit differentiation


@pytest.mark.parametrize("iters", [1, 4])
@pytest.mark.parametrize("anchor", [0.0, 0.3])
@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
def test_implicit_gradient_is_that_of_one_step(
    iters: int, anchor: float, mask_clamp: tuple[float, float] | None
) -> None:
    options = {"momentum": 0.9, "nesterov": True, "grad_clip": 0.5, "anchor": anchor, "mask_clamp": mask_clamp}
    decoder, z = make_decoder(iters, 1.0, differentiate="implicit", **options), make_z(8)
    actual = decoder(z)
    before = literally(decoder, z, options)
    assert_close((actual.elements, actual.mask), (before[0][-1], before[1][-1]))

    # By hand, at the point y before the last step: v^T d(P(y - g) - y), y held constant.
    y, m = (part[-2].detach().requires_grad_() for part in before[:2])
    difference = F.smooth_l1_loss(decoder.encoder(y, m if mask_clamp else None), z, reduction="none")
    objective = difference.mean(1).sum() + anchor / 2 * (y - decoder.initial_elements).square().sum() / (N * C)
    of_y, of_m = torch.autograd.grad(objective, (y, m), create_graph=True, materialize_grads=True)
    residual = torch.cat([-of_y, ((m - of_m).clamp(0, 1) - m).unsqueeze(-1)], -1)
    both = torch.cat([actual.elements, actual.mask.unsqueeze(-1)], -1)
    parameters = list(decoder.encoder.parameters())
    assert_close(gradients(both, [z, *parameters]), gradients(residual, [z, *parameters]))
    assert all(part.any() for part in gradients(both, [z, *parameters]))

    assert decoder.initial_elements.requires_grad == (anchor > 0)
    if anchor:
        v = torch.rand(8, N, C, dtype=torch.float64)
        (of_start,) = torch.autograd.grad((v * actual.elements).sum(), decoder.initial_elements)
        assert_close(of_start, anchor / (N * C) * v.sum(0))


# Initial sets


class Start(nn.Module):
    """Y_0 from z; perhaps the mask too."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.linear = nn.Linear(D, N * (C + 1), dtype=torch.float64)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        rows = self.linear(z).view(-1, N, C + 1)
        return (rows[..., :C], rows[..., C] + 0.5) if self.masked else rows[..., :C]


def test_learned_start_is_one_set_for_all_uniform_in_0_1() -> None:
    decoder = make_decoder(set_size=1000, dtype=torch.float32)
    values = decoder.initial_elements
    assert values.shape == (1000, C)
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() <= 1
    before = values.detach().clone(), [p.detach().clone() for p in decoder.encoder.parameters()]
    decoder.reset_parameters()
    assert not torch.equal(values, before[0])
    assert_close([p.detach() for p in decoder.encoder.parameters()], before[1])
    trajectory = decoder.double()(make_z()).trajectory
    assert all(torch.equal(start, decoder.initial_elements) for start in trajectory.elements[0])
    assert (trajectory.mask[0] == 0.5).all()


def test_random_start_is_fresh_unless_a_generator_repeats_it() -> None:
    decoder, z = make_decoder(init="random", set_size=200), make_z()

    def start(generator: torch.Generator | None = None) -> Tensor:
        return decoder(z, generator=generator).trajectory.elements[0]

    one, two = start(), start()
    assert not torch.equal(one, two)
    assert not torch.equal(one[0], one[1])  # nor is it the same for all samples
    assert abs(one.std() - 0.1) < 0.01
    assert abs(one.mean()) < 0.01
    assert list(decoder.parameters()) == list(decoder.encoder.parameters())

    state = devices.random_state()
    assert torch.equal(start(devices.generator(5)), start(devices.generator(5)))
    assert torch.equal(devices.random_state(), state)


@pytest.mark.parametrize("masked", [False, True])
@BOTH_DERIVATIVES
def test_start_from_a_module_of_ones_own(masked: bool, differentiate: str) -> None:
    decoder, z = make_decoder(init=Start(masked), differentiate=differentiate, anchor=0.1), make_z()
    elements, mask, trajectory = decoder(z, record=True)
    given = decoder.init(z) if masked else (decoder.init(z), torch.full((3, N), 0.5, dtype=torch.float64))
    assert torch.equal(trajectory.elements[0], given[0])
    assert torch.equal(trajectory.mask[0], given[1].clamp(0, 1))
    (elements.sum() + mask.sum()).backward()
    assert decoder.init.linear.weight.grad.any()
    of_mask = decoder.init.linear.weight.grad.view(N, C + 1, D)[:, C]
    assert of_mask.any() == (masked and differentiate == "unrolled")  # the anchor pulls elements only


@pytest.mark.parametrize("init", ["learned", "random", Start(True)])
@pytest.mark.parametrize("masked", [False, True])
def test_start_given_to_forward_takes_the_place_of_the_decoders_own(init: Any, masked: bool) -> None:
    decoder, z = make_decoder(init=init), make_z()
    elements, mask = torch.randn(3, N, C, dtype=z.dtype), torch.rand(3, N, dtype=z.dtype) * 2 - 0.5
    actual = decoder(z, init=(elements, mask) if masked else elements).trajectory
    start = mask.clamp(0, 1) if masked else torch.full_like(mask, 0.5)
    expected = oracles.decode(decoder.encoder, z, elements, start, iters=5, lr=1.0)
    assert_close(tuple(actual), expected)


def test_a_bool_mask_may_start() -> None:
    decoder, z = make_decoder(), make_z()
    elements, mask = torch.randn(3, N, C, dtype=z.dtype), torch.rand(3, N) < 0.5
    assert_close(decoder(z, init=(elements, mask)), decoder(z, init=(elements, mask.double())))


def test_a_random_start_has_the_encoders_dtype_and_any_other_is_cast_to_it() -> None:
    encoder = PooledEncoder(C, D)
    for z in (make_z(), make_z().bfloat16()):
        assert paper_decoder(encoder, set_size=N, channels=C, init="random")(z).elements.dtype == torch.float32
        init = torch.rand(3, N, C, dtype=z.dtype)
        assert paper_decoder(encoder, set_size=N, channels=C)(z, init=init).elements.dtype == torch.float32
        mean = paper_decoder(lambda elements, mask: elements.mean(1), set_size=N, channels=D, init="random")
        assert mean(z).elements.dtype == z.dtype


# Masks and projections


def test_without_a_mask_the_encoder_gets_none_and_the_prediction_ones() -> None:
    seen = []

    def encoder(elements: Tensor, mask: Tensor | None) -> Tensor:
        seen.append(mask)
        return elements.mean(1)

    elements, mask, trajectory = paper_decoder(encoder, 3, mask_clamp=None, set_size=N, channels=D)(torch.randn(2, D))
    assert seen == [None] * 3
    assert torch.equal(mask, torch.ones(2, N))
    assert torch.equal(trajectory.mask, torch.ones(4, 2, N))
    assert elements.requires_grad
    assert not mask.requires_grad


@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
def test_prediction_of_another_decoder_is_a_start(mask_clamp: tuple[float, float] | None) -> None:
    first = MLPDecoder(D, N, C, 8, mask_clamp=mask_clamp, dtype=torch.float64)
    decoder, z = make_decoder(init=first, mask_clamp=mask_clamp), make_z()
    prediction = first(z)
    assert_close(decoder(z).trajectory.elements[0], prediction.elements)
    assert_close(decoder(z).trajectory.mask[0], prediction.mask)
    given = prediction.elements if mask_clamp is None else prediction[:2]
    plain = make_decoder(mask_clamp=mask_clamp)
    plain.encoder = decoder.encoder
    assert_close(decoder(z), plain(z, init=given))
    assert_close(plain(z, init=prediction), plain(z, init=given))


@pytest.mark.parametrize("first", [MLPDecoder(D, N, C, 8), SlotDecoder(D, N, C, 8, tokens=2)])
def test_a_start_of_another_dtype(first: nn.Module) -> None:
    """It is given z in its own, as the encoder is; a random one draws the same again if it is asked by itself."""
    decoder = make_decoder(init=first)
    for z in (make_z(), make_z().bfloat16()):
        start = first(z.float()) if isinstance(first, MLPDecoder) else first(z.float(), generator=devices.generator(1))
        one, two = decoder(z).trajectory, decoder(z, init=start).trajectory
        assert one.elements.dtype == torch.float64
        assert_close(two.elements[0], start.elements.double())
        if isinstance(first, MLPDecoder):
            assert_close(one.elements, two.elements)


def test_of_a_prediction_the_mask_is_left_out_where_none_is_carried() -> None:
    prediction, z = MLPDecoder(D, N, C, 8, dtype=torch.float64)(make_z()), make_z()
    decoder = make_decoder(mask_clamp=None)
    assert_close(decoder(z, init=prediction).elements, decoder(z, init=prediction.elements).elements)


def test_several_starts_have_the_masks_of_the_first() -> None:
    decoder, z = make_decoder(init=MLPDecoder(D, N, C, 8, dtype=torch.float64)), make_z()
    elements, mask, _ = decoder.init(z)
    steps = decoder(z, starts=20).trajectory
    assert not torch.equal(steps.elements[0], elements)  # another one was the best
    assert_close(steps.mask[0], mask)


@pytest.mark.parametrize("mask_clamp", [(0.0, 1.0), (0.25, 0.75), None])
@BOTH_DERIVATIVES
def test_project_comes_after_the_clamp_of_each_step(mask_clamp: tuple[float, float] | None, differentiate: str) -> None:
    low, high = mask_clamp or (1.0, 1.0)

    def project(elements: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        assert (low <= mask).all()
        assert (mask <= high).all()
        return elements / elements.norm(dim=-1, keepdim=True), 2 * mask + 3

    decoder = make_decoder(lr=20.0, mask_clamp=mask_clamp, project=project, differentiate=differentiate)
    trajectory = decoder(make_z(), record=True).trajectory
    assert_close(trajectory.elements[1:].norm(dim=-1), torch.ones(5, 3, N, dtype=torch.float64))
    if mask_clamp is not None:
        assert (trajectory.mask[1:] >= 2 * low + 3).all()
        assert (trajectory.mask[1:] <= 2 * high + 3).all()


# Settings


def test_iters_may_be_overridden() -> None:
    decoder, z = make_decoder(4), make_z()
    assert_close(decoder(z, iters=9), make_like(decoder, iters=9)(z))
    assert len(decoder(z, iters=9).trajectory.repr_loss) == 9
    assert decoder.iters == 4


def test_evaluation_may_have_another_number_of_steps() -> None:
    decoder, z = make_decoder(4, eval_iters=9), make_z()
    assert len(decoder(z, record=True).trajectory.repr_loss) == 4
    assert_close(decoder.eval()(z), make_like(decoder, iters=9).eval()(z))
    assert len(decoder(z, iters=2, record=True).trajectory.repr_loss) == 2
    assert len(decoder.diagnose(z, torch.zeros(len(z), decoder.set_size, decoder.channels)).loss) == 4 + 1
    assert DSPNDecoder.recommended(decoder.encoder, set_size=3, channels=2, iters=7).eval_iters == 28


def make_like(decoder: DSPNDecoder, **options: Any) -> DSPNDecoder:
    other = make_decoder(**options)
    other.load_state_dict(decoder.state_dict())
    return other


@pytest.mark.parametrize("training", [True, False])
@BOTH_DERIVATIVES
@pytest.mark.parametrize("record", [None, True, False])
def test_what_is_recorded(training: bool, differentiate: str, record: bool | None) -> None:
    decoder = make_decoder(differentiate=differentiate).train(training)
    elements, _, trajectory = decoder(make_z(), record=record)
    default = training and differentiate == "unrolled"
    assert (trajectory is not None) == (default if record is None else record)
    assert elements.requires_grad
    if trajectory is not None:
        assert torch.equal(trajectory.elements[-1], elements)
        assert all(part.requires_grad == (differentiate == "unrolled") for part in trajectory)


def settings_of(decoder: DSPNDecoder) -> dict[str, Any]:
    names = ["iters", "lr", "mask_clamp", "set_size", "channels", "eval_iters", "repr_loss", "anchor"]
    return {
        name: getattr(decoder, name)
        for name in [*names, "project", "tol", "differentiate", "checkpoint", "starts", "init"]
    }


PAPER = {
    "iters": 10,
    "lr": 25.0,
    "mask_clamp": (0.0, 1.0),
    "set_size": 7,
    "channels": C,
    "eval_iters": None,
    "repr_loss": "huber",
    "anchor": 0.0,
    "project": None,
    "tol": None,
    "differentiate": "unrolled",
    "checkpoint": False,
    "starts": 1,
    "init": "learned",
}
IDSPN = PAPER | {
    "iters": 20,
    "lr": GradientDescent(1.0, momentum=0.9, nesterov=True, grad_clip=10.0),
    "repr_loss": "mse",
    "differentiate": "implicit",
    "init": "random",
}

DEFAULT = PAPER | {"lr": PolyakDescent(1.0, momentum=0.9)}
RECOMMENDED = IDSPN | {"iters": 10, "eval_iters": 40, "lr": PolyakDescent(1.0, momentum=0.9)}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (DSPNDecoder, DEFAULT),
        (DSPNDecoder.recommended, RECOMMENDED),
        (DSPNDecoder.paper, PAPER),
        (DSPNDecoder.idspn, IDSPN),
    ],
    ids=["default", "recommended", "paper", "idspn"],
)
def test_presets_have_the_published_numbers(build: Callable[..., DSPNDecoder], expected: dict[str, Any]) -> None:
    encoder = PooledEncoder(C, D)
    assert settings_of(build(encoder, set_size=7, channels=C)) == expected
    overrides = {"iters": 40, "eval_iters": 50, "mask_clamp": None, "tol": 0.1, "anchor": 0.2, "init": "random"}
    decoder = build(encoder, set_size=7, channels=C, dtype=torch.float64, **overrides)
    assert settings_of(decoder) == expected | overrides
    assert decoder.encoder is encoder


def test_presets_build_subclasses() -> None:
    class Mine(DSPNDecoder):
        pass

    assert type(Mine.paper(PooledEncoder(C, D), set_size=N, channels=C)) is Mine


def test_repr_says_what_is_effective() -> None:
    decoder = DSPNDecoder.idspn(PooledEncoder(C, D), set_size=N, channels=C, tol=0.5, init="random")
    expected = ", ".join(f"{k}={v!r}" for k, v in settings_of(decoder).items() if k != "project")
    assert decoder.extra_repr() == expected
    assert "(init): Start(" in repr(make_decoder(init=Start(True)))


# Errors and edges


def test_an_empty_batch_is_decoded_to_an_empty_batch() -> None:
    for options in OPTIONS.values():
        for differentiate in ("unrolled", "implicit"):
            decoder = make_decoder(**options, differentiate=differentiate)
            elements, mask, trajectory = decoder(make_z(0), record=True)
            assert elements.shape == (0, N, C)
            assert mask.shape == (0, N)
            assert trajectory.elements.shape == (6, 0, N, C)
            assert trajectory.repr_loss.shape == (5, 0)
            elements.sum().backward()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`iters` must be at least 1, got 0", {"iters": 0}),
        (TypeError, r"`iters` must be an integer, got 2.5 \(float\)", {"iters": 2.5}),
        (ValueError, "`lr` must be positive, got 0", {"lr": 0}),
        (ValueError, "`lr` must be positive, got nan", {"lr": float("nan")}),
        (ValueError, "`set_size` must be at least 1, got 0", {"set_size": 0}),
        (TypeError, "`set_size` must be an integer, got 2.0", {"set_size": 2.0}),
        (ValueError, "`channels` must be at least 1, got 0", {"channels": 0}),
        (TypeError, "`channels` must be an integer, got '2'", {"channels": "2"}),
        (ValueError, "`momentum` must be at least 0, got -1", {"momentum": -1}),
        (ValueError, "`momentum` must be positive when `nesterov` is True, got 0", {"nesterov": True}),
        (ValueError, "`anchor` must be at least 0, got -0.1", {"anchor": -0.1}),
        (ValueError, "`grad_clip` must be positive, got 0", {"grad_clip": 0}),
        (ValueError, "`tol` must be at least -inf, got nan", {"tol": float("nan")}),
        (ValueError, "`repr_loss` must be one of 'huber', 'mse', got 'l1'", {"repr_loss": "l1"}),
        (ValueError, "`differentiate` must be one of 'unrolled', 'implicit', got 'no'", {"differentiate": "no"}),
        (
            ValueError,
            "`checkpoint` must be False when `differentiate` is 'implicit'",
            {"checkpoint": True, "differentiate": "implicit"},
        ),
        (ValueError, "`init` must be 'learned', 'random' or a module, got 'zeros'", {"init": "zeros"}),
        (ValueError, "`init` must be 'learned', 'random' or a module, got <class", {"init": MLPDecoder}),
        *[
            (ValueError, "`mask_clamp` must be an increasing pair of numbers or None, got", {"mask_clamp": wrong})
            for wrong in [(1.0, 0.0), (0.0, 0.0), (0.0, float("nan")), (0.0,), (0.0, 0.5, 1.0), 0.5, ("a", "b")]
        ],
    ],
)
def test_refuses_settings(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        make_decoder(**options)


@pytest.mark.parametrize(
    ("error", "message", "z", "options"),
    [
        (ValueError, r"`z` must have shape \(B, D\), got float64 of shape \(6,\)", make_z()[0], {}),
        (ValueError, r"`z` must have shape \(B, D\), got float64 of shape \(3, 6, 1\)", make_z()[..., None], {}),
        (TypeError, r"`z` must have a floating dtype, got int64 of shape \(3, 6\)", make_z().long(), {}),
        (TypeError, r"`z` must be a tensor, got \[1.0\] \(list\)", [1.0], {}),
        (
            ValueError,
            r"`encoder\(elements, mask\)` must have shape \(3, 7\), got float64 of shape \(3, 6\)",
            torch.zeros(3, 7),
            {},
        ),
        (ValueError, "`iters` must be at least 1, got 0", make_z(), {"iters": 0}),
        (TypeError, "`iters` must be an integer, got 1.5", make_z(), {"iters": 1.5}),
        (
            ValueError,
            r"`init elements` must have shape \(3, 4, 2\), got float32 of shape \(2, 4, 2\)",
            make_z(),
            {"init": torch.zeros(2, N, C)},
        ),
        (
            ValueError,
            r"`init elements` must have shape \(3, 4, 2\), got float32 of shape \(4, 2\)",
            make_z(),
            {"init": torch.zeros(N, C)},
        ),
        (
            TypeError,
            "`init elements` must have a floating dtype, got int64",
            make_z(),
            {"init": torch.zeros(3, N, C).long()},
        ),
        (
            ValueError,
            r"`init mask` must have shape \(3, 4\), got float32 of shape \(3, 4, 1\)",
            make_z(),
            {"init": (torch.zeros(3, N, C), torch.zeros(3, N, 1))},
        ),
        (
            TypeError,
            r"`init mask` must be bool or floating \(1 = present\), got int64",
            make_z(),
            {"init": (torch.zeros(3, N, C), torch.zeros(3, N).long())},
        ),
    ],
)
def test_refuses_inputs(error: type[Exception], message: str, z: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        make_decoder()(z, **options)


@pytest.mark.parametrize(
    ("message", "encoder"),
    [
        (
            r"must have shape \(3, 6\), got float64 of shape \(3, 4, 6\)",
            lambda elements, mask: elements.repeat(1, 1, 3),
        ),
        (r"must have shape \(3, 6\), got float64 of shape \(3, 2\)", lambda elements, mask: elements.mean(1)),
        (r"must have shape \(3, 6\), got float64 of shape \(\)", lambda elements, mask: elements.mean()),
    ],
)
@BOTH_DERIVATIVES
def test_refuses_an_encoder_whose_result_is_not_like_z(
    message: str, encoder: Callable[..., Tensor], differentiate: str
) -> None:
    decoder = paper_decoder(encoder, set_size=N, channels=C, differentiate=differentiate, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`encoder\(elements, mask\)` " + message):
        decoder(make_z())


@pytest.mark.parametrize("parts", [1, 3])
def test_refuses_other_parts_of_a_start(parts: int) -> None:
    start, message = (torch.zeros(3, N, C),) * parts, rf"elements and mask, or a prediction, got {parts} parts$"
    with pytest.raises(ValueError, match=message):
        make_decoder()(make_z(), init=start)


def test_refuses_a_mask_where_none_is_carried() -> None:
    elements, mask = torch.zeros(3, N, C, dtype=torch.float64), torch.ones(3, N, dtype=torch.float64)
    message = "`init` must be elements alone when `mask_clamp` is None, got a mask too"
    with pytest.raises(ValueError, match=message):
        make_decoder(mask_clamp=None)(make_z(), init=(elements, mask))
    with pytest.raises(ValueError, match=message):
        make_decoder(mask_clamp=None, init=Start(True))(make_z())
    assert isinstance(make_decoder(mask_clamp=None, init=Start(False))(make_z()), SetPrediction)
