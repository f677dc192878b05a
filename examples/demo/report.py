"""The HTML report: one file with the declaration, its mathematics, the checks, timings and loss curves.

Goes in: a `Report`, plain data. Comes out: a page that needs nothing but itself. Pictures are drawn twice,
for a light and a dark page, and embedded; the reader's browser picks.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import PythonLexer  # type: ignore[import-untyped]

from tttc.examples.demo import formulas
from tttc.verification.comparison import Row


@dataclass(frozen=True)
class StageText:
    """One stage of the compiler: its program as text, and what it took to make."""

    name: str
    milliseconds: float
    text: str


@dataclass(frozen=True)
class TimingRow:
    """Median times of one implementation; None and a `note` where it could not run."""

    name: str
    forward_ms: float | None
    backward_ms: float | None
    note: str = ""

    @property
    def total_ms(self) -> float | None:
        return None if self.forward_ms is None or self.backward_ms is None else self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class LossCurve:
    """One language model's validation loss, in bits per byte, as it was trained."""

    name: str
    parameters: int
    steps: Sequence[int]
    seconds: Sequence[float]
    bits_per_byte: Sequence[float]


@dataclass(frozen=True)
class Report:
    """Everything that is on the page. The first of `timings` is the one that the others are compared with."""

    title: str
    summary: Sequence[str]
    facts: Sequence[tuple[str, str]]
    declaration: str
    stages: Sequence[StageText]
    verification: Sequence[Row]
    timings: Sequence[TimingRow]
    timing_setup: str
    curves: Sequence[LossCurve]
    training_setup: str
    bigram: float | None
    reproduce: Sequence[str]
    open_stages: Sequence[str] = field(default=("dualize",))
    figures: Sequence[tuple[str, str]] = ()
    """What is to be seen first: a number, and what it counts."""
    formulas: Sequence[tuple[str, Sequence[str]]] = ()
    """Equations in LaTeX, with what they are."""


@dataclass(frozen=True)
class Theme:
    """The colours of a picture that lies on a light or on a dark page."""

    ink: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme("#1f2328", "#d0d7de", ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#6e7781"))
DARK = Theme("#e6edf3", "#3d444d", ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#ff7b72", "#8b949e"))


def write_report(report: Report, path: Path) -> Path:
    """Write the page to `path`, making its folder, and return where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The page as one string of HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tttc.examples.demo"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "code": _code,
        "milliseconds": milliseconds,
        "error": error_text,
        "unbroken": _unbroken,
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        timing_picture=_picture(lambda theme: _timing_figure(report.timings, theme))
        if _timed(report.timings)
        else None,
        curve_picture=_picture(lambda theme: _curve_figure(report.curves, report.bigram, theme))
        if report.curves
        else None,
        formula_pictures=[(title, _picture(partial(_formula_figure, lines))) for title, lines in report.formulas],
        factor=lambda row: _factor(row, report.timings[0]),
    )


def milliseconds(value: float | None) -> str:
    """Three digits are what a median of a few runs is good for."""
    if value is None:
        return "–"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def error_text(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _unbroken(text: str) -> str:
    """Browsers would break the line within 3.0e-16."""
    return text.replace("e-", "e\N{NON-BREAKING HYPHEN}")


def _factor(row: TimingRow, first: TimingRow) -> str:
    """How many times the first row's time this one takes."""
    return "–" if row.total_ms is None or not first.total_ms else f"{row.total_ms / first.total_ms:.1f}×"


def _timed(rows: Sequence[TimingRow]) -> list[TimingRow]:
    return [row for row in rows if row.total_ms is not None]


def _code(text: str) -> Markup:
    """Python as highlighted HTML; the colours are in the page's style sheet."""
    return Markup(highlight(text.rstrip(), PythonLexer(), HtmlFormatter(nowrap=True)))


def _picture(draw: Callable[[Theme], Figure]) -> dict[str, str]:
    return {"light": _as_data(draw, LIGHT), "dark": _as_data(draw, DARK)}


def _as_data(draw: Callable[[Theme], Figure], theme: Theme) -> str:
    """The figure as an SVG inside an address, so that the page needs no second file."""
    settings = {
        "font.size": 10,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "svg.hashsalt": "tttc",  # the same report gives the same bytes
    }
    out = io.BytesIO()
    with rc_context(settings):
        draw(theme).savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"


def _formula_figure(lines: Sequence[str], theme: Theme) -> Figure:
    return formulas.figure_of(lines, theme.ink)


def _timing_figure(rows: Sequence[TimingRow], theme: Theme) -> Figure:
    """One bar per implementation on a logarithmic axis, the forward pass inside it, and how many times the first."""
    timed = _timed(rows)
    figure = Figure(figsize=(9, 0.5 * len(timed) + 1.1), layout="constrained")
    axes = figure.subplots()
    names = [row.name for row in timed]
    totals = [row.total_ms or 0.0 for row in timed]
    forward = [row.forward_ms or 0.0 for row in timed]
    axes.barh(names, totals, height=0.55, color=theme.series[1], label="forward and backward")
    axes.barh(names, forward, height=0.25, color=theme.series[0], label="forward")
    for name, row in zip(names, timed, strict=True):
        axes.annotate(
            f"{milliseconds(row.total_ms)}  {_factor(row, rows[0]) if row is not rows[0] else ''}",
            (row.total_ms or 0.0, name),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xscale("log")
    axes.set_xlim(min(forward) / 2, max(totals) * 4)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per pass, median, logarithmic")
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure


def _curve_figure(curves: Sequence[LossCurve], bigram: float | None, theme: Theme) -> Figure:
    """Validation loss over steps and over seconds, side by side on one scale."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    _plot_curves(by_steps, curves, [curve.steps for curve in curves], bigram, theme)
    _plot_curves(by_seconds, curves, [curve.seconds for curve in curves], bigram, theme)
    by_steps.set(xlabel="training step", ylabel="validation loss, bits per byte")
    by_seconds.set(xlabel="seconds of training")
    by_seconds.legend(frameon=False, loc="upper right")
    return figure


def _plot_curves(
    axes: Axes,
    curves: Sequence[LossCurve],
    positions: Sequence[Sequence[float]],
    bigram: float | None,
    theme: Theme,
) -> None:
    for number, (curve, x) in enumerate(zip(curves, positions, strict=True)):
        axes.plot(
            x,
            curve.bits_per_byte,
            color=theme.series[number % len(theme.series)],
            label=curve.name,
            linewidth=1.8,
            linestyle=(0, (6, 2 * number)),  # of curves that lie on one another, all are seen
            marker="osD^v*"[number % 6],
            markersize=4,
        )
    if bigram is not None:
        axes.axhline(bigram, color=theme.ink, linestyle=(0, (1, 2)), linewidth=1, label="bigram counts")
    axes.set_yscale("log", base=2)  # from the 8 bits of an untrained model to ends that are close together
    axes.yaxis.set_major_locator(FixedLocator([2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")
    axes.set_xlim(left=0)
