"""The tour: sparsify a model, measure quality and speed against tau or bytes, save it, load it back, write with it.

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
from torch_prunepath.commands.points import Point
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

    from torch_prunepath.config import SparsifyConfig

    started = time.perf_counter()
    points, config = options.points, SparsifyConfig(seed=options.seed)
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
        rows, records = _measure(model, fit_NC, test_NC, points, config, front_tokens(tokenizer), choice)
        middle = points[len(points) // 2]
        results: dict[str, Any] = {
            "command": "quickstart",
            **report.machine(),
            "model": report.model(name, model),
            "text": report.text(corpus.name, fit_NC, test_NC),
            "config": asdict(config),
            "skipped": skipped,
            "rows": rows,
            "checkpoint_tau": middle.tau,
            **({} if middle.bytes is None else {"checkpoint_bytes": middle.bytes}),
        }
        _move_to(model, middle)
        results |= _save_and_reload(model, tokenizer, test_NC, folder, options.output)
        with writing(options.output):
            base = None if options.model is None else hub_name(options.model)
            written = _on_card(rows, middle)
            write_card(model, folder / "checkpoint", base_model=base, record=records[middle], measured=written)
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
    tau = results["checkpoint_tau"]
    place = f"bytes {results['checkpoint_bytes']:g}" if tau is None else f"tau {tau:g}"
    lines += [f"checkpoint  {results['checkpoint']} ({place}; logits equal after reloading)"]
    lines += [f"plot        {results['plot'] or 'none: matplotlib is not installed'}"]
    lines += report.skipped(results["skipped"])
    lines += [f"time        {results['seconds']:.0f} s"]
    return "\n".join(lines)


def _get_model(name: str | None) -> tuple[str, Any, Any]:
    if name is None:
        return SMOLLM2.name, *load_gguf(fetch(SMOLLM2, cache_folder()))
    return name, *load_model(name)


def _on_card(rows: Sequence[dict[str, Any]], point: Point) -> dict[str, str]:
    """What the model card tells besides the sparsity of each layer."""
    dense, *sparse = rows
    (row,) = [row for row in sparse if row["name"] == point.name]
    return {
        **({} if point.tau is None else {"tau": f"{point.tau:.6g}"}),
        **({} if point.bytes is None else {"bytes of FFNs read": f"{row['bytes']:.1%}"}),
        "perplexity": f"{row['perplexity']:.2f}",
        "perplexity, dense": f"{dense['perplexity']:.2f}",
    }


def _move_to(model: Any, point: Point) -> None:
    """Set the model's tau, or its budget along the path that was measured."""
    import torch_prunepath

    if point.bytes is not None:
        torch_prunepath.set_budget(model, point.bytes)
    else:
        torch_prunepath.set_tau(model, point.asked)


def _measure(
    model: Any,
    fit_NC: Any,
    test_NC: Any,
    points: Sequence[Point],
    config: Any,
    front: int,
    choice: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], dict[Point, SparsityRecord]]:
    """Make the model sparse; return a row for the dense model and one for each point, and the records of each point."""
    import torch_prunepath
    from torch_prunepath.evaluation.make_sparse import reach_bytes

    prompt_1P = test_NC[:1, :PROMPT_TOKENS]

    def row(name: str, tau: float | None, sparsity: float, read: float, quality: float) -> dict[str, Any]:
        speed = decode_speed(model, prompt_1P, title=f"{name}: decoding")
        say(f"{name}: sparsity {sparsity:.1%}, bytes read {read:.1%}, perplexity {quality:.2f}, {speed:.1f} tokens/s")
        return {
            "name": name,
            "tau": tau,
            "sparsity": round(sparsity, 4),
            "bytes": round(read, 4),
            "perplexity": round(quality, 3),
            "tokens_per_second": round(speed, 2),
        }

    dense = perplexity(model, test_NC, front_tokens=front, title="dense: perplexity")
    rows = [row("dense", 1.0, 0.0, 1.0, dense)]
    say("building experts and fitting routers")
    torch_prunepath.sparsify(
        model, tau=points[0].tau or 1.0, config=config, calibration=as_batch(fit_NC, front), **choice
    )
    if points[0].bytes is not None:
        say("measuring what settings save and cost")
        reach_bytes(model, 1.0, fit_NC, front)
    records = {}
    for point in points:
        _move_to(model, point)
        name = point.name
        with torch_prunepath.record_sparsity(model, front_tokens=front) as record:
            quality = perplexity(model, test_NC, front_tokens=front, title=f"{name}: perplexity")
        records[point] = record
        asked = {} if point.bytes is None else {"target_bytes": point.bytes}
        rows.append(row(name, point.tau, record.sparsity, record.shares.bytes, quality) | asked)
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
    key, what = (
        ("bytes", "FFN bytes read") if "target_bytes" in sparse[0] else ("sparsity", "inactive share of FFN neurons")
    )
    shares, label = [100 * row[key] for row in sparse], "bytes asked for" if key == "bytes" else "tau"
    panels = (("perplexity", "held-out perplexity"), ("tokens_per_second", "decoded tokens/s"))
    for axes, (metric, title) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.axhline(dense[metric], color="0.6", linestyle="--", label="dense")
        axes.plot(shares, [row[metric] for row in sparse], "o-", label="sparse")
        for row, share in zip(sparse, shares, strict=True):
            place = f"{row.get('target_bytes', row['tau']):g}"
            axes.annotate(place, (share, row[metric]), (3, 4), textcoords="offset points")
        axes.set(xlabel=f"{what} (%); labels: {label}", ylabel=title)
        axes.legend()
    with writing(output):
        figure.savefig(folder / "quickstart.png", dpi=150)
    return str(output / "quickstart.png")
