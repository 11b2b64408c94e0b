"""Sphinx configuration. Builds without network: python -m sphinx -W -n -b html docs docs/_build.

Without npm's registry or its cache, the page "Live" shows a film instead of decoding by itself.
"""

import importlib
import importlib.util
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

import setpred

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # animation.py, live.py

project = "setpred"
author = "The setpred authors"
copyright = author
version = release = setpred.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax and its fonts, from the wheel
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery", "auto_gallery/*.ipynb"]
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]  # the gallery's reset function cannot be pickled
warnings.filterwarnings("error", module="setpred")

html_theme = "furo"
html_title = f"setpred {release}"
html_static_path = ["_static"]
html_css_files = ["setpred.css"]
html_favicon = "_static/favicon.svg"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#3355bb", "color-brand-content": "#3355bb"},
    "dark_css_variables": {"color-brand-primary": "#8fabff", "color-brand-content": "#8fabff"},
}
pygments_style = "default"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autosummary_generate = True
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # as they are written: a function has no address
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
# Of an overloaded function, the one signature that lists every argument.
ModuleAnalyzer.overloads = property(lambda self: {}, lambda self, found: None)
python_maximum_signature_line_length = 90
python_use_unqualified_type_names = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes")]

nitpicky = True
nitpick_ignore_regex = [
    # Names of Python's and PyTorch's own that appear in signatures; their inventories are on the net.
    (r"py:.*", r"(collections|functools|matplotlib|numbers|typing|typing_extensions|types)\..*"),
    (r"py:.*", r"torch\..*"),
    (
        r"py:.*",
        r"(None|int|float|bool|str|tuple|list|dict|object|type|Any|Callable|Collection|Generic|Literal|NamedTuple|"
        r"Optional|Protocol|Self|Sequence|Union|optional|TypeError|ValueError|RuntimeError|ModuleNotFoundError|"
        r"ImportError|NotImplementedError|FileNotFoundError|OSError|os\.PathLike|PathLike|pathlib\..*|Path)",
    ),
    (r"py:.*", r"(Axes|Tensor|_Tensors|Y|.*\.Y|onnx.*)"),
    # Aliases of Literal and of callables, spelled out in the docstrings.
    (r"py:.*", r".*\b(Cost|Init|Kind|Matching|PoolName|Presence|Project|Reduction|Rule|SetLoss|Solver)"),
    (r"py:.*", r"setpred(\.\w+)*\._\w+"),
]

# Where the commonest names of PyTorch are documented, so that they become links without its inventory.
TORCH = {
    "torch.Tensor": "tensors.html",
    "torch.dtype": "tensor_attributes.html",
    "torch.device": "tensor_attributes.html",
    "torch.Generator": "generated/torch.Generator.html",
    "torch.nn.Module": "generated/torch.nn.Module.html",
}


def write_inventory(path: Path) -> None:
    """Write the names of TORCH as an inventory that intersphinx reads."""
    head = "# Sphinx inventory version 2\n# Project: PyTorch\n# Version: stable\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = "".join(f"{name} py:class 1 {page}#$ -\n" for name, page in TORCH.items())
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head.encode() + zlib.compress(lines.encode()))


write_inventory(HERE / "_build" / "torch.inv")
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", "_build/torch.inv")}

# The API reference: one page a module with a table of its `__all__`, one page a name.
MODULES = ["setpred", "setpred.functional", "setpred.metrics"]
if importlib.util.find_spec("setpred.export"):
    MODULES.append("setpred.export")
MODULES.append("setpred.plot")
SUBMODULES = ("functional", "metrics")  # in setpred.__all__, with a page of their own


def write_api_pages() -> dict[int, str]:
    """Write docs/api/<module>.rst from `__all__`; return the public name of each object, by its id."""
    public: dict[int, str] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        names = [name for name in module.__all__ if not (module is setpred and name in SUBMODULES)]
        for name in names:
            public.setdefault(id(getattr(module, name)), f"{module_name}.{name}")
        table = "\n".join(f"   {name}" for name in names)
        page = f"{module_name}\n{'=' * len(module_name)}\n\n.. automodule:: {module_name}\n"
        page += f"\n.. currentmodule:: {module_name}\n\n.. autosummary::\n   :toctree: generated\n   :nosignatures:\n\n"
        path = HERE / "api" / f"{module_name}.rst"
        if not path.exists() or path.read_text() != page + table + "\n":
            path.write_text(page + table + "\n")
    return public


PUBLIC = write_api_pages()


def public_name(dotted: str) -> str | None:
    """Public name of what is defined as setpred.sets.SetPrediction, say."""
    module_name, _, name = dotted.rpartition(".")
    try:
        return PUBLIC.get(id(getattr(importlib.import_module(module_name), name)))
    except (ImportError, AttributeError, ValueError):
        return None


def resolve_by_identity(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Element | None:
    """Link a name given by where it is defined, as annotations do, to the page of its public name."""
    name = public_name(node.get("reftarget", "")) if node.get("refdomain") == "py" else None
    if name is None or name == node["reftarget"]:
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, text)


def skip_member(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what says nothing: fields of named tuples (documented as attributes) and extra_repr."""
    return True if type(value).__name__ == "_tuplegetter" or name == "extra_repr" else None


def gallery_style(gallery_conf: dict[str, Any], script: str) -> None:
    """Reproducible scripts; figures that can be read on a light page and on a dark one."""
    import matplotlib.pyplot as plt
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    grey = "#7d828c"
    plt.rcParams.update(
        {
            **dict.fromkeys(["figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"], "none"),
            **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], grey),
            "axes.prop_cycle": plt.cycler(color=["#3b7dd8", "#e07b39", "#3f9e5f", "#b0529f", "#8a8f99"]),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "figure.dpi": 150,
            "savefig.dpi": 150,
            "font.size": 10,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )


sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"\.py$",
    "reset_modules": ("matplotlib", gallery_style),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 10_000,
    "remove_config_comments": True,
    "within_subsection_order": "FileNameSortKey",
    "write_computation_times": False,
    "backreferences_dir": None,
    "image_scrapers": ("matplotlib",),
}


def make_animation(app: Sphinx) -> None:
    """Render the landing page's moving picture, if its script has changed since."""
    import animation

    animation.render(HERE / "_static", only_if_older=True)


def make_live(app: Sphinx) -> None:
    """Export the networks of the page "Live", and put ONNX Runtime Web beside them, if they are not there."""
    import live

    live.render(only_if_older=True)


def setup(app: Sphinx) -> None:
    """Connect the hooks above."""
    app.connect("missing-reference", resolve_by_identity)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("builder-inited", make_animation)
    app.connect("builder-inited", make_live)
