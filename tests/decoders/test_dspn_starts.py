"""Several descents a sample, and samples that have arrived."""

from typing import Any

import pytest
import torch
from torch import Tensor

from setpred import DSPNDecoder, PolyakDescent, PooledEncoder, SetPrediction, StandardScaler
from tests import devices

N, C, D = 5, 2, 16


def make_decoder(**options: Any) -> DSPNDecoder:
    torch.manual_seed(0)
    encoder = PooledEncoder(C, D, 32, dtype=torch.float64)
    settings = {"iters": 15, "lr": PolyakDescent(), "repr_loss": "mse", "dtype": torch.float64} | options
    return DSPNDecoder(encoder, set_size=N, channels=C, **settings).eval()


def targets(decoder: DSPNDecoder, batch: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return decoder.encoder(torch.rand(batch, N, C, dtype=torch.float64, generator=generator))


def decode(decoder: DSPNDecoder, z: Tensor, **options: Any) -> SetPrediction:
    return decoder(z, record=True, generator=devices.generator(3), **options)


def tensors(prediction: SetPrediction) -> tuple[Tensor, ...]:
    return (*prediction[:2], *prediction.trajectory)


@pytest.mark.parametrize("init", ["learned", "random"])
@pytest.mark.parametrize("mask_clamp", [None, (0.0, 1.0)])
def test_of_several_starts_each_sample_keeps_its_best(init: Any, mask_clamp: Any) -> None:
    decoder = make_decoder(init=init, mask_clamp=mask_clamp)
    z = targets(decoder)
    generator = devices.generator(3)
    first = decoder._initial(z, None, generator)[0]
    starts = [first, *(0.1 * torch.randn(3, *first.shape, dtype=first.dtype, generator=generator))]
    alone = [decoder(z, init=start, record=True) for start in starts]
    losses = torch.stack([decoder.representation_loss(prediction, z) for prediction in alone])
    best = losses.argmin(0)
    assert len(best.unique()) > 1  # no start is the best for all
    chosen = decode(decoder, z, starts=4)
    for b, k in enumerate(best.tolist()):
        for actual, expected in zip(tensors(chosen), tensors(alone[k]), strict=True):
            dim = 0 if actual.dim() == expected.dim() and len(actual) == len(z) else 1
            torch.testing.assert_close(actual.select(dim, b), expected.select(dim, b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decoder.representation_loss(chosen, z), losses.amin(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_scaler", [False, True])
def test_representation_loss_of_every_dtype(dtype: torch.dtype, with_scaler: bool) -> None:
    """A scaler gives elements of float32 at least, whatever the encoder's dtype."""
    scaler = StandardScaler(C).fit(5 + 3 * torch.randn(9, C)) if with_scaler else None
    encoder = PooledEncoder(C, D, 32, dtype=dtype)
    decoder = DSPNDecoder(encoder, set_size=N, channels=C, dtype=dtype, scaler=scaler)
    z = torch.randn(3, D, dtype=dtype)
    loss = decoder.representation_loss(decoder(z), z)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.isfinite().all()


def test_representation_loss_of_something_else() -> None:
    decoder, z = make_decoder(), torch.randn(3, D, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^`prediction` must be a SetPrediction, got a tuple$"):
        decoder.representation_loss((decoder(z).elements, decoder(z).mask), z)  # type: ignore[arg-type]


def test_starts_may_be_the_decoders_or_the_calls() -> None:
    decoder = make_decoder(starts=3)
    z = targets(decoder)
    one, three = decode(decoder, z, starts=1), decode(decoder, z)
    assert torch.equal(three.elements, decode(decoder, z, starts=3).elements)
    assert not torch.equal(one.elements, three.elements)
    # To rounding: in float64, a sample's last digit goes by the size of the batch.
    assert (decoder.representation_loss(three, z) <= decoder.representation_loss(one, z) + 1e-12).all()


def test_with_tol_only_samples_above_it_start_again() -> None:
    decoder = make_decoder(iters=40, tol=2e-4)
    z = targets(decoder, 8)
    first = decoder.representation_loss(decode(decoder, z), z)
    assert 0 < (first <= decoder.tol).sum() < 8
    rows: list[int] = []
    decoder.encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    several = decode(decoder, z, starts=4)
    assert max(rows[len(rows) // 2 :]) < 8  # a later start has fewer samples
    arrived = first <= decoder.tol
    torch.testing.assert_close(several.elements[arrived], decode(decoder, z).elements[arrived])
    assert (decoder.representation_loss(several, z) <= decoder.tol).sum() > arrived.sum()


def test_one_after_the_other_gives_the_same_as_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(iters=40, tol=2e-4, starts=4)
    z = targets(decoder, 8)
    eager = decode(decoder, z)
    monkeypatch.setattr("setpred.decoders.dspn.in_transform", lambda: True)
    side_by_side = decode(decoder, z)
    torch.testing.assert_close(tensors(eager), tensors(side_by_side), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])
@pytest.mark.parametrize("tol", [None, 1e-2])
def test_training_goes_through_the_chosen_start(differentiate: Any, tol: float | None) -> None:
    decoder = make_decoder(differentiate=differentiate, tol=tol, starts=3).train()
    z = targets(decoder).requires_grad_()
    decoder(z).elements.square().sum().backward()
    assert z.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in decoder.encoder.parameters())
    assert z.grad.any()


def test_starts_compile() -> None:
    decoder = make_decoder(iters=2)
    z = targets(decoder)
    torch._dynamo.reset()
    prediction = torch.compile(decoder, fullgraph=True, backend="aot_eager")(z, starts=3)
    assert prediction.elements.shape == (len(z), N, C)
    assert prediction.elements.isfinite().all()


def test_a_start_that_breaks_is_not_chosen() -> None:
    decoder = make_decoder()
    z = targets(decoder)
    init = torch.full((len(z), N, C), torch.nan, dtype=torch.float64)
    assert decoder(z, init=init).elements.isnan().all()
    assert decoder(z, init=init, starts=2).elements.isfinite().all()


@pytest.mark.parametrize("differentiate", ["unrolled", "implicit"])
@pytest.mark.parametrize("training", [True, False])
def test_samples_that_arrive_leave_the_batch_and_nothing_changes(
    differentiate: Any, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(iters=30, tol=1e-2, differentiate=differentiate, anchor=0.01)
    z = targets(decoder, 8).requires_grad_(training)
    rows: list[int] = []
    handle = decoder.encoder.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    leaving = decode(decoder, z)
    handle.remove()
    assert sorted(set(rows), reverse=True)[:2] != [8]
    monkeypatch.setattr("setpred.functional.descent.in_transform", lambda: True)
    staying = decode(decoder, z)
    torch.testing.assert_close(tensors(leaving), tensors(staying), rtol=1e-9, atol=1e-9)
    if training:
        of_leaving, of_staying = (
            torch.autograd.grad(p.elements.square().sum() + p.mask.sum(), (z, *decoder.encoder.parameters()))
            for p in (leaving, staying)
        )
        torch.testing.assert_close(of_leaving, of_staying, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("error", "message", "starts"),
    [(ValueError, "`starts` must be at least 1", 0), (TypeError, "`starts` must be an integer", 1.5)],
)
def test_refuses(error: type[Exception], message: str, starts: Any) -> None:
    with pytest.raises(error, match=message):
        make_decoder(starts=starts)
    with pytest.raises(error, match=message):
        make_decoder()(torch.zeros(1, D, dtype=torch.float64), starts=starts)


@pytest.mark.parametrize(
    "options",
    [{}, {"starts": 3}, {"tol": 1e-2, "starts": 3}, {"mask_clamp": None}],
    ids=["one", "starts", "tol", "no mask"],
)
@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_in_chunks_is_the_same(options: dict[str, Any], chunk_size: int) -> None:
    decoder = make_decoder(init="random", **options)
    z = targets(decoder).requires_grad_()
    whole, chunks = decode(decoder, z), decode(decoder, z, chunk_size=chunk_size)
    for actual, expected in zip(tensors(chunks), tensors(whole), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(p.elements.square().sum(), z)[0] for p in (chunks, whole)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_chunks_of_nothing() -> None:
    decoder = make_decoder()
    assert decoder(torch.empty(0, D, dtype=torch.float64), chunk_size=2).elements.shape == (0, N, C)
    with pytest.raises(ValueError, match=r"^`chunk_size` must be at least 1, got 0$"):
        decoder(torch.randn(3, D, dtype=torch.float64), chunk_size=0)
