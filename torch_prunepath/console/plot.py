"""Where plots come from: matplotlib, which nothing else needs."""

from __future__ import annotations

import sys
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches; None, and a line that says how to get plots, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")
