"""Training-free thresholds on single activations: they show how much could be left out neuron by neuron.

``cats`` is CATS (Lee et al., arXiv 2404.08763): in each FFN, neurons whose gate activation is small are left out.
Sparsity counts neurons, as everywhere in this library.

``teal`` is TEAL (Liu et al., arXiv 2408.14690): small entries of each matrix's input are left out, for gate, up and
down. Sparsity counts matrix inputs, weighed by the matrices' sizes. It is not comparable with the sparsity of neurons,
as an input of gate or up is a column of the matrix, not a neuron. Unlike in the paper, attention matrices are left
alone, and the thresholds apply to every token, not only to the second half of a prompt.

Both work by forward hooks on the dense model, whose weights stay as they are. Checkpoints do not hold them, and code
that was compiled before does not run them.

Shapes: N calibration tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from torch_prunepath.activations import ACTIVATIONS
from torch_prunepath.baselines.routed import CALIBRATION_TOKENS, calibration_inputs
from torch_prunepath.baselines.teal_search import Path, greedy_path, matrices, uniform_path
from torch_prunepath.baselines.top_k import gate_activations
from torch_prunepath.config import check_choice, check_sparsity
from torch_prunepath.discover import Which, find_ffns
from torch_prunepath.inputs.padding import PaddingTracker
from torch_prunepath.inputs.visit import visit_inputs
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.progress import progress_bar
from torch_prunepath.quantiles import Quantiles

Allocation = Literal["greedy", "uniform"]


class ThresholdRecord:
    """Counts of what was left out while the record was open.

    Reading them synchronises with the device once; counting never does.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], tuple[Tensor, Tensor, int]] = {}
        self._tracker: PaddingTracker | None = None

    def count(self, ffn: str, matrix: str, inactive: Tensor, weight: int) -> None:
        """Count one call.

        Args:
            ffn: name of the FFN.
            matrix: name of the matrix.
            inactive: entries that are left out, bool ``[..., entries]``.
            weight: weight of the matrix within its FFN.
        """
        flat = inactive.reshape(-1, inactive.shape[-1])
        keep = self._tracker.keep(inactive.shape[:-1]) if self._tracker is not None else None
        real_T = flat.new_ones(len(flat), dtype=torch.float64) if keep is None else keep.double()
        share = flat.double().mean(-1) @ real_T
        before = self._counts.get((ffn, matrix), (0, 0, 0))
        self._counts[ffn, matrix] = (before[0] + share, before[1] + real_T.sum(), weight)

    @property
    def per_matrix(self) -> dict[tuple[str, str], float]:
        """Share of the entries that were left out, averaged over tokens, by FFN and matrix."""
        return {key: float(out) / max(float(seen), 1.0) for key, (out, seen, _) in self._counts.items()}

    @property
    def per_layer(self) -> dict[str, float]:
        """Share of the entries that were left out, by FFN, with matrices weighed by their sizes."""
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for (ffn, matrix), share in self.per_matrix.items():
            weight = self._counts[ffn, matrix][2]
            sums[ffn] = sums.get(ffn, 0.0) + weight * share
            weights[ffn] = weights.get(ffn, 0.0) + weight
        return {ffn: sums[ffn] / weights[ffn] for ffn in sums}

    @property
    def sparsity(self) -> float:
        """Share that was left out, averaged over FFNs: of neurons for ``cats``, of matrix inputs for ``teal``.

        Raises:
            ValueError: if no token ran through the model.
        """
        per_layer = self.per_layer
        if not per_layer:
            raise ValueError("no token ran through the FFNs while recording: call the model inside the context")
        return sum(per_layer.values()) / len(per_layer)


class _Site:
    """A hook on one matrix of one FFN, with its threshold on the device."""

    def __init__(self, owner: Thresholding, view: FFNView, matrix: str, weight: int) -> None:
        self.owner, self.view, self.matrix, self.weight = owner, view, matrix, weight
        self.threshold = torch.zeros((), device=view.down_FD.device)

    def drop(self, values: Tensor, inactive: Tensor) -> Tensor:
        if self.owner.recording is not None:
            self.owner.recording.count(self.view.site, self.matrix, inactive, self.weight)
        return values.masked_fill(inactive, 0)


class _GateSite(_Site):
    """The hook of CATS, after the gate (or a plain FFN's up): a pre-activation of 0 makes a neuron's contribution 0."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        fused = self.view.spec.fused
        parts = [output] if fused is None else list(output.chunk(2, dim=-1))
        place = 1 if fused == "up_gate" else 0
        size = ACTIVATIONS[self.view.spec.activation](parts[place]).abs().float()
        parts[place] = self.drop(parts[place], (size < self.threshold.to(size.device)) | (size == 0))
        return parts[0] if fused is None else torch.cat(parts, dim=-1)


class _InputSite(_Site):
    """The hook of TEAL, before a matrix."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        return self.drop(x, x.abs().float() <= self.threshold.to(x.device)), *args[1:]


class Thresholding:
    """The thresholds on a dense model; made by :func:`cats` and :func:`teal`.

    Attributes:
        model: the dense model.
        unit: unit that sparsity counts, ``"neurons"`` or ``"matrix inputs"``.
        recording: the open record, if any.
    """

    def __init__(self, model: nn.Module, unit: str) -> None:
        self.model, self.unit = model, unit
        self.recording: ThresholdRecord | None = None
        self._sites: list[tuple[_Site, Quantiles]] = []
        self._paths: dict[str, Path] = {}
        self._handles: list[Any] = []

    def set_sparsity(self, share: float) -> None:
        """Set every threshold so that this share of the calibration data falls under it. No further data is needed.

        Each FFN gets the same share. The realised share is another one where the data, or the inputs of later layers
        that change with the thresholds, differ from the calibration data; :meth:`record` measures it.

        Raises:
            ValueError: if share is outside [0, 1). Nothing is changed.
        """
        check_sparsity(share, "target sparsity")
        for site, quantiles in self._sites:
            own = self._paths[site.view.site].share_of(site.matrix, share) if self._paths else share
            site.threshold.fill_(quantiles.threshold(own))

    @contextlib.contextmanager
    def record(self, *, front_tokens: int = 0) -> Iterator[ThresholdRecord]:
        """Count what is left out while the context is open; padding does not count.

        Args:
            front_tokens: how many of the first tokens of each row do not count either, as for
                :func:`torch_prunepath.record_sparsity`.

        Raises:
            ValueError: if a record is open already.
        """
        if self.recording is not None:
            raise ValueError("a record is open already: leave its context first")
        self.recording = ThresholdRecord()
        try:
            with PaddingTracker(self.model, front_tokens) as tracker:
                self.recording._tracker = tracker
                yield self.recording
        finally:
            self.recording._tracker = None
            self.recording = None

    def remove(self) -> None:
        """Remove the hooks, so that the model is dense again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def cats(
    model: nn.Module,
    sparsity: float,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> Thresholding:
    """Leave out neurons whose gate activation ``|act(gate(x))|`` lies under their layer's threshold.

    In a plain FFN it is the activation of up. A neuron whose activation is exactly 0 counts as left out.

    Args:
        model: a dense model.
        sparsity: share of each FFN's neurons to leave out, in [0, 1), measured on the dense model's hidden states.
        calibration: data, as for :func:`torch_prunepath.sparsify`; with None a causal language model samples its own
            text.
        tokenizer: tokenizer for texts.
        tokens: largest number of calibration tokens that are used.
        seed: seed of sampled text.
        include: the FFNs to take; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these to leave out.
        progress: show progress bars.

    Raises:
        ValueError: if sparsity is outside [0, 1), there is no FFN or the data does not fit. The model is as it was.
    """
    handle = Thresholding(model, "neurons")
    views = [FFNView(model, spec) for spec in find_ffns(model, include, exclude)]
    inputs = calibration_inputs(model, calibration, tokenizer, tokens, seed, progress)
    with progress_bar(total=len(views), desc="measuring activations", unit="layer", progress=progress) as bar:

        def visit(view: FFNView, x_ND: Tensor) -> None:
            handle._sites.append((_GateSite(handle, view, "neurons", 1), Quantiles(gate_activations(view, x_ND))))
            bar.update()

        visit_inputs(model, views, inputs, visit)
    handle.set_sparsity(sparsity)
    for site, _ in handle._sites:
        watched = site.view.up if site.view.gate is None else site.view.gate
        handle._handles.append(watched.register_forward_hook(site))  # type: ignore[arg-type]
    return handle


def teal(
    model: nn.Module,
    sparsity: float,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    allocation: Allocation = "greedy",
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    include: Which | None = None,
    exclude: Which | None = None,
    progress: bool = True,
) -> Thresholding:
    """Leave out entries of each FFN matrix's input that lie under its threshold.

    Args:
        model: a dense model.
        sparsity: share of each FFN's matrix inputs to leave out, in [0, 1), weighed by the matrices' sizes.
        calibration: data, as for :func:`torch_prunepath.sparsify`; with None a causal language model samples its own
            text.
        tokenizer: tokenizer for texts.
        allocation: share of each matrix. ``"uniform"``: the same for every matrix; ``"greedy"``: found in steps, each
            of which leaves out more of the matrix where that changes the FFN's output least.
        tokens: largest number of calibration tokens that are used.
        seed: seed of sampled text.
        include: the FFNs to take; None: all. As for :func:`torch_prunepath.sparsify`.
        exclude: which of these to leave out.
        progress: show progress bars.

    Raises:
        ValueError: if sparsity is outside [0, 1), there is no FFN or the data does not fit. The model is as it was.
    """
    check_choice("allocation", allocation, Allocation)
    handle = Thresholding(model, "matrix inputs")
    views = [FFNView(model, spec) for spec in find_ffns(model, include, exclude)]
    inputs = calibration_inputs(model, calibration, tokenizer, tokens, seed, progress)
    with progress_bar(total=len(views), desc="measuring inputs", unit="layer", progress=progress) as bar:

        def visit(view: FFNView, x_ND: Tensor) -> None:
            of_x = Quantiles(x_ND)
            found = {name: Quantiles(view.hidden(x_ND)) if name == "down" else of_x for name in matrices(view)}
            sizes = {name: module.weight.numel() for name, module in matrices(view).items()}  # type: ignore[operator, union-attr]
            handle._sites += [(_InputSite(handle, view, name, sizes[name]), found[name]) for name in found]
            search = greedy_path if allocation == "greedy" else uniform_path
            handle._paths[view.site] = search(view, x_ND, found, sizes)
            bar.update()

        visit_inputs(model, views, inputs, visit)
    handle.set_sparsity(sparsity)
    for site, _ in handle._sites:
        module = matrices(site.view)[site.matrix]
        handle._handles.append(module.register_forward_pre_hook(site))  # type: ignore[arg-type]
    return handle
