"""The work of ``prunepath sweep``: one loaded model, evaluated at every point."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from torch_prunepath.budget import set_budget
from torch_prunepath.commands.points import Point
from torch_prunepath.commands.sweep.options import SweepOptions
from torch_prunepath.commands.sweep.plot import save_plot
from torch_prunepath.commands.sweep.scores import Score, headline, scores_of
from torch_prunepath.console import report
from torch_prunepath.console.errors import UserError, one_line
from torch_prunepath.console.options import flag
from torch_prunepath.console.output import RESULTS, is_output_of, output_folder, say, writing
from torch_prunepath.discover import discover
from torch_prunepath.evaluation import lm_eval as harness
from torch_prunepath.evaluation.corpus import Corpus, load_corpus
from torch_prunepath.evaluation.make_sparse import (
    fit_windows,
    holds_path,
    holds_sparse_layers,
    make_sparse,
    model_tau,
    reach_bytes,
    reach_sparsity,
)
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.inputs.front import front_tokens
from torch_prunepath.layer.saving import describe
from torch_prunepath.sparsity import set_tau


def run(options: SweepOptions, command_line: str = "") -> dict[str, Any]:
    """Evaluate every row; return what was measured, ready for JSON.

    The first row is the reference: the dense model by lm-eval's own ``hf``; or, of a sparse checkpoint, tau = 1.

    Raises:
        ValueError: if lm-eval, the model, a task, the text or the output cannot be had.
    """
    harness.register()
    corpus = load_corpus(options.text)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = None
        if options.output is not None:
            folder = stack.enter_context(output_folder(options.output, ours=is_output_of("sweep")))
        sweep = _Sweep(options, corpus)
        rows = sweep.rows(options.points)
        results = {**sweep.about(), "rows": rows, "seconds": round(time.perf_counter() - started, 1)}
        results |= {"output": None, "plot": None}
        if folder is not None and options.output is not None:
            results["output"] = str(options.output)
            results["plot"] = save_plot(results, folder, options.output)
            with writing(options.output):
                (folder / RESULTS).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def render(results: Mapping[str, Any]) -> str:
    """The results as people read them: one row a point, the most telling metric of each task."""
    model, headlines = results["model"], results["headlines"]
    by_bytes = any("target_bytes" in row for row in results["rows"])
    lines = [
        (
            "",
            "tau",
            "sparsity",
            *(("bytes read",) if by_bytes else ()),
            *(f"{task} {metric}" for task, metric in headlines.items()),
        )
    ]
    for row in results["rows"]:
        cells = [f"{row['scores'][task][metric]['value']:.4g}" for task, metric in headlines.items()]
        read = (f"{row['bytes']:.1%}",) if by_bytes else ()
        tau = "by layer" if row["tau"] is None else f"{row['tau']:.6g}"
        lines.append((row["name"], tau, f"{row['sparsity']:.1%}", *read, *cells))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    text = [
        f"model       {model['name']} ({model['parameters'] / 1e6:.1f} M parameters, {model['dtype']})",
        f"versions    {versions}",
        "",
        *report.aligned(lines),
        "",
        *report.skipped(results["skipped"]),
        f"time        {results['seconds']:.0f} s",
    ]
    if results["output"] is not None:
        text.append(
            f"output      {results['output']} ({'with' if results['plot'] else 'no matplotlib, so without'} a plot)"
        )
    return "\n".join(text)


class _Sweep:
    """One loaded model, evaluated again and again on the same tasks."""

    def __init__(self, options: SweepOptions, corpus: Corpus) -> None:
        self._options, self._config, self._corpus = options, options.config, corpus
        self._manager, self._tasks = _find_tasks(options)
        self._model, self._tokenizer = _load(options)
        self._headlines: dict[str, str] = {}
        self._skipped: list[dict[str, str]] = []
        self._has_path = options.text is None and self._sparse and holds_path(self._model)
        if self._sparse and options.about_experts:
            flags = ", ".join(map(flag, options.about_experts))
            raise UserError(f"{options.model} is sparse already: leave out {flags}")

    @property
    def _sparse(self) -> bool:
        return holds_sparse_layers(self._model)

    @functools.cached_property
    def _window_NC(self) -> Any:
        return fit_windows(self._corpus, self._model, self._tokenizer, self._config.calibration_tokens)

    @functools.cached_property
    def _lm(self) -> Any:
        from torch_prunepath.integrations.lm_eval import PrunePathLM

        return PrunePathLM(pretrained=self._model, tokenizer=self._tokenizer, batch_size=self._options.batch_size)

    def about(self) -> dict[str, Any]:
        """What was evaluated, with what, on what."""
        options, machine = self._options, report.machine()
        used = self._window_NC.numel() if "_window_NC" in self.__dict__ else 0
        return {
            "command": "sweep",
            **machine,
            "versions": {**machine["versions"], "lm-eval": metadata.version("lm_eval")},
            "model": {**report.model(options.model, self._model), "device": str(self._model.device)},
            "tasks": options.task_names,
            "num_fewshot": options.num_fewshot,
            "limit": options.limit,
            "batch_size": options.batch_size,
            "text": {"name": self._corpus.name, "calibration_tokens": used},
            "config": asdict(self._config),
            "skipped": self._skipped,
            "headlines": self._headlines,
        }

    def rows(self, points: Sequence[Point]) -> list[dict[str, Any]]:
        """The reference and every point. A dense model is sparse afterwards."""
        if self._sparse:
            self._config = describe(self._model).config
            reference = self._at(Point(tau=1.0) if self._options.shares is None else Point(bytes=1.0))
            points = [point for point in points if not point.dense]
        else:
            reference = self._dense()
            say("building experts and fitting routers")
            choice: dict[str, Any] = {"include": self._options.include, "exclude": self._options.exclude}
            self._skipped = discover(self._model, **choice).report()
            make_sparse(self._model, self._window_NC, self._config, front_tokens(self._tokenizer), **choice)
        return [reference, *map(self._at, points)]

    def _dense(self) -> dict[str, Any]:
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=self._model, tokenizer=self._tokenizer, batch_size=self._options.batch_size)
        return self._told(self._row("dense", lm) | {"tau": 1.0, "sparsity": 0.0, "bytes": 1.0, "tokens": None})

    def _at(self, point: Point) -> dict[str, Any]:
        tau = self._move_to(point)
        self._lm.reset_sparsity()
        row = self._row(point.name, self._lm)
        found = self._lm.sparsity_info()
        row |= {"tau": tau, **{key: found[key] for key in ("sparsity", "bytes", "tokens")}}
        return self._told(row | ({} if point.bytes is None else {"target_bytes": point.bytes}))

    def _move_to(self, point: Point) -> float | None:
        """Set the model as asked; return its tau, or None where layers have their own."""
        if point.bytes is not None:
            if self._has_path:
                set_budget(self._model, point.bytes)
            else:
                say("measuring what settings save and cost")
                reach_bytes(self._model, point.bytes, self._window_NC, front_tokens(self._tokenizer))
                self._has_path = True
            return model_tau(self._model)
        tau = point.tau
        if point.sparsity is not None:
            tau = reach_sparsity(self._model, point.sparsity, self._window_NC, front_tokens(self._tokenizer))
        assert tau is not None
        set_tau(self._model, tau)
        return tau

    def _told(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row, said on standard error as soon as it is there: a sweep may take hours."""
        scores = [
            f"{task} {metric} {row['scores'][task][metric]['value']:.4g}" for task, metric in self._headlines.items()
        ]
        say(f"{row['name']}: sparsity {row['sparsity']:.1%}, {', '.join(scores)}")
        return row

    def _row(self, name: str, lm: Any) -> dict[str, Any]:
        say(f"{name}: evaluating")
        started = time.perf_counter()
        try:
            scores = self._evaluate(lm)
        except IndexError as error:
            rows, tokens = self._model.get_input_embeddings().weight.shape[0], len(self._tokenizer)
            if tokens <= rows:
                raise
            raise UserError(
                f"the tokenizer has {tokens} tokens and the model's embedding {rows}, and a task has one beyond: "
                "use the model's own tokenizer"
            ) from error
        self._headlines = self._headlines or headline(scores, self._tasks)
        return {"name": name, "scores": scores, "seconds": round(time.perf_counter() - started, 1)}

    def _evaluate(self, lm: Any) -> dict[str, dict[str, Score]]:
        from lm_eval import simple_evaluate

        options = self._options
        limit = options.limit
        results = simple_evaluate(
            model=lm,
            tasks=self._tasks,
            task_manager=self._manager,
            num_fewshot=options.num_fewshot,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            log_samples=False,
        )
        assert results is not None, "only the first of several processes gets results, and there is one"
        return scores_of(results)


def _find_tasks(options: SweepOptions) -> tuple[Any, list[str]]:
    from lm_eval.tasks import TaskManager

    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path {options.include_path} is no folder: name one that holds task files")
    manager = TaskManager(include_path=options.include_path)
    names: dict[str, None] = {}
    for pattern in options.task_names:
        found = manager.match_tasks([pattern])
        if not found:
            raise UserError(
                f"lm-eval knows no task {pattern!r}: see 'lm-eval ls tasks', or name a folder in --include-path"
            )
        names |= dict.fromkeys(found)
    return manager, list(names)


def _load(options: SweepOptions) -> tuple[Any, Any]:
    import torch

    say("loading the model")
    model, tokenizer = load_model(options.model)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device, dtype=None if options.dtype == "auto" else getattr(torch, options.dtype))
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot move the model to {device} ({one_line(error)}): choose another --device") from error
    return model, tokenizer
