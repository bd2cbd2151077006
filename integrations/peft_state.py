"""What becomes of an adapter's tensors: checked when they are read, made into a sparse model when they are merged.

Shapes: D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from torch_prunepath.config import SparsifyConfig
from torch_prunepath.integrations.peft_build import layers_of
from torch_prunepath.integrations.peft_layer import AdapterState, PrunePathLayer
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.router import Router
from torch_prunepath.layer.swap import Swap, make_all_routed

Shape = tuple[int, ...]
_OURS = re.compile(r"\.prunepath(_\w+)?\.[a-z.]+$")


def shapes_of(state: nn.Module) -> dict[str, Shape]:
    """Shapes of the tensors that an adapter saves for one FFN, by name."""
    return {name: tuple(tensor.shape) for name, tensor in state.state_dict().items()}


def problem_of(state_dict: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> str | None:
    """What is wrong with a saved adapter's tensors, if they must have these names and shapes; None if nothing is.

    Tensors that lie elsewhere than in PrunePath layers are not looked at.
    """
    ours = {key: value for key, value in state_dict.items() if _OURS.search(key)}
    for key in sorted(shapes.keys() ^ ours.keys()):
        return f"the adapter's file {'lacks' if key in shapes else 'has an unknown'} {key}"
    for key, value in ours.items():
        if tuple(value.shape) != shapes[key]:
            return (
                f"{key} has shape {tuple(value.shape)} in the adapter's file, but its configuration says {shapes[key]}"
            )
        if key.endswith(".permutation") and not _is_permutation(value):
            return f"{key} is no permutation"
    return None


def _is_permutation(order_F: Tensor) -> bool:
    return torch.equal(order_F.long().sort().values, torch.arange(len(order_F), device=order_F.device))


def drop_empty(model: nn.Module, adapter_name: str) -> bool:
    """Take back an adapter that no weights have reached, and leave the base model as it was; returns whether it did."""
    dropped = False
    for layer in layers_of(model).values():
        if not layer.adapters[adapter_name].filled:
            del layer.adapters[adapter_name]
            dropped = True
        if not layer.adapters:
            layer.remove()
    return dropped


def states_to_merge(layers: Sequence[PrunePathLayer], names: Sequence[str]) -> list[AdapterState]:
    """What the one adapter among ``names`` holds for each layer.

    Raises:
        ValueError: if there is not exactly one, or it cannot be merged.
    """
    if len(names) != 1:
        raise ValueError(f"one PrunePath adapter can be merged, not {len(names)}: pass adapter_names=[name]")
    if not layers or any(names[0] not in layer.adapters for layer in layers):
        raise ValueError(f"there is no PrunePath adapter called {names[0]!r}: see model.peft_config")
    for layer in layers:
        for part in filter(None, ("up", layer.spec.gate and "gate", "down")):
            if isinstance(layer.module_of(part), BaseTunerLayer):
                raise ValueError(
                    f"{layer.spec.name}.{getattr(layer.spec, part)} is under another adapter: call merge_and_unload() "
                    "or unload() of that one first"
                )
    states: list[AdapterState] = [layer.adapters[names[0]] for layer in layers]
    if not all(state.filled for state in states):
        raise ValueError(f"the adapter {names[0]!r} has no weights: load them before merging")
    return states


@torch.no_grad()
def make_sparse(
    root: nn.Module, layers: Sequence[PrunePathLayer], states: Sequence[AdapterState], config: SparsifyConfig
) -> None:
    """Make the base model what :func:`torch_prunepath.sparsify` makes, in place, with the adapter's routers.

    Routers take the dtype of the base model, in which its checkpoint will keep them. Undoes everything if it cannot
    finish.
    """
    swaps = []
    for layer, state in zip(layers, states, strict=True):
        view = FFNView(root, layer.spec)
        router = _copied(state.router, view.down_FD.dtype)
        order_F = state.permutation.clone()
        swaps.append(Swap(view, state.experts, router, order_F, float(state.tau), state.budget, config))
    make_all_routed(swaps)


def _copied(router: Router, dtype: torch.dtype) -> Router:
    bias_E = None if router.bias is None else router.bias.detach().to(dtype, copy=True)
    return Router.of(router.weight.detach().to(dtype, copy=True), bias_E, router_norm=router.router_norm)
