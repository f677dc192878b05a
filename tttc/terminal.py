"""Printing for two readers: a person at a terminal, and a program behind a pipe that wants the bare text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Protocol

from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

_UNWRAPPED = 1000  # columns; wider than any line that is printed


class MeasuredError(Protocol):
    """One row of what `tttc.verify` returns."""

    @property
    def name(self) -> str: ...
    @property
    def error(self) -> float: ...
    @property
    def tolerance(self) -> float: ...


def console(*, stderr: bool = False) -> Console:
    """Where to print: styled and as wide as the terminal, or plain and unwrapped if it is none."""
    stream = sys.stderr if stderr else sys.stdout
    if stream.isatty():
        return Console(stderr=stderr, highlight=False, markup=False)
    return Console(stderr=stderr, highlight=False, markup=False, width=_UNWRAPPED, color_system=None)


def print_program(text: str) -> None:
    """Program text, with colours on a terminal; elsewhere as it is, so that it can be saved and run."""
    if sys.stdout.isatty():
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


def error_table(rows: Iterable[MeasuredError]) -> Table:
    """One line per tensor: how far it is from the definition, and how far it may be."""
    made = table("tensor", "error", "tolerance", "", numbers=("error", "tolerance"))
    for row in rows:
        verdict = Text("ok", style="green") if row.error <= row.tolerance else Text("differs", style="bold red")
        made.add_row(row.name, f"{row.error:.1e}", f"{row.tolerance:.1e}", verdict)
    return made
