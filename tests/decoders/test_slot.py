"""SlotDecoder: its layers and iterations, what it does with tokens, and how it is differentiated."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from setpred import HungarianLoss, SlotDecoder, StandardScaler
from setpred.decoders.slot import _MESH_LENGTH, _sharpening
from setpred.functional import entropic_transport
from setpred.functional.sinkhorn import differentiable_plan
from tests import devices, oracles

D, N, C, H, S = 6, 4, 2, 8, 5
DOUBLE = {"dtype": torch.float64}
ATTENTION = pytest.mark.parametrize("attention", ["softmax", "sinkhorn", "mesh"])
WITHOUT_MESH = pytest.mark.parametrize("attention", ["softmax", "sinkhorn"])
DIFFERENTIATE = pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])


def make(**options: Any) -> SlotDecoder:
    """A decoder whose parameters are none that it is made with."""
    decoder = SlotDecoder(D, N, C, H, **options)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder


def draw(batch: int = 3, tokens: int = S, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Tokens and slots."""
    return torch.randn(batch, tokens, D, dtype=dtype), torch.randn(batch, N, H, dtype=dtype)


def presence(batch: int = 3, tokens: int = S) -> Tensor:
    """A mask of which each sample has at least one and lacks at least one."""
    return torch.arange(tokens) < torch.randint(1, tokens, (batch, 1))


def test_layers_are_the_published_ones() -> None:
    shapes = {name: tuple(p.shape) for name, p in SlotDecoder(D, N, C, H).named_parameters()}
    assert shapes == {
        "slot_mean": (H,),
        "slot_log_std": (H,),
        "norm_tokens.weight": (D,),
        "norm_tokens.bias": (D,),
        "norm_slots.weight": (H,),
        "norm_slots.bias": (H,),
        "norm_mlp.weight": (H,),
        "norm_mlp.bias": (H,),
        "key.weight": (H, D),
        "value.weight": (H, D),
        "query.weight": (H, H),
        "gru.weight_ih": (3 * H, H),
        "gru.weight_hh": (3 * H, H),
        "gru.bias_ih": (3 * H,),
        "gru.bias_hh": (3 * H,),
        "mlp.0.weight": (2 * H, H),
        "mlp.0.bias": (2 * H,),
        "mlp.2.weight": (H, 2 * H),
        "mlp.2.bias": (H,),
        "output.0.weight": (H, H),
        "output.0.bias": (H,),
        "output.2.weight": (C + 1, H),
        "output.2.bias": (C + 1,),
    }
    more = dict(SlotDecoder(D, N, C, H, tokens=S, attention="sinkhorn", mask_clamp=None).named_parameters())
    added = {name: tuple(p.shape) for name, p in more.items() if shapes.get(name) != tuple(p.shape)}
    assert added == {
        "to_tokens.weight": (S * H, D),
        "to_tokens.bias": (S * H,),
        "norm_tokens.weight": (H,),
        "norm_tokens.bias": (H,),
        "key.weight": (H, H),
        "value.weight": (H, H),
        "token_weight.weight": (1, H),
        "slot_weight.weight": (1, H),
        "output.2.weight": (C, H),
        "output.2.bias": (C,),
    }


@WITHOUT_MESH
@pytest.mark.parametrize("iters", [1, 3])
def test_equals_the_formula(attention: str, iters: int) -> None:
    decoder, (z, slots) = make(attention=attention, iters=iters, **DOUBLE), draw()
    mask = presence()
    prediction = decoder(z, mask, init=slots)
    state = decoder.state_dict()
    for b in range(3):
        output = oracles.slot_attention(state, z[b][mask[b]], slots[b], iters, attention)
        torch.testing.assert_close(prediction.elements[b], output[:, :C], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(prediction.mask[b], (output[:, C] + 1).clamp(0, 1), rtol=1e-6, atol=1e-6)


def test_a_vector_is_mapped_to_tokens() -> None:
    decoder, (z, slots) = make(tokens=S, **DOUBLE), draw()
    vector = z[:, 0]
    tokens = (vector @ decoder.to_tokens.weight.T + decoder.to_tokens.bias).view(3, S, H)
    plain = SlotDecoder(H, N, C, H, **DOUBLE)
    plain.load_state_dict({k: v for k, v in decoder.state_dict().items() if "to_tokens" not in k})
    torch.testing.assert_close(decoder(vector, init=slots), plain(tokens, init=slots))


@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0), (0.2, 0.7)])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("tokens", [0, 1, S])
@ATTENTION
def test_shapes_and_range(mask_clamp: tuple[float, float] | None, batch: int, tokens: int, attention: str) -> None:
    decoder = make(mask_clamp=mask_clamp, attention=attention)
    elements, mask, trajectory = decoder(100 * torch.randn(batch, tokens, D), record=False)
    assert elements.shape == (batch, N, C)
    assert mask.shape == (batch, N)
    assert elements.isfinite().all()
    assert trajectory is None
    low, high = mask_clamp or (1.0, 1.0)
    assert ((low <= mask) & (mask <= high)).all()
    assert mask.requires_grad == (mask_clamp is not None)


@ATTENTION
@DIFFERENTIATE
def test_slots_in_another_order_give_elements_in_that_order(attention: str, differentiate: str) -> None:
    decoder, (z, slots) = make(attention=attention, differentiate=differentiate, **DOUBLE), draw()
    order = torch.randperm(N)
    prediction, other = decoder(z, init=slots), decoder(z, init=slots[:, order])
    torch.testing.assert_close(other.elements, prediction.elements[:, order])
    torch.testing.assert_close(other.mask, prediction.mask[:, order])
    assert not torch.allclose(prediction.elements[:, 0], prediction.elements[:, 1])


@ATTENTION
def test_tokens_have_no_order(attention: str) -> None:
    decoder, (z, slots) = make(attention=attention, **DOUBLE), draw()
    mask, order = presence(), torch.randperm(S)
    torch.testing.assert_close(decoder(z[:, order], mask[:, order], init=slots), decoder(z, mask, init=slots))


@ATTENTION
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_absent_tokens_have_no_part(attention: str, dtype: torch.dtype) -> None:
    """Neither their number nor what they hold, in values and gradients."""
    decoder, (z, slots), mask = make(attention=attention, **DOUBLE), draw(), presence()
    z.requires_grad_()
    expected = decoder(z, mask.to(dtype), init=slots)
    spoilt = torch.where(mask.unsqueeze(2), z, math.nan)
    longer = torch.cat([spoilt, spoilt.new_full((3, 2, D), math.inf)], 1)
    actual = decoder(longer, torch.cat([mask, mask.new_zeros(3, 2)], 1).to(dtype), init=slots)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    of_actual, of_expected = (
        torch.autograd.grad(p.elements.sin().sum(), [z, *decoder.parameters()], allow_unused=True)
        for p in (actual, expected)
    )
    assert (of_actual[0][mask] != 0).any(1).all()
    assert (of_actual[0][~mask] == 0).all()
    for a, e in zip(of_actual, of_expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-10)
    for b in range(3):
        alone = decoder(z[b : b + 1, mask[b]], init=slots[b : b + 1])
        torch.testing.assert_close(alone.elements[0], expected.elements[b], rtol=1e-10, atol=1e-10)


@WITHOUT_MESH
def test_presence_is_a_weight(attention: str) -> None:
    """Two halves of a token are one."""
    decoder, (z, slots) = make(attention=attention, **DOUBLE), draw()
    halves = torch.ones(3, S + 1, **DOUBLE)
    halves[:, [0, S]] = 0.5
    actual = decoder(torch.cat([z, z[:, :1]], 1), halves, init=slots)
    torch.testing.assert_close(actual, decoder(z, init=slots), rtol=1e-6, atol=1e-6)


@ATTENTION
@DIFFERENTIATE
def test_without_tokens_slots_are_told_nothing(attention: str, differentiate: str) -> None:
    """As many absent ones as there may be; values and gradients are finite."""
    decoder, (z, slots) = make(attention=attention, differentiate=differentiate, **DOUBLE), draw()
    mask = torch.zeros(3, S, dtype=torch.bool)
    mask[0] = True
    z[1] = math.nan
    prediction = decoder(z.requires_grad_(), mask, init=slots)
    empty = decoder(z[1:, :0], init=slots[1:])
    torch.testing.assert_close((prediction.elements[1:], prediction.mask[1:]), tuple(empty[:2]))
    torch.testing.assert_close(prediction.elements[:1], decoder(z[:1], init=slots[:1]).elements)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    for sets in (empty, prediction):
        found = torch.autograd.grad(sets.elements.sum(), [z, *parameters], allow_unused=True)
        assert all(g is None or bool(g.isfinite().all()) for g in found)
    assert (found[0][1:] == 0).all()


@ATTENTION
def test_of_weights_the_ratios_count(attention: str) -> None:
    """Of tiny ones too, as a sigmoid gives them."""
    decoder, (z, slots) = make(attention=attention), draw(dtype=torch.float32)
    parameters = [p for name, p in decoder.named_parameters() if not name.startswith("slot_")]
    if decoder.slot_weight is not None:
        parameters += decoder.slot_weight.parameters()
    results = []
    for scale in (1.0, 2.0**-140):
        prediction = decoder(z, torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25]).expand(3, S) * scale, init=slots)
        results.append((*prediction[:2], *torch.autograd.grad(prediction.elements.sum(), parameters)))
    torch.testing.assert_close(results[1], results[0])


@ATTENTION
def test_what_lives_in_a_layer_is_called(attention: str) -> None:
    decoder, (z, slots), seen = make(attention=attention), draw(dtype=torch.float32), set()
    expected = decoder(z, init=slots).elements
    layers = [layer for layer in decoder.modules() if [*layer.parameters()] and not [*layer.children()]]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.add(layer))
    decoder(z, init=slots)
    assert seen == set(layers)
    decoder.gru.register_forward_hook(lambda layer, inputs, output: 0 * output)
    assert not torch.allclose(decoder(z, init=slots).elements, expected)


@ATTENTION
def test_a_sample_alone_is_decoded_as_in_a_batch(attention: str) -> None:
    decoder, (z, slots), mask = make(attention=attention, **DOUBLE), draw(5), presence(5)
    alone = [decoder(z[b : b + 1], mask[b : b + 1], init=slots[b : b + 1]) for b in range(5)]
    together = decoder(z, mask, init=slots)
    torch.testing.assert_close(torch.cat([p.elements for p in alone]), together.elements)
    torch.testing.assert_close(torch.cat([p.mask for p in alone]), together.mask)


def test_slots_are_drawn_from_the_gaussian() -> None:
    decoder = make()
    z = torch.randn(3, S, D)
    first, again = (decoder(z, generator=devices.generator(1)) for _ in range(2))
    assert torch.equal(first.elements, again.elements)
    assert not torch.equal(first.elements, decoder(z).elements)
    noise = torch.randn(3, N, H, generator=devices.generator(1), device=devices.here())
    init = decoder.slot_mean + decoder.slot_log_std.exp() * noise
    assert torch.equal(first.elements, decoder(z, init=init).elements)
    state = devices.random_state()
    decoder(z, generator=devices.generator(1))
    assert torch.equal(devices.random_state(), state)
    torch.manual_seed(3)
    seeded = decoder(z)
    torch.manual_seed(3)
    assert torch.equal(decoder(z).elements, seeded.elements)


def test_other_numbers_of_slots_and_iterations() -> None:
    decoder, (z, _) = make(**DOUBLE), draw()
    slots = torch.randn(3, 7, H, **DOUBLE)
    assert decoder(z, init=slots).elements.shape == (3, 7, C)
    more = decoder(z, init=slots, iters=5)
    decoder.iters = 5
    assert torch.equal(decoder(z, init=slots).elements, more.elements)


@ATTENTION
def test_every_way_to_differentiate_gives_the_same_values(attention: str) -> None:
    decoder, (z, slots) = make(attention=attention, **DOUBLE), draw()
    implicit = SlotDecoder(D, N, C, H, attention=attention, differentiate="implicit", **DOUBLE)
    implicit.load_state_dict(decoder.state_dict())
    expected = decoder(z, init=slots)
    assert torch.equal(implicit(z, init=slots).elements, expected.elements)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for one in (decoder, implicit.eval()):
                torch.testing.assert_close(one(z, init=slots).elements.clone(), expected.elements)


@WITHOUT_MESH
@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
def test_gradcheck(attention: str, mask_clamp: tuple[float, float] | None) -> None:
    """Of z, slots, the weights of tokens and all parameters."""
    decoder, (z, slots) = make(attention=attention, iters=2, mask_clamp=mask_clamp, **DOUBLE), draw(2, 3)
    with torch.no_grad():
        decoder.output[2].weight.mul_(0.1)
        decoder.output[2].bias.fill_(-0.5)  # masks that are not cut off
        for layer in (decoder.key, decoder.query):
            layer.weight.mul_(0.5)
    names = [name for name, _ in decoder.named_parameters() if not name.startswith("slot_m") and "log_std" not in name]
    parameters = [decoder.get_parameter(name).detach().requires_grad_() for name in names]

    def decode(z: Tensor, mask: Tensor, slots: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(names, parameters, strict=True))
        prediction = torch.func.functional_call(decoder, values, (z, mask), {"init": slots})
        return tuple(part for part in prediction[:2] if part.requires_grad)

    mask = torch.rand(2, 3, **DOUBLE) + 0.1
    devices.gradcheck(decode, (z.requires_grad_(), mask.requires_grad_(), slots.requires_grad_(), *parameters))


@ATTENTION
@pytest.mark.parametrize("iters", [1, 4])
def test_implicit_is_the_derivative_of_one_iteration(attention: str, iters: int) -> None:
    """With the slots before it held constant, whatever came before."""
    decoder, (z, slots) = make(attention=attention, differentiate="implicit", iters=iters, **DOUBLE), draw()
    plain = SlotDecoder(D, N, C, H, attention=attention, iters=1, **DOUBLE)
    plain.load_state_dict(decoder.state_dict())
    before: list[Tensor] = []
    handle = decoder.norm_slots.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0].detach()))
    z.requires_grad_()
    slots.requires_grad_()
    prediction = decoder(z, init=slots)
    handle.remove()
    assert len(before) == iters
    expected = plain(z, init=before[-1])
    assert torch.equal(prediction.elements, expected.elements)
    names = [name for name, p in decoder.named_parameters() if p.requires_grad]
    assert {name for name, _ in decoder.named_parameters()} - set(names) == {"slot_mean", "slot_log_std"}
    of_one = torch.autograd.grad(expected.elements.sin().sum(), [z, *map(plain.get_parameter, names)])
    found = torch.autograd.grad(
        prediction.elements.sin().sum(), [z, *map(decoder.get_parameter, names), slots], allow_unused=True
    )
    assert found[-1] is None
    torch.testing.assert_close(found[:-1], of_one)


@DIFFERENTIATE
def test_records_every_iteration(differentiate: str) -> None:
    decoder, (z, slots) = make(differentiate=differentiate, **DOUBLE), draw()
    prediction = decoder(z, init=slots, record=True)
    elements, mask, *others = prediction.trajectory
    assert others == [None, None]
    for t in range(3):
        short = decoder(z, init=slots, iters=t + 1)
        torch.testing.assert_close((elements[t], mask[t]), tuple(short[:2]))
    assert torch.equal(elements[-1], prediction.elements)
    assert torch.equal(mask[-1], prediction.mask)
    assert (decoder(z).trajectory is not None) == (differentiate == "unrolled")
    assert decoder(z, record=False).trajectory is None
    assert decoder.eval()(z).trajectory is None
    (of_first,) = torch.autograd.grad(elements[0].sum(), decoder.key.weight)
    assert bool(of_first.any()) == (differentiate == "unrolled")


def test_implicit_keeps_the_memory_of_one_iteration() -> None:
    """Counted are the tensors that the graph keeps."""

    def kept(iters: int, differentiate: str) -> int:
        decoder, (z, slots) = make(iters=iters, differentiate=differentiate, **DOUBLE), draw()
        count = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            decoder(z, init=slots)
        return count

    assert kept(1, "implicit") == kept(9, "implicit")
    assert kept(9, "unrolled") > 5 * kept(9, "implicit")


def test_a_second_derivative_exists_but_of_transport() -> None:
    for attention in ("softmax", "sinkhorn", "mesh"):
        decoder, (z, slots) = make(attention=attention, iters=2, **DOUBLE), draw(2, 3)

        def decode(z: Tensor, decoder: SlotDecoder = decoder, slots: Tensor = slots) -> Tensor:
            return decoder(z, init=slots[:2]).elements

        if attention == "softmax":
            devices.gradgradcheck(decode, z.requires_grad_())
        else:
            (first,) = torch.autograd.grad(decode(z.requires_grad_()).sum(), z, create_graph=True)
            with pytest.raises(RuntimeError, match="has no second derivative"):
                first.square().sum().backward()


@ATTENTION
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept(attention: str, dtype: torch.dtype) -> None:
    z, slots = draw(dtype=dtype)
    elements, mask, _ = make(attention=attention, dtype=dtype)(z, presence(), init=slots)
    assert elements.dtype == mask.dtype == dtype
    assert make(attention=attention, dtype=dtype)(z).elements.dtype == dtype


class Products(TorchFunctionMode):
    """Notes of which dtypes what is multiplied and what is normalised is."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.softmax, Tensor.matmul, Tensor.__matmul__):
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
            assert func is Tensor.softmax or not torch.is_autocast_enabled(devices.here().type)
        return func(*args, **(kwargs or {}))


@ATTENTION
def test_autocast_leaves_attention_in_full_precision(attention: str) -> None:
    decoder, (z, slots), mask = make(attention=attention), draw(dtype=torch.float32), presence()
    expected = decoder(z, mask, init=slots).elements
    found: list[Tensor] = []
    decoder.norm_mlp.register_forward_pre_hook(lambda _, inputs: found.extend(inputs))
    for tokens in (z, z.bfloat16()):
        with devices.autocast(torch.bfloat16), Products() as products:
            prediction = decoder(tokens, mask, init=slots)
        assert products.dtypes == {torch.float32}
        torch.testing.assert_close(prediction.elements.float(), expected, rtol=0.1, atol=0.1)
        prediction.elements.float().sum().backward()
        assert decoder.key.weight.grad.isfinite().all()
    assert {x.dtype for x in found} == {torch.float32}


@ATTENTION
def test_state_dict_and_copies(attention: str) -> None:
    decoder, other = (SlotDecoder(D, N, C, H, attention=attention) for _ in range(2))
    z, slots = draw(dtype=torch.float32)
    assert list(decoder.state_dict()) == [name for name, _ in decoder.named_parameters()]
    assert not torch.equal(other(z, init=slots).elements, decoder(z, init=slots).elements)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(z, init=slots).elements, decoder(z, init=slots).elements)
    copied = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(9)
    decoder.reset_parameters()
    assert not torch.equal(other(z, init=slots).elements, decoder(z, init=slots).elements)
    assert torch.equal(other(z, init=slots).elements, copied(z, init=slots).elements)
    assert all(bool((p.abs() <= 1).all()) for p in decoder.parameters())
    assert not decoder.slot_mean.any()
    assert not decoder.slot_log_std.any()
    assert decoder.extra_repr() == (
        f"set_size=4, channels=2, mask_clamp=(0.0, 1.0), iters=3, tokens=None, attention={attention!r}, "
        "differentiate='unrolled'"
    )


@ATTENTION
@DIFFERENTIATE
def test_compiles(attention: str, differentiate: str) -> None:
    decoder, (z, slots), mask = make(attention=attention, differentiate=differentiate), draw(), presence()
    z, slots = z.float().requires_grad_(), slots.float()
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    expected, actual = decoder(z, mask, init=slots), compiled(z, mask, init=slots)
    torch.testing.assert_close(actual, expected)
    of_expected, of_actual = (torch.autograd.grad(p.elements.sum(), z)[0] for p in (expected, actual))
    torch.testing.assert_close(of_actual, of_expected)
    assert compiled(z).elements.shape == (3, N, C)
    torch._dynamo.reset()


@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_mapped_by_the_scaler(mask_clamp: tuple[float, float] | None, dtype: torch.dtype) -> None:
    scaler = StandardScaler(2).fit(torch.tensor([300.0, -2.0]) + torch.tensor([40.0, 0.1]) * torch.randn(9, 2))
    decoder, plain = (SlotDecoder(D, N, C, H, mask_clamp=mask_clamp, scaler=s, dtype=dtype) for s in (scaler, None))
    plain.load_state_dict(decoder.state_dict(), strict=False)
    z, slots = draw(dtype=dtype)
    actual, expected = decoder(z, init=slots), plain(z, init=slots)
    assert actual.elements.dtype == torch.float32  # where users are, half precision is not enough
    assert torch.equal(actual.elements, scaler.inverse(expected.elements))
    assert torch.equal(actual.mask, expected.mask)
    assert decoder.state_dict().keys() == plain.state_dict().keys() | {"scaler.location", "scaler.scale"}


@ATTENTION
@DIFFERENTIATE
@pytest.mark.parametrize("tokens", [None, S])
def test_learns_one_set(attention: str, differentiate: str, tokens: int | None) -> None:
    torch.manual_seed(0)
    decoder = SlotDecoder(D, N, C, 16, attention=attention, differentiate=differentiate, tokens=tokens)
    z = torch.randn(2, S, D) if tokens is None else torch.randn(2, D)
    target, target_mask = torch.rand(2, 4, 2), torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    optimizer, loss_of = torch.optim.Adam(decoder.parameters(), lr=0.01), HungarianLoss()
    losses = []
    for _ in range(100):
        prediction = decoder(z)
        loss = loss_of(prediction.elements, target, prediction.mask, target_mask)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def transported(cost: Tensor, a: Tensor, b: Tensor, turns: int = 300) -> Tensor:
    """The plan of each sample, every turn differentiated."""
    g = torch.zeros_like(b)
    for _ in range(turns):
        f = -((g.unsqueeze(1) - cost) + b.log().unsqueeze(1)).logsumexp(2)
        g = -((f.unsqueeze(2) - cost) + a.log().unsqueeze(2)).logsumexp(1)
    return (f.unsqueeze(2) + g.unsqueeze(1) - cost).exp() * a.unsqueeze(2) * b.unsqueeze(1)


@pytest.mark.parametrize("sizes", [(7, 4), (3, 5), (1, 3), (6, 1)])
def test_a_plan_has_the_derivatives_of_its_iterations(sizes: tuple[int, int]) -> None:
    n, m = sizes
    cost, a, b = (torch.randn(2, *shape, **DOUBLE).requires_grad_() for shape in (sizes, (n,), (m,)))
    results = []
    for plan in (transported, lambda *x: differentiable_plan(*x, epsilon=1.0, iters=200)):
        value = plan(cost, a.softmax(1), b.softmax(1))
        results.append((value, *torch.autograd.grad(value.sin().sum(), (cost, a, b))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [(7, 4), (3, 5)])
def test_mesh_steps_against_the_gradient_of_the_entropy(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setpred.decoders.slot._MESH_STEPS", 1)
    n, m = sizes
    cost = torch.randn(2, *sizes, **DOUBLE).requires_grad_()
    a, b = torch.randn(2, n, **DOUBLE).softmax(1), torch.randn(2, m, **DOUBLE).softmax(1)
    (gradient,) = torch.autograd.grad(torch.special.entr(transported(cost, a, b)).sum(), cost)
    expected = -_MESH_LENGTH * gradient / gradient.flatten(1).norm(dim=1).view(2, 1, 1)
    torch.testing.assert_close(_sharpening(cost.detach(), a, b), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [5, 60])
def test_mesh_makes_plans_sharp(tokens: int) -> None:
    cost = torch.randn(4, tokens, N)
    a, b = torch.randn(4, tokens).softmax(1), torch.randn(4, N).softmax(1)
    before, after = (
        torch.special.entr(entropic_transport(c, a, b, epsilon=1.0, iters=50).plan).sum((1, 2))
        for c in (cost, cost + _sharpening(cost, a, b))
    )
    least = torch.special.entr(a).sum(1)  # of a plan that sends each token to one slot
    assert (after - least < 0.7 * (before - least)).all()


def test_mesh_is_differentiated_with_its_steps_held_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setpred.decoders.slot._TRANSPORT_ITERS", 500)
    monkeypatch.setattr("setpred.decoders.slot._MESH_LENGTH", 1.0)  # a plan that iterations find exactly
    decoder, (z, slots) = make(attention="mesh", iters=1, **DOUBLE), draw(2)
    z.requires_grad_()
    steps: list[Tensor] = []

    def remembered(*args: Tensor) -> Tensor:
        steps.append(_sharpening(*args))
        return steps[-1]

    gradients = []
    for sharpening in (remembered, lambda *_: steps[0]):
        monkeypatch.setattr("setpred.decoders.slot._sharpening", sharpening)
        gradients.append(torch.autograd.grad(decoder(z, init=slots).elements.sin().sum(), z)[0])
    assert steps[0].any()
    assert torch.equal(gradients[0], gradients[1])
    devices.gradcheck(lambda z: decoder(z, init=slots).elements, z)


@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e2, 1e4]))
def test_a_plan_that_is_nearly_an_assignment_has_finite_derivatives(seed: int, scale: float) -> None:
    generator = devices.generator(seed)
    cost = (scale * torch.randn(2, 4, 3, generator=generator, device=devices.here())).requires_grad_()
    a, b = torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 2), torch.tensor([[0.5, 0.25, 0.25]] * 2)
    plan = differentiable_plan(cost, a, b, epsilon=1.0, iters=50)
    (gradient,) = torch.autograd.grad(plan.square().sum(), cost)
    assert plan.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient[:, 3] == 0).all()
    assert gradient.abs().max() <= 1


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`in_channels` must be at least 1, got 0", {"in_channels": 0}),
        (ValueError, "`set_size` must be at least 1, got 0", {"set_size": 0}),
        (ValueError, "`channels` must be at least 1, got 0", {"channels": 0}),
        (ValueError, "`hidden_channels` must be at least 1, got 0", {"hidden_channels": 0}),
        (ValueError, "`iters` must be at least 1, got 0", {"iters": 0}),
        (TypeError, "`iters` must be an integer, got 2.5", {"iters": 2.5}),
        (ValueError, "`tokens` must be at least 1, got 0", {"tokens": 0}),
        (ValueError, "`attention` must be one of 'softmax', 'sinkhorn', 'mesh', got 'max'", {"attention": "max"}),
        (ValueError, "`differentiate` must be one of 'unrolled', 'implicit', got 'no'", {"differentiate": "no"}),
        (ValueError, "`mask_clamp` must be an increasing pair of numbers or None, got", {"mask_clamp": (1.0, 0.0)}),
        (ValueError, "`scaler` must have as many channels as the elements, 2, got 3", {"scaler": StandardScaler(3)}),
    ],
)
def test_refuses_settings(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        SlotDecoder(**{"in_channels": D, "set_size": N, "channels": C} | options)


TOKENS, VECTORS = (lambda: SlotDecoder(D, N, C, H)), (lambda: SlotDecoder(D, N, C, H, tokens=S))


@pytest.mark.parametrize(
    ("decoder", "error", "message", "z", "options"),
    [
        (TOKENS, ValueError, r"`z` must have shape \(B, S, 6\), got float32 of shape \(3, 5\)", torch.zeros(3, 5), {}),
        (TOKENS, ValueError, r"`z` must have shape \(B, S, 6\), got float32 of shape \(3, 6\)", torch.zeros(3, 6), {}),
        (VECTORS, ValueError, r"`z` must have shape \(B, 6\), got float32 of", torch.zeros(3, 5, 6), {}),
        (TOKENS, TypeError, "`z` must have a floating dtype, got int64 of shape", torch.zeros(3, 5, 6).long(), {}),
        (TOKENS, TypeError, "`z` must be a tensor, got None", None, {}),
        (
            TOKENS,
            ValueError,
            r"`mask` must have shape \(3, 5\), got bool of shape \(3, 4\)",
            torch.zeros(3, 5, 6),
            {"mask": torch.ones(3, 4, dtype=torch.bool)},
        ),
        (
            TOKENS,
            TypeError,
            r"`mask` must be bool or floating \(1 = present\), got int64",
            torch.zeros(3, 5, 6),
            {"mask": torch.ones(3, 5, dtype=torch.int64)},
        ),
        (
            VECTORS,
            ValueError,
            "`mask` must be None where `z` is a vector of each sample, got one: it is of tokens",
            torch.zeros(3, 6),
            {"mask": torch.ones(3, 5)},
        ),
        (
            TOKENS,
            ValueError,
            r"`init` must have shape \(3, N, 8\), got float32 of shape \(3, 4, 7\)",
            torch.zeros(3, 5, 6),
            {"init": torch.zeros(3, 4, 7)},
        ),
        (TOKENS, ValueError, "`iters` must be at least 1, got 0", torch.zeros(3, 5, 6), {"iters": 0}),
    ],
)
def test_refuses_inputs(
    decoder: Callable[[], nn.Module], error: type[Exception], message: str, z: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        decoder()(z, **options)
