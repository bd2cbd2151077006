"""The tour: sparsify a model, measure quality and decoding speed against tau, save it, load it back, write with it.

It trades precision for time: a few thousand held-out tokens and short timed runs, so that two cores are enough.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch_prunepath.card import hub_name, write_card
from torch_prunepath.commands.options import QuickstartOptions
from torch_prunepath.console import report
from torch_prunepath.console.output import RESULTS, check_room, is_output_of, output_folder, say, writing
from torch_prunepath.console.plot import new_figure
from torch_prunepath.discover import discover
from torch_prunepath.evaluation.corpus import fit_and_test, load_corpus
from torch_prunepath.evaluation.models import (
    SMOLLM2,
    cache_folder,
    fetch,
    load_gguf,
    load_model,
    longest_context,
)
from torch_prunepath.evaluation.perplexity import decode_speed, perplexity
from torch_prunepath.inputs.check import check_ids
from torch_prunepath.inputs.front import as_batch, front_tokens
from torch_prunepath.sparsity import SparsityRecord

PROMPT = "The Python programming language is"
PROMPT_TOKENS = 16
"""Tokens read before decoding is timed: few, so that decoding is what takes the time."""

WRITTEN_TOKENS = 32
"""Tokens that the reloaded model writes: enough for a sentence."""


def run(options: QuickstartOptions, command_line: str = "") -> dict[str, Any]:
    """Do everything and return what was measured, ready for JSON.

    Raises:
        ValueError: if the model, the text or the output cannot be had, or the model cannot be made sparse.
    """
    import torch

    import torch_prunepath
    from torch_prunepath.config import SparsifyConfig

    started = time.perf_counter()
    taus, config = options.distinct_taus, SparsifyConfig(seed=options.seed)
    torch.manual_seed(options.seed)
    corpus = load_corpus(options.text)
    with output_folder(options.output, ours=is_output_of("quickstart")) as folder:
        say("loading the model")
        name, model, tokenizer = _get_model(options.model)
        check_room(folder, int(1.1 * report.num_bytes(model)), options.output)
        longest, tokens = longest_context(model), config.calibration_tokens
        fit_NC, test_NC = fit_and_test(corpus, tokenizer, longest=longest, tokens=tokens)
        for window_NC in (fit_NC, test_NC):
            check_ids(window_NC, model, tokenizer, "the text")
        choice: dict[str, Any] = {"include": options.include, "exclude": options.exclude}
        skipped = discover(model, **choice).report()
        rows, records = _measure(model, fit_NC, test_NC, taus, config, front_tokens(tokenizer), choice)
        tau = taus[len(taus) // 2]
        results: dict[str, Any] = {
            "command": "quickstart",
            **report.machine(),
            "model": report.model(name, model),
            "text": report.text(corpus.name, fit_NC, test_NC),
            "config": asdict(config),
            "skipped": skipped,
            "rows": rows,
            "checkpoint_tau": tau,
        }
        torch_prunepath.set_tau(model, tau)
        results |= _save_and_reload(model, tokenizer, test_NC, folder, options.output)
        with writing(options.output):
            base = None if options.model is None else hub_name(options.model)
            written = _on_card(rows, tau)
            write_card(model, folder / "checkpoint", base_model=base, record=records[tau], measured=written)
        results["plot"] = _plot(results["rows"], folder, options.output)
        results["output"] = str(options.output)
        results["seconds"] = round(time.perf_counter() - started, 1)
        with writing(options.output):
            (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    return results


def render(results: dict[str, Any]) -> str:
    """The results as people read them."""
    lines = [*report.heading(results), "", *report.table(results["rows"]), ""]
    lines += [f'the reloaded checkpoint writes: "{results["generated"]}"', ""]
    lines += [f"checkpoint  {results['checkpoint']} (tau {results['checkpoint_tau']:g}; logits equal after reloading)"]
    lines += [f"plot        {results['plot'] or 'none: matplotlib is not installed'}"]
    lines += report.skipped(results["skipped"])
    lines += [f"time        {results['seconds']:.0f} s"]
    return "\n".join(lines)


def _get_model(name: str | None) -> tuple[str, Any, Any]:
    if name is None:
        return SMOLLM2.name, *load_gguf(fetch(SMOLLM2, cache_folder()))
    return name, *load_model(name)


def _on_card(rows: Sequence[dict[str, Any]], tau: float) -> dict[str, str]:
    """What the model card tells besides the sparsity of each layer."""
    dense, *sparse = rows
    (row,) = [row for row in sparse if row["tau"] == tau]
    return {
        "tau": f"{tau:.6g}",
        "perplexity": f"{row['perplexity']:.2f}",
        "perplexity, dense": f"{dense['perplexity']:.2f}",
    }


def _measure(
    model: Any,
    fit_NC: Any,
    test_NC: Any,
    taus: Sequence[float],
    config: Any,
    front: int,
    choice: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[float, SparsityRecord]]:
    """Make the model sparse; return a row for the dense model and one for each tau, and the records of each tau."""
    import torch_prunepath

    prompt_1P = test_NC[:1, :PROMPT_TOKENS]

    def row(name: str, tau: float, sparsity: float, quality: float) -> dict[str, Any]:
        speed = decode_speed(model, prompt_1P, title=f"{name}: decoding")
        say(f"{name}: sparsity {sparsity:.1%}, perplexity {quality:.2f}, {speed:.1f} tokens/s")
        return {
            "name": name,
            "tau": tau,
            "sparsity": round(sparsity, 4),
            "perplexity": round(quality, 3),
            "tokens_per_second": round(speed, 2),
        }

    dense = perplexity(model, test_NC, front_tokens=front, title="dense: perplexity")
    rows = [row("dense", 1.0, 0.0, dense)]
    say("building experts and fitting routers")
    torch_prunepath.sparsify(model, tau=taus[0], config=config, calibration=as_batch(fit_NC, front), **choice)
    records = {}
    for tau in taus:
        torch_prunepath.set_tau(model, tau)
        name = f"tau {tau:g}"
        with torch_prunepath.record_sparsity(model, front_tokens=front) as record:
            quality = perplexity(model, test_NC, front_tokens=front, title=f"{name}: perplexity")
        records[tau] = record
        rows.append(row(name, tau, record.sparsity, quality))
    return rows, records


def _save_and_reload(model: Any, tokenizer: Any, test_NC: Any, folder: Path, output: Path) -> dict[str, Any]:
    """Save the checkpoint, load it back, compare logits, write with it."""
    import torch

    import torch_prunepath

    say("saving the checkpoint and loading it back")
    with writing(output):
        model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")
    reloaded = torch_prunepath.load(folder / "checkpoint")
    with torch.inference_mode():
        equal = torch.equal(model(input_ids=test_NC[:1]).logits, reloaded(input_ids=test_NC[:1]).logits)
    if not equal:
        raise RuntimeError("the reloaded checkpoint computes other logits than the model that was saved")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        written = reloaded.generate(
            prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=WRITTEN_TOKENS,
            do_sample=False,
        )
    return {
        "checkpoint": str(output / "checkpoint"),
        "reloaded_logits_equal": equal,
        "generated": _first_sentence(tokenizer.decode(written[0], skip_special_tokens=True)),
    }


def _first_sentence(text: str) -> str:
    """Up to the first full stop that white space follows; all of it, on one line, if there is none."""
    text = " ".join(text.split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def _plot(rows: Sequence[dict[str, Any]], folder: Path, output: Path) -> str | None:
    """Save the plot; None, and a line that says how to get it, where matplotlib is missing."""
    figure = new_figure(9, 3.6)
    if figure is None:
        return None
    dense, *sparse = rows
    panels = (("perplexity", "held-out perplexity"), ("tokens_per_second", "decoded tokens/s"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.axhline(dense[key], color="0.6", linestyle="--", label="dense")
        axes.plot([100 * row["sparsity"] for row in sparse], [row[key] for row in sparse], "o-", label="sparse")
        for row in sparse:
            axes.annotate(f"{row['tau']:g}", (100 * row["sparsity"], row[key]), (3, 4), textcoords="offset points")
        axes.set(xlabel="inactive share of FFN neurons (%); labels: tau", ylabel=label)
        axes.legend()
    with writing(output):
        figure.savefig(folder / "quickstart.png", dpi=150)
    return str(output / "quickstart.png")
