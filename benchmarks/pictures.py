"""Pictures of what was recorded: from results/*.json to docs/pictures/*.svg.

    python -m benchmarks pictures

The numbers in this file choose rows and scales; what is drawn comes from the records. A test draws all again and
compares. ``docs/records/`` is brought up to date too: links to the results, so that the site can show them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.charts import BLUE, GREEN, GREY, PINK, RED, SKY, Line, chart, draw, logarithmic, percent, times
from torch_prunepath.bench.geometry import GEOMETRIES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"


def load(name: str) -> dict[str, Any]:
    """One record of ``results/``."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def chosen(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows whose fields have these values.

    Raises:
        LookupError: if there are none: a picture never leaves out in silence what it is about.
    """
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if not found:
        raise LookupError(f"no recorded row has {wanted}")
    return found


# --- quality without training -----------------------------------------------------------------------------------------

STATIC = ("static, wanda-down", "static, norm", "static, wanda")
DEFAULT = {"partition": "coactivation", "expert_size": 8}


def _curve(row: dict[str, Any]) -> list[tuple[float, float]]:
    return [(float(share), value) for share, value in sorted(row["perplexity"].items())]


def _untrained() -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    kept = load("quality-smollm2-135m")
    (ours,) = chosen(kept["rows"], method="routed", router="fitted", budget="sensitivity", **DEFAULT)
    (oracle,) = chosen(kept["rows"], method="oracle", **DEFAULT)
    found = {name: _curve(chosen(kept["rows"], method=name)[0]) for name in STATIC}
    return kept, {"ours": _curve(ours), "oracle": _curve(oracle), **found}


def quality(path: Path) -> None:
    """Perplexity against sparsity, nothing trained."""
    kept, curves = _untrained()
    with chart(path, "FFN neurons left out", "WikiText-2 perplexity, nothing trained (lower is better)") as axes:
        logarithmic(axes, (20, 30, 50, 80, 150))
        percent(axes, 0.0, 0.5)
        _draw_untrained(axes, curves, kept["dense"], 0.0)


def quality_bytes(path: Path) -> None:
    """The same against the share of the FFN's bytes that a token reads: routed methods read the router too."""
    kept, curves = _untrained()
    size = GEOMETRIES["smollm2-135m"].ffn_size
    router = size / DEFAULT["expert_size"] / (3 * size)  # type: ignore[operator]
    read = {
        name: [(1 - share + (0 if name in STATIC else router), value) for share, value in points]
        for name, points in curves.items()
    }
    title = "WikiText-2 perplexity, nothing trained (lower is better)"
    with chart(path, "share of the FFN's weight bytes that a token reads, router included", title) as axes:
        logarithmic(axes, (20, 30, 50, 80, 150))
        percent(axes, 0.5, 1.0)
        axes.invert_xaxis()
        _draw_untrained(axes, read, kept["dense"], 1.0)


def _draw_untrained(axes: Any, curves: dict[str, list[tuple[float, float]]], dense: float, origin: float) -> None:
    best, *others = STATIC
    axes.plot([origin], [dense], "D", color=GREY, clip_on=False)
    axes.annotate("dense", (origin, dense), (-4, 8), textcoords="offset points", color=GREY)
    names = {"static, norm": "static: contribution", "static, wanda": "static: Wanda, all weights"}
    draw(
        axes,
        [
            *(Line(names[name], curves[name], GREY, "^", "-", 1.0) for name in others),
            Line("best static: Wanda, down", curves[best], RED, "s"),
            Line("routed, the default", curves["ours"], BLUE, "o", "-", 2.8),
            Line("the same, ideal router", curves["oracle"], SKY, "v", "--", 1.4),
        ],
    )


# --- speed ------------------------------------------------------------------------------------------------------------


def _speeds(rows: Sequence[dict[str, Any]], field: str = "speedup") -> list[tuple[float, float]]:
    return sorted((row["realised_sparsity"], row[field]) for row in rows)


def _ffn(geometry: str, expert_size: int, **wanted: Any) -> list[dict[str, Any]]:
    rows = [row for run in load("ffn-h100")["runs"] for row in run["rows"]]
    return chosen(rows, geometry=geometry, expert_size=expert_size, **wanted)


def ffn(path: Path) -> None:
    """One FFN at one token, on a GPU, and what its bytes alone would allow."""
    with chart(path, "FFN neurons left out", "speed-up of one FFN, one token, H100 (dense: cuBLAS)") as axes:
        percent(axes, 0.5, 1.0)
        times(axes, 18, 3)
        large = _ffn("qwen2-7b", 64, tokens=1)
        draw(
            axes,
            [
                Line("by its bytes, Qwen2-7B", _speeds(large, "floor_speedup"), GREY, "", ":"),
                Line("Qwen2-7B", _speeds(large), BLUE, "o", "-", 2.8),
                Line("Llama-3-8B", _speeds(_ffn("llama-3-8b", 64, tokens=1)), GREEN, "s"),
                Line("GPT-2 medium", _speeds(_ffn("gpt2-medium", 32, tokens=1)), RED, "^"),
            ],
        )


def tokens(path: Path) -> None:
    """One FFN against the tokens of a call."""
    rows = _ffn("qwen2-7b", 64)
    counts = sorted({row["tokens"] for row in rows})
    with chart(path, "independent tokens in one call", "speed-up of Qwen2-7B's FFN, H100 (dense: cuBLAS)") as axes:
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        times(axes, 8, 1)
        lines = []
        shown = zip((0.9, 0.8, 0.5), (GREEN, BLUE, RED), ("s", "o", "^"), strict=True)
        for share, colour, marker in shown:
            found = {row["tokens"]: row["speedup"] for row in chosen(rows, sparsity=share)}
            points = [(i, found[count]) for i, count in enumerate(counts) if count in found]
            lines.append(Line(f"{share:.0%} left out", points, colour, marker))
        draw(axes, lines)


def decode(path: Path) -> None:
    """Whole models that write one sequence, and what their bytes alone would allow."""
    rows = [row for run in load("decode-h100")["runs"] for row in run["rows"]]
    large, small = (chosen(rows, geometry=name) for name in ("qwen2-7b", "gpt2-medium"))
    title = "speed-up of a whole model, one sequence, H100 (dense: Inductor)"
    with chart(path, "FFN neurons left out", title) as axes:
        percent(axes, 0.0, 1.0, 0.2)
        times(axes, 4, 0.5)
        draw(
            axes,
            [
                Line("by its bytes, Qwen2-7B", _speeds(large, "floor_speedup"), GREY, "", ":"),
                Line("Qwen2-7B", _speeds(large), BLUE, "o", "-", 2.8),
                Line("by its bytes, GPT-2 m.", _speeds(small, "floor_speedup"), GREY, "", ":"),
                Line("GPT-2 medium", _speeds(small), RED, "^"),
            ],
        )


CPU = {"qwen2-7b": ("Qwen2-7B", BLUE), "llama-3.2-1b": ("Llama-3.2-1B", GREEN), "smollm2-135m": ("SmolLM2", RED)}


def cpu(path: Path) -> None:
    """One FFN at one token on two CPU cores."""
    rows = load("cpu-rows")["rows"]
    with chart(path, "FFN neurons left out", "speed-up of one FFN, one token, 2 CPU cores (dense: torch)") as axes:
        percent(axes, 0.5, 1.0)
        times(axes, 14, 2)
        lines = []
        for geometry, (name, colour) in CPU.items():
            for dtype, style, marker in (("float32", "-", "o"), ("bfloat16", "--", "s")):
                found = chosen(rows, geometry=geometry, dtype=dtype, T=1)
                points = sorted((row["sparsity"], row["ratio"][0]) for row in found)
                lines.append(Line(f"{name}, {dtype}", points, colour, marker, style))
        draw(axes, lines)


def cpu_tokens(path: Path) -> None:
    """One FFN on a CPU against the tokens of a call, at the rows nearest to 80%."""
    rows = load("cpu-rows")["rows"]
    with chart(path, "tokens in one call", "speed-up of one FFN, 80% left out, 2 CPU cores (dense: torch)") as axes:
        counts = sorted({row["T"] for row in rows})
        axes.set_xticks(range(len(counts)), [str(count) for count in counts])
        times(axes, 8, 1)
        lines = []
        for geometry, (name, colour) in list(CPU.items())[1:]:
            for dtype, style, marker in (("float32", "-", "o"), ("bfloat16", "--", "s")):
                points = []
                for i, count in enumerate(counts):
                    found = chosen(rows, geometry=geometry, dtype=dtype, T=count)
                    points.append((i, min(found, key=lambda row: abs(row["sparsity"] - 0.8))["ratio"][0]))
                lines.append(Line(f"{name}, {dtype}", points, colour, marker, style))
        draw(axes, lines)


# --- after training ---------------------------------------------------------------------------------------------------

TOKENS = 11_600_000
LR = 1e-3
DISTILLED = {"distill_logits": 1.0}


def _trained(method: str, settings: dict[str, Any], lr: float = LR) -> list[tuple[float, Any]]:
    """Books' perplexity by realised sparsity: least, mean and largest over seeds where there are several."""
    found: dict[float, list[dict[str, Any]]] = {}
    for kept in load("adaptation-h200")["runs"]:
        run = kept["run"]
        if (run["method"], run["settings"], run["lr"], run["budget"]["tokens"]) == (method, settings, lr, TOKENS):
            for row in chosen(kept["rows"], text="books"):
                found.setdefault(row["asked"], []).append(row)
    if not found:
        raise LookupError(f"no recorded run of {method} has {settings}")
    points: list[tuple[float, Any]] = []
    for _, rows in sorted(found.items(), key=lambda pair: pair[0] or 0.0):
        values = [row["perplexity"] for row in rows]
        several = (min(values), mean(values), max(values)) if len(values) > 1 else values[0]
        points.append((mean(row["sparsity"] for row in rows), several))
    return points


def training(path: Path) -> None:
    """Everything distilled: ours, the best static pruning, and MoEfication."""
    (_, dense), *_ = _trained("dense", DISTILLED, 5e-4)
    with chart(path, "FFN neurons left out", "perplexity on held-out books, all distilled (lower is better)") as axes:
        percent(axes, 0.3, 0.9)
        axes.set_ylim(25, 55)
        _baseline(axes, dense)
        draw(
            axes,
            [
                Line("static: Wanda", _trained("static-wanda", DISTILLED), RED, "s"),
                Line("MoEfication", _trained("moefication-mlp", DISTILLED), PINK, "D"),
                Line("ours, one checkpoint", _trained("ours", DISTILLED), SKY, "v", "--", 2.2),
                Line("ours, a run for each", _trained("held", DISTILLED), BLUE, "o", "-", 2.8),
            ],
        )


def methods(path: Path) -> None:
    """Nothing distilled: every method that stays in the range."""
    (_, dense), *_ = _trained("dense", {}, 5e-4)
    ours = {"shared_experts": 10, "high": 0.95, "accumulation": 2}
    with chart(path, "FFN neurons left out", "perplexity on held-out books, none distilled (lower is better)") as axes:
        percent(axes, 0.3, 0.9)
        logarithmic(axes, (25, 30, 40, 60, 100, 150, 250))
        _baseline(axes, dense)
        draw(
            axes,
            [
                Line("LTE, threshold held", _trained("lte-held", {}), GREY, "x", "-", 1.2),
                Line("D2DMoE, then trained", _trained("d2dmoe-max", {"first": 0.3}), GREY, "P", "-", 1.2),
                Line("static: contribution", _trained("static-norm", {}), GREY, "^", "-", 1.2),
                Line("static: Wanda", _trained("static-wanda", {}), RED, "s"),
                Line("MoEfication", _trained("moefication-mlp", {}), PINK, "D"),
                Line("ours, one checkpoint", _trained("ours", ours), SKY, "v", "--", 2.2),
                Line("ours, a run for each", _trained("held", {}), BLUE, "o", "-", 2.8),
            ],
        )


def _baseline(axes: Any, height: float) -> None:
    axes.axhline(height, color=GREY, linewidth=1.2)
    axes.text(0.9, height, "dense, trained alike", va="bottom", ha="right", color=GREY)


TASK_METHODS = {
    "ours": ("ours", BLUE, "o"),
    "static": ("static: contribution", RED, "s"),
    "moefication": ("MoEfication", PINK, "D"),
}
GLUE_COMMIT = "2fd28e6"
"""The runs of this commit are the ones where every method is distilled, labels left out."""


def glue(path: Path) -> None:
    """Accuracy on four tasks at 80%, with the range over seeds."""
    runs = [run for run in load("understanding-minilm-h200")["runs"] if run["commit"] == GLUE_COMMIT]
    names = {"sst2": "SST-2", "qnli": "QNLI", "mrpc": "MRPC", "rte": "RTE"}
    shown = {"dense": ("dense", GREY, "_"), **TASK_METHODS}
    with chart(path, "", "accuracy at 80% left out, all distilled; bars: three seeds") as axes:
        axes.set_ylim(48, 90)
        axes.set_yticks(range(50, 91, 10), [f"{tick}%" for tick in range(50, 91, 10)])
        axes.set_xticks(range(4), names.values())
        axes.set_xlim(-0.5, 3.5)
        ends = []
        for shift, (method, (name, colour, marker)) in zip((-0.27, -0.09, 0.09, 0.27), shown.items(), strict=True):
            points: list[tuple[float, Any]] = []
            for i, task in enumerate(names):
                found = [run for run in runs if (run["config"]["task"], run["config"]["method"]) == (task, method)]
                values = [_whole(point) for run in found for point in run["points"] if point["target"] in (0.0, 0.8)]
                points.append((i + shift, (min(values), mean(values), max(values))))
            ends.append(Line(name, points, colour, marker, ""))
        draw(axes, ends)


def _whole(point: dict[str, Any]) -> float:
    """Accuracy in percent over both halves of a dev set."""
    halves = (point["select"], point["report"])
    return 100 * sum(half["accuracy"] * half["rows"] for half in halves) / sum(half["rows"] for half in halves)


def e2e(path: Path) -> None:
    """BLEU against sparsity, distilled."""
    runs = load("generation-smollm2-135m-h200")["runs"]
    dense = chosen([run["config"] | run["points"][0]["report"] for run in runs], method="dense")[0]["bleu"]
    with chart(path, "FFN neurons left out", "BLEU on E2E, all distilled, one seed (higher is better)") as axes:
        percent(axes, 0.5, 0.8)
        axes.set_ylim(50, 60)
        axes.axhline(dense, color=GREY, linewidth=1.2)
        axes.text(0.8, dense, "dense", va="bottom", ha="right", color=GREY)
        one = ("ours, one checkpoint", SKY, "v")
        lines = []
        for method, (name, colour, marker) in {"ours-one": one, **TASK_METHODS}.items():
            found = [
                run["points"]
                for run in runs
                if run["config"]["method"] == method and run["config"]["fields"] == DISTILLED
            ]
            points = sorted((p["report"]["sparsity"], p["report"]["bleu"]) for each in found for p in each)
            lines.append(Line(name, points, colour, marker))
        draw(axes, lines)


# --- the command ------------------------------------------------------------------------------------------------------

PICTURES: tuple[Callable[[Path], None], ...] = (
    quality,
    quality_bytes,
    ffn,
    tokens,
    decode,
    cpu,
    cpu_tokens,
    training,
    methods,
    glue,
    e2e,
)


def link_records(folder: Path) -> None:
    """Links to all that was recorded, so that the site can show it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in RESULTS.iterdir():
        if path.suffix in (".json", ".md") and not (folder / path.name).is_symlink():
            (folder / path.name).symlink_to(Path("../../benchmarks/results") / path.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all pictures; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pictures", description="draw benchmarks/results/*.json")
    parser.add_argument(
        "-o", "--output", type=Path, default=DOCS / "pictures", metavar="DIR", help="(default: docs/pictures)"
    )
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        picture(args.output / f"{picture.__name__.replace('_', '-')}.svg")
    link_records(DOCS / "records")
    return 0
