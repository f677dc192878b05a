"""The report of `benchmarks.cpu` as a table, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tttc import terminal

Row = dict[str, Any]
Report = dict[str, Any]
NONE = "–"
COLUMNS = ("variant", "pass", "ms", "of SGEMM", "eager 16", "best eager", "torch.compile", "torch backend", "memory")


def first_eager(row: Row) -> float | None:
    """How many times faster than the hand-written loop over mini-batches, or over chunks of 16."""
    return _median(row, "eager 16")


def best_eager(row: Row) -> float | None:
    """The same against the fastest of the hand-written forms."""
    found = [r["median"] for n, r in row.get("times_faster_than", {}).items() if n.startswith("eager")]
    return min(found, default=None)


def memory_share(row: Row) -> float | None:
    """Peak memory over that of the hand-written loop with autograd."""
    peaks = row.get("peak_MiB", {})
    return peaks["tttc"] / peaks["eager 16"] if peaks.get("eager 16") else None


def cells(row: Row) -> tuple[str, ...]:
    """A row of numbers as text, one for each of `COLUMNS`."""
    if "refused" in row:
        return (row["label"], row["pass"], "disagrees", *[NONE] * (len(COLUMNS) - 3))
    fraction, share = row["fraction_of_sgemm"], memory_share(row)
    return (
        row["label"],
        row["pass"],
        f"{1e3 * row['seconds']['tttc']['median']:.1f}",
        NONE if fraction is None else f"{fraction['median']:.2f}",
        *(_times(x) for x in (first_eager(row), best_eager(row))),
        *(_times(_median(row, n)) for n in ("torch.compile", "torch backend")),
        NONE if share is None else f"{share:.2f}",
    )


def table(report: Report) -> Table:
    """For the terminal, with the seconds of the first call, in which the kernels were compiled."""
    made = terminal.table(*COLUMNS, "compile s", numbers=(*COLUMNS[2:], "compile s"))
    made.title = f"float32, {report['threads']} threads, {report['processor']}"
    for row in report["rows"]:
        made.add_row(*cells(row), str(row.get("first_call_seconds", NONE)))
    return made


CAPTION = (
    "Times faster than: the hand-written eager dual form, looped by 16 tokens; the fastest hand-written one;\n"
    "torch.compile of its step; the torch backend. memory: peak over that of eager 16. –: not measured, or no such\n"
    "form."
)


FORWARD = ("forward, ms", "of SGEMM", "× eager", "× best eager", "× `torch.compile`")
BOTH = ("forward+backward, ms", "of SGEMM", "× eager", "× best eager", "memory")


def markdown(report: Report) -> str:
    """The table of docs/measured.md: a line for each variant, forward and forward+backward side by side."""
    lines = [
        f"| | {' | '.join(FORWARD)} | {' | '.join(BOTH)} |",
        "|---|" + "---|" * len(FORWARD + BOTH),
    ]
    for label, forward, backward in _by_label(report):
        one = cells(forward)[2:7] if forward else (NONE,) * len(FORWARD)
        both = cells(backward) if backward else (NONE,) * len(COLUMNS)
        lines.append(f"| {' | '.join([_named(label, forward or backward), *one, *both[2:6], both[8]])} |")
    for name, s in report["start_seconds"].items():
        lines.append(f"\n{name}: {s['fresh']:.1f} s to a first result, {s['cached']:.2f} s from the cache.")
    return "\n".join(lines)


def _named(label: str, row: Row) -> str:
    sizes = ", ".join(f"{n}={size}" for n, size in row["sizes"].items() if n != "B")
    return f"`{label.partition('-')[0]}` {sizes}"


def _by_label(report: Report) -> list[tuple[str, Row, Row]]:
    """The two passes of each variant, {} for one that was not measured."""
    found: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        found.setdefault(row["label"], {})[row["pass"]] = row
    return [(label, rows.get("forward", {}), rows.get("forward+backward", {})) for label, rows in found.items()]


def _median(row: Row, contender: str) -> float | None:
    found = row.get("times_faster_than", {}).get(contender)
    return None if found is None else found["median"]


def _times(x: float | None) -> str:
    return NONE if x is None else f"{x:.1f}"


# -- the picture -------------------------------------------------------------------------------------------------------


def picture(report: Report, path: Path) -> None:
    """Bars: how many times faster than the fastest hand-written eager form, and which fraction of SGEMM."""
    from matplotlib.figure import Figure

    rows = [r for r in _by_label(report) if not any("refused" in part for part in r[1:])]
    figure = Figure(figsize=(10, 0.36 * len(rows) + 1.4), layout="constrained")
    speed, share = figure.subplots(1, 2, sharey=True)
    labels = [label for label, *_ in rows]
    for axes, value in ((speed, best_eager), (share, _share)):
        passes = ("forward", "forward+backward")
        for i, (name, color) in enumerate(zip(passes, ("#0969da", "#bc4c00"), strict=True)):
            _bars(axes, [value(r[1 + i]) if r[1 + i] else None for r in rows], 0.19 * (2 * i - 1), name, color)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0)
        axes.margins(x=0.14)
    speed.set_yticks(range(len(labels)), labels)
    speed.invert_yaxis()
    speed.axvline(1, color="#1f2328", linewidth=0.8)
    share.axvline(1, color="#1f2328", linewidth=0.8)
    speed.set_xlabel("times faster than the fastest hand-written eager form")
    share.set_xlabel("fraction of the machine's SGEMM")
    figure.legend(*share.get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=2)
    figure.suptitle(f"float32, {report['threads']} threads, {report['processor']}, {report['date']}", fontsize=9, x=0.3)
    figure.savefig(path, dpi=120)


def _share(row: Row) -> float | None:
    fraction = row.get("fraction_of_sgemm")
    return None if fraction is None else fraction["median"]


def _bars(axes: Any, values: Sequence[float | None], offset: float, name: str, color: str) -> None:
    positions = [i + offset for i in range(len(values))]
    bars = axes.barh(positions, [v or 0.0 for v in values], height=0.36, color=color, label=name)
    axes.bar_label(bars, [NONE if v is None else f"{v:.2g}" for v in values], padding=3, fontsize=7)
