"""Printing for two readers: a person at a terminal, and a program behind a pipe that wants the bare text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tttc.backends.notice import covered

if TYPE_CHECKING:
    from tttc.verification.comparison import Row

_UNWRAPPED = 1000  # columns; wider than any line that is printed


def console(*, stderr: bool = False) -> Console:
    """Where to print: styled and as wide as the terminal, or plain and unwrapped if it is none."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(stderr=stderr, highlight=False, markup=False)
    return Console(stderr=stderr, highlight=False, markup=False, width=_UNWRAPPED, color_system=None)


def print_program(text: str) -> None:
    """Program text, with colours on a terminal; elsewhere as it is, so that it can be saved and run."""
    if sys.stdout.isatty():
        from rich.syntax import Syntax  # brings pygments, for colours alone

        console().print(Syntax(text.rstrip("\n"), "python", theme="ansi_dark", word_wrap=True))
    else:
        print(text.rstrip("\n"))


def table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    """An empty table with these columns; those named in `numbers` are flush right."""
    lines = box.SIMPLE_HEAD if sys.stdout.isatty() else None
    made = Table(box=lines, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in set(numbers) else "left")
    return made


def error_table(rows: Iterable[Row]) -> Table:
    """One line per tensor: how far it is from the definition, and how far it may be."""
    made = table("tensor", "error", "tolerance", "", numbers=("error", "tolerance"))
    for row in rows:
        differs = row.told and not row.ok
        said, style = ("differs", "bold red") if differs else (row.verdict, "green" if row.ok else "yellow")
        verdict = Text(said, style=style)
        made.add_row(row.name, f"{row.error:.1e}", f"{row.tolerance:.1e}", verdict)
    return made


@contextmanager
def budget_bar(seconds: float) -> Iterator[Progress]:
    """A bar that fills while a budget of time runs out; its one task is described by `update(0, description=...)`.

    It is drawn on stderr, and only if that is a terminal.
    """
    began = time.perf_counter()

    class Left(ProgressColumn):
        max_refresh = None

        def render(self, task: Task) -> RenderableType:
            left = max(0.0, seconds - (time.perf_counter() - began))
            return Text(f"{left:.0f} s left", style="cyan")

    class Spent(BarColumn):
        def render(self, task: Task) -> ProgressBar:
            spent = min(seconds, time.perf_counter() - began)
            return ProgressBar(total=seconds, completed=spent, width=30)

    columns = (Spent(), Left(), TextColumn("{task.description}"))
    with (
        Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar,
        covered(),
    ):
        bar.add_task("")
        yield bar


def plain(*parts: RenderableType) -> str:
    """What the parts look like without colours, as text."""
    with (made := Console(width=_UNWRAPPED, color_system=None, highlight=False, markup=False)).capture() as captured:
        for part in parts:
            made.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
