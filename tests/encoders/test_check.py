"""check_encoder: each fault is found, and sound encoders have none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setpred import AttentionEncoder, PooledEncoder, RelationEncoder, check_encoder

C, N, D = 3, 6, 8


class Summed(nn.Module):
    """A sound encoder, of which a fault changes one part."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.inner, self.outer = nn.Linear(C + 1, 16), nn.Linear(16, D)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        nn.init.normal_(self.inner.weight, std=0.5)
        nn.init.normal_(self.outer.weight, std=0.25)

    def forward(self, elements: Tensor, mask: Tensor | None = None) -> Tensor:
        fault = self.fault
        if fault == "no mask":
            raise TypeError("forward() takes one argument")
        if fault == "in place":
            elements.clamp_(-0.5, 0.5)
        m = elements.new_ones(elements.shape[:2]) if mask is None else mask
        if fault == "zeros for None" and mask is None:
            m = torch.zeros_like(m)
        if fault == "ignores mask":
            m = torch.ones_like(m)
        if fault == "detached mask":
            m = m.detach()
        if fault == "rounded mask":
            m = (m > 0.5).to(m)
        if fault == "log mask":
            m = m.log()
        if fault == "constant":
            elements = 0 * elements
        if fault == "detached":
            elements = elements.detach()
        if fault == "partly detached":
            elements = elements * elements.detach()
        x = torch.tanh(self.inner(torch.cat([elements, m.unsqueeze(-1)], -1)))
        if fault == "position":
            x = x * torch.arange(1, elements.shape[1] + 1).to(x).unsqueeze(-1)
        if fault == "batch norm":
            x = self.norm(x.flatten(0, 1)).view_as(x)
        if fault == "batch":
            x = x - x.mean(0)
        if fault == "dropout":
            x = self.drop(x)
        if fault == "float32":
            x = x.float().double()
        if fault == "kinked":
            x = x.relu()
        if fault == "norm":
            x = x * elements.square().sum(-1, keepdim=True).sqrt()
        if fault == "once":
            x = Once.apply(x)
        if fault == "refused":
            x = NotTwice.apply(x)
        if fault == "first only":
            x = FirstOnly.apply(x)
        vector = self.outer(x.sum(1) / elements.shape[1] ** 0.5)
        if fault == "flat":
            vector = 1e-3 * vector
        if fault == "steep":
            vector = 1e2 * vector
        if fault == "rounded":
            vector = vector.round().long()
        if fault == "refuses zeros" and bool((m == 0).any()):
            raise ValueError("nobody is there")
        if fault == "single":
            vector = vector.float()
        if fault == "rows":
            vector = x
        if fault == "no grad":
            vector = vector.detach()
        return vector / 0 if fault == "infinite" else vector


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Product.apply(2 * ctx.saved_tensors[0], grad)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        return x * grad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("not twice")


class FirstOnly(torch.autograd.Function):
    """Right once; the derivative of its gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].detach() * grad


FAULTS = {
    "no mask": "It does not run: TypeError: forward",
    "rows": "It must return one vector a set",
    "rounded": "a vector of a floating dtype, and returns torch.int64",
    "refuses zeros": "does not run where elements and mask are 0: ValueError: nobody",
    "infinite": "not finite for standard normal",
    "in place": "changes its input in place",
    "dropout": "It is random",
    "single": "returns torch.float32",
    "float32": "Its gradient is wrong",
    "zeros for None": "Without a mask it must do",
    "position": "The order of the elements matters",
    "batch norm": "depends on the other samples",
    "batch": "depends on the other samples",
    "constant": "does not depend on the elements",
    "ignores mask": "It ignores the mask",
    "detached mask": "no gradient with respect to the mask",
    "rounded mask": "no gradient with respect to the mask",
    "log mask": "not finite where elements and mask are 0",
    "norm": "not finite where elements and mask are 0",
    "detached": "no gradient with respect to the elements",
    "partly detached": "Its gradient is wrong",
    "no grad": "It is not differentiable",
    "once": "second derivative with respect to the elements is wrong",
    "refused": "It has no second derivative: RuntimeError: not twice",
    "first only": "second derivative with respect to the elements is wrong",
    "flat": "the descent will hardly move",
    "steep": "the descent will be unstable",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    check = check_encoder(Summed(fault), C, set_size=N)
    assert not check.ok
    assert any(FAULTS[fault] in verdict for verdict in check.verdicts), check
    assert all(verdict.replace("\n", " ")[:20] in str(check) for verdict in check.verdicts)


@pytest.mark.parametrize(
    ("make", "absent_count"),
    [
        (Summed, True),
        (lambda: Summed("kinked"), True),
        (lambda: Summed("batch norm").eval(), True),
        (lambda: PooledEncoder(C, 64), True),
        (lambda: PooledEncoder(C, 64, pool="max", size_feature=True), True),
        (lambda: PooledEncoder(C, 64).half(), True),
        (lambda: RelationEncoder(C, 64, 64), True),
        (lambda: AttentionEncoder(C, 64, 64), True),
        (lambda: AttentionEncoder(C, 64, 64, inducing_points=4), True),
        (lambda: AttentionEncoder(C, 64, 64, pool="attention"), False),
    ],
)
@pytest.mark.parametrize("masked", [True, False])
def test_sound_encoders_have_none(make: Callable[[], nn.Module], absent_count: bool, masked: bool) -> None:
    check = check_encoder(make(), C, set_size=N, masked=masked)
    assert check.ok, check
    assert check.verdicts == ("Nothing is wrong.",)
    assert check.absent_count is (absent_count if masked else None)
    assert 0.05 < check.curvature < 5


def test_functions_are_checked_too() -> None:
    def weighted(elements: Tensor, mask: Tensor | None) -> Tensor:
        m = elements.new_ones(elements.shape[:2]) if mask is None else mask
        rows = torch.cat([elements, torch.ones_like(elements[..., :1])], -1) * m.unsqueeze(-1)
        return rows.sum(1)

    check = check_encoder(weighted, C)
    assert check.ok, check
    assert check.out_channels == C + 1
    assert check.absent_count is False


def test_of_one_number_of_rows() -> None:
    """What absent rows do cannot be found out."""
    weight = torch.randn(N, dtype=torch.float64)

    def ranked(elements: Tensor, mask: Tensor | None) -> Tensor:
        m = elements.new_ones(elements.shape[:2]) if mask is None else mask
        rows = torch.cat([elements, torch.ones_like(elements[..., :1])], -1) * m.unsqueeze(-1)
        return torch.einsum("bnc,n->bc", rows.sort(1).values, weight)

    check = check_encoder(ranked, C, set_size=N)
    assert check.absent_count is None
    assert check.ok, check


def test_in_inference_mode() -> None:
    encoder = PooledEncoder(C, 64)
    expected = check_encoder(encoder, C)
    with torch.inference_mode():
        assert check_encoder(encoder, C) == expected


def test_nothing_changes() -> None:
    encoder = Summed("batch norm").requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        check_encoder(encoder, C)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in encoder.parameters())


def test_refuses_numbers() -> None:
    with pytest.raises(ValueError, match="`channels` must be at least 1, got 0"):
        check_encoder(Summed(), 0)
    with pytest.raises(ValueError, match="`set_size` must be at least 2, got 1"):
        check_encoder(Summed(), C, set_size=1)
