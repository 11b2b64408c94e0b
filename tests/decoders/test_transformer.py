"""TransformerDecoder: queries, tokens and their mask, layers; what it shares with others is in test_baselines.py."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from setpred import (
    DSPNLoss,
    HungarianLoss,
    PooledEncoder,
    SetPrediction,
    StandardScaler,
    Trajectory,
    TransformerDecoder,
)
from tests import devices, oracles

B, S, D, N, C, H = 3, 5, 6, 4, 2, 8
KINDS = ("learned", "random", "top-n")
EVERY_KIND = pytest.mark.parametrize("queries", KINDS)


def make(queries: Any = "learned", **options: Any) -> TransformerDecoder:
    settings = {"layers": 2, "heads": 2, "queries": queries, "dtype": torch.float64} | options
    return TransformerDecoder(D, N, C, H, **settings)


def decode(decoder: nn.Module, z: Tensor, mask: Tensor | None = None, **options: Any) -> SetPrediction:
    """Decode with the same random queries at each call."""
    return decoder(z, mask, generator=devices.generator(3), **options)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (B, S, D)), dtype=torch.float64)


def holes() -> Tensor:
    """Which tokens are there: all, some, one."""
    return torch.arange(S) < torch.tensor([[S], [3], [1]])


def assert_close(actual: SetPrediction, expected: SetPrediction) -> None:
    for a, e in zip((*actual[:2], *(actual[2] or ())[:2]), (*expected[:2], *(expected[2] or ())[:2]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


class Given(nn.Module):
    """Queries that are given."""

    def __init__(self, points: Tensor) -> None:
        super().__init__()
        self.points = points

    def forward(self, vector: Tensor, generator: object) -> Tensor:
        return self.points.expand(len(vector), -1, -1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("weight", [None, "hard", "soft"])
def test_equals_the_formula(norm_first: bool, weight: str | None) -> None:
    decoder, z = make(norm_first=norm_first, mask_clamp=None), tokens()
    mask = {None: None, "hard": holes(), "soft": torch.rand(B, S, dtype=torch.float64)}[weight]
    with torch.no_grad():
        for parameter in decoder.parameters():  # biases too
            parameter.normal_(0, 0.5)
    actual, state = decoder(z, mask), decoder.state_dict()
    for b in range(B):
        of_token = torch.ones(S) if mask is None else mask[b].double()
        expected = oracles.transformer(
            state["queries.points"], z[b], of_token, state, layers=2, heads=2, norm_first=norm_first
        )
        torch.testing.assert_close(actual.trajectory.elements[:, b], torch.stack(expected))
        torch.testing.assert_close(actual.elements[b], expected[-1])


def test_top_n_equals_the_formula() -> None:
    queries = make("top-n").queries
    vector = tokens(B, H)
    chosen = queries(vector, None)
    for b in range(B):
        torch.testing.assert_close(chosen[b], oracles.top_n(vector[b], N, queries.state_dict()))
    assert queries.points.shape == (2 * N, H)
    assert len(torch.unique(chosen.detach().flatten(0, 1), dim=0)) > N  # not the same for all samples
    gradients = torch.autograd.grad(chosen.square().sum(), [*queries.parameters()])
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("masked", [False, True])
def test_top_n_chooses_by_the_mean_token(masked: bool) -> None:
    decoder, z, mask = make("top-n"), tokens(), holes() if masked else None
    seen: list[Tensor] = []
    decoder.queries.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoder(z, mask)
    sizes = holes().sum(1).tolist() if masked else [S] * B
    expected = [decoder.input(rows[:size]).mean(0) for rows, size in zip(z, sizes, strict=True)]
    torch.testing.assert_close(seen[0], torch.stack(expected))


@pytest.mark.parametrize("vectors", [False, True])
def test_permuting_queries_permutes_elements(vectors: bool) -> None:
    decoder, order = make(), torch.tensor([2, 0, 3, 1])
    z = tokens(B, D) if vectors else tokens()
    points = tokens(B, N, H)
    decoder.queries = Given(points)
    sets, masks, steps = decoder(z)
    decoder.queries = Given(points[:, order])
    permuted = decoder(z)
    moved = Trajectory(steps.elements[:, :, order], steps.mask[:, :, order])
    assert_close(permuted, SetPrediction(sets[:, order], masks[:, order], moved))
    assert (sets[:, 0] - sets[:, 1]).abs().min() > 1e-3  # a vector too gives elements that differ


def test_the_order_of_reference_points_does_not_matter() -> None:
    decoder, z = make("top-n"), tokens()
    expected = decoder(z)
    order = torch.randperm(2 * N)
    with torch.no_grad():
        for parameter in (decoder.queries.points, decoder.queries.angles):
            parameter.copy_(parameter[order])
    assert_close(decoder(z), expected)


def test_random_queries_are_drawn_at_each_call() -> None:
    decoder, z = make("random"), tokens()
    state = devices.random_state()
    one, same, other = (decoder(z, generator=devices.generator(seed)).elements for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(devices.random_state(), state)
    assert not torch.equal(decoder(z).elements, decoder(z).elements)
    torch.manual_seed(1)
    assert torch.equal(decoder(z).elements, one)
    assert len(torch.unique(one.flatten(0, 1), dim=0)) == B * N


@EVERY_KIND
def test_absent_tokens_are_not_seen(queries: str) -> None:
    decoder, z, mask = make(queries), tokens(), holes()
    expected = decode(decoder, z, mask)
    assert_close(decode(decoder, z.masked_fill(~mask.unsqueeze(-1), torch.nan), mask), expected)
    assert_close(decode(decoder, z, mask.double()), expected)
    assert_close(decode(decoder, z, mask.float()), expected)
    padded = torch.cat([z, torch.full((B, 7, D), torch.inf, dtype=z.dtype)], 1)
    assert_close(decode(decoder, padded, torch.cat([mask, torch.zeros(B, 7, dtype=torch.bool)], 1)), expected)
    order = torch.randperm(S)
    assert_close(decode(decoder, z[:, order], mask[:, order]), expected)  # no order of tokens either
    assert_close(decode(decoder, z, torch.ones(B, S)), decode(decoder, z))
    assert (expected.elements - decode(decoder, z).elements).abs().flatten(1).amax(1)[1:].min() > 1e-4


@EVERY_KIND
def test_a_token_of_mask_one_half_weighs_half(queries: str) -> None:
    decoder, z = make(queries), tokens()
    twice = torch.cat([z, z], 1)
    assert_close(decode(decoder, twice, torch.full((B, 2 * S), 0.5)), decode(decoder, z))


@EVERY_KIND
def test_of_weights_the_ratios_count(queries: str) -> None:
    """Of tiny ones too, as a sigmoid gives them."""
    decoder, z = make(queries, dtype=torch.float32), tokens().float()
    weight = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25]).expand(B, S)
    results = []
    for scale in (1.0, 2.0**-140):
        prediction = decode(decoder, z, scale * weight)
        parameters = torch.autograd.grad(prediction.elements.sum(), decoder.parameters(), materialize_grads=True)
        results.append((prediction.elements, *parameters))
    torch.testing.assert_close(results[1], results[0])


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_sample_without_tokens_is_decoded_from_zeros(queries: str, dtype: torch.dtype) -> None:
    decoder, mask = make(queries), holes()
    mask[1] = False
    z = tokens().masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    mask = mask.to(dtype)
    if dtype != torch.bool:
        mask.requires_grad_()
    prediction = decode(decoder, z, mask)
    zero = decode(decoder, torch.zeros(B, 1, D, dtype=torch.float64))
    torch.testing.assert_close(prediction.elements[1], zero.elements[1])
    leaves = [z, *decoder.parameters(), *([mask] if mask.requires_grad else [])]
    for gradient in torch.autograd.grad(prediction.elements.sum(), leaves, materialize_grads=True):
        assert gradient.isfinite().all()


@EVERY_KIND
def test_a_vector_is_one_token(queries: str) -> None:
    decoder, z = make(queries), tokens(B, D)
    assert_close(decode(decoder, z), decode(decoder, z.unsqueeze(1)))


@EVERY_KIND
def test_a_sample_alone_is_decoded_as_in_a_batch(queries: str) -> None:
    decoder, z, mask = make(queries).eval(), tokens(), holes()
    points = tokens(B, N, H)
    if queries == "random":
        decoder.queries = Given(points)
    together = decoder(z, mask)
    for b in range(B):
        if queries == "random":
            decoder.queries = Given(points[b : b + 1])
        torch.testing.assert_close(decoder(z[b : b + 1], mask[b : b + 1]).elements[0], together.elements[b])


def test_the_trajectory_holds_every_layer() -> None:
    decoder, z = make(layers=3), tokens(B, D)
    sets, masks, steps = decoder(z)
    assert steps.elements.shape == (3, B, N, C)
    assert steps.mask.shape == (3, B, N)
    assert steps.repr_loss is steps.grad_norm is None
    assert torch.equal(steps.elements[-1], sets)
    assert torch.equal(steps.mask[-1], masks)
    assert_close(decoder(z, record=False), SetPrediction(sets, masks))
    decoder.eval()
    assert decoder(z).trajectory is None
    assert_close(decoder(z, record=True), SetPrediction(sets, masks, steps))
    fewer = make(layers=2)
    fewer.load_state_dict(decoder.state_dict(), strict=False)
    assert_close(fewer(z, record=False), SetPrediction(steps.elements[1], steps.mask[1]))


def test_auxiliary_loss() -> None:
    """A loss of the trajectory, which `DSPNLoss` takes too."""
    decoder, z = make(), tokens()
    target, mask = torch.rand(B, N, C, dtype=torch.float64), torch.rand(B, N) < 0.7
    prediction, set_loss = decoder(z), HungarianLoss()
    steps = prediction.trajectory
    loss = set_loss(steps.elements, target, steps.mask, mask)
    each = [set_loss(y, target, m, mask) for y, m in zip(steps.elements, steps.mask, strict=True)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    torch.testing.assert_close(DSPNLoss(PooledEncoder(C, D), set_loss, repr_weight=0)(prediction, target, mask), loss)
    gradients = torch.autograd.grad(loss, [decoder.output.weight, decoder.queries.points])
    assert all(gradient.any() for gradient in gradients)


@EVERY_KIND
def test_gradcheck(queries: str) -> None:
    decoder = make(queries, mask_clamp=None, layers=1)
    z, mask = tokens(2, 3, D).requires_grad_(), torch.rand(2, 3, dtype=torch.float64).requires_grad_()
    parameters = [p for name, p in decoder.named_parameters() if name.startswith("queries") or name == "input.bias"]
    devices.gradcheck(lambda z, mask, *_: decode(decoder, z, mask).elements, (z, mask, *parameters))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivatives
        devices.gradgradcheck(lambda z, mask: decode(decoder, z, mask).elements[:1, :1], (z, mask))


@EVERY_KIND
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_mode_gives_the_same(queries: str, mode: Any) -> None:
    decoder, z, mask = make(queries), tokens(), holes()
    expected = decode(decoder, z, mask, record=True)
    decoder.eval()
    with mode():
        actual = decode(decoder, z, mask, record=True)
    assert_close(actual, expected)


@EVERY_KIND
def test_autocast(queries: str) -> None:
    decoder, z, mask = make(queries, dtype=torch.float32), tokens().float(), holes()
    expected = decode(decoder, z, mask)
    with devices.autocast(torch.bfloat16):
        actual = decode(decoder, z, mask)
    torch.testing.assert_close(actual.elements.float(), expected.elements, rtol=0.1, atol=0.1)
    actual.elements.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", ["learned", "top-n"])
def test_half_precision(queries: str, dtype: torch.dtype) -> None:
    decoder, z = make(queries), tokens()
    expected = decoder(z, holes()).elements
    elements, mask, _ = decoder.to(dtype)(z.to(dtype), holes().to(dtype))
    assert elements.dtype == mask.dtype == dtype
    torch.testing.assert_close(elements.double(), expected, rtol=0.1, atol=0.1)
    elements.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())


def test_dropout_is_for_training() -> None:
    decoder, z = make(dropout=0.5), tokens()
    assert not torch.equal(decoder(z).elements, decoder(z).elements)
    assert_close(decoder.eval()(z), decoder(z))


@EVERY_KIND
def test_new_parameters(queries: str) -> None:
    """Of layers: matrices after Xavier, as in `nn.Transformer`, and biases zero."""
    decoder = make(queries)
    before = copy.deepcopy(decoder.state_dict())
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(0.3)
    decoder.reset_parameters()
    for name, new in decoder.state_dict().items():
        constant = "norm" in name or (name.startswith("layers") and name.endswith("bias"))
        assert torch.equal(new, before[name]) == constant
        assert not (new == 0.3).any()
        if name.startswith("layers") and new.dim() == 2:
            assert 0.8 < new.abs().max() / (6 / sum(new.shape)) ** 0.5 <= 1


@pytest.fixture
def _forget_compilations() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EVERY_KIND
@pytest.mark.usefixtures("_forget_compilations")
def test_compiles(queries: str) -> None:
    scaler = StandardScaler(C).fit(3 + torch.randn(9, C))
    decoder, z, mask = make(queries, dtype=torch.float32, scaler=scaler), tokens().float(), holes()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")

    def run(decoder: nn.Module) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        parts = (*decoder(z, mask)[:2], *decoder(z, mask).trajectory[:2])
        return (*parts, *torch.autograd.grad(sum(p.square().sum() for p in parts), decoder.parameters()))

    torch.testing.assert_close(run(compiled), run(decoder), rtol=1e-4, atol=1e-4)
    decoder.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = decoder(z[:, 0])
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(z[:, 0])[:2], expected[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("queries", ["learned", "top-n"])
def test_vmap_without_gradients(queries: str) -> None:
    """In evaluation mode, PyTorch has faster attention, which knows no vmap."""
    decoder, z = make(queries).eval(), tokens(2, B, S, D)
    with torch.no_grad():
        actual = torch.func.vmap(lambda z: decoder(z)[:2])(z)
        expected = [decoder(part)[:2] for part in z]
    for a, e in zip(actual, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(e))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`layers` must be at least 1, got 0", {"layers": 0}),
        (ValueError, "`heads` must be at least 1, got 0", {"heads": 0}),
        (ValueError, "`hidden_channels` must be a multiple of `heads`, got 8 and 3", {"heads": 3}),
        (ValueError, "`queries` must be one of 'learned', 'random', 'top-n', got 'given'", {"queries": "given"}),
        (ValueError, r"`dropout` must lie in \[0, 1\], got 2.0", {"dropout": 2.0}),
        (ValueError, r"`dropout` must lie in \[0, 1\], got nan", {"dropout": float("nan")}),
        (TypeError, r"`dropout` must be a number, got '0.1' \(str\)", {"dropout": "0.1"}),
    ],
)
def test_refuses_settings(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("error", "message", "z", "mask"),
    [
        (ValueError, r"`z` must have shape \(B, S, 6\), got float64 of shape \(3, 5, 2\)", tokens(B, S, 2), None),
        (ValueError, r"`z` must have shape \(B, 6\), got float64 of shape \(3, 2, 5, 6\)", tokens(B, 2, S, D), None),
        (ValueError, r"`z` must have at least one token.*got shape \(3, 0, 6\)", tokens(B, 0, D), None),
        (ValueError, "`mask` must be None where `z` is a vector of each sample", tokens(B, D), torch.ones(B, S)),
        (ValueError, r"`mask` must have shape \(3, 5\), got bool of shape \(3, 4\)", tokens(), holes()[:, 1:]),
        (TypeError, "`mask` must be bool or floating .* got int64", tokens(), holes().long()),
        (TypeError, "`z` must have a floating dtype, got int64", tokens().long(), None),
    ],
)
def test_refuses_inputs(error: type[Exception], message: str, z: Tensor, mask: Tensor | None) -> None:
    with pytest.raises(error, match=message):
        make()(z, mask)


def test_an_empty_batch() -> None:
    for kind in KINDS:
        sets, masks, steps = make(kind)(tokens(0, S, D), torch.ones(0, S))
        assert sets.shape == (0, N, C)
        assert steps.mask.shape == (2, 0, N)
        assert masks.shape == (0, N)
