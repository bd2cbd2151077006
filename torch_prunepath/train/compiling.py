"""torch.compile for training.

What is compiled are the blocks that hold the FFNs, with the losses on their routers, and the model's loss function.
"""

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
"""Modes of ``torch.compile``; any other name is taken as the name of a backend."""
VARIANTS = 64
"""Largest number of times that one block's code may be compiled in a process. torch's default of 8 is too small for a
few different runs in one process, and after it torch runs the block eagerly without an error. 64 is a guess."""
RECORDING_MODES: Mapping[str, str] = MappingProxyType(
    {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
)
"""For each mode that replays CUDA graphs, the same mode without them. A replay overwrites the outputs of the one
before it."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks that hold the FFNs, sparse or dense.

    The block of an FFN is the outermost entry of a ``ModuleList`` that holds it, or the FFN itself if it is in no list.
    Blocks that are alike share compiled code.
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
    """Run the model's :func:`blocks`, and a transformers model's loss function, compiled while the context is open.

    What :class:`torch_prunepath.train.RoutingTape` records of a block is computed in the compiled block.

    Args:
        model: a sparse or dense model.
        how: the mode or the backend of ``torch.compile``. True is torch's default; False compiles nothing. On CUDA,
            ``"reduce-overhead"`` removes the host's work in a step.

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
    """Open :func:`compiled_blocks` for a model that is trained and for its teacher.

    A teacher records no CUDA graphs: as no backward pass waits for its outputs, the replay of one block would overwrite
    the output of the block before it.
    """
    apart = RECORDING_MODES.get(how, how) if isinstance(how, str) else how
    with compiled_blocks(model, how), contextlib.ExitStack() as stack:
        if teacher is not None:
            stack.enter_context(compiled_blocks(teacher, apart))
        yield


def check_how(how: str | bool) -> None:
    """Refuse a name that is neither a mode nor a backend of ``torch.compile``.

    Raises:
        ValueError: if ``how`` is such a name.
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
    """Copy the gradients out of the memory of CUDA graphs. Call it between the batches that a step adds up.

    Args:
        model: the model with the compiled blocks.
        how: the value given to :func:`compiled_blocks`; unless its mode records CUDA graphs, nothing is done.
    """
    if how in RECORDING_MODES:
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.is_cuda:
                parameter.grad = parameter.grad.clone()


def check_compilable(model: nn.Module, config: TrainConfig, *, checkpointing: bool | None = False) -> None:
    """Refuse a run that :func:`compiled_blocks` cannot train.

    Args:
        model: the model to be trained.
        config: how it is to be trained.
        checkpointing: whether gradient checkpointing will be switched on.

    Raises:
        ValueError: if ``distill_ffn`` has a weight, the model is sharded, or gradient checkpointing is on.
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
