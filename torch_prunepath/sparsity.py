"""Choosing and measuring how sparse a sparse model is: tau, target sparsity, recording, routing hooks.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_prunepath.config import check_sparsity, check_tau
from torch_prunepath.inputs.data import evaluating, iterate_inputs
from torch_prunepath.inputs.front import for_model, front_of
from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.saving import refresh
from torch_prunepath.layer.sparse import Neurons, RoutingHook, recording
from torch_prunepath.layer.views import one_a_layer, recording_neurons, sparse_layers, sparse_views
from torch_prunepath.ops.transforms import is_transformed
from torch_prunepath.progress import progress_bar
from torch_prunepath.search import OutOfReach, find_tau
from torch_prunepath.shares import Reads, Shares, ShareTally, counted_neurons, overall

MIN_TAU = 1e-30
"""Smallest tau of a layer that stays positive in float32; at this mass only the top expert is active."""


def layer_tau(tau: float, budget: float) -> float:
    """Tau of one layer: it gives up ``(1 - tau) ** budget`` of its mass. 1 stays 1, and all layers reach 0 together."""
    return max(MIN_TAU, -math.expm1(budget * math.log1p(-tau))) if tau < 1.0 else 1.0


def set_tau(model: nn.Module, tau: float | Sequence[float] | Mapping[str, float]) -> None:
    """Set how much router mass every layer keeps, in place; compiled code goes on with the new value.

    Args:
        model: a sparse model.
        tau: one number in (0, 1] for the model, scaled for each layer by its budget; or one number a layer, as a
            sequence in module order or a mapping from layer name, taken as they are.

    Raises:
        ValueError: if a value is outside (0, 1], a sequence's length is wrong or a name is unknown. No layer is
            changed.
        TypeError: if tau, or one of several, is no number.
    """
    layers = sparse_layers(model)
    values = one_a_layer(layers, tau, check_tau, "tau")
    if values is None:
        tau = check_tau(tau)  # type: ignore[arg-type]
        values = {name: layer_tau(tau, layer.budget) for name, layer in layers.items()}
    with torch.no_grad():
        for name, value in values.items():
            layers[name].tau.fill_(value)
    refresh(model)


def register_routing_hook(model: nn.Module, fn: RoutingHook) -> Handles:
    """Observe or replace what every layer's router selects.

    ``fn(routing)`` gets a :class:`torch_prunepath.Routing` (layer name, input, scores, mask) after each selection.
    What it returns, if not None, is used as the mask instead: bool ``[T, E]``.

    Returns:
        A handle; ``handle.remove()`` ends it, and so does leaving it as a context manager.

    Raises:
        ValueError: if the model holds no sparse FFN.
    """
    return Handles([layer.register_routing_hook(fn) for layer in sparse_layers(model).values()])


class Handles:
    """Several hook handles as one."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove all the hooks."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Handles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class Noted(NamedTuple):
    """What one layer chose in one call, kept until it can be counted.

    Attributes:
        name: the name that the layer is counted under.
        neurons: how many neurons the layer has.
        inactive_T: int64, how many of them were inactive for each token.
        reads: what was read, if that is counted as well.
    """

    name: str
    neurons: int
    inactive_T: Tensor
    reads: Reads | None = None

    @classmethod
    def of(cls, name: str, layer: RoutedExperts, mask_TE: Tensor, x_TD: Tensor | None = None) -> Noted:
        """The note of one call whose active experts are ``mask_TE``; with its input, what was read is noted as well.

        Does not synchronise with the device.
        """
        inactive_T = layer.inactive_neurons(mask_TE)
        reads = None if x_TD is None else Reads.of(layer, x_TD, mask_TE, inactive_T)
        return cls(name, layer.ffn.ffn_size, inactive_T, reads)

    def with_counted(self, counted_T: Tensor) -> Noted:
        """The same, its neurons that count known: int64 ``[T]``."""
        assert self.reads is not None
        return self._replace(reads=self.reads._replace(counted_T=counted_T))


class Tally:
    """Inactive neurons of one layer, added up where the layer is; torch.compile traces it once for all that are alike.

    Attributes:
        neurons: how many neurons the layer has.
        inactive: 0-d int64, inactive neurons of all tokens that were counted.
        tokens: 0-d int64, how many those were.
        used: whether the layer was called at all.
    """

    @torch.inference_mode(mode=False)
    def __init__(self, neurons: int, device: torch.device) -> None:
        # Added up in place, in ordinary tensors: calls may be under inference_mode or not, and replay CUDA graphs.
        self.inactive, self.tokens = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.neurons, self.used = neurons, False

    @torch.no_grad()
    def add(self, inactive_T: Tensor, keep_T: Tensor | None) -> None:
        """Count tokens, of which ``inactive_T`` neurons each are inactive: where ``keep_T`` is true, or all of them."""
        real_T = torch.ones_like(inactive_T) if keep_T is None else keep_T.to(inactive_T)
        self.used = True
        self.inactive.add_((inactive_T * real_T).sum().to(self.inactive.device))
        self.tokens.add_(real_T.sum().to(self.tokens.device))


class SparsityRecord:
    """Inactive neurons of each layer, counted call by call: at once, or as soon as it is known which tokens are real.

    Reading it synchronises with the device once; counting never does.
    """

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._shares: dict[str, ShareTally] = {}

    def tally(self, name: str, neurons: int, device: torch.device) -> Tally:
        """The tally of the layer that is counted under ``name``; a new one on ``device`` if there is none yet."""
        found = self._tallies.get(name)
        if found is None:
            found = self._tallies[name] = Tally(neurons, device)
        return found

    def share_tally(self, name: str, layer: RoutedExperts, view: FFNView) -> ShareTally:
        """The tally of what the layer that is counted under ``name`` reads; a new one if there is none yet."""
        found = self._shares.get(name)
        if found is None:
            found = self._shares[name] = ShareTally(layer, view, _device(layer))
        return found

    def count(self, noted: Noted, keep_T: Tensor | None) -> None:
        """Add one call's tokens: those where ``keep_T``, bool ``[T]``, is true; all of them if it is None.

        What they read is added if it was noted, to the :meth:`share_tally` that there is of the layer.
        """
        self.tally(noted.name, noted.neurons, noted.inactive_T.device).add(noted.inactive_T, keep_T)
        if noted.reads is not None:
            self._shares[noted.name].add(noted.reads, keep_T)

    @property
    def per_layer(self) -> dict[str, float]:
        """Share of inactive neurons of each layer, averaged over the tokens it saw."""
        return {
            name: int(tally.inactive) / max(int(tally.tokens), 1) / tally.neurons
            for name, tally in self._tallies.items()
            if tally.used
        }

    @property
    def shares_per_layer(self) -> dict[str, Shares]:
        """Shares of experts, inputs, neurons and bytes that each layer read, averaged over the tokens it saw."""
        return {name: tally.shares() for name, tally in self._used_shares().items()}

    @property
    def shares(self) -> Shares:
        """The same averaged over layers, bytes by the layers' sizes.

        Raises:
            ValueError: if no token ran through the model while recording.
        """
        self._check_ran()
        return overall(list(self._used_shares().values()))

    def _used_shares(self) -> dict[str, ShareTally]:
        return {n: tally for n, tally in self._shares.items() if n in self._tallies and self._tallies[n].used}

    @property
    def tokens(self) -> int:
        """Tokens seen by the layer that saw most; padding left out."""
        return max((int(tally.tokens) for tally in self._tallies.values()), default=0)

    @property
    def sparsity(self) -> float:
        """Share of inactive neurons, averaged over tokens, then over layers.

        Raises:
            ValueError: if no token ran through the model while recording.
        """
        self._check_ran()
        per_layer = self.per_layer
        return sum(per_layer.values()) / len(per_layer)

    def _check_ran(self) -> None:
        if not self.tokens:
            raise ValueError(
                "no token ran through the sparse layers while recording: call the model inside the context"
            )


@contextlib.contextmanager
def record_sparsity(model: nn.Module, *, front_tokens: int = 0) -> Iterator[SparsityRecord]:
    """Count active neurons while the context is open; costs nothing outside it. Padding tokens do not count.

    A compiled model stays compiled: recording has a graph of its own, the same one each time.

    Args:
        model: a sparse model.
        front_tokens: how many of the first tokens of each row do not count either: those that the tokenizer puts in
            front of every text, such as a beginning-of-sequence token. For whole rows, not for steps of decoding.

    Example::

        with record_sparsity(model) as record:
            model(**batch)
        print(record.sparsity, record.per_layer)

    Raises:
        ValueError: if the model holds no sparse FFN.
    """
    layers, views = sparse_layers(model), sparse_views(model)
    record = SparsityRecord()
    with PaddingTracker(model, front_tokens) as tracker, contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            tally = record.tally(layer.name, layer.ffn.ffn_size, _device(layer))
            shares = record.share_tally(layer.name, layer, views[name])
            counter = Counter(tally, shares, tracker)
            stack.enter_context(recording(layer, counter))
            stack.enter_context(recording_neurons(layer, views[name], counter))
        yield record


class Counter:
    """A layer's recorder (:class:`torch_prunepath.layer.sparse.Recorder`) that counts tokens, padding left out."""

    def __init__(self, tally: Tally, shares: ShareTally, tracker: PaddingTracker) -> None:
        self.tally, self.shares, self.tracker = tally, shares, tracker

    def note(
        self, layer: RoutedExperts, x_TD: Tensor, scores_TE: Tensor, mask_TE: Tensor, shape: tuple[int, ...]
    ) -> None:
        """A selection was made.

        Raises:
            ValueError: if a transform of torch.func is under way: what is chosen there leaves it with no value.
        """
        if is_transformed():
            raise ValueError(
                "record_sparsity cannot count inside of a transform of torch.func: call the model outside of it as well"
            )
        inactive_T, keep_T = layer.inactive_neurons(mask_TE), self.tracker.keep(shape)
        self.tally.add(inactive_T, keep_T)
        self.shares.add(Reads.of(layer, x_TD, mask_TE, inactive_T), keep_T)

    def note_neurons(self, neurons: Neurons) -> None:
        """Neurons answered that have a threshold."""
        self.shares.add_neurons(counted_neurons(neurons), self.tracker.keep(neurons.shape))


def _device(layer: RoutedExperts) -> torch.device:
    """Where a layer's numbers are added up: where its router is, in ordinary memory if that is offloaded."""
    device = layer.router.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def set_sparsity(
    model: nn.Module,
    target: float,
    batches: Any,
    *,
    tokenizer: Any = None,
    tolerance: float = 0.002,
    progress: bool = True,
) -> float:
    """Find the tau whose realised sparsity on ``batches`` is ``target``, set it and return it: a few passes over them.

    Args:
        model: a sparse model.
        target: share of inactive neurons, in [0, 1).
        batches: texts or chats (with ``tokenizer``), token ids ``[B, T]``, dicts of model inputs, or an iterable of
            these; see :func:`torch_prunepath.inputs.data.as_inputs`.
        tokenizer: for texts, as for :func:`torch_prunepath.sparsify`.
        tolerance: stop as soon as the realised sparsity is this near.
        progress: show a progress bar.

    Raises:
        ValueError: if target is outside [0, 1), or so high that not even one expert a layer reaches it, or the data
            does not fit. tau is unchanged.
    """
    check_sparsity(target, "target sparsity")
    layers = sparse_layers(model)
    before = {name: float(layer.tau) for name, layer in layers.items()}
    inputs = list(iterate_inputs(batches, model, tokenizer))
    with progress_bar(desc=f"finding tau for sparsity {target:g}", unit="pass", progress=progress) as bar:

        def measure(tau: float) -> float:
            set_tau(model, tau)
            found = measure_sparsity(model, inputs)
            bar.update()
            bar.set_postfix(tau=f"{tau:.4g}", sparsity=f"{found:.3f}")
            return found

        try:
            tau = find_tau(measure, target, tolerance=tolerance)
        except BaseException as error:
            set_tau(model, before)
            if isinstance(error, OutOfReach):
                raise _out_of_reach(
                    target, error.most, any(layer.experts.shared for layer in layers.values())
                ) from None
            raise
        set_tau(model, tau)
    return tau


def _out_of_reach(target: float, most: float, shared: bool) -> ValueError:
    one = "one expert a layer beside the shared ones" if shared else "one expert a layer"
    return ValueError(
        f"sparsity {target:g} is out of reach: {one} is active at {most:.3f} already; use a smaller expert_size"
    )


def measure_sparsity(model: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Realised sparsity over batches of model inputs, in evaluation mode."""
    with evaluating(model), record_sparsity(model, front_tokens=front_of(batches)) as record:
        for batch in batches:
            model(**for_model(batch))
    return record.sparsity
