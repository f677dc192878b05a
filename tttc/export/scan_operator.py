"""What is used here of torch that torch calls private: its `scan` operator, and how shapes that vary are traced.

scan(step, carry, sequences, fixed)     carry, [N, ...] sequences -> carry, [N, ...] outputs: one operator of the graph
varying(n)                              a number of a graph of which nothing is assumed, so that none is built in
traced(module, arguments, shapes)       `torch.export.export` that takes lengths of one for lengths like any other
packaged(program, path)                 AOTInductor's package

All of it is of one version of torch: `available` refuses another, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch

from tttc.errors import BackendRefusal

VERSION = "2.13"
"""Of torch, whose operator this was written for and tried with."""

Tensors = Sequence[torch.Tensor]


def available() -> None:
    """Raises `BackendRefusal` where torch is another one."""
    found = ".".join(torch.__version__.split(".")[:2])
    if found != VERSION:
        raise BackendRefusal(
            f"a program without tttc is made of an operator of torch {VERSION} that other versions may not have; this "
            f"is torch {torch.__version__}.\n  Install torch {VERSION} where the package is made."
        )


def scan(
    step: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]],
    carry: Tensors,
    sequences: Tensors,
    fixed: Sequence[Any],
) -> tuple[Tensors, Tensors]:
    """Run `step(carry, rows, fixed)` over the first axis of the sequences, as one operator of the graph being traced.

    `fixed` are tensors, and each size of these shapes that is a number of the graph. The step returns the new carry and
    what is stacked.
    """
    n, m = len(carry), len(carry) + len(sequences)

    def flat(*values: Any) -> list[torch.Tensor]:
        new, rows = step(values[:n], values[n:m], values[m:])
        return [_apart(x) for x in (*new, *rows)]  # none may lie in the memory of another

    operator = import_module("torch._higher_order_ops.scan").scan_op
    given = [_apart(x) for x in (*carry, *sequences, *fixed)]  # two that are one tensor would be taken for one variable
    found = operator(flat, given[:n], given[n:m], tuple(given[m:]))
    return found[:n], found[n:]


def _apart(x: Any) -> Any:
    return x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x


def varying(n: Any) -> Any:
    """The same number, at least one, read back from a tensor: no graph takes it for that of the example."""
    read = torch.full((), n, dtype=torch.int64).item()
    torch._check(read >= 1)
    return read


def traced(module: torch.nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
    """The module as a `torch.export.ExportedProgram`, forward only; raises `BackendRefusal` with torch's reason."""
    settings = import_module("torch.fx.experimental._config")
    refused: type[Exception] = import_module("torch._dynamo.exc").UserError
    try:
        with torch.no_grad(), settings.patch(backed_size_oblivious=True):
            return torch.export.export(module, args, dict(named), dynamic_shapes=dict(shapes))
    except refused as error:
        said = str(error).partition("\nThe error above")[0].strip()
        raise BackendRefusal(f"{type(module).__name__} is not traced for lengths that vary: {said}") from error


def runnable(program: Any) -> Callable[..., Any]:
    """The program as a function. What tracing noted of sizes that it then did not use is not asked of a call."""
    function: Callable[..., Any] = program.module(check_guards=False)
    return function


def packaged(program: Any, path: Path, about: Mapping[str, str]) -> Path:
    """Compile an exported program for this machine's kind of processor, with what is said about it."""
    inductor = import_module("torch._inductor")
    settings = {"aot_inductor.metadata": dict(about)}
    with catch_warnings():
        simplefilter("ignore", FutureWarning)  # of what torch itself will no longer have
        return Path(inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings))


def loaded(path: Path) -> Callable[..., Any]:
    """A package as a function."""
    function: Callable[..., Any] = import_module("torch._inductor").aoti_load_package(str(path))
    return function
