"""Finding the feed-forward networks (FFNs) of a model by what they compute.

A module is a candidate if it holds linear layers ``[D] -> [F]`` (or fused ``[D] -> [2F]``) and ``[F] -> [D]`` close to
each other. Its own ``forward`` is run on stand-ins (:mod:`torch_prunepath.discover.stand_ins`): the first layers return
known numbers, and the input of the last one shows the activation, the gating and its order
(:mod:`torch_prunepath.discover.recognise`). Class names and tables of architectures are not used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from torch_prunepath.config import FFNSpec
from torch_prunepath.discover.linears import (
    LinearAt,
    comes_from_here,
    common_ancestor,
    fits,
    problem_of,
    relative,
    sizes_of,
)
from torch_prunepath.discover.recognise import Trials
from torch_prunepath.discover.stand_ins import Refused, Trace, has_forward, trace

_SPLIT_DEPTH = 2
"""Largest depth below a module of the two linear layers of an FFN that is split over its submodules, as BERT needs
(``layer.output.dense``)."""


@dataclass(frozen=True)
class Refusal:
    """A module whose weights have the sizes of an FFN, and the reason why it is not taken as one."""

    name: str
    reason: str


@dataclass(frozen=True)
class Discovery:
    """The result of a search in a model: its FFNs, and the modules that were refused, both in module order."""

    specs: tuple[FFNSpec, ...]
    refused: tuple[Refusal, ...]


def find_ffns(model: nn.Module) -> list[FFNSpec]:
    """Find every FFN of ``model`` that can be made sparse, in module order.

    The model may be on any device (the meta device too), in any dtype, and in training mode or not. It is not changed.

    Raises:
        ValueError: if there is none. The message lists the modules that were refused, and why.
    """
    found = discover(model)
    if found.specs:
        return list(found.specs)
    raise ValueError(
        f"no feed-forward network to make sparse was found in {type(model).__name__}. One computes "
        "down(act(gate(x)) * up(x)) or fc2(act(fc1(x))) with layers that are nn.Linear or Conv1D and not quantised. "
        "Looked at and refused:\n"
        + (summary(found.refused) or "  nothing: no two linear layers have the sizes [D] -> [F] and [F] -> [D]")
    )


def discover(model: nn.Module) -> Discovery:
    """Find every FFN of ``model`` that can be made sparse, as :func:`find_ffns` does, and the modules refused."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        search = _Search(model)
        search.visit("", model)
        search.refuse_routed_experts()
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    specs = sorted(search.specs, key=lambda spec: order[".".join(filter(None, (spec.name, spec.up)))])
    return Discovery(tuple(specs), tuple(sorted(search.refused, key=lambda refusal: order[refusal.name])))


def summary(refused: Sequence[Refusal]) -> str:
    """List the refusals, one line for each name and reason; indices of repeated layers become ``*``."""
    lines = Counter(f"{re.sub(r'[0-9]+(?![^.])', '*', r.name) or '(the model)'}: {r.reason}" for r in refused)
    return "\n".join(f"  {line}" + (f" ({count} times)" if count > 1 else "") for line, count in lines.items())


class _Search:
    """The search for FFNs in one model."""

    def __init__(self, model: nn.Module) -> None:
        self.specs: list[FFNSpec] = []
        self.refused: list[Refusal] = []
        self._model = model
        self._trials = Trials()
        self._problems: dict[nn.Module, str | None] = {}
        self._seen: set[nn.Module] = set()
        modules = list(model.modules())
        self._parents = Counter(child for module in modules for child in set(module.children()))
        self._holders = Counter(id(p) for module in modules for p in module._parameters.values() if p is not None)

    def visit(self, name: str, module: nn.Module) -> list[LinearAt]:
        """Look for FFNs in ``module``, innermost first; return its linear layers that belong to no FFN."""
        if module in self._seen:
            return []
        self._seen.add(module)
        if isinstance(module, torch.jit.ScriptModule):
            if next(module.parameters(), None) is not None:
                self.refused.append(Refusal(name, "is compiled by TorchScript"))
            return []
        sizes = sizes_of(module)
        if sizes is not None:
            self._problems[module] = self._problem_of(module)
            return [LinearAt(name, module, *sizes)]
        if comes_from_here(module):
            self.refused.append(Refusal(name, "is sparse already"))
            return []
        free = [
            layer
            for child_name, child in module.named_children()
            for layer in self.visit(f"{name}.{child_name}" if name else child_name, child)
        ]
        if _holds_stacked_experts(module):
            self.refused.append(Refusal(name, "holds stacked 3-D weights, as routed experts do, not linear layers"))
        return self._examine(name, module, free) if has_forward(module) else free

    def _problem_of(self, module: nn.Module) -> str | None:
        parameters = [id(p) for p in module.parameters(recurse=False)]
        if self._parents[module] > 1 or any(self._holders[p] > 1 for p in parameters):
            return "shares its weights with another module"
        return problem_of(module)

    def _examine(self, name: str, module: nn.Module, free: list[LinearAt]) -> list[LinearAt]:
        """Try ``module`` as an FFN, whole or split; return the layers that still belong to no FFN."""
        near = [layer for layer in free if relative(layer.name, name).count(".") < _SPLIT_DEPTH]
        pairs = [(u, d) for u in near for d in near if fits(u, d) and not self._nested(name, u, d)]
        may_be_whole = len(free) in (2, 3) and any(all(fits(u, d) for u in free if u is not d) for d in free)
        if not (pairs or may_be_whole):
            return free
        candidates = dict.fromkeys([*(layer for pair in pairs for layer in pair), *(free if may_be_whole else [])])
        broken = [layer for layer in candidates if self._problems[layer.module]]
        refusals = [Refused(f"{relative(b.name, name)} {self._problems[b.module]}", rank=3) for b in broken]
        if isinstance(module, nn.TransformerEncoderLayer):
            refusals.append(Refused("in inference, PyTorch's fast path does not call its linear layers", rank=3))
            broken = list(candidates)
        does_more = ""
        if may_be_whole and not broken:
            try:
                self.specs.append(self._trials.whole(name, module, free))
                return []
            except Refused as refusal:
                refusals.append(refusal)
                does_more = f": {refusal.reason}"
        sound = [(u, d) for u, d in pairs if u not in broken and d not in broken]
        left = self._split(name, module, sound, free, refusals)
        if len(left) == len(free):
            reason = max(refusals, key=lambda refusal: refusal.rank).reason
            if self._holds_gated(module, sound):
                reason = f"holds an FFN with a gate layer of its own, but forward is not just that FFN{does_more}"
            self.refused.append(Refusal(name, reason))
        return left

    def _nested(self, name: str, *layers: LinearAt) -> bool:
        """Whether all layers lie in one submodule that has its own ``forward``, where they were tried already."""
        inner = common_ancestor(*(layer.name for layer in layers))
        while inner != name:
            if has_forward(self._model.get_submodule(inner)):
                return True
            inner = inner.rpartition(".")[0]
        return False

    def _split(
        self,
        name: str,
        module: nn.Module,
        pairs: list[tuple[LinearAt, LinearAt]],
        free: list[LinearAt],
        refusals: list[Refused],
    ) -> list[LinearAt]:
        """Take every split FFN among ``pairs``, and add to ``refusals`` why others are not taken.

        Returns:
            The layers that still belong to no FFN.
        """
        for up in dict.fromkeys(up for up, _ in pairs):
            downs = [down for u, down in pairs if u is up and down in free]
            if up not in free or not downs:
                continue
            try:
                spec = self._trials.split(module, up, downs)
            except Refused as refusal:
                refusals.append(Refused(f"{relative(up.name, name)}: {refusal.reason}", refusal.rank))
                continue
            self.specs.append(spec)
            taken = {".".join(filter(None, (spec.name, part))) for part in (spec.up, spec.down)}
            free = [layer for layer in free if layer.name not in taken]
        return free

    def _holds_gated(self, module: nn.Module, pairs: list[tuple[LinearAt, LinearAt]]) -> bool:
        """Whether two layers are gate and up of an FFN inside ``module.forward``; such an FFN cannot be split."""
        ups = dict.fromkeys(up for up, down in pairs if up.out_size == down.in_size)
        for two in combinations(ups, 2):
            downs = [down for up, down in pairs if up is two[0] and (two[1], down) in pairs and down not in two]
            if downs and self._trials.is_gated(module, two, downs):
                return True
        return False

    def refuse_routed_experts(self) -> None:
        """Refuse the FFNs that are experts of a router: the model chooses among them already."""
        siblings = defaultdict(list)
        for spec in self.specs:
            if not spec.split:
                siblings[spec.name.rpartition(".")[0]].append(spec)
        for container, experts in siblings.items():
            is_container = isinstance(self._model.get_submodule(container), nn.ModuleList | nn.ModuleDict)
            router = self._router_of(container, experts) if is_container and len(experts) > 1 else None
            if router is None:
                continue
            reason = (
                f"one of the {len(experts)} experts that {router} chooses from: mixtures of experts are not converted"
            )
            self.refused.extend(Refusal(spec.name, reason) for spec in experts)
        refused = {refusal.name for refusal in self.refused}
        self.specs = [spec for spec in self.specs if spec.split or spec.name not in refused]

    def _router_of(self, container: str, experts: list[FFNSpec]) -> str | None:
        """Find the router of the experts: a layer beside them with an output for each, which does not run after them.

        Returns:
            The layer's name, or None if there is no such layer.
        """
        above = container.rpartition(".")[0]
        block = self._model.get_submodule(above)
        inside = set(self._model.get_submodule(container).modules())
        routers = {m: n for n, m in block.named_modules() if m not in inside and _chooses_among(len(experts), m)}
        if not routers:
            return None
        watched = dict.fromkeys([*routers, *(self._model.get_submodule(spec.name) for spec in experts)])
        record = Trace()
        # Choosing by value cannot be followed to its end; what counts is which call came first.
        with suppress(Refused):
            trace(block, watched, (2, 2, experts[0].hidden_size), record=record)
        first = next(iter(record.calls), None)
        return None if first is not None and first not in routers else next(iter(routers.values()))


def _chooses_among(count: int, module: nn.Module) -> bool:
    """Whether ``module`` could be the router of ``count`` experts: a linear layer, or a weight of its own."""
    sizes = sizes_of(module)
    if sizes is not None:
        return sizes[1] == count
    weight = None if isinstance(module, nn.Embedding) else module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[0] == count


def _holds_stacked_experts(module: nn.Module) -> bool:
    """Whether two parameters ``[E, ...]`` have, expert by expert, the sizes of an FFN's weights."""
    stacks = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
    sizes = [(up, down) for up in stacks for down in stacks if up is not down and up[0] == down[0]]
    return any(
        up[turn] == down[3 - turn] and up[3 - turn] in (down[turn], 2 * down[turn])
        for up, down in sizes
        for turn in (1, 2)
    )
