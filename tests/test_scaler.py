"""StandardScaler: what it learns, how it maps, and what it refuses."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from setpred import (
    ChamferLoss,
    DSPNLoss,
    HungarianLoss,
    MLPDecoder,
    PooledEncoder,
    StandardScaler,
    pad_sets,
)
from tests import oracles
from tests.rules import paper_decoder

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DOUBLE = {"dtype": torch.float64}
C = 3


def values(kind: str, *shape: int) -> Tensor:
    """Values of a channel."""
    if kind == "constant":
        return torch.full(shape, 7.3, **DOUBLE)
    if kind == "flag":
        return torch.randint(2, shape).double()
    if kind == "zero":
        return torch.zeros(shape, **DOUBLE)
    if kind == "far":
        return 1e6 + torch.randn(shape, **DOUBLE)
    return {"narrow": 0.5 + 1e-4 * torch.randn(shape, **DOUBLE), "wide": 300 * torch.randn(shape, **DOUBLE)}[kind]


def random_sets(kinds: list[str], sets: int, size: int) -> tuple[Tensor, Tensor]:
    """Target sets, NaN where absent, and their mask; at least one element is present."""
    elements = torch.stack([values(kind, sets, size) for kind in kinds], -1)
    mask = torch.rand(sets, size) < 0.6
    mask[0, 0] = True
    return elements.masked_fill(~mask.unsqueeze(-1), torch.nan), mask


def fitted(**options: Any) -> StandardScaler:
    """One of whose channels the first is a flag."""
    scaler = StandardScaler(C, **options)
    scaler.location.copy_(torch.tensor([0.0, 3.0, -0.5]))
    scaler.scale.copy_(torch.tensor([1.0, 20.0, 0.1]))
    return scaler


# What it learns

KINDS = st.lists(st.sampled_from(["constant", "flag", "zero", "far", "narrow", "wide"]), min_size=1, max_size=4)


@given(kinds=KINDS, sets=st.integers(1, 4), size=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_equals_the_formula(kinds: list[str], sets: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    elements, mask = random_sets(kinds, sets, size)
    scaler = StandardScaler(len(kinds), **DOUBLE)
    assert scaler.fit(elements, mask) is scaler
    location, scale = oracles.moments(elements, mask)
    torch.testing.assert_close(scaler.location, location, **EXACT)
    torch.testing.assert_close(scaler.scale, scale, rtol=1e-9, atol=0)
    expected = torch.zeros_like(elements)
    for s, i, c in torch.cartesian_prod(*map(torch.arange, elements.shape)).tolist():
        if mask[s, i]:
            expected[s, i, c] = (elements[s, i, c] - scaler.location[c]) / scaler.scale[c]
    scaled = scaler(elements, mask)
    torch.testing.assert_close(scaled, expected, **EXACT)
    back = elements.masked_fill(~mask.unsqueeze(-1), 0)
    torch.testing.assert_close(scaler.inverse(scaled, mask), back, rtol=1e-14, atol=1e-12)


@given(seed=st.integers(0, 2**31), parts=st.integers(1, 5))
def test_a_stream_of_batches_is_the_whole(seed: int, parts: int) -> None:
    torch.manual_seed(seed)
    elements, mask = random_sets(["far", "wide", "flag", "constant"], 9, 4)
    mask[-1] = False  # the last batch may be one of nothing
    whole = StandardScaler(4, **DOUBLE).fit(elements, mask)
    ends = [0, *sorted(torch.randint(10, (parts,)).tolist()), 9]
    stream = [(elements[a:b], mask[a:b]) for a, b in itertools.pairwise(ends)]
    scaler = StandardScaler(4, **DOUBLE).fit(iter(stream))
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(scaler.get_buffer(name), buffer, rtol=1e-9, atol=1e-9)


def test_streams_of_many_forms() -> None:
    sets = [torch.randn(n, C, **DOUBLE) for n in (3, 1, 4, 0, 2)]
    expected = StandardScaler(C, **DOUBLE).fit(torch.cat(sets))
    elements, mask = pad_sets(sets)
    streams: dict[str, Any] = {
        "sets as they are": ((one, None) for one in sets),
        "a loader, of lists": DataLoader(TensorDataset(elements, mask.float()), 2),
        "other sizes": [(elements[:2], mask[:2]), pad_sets(sets[2:], 9)],
        "single": [(elements.float().double(), mask)],
        "leading dimensions": [(elements.view(5, 1, 2, 2, C), mask.view(5, 1, 2, 2))],
    }
    for name, stream in streams.items():
        scaler = StandardScaler(C, **DOUBLE).fit(stream)
        torch.testing.assert_close(scaler.location, expected.location, rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(scaler.scale, expected.scale, rtol=1e-6, atol=1e-6, msg=name)


def test_order_and_padding_do_not_matter() -> None:
    elements, mask = random_sets(["narrow", "wide", "flag"], 4, 5)
    expected = StandardScaler(C, **DOUBLE).fit(elements, mask)
    order = torch.randperm(5)
    padding = torch.full((4, 3, C), torch.inf, **DOUBLE)
    others = {
        "permuted": (elements[:, order], mask[:, order]),
        "padded": (torch.cat([elements, padding], 1), torch.cat([mask, mask.new_zeros(4, 3)], 1)),
        "alone": (elements[mask], None),
        "float": (elements, mask.float()),
    }
    for name, (x, m) in others.items():
        scaler = StandardScaler(C, **DOUBLE).fit(x, m)
        torch.testing.assert_close(scaler.location, expected.location, **EXACT, msg=name)
        torch.testing.assert_close(scaler.scale, expected.scale, **EXACT, msg=name)


def test_channels_without_a_scale() -> None:
    classes = nn.functional.one_hot(torch.arange(6) % 3, 4).float()  # the fourth class is never there
    numbers = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1]).unsqueeze(1)
    left = torch.arange(6).div(7).unsqueeze(1)
    rounded = (left + numbers) - left  # as widths of boxes
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).unsqueeze(1)
    assert rounded.unique().numel() > 1
    scaler = StandardScaler(8).fit(torch.cat([classes, numbers, rounded, signs, torch.ones(6, 1)], 1))
    torch.testing.assert_close(scaler.location, torch.tensor([0, 0, 0, 0, 0.1, 0.1, 0, 0]))
    assert scaler.scale.tolist() == [1] * 8


@pytest.mark.parametrize("order", [1, -1])
def test_a_flag_of_one_batch_may_be_none_of_another(order: int) -> None:
    batches = [(torch.tensor([[0.0], [1.0]]), None), (torch.tensor([[5.0]]), None)]
    scaler = StandardScaler(1).fit(batches[::order])
    assert scaler.location.item() == 2
    torch.testing.assert_close(scaler.scale.item(), (14 / 3) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_offsets_cost_no_digits(dtype: torch.dtype) -> None:
    """Sums in float32 would give a standard deviation of 0, or of the square root of a negative number."""
    elements = (torch.arange(100_000) % 7).to(dtype).view(100, 1000, 1) * 2 + 2**8
    batches = ((x, None) for x in elements)
    scaler = StandardScaler(1).fit(batches)
    torch.testing.assert_close(scaler.scale.double(), elements.double().std(correction=0).view(1))
    torch.testing.assert_close(scaler.location.double(), elements.double().mean().view(1))


def test_it_is_the_identity_until_it_is_fitted_and_fits_anew() -> None:
    scaler, elements = StandardScaler(C), torch.randn(4, 5, C)
    assert torch.equal(scaler(elements), elements)
    assert torch.equal(scaler.inverse(elements), elements)
    location, scale = scaler.location, scaler.scale
    scaler.fit(100 + elements).fit(elements)
    expected = StandardScaler(C).fit(elements)
    assert torch.equal(scaler.location, expected.location)
    assert torch.equal(scaler.scale, expected.scale)
    assert scaler.location is location  # what shares the buffers sees it
    assert scaler.scale is scale
    assert not scaler.location.requires_grad
    scaler.reset_parameters()
    assert torch.equal(scaler(elements), elements)


def test_an_error_leaves_it_as_it_was() -> None:
    scaler = fitted()
    before = copy.deepcopy(scaler.state_dict())
    with pytest.raises(ValueError, match="finite"):
        scaler.fit([(torch.randn(2, C), None), (torch.full((2, C), torch.nan), None)])
    assert all(torch.equal(scaler.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fits_in_every_mode(mode: Any) -> None:
    elements = torch.randn(4, C, requires_grad=True)
    with mode():
        scaler = StandardScaler(C)
        scaler.fit(2 * elements)
    torch.testing.assert_close(scaler.location, 2 * elements.detach().mean(0))
    assert not scaler.location.requires_grad


def test_channels_set_by_hand() -> None:
    scaler, elements = fitted(), torch.randn(2, 4, C)
    scaler.location[1:], scaler.scale[1:] = 0, 1
    assert torch.equal(scaler(elements), elements)


# How it maps


@pytest.mark.parametrize("shape", [(C,), (4, C), (2, 4, C), (5, 2, 4, C), (0, 4, C), (2, 0, C)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    scaler, elements = fitted(), torch.randn(shape)
    mask = torch.rand(shape[:-1]) < 0.5
    for way, expected in (
        (scaler, (elements - torch.tensor([0.0, 3, -0.5])) / torch.tensor([1.0, 20, 0.1])),
        (scaler.inverse, elements * torch.tensor([1.0, 20, 0.1]) + torch.tensor([0.0, 3, -0.5])),
    ):
        torch.testing.assert_close(way(elements), expected)
        torch.testing.assert_close(way(elements, mask), expected * mask.unsqueeze(-1))
    torch.testing.assert_close(scaler.inverse(scaler(elements)), elements)


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_what_is_absent_is_zero_and_has_no_gradient(way: str) -> None:
    scaler = fitted()
    elements = torch.randn(2, 3, C).index_fill(1, torch.tensor([1]), torch.nan).requires_grad_()
    mask = torch.tensor([[1.0, 0.0, 0.3], [1.0, 0.0, 1e-20]])  # what is present a little is mapped as a whole
    result = getattr(scaler, way)(elements, mask)
    assert torch.equal(result[:, 1], torch.zeros(2, C))
    assert torch.equal(result[:, [0, 2]], getattr(scaler, way)(elements)[:, [0, 2]])
    (gradient,) = torch.autograd.grad(result.sum(), elements)
    slope = 1 / scaler.scale if way == "forward" else scaler.scale
    torch.testing.assert_close(gradient, slope.expand(2, 3, C) * torch.tensor([1.0, 0, 1]).view(3, 1))


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_gradcheck(way: str) -> None:
    function = getattr(fitted(**DOUBLE), way)
    elements, mask = torch.randn(2, 4, C, **DOUBLE, requires_grad=True), torch.rand(2, 4) < 0.6
    for call in (function, lambda x: function(x, mask), lambda x: function(x).square()):
        assert torch.autograd.gradcheck(call, elements)
        assert torch.autograd.gradgradcheck(call, elements)


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles(way: str, masked: bool) -> None:
    function = getattr(fitted(), way)
    args = (torch.randn(2, 4, C), *([torch.rand(2, 4) < 0.5] if masked else []))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*args), function(*args))
    torch._dynamo.reset()


def test_exports() -> None:
    scaler, args = fitted(), (torch.randn(2, 4, C), torch.rand(2, 4) < 0.5)
    batch = {0: torch.export.Dim("B")}
    program = torch.export.export(scaler, args, dynamic_shapes={"elements": batch, "mask": batch})
    args = (torch.randn(7, 4, C), torch.rand(7, 4) < 0.5)
    torch.testing.assert_close(program.module()(*args), scaler(*args))
    assert program.state_dict.keys() == {"location", "scale"}


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduced", [None, torch.bfloat16])
def test_dtypes(given: torch.dtype, own: torch.dtype, reduced: torch.dtype | None) -> None:
    """Float32 at least: beside a large location, half precision has no digits left."""
    scaler = StandardScaler(1, dtype=own)
    scaler.location.fill_(1024)
    wide = torch.promote_types(torch.promote_types(given, own), torch.float32)
    elements = torch.tensor([[0.25], [-0.125]], dtype=given)
    with torch.autocast("cpu", reduced or torch.bfloat16, enabled=reduced is not None):
        theirs = scaler.inverse(elements)
        back = scaler(theirs)
    assert theirs.dtype == back.dtype == wide
    assert theirs.flatten().tolist() == [1024.25, 1023.875]
    assert torch.equal(back, elements.to(wide))
    assert scaler.fit(theirs).location.dtype == own
    for way in (scaler, scaler.inverse):
        x = elements.clone().requires_grad_()
        way(x).sum().backward()
        assert x.grad.dtype == given


def test_moves_with_the_model() -> None:
    scaler = StandardScaler(C, device="meta", dtype=torch.float16)
    assert (scaler.location.device.type, scaler.scale.dtype) == ("meta", torch.float16)
    scaler = scaler.to_empty(device="cpu")
    scaler.reset_parameters()
    assert torch.equal(scaler.double()(torch.ones(1, C)), torch.ones(1, C, **DOUBLE))


# One for all


class Model(nn.Module):
    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.scaler = StandardScaler(C)
        self.decoder = make(self.scaler)
        self.loss = DSPNLoss(PooledEncoder(C, 8, 8), HungarianLoss(), steps="last", scaler=self.scaler)

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(z).elements


MAKE: dict[str, Callable[[StandardScaler], nn.Module]] = {
    "DSPNDecoder": lambda s: paper_decoder(PooledEncoder(C, 8, 8), 3, 1.0, set_size=4, channels=C, scaler=s),
    "MLPDecoder": lambda s: MLPDecoder(8, 4, C, 8, scaler=s),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_is_saved_and_loaded_with_the_model(make: Callable[..., nn.Module], tmp_path: Any) -> None:
    model, z = Model(make), torch.randn(2, 8)
    model.decoder.scaler.fit(3 + 5 * torch.randn(4, 5, C))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = Model(make)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(z), model(z))
    assert other.scaler.location.abs().min() > 0.1


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_there_is_one(make: Callable[..., nn.Module]) -> None:
    model = Model(make)
    for one in (model, copy.deepcopy(model)):
        assert one.decoder.scaler is one.loss.scaler is one.scaler
        assert {name for name, _ in one.named_buffers()} == {"scaler.location", "scaler.scale"}
    assert "decoder.scaler.location" in model.state_dict()
    assert not any("scaler" in name for name in model.loss.state_dict())
    assert "scaler=StandardScaler(3)" in repr(model.loss)
    z, target = torch.randn(2, 8), 9 + torch.randn(2, 4, C)
    before = model.loss(model.decoder(z), target)
    model.scaler.fit(target)  # seen by both
    assert not torch.equal(model.loss(model.decoder(z), target), before)


def test_a_training_step_compiles() -> None:
    decoder = MAKE["DSPNDecoder"](fitted())
    loss = DSPNLoss(decoder.encoder, ChamferLoss(), scaler=decoder.scaler)

    def step(z: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return loss(decoder(z), target, mask, z=z)

    args = (torch.randn(2, 8), torch.randn(2, 4, C), torch.rand(2, 4) < 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), step(*args), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_loss_may_be_given_it_later() -> None:
    loss, pred, target = HungarianLoss(), torch.randn(2, 4, C), torch.randn(2, 4, C)
    loss.scaler = fitted()
    assert torch.equal(loss(pred, target), HungarianLoss(scaler=fitted())(pred, target))


def test_an_autoencoder() -> None:
    """It encodes and decodes whatever the users' coordinates are."""
    target = torch.rand(8, 4, C)
    mask = torch.rand(8, 4) < 0.7
    torch.manual_seed(1)
    decoder = MAKE["DSPNDecoder"](StandardScaler(C).fit(target, mask))
    loss = HungarianLoss(scaler=decoder.scaler)
    z = decoder.encoder(decoder.scaler(target, mask), mask)
    elements, presence, _ = decoder(z)
    expected = loss(elements, target, presence, mask)
    other = 1000 + 0.01 * target.double()
    decoder.scaler.double().fit(other, mask)
    torch.testing.assert_close(decoder.encoder(decoder.scaler(other, mask).float(), mask), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(decoder(z).elements, other, presence, mask).float(), expected, rtol=1e-4, atol=1e-4)


# What it refuses


def stream(*batches: Any) -> Iterator[Any]:
    yield from batches


rows = torch.rand(2, 4, C)
REFUSED: dict[str, tuple[Callable[[StandardScaler], object], type[Exception], str]] = {
    "nothing present": (
        lambda s: s.fit(rows, torch.zeros(2, 4)),
        ValueError,
        "`elements` must have a present element to learn from, got none",
    ),
    "no batch": (lambda s: s.fit([]), ValueError, "`elements` must have a present element to learn from, got none"),
    "NaN": (
        lambda s: s.fit(rows.index_fill(2, torch.tensor([1]), torch.nan)),
        ValueError,
        "`elements` must be finite where they are present, got NaN or infinity in channel 1",
    ),
    "infinity": (
        lambda s: s.fit(stream((rows, None), (rows / 0, None))),
        ValueError,
        "`elements` must be finite where they are present, got NaN or infinity in channel 0",
    ),
    "overflow": (
        lambda s: s.fit(1e300 * rows.double()),
        ValueError,
        r"`elements` must have moments that float32 holds, got mean .*e\+299 and standard deviation nan in channel 0",
    ),
    "underflow": (
        lambda s: s.fit(1e-60 * rows.double()),
        ValueError,
        "`elements` must have moments that float32 holds, got mean .* in channel 0",
    ),
    "soft": (
        lambda s: s.fit(rows, torch.full((2, 4), 0.5)),
        ValueError,
        "`mask` must be bool or hold only 0 and 1, got values between",
    ),
    "channels": (
        lambda s: s.fit(rows[..., :2]),
        ValueError,
        r"`elements` must have the scaler's 3 channels, got float32 of shape \(2, 4, 2\)",
    ),
    "mask": (lambda s: s.fit(rows, torch.ones(2, 3)), ValueError, r"`mask` must have shape \(2, 4\), got float32 of"),
    "integers": (lambda s: s.fit(rows.long()), TypeError, "`elements` must have a floating dtype, got int64"),
    "a set alone": (
        lambda s: s.fit(pad_sets([rows[0]])),
        TypeError,
        r"`elements` must be a tensor or an iterable of pairs \(elements, mask\), got one of Tensor",
    ),
    "triples": (
        lambda s: s.fit([(rows, rows, None)]),
        TypeError,
        "`elements` must be a tensor or an iterable of pairs",
    ),
    "none": (lambda s: s.fit(None), TypeError, "`elements` must be a tensor or an iterable of pairs"),
    "mask and stream": (
        lambda s: s.fit([(rows, None)], torch.ones(2, 4)),
        ValueError,
        "`mask` must be None where `elements` is an iterable of pairs",
    ),
    "forward: channels": (
        lambda s: s(rows[..., :2]),
        ValueError,
        r"`elements` must have the scaler's 3 channels, got float32 of shape \(2, 4, 2\)",
    ),
    "forward: scalar": (lambda s: s(torch.ones(())), ValueError, r"the scaler's 3 channels, got float32 of shape \(\)"),
    "inverse: mask": (
        lambda s: s.inverse(rows, torch.ones(4)),
        ValueError,
        r"`mask` must have shape \(2, 4\), got float32 of shape \(4,\)",
    ),
    "inverse: integers": (lambda s: s.inverse(rows.long()), TypeError, "`elements` must have a floating dtype"),
    "constructor": (lambda s: StandardScaler(0), ValueError, "`channels` must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call(StandardScaler(C))


@pytest.mark.parametrize(
    "make",
    [
        lambda scaler: MAKE["DSPNDecoder"](scaler),
        lambda scaler: MAKE["MLPDecoder"](scaler),
        lambda scaler: HungarianLoss(scaler=scaler)(rows, rows),
        lambda scaler: DSPNLoss(PooledEncoder(C, 8), HungarianLoss(), scaler=scaler, steps="last")(
            MAKE["MLPDecoder"](None)(torch.randn(2, 8)), rows
        ),
    ],
)
def test_others_refuse(make: Callable[[object], object]) -> None:
    with pytest.raises(ValueError, match=r"`scaler` must have as many channels.*3, got 4|the scaler's 4 channels"):
        make(StandardScaler(4))
    with pytest.raises(TypeError, match=r"`scaler` must be a StandardScaler or None, got .* \(type\)"):
        make(StandardScaler)
