"""What is reported of a comparison: losses by position, as a table, in characters, and as a picture or a page."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import Tensor

from tttc import terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNING, PLAIN = "learns", "without learning"
EIGHTHS = 8
_MARKS = {LEARNING: "●", PLAIN: "○"}
_COLOURS = {LEARNING: "#0969da", PLAIN: "#bc4c00"}


@dataclass(frozen=True)
class Curves:
    """Mean losses by position of sequences held out, [length], one per seed, by length and model."""

    task: str
    unit: str
    window: int
    trained: int
    losses: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)

    def add(self, name: str, losses: Mapping[int, Tensor]) -> None:
        """What one more training of this network loses, [length] by length."""
        for length, loss in losses.items():
            self.losses.setdefault(length, {}).setdefault(name, []).append(loss)

    def mean(self, length: int, name: str) -> Tensor:
        """[length], over the seeds."""
        return torch.stack(list(self.losses[length][name])).mean(0)

    def beyond(self, length: int, name: str) -> list[float]:
        """Of each seed, the mean at positions that the window does not reach back from to the beginning."""
        return [float(x[self.window :].mean()) for x in self.losses[length][name]]


def _pieces(loss: Tensor, pieces: int = EIGHTHS) -> Tensor:
    """Means of as many pieces of [length], whose lengths differ by one at most."""
    return torch.stack([x.mean() for x in loss.tensor_split(pieces)])


def eighths(curves: Curves) -> Table:
    """A row for each length and model, a column for each eighth of the sequence."""
    columns = [f"{i + 1}/8" for i in range(EIGHTHS)]
    shown = terminal.table("tokens", "network", *columns, numbers=("tokens", *columns))
    for length, by_name in curves.losses.items():
        for name in by_name:
            means = _pieces(curves.mean(length, name))
            shown.add_row(f"{length:,}", name, *(f"{x:.3f}" for x in means.tolist()))
    return shown


def verdicts(curves: Curves) -> list[str]:
    """A line for each seed at the greatest length: what the networks lose beyond the window, and in the last eighth."""
    length = max(curves.losses)
    found = [f"{curves.task}, {length:,} tokens, {length / curves.trained:g} times the training length, {curves.unit}:"]
    beyond = {n: curves.beyond(length, n) for n in curves.losses[length]}
    last = {n: [float(_pieces(x)[-1]) for x in xs] for n, xs in curves.losses[length].items()}
    for what, numbers in ((f"beyond the window of {curves.window}", beyond), ("in the last eighth", last)):
        for seed in range(len(numbers[LEARNING])):
            pair = ", ".join(f"{name} {xs[seed]:.4f}" for name, xs in numbers.items())
            found.append(f"  seed {seed}, {what}: {pair}")
    return found


def in_characters(curves: Curves, rows: int = 16, width: int = 48) -> str:
    """The curves of the greatest length, one line for each piece of the sequence.

    Example:
             0– 127                                             ◐   4.158  4.160
           128– 255              ●                              ○   2.031  4.155
    """
    length = max(curves.losses)
    means = {n: _pieces(curves.mean(length, n), min(rows, length)) for n in curves.losses[length]}
    every = torch.cat(list(means.values()))
    low, high = float(every.min()), float(every.max())
    cuts = [len(x) for x in torch.arange(length).tensor_split(min(rows, length))]
    lines = [f"{' and '.join(f'{_MARKS[n]} {n}' for n in means)}, {curves.unit}, from {low:.3f} to {high:.3f}"]
    begin = 0
    for i, size in enumerate(cuts):
        line = [" "] * width
        for name, values in means.items():
            at = round((float(values[i]) - low) / max(high - low, 1e-9) * (width - 1))
            line[at] = "◐" if line[at] != " " else _MARKS[name]
        numbers = "  ".join(f"{float(values[i]):.3f}" for values in means.values())
        lines.append(f"{begin:>6}–{begin + size - 1:<6} {''.join(line)}  {numbers}")
        begin += size
    return "\n".join(lines)


def write_report(curves: Curves, path: Path, sample: str) -> None:
    """A picture (.png, .svg, .pdf) or a page (.html) with the picture, the numbers and the sample.

    Raises:
        ModuleNotFoundError: there is no matplotlib; the message says what to install.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("a report needs matplotlib, which is not installed.\n  pip install 'tttc[examples]'")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".html":
        figure(curves).savefig(path, dpi=150)
        return
    figure(curves).savefig(drawn := io.StringIO(), format="svg", metadata={"Date": None})
    title = f"A network that learns at test time: {curves.task}"
    numbers = terminal.plain(eighths(curves), "\n".join(verdicts(curves)))
    path.write_text(
        _PAGE.format(
            title=html.escape(title),
            picture=drawn.getvalue()[drawn.getvalue().index("<svg") :],
            numbers=html.escape(numbers),
            sample=html.escape(sample),
        ),
        encoding="utf-8",
    )


def figure(curves: Curves, points: int = 64) -> Figure:
    """Losses over positions at the greatest length: the mean over seeds as a line, each seed as a faint one."""
    from matplotlib.figure import Figure  # an extra

    drawn = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = drawn.subplots()
    length = max(curves.losses)
    pieces = min(points, length)
    middles = _pieces(torch.arange(length, dtype=torch.float32) + 1, pieces)
    for name, seeds in curves.losses[length].items():
        for one in seeds:
            axes.plot(middles, _pieces(one, pieces), color=_COLOURS[name], alpha=0.25, linewidth=0.8)
        mean = _pieces(curves.mean(length, name), pieces)
        axes.plot(middles, mean, color=_COLOURS[name], label=name, linewidth=1.8)
    for at, what in ((curves.window, "window"), (curves.trained, "training length")):
        axes.axvline(at, color="#6e7781", linewidth=0.8, linestyle=":")
        axes.annotate(what, (at, 1), (3, -3), "axes fraction" if at > length else ("data", "axes fraction"),
                      textcoords="offset points", va="top", fontsize=8, color="#6e7781")  # fmt: skip
    axes.set(xlabel="position", ylabel=curves.unit, xlim=(0, length), title=curves.task)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 54rem; font: 1rem/1.6 system-ui; color: #1f2328; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
svg {{ max-width: 100%; height: auto; }}
pre {{ overflow-x: auto; padding: .9rem 1.1rem; background: #f6f8fa; font: .82rem/1.5 ui-monospace, Menlo, monospace; }}
pre.sample {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style>
<h1>{title}</h1>
{picture}
<h2>By eighths of the sequence</h2>
<pre>{numbers}</pre>
<h2>A sample</h2>
<pre class="sample">{sample}</pre>
</html>
"""
