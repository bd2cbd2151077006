"""Records that earlier versions wrote, under today's names.

Two frameworks wrote them: that of books (``run``) and that of tasks (``config``), which gave two methods one name.
Records of analyses (``about``) are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FORMAT = 2
"""Version of the records that are written; the first had none."""
NAMES: Mapping[str, str] = MappingProxyType(
    {"ours": "held", "ours-one": "ours", "moefication": "moefication-mlp", "d2dmoe": "d2dmoe-held", "lte": "lte-held"}
)
"""What a method of the tasks was called -> what it is called now; ``static`` has its score behind it now."""


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it would be written today; records of this version and of analyses as they are."""
    if record.get("format") == FORMAT or "about" in record:
        return record
    if "run" in record:
        return _of_books(record)
    return _of_tasks(record) if "config" in record else record


def _of_books(record: dict[str, Any]) -> dict[str, Any]:
    run = record["run"]
    budget, sparsity = run["budget"], run["sparsity"]
    about = {name: run.get(name) for name in ("budget", "texts", "windows", "search_windows")}
    job = {
        **{name: run[name] for name in ("method", "settings", "lr", "seed", "model")},
        "task": "books",
        "sparsity": run.get("sparsities", []) if sparsity is None else [sparsity],
        "steps": budget["tokens"] // budget["batch_tokens"],
        "autocast": run["bf16"],
        "dense_lr": None,
        "about": about,
    }
    rest = {name: value for name, value in record.items() if name != "run"}
    return {"failed": None, "seconds": None, "evaluation_seconds": None, **rest, "job": job}


def _of_tasks(record: dict[str, Any]) -> dict[str, Any]:
    config = record["config"]
    settings = dict(config["fields"])
    method = config["method"]
    method = f"static-{settings.pop('score', 'norm')}" if method == "static" else NAMES.get(method, method)
    job = {
        **{name: config.get(name) for name in ("task", "seed", "lr", "steps", "dense_lr", "model", "weights")},
        "method": method,
        "settings": settings,
        "sparsity": config["targets"],
        "about": {"data": config["data"]},
    }
    rows = [
        {**{name: value for name, value in point.items() if name != "target"}, "asked": point["target"]}
        for point in record["points"]
    ]
    rest = {name: value for name, value in record.items() if name not in ("config", "points")}
    return {**rest, "job": job, "failed": record.get("failed"), "rows": rows}
