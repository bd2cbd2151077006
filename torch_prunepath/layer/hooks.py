"""Watching a model that may be compiled: hooks that it does not take for new ones each time that they are put on.

torch numbers hooks through a whole process, and ``torch.compile`` guards on the numbers: what puts hooks on and takes
them off again would have the model compiled anew each time, until torch gives up and runs it eagerly for good. Hooks of
this module have the same numbers each time. They are negative, where torch's are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class StandIn(nn.Module):
    """A module that is never called; hooks that are put on it go to the modules that are called in its place."""

    def called_first(self) -> nn.Module:
        """The module whose input is what this one's would be."""
        raise NotImplementedError

    def called_last(self) -> nn.Module:
        """The module whose output is what this one's would be."""
        raise NotImplementedError

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Hook into :meth:`called_first`."""
        return self.called_first().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """Hook into :meth:`called_last`."""
        return self.called_last().register_forward_hook(*args, **kwargs)


def before_call(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(module, args, kwargs)`` before each call of a module, as ``register_forward_pre_hook`` does."""
    module = module.called_first() if isinstance(module, StandIn) else module
    return _put(hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)


def after_call(module: nn.Module, hook: Callable[..., Any]) -> RemovableHandle:
    """Call ``hook(module, args, output)`` after each call of a module, also after one that raised an error."""
    module = module.called_last() if isinstance(module, StandIn) else module
    return _put(hook, module._forward_hooks, module._forward_hooks_always_called)


def _put(
    hook: Callable[..., Any], hooks: MutableMapping[int, Callable[..., Any]], marks: MutableMapping[int, bool]
) -> RemovableHandle:
    handle = RemovableHandle(hooks, extra_dict=marks)
    handle.id = min([0, *hooks]) - 1
    hooks[handle.id] = hook
    marks[handle.id] = True
    return handle


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled models as they were written while the context is open, in all threads.

    For calls whose hooks are no part of what the model computes: a graph of them would serve nothing.
    """
    with torch.compiler.set_stance("force_eager"):
        yield
