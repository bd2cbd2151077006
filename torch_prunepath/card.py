"""Model cards of sparse models: what the model is, how it is loaded, and a table of each layer's sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from torch_prunepath.layer import RoutedExperts
from torch_prunepath.layer.views import sparse_layers
from torch_prunepath.sparsity import SparsityRecord

CARD = "README.md"
"""Name of the file in which the hub expects a model card."""


def model_card(
    model: nn.Module,
    *,
    base_model: str | None = None,
    record: SparsityRecord | None = None,
    measured: Mapping[str, Any] | None = None,
) -> str:
    """Write a model card in the hub's format, which is Markdown with metadata at the top, and return its text.

    Args:
        model: a sparse model.
        base_model: name on the hub of the dense model from which it was made.
        record: a record of :func:`torch_prunepath.record_sparsity`; with it the table has each layer's sparsity.
        measured: further results by name.

    Raises:
        ValueError: if the model holds no sparse FFN.

    Example::

        with torch_prunepath.record_sparsity(model) as record:
            model(**batch)
        card = model_card(model, record=record)
    """
    layers = sparse_layers(model)
    neurons = sum(layer.ffn.ffn_size for layer in layers.values())
    results = dict(measured or {})
    if record is not None:
        results = {"inactive FFN neurons": f"{record.sparsity:.1%}", **results}
    blocks = [
        _metadata(base_model),
        f"# Sparse {type(model).__name__}",
        f"{len(layers)} feed-forward networks with {neurons} neurons, grouped into experts; a router chooses each "
        f"token's. Made with torch-prunepath{f' from `{base_model}`' if base_model else ''}. Without that package this "
        "loads as the dense model.",
        "```python\nimport torch_prunepath\n\nmodel = torch_prunepath.load(directory)\n" + _knob(model) + "\n```",
        *(["## Measured", _table(("", "value"), list(results.items()))] if results else []),
        "## Sparsity",
        _layer_table(model, record),
    ]
    return "\n\n".join(blocks) + "\n"


def write_card(model: nn.Module, directory: str | Path, **facts: Any) -> bool:
    """Write the :func:`model_card` to ``README.md`` unless the directory has one; return whether it was written."""
    text = model_card(model, **facts)
    try:
        with (Path(directory) / CARD).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def hub_name(model: str) -> str | None:
    """Return the name on the hub of a model that was given to a command, or None if it is a file or folder."""
    return None if Path(model).exists() else model


def _metadata(base_model: str | None) -> str:
    base = [f"base_model: {base_model}"] if base_model else []
    return "\n".join(["---", "library_name: transformers", *base, "tags:", "- prunepath", "- sparse", "---"])


def _knob(model: nn.Module) -> str:
    if all(layer.path for layer in sparse_layers(model).values()):
        return "torch_prunepath.set_budget(model, 0.7)  # share of the FFNs' bytes that a token reads; 1 is dense"
    return "torch_prunepath.set_tau(model, 0.8)  # 1 is dense, less is sparser"


def _layer_table(model: nn.Module, record: SparsityRecord | None) -> str:
    found = {} if record is None else record.per_layer
    layers = sparse_layers(model)
    thresholds = any(float(layer.theta_x) or float(layer.theta_h) for layer in layers.values())
    more = (*(("threshold on inputs", "threshold on neurons") if thresholds else ()), *(("sparsity",) if found else ()))
    head = ("layer", "neurons", "experts", "tau", *more)
    rows = [
        (
            f"`{name or type(model).__name__}`",
            layer.ffn.ffn_size,
            _experts(layer),
            f"{float(layer.tau):.6g}",
            *((f"{float(layer.theta_x):.6g}", f"{float(layer.theta_h):.6g}") if thresholds else ()),
            *((f"{found[layer.name]:.1%}" if layer.name in found else "not run",) if found else ()),
        )
        for name, layer in layers.items()
    ]
    return _table(head, rows)


def _experts(layer: RoutedExperts) -> str:
    shared = f", {layer.experts.shared} always active" if layer.experts.shared else ""
    return f"{layer.num_experts} of {layer.experts.expert_size}{shared}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
