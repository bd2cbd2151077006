"""Telling the networks that decide which experts run from the networks whose output is used.

In a mixture of experts a router may be a network of several layers, and look like a feed-forward network (FFN). What it
computes is followed through the module that holds the experts: it decides if experts are chosen by it, and do not read
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from torch import nn

from torch_prunepath.config import FFNSpec
from torch_prunepath.discover.linears import lies_in, relative, sizes_of
from torch_prunepath.discover.stand_ins import Trace, has_forward, trace
from torch_prunepath.discover.values import Followed, Refused


def deciding(model: nn.Module, specs: Sequence[FFNSpec], holders: dict[str, int]) -> list[FFNSpec]:
    """Return the FFNs that decide which experts run.

    Args:
        model: the model.
        specs: FFNs that were found in it.
        holders: number of experts by the name of the module that holds them: a list of modules, or stacked weights.
    """
    found: list[FFNSpec] = []
    for holder, count in holders.items():
        for block, direct in blocks_above(model, holder):
            near = [spec for spec in specs if lies_in(spec.name, block) and not _is_expert(model, spec, holder)]
            found += [
                spec for spec in near if spec not in found and _decides(model, spec, block, holder, count, direct)
            ]
            if near:
                break
    return found


def blocks_above(model: nn.Module, holder: str) -> Iterator[tuple[str, bool]]:
    """Yield the modules with a ``forward`` around experts, up to the repeated block, and whether each is the first."""
    direct, name = True, holder
    if has_forward(model.get_submodule(holder)) and _stacks(model.get_submodule(holder)):
        yield holder, True  # a block with stacked weights of its own, and perhaps with a router inside
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if has_forward(module):
            yield name, direct
            direct = False
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList | nn.ModuleDict):
            return


def _stacks(module: nn.Module) -> bool:
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _is_expert(model: nn.Module, spec: FFNSpec, holder: str) -> bool:
    return lies_in(spec.name, holder) and not _stacks(model.get_submodule(holder))


def _decides(model: nn.Module, spec: FFNSpec, block: str, holder: str, count: int, direct: bool) -> bool:
    owner, module = model.get_submodule(block), model.get_submodule(holder)
    source = model.get_submodule(".".join(filter(None, (spec.name, spec.down))) if spec.split else spec.name)
    if source is owner:
        return False
    experts = [module] if has_forward(module) and module is not owner else list(module.children())
    experts = [] if module is owner else experts
    routers = _routers(owner, module, spec, model, count)
    record, whole = Trace(), False
    with suppress(Refused):
        trace(owner, dict.fromkeys([*routers, *experts]), (2, 2, spec.hidden_size), follow=source, record=record)
        whole = True
    fed = any(isinstance(x, Followed) for router in routers for x in record.calls.get(router, ()))
    read = [x for expert in experts for x in record.calls.get(expert, ())]
    if record.choices or fed:
        return (
            not any(isinstance(x, Followed) for x in read) if read else direct or _beside_router(spec, block, routers)
        )
    return not whole and _beside_router(spec, block, routers)


def _routers(owner: nn.Module, holder: nn.Module, spec: FFNSpec, model: nn.Module, count: int) -> dict[nn.Module, str]:
    """Return the layers of ``owner`` with an output for each expert, or for one more that computes nothing, by name."""
    inside = set(holder.modules()) if holder is not owner else set()
    own = {model.get_submodule(".".join(filter(None, (spec.name, p)))) for p in (spec.up, spec.down, spec.gate) if p}
    found = {}
    for name, module in owner.named_modules():
        sizes = sizes_of(module)
        if sizes is not None and sizes[1] in (count, count + 1) and module not in inside | own:
            found[module] = name
    return found


def _beside_router(spec: FFNSpec, block: str, routers: dict[nn.Module, str]) -> bool:
    """Whether the FFN and a router's last layer lie in one submodule of the block."""
    inner = relative(spec.name, block).partition(".")[0]
    return bool(inner) and spec.name != block and any(name.startswith(f"{inner}.") for name in routers.values())
