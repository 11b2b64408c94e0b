"""Options of a decoder or a descent with the step rule's written among them, as the oracles take them."""

from typing import Any

from setpred import DSPNDecoder, GradientDescent, PolyakDescent

RULE = ("momentum", "nesterov", "grad_clip")


def with_rule(options: dict[str, Any]) -> dict[str, Any]:
    """The options with `lr` and what belongs to it made one rule."""
    options = dict(options)
    if options.pop("polyak", False):
        return options | {"lr": PolyakDescent(options["lr"], options.pop("momentum"))}
    rule = {name: options.pop(name) for name in RULE if name in options}
    return options | {"lr": GradientDescent(options["lr"], **rule)} if rule else options


def recipe(name: str) -> dict[str, Any]:
    """Settings for a preset's test: a step that small encoders can take, and a start that is the same at each call."""
    rule = GradientDescent(1.0, momentum=0.9, nesterov=True, grad_clip=10.0)
    return {"init": "learned"} | ({"lr": rule, "anchor": 0.1} if name == "idspn" else {"lr": 1.0})


def paper_decoder(
    encoder: Any, iters: int = 10, lr: Any = 25.0, mask_clamp: Any = (0.0, 1.0), **options: Any
) -> DSPNDecoder:
    """The paper's: unrolled, and from the same start at each call."""
    return DSPNDecoder.paper(encoder, iters=iters, lr=lr, mask_clamp=mask_clamp, **options)
