"""The command `tttc` itself: its help, the options that several commands have, and errors as messages."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
import typer.core
from rich.text import Text

from tttc.errors import TTTCError
from tttc.terminal import console


class _Commands(typer.core.TyperGroup):
    """The commands, with errors of `tttc` as messages instead of tracebacks."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TTTCError as error:
            if os.environ.get("TTTC_DEBUG", "0") not in ("", "0"):
                raise
            console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    help="A compiler for Test-Time-Training layers: declare the inner-loop learner, get its kernels.",
    epilog="A VARIANT is a ready one (see `tttc list`), file.py:Class, or a file.py with one declaration. "
    "TTTC_DEBUG=1 shows tracebacks.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

VARIANT = typer.Argument(metavar="VARIANT", help="A ready variant, file.py:Class, or a file.py that declares one.")
VariantArgument = Annotated[str, VARIANT]
DimOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dim",
        "--dims",
        metavar="NAME=SIZE",
        help="Size of a dim, may be repeated; or D=64,F=256. Otherwise D=64, F=4*D, the rest D.",
    ),
]


def sizes(dim: list[str] | None) -> dict[str, int]:
    """["D=64"], or ["D=64,F=256"], as {"D": 64}."""
    found = {}
    for text in (part for given in dim or [] for part in given.split(",")):
        name, _, size = text.partition("=")
        if not (name.isidentifier() and size.isdecimal() and int(size) > 0):
            raise typer.BadParameter(f"{text!r} is not a dim and its size, such as D=64.", param_hint="--dim")
        found[name] = int(size)
    return found
