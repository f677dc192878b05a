"""The command line: `tttc list | explain | check | verify | compile | export | tune | doctor | demo`.

Each command is a few lines over a function that Python code can call as well. Errors of class `TTTCError` are
the user's to mend: they are printed without a traceback, and the exit code is 2. A declaration that was
checked or verified and found wanting gives 1, one that cannot be verified 3.
"""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import typer.core
from rich.text import Text

from tttc.cli.app import VARIANT, DimOption, VariantArgument, app, sizes
from tttc.cli.doctor import diagnose
from tttc.cli.export import HELP as EXPORT_HELP
from tttc.cli.export import export
from tttc.cli.loading import full_dims, library_variants, load_network, load_variant
from tttc.cli.printing import kernel_table, print_diagnosis
from tttc.compiler.aot import compile_for
from tttc.compiler.driver import SUPPORTED_DTYPES, source_of
from tttc.compiler.driver import compile as compile_layer
from tttc.declare.checks import check as check_declaration
from tttc.declare.read import read_declaration
from tttc.declare.variant import Variant
from tttc.errors import TTTCError, TuningError
from tttc.explain.report import summary
from tttc.runtime.layer import Layer
from tttc.terminal import console, error_table, print_program, table
from tttc.tuning.database import database_path, export_to, import_from
from tttc.tuning.tune import tune as tune_variant
from tttc.verification.comparison import verify as verify_variant
from tttc.version import __version__

NOT_ALL_COMPARED = 3  # the exit code of a verification in which nothing differs, but not everything could be compared
DEMO_NEEDS = ("matplotlib", "jinja2", "markupsafe", "pygments")  # the extra `demo`
VERIFIED_WIDTH = 8  # the definition runs token by token: wide enough to be wrong, narrow enough to be quick


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tttc {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


@app.command("list")
def list_variants() -> None:
    """Show the ready declarations.

    Their source, tttc/library.py, is the best place to begin a declaration of one's own.
    """
    found = table("name", "what it is", "mini-batch", "read", "states", numbers=["mini-batch"])
    for name, variant in library_variants().items():
        declared, _ = read_declaration(variant)
        states = ", ".join(f"{state}[{', '.join(spec.dims)}]" for state, spec in declared.states.items())
        found.add_row(name, _first_line(variant), str(declared.mini_batch), declared.read, states)
    console().print(found)


def _first_line(variant: type[Variant]) -> str:
    return (variant.__doc__ or "").strip().partition("\n")[0]


@app.command()
def explain(
    variant: VariantArgument,
    whole: Annotated[
        bool, typer.Option("--stages/--summary", "--all", help="Print every stage with its costs, or one page.")
    ] = False,
    stage: Annotated[str | None, typer.Option(metavar="NAME", help="Print this stage alone.")] = None,
    dim: DimOption = None,
    latex: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the mathematics as LaTeX; - for stdout.")
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="STAGE STAGE", help="Print what changes from one stage to another."),
    ] = None,
) -> None:
    """Print a page about a variant: its rule in formulas, the form that was found, the costs, and why this backend.

    --stages prints all that the compiler did, stage by stage: declare, differentiate, simplify, primal, dualize,
    schedule, adjoint and emit.

        tttc explain ttt_mlp
        tttc explain ttt_mlp --stages
        tttc explain ttt_mlp --stage dualize
        tttc explain mine.py:Mine --diff primal dualize
        tttc explain mine.py:Mine --dim D=128 --latex mine.tex
        tttc explain mine.py:model    (a tttc.nn.EndToEnd, or a function that makes one)
    """
    if (network := load_network(variant)) is not None:
        return print(network.explain(), end="")
    layer = _compiled(variant, dim)
    if latex is not None:
        _write(layer.explain(latex=True), latex)
    elif diff is not None:
        print_program(layer.stages.diff(*(_stage(layer, name) for name in diff)))
    elif stage is not None:
        print_program(str(layer.stages[_stage(layer, stage)]))
    elif whole:
        print_program(layer.explain())
    else:
        console().print(Text(summary(layer)), soft_wrap=True, end="")


def _compiled(name: str, dim: list[str] | None, **settings: Any) -> Layer:
    variant = load_variant(name)
    return compile_layer(variant, full_dims(variant, sizes(dim)), **settings)


def _stage(layer: Layer, name: str) -> str:
    """The name, if it is that of a stage."""
    names = [entry.name for entry in layer.stages]
    if name not in names:
        raise TTTCError(f"there is no stage `{name}`.\n  The stages are {', '.join(names)}.")
    return name


def _write(text: str, target: str) -> None:
    """To a file, or to stdout for `-`."""
    text = text.rstrip("\n")
    if target == "-":
        print(text)
    else:
        try:
            Path(target).write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise TTTCError(f"cannot write {target}: {error.strerror}.") from error
        console(stderr=True).print(f"wrote {target}", soft_wrap=True)


@app.command()
def check(variant: VariantArgument) -> None:
    """List everything that is wrong with a declaration, without compiling it.

    The exit code is 1 if anything is.

        tttc check mine.py:Mine
    """
    found = load_variant(variant)
    problems = check_declaration(found)
    for number, problem in enumerate(problems, 1):
        console().print(Text(f"{number}. {problem}\n"), soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    console().print(f"{found.__name__}: nothing is wrong with the declaration.")


@app.command()
def verify(
    variant: VariantArgument,
    dim: Annotated[
        list[str] | None,
        typer.Option(
            "--dim",
            metavar="NAME=SIZE",
            help="Size of a dim, may be repeated. Otherwise D=8, F=4*D, the rest D.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the sequence.", min=0)] = 37,
    heads: Annotated[int, typer.Option(help="Number of heads.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    backend: Annotated[
        str, typer.Option(help="What computes the layer: torch at once, tvm after its kernels are compiled.")
    ] = "auto",
) -> None:
    """Compare the compiled layer with the declaration, run token by token in float64, gradients included.

    One line per tensor: the error relative to its norm. More than the usual is allowed where the declaration itself
    multiplies rounding: that is measured, and said. The exit code is 1 if a tensor differs, and 3 if none does but some
    cannot be compared: the declaration is not finite on these inputs, or makes more of a rounding than 1e-5.

        tttc verify ttt_mlp
        tttc verify mine.py:Mine --dim D=8 --tokens 50
    """
    found = load_variant(variant)
    dims = full_dims(found, {"D": VERIFIED_WIDTH} | sizes(dim))
    result = verify_variant(found, dims, tokens=tokens, heads=heads, seed=seed, backend=backend)
    console().print(error_table(result.rows))
    console().print(Text("\n".join(["", result.headline, *result.notes])), soft_wrap=True)
    if not result.ok:
        raise typer.Exit(1 if result.differs else NOT_ALL_COMPARED)


@app.command("compile")
def compile_variant(
    variant: VariantArgument,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PATH", help="The file to write, else stdout; a folder with --target."),
    ] = None,
    dim: DimOption = None,
    backend: Annotated[
        str, typer.Option(help="Which backend writes it; auto takes the best that can run here.")
    ] = "auto",
    target: Annotated[
        str | None, typer.Option(metavar="sm_90|gfx942|...", help="Compile for this GPU, which need not be there.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of q, k, v and z, with --target: bfloat16 and float16 use tensor cores.")
    ] = "float32",
) -> None:
    """Write the source that is generated for a variant, or compile it for a GPU and say what each kernel takes.

    With --target, -o is a folder for the source, the PTX, the machine code and how to launch it.

        tttc compile ttt_mlp
        tttc compile mine.py:Mine --dim D=128 --backend torch -o mine_layer.py
        tttc compile ttt_mlp --target sm_90 --dtype bfloat16 -o kernels
    """
    if target is not None:
        _compile_for(load_variant(variant), dim, target, dtype, backend, output)
        return
    found = load_variant(variant)
    source = source_of(found, full_dims(found, sizes(dim)), backend=backend).text
    if output is None:
        print_program(source)
    else:
        _write(source, str(output))


def _compile_for(
    variant: type[Variant], dim: list[str] | None, target: str, dtype: str, backend: str, folder: Path | None
) -> None:
    kernels = []
    with console(stderr=True).status(f"compiling for {target} ..."):
        for built in compile_for(variant, full_dims(variant, sizes(dim)), target, dtype, backend):
            kernels.append(built)
            if folder is not None:
                try:
                    built.write(folder)
                except OSError as error:
                    raise TTTCError(f"cannot write {folder}: {error.strerror}.") from error
    console().print(kernel_table(kernels))
    if folder is not None:
        console(stderr=True).print(f"wrote {folder}", soft_wrap=True)


app.command(help=EXPORT_HELP)(export)


@app.command()
def tune(
    variant: Annotated[str | None, VARIANT] = None,
    device: Annotated[
        str,
        typer.Option(help="What to tune for: cpu, or a GPU that need not be there, sm_80, sm_90, sm_100 or gfx942."),
    ] = "cpu",
    budget: Annotated[str, typer.Option(metavar="TIME", help="How long it may take: 60s, 2m, 1h.")] = "60s",
    dim: DimOption = None,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[
        str, typer.Option(help="Whose kernels: tvm, torch, triton for a GPU, or auto, native ones if they run.")
    ] = "auto",
    forward_only: Annotated[
        bool, typer.Option("--forward-only", help="Time the forward alone, not forward and backward.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Length of the sequence that is timed or estimated.", min=1)] = 2048,
    batch: Annotated[int | None, typer.Option(help="Its batch, 1 on a CPU and 16 on a GPU.", min=1)] = None,
    heads: Annotated[int, typer.Option(help="Its heads.", min=1)] = 12,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write everything tuned so far to a file.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="Merge such a file; the faster result stays.")
    ] = None,
) -> None:
    """Find the fastest chunk, checkpoints and kernels for this machine, and keep them for every later compilation.

    Each candidate is compared with the declaration in float64 before it is timed. What is kept holds for any batch and
    any number of tokens. Ctrl-C ends it with the best so far. TTTC_TUNING=0 ignores all results.

    For a GPU nothing runs: each candidate is compiled for it, and an estimate from what the compiler says and from the
    program's cost ranks those that fit. What was measured on a device is taken before what was estimated for it.

        tttc tune ttt_linear --budget 60s
        tttc tune ttt_linear --device sm_90 --dtype bfloat16 --budget 2m
        tttc tune mine.py:Mine --dims D=128 --dtype bfloat16 --forward-only
        tttc tune --export tuned.json
    """
    if variant is None and export is None and source is None:
        raise TuningError("there is nothing to tune.\n  Give a variant, or a file with --import or --export.")
    if source is not None:
        _say(f"merged {_results(import_from(source))} of {source} into {database_path()}")
    if variant is not None:
        found = load_variant(variant)
        result = tune_variant(
            found,
            full_dims(found, sizes(dim)),
            _dtype(dtype),
            device,
            budget,
            backend=backend,
            batch=batch,
            tokens=tokens,
            heads=heads,
            forward_only=forward_only,
        )
        console().print(result.table())
        console().print(Text(f"\n{result.summary()}"), soft_wrap=True)
    if export is not None:
        _say(f"wrote {_results(export_to(export))} to {export}")


def _say(text: str) -> None:
    console(stderr=True).print(text, soft_wrap=True)


def _results(count: int) -> str:
    return f"{count} result{'' if count == 1 else 's'}"


def _dtype(name: str) -> torch.dtype:
    """float32 or torch.float32 as the dtype."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in SUPPORTED_DTYPES}
    found = known.get(name.removeprefix("torch."))
    if found is None:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}.", param_hint="--dtype")
    return found


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show what this machine can run, what it cannot, and what would change that.

    The exit code is 1 if anything is wrong; a package that is merely absent is not.

        tttc doctor
        tttc doctor --json
    """
    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.as_json(), indent=2))
    else:
        print_diagnosis(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the report.")] = Path("tttc-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes and shorter training: under a minute.")] = False,
) -> None:
    """Declare a layer that nobody has written a kernel for, compile it, prove it, time it, train with it.

    Takes under five minutes on two cores and writes an HTML report. The exit code is 1 if the layer differs
    from its definition, or if a language model learns less than byte pairs tell.

        tttc demo
        tttc demo --quick --out my-report
    """
    if absent := [n for n in DEMO_NEEDS if find_spec(n) is None]:
        raise TTTCError(
            f"the demo writes its report with {', '.join(DEMO_NEEDS)}, and {', '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} not installed.\n  pip install 'tttc[demo]'"
        )
    example = import_module("tttc.examples.demo.main")  # what it needs no other command does
    try:
        example.run_demo(out, quick)
    except example.DemoFailed as failure:
        console(stderr=True).print(Text(f"demo failed: {failure}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from failure
