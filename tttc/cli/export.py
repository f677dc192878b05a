"""`tttc export`: a layer as a file for programs that have no tttc. `FORMATS` has a row for each kind of file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tttc.cli.app import DimOption, VariantArgument, sizes
from tttc.cli.loading import full_dims, load_variant
from tttc.compiler.driver import compile as compile_layer
from tttc.errors import TTTCError
from tttc.export import hub, onnx, package, python
from tttc.terminal import console


class Form(StrEnum):
    """What `--format` may be."""

    ONNX = "onnx"
    AOTI = "aoti"
    PT2 = "pt2"
    PYTHON = "python"
    HUB = "hub"


@dataclass(frozen=True)
class Exporter:
    """A kind of file: what it is, a command that writes one, what writes it and says where, and the options of the
    command that this is given.
    """

    about: str
    example: str
    save: Callable[..., Any]
    options: tuple[str, ...] = ()


FORMATS = {
    Form.ONNX: Exporter(
        "one graph for ONNX Runtime, its state in and out, for any number of sequences, heads and tokens",
        "tttc export ttt_linear --format onnx -o ttt_linear.onnx",
        onnx.save,
        ("linear",),
    ),
    Form.AOTI: Exporter(
        "a package of AOTInductor for processes that have torch alone; sequences begin with the call",
        "tttc export ttt_mlp --format aoti -o ttt_mlp.pt2",
        package.save_inlined,
    ),
    Form.PT2: Exporter(
        "an exported program and the layer's own, for processes that have tttc and not the declaration",
        "tttc export ttt_mlp --format pt2 -o ttt_mlp.pt2",
        package.save_layer,
    ),
    Form.PYTHON: Exporter(
        "one file to read, with the mathematics, the PyTorch program, Triton kernels, a module, and a test of itself",
        "tttc export ttt_mlp --format python --dim D=64 -o ttt_mlp.py",
        python.save,
    ),
    Form.HUB: Exporter(
        "the same as a folder that the kernels library of Hugging Face loads",
        "tttc export gated_delta_net --format hub -o gated-delta-net",
        hub.save,
    ),
}

HELP = "\n".join(
    [
        "Write a layer as a file for programs that have no tttc, once it was seen to compute what the layer does.\n",
        *(f"{form}: {f.about}\n\n    {f.example}\n" for form, f in FORMATS.items()),
        "One of your own: tttc export mine.py:Mine --dim D=128 -o mine.onnx",
    ]
)


def export(
    variant: VariantArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="What to write.")],
    form: Annotated[Form, typer.Option("--format", help="What to write it as.")] = Form.ONNX,
    dim: DimOption = None,
    linear: Annotated[
        onnx.Linear,
        typer.Option(
            help="onnx: whose LinearAttention a rule is that has one, scan for none, auto for what is fastest."
        ),
    ] = "auto",
) -> None:
    """Write a layer as a file for programs that have no tttc; HELP says as what."""
    format_, given = FORMATS[form], {"linear": linear}
    found = load_variant(variant)
    layer = compile_layer(found, full_dims(found, sizes(dim)), backend="torch")
    with console(stderr=True).status(f"comparing {output} with the layer ..."):
        try:
            format_.save(layer, output, **{n: given[n] for n in format_.options})
        except OSError as error:
            raise TTTCError(f"cannot write {output}: {error.strerror}.") from error
    console(stderr=True).print(f"wrote {output}", soft_wrap=True)
