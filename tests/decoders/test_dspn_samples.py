"""DSPNDecoder treats samples by themselves, and elements without order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpred import DSPNDecoder, FSPool, PooledEncoder, RelationEncoder
from tests import devices
from tests.rules import paper_decoder

BOTH_DERIVATIVES = pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])


def both(decoder: DSPNDecoder, z: Tensor, **options: Any) -> Tensor:
    """Elements with their mask as one more channel."""
    elements, mask, _ = decoder(z, **options)
    return torch.cat([elements, mask.unsqueeze(-1)], -1)


def largest_difference(decoder: DSPNDecoder, z: Tensor, sizes: tuple[int, ...], samples: int) -> float:
    """Of samples decoded alone and in batches, relative to the norm of each set."""
    alone = torch.cat([both(decoder, z[b : b + 1]) for b in range(samples)])
    worst = 0.0
    for size in sizes:
        together = both(decoder, z[:size])[:samples]
        difference = (together - alone[: len(together)]).flatten(1).norm(dim=1)
        worst = max(worst, (difference / alone[: len(together)].flatten(1).norm(dim=1)).max().item())
    return worst


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("make_encoder", "size", "channels", "features", "samples"),
    [
        (lambda: RelationEncoder(18, 512), 10, 18, 512, 7),
        (lambda: PooledEncoder(2, 64), 30, 2, 64, 33),
        (lambda: PooledEncoder(18, 512, 512), 10, 18, 512, 33),
        (lambda: PooledEncoder(4, 256, 128), 3, 4, 256, 33),
    ],
    ids=["relation", "pooled", "pooled, few rows", "pooled, three rows"],
)
def test_a_sample_alone_is_decoded_as_in_any_batch(
    seed: int, make_encoder: Callable[[], nn.Module], size: int, channels: int, features: int, samples: int
) -> None:
    torch.manual_seed(seed)
    decoder = paper_decoder(make_encoder(), 10, 25.0, set_size=size, channels=channels).eval()
    # Under AVX2 the rounding of RelationEncoder's larger product differs between batches: now and then a rank changes.
    on_cpu = devices.here().type == "cpu"
    rounded_alike = devices.products_are_rounded_alike() or (on_cpu and isinstance(decoder.encoder, PooledEncoder))
    most = 1e-5 if rounded_alike else devices.DECODED_ALIKE[devices.here().type]
    with torch.no_grad():
        assert largest_difference(decoder, torch.randn(samples, features), (2, 7, samples), samples) < most


@pytest.mark.parametrize("name", ["paper", "idspn"])
@pytest.mark.parametrize("make_encoder", [RelationEncoder, PooledEncoder])
def test_a_sample_alone_is_decoded_as_in_any_batch_in_float64(make_encoder: type[nn.Module], name: str) -> None:
    encoder = make_encoder(3, 32, 64, size_feature=True, dtype=torch.float64)
    decoder = getattr(DSPNDecoder, name)(encoder, set_size=6, channels=3, dtype=torch.float64, init="learned")
    z = torch.randn(16, 32, dtype=torch.float64)
    assert largest_difference(decoder, z, (2, 7, 16), samples=4) < 1e-12


@BOTH_DERIVATIVES
def test_gradients_of_a_batch_are_the_sum_of_those_of_its_samples(differentiate: str) -> None:
    encoder = RelationEncoder(3, 16, 16, dtype=torch.float64)
    decoder = paper_decoder(
        encoder, 4, 5.0, set_size=5, channels=3, anchor=0.1, differentiate=differentiate, dtype=torch.float64
    )
    z = torch.randn(4, 16, dtype=torch.float64)
    parameters = list(decoder.parameters())
    together = torch.autograd.grad(both(decoder, z).square().sum(), parameters)
    alone = [torch.autograd.grad(both(decoder, z[b : b + 1]).square().sum(), parameters) for b in range(4)]
    for of_batch, of_samples in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(of_batch, sum(of_samples), rtol=1e-9, atol=1e-9)


# Order of the elements (Appendix A)


@BOTH_DERIVATIVES
@pytest.mark.parametrize("pool", ["fspool", "sum", "mean", "max"])
@pytest.mark.parametrize("make_encoder", [RelationEncoder, PooledEncoder])
def test_permuting_the_start_permutes_the_prediction(
    make_encoder: type[nn.Module], pool: str, differentiate: str
) -> None:
    encoder = make_encoder(3, 16, 16, pool=pool, dtype=torch.float64)
    decoder = paper_decoder(encoder, 5, 1.0, set_size=5, channels=3, differentiate=differentiate)
    z = torch.randn(2, 16, dtype=torch.float64)
    elements, mask = torch.rand(2, 5, 3, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    order = torch.randperm(5)
    expected = both(decoder, z, init=(elements, mask))
    actual = both(decoder, z, init=(elements[:, order], mask[:, order]))
    torch.testing.assert_close(actual, expected[:, order], rtol=1e-9, atol=1e-9)
    v = torch.randn_like(expected)
    parameters = list(encoder.parameters())
    for a, e in zip(
        torch.autograd.grad((actual * v[:, order]).sum(), parameters, materialize_grads=True),
        torch.autograd.grad((expected * v).sum(), parameters, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def as_multiset(rows: Tensor) -> Tensor:
    return torch.stack([torch.stack(sorted(sample, key=lambda row: row.tolist())) for sample in rows.detach()])


class RowByRow(nn.Module):
    """Equal elements have exactly equal rows, and ties are ties: a product with a matrix may round each differently."""

    def __init__(self, pool: Callable[[Tensor], Tensor], pairs: bool) -> None:
        super().__init__()
        self.pool, self.pairs = pool, pairs
        self.weight = nn.Parameter(torch.randn(2, 4, 16, dtype=torch.float64))

    def forward(self, elements: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([elements, mask.unsqueeze(-1)], -1)
        rows, others = ((x.unsqueeze(-1) * weight).sum(-2) for weight in self.weight)
        if self.pairs:
            rows = (rows.unsqueeze(2) + others.unsqueeze(1)).flatten(1, 2)
        return self.pool(rows.tanh()) / rows.shape[1]


POOLS = {
    "fspool": FSPool(16, dtype=torch.float64),
    "sum": lambda rows: rows.sum(1),
    "max": lambda rows: rows.amax(1),
}


@pytest.mark.parametrize("pairs", [False, True], ids=["elements", "pairs"])
@pytest.mark.parametrize("pool", POOLS)
def test_equal_elements_of_the_start_end_unequal_by_sorting_alone(pool: str, pairs: bool) -> None:
    decoder = paper_decoder(RowByRow(POOLS[pool], pairs), 5, 1.0, set_size=4, channels=3).to(devices.here())
    z = torch.randn(2, 16, dtype=torch.float64)
    a, b = torch.rand(2, 3, dtype=torch.float64)
    start = torch.stack([a, b, a, a]).expand(2, 4, 3)
    prediction = both(decoder, z, init=start)
    copies = prediction[:, [0, 2, 3]]
    if pool == "fspool":
        assert (copies[:, [0, 0, 1]] - copies[:, [1, 2, 2]]).abs().amax(-1).min() > 1e-4
    else:
        assert (copies - copies[:, :1]).abs().max() < 1e-12
    # Which copy goes where is arbitrary; where they go together is not.
    permuted = both(decoder, z, init=start[:, [2, 0, 3, 1]])
    torch.testing.assert_close(as_multiset(permuted), as_multiset(prediction), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make_encoder", [RelationEncoder, PooledEncoder])
@pytest.mark.parametrize("pool", ["fspool", "sum", "mean"])
def test_the_encoders_separate_equal_elements_by_fspool_alone(make_encoder: type[nn.Module], pool: str) -> None:
    encoder = make_encoder(3, 16, 16, pool=pool, dtype=torch.float64)
    decoder = paper_decoder(encoder, 5, 1.0, set_size=4, channels=3)
    rows = both(decoder, torch.randn(2, 16, dtype=torch.float64), init=torch.full((2, 4, 3), 0.5, dtype=torch.float64))
    apart = (rows - rows[:, :1]).abs().amax(-1)[:, 1:]
    assert (apart > 1e-4).all() if pool == "fspool" else (apart < 1e-12).all()


def test_a_set_of_duplicates_becomes_a_multiset_only_where_ties_are_broken() -> None:
    """From four equal elements to {0, 0, 1, 1}: a sum-pooled encoder cannot leave the diagonal."""
    target = torch.tensor([[[0.0], [0.0], [1.0], [1.0]]], dtype=torch.float64)
    spread = {}
    for pool in ("fspool", "sum"):
        encoder = PooledEncoder(1, 64, 64, pool=pool, dtype=torch.float64)
        decoder = DSPNDecoder.idspn(encoder, set_size=4, channels=1, mask_clamp=None, anchor=0.0, iters=40)
        z = encoder(target, None).detach()
        elements = decoder(z, init=torch.full_like(target, 0.5)).elements
        spread[pool] = (elements.max() - elements.min()).item()
    assert spread["sum"] < 1e-9
    assert spread["fspool"] > 0.1
