"""What the analyses share: options, models as ``benchmarks.adaptation`` makes them, parts done once, results."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.adaptation.job import Adapted, Job, Run, describe
from benchmarks.adaptation.material import Material
from benchmarks.adaptation.measure import TauKnob
from benchmarks.adaptation.methods import METHODS, check
from benchmarks.adaptation.options import add_material, settings_of
from benchmarks.common.options import add_compile, changes, check_positive
from benchmarks.common.report import figure, origin, origins, save, spread_of, write
from benchmarks.common.store import Store, digest, digest_of_model
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.train import train

Row = dict[str, Any]
STEM = "results"
CONVERTED, TRAINED = "converted", "trained"


def add_options(command: argparse.ArgumentParser, *, sparsity: Sequence[float]) -> None:
    """The options of every analysis; ``sparsity`` is the default of that one."""
    add = command.add_argument
    add_material(command)
    add("--steps", type=int, default=0, help="of training each model (default: 0, as converted)")
    add("--lr", type=float, default=2e-4, help="peak learning rate (default: 2e-4)")
    add("--sparsity", type=float, nargs="+", default=list(sparsity), metavar="SHARE")
    add("--seeds", type=int, nargs="+", default=[0], help="of conversion and training, one model each")
    add("--set", action="append", default=[], metavar="[METHOD:]FIELD=VALUE", dest="fields", help="as often as needed")
    add_compile(command)
    add("--json", action="store_true", help="print the results as one JSON object in place of the table")


def add_checkpoints(command: argparse.ArgumentParser) -> None:
    """The option of analyses that take models which are there already."""
    text = "sparse checkpoint to look at as it is; may be given several times"
    command.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR", help=text)


class AnalysisJob(Job):
    """Makes a model as the comparison of methods does, but shows it before it is trained, if it is trained at all.

    Args:
        run: which model.
        material: what it is made from.
        before: called with the converted model; None: nobody looks.
        trains: whether it is trained.
    """

    def __init__(self, run: Run, material: Material, before: Callable[[Any], None] | None, trains: bool) -> None:
        super().__init__(run, material)
        self.before, self.trains = before, trains

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run, or what every recipe takes where none is done."""
        return super().steps if self.trains else 2

    def converted(self, method: str, how: Mapping[str, Any], convert: Callable[[Any], Any]) -> Any:
        """The model as ``convert`` makes it; not kept, since every variant would be."""
        model = self.material.dense()
        convert(model)
        return model

    def train(self, model: Any, config: Any, how: Callable[..., Any] = train, **options: Any) -> None:
        """One stage of training, if there is any."""
        if self.before is not None:
            self.before(model)
            self.before = None
        if self.trains:
            super().train(model, config, how, **options)


@dataclass(frozen=True)
class Part:
    """What is done once and kept.

    Attributes:
        name: begins the name of its file.
        about: all that decides what it gives.
        do: gives its rows, and what else there is to say.
    """

    name: str
    about: Mapping[str, Any]
    do: Callable[[], tuple[list[Row], Mapping[str, Any]]]


class Study:
    """One analysis as it was asked.

    Args:
        name: of the analysis.
        arguments: parsed, of :func:`add_options`.
        command_line: for the record.

    Raises:
        UserError: if an option is refused, or model or texts cannot be had.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, command_line: str) -> None:
        if arguments.steps < 0:
            raise UserError(f"--steps {arguments.steps} must not be negative: 0 trains nothing")
        check_positive({"lr": arguments.lr, "batch_tokens": arguments.batch_tokens})
        self.name, self.arguments, self.trains = name, arguments, arguments.steps > 0
        tokens = max(1, arguments.steps) * arguments.batch_tokens
        self.settings = settings_of(
            arguments, command_line, tokens=tokens, sparsities=arguments.sparsity, compile=arguments.compile
        )
        self.store = Store(self.settings.output)
        self.store.check_free()
        self._material: Material | None = None

    @property
    def material(self) -> Material:
        """Model and texts, loaded once."""
        if self._material is None:
            self._material = Material(self.settings)
        return self._material

    # --- models -------------------------------------------------------------------------------------------------------

    def fields(self, methods: Iterable[str]) -> dict[str, dict[str, Any]]:
        """``--set`` by method."""
        return changes(self.arguments.fields, {method: METHODS[method].fields for method in methods})

    def run(self, method: str, settings: Mapping[str, Any], seed: int) -> Run:
        """A model to make; methods with a model for each sparsity get the first of ``--sparsity``.

        Raises:
            UserError: if a setting is refused.
        """
        shares = self.settings.sparsities
        share = shares[0] if METHODS[method].per_sparsity else None
        if method == "ours":
            settings = {"low": shares[0], "high": shares[-1], **settings}
        found = Run(method, settings, self.arguments.lr, seed, share)
        check(found)
        return found

    def about(self, run: Run) -> dict[str, Any]:
        """All that decides what a model is like."""
        return {**describe(run, self.material), "trains": self.trains, "weights": self.material.model_key()}

    def make(self, run: Run, before: Callable[[Any], None] | None = None) -> tuple[Adapted, Mapping[str, Any]]:
        """A model, trained if there are steps, and what is to be said of its training."""
        job = AnalysisJob(run, self.material, before, self.trains)
        with as_user_error(ValueError):
            adapted = METHODS[run.method].adapt(job)
        return adapted, {"stages": job.configs, "training": job.training()} if self.trains else {}

    def checkpoints(self) -> dict[str, Path]:
        """``--checkpoint`` by name.

        Raises:
            UserError: if there is no such folder.
        """
        found = {}
        for text in self.arguments.checkpoint:
            name, equals, folder = text.partition("=")
            if not equals or not Path(folder).is_dir():
                raise UserError(f"--checkpoint {text} names no folder: write --checkpoint NAME=DIR")
            found[name] = Path(folder)
        return found

    def about_checkpoint(self, folder: Path) -> dict[str, Any]:
        """All that decides what is measured of a checkpoint."""
        same = {key: getattr(self.settings, key) for key in ("windows", "search_windows")}
        found = {"checkpoint": folder.name, "digest": digest_of_model(folder), **same}
        return {**found, "texts": self.material.fingerprints}

    def load(self, folder: Path) -> Any:
        """A sparse checkpoint in float32 on the device.

        Raises:
            UserError: if it is none, or reads other tokens than ``--model``.
        """
        model, tokenizer = load_model(str(folder))
        if not any(isinstance(module, RoutedExperts) for module in model.modules()):
            raise UserError(f"{folder} holds no sparse model: name a folder that prunepath train or sparsify wrote")
        if tokenizer.get_vocab() != self.material.tokenizer.get_vocab():
            raise UserError(f"{folder} reads other tokens than --model: name the model that it was made from")
        return model.float().to(self.settings.device).eval()

    def measured(self, model: Any, when: str) -> list[Row]:
        """Perplexity on every text at every sparsity, in rows that say when."""
        knob = TauKnob(model, self.settings.eval_rows)
        job = Job(Run("", {}, self.arguments.lr, 0, None), self.material)
        return [{"when": when, **row} for row in job.measure(Adapted(model, knob))]

    # --- parts and results --------------------------------------------------------------------------------------------

    def do(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """What each part gave, now or before; those that another process has in hand are left out, and said."""
        found = []
        for number, part in enumerate(parts, 1):
            about = {"analysis": self.name, **part.about}
            name = f"{self.name}-{part.name}-{digest(about)}"
            with self.store.claim(name) as mine:
                if mine and not self.store.has(name):
                    print(f"[{number}/{len(parts)}] {name}", file=sys.stderr, flush=True)
                    self.store.write(name, self._result(part, about))
                    _free(self.settings.device)
            done = self.store.read(name)
            if done is None:
                print(f"{name} is in hand elsewhere: run the same again for its part of the table", file=sys.stderr)
            else:
                found.append({"file": name, **done})
        if not found:
            raise UserError(f"no part is done yet in {self.settings.output}: wait for the other process")
        return found

    def _result(self, part: Part, about: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        rows: list[Row] = []
        more: Mapping[str, Any] = {}
        failed = None
        try:
            rows, more = part.do()
        except FloatingPointError as error:
            failed = str(error)
        seconds = round(time.perf_counter() - start, 2)
        found = {"analysis": self.name, "about": about, **origin(self.settings.command_line, self.settings.commit)}
        return {**found, "seconds": seconds, "failed": failed, "rows": rows, **more}

    def finish(
        self, parts: Sequence[Mapping[str, Any]], rows: Sequence[Row], lines: Sequence[str], plot: Callable[[Any], None]
    ) -> tuple[str, str]:
        """Write results, table and plot; the table and the results' JSON as text.

        Args:
            parts: as :meth:`do` answered.
            rows: over seeds.
            lines: the table.
            plot: draws into an empty figure.
        """
        drawn = figure(figsize=(11, 4.5))
        if drawn is not None:
            plot(drawn)
        budget = dataclasses.asdict(self.settings.budget) if self.trains else None
        about = {"analysis": self.name, "command_line": self.settings.command_line, **origins(parts)}
        about |= {"model": Path(self.settings.model).name, "budget": budget, "texts": self.material.fingerprints}
        failed = {part["file"]: part["failed"] for part in parts if part["failed"]}
        numbers = {**about, "rows": list(rows), "failed": failed, "parts": [part["file"] for part in parts]}
        numbers["plot"] = None if drawn is None else save(drawn, self.settings.output, STEM)
        notes = [f"- {key}: {'; '.join(about[key])}" for key in ("hardware", "versions", "commit")]
        notes += [f"- {about['model']}, " + (f"{self.arguments.steps} steps" if self.trains else "as converted")]
        notes += [f"- failed: {name}: {reason}" for name, reason in failed.items()]
        text = "\n".join([*lines, "", *notes])
        return text, write(self.settings.output, text, numbers, STEM)


def over_seeds(rows: Iterable[Row], by: Sequence[str], values: Sequence[str]) -> list[Row]:
    """One row for each combination of ``by``: of each value mean, least and most, and the number of rows.

    Rows keep the order of the first of their combination.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        {
            **dict(zip(by, key, strict=True)),
            **{name: dataclasses.asdict(spread_of([row[name] for row in group])) for name in values},
            "seeds": len(group),
        }
        for key, group in groups.items()
    ]


def shown(value: Mapping[str, float], digits: int = 2, scale: float = 1.0) -> str:
    """Mean, and least and most if they differ."""
    mean, least, most = (f"{scale * value[name]:.{digits}f}" for name in ("mean", "least", "most"))
    return mean if least == most else f"{mean} [{least}, {most}]"


def product(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every combination, each value once."""
    return list(itertools.product(*(list(dict.fromkeys(values)) for values in lists)))


def _free(device: str) -> None:
    gc.collect()  # hooks and models hold each other
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
