"""Running data through a model while the inputs of its FFNs are watched.

Shapes: N tokens in all, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torch_prunepath.inputs.data import Inputs, evaluating
from torch_prunepath.inputs.front import front_of, quiet
from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.inputs.rows import small_part
from torch_prunepath.layer.ffn import FFNView


class _LastFFNSeen(Exception):
    """An exception that ends a forward pass when the last FFN has been seen."""


def visit_inputs(
    model: nn.Module, views: Sequence[FFNView], inputs: Inputs, visit: Callable[[FFNView, Tensor], None]
) -> None:
    """Run ``inputs`` through a dense model, and call ``visit(view, x_ND)`` with the input of each FFN as it runs.

    Only one FFN's input is in memory at a time, and nothing after the last FFN is computed. Padding is left out, and so
    are the tokens in front of a text (``front_tokens`` of the inputs). An FFN that is called several times in one pass
    (shared layers) is visited once, with an even share of each call's tokens.

    Raises:
        ValueError: if these inputs do not run some FFN.
    """
    calls = check_reached(model, views, inputs)
    kept: dict[str, list[Tensor]] = {view.site: [] for view in views}
    remaining = sum(calls.values())

    def watch(view: FFNView, tracker: PaddingTracker) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal remaining
            x = args[0]
            x_ND, keep = x.reshape(-1, x.shape[-1]), tracker.keep(x.shape[:-1])
            x_ND = x_ND if keep is None else x_ND[keep]
            parts = kept[view.site]
            parts.append(x_ND[len(parts) :: calls[view.site]])
            remaining -= 1
            if len(parts) == calls[view.site]:
                visit(view, torch.cat(parts))
                parts.clear()
            if remaining == 0:
                raise _LastFFNSeen

        return hook

    with evaluating(model), PaddingTracker(model, front_of([inputs])) as tracker, contextlib.ExitStack() as stack:
        for view in views:
            stack.enter_context(removing(view.up.register_forward_pre_hook(watch(view, tracker))))
        with contextlib.suppress(_LastFFNSeen):
            model(**quiet(model, inputs))


def check_reached(model: nn.Module, views: Sequence[FFNView], inputs: Inputs) -> dict[str, int]:
    """Count how often one forward pass calls each FFN, by ``view.site``.

    Raises:
        ValueError: if these inputs do not run some FFN.
    """
    calls = _count_calls(model, views, inputs)
    missed = [view.site for view in views if not calls[view.site]]
    if missed:
        raise ValueError(
            f"calibration data does not reach {len(missed)} of {len(views)} FFNs (the first: {missed[0]}): pass inputs "
            f"that run the whole model (images too, for an FFN that reads images), leave such FFNs dense "
            f"(exclude={missed[0]!r}), or take a config with budget='uniform', partition='kmeans', router='centroid', "
            "which needs no data"
        )
    return calls


def _count_calls(model: nn.Module, views: Sequence[FFNView], inputs: Inputs) -> dict[str, int]:
    """Count how often one forward pass calls each FFN, with a pass over a small part of the inputs if that runs.

    It does not where rows belong together, such as the rows of several codes a token: then all of them are run.
    """
    calls = {view.site: 0 for view in views}

    def count(view: FFNView) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls[view.site] += 1

        return hook

    with evaluating(model), contextlib.ExitStack() as stack:
        for view in views:
            stack.enter_context(removing(view.up.register_forward_pre_hook(count(view))))
        try:
            model(**quiet(model, small_part(inputs)))
        except Exception:
            calls.update(dict.fromkeys(calls, 0))
            model(**quiet(model, inputs))
    return calls


@contextlib.contextmanager
def removing(handle: Any) -> Iterator[None]:
    """Remove a hook's handle at the end of the context."""
    try:
        yield
    finally:
        handle.remove()
