"""The work of ``prunepath sparsify``: a sparse checkpoint, measured on text that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch_prunepath.card import hub_name, write_card
from torch_prunepath.commands.options import SparsifyOptions
from torch_prunepath.console import report
from torch_prunepath.console.output import check_room, output_folder, say, writing
from torch_prunepath.discover import discover
from torch_prunepath.evaluation.corpus import fit_and_test, load_corpus
from torch_prunepath.evaluation.make_sparse import in_force, model_tau, reach_bytes, reach_sparsity
from torch_prunepath.evaluation.models import load_model, longest_context
from torch_prunepath.evaluation.perplexity import perplexity
from torch_prunepath.inputs.check import check_ids
from torch_prunepath.inputs.front import as_batch, front_tokens


def run(options: SparsifyOptions, command_line: str = "") -> dict[str, Any]:
    """Sparsify, measure, save; return what was made, ready for JSON.

    Raises:
        ValueError: if the model, the text or the output cannot be had, or settings do not fit the model.
    """
    import torch_prunepath

    config = options.config
    tau: float | None = options.tau
    corpus = load_corpus(options.text)
    with output_folder(options.output, ours=lambda _: False) as folder:
        model, tokenizer = load_model(options.model)
        check_room(folder, int(1.1 * report.num_bytes(model)), options.output)
        longest, tokens = longest_context(model), config.calibration_tokens
        fit_NC, test_NC = fit_and_test(corpus, tokenizer, longest=longest, tokens=tokens)
        for window_NC in (fit_NC, test_NC):
            check_ids(window_NC, model, tokenizer, "the text")
        front = front_tokens(tokenizer)
        results: dict[str, Any] = {
            "command": "sparsify",
            **report.machine(),
            "model": report.model(options.model, model),
            "text": report.text(corpus.name, fit_NC, test_NC),
            "config": asdict(config),
            "output": str(options.output),
        }
        dense = perplexity(model, test_NC, front_tokens=front, title="dense: perplexity")
        data = as_batch(fit_NC, front) if config.needs_data else None
        choice: dict[str, Any] = {"include": options.include, "exclude": options.exclude}
        results["skipped"] = discover(model, **choice).report()
        torch_prunepath.sparsify(model, tau=options.tau, config=config, calibration=data, **choice)
        if options.sparsity is not None:
            tau = reach_sparsity(model, options.sparsity, fit_NC, front)
        if options.bytes is not None:
            say(f"measuring what settings save and cost, for {options.bytes:g} of the bytes")
            reach_bytes(model, options.bytes, fit_NC, front)
            tau = model_tau(model)
        with torch_prunepath.record_sparsity(model, front_tokens=front) as record:
            sparse = perplexity(model, test_NC, front_tokens=front, title="sparse: perplexity")
        results |= {"tau": tau, "sparsity": record.sparsity, "perplexity": sparse, "dense_perplexity": dense}
        results |= {"target_bytes": options.bytes, "bytes": record.shares.bytes, **in_force(model)}
        with writing(options.output):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            written = {} if tau is None else {"tau": f"{tau:.6g}"}
            written |= {"bytes of FFNs read": f"{record.shares.bytes:.1%}"} if options.bytes is not None else {}
            written |= {"perplexity": f"{sparse:.2f}", "perplexity, dense": f"{dense:.2f}"}
            write_card(model, folder, base_model=hub_name(options.model), record=record, measured=written)
    return results


def render(results: Mapping[str, Any]) -> str:
    """The results of :func:`run` as people read them."""
    asked = "" if results["target_bytes"] is None else f" ({results['target_bytes']:.1%} asked for)"
    lines = [
        *report.heading(results),
        *report.settings(results["tau"], results),
        f"sparsity    {results['sparsity']:.1%} of FFN neurons inactive on held-out text",
        f"bytes       {results['bytes']:.1%} of the FFNs' bytes read on held-out text{asked}",
        f"perplexity  {results['perplexity']:.2f} on held-out text (dense {results['dense_perplexity']:.2f})",
        f"checkpoint  {results['output']}",
        *report.skipped(results["skipped"]),
    ]
    return "\n".join(lines)
