"""Charts as the pictures of docs/ have them: a name at the end of each line, readable on light and on dark pages.

The same lines give the same bytes: no dates, no random names. Text stays text, so files are small. The background is
opaque and light; the colours are Okabe and Ito's, a little darker where text has them, which colour-blind people can
tell apart, and markers differ as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLUE, RED, GREEN, PINK, SKY, GREY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b0578d",
    "#2b8cbe",
    "#5b6470",
)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "torch-prunepath",
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dfe3e8",
    "figure.facecolor": "#ffffff",
}
LINE_HEIGHT = 15
"""Points between two names at the right edge, so that they do not overlap."""


@dataclass(frozen=True)
class Line:
    """One line of a picture.

    Attributes:
        name: what stands at its end.
        points: pairs of x and y, or of x and (least, mean, largest) y.
        colour: of line and name.
        marker: shape of its points.
        style: "-", "--", ":", or "" for points alone.
        width: of the line; ours is thicker than the others.
    """

    name: str
    points: Sequence[tuple[float, Any]]
    colour: str
    marker: str = "o"
    style: str = "-"
    width: float = 1.8


@contextmanager
def chart(path: Path, x: str, y: str, room: float = 0.30) -> Iterator[Any]:
    """A picture's axes; the file is written at the end. ``room`` is the share at the right for names."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.6, 4.4), dpi=72)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.095, 0.13, 0.895 - room, 0.77))
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", x=-0.08 / (0.895 - room), fontsize=12, pad=12)
        yield axes
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n")


def draw(axes: Any, lines: Sequence[Line]) -> None:
    """Lines with their names at their ends, moved apart where they would overlap."""
    for line in lines:
        xs = [x for x, _ in line.points]
        ys = [y[1] if isinstance(y, tuple) else y for _, y in line.points]
        axes.plot(
            xs, ys, color=line.colour, linestyle=line.style, linewidth=line.width, marker=line.marker, markersize=5
        )
        for x, y in line.points:
            if isinstance(y, tuple):
                axes.plot([x, x], [y[0], y[2]], "-", color=line.colour, linewidth=1.2)
    ends = [(line, line.points[-1][1]) for line in lines]
    heights = [(axes.transData.transform((0.5, y[1] if isinstance(y, tuple) else y))[1], line) for line, y in ends]
    free = axes.bbox.y0
    for height, line in sorted(heights, key=lambda pair: pair[0]):
        free = max(height, free)
        place = (free - axes.bbox.y0) / axes.bbox.height
        weight = "bold" if line.width > 2 else "normal"
        axes.text(1.02, place, line.name, transform=axes.transAxes, va="center", color=line.colour, weight=weight)
        free += LINE_HEIGHT


def percent(axes: Any, low: float, high: float, step: float = 0.1) -> None:
    """A horizontal axis of shares in percent, with a margin so that end points are whole."""
    count = round((high - low) / step)
    ticks = [low + i * step for i in range(count + 1)]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_xlim(low - 0.02, high + 0.02)


def logarithmic(axes: Any, ticks: Sequence[float], unit: str = "") -> None:
    """A logarithmic vertical axis with these ticks and no others."""
    axes.set_yscale("log")
    axes.set_ylim(0.95 * ticks[0], ticks[-1])
    axes.set_yticks(ticks, [f"{tick:g}{unit}" for tick in ticks])
    axes.minorticks_off()


def times(axes: Any, high: float, step: float) -> None:
    """A vertical axis of speed-ups from 0, with dense's own speed as a line."""
    ticks = [i * step for i in range(round(high / step) + 1)]
    axes.set_ylim(0, high)
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.axhline(1, color=GREY, linewidth=1.2)
    axes.text(0.99, 1, "dense", transform=axes.get_yaxis_transform(), va="top", ha="right", color=GREY)
