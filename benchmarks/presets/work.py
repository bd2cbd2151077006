"""Doing the parts of a preset by the harness, and reporting them with the figure's axes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Options, Store
from benchmarks.harness import run as run_jobs
from benchmarks.harness.curves import report as report_perplexity
from benchmarks.harness.scores import Halves, write_report
from benchmarks.harness.store import records_of
from benchmarks.presets.preset import ANALYSES, Part, Preset
from benchmarks.presets.tasks import InstructTask, WritingTask, glue_task
from benchmarks.sources import SOURCES, gather
from benchmarks.tasks.books import BooksTask, Budget, Measuring, Texts
from benchmarks.tasks.glue import preference
from torch_prunepath.console.errors import UserError, one_line

METRICS = {
    "glue": ("accuracy", "f1", "matthews"),
    "writing": ("bleu", "rouge_l"),
    "instruct": ("mmlu",),
}
"""What the report of each kind of part shows against sparsity."""
PERCENT = {"accuracy": 100.0, "f1": 100.0, "matthews": 100.0, "rouge_l": 100.0, "mmlu": 100.0}
SMALL_WINDOWS = 4
"""Windows that a stand-in measures."""


def run(preset: Preset, arguments: argparse.Namespace, command_line: str) -> str:
    """Do every part that is not done, and report each; what to print.

    Raises:
        UserError: if model or data cannot be had, or a setting is refused.
    """
    output: Path = arguments.output
    model, data = _material(preset, arguments)
    found: list[tuple[str, str]] = []
    for part in preset.parts:
        title = f"{part.kind} {' '.join(part.sources)}"
        print(f"{preset.name}: {title}", file=sys.stderr, flush=True)
        place = output / "-".join([part.kind, *(part.sources if len(preset.parts) > 1 else ())])
        do = _analysis if part.kind in ANALYSES else _jobs
        found.append((title, do(preset, part, model, data, place, arguments, command_line)))
    if arguments.json:
        return json.dumps({"figure": preset.name, "parts": {title: json.loads(text) for title, text in found}})
    return "\n\n".join(f"{preset.name}: {preset.title}\n{title}\n\n{text}" for title, text in found)


def _material(preset: Preset, arguments: argparse.Namespace) -> tuple[str, Path]:
    """The folders of the model and of the data: stand-ins, those that are named, or fetched from the hub."""
    output: Path = arguments.output
    model, folder = arguments.model, arguments.data
    if arguments.stand_in:
        from benchmarks.presets.stand_in import save_data, save_model

        model = model or str(save_model(preset, output / "model"))
        folder = folder or save_data(preset, output / "data")
    wanted = [(SOURCES[name], part.splits) for part in preset.parts for name in part.sources]
    return model or _fetched(preset.model.name), gather(wanted, folder, output / "data")


def _fetched(name: str) -> str:
    """The folder of a model from the hub.

    Raises:
        UserError: if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} cannot be had from the hub ({one_line(error)}): connect to the network, or name its folder with "
            "--model"
        ) from error


# --- jobs of the harness ----------------------------------------------------------------------------------------------


def _jobs(
    preset: Preset, part: Part, model: str, data: Path, place: Path, arguments: argparse.Namespace, command_line: str
) -> str:
    tasks = _tasks(preset, part, model, data, place, arguments)
    options = Options(
        place,
        part.methods,
        part.sparsity,
        part.lr,
        part.seeds,
        part.dense_lr,
        part.steps,
        part.epochs,
        autocast=preset.autocast,
        compile=arguments.compile,
        commit=arguments.commit,
        command_line=command_line,
        progress=not arguments.json,
    )
    run_jobs(tasks, options)
    if part.kind == "books":
        return report_perplexity(place, as_json=arguments.json)
    halves = Halves(preference) if part.kind == "glue" else Halves()
    results, text = write_report(place, records_of(place), METRICS[part.kind], PERCENT, halves)
    own = _own_settings(place, METRICS[part.kind])
    return json.dumps({**results, "own_settings": own}) if arguments.json else "\n".join([text, *map(_said, own)])


def _tasks(
    preset: Preset, part: Part, model: str, data: Path, place: Path, arguments: argparse.Namespace
) -> Sequence[Any]:
    how: dict[str, Any] = {"batch": part.batch, "length": part.length, "device": arguments.device}
    if part.kind == "glue":
        return [glue_task(name, data, model, **how) for name in part.sources]
    (name,) = part.sources
    how["accumulation"] = part.options.get("accumulation", 1)
    if part.kind == "writing":
        return [WritingTask(name, data, model, new_tokens=part.new_tokens, **how)]
    if part.kind == "instruct":
        return [InstructTask(name, data, model, checkpointing=preset.model.checkpointing, **how)]
    measuring = Measuring(SMALL_WINDOWS, SMALL_WINDOWS) if arguments.stand_in else Measuring()
    texts = Texts(_text(name, "train", data), {name: _text(name, "test", data)})
    budget = Budget(part.length, part.batch * part.length)
    cache = Store(place).cache
    return [BooksTask(model, texts, cache, budget=budget, measuring=measuring, device=arguments.device)]


def _text(name: str, split: str, data: Path) -> Path:
    """The file of a running text, which is there."""
    return next(path for file in SOURCES[name].files(split) if (path := data / file).is_file())


def _own_settings(place: Path, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """What runs gave at settings of their method's own, such as the tau that it was trained at."""
    return [
        {
            "task": record["job"]["task"],
            "method": record["job"]["method"],
            "seed": record["job"]["seed"],
            "lr": record["job"]["lr"],
            "setting": row["setting"],
            "tau": row["tau"],
            "sparsity": row["report"]["sparsity"],
            **{metric: row["report"][metric] for metric in metrics if metric in row["report"]},
        }
        for record in records_of(place).values()
        for row in record["rows"]
        if row["asked"] is None and "report" in row
    ]


def _said(row: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {PERCENT.get(name, 1.0) * row[name]:.2f}" for name in row if name in NAMES)
    return (
        f"{row['task']}, {row['method']}, lr {row['lr']:g}, seed {row['seed']}, {row['setting']} (tau {row['tau']:g}): "
        f"{values} at {row['sparsity']:.1%}"
    )


NAMES = frozenset(name for names in METRICS.values() for name in names)


# --- analyses ---------------------------------------------------------------------------------------------------------


def _analysis(
    preset: Preset, part: Part, model: str, data: Path, place: Path, arguments: argparse.Namespace, command_line: str
) -> str:
    """An analysis by its own commands; the command line that its results record is the analysis'."""
    _command([part.kind, "run", *analysis_line(preset, part, model, data, place, arguments)])
    return _command([part.kind, "report", str(place), *(["--json"] if arguments.json else [])])


def _command(argv: Sequence[str]) -> str:
    """What ``python -m benchmarks`` prints.

    Raises:
        UserError: if it does not succeed.
    """
    from benchmarks.__main__ import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(argv)
    if code:
        raise UserError(f"python -m benchmarks {shlex.join(argv)} did not succeed: see above")
    return printed.getvalue().rstrip()


def analysis_line(
    preset: Preset, part: Part, model: str, data: Path, place: Path, arguments: argparse.Namespace
) -> list[str]:
    """The options of the analysis' command."""
    (name,) = part.sources
    (lr,) = part.lr
    options: dict[str, Any] = {
        "model": model,
        "output": place,
        "text_train": _text(name, "train", data),
        "text_test": f"{name}={_text(name, 'test', data)}",
        "context": part.length,
        "batch_tokens": part.batch * part.length,
        "steps": part.steps,
        "lr": lr,
        "sparsity": part.sparsity,
        "seeds": part.seeds,
        "device": arguments.device,
        **({"methods": list(part.methods)} if part.methods else {}),
        **({"tau": part.taus} if part.taus else {}),
        **({"windows": SMALL_WINDOWS, "search_windows": SMALL_WINDOWS} if arguments.stand_in else {}),
        **({"compile": arguments.compile} if arguments.compile else {}),
        **({"commit": arguments.commit} if arguments.commit else {}),
        **part.options,
    }
    found = []
    for key, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [f"--{key.replace('_', '-')}", *map(str, values)]
    for method, fields in part.methods.items():
        for field, value in fields.items():
            if field not in part.options:
                found += ["--set", f"{method}:{field}={value}"]
    return [*found, *(["--bf16"] if preset.autocast else [])]
