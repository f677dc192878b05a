"""`tttc export`: a layer as a file for programs that have no tttc."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tttc.cli.app import DimOption, VariantArgument, sizes
from tttc.cli.loading import full_dims, load_variant
from tttc.compiler.driver import compile as compile_layer
from tttc.errors import TTTCError
from tttc.export import onnx
from tttc.terminal import console


def export(
    variant: VariantArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    form: Annotated[
        Literal["onnx"], typer.Option("--format", help="onnx: one graph for ONNX Runtime, its state in and out.")
    ] = "onnx",
    dim: DimOption = None,
) -> None:
    """Write a layer as a file for programs that have no tttc, once it was seen to compute what the layer does.

    An ONNX file takes any number of sequences, heads and tokens, from none on, and its state from call to call.

        tttc export ttt_linear -o ttt_linear.onnx
        tttc export mine.py:Mine --format onnx --dim D=128 -o mine.onnx
    """
    found = load_variant(variant)
    layer = compile_layer(found, full_dims(found, sizes(dim)), backend="torch")
    with console(stderr=True).status(f"comparing {output} with the layer ..."):
        try:
            onnx.save(layer, output)
        except OSError as error:
            raise TTTCError(f"cannot write {output}: {error.strerror}.") from error
    console(stderr=True).print(f"wrote {output}", soft_wrap=True)
