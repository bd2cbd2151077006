"""Finding the feed-forward networks (FFNs) of a model by what they compute.

A module is a candidate if it holds linear layers ``[D] -> [F]`` (or fused ``[D] -> [2F]``) and ``[F] -> [D]`` close to
each other. Its own ``forward`` is run on stand-ins (:mod:`torch_prunepath.discover.stand_ins`): the first layers return
known numbers, and the input of the last one shows the activation, the gating and its order
(:mod:`torch_prunepath.discover.recognise`). Class names and tables of architectures are not used.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from torch_prunepath.config import FFNSpec
from torch_prunepath.discover.choose import Which, choose
from torch_prunepath.discover.choosers import blocks_above, deciding
from torch_prunepath.discover.linears import (
    LinearAt,
    comes_from_here,
    common_ancestor,
    fits,
    lies_in,
    problem_of,
    relative,
    sizes_of,
)
from torch_prunepath.discover.recognise import Trials
from torch_prunepath.discover.refusal import Refusal, summary
from torch_prunepath.discover.stand_ins import Trace, has_forward, inputs_of, trace
from torch_prunepath.discover.values import Refused
from torch_prunepath.layer.ffn import site_name

_NEARLY_ONE = 2
"""Rank of the refusals of what has the data flow of an FFN, but not its formula."""

_SPLIT_DEPTH = 2
"""Largest depth below a module of the two linear layers of an FFN that is split over its submodules, as BERT needs
(``layer.output.dense``)."""


@dataclass(frozen=True)
class Discovery:
    """The result of a search in a model, all in module order.

    Attributes:
        specs: the FFNs that can be made sparse and are wanted.
        refused: the modules whose weights have the sizes of an FFN and that are not taken; many are none.
        skipped: those of the refused that are FFNs, as far as can be told. The experts of one router are one entry.
        excluded: the FFNs that can be made sparse and are not wanted.
    """

    specs: tuple[FFNSpec, ...]
    refused: tuple[Refusal, ...]
    skipped: tuple[Refusal, ...] = ()
    excluded: tuple[FFNSpec, ...] = ()

    def report(self) -> list[dict[str, str]]:
        """Return the name and the reason of every FFN that is not made sparse, ready for JSON."""
        asked = [Refusal(site_name(spec), LEFT_OUT) for spec in self.excluded]
        return [{"name": refusal.name, "reason": refusal.reason} for refusal in (*self.skipped, *asked)]


LEFT_OUT = "left out as asked"
"""The reason of what ``include`` and ``exclude`` leave out."""


def find_ffns(model: nn.Module, include: Which | None = None, exclude: Which | None = None) -> list[FFNSpec]:
    """Find every FFN of ``model`` that can be made sparse, in module order.

    The model may be on any device (the meta device too), in any dtype, and in training mode or not. It is not changed.

    Args:
        model: the model.
        include: the FFNs that are wanted: a name or pattern such as ``"language_model"`` or ``"layers.*.mlp"``, a
            function of an :class:`FFNSpec`, or a list of these. A pattern is one or more whole parts of a dotted name,
            with ``*``, ``?`` and ``[...]``; it means the FFNs with these parts anywhere in their names
            (:data:`torch_prunepath.discover.Which`). None: all.
        exclude: which of these to leave out, likewise.

    Raises:
        ValueError: if there is none, with the modules that were refused, and why; if a pattern means no FFN, or none is
            left, with the names that there are.
        TypeError: if ``include`` or ``exclude`` is of another type.
    """
    found = discover(model, include, exclude)
    if not found.specs:
        raise nothing_found(model, found)
    return list(found.specs)


def nothing_found(model: nn.Module, found: Discovery) -> ValueError:
    """Make the error for a model without an FFN that can be made sparse."""
    return ValueError(
        f"no feed-forward network to make sparse was found in {type(model).__name__}. One computes "
        "down(act(gate(x)) * up(x)) or fc2(act(fc1(x))) with layers that are nn.Linear or Conv1D and not quantised. "
        "Looked at and refused:\n"
        + (summary(found.refused) or "  nothing: no two linear layers have the sizes [D] -> [F] and [F] -> [D]")
    )


def discover(model: nn.Module, include: Which | None = None, exclude: Which | None = None) -> Discovery:
    """Find FFNs as :func:`find_ffns` does, and what is not made sparse.

    Raises:
        ValueError: if a pattern means no FFN, or none is left where there are some.
        TypeError: if ``include`` or ``exclude`` is of another type.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        search = _Search(model)
        search.visit("", model)
        search.refuse_routed_experts()
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    specs = sorted(search.specs, key=lambda spec: order[".".join(filter(None, (spec.name, spec.up)))])
    refused = sorted(search.refused, key=lambda refusal: order[refusal.name])
    skipped = sorted(search.innermost_skipped(), key=lambda refusal: order[refusal.name])
    excluded: list[FFNSpec] = []
    if specs:
        specs, excluded = choose(specs, {r.name: r.reason for r in skipped}, include, exclude)
    return Discovery(tuple(specs), tuple(refused), tuple(skipped), tuple(excluded))


class _Search:
    """The search for FFNs in one model."""

    def __init__(self, model: nn.Module) -> None:
        self.specs: list[FFNSpec] = []
        self.refused: list[Refusal] = []
        self.skipped: list[Refusal] = []
        self._experts: dict[str, int] = {}  # their number, by the name of the module that holds them
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
        if experts := _stacked_experts(module):
            self._experts[name] = experts
            self._refuse(Refusal(name, "holds stacked 3-D weights, as routed experts do, not linear layers"), ffn=True)
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
            best = max(refusals, key=lambda refusal: refusal.rank)
            reason, ffn = best.reason, best.rank == _NEARLY_ONE or self._would_be_one(name, module, pairs, free, broken)
            if self._holds_gated(module, sound):
                reason, ffn = (
                    f"holds an FFN with a gate layer of its own, but forward is not just that FFN{does_more}",
                    True,
                )
            self._refuse(Refusal(name, reason), ffn=ffn)
        return left

    def _would_be_one(
        self,
        name: str,
        module: nn.Module,
        pairs: list[tuple[LinearAt, LinearAt]],
        free: list[LinearAt],
        broken: list[LinearAt],
    ) -> bool:
        """Whether a refused module computes an FFN but for its broken layers, or has nothing else to compute."""
        if isinstance(module, nn.TransformerEncoderLayer):
            return True
        with suppress(Refused):
            self._trials.whole(name, module, free)
            return True
        for up, down in pairs if broken else ():
            with suppress(Refused):
                self._trials.split(module, up, [down])
                return True
        required, optional = inputs_of(module)
        return (
            all(any(fits(u, d) for d in free) or any(fits(d, u) for d in free) for u in free)
            and len(free) in (2, 3)
            and len(required) == 1
            and not optional
        )

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
        """Refuse the experts of a router, among which the model chooses already, and the networks that choose."""
        lists = [(n, m) for n, m in self._model.named_modules() if isinstance(m, nn.ModuleList | nn.ModuleDict)]
        for container, module in lists:
            experts = [name for name in self._candidates() if name.rpartition(".")[0] == container]
            holds_others = any(lies_in(spec.name, container) for spec in self.specs) and not experts
            router = None if holds_others or len(module) < 2 else self._router_of(container, len(module))
            if router is not None:
                self._experts[container] = len(module)
                self._refuse_experts(container, experts, f"{len(module)} experts that {router} chooses from")
        for spec in deciding(self._model, self.specs, self._experts):
            self.specs.remove(spec)
            self._refuse(Refusal(spec.name, "decides which experts run: a router is not made sparse"), ffn=True)

    def _candidates(self) -> list[str]:
        return [spec.name for spec in self.specs if not spec.split] + [refusal.name for refusal in self.skipped]

    def _refuse_experts(self, container: str, names: list[str], what: str) -> None:
        why = "mixtures of experts are not converted"
        taken = [spec for spec in self.specs if not spec.split and spec.name in names]
        self.refused.extend(Refusal(spec.name, f"one of the {what}: {why}") for spec in taken)
        self.specs = [spec for spec in self.specs if spec not in taken]
        self.skipped = [refusal for refusal in self.skipped if refusal.name not in names]
        if names:
            self.skipped.append(Refusal(container, f"{what}: {why}"))

    def _refuse(self, refusal: Refusal, *, ffn: bool) -> None:
        self.refused.append(refusal)
        if ffn:
            self.skipped.append(refusal)

    def innermost_skipped(self) -> list[Refusal]:
        """Return the refused FFNs, without those of which a part or the whole is told apart from them."""
        whole = [spec.name for spec in self.specs if not spec.split]
        names = [refusal.name for refusal in self.skipped]
        return [
            refusal
            for refusal in self.skipped
            if not any(lies_in(refusal.name, name) for name in whole)
            and (
                refusal.name in self._experts
                or not any(lies_in(name, refusal.name) for name in names if name != refusal.name)
            )
        ]

    def _router_of(self, container: str, count: int) -> str | None:
        """Find the router of the experts: a layer beside them with an output for each, which does not run after them.

        Returns:
            The layer's name, or None if there is no such layer.
        """
        inside = set(self._model.get_submodule(container).modules())
        for name, _ in blocks_above(self._model, container):
            block = self._model.get_submodule(name)
            routers = {m: n for n, m in block.named_modules() if m not in inside and _chooses_among(count, m)}
            if not routers:
                continue
            watched = dict.fromkeys([*routers, *self._model.get_submodule(container).children()])
            record = Trace()
            # Choosing by value cannot be followed to its end; what counts is which call came first.
            with suppress(Refused):
                trace(block, watched, (2, 2, _reads(next(iter(routers)))), record=record)
            first = next(iter(record.calls), None)
            if first is None or first in routers:
                return next(iter(routers.values()))
        return None


def _chooses_among(count: int, module: nn.Module) -> bool:
    """Whether ``module`` could be the router of ``count`` experts: a linear layer, or a weight of its own."""
    sizes = sizes_of(module)
    if sizes is not None:
        return sizes[1] == count
    weight = None if isinstance(module, nn.Embedding) else module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[0] == count


def _reads(router: nn.Module) -> int:
    """Return the number of features that a router reads."""
    sizes = sizes_of(router)
    return sizes[0] if sizes is not None else router.weight.shape[1]  # type: ignore[union-attr, index, return-value]


def _stacked_experts(module: nn.Module) -> int:
    """Return E if two parameters ``[E, ...]`` have, expert by expert, the sizes of an FFN's weights, or else 0."""
    stacks = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1]
    sizes = [(up, down) for up in stacks for down in stacks if up is not down and up[0] == down[0]]
    return max(
        (
            up[0]
            for up, down in sizes
            for turn in (1, 2)
            if up[turn] == down[3 - turn] and up[3 - turn] in (down[turn], 2 * down[turn])
        ),
        default=0,
    )
