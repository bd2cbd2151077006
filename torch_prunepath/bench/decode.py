"""``prunepath bench decode``: a whole model, first dense and as fast as ``torch.compile`` makes it, then sparse.

The dense model is measured first and then converted in place: there is no room for two large ones.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import InvalidBackend

from torch_prunepath.bench import results as record
from torch_prunepath.bench.build import build_dense, make_sparse, random_ids
from torch_prunepath.bench.check import relative_rms
from torch_prunepath.bench.decoder import Decoder, Prefill, Step, Work, logits_of
from torch_prunepath.bench.layers import Usage
from torch_prunepath.bench.model_traffic import reach, rounding_noise, traffic, weight_bytes
from torch_prunepath.bench.modes import CHECKED_CALLS, Measured, check_steps, describe, ready_steps, time_steps
from torch_prunepath.bench.options import DecodeOptions
from torch_prunepath.bench.profile import add_profile, start_profiles
from torch_prunepath.bench.prompts import Prompts, paired
from torch_prunepath.bench.timing import copy_bandwidth
from torch_prunepath.console.errors import as_user_error
from torch_prunepath.discover import find_ffns
from torch_prunepath.evaluation.models import longest_context
from torch_prunepath.layer.ffn import FFNView
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.sparsity import set_tau

SEARCHED_CALLS = 4
"""Number of eager decoding steps on which tau is searched (a prompt is read once). Enough to cover ``CHECKED_CALLS``; a
guess."""

BOUNDS: Mapping[torch.dtype, float] = MappingProxyType({torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2})
"""Largest relative RMS error of logits between two ways to compute one model, by dtype. There is no record of how the
bounds were chosen."""

LARGEST_BOUND = 0.5
"""Largest error that is ever allowed. Where some roundings of the FFNs' inputs move logits by more than ``BOUNDS``, an
error of that size is allowed, up to this one. It is half the error of logits that are all zero, which is 1; unrelated
logits have 1.4."""

render = record.render

Maker = Callable[[Any], Work]
"""A function that makes something to time from a model, dense or sparse."""


@dataclass(frozen=True)
class _Dense:
    """Results of the dense model that are kept while the sparse one is measured.

    Attributes:
        measured: times and peak memory of each work.
        logits: logits of each work's first calls, ``[R, V]`` on the CPU.
        bounds: largest error allowed of each work's logits.
        weight_bytes: bytes of the weights that a call reads.
        prompts: latency of each prompt.
    """

    measured: list[Measured]
    logits: list[Tensor]
    bounds: list[float]
    weight_bytes: int
    prompts: list[dict[str, Any]]


def run(options: DecodeOptions, command_line: str = "") -> dict[str, Any]:
    """Check and time everything that the options ask for, and return the results, ready for JSON.

    Raises:
        ValueError: if the backend is not known, a model cannot be loaded or has no FFN that can be made sparse, or a
            file cannot be written.
        WrongResult: if logits are wrong.
    """
    with as_user_error(InvalidBackend):
        torch._dynamo.lookup_backend(options.backend)
    start_profiles(options)
    bandwidth = copy_bandwidth(options.torch_device)
    results = record.begin("decode", options, command_line, bandwidth)
    results |= {"backend": options.backend, "context": options.context, "new_tokens": options.new_tokens}
    results |= {"prompts": [], "skipped": []}
    if options.profile is not None:
        results["profile"] = str(options.profile)
    # Each batch size and prompt length is a graph of its own.
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        for name in options.geometries:
            _geometry(name, options, bandwidth, results)
    return record.finish(results, options.output)


def _geometry(name: str, options: DecodeOptions, bandwidth: float, results: dict[str, Any]) -> None:
    model, weights = build_dense(name, options)
    config = model.config.get_text_config()
    results["geometries"][name] = {"weights": weights, "layers": config.num_hidden_layers}
    makers, skipped = _makers(model, options)
    results["skipped"] += [f"{name}: {reason}" for reason in skipped]
    dense = _measure_dense(name, model, makers, options)
    release(options.torch_device)
    model = make_sparse(name, model, options)
    rows, prompts = _measure_sparse(name, model, makers, dense, options, bandwidth)
    results["rows"] += rows
    results["prompts"] += prompts
    del model
    release(options.torch_device)


def release(device: torch.device) -> None:
    """Forget compiled code and free what nothing refers to any more."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _makers(model: Any, options: DecodeOptions) -> tuple[list[Maker], list[str]]:
    """Return makers of the works to time, and a line for each work that is too long for the model's context."""
    longest, total = longest_context(model), options.context + options.new_tokens
    makers: list[Maker] = []
    skipped = []

    def decoder(batch: int) -> Maker:
        return lambda model: Decoder(model, random_ids(model, batch, total + 1, options.seed), options.new_tokens)

    def prefill(tokens: int) -> Maker:
        return lambda model: Prefill(model, random_ids(model, 1, tokens, options.seed))

    for batch in options.batches:
        if total <= longest:
            makers.append(decoder(batch))
        else:
            skipped.append(f"batch {batch}: {total} tokens are more than the context of {longest}")
    for tokens in options.prompt_lengths:
        if tokens <= longest:
            makers.append(prefill(tokens))
        else:
            skipped.append(f"prompt of {tokens} tokens: more than the context of {longest}")
    if options.num_prompts and not _has_prompts(model, options):
        skipped.append(f"prompts one by one: {total} tokens are more than the context of {longest}")
    return makers, skipped


def _has_prompts(model: Any, options: DecodeOptions) -> bool:
    return options.num_prompts > 0 and options.context + options.new_tokens <= longest_context(model)


# --- one side after the other -----------------------------------------------------------------------------------------


def _measure_dense(name: str, model: Any, makers: Sequence[Maker], options: DecodeOptions) -> _Dense:
    measured, logits, bounds = [], [], []
    for make in makers:
        work = make(model)
        what = f"dense {name}, {describe(work)}"
        expected_RV = logits_of(work, work.step, CHECKED_CALLS)
        steps = ready_steps(work, options.dense_modes, "inductor", what)
        projections = [FFNView(model, spec).up for spec in find_ffns(model)]
        bounds.append(_bound(projections, work, expected_RV, options))
        check_steps(work, steps, expected_RV, bounds[-1], what)
        measured.append(time_steps(work, steps, options))
        _profile(what, work, steps, measured[-1], options)
        logits.append(expected_RV.cpu())
    mode = measured[0].best if measured else options.dense_modes[0]
    prompts = Prompts(name, model, options, mode, "inductor").measure() if _has_prompts(model, options) else []
    return _Dense(measured, logits, bounds, weight_bytes(model), prompts)


def _measure_sparse(
    name: str, model: Any, makers: Sequence[Maker], dense: _Dense, options: DecodeOptions, bandwidth: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for make, measured, logits_RV, bound in zip(makers, dense.measured, dense.logits, dense.bounds, strict=True):
        set_tau(model, 1.0)
        work = make(model)
        what = f"sparse {name}, {describe(work)}"
        steps = ready_steps(work, options.all_sparse_modes, options.backend, what)
        for sparsity in sorted({0.0, *options.sparsities}):
            used = reach(model, work, sparsity, SEARCHED_CALLS)
            checked = _check(model, work, steps, logits_RV.to(options.torch_device), bound, sparsity, what, options)
            found = time_steps(work, steps, options)
            _profile(f"{what}, sparsity {sparsity:g}", work, steps, found, options)
            about = traffic(model, work, used, dense.weight_bytes, bandwidth)
            row = _row(name, model, work, sparsity, Usage.mean(list(used.values())), options)
            row |= about.row(measured.timing.median_us, found.timing.median_us)
            rows.append(record.clean(row | _details(work, measured, found) | checked))
            record.announce(rows[-1])
    mode = rows[0]["sparse_mode"] if rows else options.all_sparse_modes[0]
    return rows, _sparse_prompts(name, model, dense.prompts, mode, options)


def _profile(what: str, work: Work, steps: Mapping[str, Step], found: Measured, options: DecodeOptions) -> None:
    title = f"{what}, mode {found.best}: {found.timing.median_us:.1f} us a call without the profiler"
    add_profile(options, title, work, steps[found.best])


def _bound(modules: Iterable[nn.Module], work: Work, expected_RV: Tensor, options: DecodeOptions) -> float:
    """Return the largest error of logits that is allowed, given the roundings of these modules' inputs."""
    noise = rounding_noise(modules, work, expected_RV, CHECKED_CALLS, options.seed)
    return min(max(BOUNDS[options.torch_dtype], noise), LARGEST_BOUND)


def _check(
    model: Any,
    work: Work,
    steps: Any,
    dense_RV: Tensor,
    bound: float,
    sparsity: float,
    what: str,
    options: DecodeOptions,
) -> dict[str, float]:
    """Compare the steps' logits with those that they should compute.

    With every expert active and all gates 1, these are the dense model's logits, and ``bound`` is the dense model's.
    Otherwise they are those of eager sparse calls. ``dense_distance`` in the result is the relative RMS error of the
    dense model's logits.
    """
    expected_RV = dense_RV
    gates = {layer.experts.gate for layer in sparse_layers(model).values()}
    if sparsity > 0.0 or gates != {"one"}:
        expected_RV = logits_of(work, work.step, CHECKED_CALLS)
        bound = _bound(sparse_layers(model).values(), work, expected_RV, options)
    error = check_steps(work, steps, expected_RV, bound, f"{what} at sparsity {sparsity:g}")
    return {"check_error": error, "check_bound": bound, "dense_distance": relative_rms(dense_RV, expected_RV)}


def _sparse_prompts(
    name: str, model: Any, dense: list[dict[str, Any]], mode: str, options: DecodeOptions
) -> list[dict[str, Any]]:
    if not dense:
        return []
    prompts, pairs = Prompts(name, model, options, mode, options.backend), []
    for sparsity in options.sparsities:
        used = reach(model, prompts.decoder, sparsity, SEARCHED_CALLS)
        pairs += paired(dense, prompts.measure(), sparsity, Usage.mean(list(used.values())).sparsity)
    return pairs


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(name: str, model: Any, work: Work, sparsity: float, used: Usage, options: DecodeOptions) -> dict[str, Any]:
    experts = next(iter(sparse_layers(model).values())).experts
    return {
        "geometry": name,
        "phase": work.phase,
        "device": options.device,
        "dtype": options.dtype,
        "batch": work.batch,
        "tokens": work.tokens,
        "expert_size": experts.expert_size,
        "gate": experts.gate,
        "sparsity": sparsity,
        "realised_sparsity": used.sparsity,
        "union_share": used.union,
    }


def _details(work: Work, dense: Measured, sparse: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {**sparse.peak.row(), "dense_peak_bytes": dense.peak.bytes}
    for side, measured in (("dense", dense), ("sparse", sparse)):
        row[f"{side}_mode"] = measured.best
        row[f"{side}_modes_us"] = {mode: timing.median_us for mode, timing in measured.times.items()}
        row[f"{side}_min_us"] = measured.timing.min_us
        row[f"{side}_iqr_us"] = measured.timing.iqr_us
        row[f"{side}_rounds"] = measured.timing.rounds
        row[f"{side}_tokens_per_s"] = work.batch * work.tokens / measured.timing.median_us * 1e6
    return row
