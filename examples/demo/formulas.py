"""The mathematics of a stage as a picture: its LaTeX, drawn by matplotlib, so that the page needs no other program."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SPELLED = ((r"{\left(", r"\left("), (r"\right)}", r"\right)"), (r"\le ", r"\leq "))  # as matplotlib reads it
WIDTH, LINE, SIZE = 9.0, 0.36, 12.0  # inches, inches, points


def lines_of(latex: str) -> list[str]:
    """The equations of a LaTeX text, one after the other, without the shapes that stand behind them."""
    found = []
    for block in re.findall(r"\\begin\{align\*\}\n(.*?)\n\\end\{align\*\}", latex, re.DOTALL):
        for line in block.split("\\\\\n"):
            equation = line.partition("&&")[0].replace("&", "").strip()
            for ours, drawn in _SPELLED:
                equation = equation.replace(ours, drawn)
            found.append(equation)
    return found


def figure_of(equations: Sequence[str], ink: str) -> Figure:
    """One equation below the other; those that are wider than the page are set smaller."""
    heights = [1.7 if r"\frac" in equation else 1.0 for equation in equations]
    figure = Figure(figsize=(WIDTH, LINE * sum(heights)))
    renderer = FigureCanvasAgg(figure).get_renderer()
    top = 0.0
    for equation, height in zip(equations, heights, strict=True):
        at = 1 - (top + height / 2) / sum(heights)
        text = figure.text(0, at, f"${equation}$", va="center", color=ink, size=SIZE, math_fontfamily="stix")
        wide = text.get_window_extent(renderer).width / (figure.dpi * WIDTH)
        text.set_fontsize(SIZE / max(1.0, wide))
        top += height
    return figure
