"""Every run that was asked for, one after the other; those that are done, or that another process has in hand, are left
out."""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.adaptation.job import Job, Run, describe, name_of
from benchmarks.adaptation.material import Material
from benchmarks.adaptation.methods import METHODS, check
from benchmarks.adaptation.options import Settings
from benchmarks.common.report import origin
from torch_prunepath.console.errors import as_user_error


def plan(
    settings: Settings, methods: Mapping[str, Mapping[str, Any]], lrs: Sequence[float], seeds: Sequence[int]
) -> list[Run]:
    """The runs, in order: seeds one after the other, so that each is complete before the next.

    Args:
        settings: what was asked.
        methods: changed fields by method.
        lrs: the grid of learning rates.
        seeds: of the runs.

    Raises:
        UserError: if a setting is refused.
    """
    runs = []
    for seed, (method, fields), lr in itertools.product(seeds, methods.items(), lrs):
        shares: tuple[float | None, ...] = settings.sparsities if METHODS[method].per_sparsity else (None,)
        runs += [Run(method, fields, lr, seed, share) for share in shares]
    for run in runs:
        check(run)
        settings.budget.rows_of(run.settings.get("accumulation", settings.budget.accumulation))
    return runs


def work(settings: Settings, runs: Sequence[Run]) -> dict[str, list[str]]:
    """Do the runs; what was done, was done before, is in hand elsewhere, or was left for want of time, by name.

    Raises:
        UserError: if a run's settings are refused, or a result cannot be written.
    """
    start = time.monotonic()
    material = Material(settings)
    found: dict[str, list[str]] = {"done": [], "before": [], "elsewhere": [], "left": []}
    for number, run in enumerate(runs, 1):
        name = name_of(run, material)
        late = settings.session_seconds is not None and time.monotonic() - start > settings.session_seconds
        with material.store.claim(name) as mine:
            kind = "before" if material.store.has(name) else "elsewhere" if not mine else "left" if late else "done"
            if kind == "done":
                print(f"[{number}/{len(runs)}] {name}", file=sys.stderr, flush=True)
                material.store.write(name, result(run, material))
                _free(settings.device)
        found[kind].append(name)
    return found


def result(run: Run, material: Material) -> dict[str, Any]:
    """Train and measure; everything about it, ready for JSON. A run that diverges is a result as well."""
    settings, job = material.settings, Job(run, material)
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    failed, evaluation = None, 0.0
    with as_user_error(ValueError):
        try:
            adapted = METHODS[run.method].adapt(job)
            measured = time.perf_counter()
            rows = job.measure(adapted)
            evaluation = time.perf_counter() - measured
        except FloatingPointError as error:
            failed = str(error)
    total = time.perf_counter() - begin
    return {
        "run": describe(run, material),
        **origin(settings.command_line, settings.commit),
        "device": settings.device,
        "stages": job.configs,
        "training": job.training(),
        "conversion_kept": job.kept_conversion,
        "evaluation_seconds": round(evaluation, 2),
        "seconds": round(total, 2),
        "failed": failed,
        "rows": rows,
        "history": job.history,
    }


def _free(device: str) -> None:
    """Give memory back that other processes on the same device may need."""
    gc.collect()  # hooks and models hold each other
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
