"""Kernels for a GPU that need not be there: their source, their machine code, and what they take of the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tttc.backends import nvidia, registry
from tttc.backends.interface import Built
from tttc.backends.registry import Unit
from tttc.backends.target import Target
from tttc.compiler.driver import SUPPORTED_DTYPES, untuned
from tttc.declare.variant import Variant
from tttc.errors import BackendRefusal, TTTCError
from tttc.ir.program import AdjointProgram


def refuse_to_compile(unit: Unit, target: str, program: AdjointProgram) -> None:
    """Raise `BackendRefusal` where a backend cannot compile the program for a target here."""
    assert unit.compiler is not None
    if reasons := [*unit.missing(), *unit.compiler().unbuildable(program, target)]:
        listed = "\n".join(f"  - {r}" for r in reasons)
        raise BackendRefusal(f"cannot compile for {target} here:\n{listed}")


def compile_for(
    variant: type[Variant],
    dims: Mapping[str, int],
    target: str,
    dtype: str = "float32",
    backend: str = "auto",
) -> Iterator[Built]:
    """The kernels of a variant for a target such as sm_90 or gfx942, one by one.

    Raises:
        TTTCError: if there is no such target, dtype or backend, or nothing that could compile for it.
    """
    try:
        gpu = Target(target)
    except ValueError as error:
        known = "Name a compute capability, such as sm_80 or sm_90, or an AMD GPU, such as gfx942."
        raise TTTCError(f"{error}.\n  {known}") from None
    names = {str(d).removeprefix("torch."): d for d in SUPPORTED_DTYPES}
    if dtype not in names:
        raise TTTCError(f"there is no dtype {dtype!r}.\n  There are {', '.join(names)}.")
    if (oldest := gpu.oldest_for(names[dtype])) != gpu:
        raise TTTCError(f"{target} has no tensor cores for {dtype}.\n  Use {oldest.name} or newer, or float32.")
    unit = _compiler(backend, gpu)
    program = untuned(variant, dims, unit.backend)
    refuse_to_compile(unit, target, program)
    assert unit.compiler is not None
    try:
        yield from unit.compiler().build(program, target, names[dtype])
    except nvidia.ToolkitMissing as error:
        raise TTTCError(str(error)) from error


def _compiler(backend: str, target: Target) -> Unit:
    """The backend of that name, or the first, if it compiles for a target."""
    known = registry.compilers()
    unit = next((u for u in known if backend in ("auto", u.name)), None)
    if unit is None:
        raise TTTCError(f"backend {backend!r} compiles for no GPU.\n  There are {', '.join(u.name for u in known)}.")
    if target.vendor not in unit.targets:
        others = [u.name for u in known if target.vendor in u.targets]
        raise TTTCError(
            f"backend {backend!r} compiles for {' and '.join(unit.targets)} GPUs, not for {target.name}.\n"
            f"  Use --backend {others[0]}."
        )
    return unit
