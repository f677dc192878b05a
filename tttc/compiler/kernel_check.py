"""Whether the kernels of a backend compute what the program says: `TTTC_CHECK=1` runs both on the same random inputs.

Each scan and its reverse, interpreted, against what the backend made of them: the text of a kernel decides the order of
its statements, and which value has a line of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from tttc.backends.scan import CompiledScan, NotBuilt
from tttc.compiler.stage_check import TOLERANCE, Arrays, nearby, random_arguments, relative_error
from tttc.errors import PassChangedMeaning
from tttc.ir.expr import Expr
from tttc.ir.interpret import interpret
from tttc.ir.names import spelled
from tttc.ir.program import AdjointProgram, Function, Program, Scan

CHECKPOINTS = (0, 2)  # every value kept, and every other carry


def check_kernels(
    program: AdjointProgram, scans: Mapping[str, CompiledScan], device: torch.device, tokens: int = 21
) -> None:
    """Raise `PassChangedMeaning` naming the scan and the tensor of it that the kernels have otherwise.

    Of float64 alone: in less, rounding may be as large as a fault. A kernel that cannot be made says so when called.
    """
    if program.dtype != "f64":
        return
    for scan in program.scans:
        try:
            for function, found, arguments in _runs(program, scan, scans[scan.name], device, tokens):
                _compare(replace(program, functions=(function,)), function, arguments, found)
        except NotBuilt:
            continue


def _runs(
    program: AdjointProgram, scan: Scan, kernels: CompiledScan, device: torch.device, tokens: int
) -> Iterator[tuple[Function, tuple[torch.Tensor, ...], Arrays]]:
    """A function of the program, what the kernels make of it, and on which arguments."""
    forward = scan.function()
    arguments = random_arguments(forward.params, program.dims, tokens)

    def given(params: tuple[Expr, ...], arrays: Arrays) -> list[torch.Tensor]:
        return [torch.as_tensor(arrays[p.name], dtype=torch.float64, device=device)[None, None] for p in params]

    inputs = given(scan.params, arguments)
    yield forward, kernels.forward(inputs, None)[0], arguments
    if not scan.differentiated:
        return
    backward = program[f"{scan.name}_adjoint"]
    arguments |= random_arguments(backward.params, program.dims, tokens)
    inputs = given(scan.params, arguments)
    cotangents = given(program.adjoint_of(scan).cotangents, arguments)
    for checkpoint in CHECKPOINTS:
        _, saved = kernels.forward(inputs, checkpoint)
        yield backward, kernels.backward(inputs, saved, checkpoint, cotangents), arguments


def _compare(program: Program, function: Function, arguments: Arrays, found: tuple[torch.Tensor, ...]) -> None:
    """They may differ by what becomes of rounding: by as much as the program itself does on inputs that far away."""
    wanted, again = interpret(program, function.name, arguments), None
    for i, (returned, x, y) in enumerate(zip(function.returns, wanted, found, strict=True)):
        error = relative_error(x, y[0, 0].cpu().numpy())
        if not np.all(np.isfinite(x)) or error <= TOLERANCE:
            continue
        again = again or interpret(program, function.name, nearby(arguments))
        if not error <= relative_error(x, again[i]):
            changed = f"the output {spelled(returned.name)} of {function.name}: relative error {error:.1e}"
            raise PassChangedMeaning(f"stage 'emit' changed {changed}")
