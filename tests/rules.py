"""Options of a decoder or a descent with the step rule's written among them, as the oracles take them."""

from typing import Any

from setpred import GradientDescent, PolyakDescent

RULE = ("momentum", "nesterov", "grad_clip")


def with_rule(options: dict[str, Any]) -> dict[str, Any]:
    """The options with `lr` and what belongs to it made one rule."""
    options = dict(options)
    if options.pop("polyak", False):
        return options | {"lr": PolyakDescent(options["lr"], options.pop("momentum"))}
    rule = {name: options.pop(name) for name in RULE if name in options}
    return options | {"lr": GradientDescent(options["lr"], **rule)} if rule else options
