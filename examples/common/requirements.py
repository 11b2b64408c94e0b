"""Says what is not installed before anything slow is imported; the scripts import it first."""

from importlib.util import find_spec

PACKAGES = ("accelerate", "matplotlib", "setpred", "sklearn", "torch", "tqdm")

if missing := [name for name in PACKAGES if find_spec(name) is None]:
    raise SystemExit(f'not installed: {", ".join(missing)}; in the checkout of setpred: pip install -e ".[examples]"')
