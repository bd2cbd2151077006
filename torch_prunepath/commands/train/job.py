"""The work of ``prunepath train``: a model, dense or sparse, trained and measured, as a checkpoint.

An unfinished run keeps its latest state in a folder beside the output, from which it goes on to the same result.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_prunepath.card import hub_name, write_card
from torch_prunepath.commands.train import plan
from torch_prunepath.commands.train.options import TrainOptions
from torch_prunepath.commands.train.source import Source, train_windows
from torch_prunepath.commands.train.unfinished import Kept, Unfinished, undamaged
from torch_prunepath.console import report
from torch_prunepath.console.errors import UserError, as_user_error, one_line
from torch_prunepath.console.options import flag
from torch_prunepath.console.output import check_room, output_folder, writing
from torch_prunepath.conversion import sparsify
from torch_prunepath.discover import discover
from torch_prunepath.evaluation.corpus import TEST_WINDOWS, windows
from torch_prunepath.evaluation.make_sparse import reach_sparsity, search_windows
from torch_prunepath.evaluation.models import load_model, longest_context
from torch_prunepath.evaluation.perplexity import perplexity
from torch_prunepath.inputs.check import check_ids
from torch_prunepath.inputs.front import as_batch, front_tokens
from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.saving import describe
from torch_prunepath.sparsity import SparsityRecord, record_sparsity, set_tau
from torch_prunepath.train.batches import Batches
from torch_prunepath.train.loop import steps_of, train
from torch_prunepath.train.state import Record, TrainState

EVAL_WINDOWS = 8 * TEST_WINDOWS
"""Most windows that perplexity is measured on: enough to tell recipes apart, and little beside the training."""

STATE_BYTES = 16
"""Bytes of a saved state for each parameter: the weight and AdamW's two moments in float32, and room to write anew."""


def run(options: TrainOptions, command_line: str = "") -> dict[str, Any]:
    """Train, measure, save; return what was made, ready for JSON.

    Raises:
        ValueError: if the model, the text or the output cannot be had, or options do not fit.
    """
    plan.check(options)
    unfinished = Unfinished(options.output.absolute())
    unfinished.check(options.resume)
    text = plan.source_of(options).read()
    with output_folder(options.output, ours=lambda _: False) as folder:
        saved = unfinished.latest()
        session = _Session(options, text, saved)
        check_room(folder, session.bytes_needed(), options.output)
        try:
            results = session.run(unfinished)
        except FloatingPointError as error:
            raise UserError(f"{one_line(error)} (--lr, --router-lr, --set warmup=0.1)") from error
        except BaseException:
            if unfinished.latest() is not None:
                print(f"unfinished run kept in {unfinished.folder}: go on with --resume", file=sys.stderr)
            raise
        results = {"command": "train", "command_line": command_line, **report.machine(), **results}
        history = results.pop("history")
        with writing(options.output):
            session.model.save_pretrained(folder)
            session.tokenizer.save_pretrained(folder)
            described = json.dumps({**results, "history": history}, indent=1, allow_nan=False)
            (folder / "training.json").write_text(described + "\n", encoding="utf-8")
            base, measured = hub_name(options.model), _on_card(results)
            write_card(session.model, folder, base_model=base, record=session.record, measured=measured)
    unfinished.remove()
    return results


class _Session:
    def __init__(self, options: TrainOptions, text: str, saved: Path | None) -> None:
        self.options, self.saved = options, saved
        self.record: SparsityRecord | None = None  # of what was measured last
        if saved is None:
            self.model, self.tokenizer = load_model(options.model)
        else:
            with undamaged(saved):
                self.model, self.tokenizer = load_model(str(saved / "model"))
        self.sparse = any(isinstance(module, RoutedExperts) for module in self.model.modules())
        if self.sparse and saved is None and options.about_experts:
            given = flag(options.about_experts[0])
            raise UserError(f"{options.model} is sparse already: leave {given} out, or start from the dense model")
        context = min(options.context, longest_context(self.model))
        self.window_NC = train_windows(text, self.tokenizer, context)
        check_ids(self.window_NC, self.model, self.tokenizer, "the text")
        self.eval_NC = self._eval_windows(context)
        if self.eval_NC is not None:
            check_ids(self.eval_NC, self.model, self.tokenizer, "the text of --eval-text")
        self.front = front_tokens(self.tokenizer)
        self.batches = Batches(self.window_NC, options.batch, options.seed, self.front)
        distil = plan.distillation(options, dense=not self.sparse or options.teacher is not None)
        self.kept = Kept(self.batches.fingerprint(), str(self.model.dtype).removeprefix("torch."), distil, [], [])
        if saved is not None:
            self._restore(saved)
        self.config = plan.training(options, len(self.batches), self.kept.distil)
        self.teacher = self._teacher()
        with as_user_error(RuntimeError):
            self.model.to(plan.device_of(options))

    def _eval_windows(self, context: int) -> Tensor | None:
        if self.options.eval_text is None:
            return None
        text = Source(self.options.eval_text).read()
        return windows(text, self.tokenizer, context=context, count=EVAL_WINDOWS, part="--eval-text")

    def _teacher(self) -> Any:
        options = self.options
        if not self.kept.distil:
            return None
        teacher, _ = load_model(options.teacher or options.model)
        if any(isinstance(module, RoutedExperts) for module in teacher.modules()):
            raise UserError(f"{options.teacher or options.model} is sparse: name the dense model with --teacher")
        if teacher.get_input_embeddings().num_embeddings != self.model.get_input_embeddings().num_embeddings:
            raise UserError("--teacher has another vocabulary than MODEL: name the model that MODEL was made from")
        with as_user_error(RuntimeError):
            return teacher.to(plan.device_of(options))

    def _restore(self, saved: Path) -> None:
        with undamaged(saved):
            kept = Kept.of(saved)
        if kept.data != self.kept.data:
            raise UserError(
                "the unfinished run had other data (text, --context, --batch or --seed): give the same, or start anew"
            )
        if self.options.distil is not None:
            kept.distil = self.options.distil  # another one is refused with the state
        self.kept = kept

    def bytes_needed(self) -> int:
        """Bytes that the run takes on disk while it is unfinished."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return int(1.1 * report.num_bytes(self.model)) + STATE_BYTES * parameters

    def run(self, unfinished: Unfinished) -> dict[str, Any]:
        """Make sparse, measure, train, measure; what was found."""
        options = self.options
        if self.saved is None:
            self._before()
        made = describe(self.model).config
        self.model.float()
        if options.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._train(unfinished)
        self.teacher = None
        if options.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.to(getattr(torch, self.kept.dtype)).eval()
        rows = [*self.kept.rows, *self._measured("after")]
        history = self.kept.history
        return {
            "model": report.model(options.model, self.model),
            "recipe": options.recipe,
            "teacher": (options.teacher or options.model) if self.kept.distil else None,
            "config": self.config.to_dict(),
            "experts": asdict(made),
            "skipped": self.kept.skipped,
            "data": {
                "name": plan.source_of(options).name,
                "context": self.window_NC.shape[1],
                "tokens": self.window_NC.numel(),
            },
            "eval": None if self.eval_NC is None else {"name": options.eval_text, "tokens": self.eval_NC.numel()},
            "device": plan.device_of(options),
            "steps": len(history),
            "target_sparsity": options.target_sparsity,
            "tau": rows[-1]["tau"],
            "rows": rows,
            "last": history[-1],
            "output": str(options.output),
            "history": history,
        }

    def _train(self, unfinished: Unfinished) -> None:
        """Train, from the saved state if there is one."""
        steps, state = steps_of(self.config, self.batches), TrainState(self.model, self.config)
        if self.saved is not None:
            with undamaged(self.saved):
                held = torch.load(self.saved / "state.pt", map_location="cpu", weights_only=True)
            state.load_state_dict(held)

        def note(state: TrainState, record: Record) -> None:
            self.kept.history.append(record)
            if state.step % self.options.save_every == 0 and state.step < steps:
                unfinished.save(self.model, self.tokenizer, self.kept, state)

        extras = {"teacher": self.teacher, "state": state, "compile": self.options.compile or False}
        train(self.model, self.batches, self.config, callback=note, **extras)

    def _before(self) -> None:
        """Make a dense model sparse; measure."""
        if not self.sparse:
            if self.eval_NC is not None:
                self.kept.rows.append({"name": "dense", "tau": 1.0, **self._perplexity("dense")})
            self._convert()
        self.kept.rows += self._measured("before")

    def _convert(self) -> None:
        config, data = plan.experts(self.options), None
        if config.needs_data:
            rows = max(1, config.calibration_tokens // self.window_NC.shape[1])
            some_N = torch.linspace(0, len(self.window_NC) - 1, min(rows, len(self.window_NC))).round().long()
            data = as_batch(self.window_NC[some_N].to(self.model.device), self.front)
        choice: dict[str, Any] = {"include": self.options.include, "exclude": self.options.exclude}
        self.kept.skipped = discover(self.model, **choice).report()
        sparsify(self.model, config=config, calibration=data, **choice)

    def _measured(self, when: str) -> list[dict[str, Any]]:
        """With every expert, then at the target, where tau stays."""
        rows = []
        if self.eval_NC is not None:
            set_tau(self.model, 1.0)
            rows.append({"name": f"{when}, tau 1", "tau": 1.0, **self._perplexity(f"{when}, tau 1")})
        target = self.options.target_sparsity
        tau = reach_sparsity(self.model, target, self.window_NC, self.front)
        name = f"{when}, {target:.0%} asked"
        if self.eval_NC is not None:
            return [*rows, {"name": name, "tau": tau, **self._perplexity(name)}]
        with record_sparsity(self.model, front_tokens=self.front) as self.record, torch.inference_mode():
            for window_C in search_windows(self.window_NC).to(self.model.device):
                self.model(input_ids=window_C[None], use_cache=False)
        return [*rows, {"name": name, "tau": tau, "sparsity": self.record.sparsity}]

    def _perplexity(self, title: str) -> dict[str, float]:
        if not any(isinstance(module, RoutedExperts) for module in self.model.modules()):
            return {"sparsity": 0.0, "perplexity": self._measure_perplexity(title)}
        with record_sparsity(self.model, front_tokens=self.front) as self.record:
            found = self._measure_perplexity(title)
        return {"sparsity": self.record.sparsity, "perplexity": found}

    def _measure_perplexity(self, title: str) -> float:
        assert self.eval_NC is not None
        return perplexity(self.model, self.eval_NC, front_tokens=self.front, title=title)


def _distilled(results: Mapping[str, Any]) -> str:
    weight = results["config"]["distill_logits"]
    return f", distilled from {results['teacher']} (weight {weight:g})" if weight else ""


def _on_card(results: Mapping[str, Any]) -> dict[str, str]:
    """What the model card tells besides the sparsity of each layer."""
    rows = {row["name"]: row for row in results["rows"] if "perplexity" in row}
    measured = {"recipe": f"{results['recipe']}, {results['steps']} steps", "tau": f"{results['tau']:.6g}"}
    return measured | {f"perplexity, {name}": f"{row['perplexity']:.2f}" for name, row in rows.items()}


def render(results: Mapping[str, Any]) -> str:
    """The results of :func:`run` as people read them."""
    model, data, last = results["model"], results["data"], results["last"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"model       {model['name']} ({model['parameters'] / 1e6:.1f} M parameters, {model['dtype']})",
        f"data        {data['name']} ({data['tokens']} tokens, context {data['context']})",
        f"recipe      {results['recipe']}, {results['steps']} steps on {results['device']}{_distilled(results)}",
        f"versions    {versions}",
        f"last step   loss {last['loss']:.4g}, sparsity {last['sparsity']:.1%}, tau {last['tau']:.4g}",
    ]
    if results["eval"] is not None:
        head = ("", "tau", "sparsity", "perplexity")
        cells = [
            (row["name"], f"{row['tau']:.6g}", f"{row['sparsity']:.1%}", f"{row['perplexity']:.2f}")
            for row in results["rows"]
        ]
        lines += ["", *report.aligned([head, *cells]), ""]
    lines += [f"tau         {results['tau']:.6g}", f"checkpoint  {results['output']}"]
    lines += report.skipped(results["skipped"])
    return "\n".join(lines)
