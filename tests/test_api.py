"""The public names: they are there, documented, and called as users rely on."""

import inspect
import re
from types import ModuleType

import pytest

import setpred
import setpred.export
import setpred.functional
import setpred.metrics
import setpred.plot

NAMES = [(setpred, name) for name in setpred.__all__ if name not in ("functional", "metrics")]
MODULES = (setpred.functional, setpred.metrics, setpred.export, setpred.plot)
NAMES += [(module, name) for module in MODULES for name in module.__all__]
EVERY_NAME = pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m.__name__}.{n}" for m, n in NAMES])

# What users rely on: names, order, kinds and defaults of arguments. There may be more, by keyword only.
CONTRACT = """
class SetPrediction:
    def __init__(elements, mask, trajectory=None): ...
class Trajectory:
    def __init__(elements, mask, repr_loss=None, grad_norm=None): ...
def pad_sets(sets, size=None): ...
def unpad_sets(elements, mask=None, threshold=0.5): ...
class StandardScaler:
    def __init__(channels): ...
    def fit(self, elements, mask=None): ...
    def forward(self, elements, mask=None): ...
    def inverse(self, elements, mask=None): ...
class SetEncoder: ...
class FSPool:
    def __init__(in_channels, pieces=20, *, relaxed=None): ...
    def forward(self, elements, mask=None): ...
class FSUnpool:
    def __init__(in_channels, pieces=20): ...
class PooledEncoder:
    def __init__(in_channels, out_channels, hidden_channels=256, *, layers=3, pool="fspool", size_feature=False): ...
    def forward(self, elements, mask=None): ...
class RelationEncoder:
    def __init__(in_channels, out_channels, hidden_channels=512, *, pool="fspool", size_feature=False): ...
    def forward(self, elements, mask=None): ...
class AttentionEncoder:
    def __init__(
        in_channels, out_channels, hidden_channels=256, *, layers=1, heads=4, inducing_points=None, pool="fspool",
    ): ...
    def forward(self, elements, mask=None): ...
def check_encoder(encoder, channels, *, set_size=6, masked=True): ...
class EncoderCheck: ...
class DSPNDecoder:
    def __init__(
        encoder, iters=10, lr=setpred.PolyakDescent(), mask_clamp=(0.0, 1.0), *, set_size, channels,
        repr_loss="huber", anchor=0.0, project=None, tol=None, differentiate="unrolled", init="learned", starts=1,
    ): ...
    def forward(self, z, *, iters=None, init=None, starts=None, record=None, generator=None): ...
    def diagnose(self, z, target, target_mask=None, *, iters=None, set_loss=None, generator=None): ...
    def recommended(encoder, *, set_size, channels): ...
    def paper(encoder, *, set_size, channels): ...
    def idspn(encoder, *, set_size, channels): ...
class Diagnosis: ...
class MLPDecoder:
    def __init__(in_channels, set_size, channels, hidden_channels=512): ...
    def forward(self, z): ...
class LSTMDecoder:
    def __init__(in_channels, set_size, channels, hidden_channels=512): ...
    def forward(self, z): ...
class TransformerDecoder:
    def __init__(in_channels, set_size, channels, hidden_channels=256, *, layers=6, heads=8, queries="learned"): ...
    def forward(self, z, mask=None, *, record=None, generator=None): ...
class SlotDecoder:
    def __init__(in_channels, set_size, channels, hidden_channels=64, *, iters=3, tokens=None, attention="softmax"): ...
    def forward(self, z, mask=None, *, iters=None, init=None, record=None, generator=None): ...
class HungarianLoss:
    def __init__(cost="huber", *, presence="feature", presence_weight=1.0, reduction="mean", solver="auto"): ...
    def forward(self, pred, target, pred_mask=None, target_mask=None): ...
def hungarian_loss(
    pred, target, pred_mask=None, target_mask=None, *,
    cost="huber", presence="feature", presence_weight=1.0, reduction="mean", solver="auto",
): ...
class ChamferLoss:
    def __init__(cost="huber", *, presence="feature", reduction="mean"): ...
    def forward(self, pred, target, pred_mask=None, target_mask=None): ...
def chamfer_loss(
    pred, target, pred_mask=None, target_mask=None, *, cost="huber", presence="feature", reduction="mean"
): ...
class RepresentationLoss:
    def __init__(kind="huber", *, reduction="mean"): ...
    def forward(self, representation, target): ...
def representation_loss(representation, target, *, kind="huber", reduction="mean"): ...
class DSPNLoss:
    def __init__(encoder, set_loss, *, repr_weight=0.1, steps="all"): ...
    def forward(self, prediction, target, target_mask=None, *, z=None): ...
def linear_assignment(cost, *, row_mask=None, col_mask=None, solver="auto"): ...
"""


def contracts() -> dict[str, inspect.Signature]:
    """Signature of each function, constructor and method of the contract, by its dotted name."""
    namespace: dict[str, object] = {}
    exec(CONTRACT, {"setpred": setpred}, namespace)
    found = {}
    for name, value in namespace.items():
        if inspect.isfunction(value):
            found[name] = inspect.signature(value)
        elif inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function):
                    found[name if method == "__init__" else f"{name}.{method}"] = inspect.signature(function)
    return found


CONTRACTS = contracts()


@pytest.mark.parametrize("name", CONTRACTS)
def test_is_called_as_users_rely_on(name: str) -> None:
    value = setpred
    for part in name.split("."):
        value = getattr(value, part)
    actual, expected = inspect.signature(value).parameters, CONTRACTS[name].parameters

    def positional(parameters: dict[str, inspect.Parameter]) -> list[str]:
        return [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(actual) == positional(expected)
    for parameter in expected.values():
        assert actual[parameter.name].kind == parameter.kind, parameter.name
        assert actual[parameter.name].default == parameter.default, parameter.name
    more = [p for n, p in actual.items() if n not in expected]
    assert all(p.kind is p.VAR_KEYWORD or (p.kind is p.KEYWORD_ONLY and p.default is not p.empty) for p in more)


def test_every_name_of_the_contract_is_public() -> None:
    namespace: dict[str, object] = {}
    exec(CONTRACT, {"setpred": setpred}, namespace)
    assert {name for name in namespace if not name.startswith("__")} <= set(setpred.__all__)
    assert len(set(setpred.__all__)) == len(setpred.__all__)
    assert isinstance(setpred.functional, ModuleType)
    assert setpred.__version__


@EVERY_NAME
def test_is_documented(module: ModuleType, name: str) -> None:
    value = getattr(module, name)
    document = inspect.getdoc(value)
    assert document.splitlines()[0].endswith(".")
    assert ">>> " in document
    if ".. math::" in document or hasattr(value, "forward"):
        assert "Source:" in document, "where the formula comes from"


def documented(value: object) -> list[str]:
    """Names in the section `Args`."""
    _, _, rest = (inspect.getdoc(value) or "").partition("Args:\n")
    lines = rest.split("\n\n")[0].splitlines()
    return [line.strip().split(":")[0].lstrip("*") for line in lines if line.startswith("    ") and line[4] != " "]


def arguments(value: object) -> list[str]:
    return [name for name in inspect.signature(value).parameters if name != "self"]


@EVERY_NAME
def test_arguments_are_documented(module: ModuleType, name: str) -> None:
    """Every argument of functions, constructors and `forward` is named in the section `Args`, and no other is.

    A module over a function need not say again what the function says of its options.
    """
    value = getattr(module, name)
    if inspect.isfunction(value):
        assert documented(value) in (arguments(value), [])
    if not hasattr(value, "forward"):
        return
    document, of_function = inspect.getdoc(value), []
    if over := re.search(r"Its options are those of :func:`(\w+)`", document):
        of_function = documented(getattr(setpred, over[1]))
        assert of_function
    own = documented(value)
    assert own == [n for n in arguments(value.__init__) if n in own or n not in of_function]
    if not inspect.getdoc(value.forward).startswith("See "):  # a module over a function documents itself there
        assert documented(value.forward) == arguments(value.forward)
