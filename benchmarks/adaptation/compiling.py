"""torch.compile for training: every module outside the FFNs, whose routing is watched with hooks and stays eager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_prunepath.discover import find_ffns
from torch_prunepath.ffn import FFNView
from torch_prunepath.layer import RoutedExperts, Swapped


def outside_ffns(model: nn.Module) -> list[nn.Module]:
    """The largest modules with parameters that hold no FFN, dense or sparse, nor a part of one."""
    inside = {module for module in model.modules() if isinstance(module, Swapped)}
    if not any(isinstance(module, RoutedExperts) for module in inside):
        views = [FFNView(model, spec) for spec in find_ffns(model)]
        inside |= {part for view in views for part in (view.up, view.gate, view.down) if part is not None}
        inside |= {view.owner for view in views if not view.spec.split}
    return list(_largest(model, inside))


def _largest(module: nn.Module, inside: set[nn.Module]) -> Iterator[nn.Module]:
    for child in module.children():
        if child in inside or isinstance(child, nn.Embedding):
            continue
        if inside & set(child.modules()) or isinstance(child, nn.ModuleList):
            yield from _largest(child, inside)
        elif any(True for _ in child.parameters()):
            yield child


@contextlib.contextmanager
def compiled(model: nn.Module, *, whole: bool = False, backend: str = "inductor") -> Iterator[None]:
    """Inside the context the model's modules outside the FFNs, and its loss, run compiled; with ``whole``, all as one.

    Afterwards everything compiled is forgotten, that of other models too: entries of models that are gone count towards
    the number of recompilations after which torch gives up.
    """
    modules = [model] if whole else outside_ffns(model)
    kept = model.__dict__.get("_loss_function")
    try:
        for module in modules:
            module.forward = torch.compile(module.forward, backend=backend)  # type: ignore[method-assign]
        if not whole and isinstance(model, PreTrainedModel):
            model.loss_function = torch.compile(model.loss_function, backend=backend)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)
        model.__dict__.pop("_loss_function", None)
        if kept is not None:
            model.__dict__["_loss_function"] = kept
        torch._dynamo.reset()
