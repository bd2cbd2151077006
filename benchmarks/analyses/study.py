"""What the analyses share: options, models as the comparison of methods makes them, parts done once, results."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.harness import METHODS, Job, Trained
from benchmarks.harness.jobs import check_positive, check_shares
from benchmarks.harness.knobs import TauKnob
from benchmarks.harness.methods import check
from benchmarks.harness.options import add_training, check_device, dispatch, run_and_report, settings_of
from benchmarks.harness.parts import Part, Worker, bar_of
from benchmarks.harness.report import figure, origins, save, write
from benchmarks.harness.store import Record, Store, digest, digest_of_model, read_json, records_of
from benchmarks.harness.task import Row
from benchmarks.harness.work import Work
from benchmarks.tasks.books import BooksTask, add_task, task_of
from torch_prunepath.console.errors import UserError, as_user_error
from torch_prunepath.evaluation.models import load_model
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.train.compiling import check_how

STEM = "results"
CONVERTED, TRAINED = "converted", "trained"
Rows = Callable[[str, Any], list[Row]]
"""Measures a model, which has a name."""


def add_options(command: argparse.ArgumentParser, *, sparsity: Sequence[float]) -> None:
    """The options of every analysis; ``sparsity`` is the default of that one."""
    add_training(command)
    add_task(command)
    add = command.add_argument
    add("--steps", type=int, default=0, help="of training each model (default: 0, as converted)")
    add("--lr", type=float, default=2e-4, help="peak learning rate (default: 2e-4)")
    add("--sparsity", type=float, nargs="+", default=list(sparsity), metavar="SHARE")


def add_checkpoints(command: argparse.ArgumentParser) -> None:
    """The option of analyses that take models which are there already."""
    text = "sparse checkpoint to look at as it is; may be given several times"
    command.add_argument("--checkpoint", action="append", default=[], metavar="NAME=DIR", help=text)


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
        check_positive({"lr": arguments.lr})
        check_shares(arguments.sparsity)
        check_device(arguments.device)
        with as_user_error(ValueError):
            check_how(arguments.compile or False)
        self.name, self.arguments, self.trains = name, arguments, arguments.steps > 0
        self.shares = tuple(sorted(set(arguments.sparsity)))
        store = Store(arguments.output)
        store.check_free()
        self.worker = Worker(store, command_line, arguments.commit)
        self.task: BooksTask = task_of(arguments)

    # --- models -------------------------------------------------------------------------------------------------------

    def settings(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """``--set`` by method."""
        return settings_of(self.arguments.fields, methods)

    def job(self, method: str, settings: Mapping[str, Any], seed: int) -> Job:
        """A model to make; methods with a model for each sparsity get the first of ``--sparsity``.

        Raises:
            UserError: if a setting is refused.
        """
        a, task, shares = self.arguments, self.task, self.shares
        if method == "ours":
            settings = {"low": shares[0], "high": shares[-1], **settings}
        shares = shares[:1] if METHODS[method].each else shares
        how = {"autocast": a.bf16, "compile": a.compile, "seconds": None}
        about = {"model": task.model, "weights": task.weights, "about": task.about}
        job = Job(task.name, method, dict(settings), shares, a.lr, seed, a.steps, None, **how, **about)
        check(Work(job, task, nn.Identity(), trains=self.trains))
        return job

    def make(self, job: Job, record: Record, before: Callable[[Any], None] | None = None) -> Trained:
        """A model, trained if there are steps, and shown before that; the record gets what training says."""
        # Conversions are not kept, since every variant would be.
        work = Work(job, self.task, self.task.fresh(job.seed), trains=self.trains, before=before)
        trained = METHODS[job.method].train(work)
        if self.trains:
            training = work.training
            record |= {"stages": training.stages, "training": training.summary(self.task.step_tokens)}
        return trained

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

    def load(self, folder: Path) -> Any:
        """A sparse checkpoint in float32 on the device.

        Raises:
            UserError: if it is none, or reads other tokens than ``--model``.
        """
        model, tokenizer = load_model(str(folder))
        if not any(isinstance(module, RoutedExperts) for module in model.modules()):
            raise UserError(f"{folder} holds no sparse model: name a folder that prunepath train or sparsify wrote")
        if tokenizer.get_vocab() != self.task.tokenizer.get_vocab():
            raise UserError(f"{folder} reads other tokens than --model: name the model that it was made from")
        return model.float().to(self.arguments.device).eval()

    def measured(self, model: Any, when: str) -> list[Row]:
        """Perplexity on every text at every sparsity, in rows that say when."""
        return [{"when": when, **row} for row in self.task.evaluate(Trained(model, TauKnob(model)), self.shares)]

    # --- parts --------------------------------------------------------------------------------------------------------

    def part(self, name: str, about: Mapping[str, Any], rows: Callable[[Record], list[Row]]) -> Part:
        """What is done once.

        Args:
            name: begins the name of its file, behind that of the analysis.
            about: all that decides what it gives.
            rows: measures; may add to the record that it is given.
        """
        about = {"analysis": self.name, **about}

        def do(record: Record) -> None:
            record["rows"] = rows(record)

        decides = {key: value for key, value in about.items() if key != "model"}
        whole = {"analysis": self.name, "about": about}
        return Part(f"{self.name}-{name}-{digest(decides)}", whole, do)

    def about(self, job: Job) -> dict[str, Any]:
        """All that decides what a model is like."""
        return {**dataclasses.asdict(job), "trains": self.trains}

    def models(self, methods: Sequence[str], common: Mapping[str, Any], rows: Rows, **more: Any) -> list[Part]:
        """Parts that measure a model for each method and seed, and what ``--checkpoint`` names.

        Args:
            methods: that make models.
            common: settings of all of them, which ``--set`` precedes.
            rows: measures a model of a name.
            **more: decides besides the model what is measured.
        """
        fields, found = self.settings(methods), []
        for method, seed in product(methods, self.arguments.seeds):
            job = self.job(method, {**common, **fields[method]}, seed)

            def made(record: Record, job: Job = job) -> list[Row]:
                return rows(job.method, self.make(job, record).model)

            found.append(self.part(f"{method}-seed{seed}", {**self.about(job), **more}, made))
        for name, folder in self.checkpoints().items():

            def loaded(record: Record, name: str = name, folder: Path = folder) -> list[Row]:
                return rows(name, self.load(folder))

            about = {"checkpoint": folder.name, "digest": digest_of_model(folder), "name": name, **more}
            found.append(self.part(name, {**about, "model": self.task.model, "about": self.task.about}, loaded))
        return found

    def do(self, parts: Sequence[Part]) -> dict[str, Record]:
        """Records of the parts by name, those that are not there yet being made.

        Raises:
            UserError: if all are in hand elsewhere, or a setting is refused.
        """
        found = {}
        with bar_of(len(parts)) as bar:
            for part in parts:
                record = self.worker.do(part, bar)
                if record is None:
                    text = f"{part.name} is in hand elsewhere: run the same again for its part of the table"
                    print(text, file=sys.stderr)
                else:
                    found[part.name] = record
        if not found:
            raise UserError(f"no part is done yet in {self.arguments.output}: wait for the other process")
        return found


def product(*lists: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every combination, each value once."""
    return list(itertools.product(*(list(dict.fromkeys(values)) for values in lists)))


# --- reports and commands ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: of the command.
        about: its help.
        add_arguments: adds its options to a command line.
        check: refuses options before anything is loaded.
        plan: its parts.
        summary: rows over seeds, of the rows of all parts.
        table: the lines of the tables of these rows.
        plot: draws these rows into an empty figure.
    """

    name: str
    about: str | None
    add_arguments: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None]
    plan: Callable[[Study], list[Part]]
    summary: Callable[[Sequence[Row]], list[Row]]
    table: Callable[[Sequence[Row]], list[str]]
    plot: Callable[[Any, Sequence[Row]], None]

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run a command; the exit code."""
        parser = run_and_report(self.name, self.about, self.add_arguments)
        return dispatch(self.name, parser, {"run": self._run, "report": self._report}, argv)

    def _run(self, arguments: argparse.Namespace, command_line: str) -> str:
        self.check(arguments)
        study = Study(self.name, arguments, command_line)
        text, encoded = self._finish(arguments.output, study.do(self.plan(study)))
        return encoded if arguments.json else text

    def _report(self, arguments: argparse.Namespace, _: str) -> str:
        place: Path = arguments.place
        if place.is_file() and "runs" not in (whole := read_json(place)):
            # Rows over seeds, as earlier versions kept them without the runs that they came from.
            return json.dumps(whole["rows"]) if arguments.json else "\n".join(self.table(whole["rows"]))
        own = {name: record for name, record in records_of(place).items() if "analysis" in record}
        if not own:
            raise UserError(f"{place} holds no results of an analysis: name the folder that -o of run named")
        text, encoded = self._finish(place, own)
        return encoded if arguments.json else text

    def _finish(self, place: Path, records: Mapping[str, Record]) -> tuple[str, str]:
        """Write results, table and plot; the table and the results' JSON as text."""
        rows = self.summary([row for record in records.values() for row in record["rows"]])
        missing = [_unreachable(row) for record in records.values() for row in record["rows"] if "unreachable" in row]
        drawn = figure(figsize=(11, 4.5)) if rows else None
        if drawn is not None:
            self.plot(drawn, rows)
        said = {"command_line": sorted({record["command_line"] for record in records.values()})}
        said |= origins(records.values())
        failed = {name: record["failed"] for name, record in records.items() if record.get("failed")}
        numbers = {"analysis": self.name, **said, "rows": rows, "failed": failed, "parts": list(records)}
        numbers["plot"] = None if drawn is None else save(drawn, place, STEM)
        notes = [f"- {key}: {'; '.join(said[key])}" for key in ("hardware", "versions", "commit")]
        notes += [f"- {made}" for made in sorted({_made_of(record["about"]) for record in records.values()})]
        notes += [f"- failed: {name}: {reason}" for name, reason in failed.items()]
        text = "\n".join([*self.table(rows), *(["", *missing] if missing else []), "", *notes])
        return text, write(place, text, numbers, STEM)


def _made_of(about: Mapping[str, Any]) -> str:
    """The model of a part, and for how long it was trained."""
    if not about.get("trains"):
        return f"{about.get('model', 'the dense model')}, as converted"
    budget = about.get("budget")  # of a record that an earlier version wrote
    steps = about["steps"] if budget is None else budget["tokens"] // budget["batch_tokens"]
    return f"{about['model']}, {steps} steps"


def _unreachable(row: Row) -> str:
    place = ", ".join(str(row[key]) for key in ("variant", "when", "text") if key in row)
    return f"- {place}: {row['asked']:.0%} is out of reach, {row['unreachable']}"
