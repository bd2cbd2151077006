"""``prunepath sparsify`` and ``prunepath info``: make a sparse checkpoint, and describe one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch_prunepath.card import hub_name, write_card
from torch_prunepath.console import report
from torch_prunepath.console.errors import as_user_error
from torch_prunepath.console.output import check_room, output_folder, writing
from torch_prunepath.evaluation.corpus import fit_and_test, load_corpus
from torch_prunepath.evaluation.make_sparse import search_windows
from torch_prunepath.evaluation.models import load_model, longest_context
from torch_prunepath.evaluation.perplexity import perplexity


@dataclass(frozen=True)
class Options:
    """What ``prunepath sparsify`` was asked.

    Attributes:
        model: a name or folder, or a GGUF file.
        text: a UTF-8 file; None for Python's help topics.
        output: the folder to write.
        tau: the threshold.
        sparsity: in place of ``tau``: the sparsity to reach on the calibration data.
        settings: fields of :class:`torch_prunepath.SparsifyConfig` that differ from their defaults.
    """

    model: str
    text: str | None
    output: Path
    tau: float
    sparsity: float | None
    settings: Mapping[str, Any]


def run(options: Options) -> dict[str, Any]:
    """Sparsify, measure, save; return what was made, ready for JSON.

    Raises:
        UserError: if the model, the text or the output cannot be had, or settings do not fit.
    """
    import torch_prunepath
    from torch_prunepath.config import SparsifyConfig, check_tau

    with as_user_error(ValueError):
        config = SparsifyConfig(**options.settings)
        tau = check_tau(options.tau)
        if options.sparsity is not None and not 0.0 <= options.sparsity < 1.0:
            raise ValueError(f"sparsity={options.sparsity} is outside [0, 1): it is the inactive share of neurons")
    corpus = load_corpus(options.text)
    with output_folder(options.output, ours=lambda _: False) as folder:
        model, tokenizer = load_model(options.model)
        check_room(folder, int(1.1 * report.num_bytes(model)), options.output)
        longest, tokens = longest_context(model), config.calibration_tokens
        fit_NC, test_NC = fit_and_test(corpus, tokenizer, longest=longest, tokens=tokens)
        results: dict[str, Any] = {
            "command": "sparsify",
            **report.machine(),
            "model": report.model(options.model, model),
            "text": report.text(corpus.name, fit_NC, test_NC),
            "config": asdict(config),
            "output": str(options.output),
        }
        with as_user_error(ValueError):
            dense = perplexity(model, test_NC, title="dense: perplexity")
            torch_prunepath.sparsify(model, tau=tau, config=config, calibration=[fit_NC] if config.needs_data else None)
            if options.sparsity is not None:
                some_NC = search_windows(fit_NC)
                tau = torch_prunepath.set_sparsity(model, options.sparsity, some_NC)
        with torch_prunepath.record_sparsity(model) as record:
            sparse = perplexity(model, test_NC, title="sparse: perplexity")
        results |= {"tau": tau, "sparsity": record.sparsity, "perplexity": sparse, "dense_perplexity": dense}
        with writing(options.output):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            written = {"tau": f"{tau:.6g}", "perplexity": f"{sparse:.2f}", "perplexity, dense": f"{dense:.2f}"}
            write_card(model, folder, base_model=hub_name(options.model), record=record, measured=written)
    return results


def render(results: Mapping[str, Any]) -> str:
    """The results of :func:`run` as people read them."""
    lines = [
        *report.heading(results),
        f"tau         {results['tau']:.6g}",
        f"sparsity    {results['sparsity']:.1%} of FFN neurons inactive on held-out text",
        f"perplexity  {results['perplexity']:.2f} on held-out text (dense {results['dense_perplexity']:.2f})",
        f"checkpoint  {results['output']}",
    ]
    return "\n".join(lines)


def info(folder: Path) -> dict[str, Any]:
    """What a sparse checkpoint is, from its configuration alone.

    Raises:
        UserError: if there is no sparse checkpoint.
    """
    from torch_prunepath.checkpoint import read_info

    with as_user_error(ValueError, OSError):
        return {"command": "info", "checkpoint": str(folder), **read_info(folder)}


def render_info(results: Mapping[str, Any]) -> str:
    """The results of :func:`info` as people read them."""
    settings = ", ".join(f"{name} {value}" for name, value in results["config"].items())
    head = ("layer", "neurons", "experts", "expert size", "rule", "tau")
    keys = ("name", "ffn_size", "experts", "expert_size", "rule")
    rows = [(*(str(layer[key]) for key in keys), f"{layer['tau']:.6g}") for layer in results["layers"]]
    lines = [
        f"checkpoint  {results['checkpoint']} (format {results['format_version']}, {len(rows)} sparse layers)",
        f"made with   {settings}",
        "",
        *report.aligned([head, *rows]),
    ]
    return "\n".join(lines)
