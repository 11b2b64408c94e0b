"""Networks with a decoder in them as graphs, for every batch size: `torch.export` programs and ONNX models.

`torch.export` refuses `torch.func.grad`, by which :class:`setpred.DSPNDecoder` descends. But a trace below autograd
holds only what the gradient computes: a plain graph of tensor operations, which `torch.export` takes, and from it the
ONNX exporter. The batch is symbolic in the trace, so the graph holds no batch size.

The ONNX packages are the extra ``export``; they are imported only by :func:`to_onnx`.
"""

import builtins
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, is_concrete_int
from torch.utils import _pytree as pytree

__all__ = ["to_onnx", "to_program"]


def to_program(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Export a network for inference as a graph that `torch.export` saves, compiles ahead of time, and others read.

    The graph computes what ``model(*example)`` does in evaluation mode without gradients, for every batch size of at
    least 1. Inner steps are unrolled in it: ``iters`` is fixed to what the decoder has now. Where a decoder has
    ``tol``, all steps are computed, and samples under it stay as they are, as ever.

    Args:
        model: A whole network or a decoder, in evaluation mode. It may return tensors,
            :class:`setpred.SetPrediction`, and tuples, lists and dicts of them.
        example: Its input or inputs, with one batch size as first dimension. Only shapes, dtypes and devices matter.

    Returns:
        The program. Its parameters have the names that they have in the model; its result is the tuple of the tensors
        that the model returns, in order: ``(elements, mask)`` for a ``SetPrediction`` without a trajectory.

    Raises:
        ValueError: If the model is in training mode, the batch sizes of ``example`` differ or are 0, or what the model
            computes depends on the batch size.
        TypeError: If an argument is of another type, or the model returns something else than tensors.

    Example:
        >>> from setpred import DSPNDecoder, PooledEncoder
        >>> decoder = DSPNDecoder(PooledEncoder(2, 16), iters=3, set_size=5, channels=2).eval()
        >>> program = to_program(decoder, torch.randn(2, 16))
        >>> elements, mask = program.module()(torch.randn(7, 16))
        >>> elements.shape, mask.shape
        (torch.Size([7, 5, 2]), torch.Size([7, 5]))
    """
    return _program(model, example)[0]


def to_onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | PathLike[str] | None = None,
    *,
    opset_version: int | None = None,
) -> torch.onnx.ONNXProgram:
    """Export a network for inference to ONNX, for every batch size.

    What is said of :func:`to_program` holds here too. Inputs are named as in the model's ``forward``; outputs by their
    place in what it returns: ``elements`` and ``mask`` for a :class:`setpred.SetPrediction`, ``output`` for a tensor,
    ``output_0``, ``output_1_mask``, ... inside of a tuple. One that is an input's name too is ``output_mask``, say.

    Args:
        model: A whole network or a decoder, in evaluation mode.
        example: Its input or inputs, with one batch size as first dimension.
        path: Where to write the model; None writes nothing.
        opset_version: Version of the ONNX operators; None is the exporter's choice.

    Returns:
        The program: it can be saved, called (by ONNX Runtime), and gives the model as ``model_proto``.

    Raises:
        ImportError: If the extra ``export`` is not installed.
        ValueError: If the model is in training mode, the batch sizes of ``example`` differ or are 0, or what the model
            computes depends on the batch size.
        TypeError: If an argument is of another type, or the model returns something else than tensors.

    Example:
        >>> from setpred import DSPNDecoder, PooledEncoder
        >>> decoder = DSPNDecoder(PooledEncoder(2, 16), iters=1, set_size=5, channels=2).eval()
        >>> program = to_onnx(decoder, torch.randn(2, 16))
        >>> [output.name for output in program.model.graph.outputs]
        ['elements', 'mask']
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("`to_onnx` needs the ONNX packages: pip install 'setpred[export]'") from error
    program, inputs, outputs = _program(model, example)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)  # the exporter's own
        converted = torch.onnx.export(
            program,
            input_names=inputs,
            output_names=outputs,
            opset_version=opset_version,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    assert converted is not None
    if path is not None:
        converted.save(path)
    return converted


def _stable_sort(x: Any, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Any:
    """Translate `aten.sort.stable`: of equal values, TopK puts the one of lower index first."""
    from onnxscript import opset18

    op: Any = opset18  # its stubs know no untyped tensors
    size = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _program(
    model: nn.Module, example: Tensor | tuple[Tensor, ...]
) -> tuple[torch.export.ExportedProgram, list[str], list[str]]:
    """The program, and the names of its inputs and outputs."""
    inputs = _checked(model, example)
    graph, outputs = _trace(model, inputs)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    program = torch.export.export(graph, inputs, dynamic_shapes=dynamic)
    names = []
    for parameter in inspect.signature(model.forward).parameters.values():
        several = parameter.kind is parameter.VAR_POSITIONAL
        names += [f"{parameter.name}_{i}" for i in range(len(inputs))] if several else [parameter.name]
    names = names[: len(inputs)]
    # No two values of an ONNX graph have one name.
    return program, names, [f"output_{name}" if name in names else name for name in outputs]


def _checked(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs as a tuple, of a batch of at least 2: torch takes 1 for a fixed size."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a module, got {model!r} ({type(model).__name__})")
    if any(module.training for module in model.modules()):
        raise ValueError("`model` must be in evaluation mode, got one in training mode: call `model.eval()`")
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"`example` must be a tensor or a tuple of tensors, got {example!r} ({type(example).__name__})")
    sizes = {x.shape[:1] for x in inputs}
    if len(sizes) != 1 or sizes <= {torch.Size([]), torch.Size([0])}:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ValueError(f"`example` must have one batch size, at least 1, as first dimension, got shape {shapes}")
    return tuple(x.detach().repeat(2, *[1] * (x.dim() - 1)) for x in inputs)


def _trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.fx.GraphModule, list[str]]:
    """The graph of the model's forward pass, inner gradients included, with a symbolic batch; the outputs' names."""
    state: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    outputs: list[str] = []

    def forward(*flat: Tensor) -> list[Tensor]:
        values = dict(zip(state, flat, strict=False))
        result = torch.func.functional_call(model, values, flat[len(state) :])
        leaves = pytree.tree_flatten_with_path(result)[0]
        for _, leaf in leaves:
            if leaf is not None and not isinstance(leaf, Tensor):
                raise TypeError(f"`model` must return tensors, or structures of them, got {leaf!r} in its result")
        tensors = [(path, leaf) for path, leaf in leaves if leaf is not None]
        outputs[:] = [_name(path) for path, _ in tensors]
        return [leaf for _, leaf in tensors]

    shapes = ShapeEnv()
    # Constants that are neither parameters nor buffers are real tensors.
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes)
    held = [fake.from_tensor(value, static_shapes=True) for value in state.values()]
    # DUCK: one symbol for the batch of all inputs.
    batches = [
        fake.from_tensor(
            x,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[DimDynamic.DUCK] + [DimDynamic.STATIC] * (x.dim() - 1),
                constraint_sizes=[None] * x.dim(),
            ),
        )
        for x in inputs
    ]
    batch: Any = batches[0].shape[0]
    symbol = batch.node.expr
    with torch.no_grad(), _compiling_state_context(), fake, _symbolic_len():
        traced = make_fx(forward, tracing_mode="symbolic")(*held, *batches)
    guards = [guard.expr for guard in shapes.guards]
    wrong = [guard for guard in guards if any(guard.subs(symbol, size) == False for size in range(1, 65))]  # noqa: E712
    fixed = is_concrete_int(batch)
    if fixed or wrong:
        found = f"B = {len(inputs[0])}" if fixed else ", ".join(str(g).replace(str(symbol), "B") for g in wrong)
        raise ValueError(
            "`model` must compute the same for every batch size B, but its code decides by it, as where a size is made "
            f"a Python number by int() or range(); the export would hold only for {found}"
        )
    # Parameters under their own names instead of as inputs.
    graph, attributes = traced.graph, dict(traced.named_buffers()) | state
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for name, node in zip(state, placeholders, strict=False):
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.create_node("get_attr", name))
        graph.erase_node(node)
    module = torch.fx.GraphModule(attributes, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, outputs


def _name(path: tuple[Any, ...]) -> str:
    """Name of an output: `elements` at the top, `output_1_elements` in a tuple."""
    keys = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return "_".join(keys if keys and not keys[0].isdigit() else ["output", *keys])


@contextmanager
def _symbolic_len() -> Iterator[None]:
    """Let `len(x)` be symbolic like `x.shape[0]`: Python makes a number of it, and much code is written so.

    For the same reason `torch.export` replaces the built-in `max` and `min` while it traces.
    """
    original = builtins.len

    def length(x: Any, /) -> Any:
        return x.shape[0] if isinstance(x, Tensor) and x.dim() > 0 else original(x)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = original
