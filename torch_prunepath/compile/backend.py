"""The ``torch.compile`` backend: Inductor, with the passes of :mod:`torch_prunepath.compile.passes` before it.

torch finds it by name, through the entry point in pyproject.toml.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from torch_prunepath import activations, select, weights
from torch_prunepath.compile import decoding, graph, inline, passes
from torch_prunepath.compile.passes import PASSES, run_passes
from torch_prunepath.ops import experts, linears, operators, sparse_ffn

DISABLE = "prunepath.disable"
"""The option that names the passes to leave out."""

HOOK = "post_grad_custom_pre_pass"
"""The place in Inductor's configuration where our passes run: on graphs of aten operators, before it fuses them."""

_MODULES = (activations, select, weights, experts, sparse_ffn, operators, decoding, graph, inline, linears, passes)

SOURCES = tuple(str(Path(str(module.__file__))) for module in _MODULES)
"""Files that a compiled graph depends on beside its own operators: the passes, and what they inline."""

# Passes that are told whether a graph is for inference: newer torch only.
_InferenceAware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)


def prunepath(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph as Inductor does, its sparse FFNs first rewritten; see ``torch.compile(backend="prunepath")``.

    Args:
        gm: the graph that torch.compile captured.
        example_inputs: its inputs.
        mode: as in ``torch.compile`` for Inductor: ``"default"``, ``"reduce-overhead"``, ``"max-autotune"`` or
            ``"max-autotune-no-cudagraphs"``.
        options: Inductor's options; and ``"prunepath.disable"``, a list of names of passes to leave out.

    Returns:
        the compiled function.

    Raises:
        ValueError: if a pass to leave out does not exist.
        RuntimeError: if Inductor does not know the mode or an option.
    """
    names, options = _enabled_passes(dict(options or {}))
    # The object that stands behind backend="inductor": it knows what modes and options mean.
    inductor = torch._TorchCompileInductorWrapper(mode, options, None)
    if _holds_sparse_ffn(gm):
        rewrite = Rewrite(names, _is_training(gm, example_inputs), inductor.config.get(HOOK, _configured()))
        inductor.config[HOOK] = rewrite
    else:
        _say_once_that_nothing_is_sparse()
    return inductor(gm, example_inputs)  # type: ignore[no-any-return, no-untyped-call]


def _reset() -> None:
    """What ``torch._dynamo.reset()`` does for Inductor: let go of its CUDA graphs, if there are any."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


prunepath.reset = _reset  # type: ignore[attr-defined]


class Rewrite(_InferenceAware):  # type: ignore[misc, valid-type]
    """Inductor's hook: runs the passes that the user gave Inductor for the same place, then ours.

    Args:
        names: which passes of ``PASSES`` to run.
        training: whether gradients will be taken through the graph.
        first: what the hook held before: None, a pass, or a sequence of passes.
    """

    def __init__(self, names: tuple[str, ...], training: bool, first: Any) -> None:
        self.names, self.training = names, training
        self.first = tuple(first) if isinstance(first, (list, tuple)) else () if first is None else (first,)

    def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
        """Edit ``graph`` in place."""
        for user_pass in self.first:
            if _InferenceAware is not CustomGraphPass and isinstance(user_pass, _InferenceAware):
                user_pass(graph, is_inference)  # type: ignore[call-arg]
            else:
                user_pass(graph)
        run_passes(graph, self.names, self.training)

    def uuid(self) -> Any | None:
        """Part of the key of Inductor's caches; None, which bypasses them, if a pass of the user has no such thing."""
        first = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.first]
        if None in first:
            return None
        return get_hash_for_files(SOURCES, extra=repr((self.names, self.training, first)))


def _enabled_passes(options: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the passes to run, and the options that are Inductor's."""
    disabled = options.pop(DISABLE, ())
    if isinstance(disabled, str):
        disabled = (disabled,)
    unknown = sorted(set(disabled) - set(PASSES))
    if unknown:
        raise ValueError(f"{DISABLE} names {', '.join(map(repr, unknown))}; the passes are {', '.join(PASSES)}")
    return tuple(name for name in PASSES if name not in disabled), options


def _configured() -> Any:
    return getattr(inductor_config, HOOK)


def _holds_sparse_ffn(gm: fx.GraphModule) -> bool:
    """Whether the graph, or one nested in it (activation checkpointing), calls one of our operators."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "prunepath"
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    )


def _is_training(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Whether torch.compile will build a backward graph."""
    tensors = [*(t for t in example_inputs if isinstance(t, Tensor)), *gm.parameters()]
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@functools.cache
def _say_once_that_nothing_is_sparse() -> None:
    # Python's own "once a location" starts anew after each warnings.catch_warnings, which torch uses while compiling.
    warnings.warn(
        'backend="prunepath": a graph without sparse FFNs is compiled as with backend="inductor". If the whole model '
        "should have had some, call torch_prunepath.sparsify(model) or load a sparse checkpoint before compiling it.",
        stacklevel=2,
    )
