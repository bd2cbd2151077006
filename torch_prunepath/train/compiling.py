"""torch.compile for training: the blocks that hold the FFNs, losses on their routers included, and the model's loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_prunepath.discover import find_ffns
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.train.config import TrainConfig
from torch_prunepath.train.shard import is_sharded

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of ``torch.compile``; other names are backends."""
VARIANTS = 64
"""Of one block's code that are compiled in a process: torch's own 8 is passed by some runs that differ, and what comes
after that would run eager without a word."""
RECORDING_MODES: Mapping[str, str] = MappingProxyType(
    {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
)
"""Those that replay CUDA graphs, whose outputs the next replay writes over; and the same without."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that hold the FFNs, sparse or dense: for each FFN the outermost entry of a ``ModuleList``.

    An FFN that is in no list is a block of its own. Blocks that are alike share what is compiled.
    """
    sparse = [name for name, module in model.named_modules() if isinstance(module, RoutedExperts)]
    names = sparse or [spec.name for spec in find_ffns(model)]
    return list(dict.fromkeys(_block_of(model, name) for name in names))


def _block_of(model: nn.Module, name: str) -> nn.Module:
    module = model
    for part in name.split("."):
        inside_list = isinstance(module, nn.ModuleList)
        module = getattr(module, part)
        if inside_list:
            break
    return module


@contextlib.contextmanager
def compiled_blocks(model: nn.Module, how: str | bool = True) -> Iterator[None]:
    """Inside the context the model's :func:`blocks`, and a transformers model's loss function, run compiled.

    What :class:`torch_prunepath.train.RoutingTape` records of a block is computed inside of it.

    Args:
        model: sparse or dense.
        how: the mode (``"reduce-overhead"`` takes the host's part of a step away, on CUDA) or the backend of
            ``torch.compile``; True is its default, False compiles nothing.

    Raises:
        ValueError: if a block was compiled before, or ``how`` is not known.
        torch._dynamo.exc.FailOnRecompileLimitHit: inside the context, if a process has compiled a block's code in 64
            ways; ``torch.compiler.reset()`` makes room.
    """
    if not how:
        yield
        return
    options = _options(how)
    found = blocks(model)
    if any(block._compiled_call_impl is not None for block in found):
        raise ValueError("a block of the model is compiled already: train the model as it was before compile()")
    loss = model.__dict__.get("_loss_function")
    try:
        for block in found:
            block.compile(**options)
        if isinstance(model, PreTrainedModel):
            model.loss_function = torch.compile(model.loss_function, **options)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS, fail_on_recompile_limit_hit=True):
            yield
    finally:
        for block in found:
            block._compiled_call_impl = None
        model.__dict__.pop("_loss_function", None)
        if loss is not None:
            model.__dict__["_loss_function"] = loss


@contextlib.contextmanager
def compiled_with_teacher(model: nn.Module, teacher: nn.Module | None, how: str | bool) -> Iterator[None]:
    """:func:`compiled_blocks` of a model that is trained, and of its teacher.

    A teacher records no CUDA graphs: without a backward pass to wait for, one block's replay would write over what the
    block before it answered.
    """
    apart = RECORDING_MODES.get(how, how) if isinstance(how, str) else how
    with compiled_blocks(model, how), contextlib.ExitStack() as stack:
        if teacher is not None:
            stack.enter_context(compiled_blocks(teacher, apart))
        yield


def check_how(how: str | bool) -> None:
    """Refuse what is neither a mode nor a backend.

    Raises:
        ValueError: with the modes.
    """
    if isinstance(how, str) and how not in MODES and how not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(f"compile={how!r}: torch.compile knows no such mode: choose from {', '.join(MODES)}")


def _options(how: str | bool) -> dict[str, Any]:
    check_how(how)
    if how is True:
        return {}
    assert isinstance(how, str)
    return {"mode" if how in MODES else "backend": how}


@torch.no_grad()
def keep_gradients(model: nn.Module, how: str | bool) -> None:
    """Copy the gradients out of CUDA graphs' memory; to be called between the batches that a step adds up.

    Args:
        model: whose blocks were compiled.
        how: as given to :func:`compiled_blocks`; nothing is done unless CUDA graphs are recorded.
    """
    if how in RECORDING_MODES:
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.is_cuda:
                parameter.grad = parameter.grad.clone()


def check_compilable(model: nn.Module, config: TrainConfig, *, checkpointing: bool | None = False) -> None:
    """Refuse what :func:`compiled_blocks` cannot train.

    Args:
        model: to be trained.
        config: says how.
        checkpointing: whether gradient checkpointing will be switched on.

    Raises:
        ValueError: with a remedy.
    """
    if config.distill_ffn:
        raise ValueError("distill_ffn watches outputs with hooks, which compiled blocks do not call: do not compile")
    if is_sharded(model):
        raise ValueError("sharded models (FSDP2) are not compiled by this library: leave compile off")
    if checkpointing or any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "compiled blocks cannot be run again in the backward pass: call model.gradient_checkpointing_disable(), "
            "or do not compile"
        )
